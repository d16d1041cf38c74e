"""
One timer per process that keeps what is leased: running claims, and slots.

A thread, since a task may keep the main one busy for as long as it likes.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from celerykit.errors import StoreUnavailable
from celerykit.stores import Hold, Store

__all__ = ["Renewal"]

log = logging.getLogger(__name__)

#: Renewals in the time of a lease: two may fail.
_RENEWALS = 3


class _Held(NamedTuple):
    store: Store
    hold: Hold


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
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._renewed_by: dict[str, Callable[[], None]] = {}
        self._has_some = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def holding(self, store: Store, hold: Hold) -> Iterator[None]:
        """Keep a record's lease while the block runs. All records are renewed in one round trip."""
        held = _Held(store, hold)
        self._add(self._held, hold.key, held)
        try:
            yield
        finally:
            if self._held.get(hold.key) is held:
                self.drop(hold.key)

    def keep(self, name: str, renew: Callable[[], None]) -> None:
        """Call *renew* from time to time, until `drop` is called with this name. What it raises is logged."""
        self._add(self._renewed_by, name, renew)

    def drop(self, name: str) -> None:
        """Renew it no longer."""
        self._held.pop(name, None)
        self._renewed_by.pop(name, None)

    def _add(self, where: dict[str, Any], name: str, what: Any) -> None:
        if self._pid != os.getpid():
            # Its thread is not here, and its lock may be held for ever.
            self._begin()
            where = self._held if isinstance(what, _Held) else self._renewed_by
        with self._lock:
            where[name] = what
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="celerykit-renewal", daemon=True)
                self._thread.start()
        self._has_some.set()

    def _run(self) -> None:
        pause, sleep = self._lease() / _RENEWALS, threading.Event()
        while True:
            sleep.wait(pause)
            self.renew()
            if not (self._held or self._renewed_by):
                self._has_some.clear()
                if not (self._held or self._renewed_by):
                    self._has_some.wait()

    def renew(self) -> None:
        """Renew all there is, now."""
        held = dict(self._held)
        for store in {id(one.store): one.store for one in held.values()}.values():
            self._renew_records(store, {name: one.hold for name, one in held.items() if one.store is store})
        for name, renew in dict(self._renewed_by).items():
            try:
                renew()
            except Exception as error:  # noqa: BLE001  (an edge: one that fails must not end the others)
                log.warning("lease.not_renewed %s: %s", name, error)

    def _renew_records(self, store: Store, holds: dict[str, Hold]) -> None:
        try:
            are_there = store.renew(list(holds.values()))
        except StoreUnavailable as error:
            log.warning("lease.not_renewed records=%d: %s", len(holds), error)
            return
        except Exception:  # (an edge: without this thread what is running would run twice)
            log.exception("lease.not_renewed records=%d", len(holds))
            return
        for name, is_there in zip(holds, are_there, strict=True):
            if not is_there and name in self._held:
                self.drop(name)
                log.warning("lease.lost %s: somebody else has it now, or it was released", holds[name].key)
