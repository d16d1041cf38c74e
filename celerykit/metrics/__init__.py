"""
Numbers for Prometheus. Needs ``celerykit[metrics]``.

A worker serves them by itself, with ``CELERYKIT_METRICS_PORT``
(`celerykit.worker.serving`); a web process has `enable`.

::

    names     every metric
    counting  what is counted when
    files     the numbers of a worker, which all its processes add to
"""

from __future__ import annotations

from typing import Any

from celerykit.errors import InvalidSettings
from celerykit.metrics.names import METRICS, Metric

__all__ = ["METRICS", "Metric", "check_extra", "enable"]


def check_extra(needed_by: str) -> None:
    """
    Refuse to go on without prometheus-client.

    Raises:
        InvalidSettings: It says how to get it.
    """
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        problem = f"{needed_by} needs prometheus-client: pip install 'celerykit[metrics]'."
        raise InvalidSettings(problem, [problem]) from None


def enable(app: Any = None) -> None:
    """
    Count what this process sends, among prometheus-client's own metrics (its default registry).

    For processes that are no workers: those of a website, say, which serve
    their numbers as they do already, by several processes too. Does nothing in
    a worker that serves its own numbers, and nothing when called again.

    Args:
        app:
            Celery's current app unless given.

    Raises:
        InvalidSettings: prometheus-client is not installed.
    """
    check_extra("celerykit.metrics.enable()")
    from celery import current_app

    from celerykit.metrics import own

    own.enable(app if app is not None else current_app)
