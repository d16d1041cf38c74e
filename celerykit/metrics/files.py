"""
Numbers that all processes of a worker add to: files in shared memory, one set for each place in the pool.

The format is that of prometheus-client's multiprocess mode, and its own
collector reads it. That mode as a whole is not for a worker: it must be on
before anybody imports the library, which the app's modules may have done; it
keeps files for every process there ever was; and its lock may be held by
another thread at the moment of a fork. Here a child writes to the files of its
place, which go on where the child before it ended, however that was.

``prometheus_client.mmap_dict`` is undocumented, and used here and nowhere else;
a test names the versions.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
import threading
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from prometheus_client import mmap_dict, utils

from celerykit.metrics.names import BUCKETS, Metric

__all__ = ["Files"]

#: Half of it has no types.
_MmapedDict: Any = mmap_dict.MmapedDict

_PREFIX = "celerykit-metrics-"

#: Held by a worker, and by its children, as long as they live.
_LOCK = "lock"


class Files:
    """
    The numbers of one worker, in a folder of its own that goes with it.

    Attributes:
        folder:
            For ``MultiProcessCollector``.
    """

    def __init__(self) -> None:
        _sweep()
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._held = _locked(self.folder)
        self._numbers: dict[str, Any] = {}
        self._keys: dict[tuple[Any, ...], Any] = {}
        self.write_as("main")
        # Another thread may hold it at the moment of a fork.
        os.register_at_fork(after_in_child=self._unlock)
        atexit.register(self._remove, os.getpid())

    def write_as(self, place: str) -> None:
        """Write to other files from now on; no other process may write to them at the same time."""
        # Nothing is closed: the files of the process that we were forked from are mapped here, too.
        self._unlock()
        self._numbers = {
            kind: _MmapedDict(str(self.folder / f"{kind}_{place}.db")) for kind in ("counter", "histogram")
        }

    def _unlock(self) -> None:
        self._lock = threading.Lock()

    def count(self, metric: Metric, *labels: str, by: float = 1.0) -> None:
        """Add to a counter."""
        known = self._keys.get((metric, *labels))
        if known is None:
            known = self._keys[(metric, *labels)] = _key(metric, metric.name, labels)
        with self._lock:
            _add(self._numbers["counter"], known, by)

    def measure(self, metric: Metric, seconds: float, *labels: str) -> None:
        """Put a time into a histogram."""
        known = self._keys.get((metric, *labels))
        if known is None:
            known = self._keys[(metric, *labels)] = _histogram_keys(metric, labels)
        total, buckets = known
        numbers = self._numbers["histogram"]
        with self._lock:
            _add(numbers, buckets[bisect_left(BUCKETS, seconds)], 1.0)
            _add(numbers, total, seconds)

    def _remove(self, owner: int) -> None:
        # A child that ends as a program does is not the worker.
        if os.getpid() == owner:
            shutil.rmtree(self.folder, ignore_errors=True)


def _add(numbers: Any, key: str, amount: float) -> None:
    # Read anew: where two processes share a place after all, none goes back to what it knew.
    value, _ = numbers.read_value(key)
    numbers.write_value(key, value + amount, 0.0)


def _key(metric: Metric, name: str, labels: tuple[str, ...], **more: str) -> str:
    values = {**dict(zip(metric.labels, labels, strict=True)), **more}
    return mmap_dict.mmap_key(metric.family, name, list(values), list(values.values()), metric.meaning)


def _histogram_keys(metric: Metric, labels: tuple[str, ...]) -> tuple[str, list[str]]:
    bounds = [cast("Any", utils).floatToGoString(bound) for bound in (*BUCKETS, float("inf"))]
    buckets = [_key(metric, f"{metric.name}_bucket", labels, le=bound) for bound in bounds]
    return _key(metric, f"{metric.name}_sum", labels), buckets


def _locked(folder: Path) -> int:
    descriptor = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _sweep() -> None:
    """Remove what workers left that were killed."""
    for folder in _left():
        with suppress(OSError):
            os.close(_locked(folder))
            shutil.rmtree(folder, ignore_errors=True)


def _left() -> Iterator[Path]:
    return (path.parent for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"))
