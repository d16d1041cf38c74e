"""Handlers of `logging` that a soft time limit passes through, which may strike while a task logs."""

from __future__ import annotations

import logging
import sys
from logging.handlers import WatchedFileHandler
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded

__all__ = ["File", "Passing", "Stream"]


class Passing(logging.Handler):
    """Takes an error that comes while it writes for its own, as all handlers do; but not the end of a task's time."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (`logging`'s name)
        """Raise it again, if it is a soft time limit."""
        if isinstance(sys.exc_info()[1], SoftTimeLimitExceeded):
            raise  # (it is called while the error is handled)
        super().handleError(record)


class Stream(Passing, logging.StreamHandler[Any]):
    """Writes to a stream."""


class File(Passing, WatchedFileHandler):
    """Writes to a file, and opens it anew when it was moved away."""
