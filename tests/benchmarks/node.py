"""The app that a measured worker runs: ``celery -A tests.benchmarks.node worker``."""

from __future__ import annotations

import os

from tests.benchmarks.subjects import SUBJECT, URL, Subject, declare

__all__ = ["app"]

app = declare(Subject.read(os.environ[SUBJECT]), url=os.environ[URL]).app
