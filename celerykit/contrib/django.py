"""
Django: the task class that an app has in a Django project.
"""

from __future__ import annotations

from typing import Any

import celery.contrib.django.task

from celerykit.task import P, R, Task

__all__ = ["DjangoTask"]

# Celery's stubs know a class without parameters.
_Stock: Any = celery.contrib.django.task.DjangoTask


class DjangoTask(Task[P, R], _Stock):  # type: ignore[misc]
    """A typed task with Celery's ``delay_on_commit`` and ``apply_async_on_commit``."""

    abstract = True
