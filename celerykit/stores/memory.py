"""Counts and marks in this process: for tests, and for brokers without a Redis beside them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

__all__ = ["MemoryStore"]

#: Deliveries and letters in flight are far fewer; beyond this, the oldest go.
_MOST = 100_000


class _Entry(NamedTuple):
    value: str
    expires: float


class MemoryStore:
    """
    Counts and marks that this process keeps for itself.

    A process that is forked begins with an empty store of its own.

    Args:
        clock:
            Seconds that never go back.

        most:
            How many keys are kept.
    """

    is_shared = False

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, most: int = _MOST) -> None:
        self._clock = clock
        self._most = most
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        # In the order of last writing.
        self._entries: dict[str, _Entry] = {}
        self._next_sweep = self._most // 2

    def add(self, key: str, *, ttl: float) -> int:
        """Add one to a count, and return it."""
        with self._locked():
            count = int(self._value(key) or 0) + 1
            self._write(key, str(count), expires=self._clock() + ttl)
            return count

    def subtract(self, key: str) -> None:
        """Take one off a count, but never below 0."""
        with self._locked():
            count = int(self._value(key) or 0) - 1
            if count > 0:
                self._entries[key] = self._entries[key]._replace(value=str(count))
            else:
                self._entries.pop(key, None)

    def mark(self, key: str, value: str, *, ttl: float) -> str | None:
        """Set *key* unless it is set, and return what was there."""
        with self._locked():
            before = self._value(key)
            if before is None:
                self._write(key, value, expires=self._clock() + ttl)
            return before

    def get(self, key: str) -> str | None:
        """Return a mark or a count."""
        with self._locked():
            return self._value(key)

    def delete(self, key: str) -> None:
        """Forget *key*."""
        with self._locked():
            self._entries.pop(key, None)

    def close(self) -> None:
        """Do nothing."""

    def _locked(self) -> threading.Lock:
        if self._pid != os.getpid():
            # The lock may have been held, by a thread that does not exist here, when this process was forked.
            self._begin()
        return self._lock

    def _value(self, key: str) -> str | None:
        entry = self._entries.get(key)
        return entry.value if entry is not None and entry.expires > self._clock() else None

    def _write(self, key: str, value: str, *, expires: float) -> None:
        self._entries.pop(key, None)
        if len(self._entries) >= self._next_sweep:
            self._sweep()
        self._entries[key] = _Entry(value, expires)

    def _sweep(self) -> None:
        """Evict what has expired, and the oldest of what is still too many."""
        now = self._clock()
        self._entries = {key: entry for key, entry in self._entries.items() if entry.expires > now}
        for key in list(islice(self._entries, max(0, len(self._entries) - self._most + 1))):
            del self._entries[key]
        # Not at each write: when half of the room that is left has been filled, a tenth of all at least.
        room = self._most - len(self._entries)
        self._next_sweep = min(self._most, len(self._entries) + max(room // 2, self._most // 10))
