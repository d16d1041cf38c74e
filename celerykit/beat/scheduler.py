"""What ``celery beat`` runs: Celery's scheduler, with its state and its leader in the store."""

from __future__ import annotations

import copy
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any, cast
from uuid import uuid4

import celery.beat
from celery.utils.time import maybe_make_aware

from celerykit import events, schedules
from celerykit.beat.book import Book
from celerykit.beat.lead import Lead, Leader, leader_key
from celerykit.beat.pulse import LONGEST_SLEEP, Lone, Vitals
from celerykit.beat.signals import uninterrupted
from celerykit.beat.ticks import State, Tick
from celerykit.deadline import within
from celerykit.errors import InvalidOptions, StoreUnavailable
from celerykit.publishing import FAILURES

__all__ = ["Scheduler", "name_of"]

#: How many leases late a tick may be and not count as missed: after one the next beat leads, after another it may take
#: over what the one before had claimed.
_LEASES_LATE = 2

#: Seconds until the next try when the store did not answer, and the most until a tick is sent again.
_STORE_PAUSE, _LONGEST_PAUSE = 1.0, 15.0

#: After which errors a tick is sent again. Any other is a mistake in the entry, as it will be the next time.
_PASSING: tuple[type[Exception], ...] = (*FAILURES, StoreUnavailable, OSError)


class Scheduler(celery.beat.Scheduler):
    """
    Sends what is due, unless another beat does.

    Without a store that beats share it is Celery's own scheduler, with its
    file, and one warning.

    Args:
        clock:
            Seconds that never go back.
    """

    def __new__(cls, app: Any, *args: Any, **kwargs: Any) -> Any:
        """Give Celery's own scheduler where there is nothing to share."""
        store = getattr(app, "store", None)
        if store is None:
            raise InvalidOptions(f"{app!r} is no celerykit.CeleryKit, and celerykit.beat:Scheduler needs one.")
        if store.is_shared:
            return super().__new__(cls)
        if not kwargs.get("lazy"):
            events.BEAT_NOT_SHARED.tell(hint="Run one beat only, or set CELERYKIT_STORE_URL.")
        schedules.install(app)
        return Lone(app, *args, **kwargs)

    def __init__(self, app: Any, *args: Any, clock: Callable[[], float] = time.monotonic, **kwargs: Any) -> None:
        name, me = name_of(app), uuid4().hex
        self._clock = clock
        self._lease: float = app.settings.kit.lease.total_seconds()
        self._book = Book(app.store, name, by=me, lease=self._lease, clock=clock)
        self._lead = Lead(
            app.store,
            leader_key(name),
            me=Leader(f"{socket.gethostname()}:{os.getpid()}", since=app.now()),
            id=me,
            lease=self._lease,
            clock=clock,
            now=lambda: datetime.now(UTC),
        )
        self._vitals = Vitals(app, name=name, longest=self._lease)
        #: When to look at each entry again, in seconds since 1970.
        self._look_at: dict[str, float] = {}
        #: How often each tick was refused by the broker.
        self._refused: dict[str, int] = {}
        self._error: BaseException | None = None
        self._opened = 0
        self._seen: Any = None
        self._without_store_since: float | None = None
        super().__init__(app, *args, **kwargs)

    def setup_schedule(self) -> None:
        """Take the entries of the configuration and those that the app declares, and Celery's own."""
        schedules.install(self.app)
        self.merge_inplace(self.app.conf.beat_schedule)
        # In this order: merging drops what the configuration does not have.
        self.install_default_entries(self.schedule)
        self._lead.me = replace(self._lead.me, schedule=_digest(self.schedule))

    @property
    def info(self) -> str:
        """What the banner says of it."""
        return f"    . store -> one leader, lease {self._lease:g} s"

    def tick(self, *_stock: Any, **_stock_options: Any) -> float:
        """Do what is to be done now, one entry at most, and give the seconds until there may be more."""
        with uninterrupted():
            try:
                pause = self._tick()
            except StoreUnavailable as error:
                pause, state = self._wait_for_store(error), "without_store"
            else:
                self._found_store()
                pause = min(pause, float(self.max_interval or pause), LONGEST_SLEEP)
                state = "leading" if self._lead.leads else "standing_by"
            self._vitals.tick(state, pause=pause)
            return pause

    def close(self) -> None:
        """Let another beat lead at once."""
        self._vitals.end()
        try:
            self._book.note()
            self._book.put_down()
            self._lead.give_up()
        except StoreUnavailable as error:
            events.BEAT_STORE_UNAVAILABLE.tell(error=error)
        finally:
            super().close()

    # The way of a tick

    def _tick(self) -> float:
        self._book.note()
        if not self._lead.take():
            self._book.forget()
            return self._lead.pause
        self._open()
        if not self._look_at:
            return self._lead.pause
        name = min(self._look_at, key=self._look_at.__getitem__)
        entry = self.schedule[name]
        wait = self._look_at[name] - _now(entry).timestamp()
        if wait > 0:
            return min(wait, self._lead.pause)
        self._look(entry)
        return 0.0

    def _open(self) -> None:
        """Read what is known of the entries, if others may have changed it or there are others."""
        is_same = self.schedules_equal(self._seen, self.schedule)
        if is_same and self._opened == self._lead.term:
            return
        if self._opened != self._lead.term:
            events.BEAT_LEADS.tell(count=len(self.schedule))
        self._seen = copy.copy(self.schedule)
        self._book.open(self.schedule, now=self.app.now())
        self._opened = self._lead.term
        self._refused.clear()
        self._look_at.clear()
        for entry in self.schedule.values():
            self._plan(entry)

    def _look(self, entry: Any) -> None:
        """Send an entry if it is due, or if another beat claimed a tick of it and did not come to its end."""
        state, now = self._read(entry), _now(entry)
        if state.tick is None and not self._is_due(entry)[0]:
            self._plan(entry)
            return
        due = _due(entry, now) if state.tick is None else state.tick.due
        if self._is_left_out(entry, due=due, late=(now - due).total_seconds()):
            self._book.skip(entry.name, at=now)
        else:
            self._claim(entry, due=due, at=now)
        self._plan(entry)

    def _is_left_out(self, entry: Any, *, due: datetime, late: float) -> bool:
        if late <= _LEASES_LATE * self._lease:
            return False
        then = schedules.missed_of(entry.schedule)
        if entry.name not in self._refused or then == "skip":
            events.BEAT_MISSED.tell(entry=entry.name, due=due.isoformat(), late=round(late, 1), then=then)
        return then == "skip"

    def _claim(self, entry: Any, *, due: datetime, at: datetime) -> None:
        asked = self._clock()
        claimed = self._book.claim(entry.name, due=due, at=at, id=str(uuid4()))
        if claimed is None:
            return
        # A beat that was frozen until now must not send what another has taken over meanwhile.
        left = self._lease - (self._clock() - asked)
        if left > 0:
            self._send(entry, claimed, within_seconds=left)

    def _send(self, entry: Any, claimed: State, *, within_seconds: float) -> None:
        assert claimed.tick is not None
        options = {"task_id": claimed.tick.id, **entry.options, "headers": dict(entry.options.get("headers") or {})}
        # Not a copy, which would take its app from the schedule.
        ready = type(entry)(**dict(entry, options=options))
        self._error = None
        with within(within_seconds):
            # Celery's own way, which others hang on to; without a producer, each publish has its deadline.
            self.apply_entry(ready, producer=None)
        self._note(entry, claimed.tick, self._error)

    def _note(self, entry: Any, tick: Tick, error: BaseException | None) -> None:
        if error is None:
            self._book.sent(entry.name)
        elif isinstance(error, _PASSING):
            self._refused[entry.name] = self._refused.get(entry.name, 0) + 1
            events.BEAT_NOT_SENT.tell(entry=entry.name, id=tick.id, delay=self._pause_of(entry.name), error=error)
        else:
            self._book.skip(entry.name, at=tick.at)

    def apply_async(self, entry: Any, producer: Any = None, advance: bool = True, **kwargs: Any) -> Any:
        """Send an entry, or note that its broker did not take it now."""
        try:
            return super().apply_async(entry, producer=producer, advance=advance, **kwargs)
        except celery.beat.SchedulingError as error:
            # Celery's own error says only in its text what it was.
            self._error = error.__context__ or error
            if not isinstance(self._error, _PASSING):
                raise
            return None

    # When to look again

    def _plan(self, entry: Any) -> None:
        wait = self._wait(entry, self._read(entry))
        self._look_at[entry.name] = _now(entry).timestamp() + wait

    def _read(self, entry: Any) -> State:
        """Bring an entry to what is known of it."""
        state = self._book.state(entry.name)
        # In the app's time zone, as Celery's own: some schedules count in days of the zone they get.
        entry.last_run_at = state.since.astimezone(self.app.timezone)
        entry.total_run_count = state.runs
        return state

    def _wait(self, entry: Any, state: State) -> float:
        if state.tick is not None:
            return max(self._book.wait(entry.name), self._pause_of(entry.name))
        self._refused.pop(entry.name, None)
        is_due, pause = self._is_due(entry)
        return 0.0 if is_due else pause

    def _pause_of(self, name: str) -> float:
        times = self._refused.get(name, 0)
        return min(math.ldexp(0.5, times), _LONGEST_PAUSE) if times else 0.0

    def _is_due(self, entry: Any) -> tuple[bool, float]:
        try:
            is_due, pause = self.is_due(entry)
        except Exception:  # noqa: BLE001  (an edge: a schedule of the user's must not stop the others)
            is_due, pause = cast("Any", self)._is_due_failed(entry)
        return is_due, float(pause)

    # The store

    def _wait_for_store(self, error: StoreUnavailable) -> float:
        if self._without_store_since is None:
            self._without_store_since = self._clock()
            events.BEAT_STORE_UNAVAILABLE.tell(error=error)
        return min(_STORE_PAUSE, self._lease)

    def _found_store(self) -> None:
        if self._without_store_since is not None:
            events.BEAT_FOUND_STORE.tell(after=round(self._clock() - self._without_store_since, 1))
            self._without_store_since = None


def name_of(app: Any) -> str:
    """Tell what the beats of one app have in common."""
    return str(app.main or "celery")


def _now(entry: Any) -> datetime:
    return maybe_make_aware(entry.default_now())


def _due(entry: Any, now: datetime) -> datetime:
    """Tell since when an entry is due."""
    try:
        ahead = entry.schedule.remaining_estimate(entry.last_run_at)
    except NotImplementedError:
        return now
    # Not every schedule knows.
    return now + min(ahead or timedelta(0), timedelta(0))


def _digest(schedule: Mapping[str, Any]) -> str:
    """Tell one schedule from another. Not by arguments: they may be secrets."""
    lines = sorted(f"{name} {entry.task} {entry.schedule}" for name, entry in schedule.items())
    return blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()
