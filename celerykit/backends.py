"""
Celery's Redis result backends, without a round trip at each publish, and patient with what a task has achieved.

Stock, a caller subscribes to a result before its task is sent, whether or not
anybody will wait for it; with the backend down, publishing then blocks for
seconds. Waiting subscribes as well, and looks at what is stored already, so
nothing is missed by leaving the first subscription out.

And stock, with the backend down, a task that has finished either loses its
result, or, told to try for ever (``result_backend_always_retry``), everybody
does, who only asks for a state, too. Here it is the finished task that tries on.
"""

from __future__ import annotations

from typing import Any

import celery.backends.redis
from celery._state import get_current_worker_task

from celerykit.settings import settle
from celerykit.task import FINISHED

__all__ = ["RedisBackend", "SentinelBackend"]


class _Patient:
    """Tries on for ever where a task has run, and its outcome would be lost; elsewhere as it is told."""

    _is_told_to = False

    @property
    def always_retry(self) -> bool:
        """Tell Celery whether to try an operation again that failed."""
        return self._is_told_to or hasattr(getattr(get_current_worker_task(), "request", None), FINISHED)

    @always_retry.setter
    def always_retry(self, value: bool) -> None:
        self._is_told_to = value


class RedisBackend(_Patient, celery.backends.redis.RedisBackend):
    """Subscribes to a result when somebody waits for it; takes Valkey's URLs too."""

    def __init__(self, *args: Any, app: Any, url: str | None = None, **kwargs: Any) -> None:
        settled = settle(url, has_tls_options=bool(app.conf.redis_backend_use_ssl))
        init: Any = super().__init__
        init(*args, app=app, url=settled, **kwargs)

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Do nothing; see the module."""


class SentinelBackend(_Patient, celery.backends.redis.SentinelBackend):
    """Subscribes to a result when somebody waits for it."""

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Do nothing; see the module."""
