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
import mmap
import os
import shutil
import tempfile
import threading
import time
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

_can_allocate = hasattr(os, "posix_fallocate")

_PREFIX = "celerykit-metrics-"

#: Seconds for which a folder is left alone, whose worker may be about to lock it.
_YOUNG = 60.0

#: Bytes of a file to begin with: the numbers of some thirty tasks.
_SIZE = 256 * 1024

#: Bytes that a number takes beside its key.
_MOST_AROUND = 4 + 8 + 16

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
        self._numbers: dict[str, _Numbers] = {}
        self._opened: list[_Numbers] = []
        self._keys: dict[tuple[Any, ...], Any] = {}
        self.write_as("main")
        # Another thread may hold it at the moment of a fork.
        os.register_at_fork(after_in_child=self._unlock)
        self._owner = os.getpid()
        atexit.register(self._remove)

    def write_as(self, place: str) -> None:
        """Write to other files from now on; no other process may write to them at the same time."""
        self._unlock()
        self._keys = {}
        self._numbers = {kind: _opened(self.folder / f"{kind}_{place}.db") for kind in ("counter", "histogram")}
        # Nothing is closed: an embedded beat closes all that it inherits, and these descriptors may be others' by now.
        self._opened += self._numbers.values()

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
        numbers = self._numbers["histogram"]
        if known is None:
            known = self._keys[(metric, *labels)] = _histogram_keys(metric, labels)
            with self._lock:
                # All of them are told, the empty ones too: sums over several histograms need them.
                for bucket in known[1]:
                    _add(numbers, bucket, 0.0)
        total, buckets = known
        with self._lock:
            _add(numbers, buckets[bisect_left(BUCKETS, seconds)], 1.0)
            _add(numbers, total, seconds)

    def close(self) -> None:
        """Remove them, and count no more. For who does not end with his process."""
        for numbers in self._opened:
            numbers.close()
        os.close(self._held)
        atexit.unregister(self._remove)
        self._remove()

    def _remove(self) -> None:
        # A child that ends as a program does is not the worker.
        if os.getpid() == self._owner:
            shutil.rmtree(self.folder, ignore_errors=True)


class _Numbers(_MmapedDict):  # type: ignore[misc]
    """One file, which grows without holes: on a full disk, a hole is the end of the process that writes to it."""

    def _init_value(self, key: str) -> None:
        while _can_allocate and self._used + len(key.encode()) + _MOST_AROUND > self._capacity:
            os.posix_fallocate(self._f.fileno(), 0, self._capacity * 2)
            self._capacity *= 2
            self._m = mmap.mmap(self._f.fileno(), self._capacity)
        super()._init_value(key)


def _opened(path: Path) -> _Numbers:
    if _can_allocate:
        with path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, _SIZE)
    return _Numbers(str(path))


def _add(numbers: _Numbers, key: str, amount: float) -> None:
    # Read anew: where two processes share a place after all, none goes back to what it knew.
    try:
        value, _ = numbers.read_value(key)
    except OSError:  # the disk is full, and there is no room for another number
        return
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
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError):
            if time.time() - lock.stat().st_mtime > _YOUNG:
                yield lock.parent
