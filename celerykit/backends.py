"""
Celery's Redis result backends, without a round trip at each publish.

Stock, a caller subscribes to a result before its task is sent, whether or not
anybody will wait for it; with the backend down, publishing then blocks for
seconds. Waiting subscribes as well, and looks at what is stored already, so
nothing is missed by leaving the first subscription out.
"""

from __future__ import annotations

from typing import Any

import celery.backends.redis

from celerykit.settings import settle

__all__ = ["RedisBackend", "SentinelBackend"]


class RedisBackend(celery.backends.redis.RedisBackend):
    """Subscribes to a result when somebody waits for it; takes Valkey's URLs too."""

    def __init__(self, *args: Any, app: Any, url: str | None = None, **kwargs: Any) -> None:
        settled = settle(url, has_tls_options=bool(app.conf.redis_backend_use_ssl))
        init: Any = super().__init__
        init(*args, app=app, url=settled, **kwargs)

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Do nothing; see the module."""


class SentinelBackend(celery.backends.redis.SentinelBackend):
    """Subscribes to a result when somebody waits for it."""

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Do nothing; see the module."""
