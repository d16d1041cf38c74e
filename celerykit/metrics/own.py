"""
Numbers of a process that serves what prometheus-client has by itself, such as a website.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, Counter

from celerykit.metrics import names
from celerykit.metrics.counting import Counting
from celerykit.metrics.names import Metric

__all__ = ["Own", "enable"]

#: What happens in a process that runs no tasks.
_HERE = (names.SENT, names.DUPLICATE, names.CLAIMS)

#: What was enabled in this process; what is empty counts no more.
_here: list[Own] = []

_is_worker = False


class Own:
    """Numbers in the default registry."""

    def __init__(self) -> None:
        self.counters = {metric: Counter(metric.family, metric.meaning, metric.labels) for metric in _HERE}

    def count(self, metric: Metric, *labels: str, by: float = 1.0) -> None:
        """Add to a counter."""
        if counter := self.counters.get(metric):
            counter.labels(*labels).inc(by)

    def measure(self, metric: Metric, seconds: float, *labels: str) -> None:
        """Do nothing: where nothing runs, nothing takes time."""


def enable(app: Any) -> None:
    """Count in this process, once."""
    if _here or _is_worker:
        return
    _here.append(Own())
    Counting(app, _here[0]).watch_calls()


def stop() -> None:
    """Leave it to the worker that this process is; its app's modules may have enabled it for all processes."""
    global _is_worker
    _is_worker = True
    for own in _here:
        for counter in own.counters.values():
            REGISTRY.unregister(counter)
        own.counters.clear()
