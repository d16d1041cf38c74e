"""A store in this process: for tests, eager tasks, and brokers without a Redis or SQL database beside them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from celerykit.errors import StoreUnavailable
from celerykit.stores import Hold, New, Record, Swap, Swapped

__all__ = ["MemoryStore"]

#: Deliveries and letters in flight are far fewer; beyond this, the oldest go.
_MOST = 100_000


class _Entry(NamedTuple):
    value: str
    expires: float


class _Kept(NamedTuple):
    version: str
    data: str
    lease_ends: float | None
    expires: float


class MemoryStore:
    """
    What this process keeps for itself.

    A process that is forked begins with an empty store of its own.

    Of too many counts and marks, the oldest go: they help to judge, and what
    is forgotten is judged mildly. Records and slots never go before their
    time, since what they hold back would happen twice; when there are too
    many, a new one is refused.

    Args:
        clock:
            Seconds that never go back.

        most:
            How many keys are kept: of counts and marks, of records, and of slots.
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
        self._records: dict[str, _Kept] = {}
        # When each holder's slot ends.
        self._slots: dict[str, dict[str, float]] = {}

    # Counts and marks

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

    # Records

    def read(self, key: str) -> Record | None:
        """Return the record under *key*."""
        with self._locked():
            return self._record(key)

    def swap(self, *swaps: Swap) -> list[Swapped]:
        """Compare and swap, one after the other."""
        with self._locked():
            return [self._swap(swap) for swap in swaps]

    def renew(self, holds: Sequence[Hold]) -> list[bool]:
        """Begin leases anew, and tell which records are still there as they were."""
        with self._locked():
            return [self._renew(hold) for hold in holds]

    def find(self, prefix: str) -> Iterator[tuple[str, Record]]:
        """Walk through the records whose keys begin so."""
        with self._locked():
            keys = [key for key in self._records if key.startswith(prefix)]
        for key in keys:
            record = self.read(key)
            if record is not None:
                yield key, record

    # Slots

    def take(self, key: str, holder: str, *, limit: int, ttl: float) -> float:
        """Take one of *limit* slots, or tell in how many seconds the next one is free."""
        with self._locked():
            now = self._clock()
            taken = {name: ends for name, ends in self._slots.get(key, {}).items() if ends > now}
            if holder not in taken and len(taken) >= limit:
                # More than the limit when that was higher before.
                return sorted(taken.values())[len(taken) - limit] - now
            if key not in self._slots and len(self._slots) >= self._most:
                self._sweep_slots()
            self._slots[key] = {**taken, holder: now + ttl}
            return 0.0

    def give(self, key: str, holder: str) -> None:
        """Give a slot back."""
        with self._locked():
            taken = self._slots.get(key, {})
            taken.pop(holder, None)
            if not taken:
                self._slots.pop(key, None)

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

    def _record(self, key: str) -> Record | None:
        kept, now = self._records.get(key), self._clock()
        if kept is None or kept.expires <= now:
            return None
        return Record(kept.version, kept.data, None if kept.lease_ends is None else kept.lease_ends - now)

    def _swap(self, swap: Swap) -> Swapped:
        found = self._record(swap.key)
        if not swap.fits(found):
            return Swapped(done=False, found=found)
        if swap.new is None:
            self._records.pop(swap.key, None)
        else:
            self._keep(swap.key, swap.new)
        return Swapped(done=True, found=None)

    def _keep(self, key: str, new: New) -> None:
        if key not in self._records and len(self._records) >= self._most:
            self._sweep_records()
        now = self._clock()
        lease_ends = None if new.lease is None else now + new.lease
        self._records[key] = _Kept(new.version, new.data, lease_ends, now + new.ttl)

    def _renew(self, hold: Hold) -> bool:
        found = self._record(hold.key)
        if found is None or found.version != hold.version:
            return False
        self._keep(hold.key, New(found.version, found.data, ttl=hold.ttl, lease=hold.lease))
        return True

    def _sweep_records(self) -> None:
        now = self._clock()
        self._records = {key: kept for key, kept in self._records.items() if kept.expires > now}
        self._check_room(len(self._records))

    def _sweep_slots(self) -> None:
        now = self._clock()
        self._slots = {key: taken for key, taken in self._slots.items() if max(taken.values()) > now}
        self._check_room(len(self._slots))

    def _check_room(self, used: int) -> None:
        if used >= self._most:
            raise StoreUnavailable(
                f"the store in this process's memory is full ({self._most} keys). Name another in CELERYKIT_STORE_URL."
            )
