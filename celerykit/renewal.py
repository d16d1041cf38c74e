"""
One timer per process that keeps what is leased: running claims, and slots.

A thread, since a task may keep the main one busy for as long as it likes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from celerykit import events
from celerykit.errors import StoreUnavailable
from celerykit.stores import Hold, Store

__all__ = ["Renewal"]

#: Seconds that a thread waits for something to do.
_RESTS = 60.0

#: Renewals in the time of a lease: two may fail.
_RENEWALS = 3


class _Held(NamedTuple):
    store: Store
    hold: Hold


class _Process:
    """What one process keeps, and its thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # Each for itself: a key's next run may begin here before a renewal of the last one has its answer.
        self.held: dict[_Held, str] = {}
        self.renewed_by: dict[str, Callable[[], None]] = {}
        self.has_some = threading.Event()
        self.thread: threading.Thread | None = None

    @property
    def is_idle(self) -> bool:
        return not (self.held or self.renewed_by)


class Renewal:
    """
    Renews leases from a thread of its own, as long as there are any.

    A process that is forked begins with none.

    Args:
        lease:
            Gives the seconds of the shortest lease there is; asked for when the thread starts.
    """

    def __init__(self, lease: Callable[[], float]) -> None:
        self._lease = lease
        self._processes: dict[int, _Process] = {}

    @property
    def _here(self) -> _Process:
        # By process id: a thread does not survive a fork, and a lock that it held is held for ever.
        pid = os.getpid()
        return self._processes.get(pid) or self._processes.setdefault(pid, _Process())

    @contextmanager
    def holding(self, store: Store, hold: Hold) -> Iterator[None]:
        """Keep a record's lease while the block runs. All records are renewed in one round trip."""
        here, held = self._here, _Held(store, hold)
        here.held[held] = hold.key
        self._wake(here)
        try:
            yield
        finally:
            here.held.pop(held, None)

    def keep(self, name: str, renew: Callable[[], None]) -> None:
        """Call *renew* from time to time, until `drop` is called with this name. What it raises is logged."""
        here = self._here
        here.renewed_by[name] = renew
        self._wake(here)

    def drop(self, name: str) -> None:
        """Renew it no longer: what is kept by this name, or the record under this key."""
        here = self._here
        here.renewed_by.pop(name, None)
        for held in list(here.held):
            if held.hold.key == name:
                here.held.pop(held, None)

    def _wake(self, here: _Process) -> None:
        with here.lock:
            if here.thread is None or not here.thread.is_alive():
                here.thread = threading.Thread(target=self._run, args=(here,), name="celerykit-renewal", daemon=True)
                here.thread.start()
        here.has_some.set()

    def _run(self, here: _Process) -> None:
        pause, sleep = self._lease() / _RENEWALS, threading.Event()
        while True:
            sleep.wait(pause)
            self.renew()
            if here.is_idle:
                here.has_some.clear()
                if here.is_idle and not here.has_some.wait(_RESTS) and _has_ended(here):
                    return

    def renew(self) -> None:
        """Renew all there is, now."""
        here = self._here
        held = list(here.held)
        for store in {id(one.store): one.store for one in held}.values():
            _renew_records(here, [one for one in held if one.store is store])
        for name, renew in dict(here.renewed_by).items():
            try:
                renew()
            except Exception as error:  # noqa: BLE001  (an edge: one that fails must not end the others)
                events.LEASE_NOT_RENEWED.tell(slot=name, error=error)


def _has_ended(here: _Process) -> bool:
    """Let the thread end that has had nothing to do for a while; an app may be gone."""
    with here.lock:
        if here.is_idle:
            here.thread = None
        return here.is_idle


def _renew_records(here: _Process, of_a_store: list[_Held]) -> None:
    try:
        are_there = of_a_store[0].store.renew([held.hold for held in of_a_store])
    except StoreUnavailable as error:
        events.LEASE_NOT_RENEWED.tell(count=len(of_a_store), error=error)
        return
    except Exception as error:  # noqa: BLE001  (an edge: without this thread what is running would run twice)
        events.LEASE_NOT_RENEWED.tell(count=len(of_a_store), error=error, exc_info=True)
        return
    for held, is_there in zip(of_a_store, are_there, strict=True):
        # What is not held any more has ended meanwhile.
        if not is_there and here.held.pop(held, ""):
            events.LEASE_LOST.tell(record=held.hold.key)
