"""
Celery's step that lets a worker serve its numbers, if it is to.
"""

from __future__ import annotations

from typing import Any

from celery import bootsteps

from celerykit.metrics import check_extra

__all__ = ["MetricsStep"]


class MetricsStep(bootsteps.StartStopStep):
    """Counts from before the pool's processes are forked, and serves from when they are there."""

    requires = ("celery.worker.components:Pool",)

    def include_if(self, parent: Any) -> bool:
        """Tell whether ``CELERYKIT_METRICS_PORT`` is set."""
        return parent.app.settings.kit.metrics_port is not None

    def create(self, parent: Any) -> Any:
        """
        Begin to count.

        Raises:
            InvalidSettings: prometheus-client is not installed.
        """
        check_extra("CELERYKIT_METRICS_PORT")
        from celerykit.worker.serving import Server

        return Server(parent)

    def stop(self, parent: Any) -> None:
        """Serve on: what runs may take its time to end."""

    def terminate(self, parent: Any) -> None:
        """Serve on."""
