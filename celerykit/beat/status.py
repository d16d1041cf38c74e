"""What a person may want to know of an app's beats, from any process."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import celery.beat

from celerykit import schedules
from celerykit.beat.book import entry_key
from celerykit.beat.lead import Leader, leader_key
from celerykit.beat.scheduler import name_of
from celerykit.beat.ticks import State

__all__ = ["EntryStatus", "LeaderStatus", "Status", "status"]


@dataclass(frozen=True, slots=True)
class LeaderStatus:
    """
    The beat that leads, or did.

    Attributes:
        node:
            Its host and process.

        since:
            When it took the lead.

        lease:
            Seconds it has left; 0 or less when it has not renewed it in time.
    """

    node: str
    since: datetime
    lease: float

    @property
    def is_alive(self) -> bool:
        """Whether it leads now."""
        return self.lease > 0


@dataclass(frozen=True, slots=True)
class EntryStatus:
    """
    An entry of the schedule.

    Attributes:
        last:
            When it was last sent; ``None`` if never.

        next:
            When it is due; in the past when it is late. ``None`` when that
            cannot be said, as no beat has read it yet.

        is_being_sent:
            Whether a beat has claimed a tick that it has not noted as sent.
    """

    name: str
    task: str
    schedule: str
    last: datetime | None
    next: datetime | None
    runs: int
    is_being_sent: bool


@dataclass(frozen=True, slots=True)
class Status:
    """
    What is known of an app's beats.

    Attributes:
        leader:
            ``None`` when none has led for days, or the last one was stopped.
    """

    leader: LeaderStatus | None
    entries: tuple[EntryStatus, ...]

    @property
    def last(self) -> datetime | None:
        """When anything was last sent."""
        return max((entry.last for entry in self.entries if entry.last is not None), default=None)


def status(app: Any) -> Status:
    """
    Ask the store what leads, and when each entry was and will be sent.

    Raises:
        StoreUnavailable: The store did not answer.
    """
    app.finalize()
    entries = _entries(app)
    return Status(leader=_leader(app), entries=tuple(_entry(app, entry) for entry in entries))


def _entries(app: Any) -> list[Any]:
    schedules.install(app)
    scheduler: Any = celery.beat.Scheduler(app, lazy=True)
    scheduler.merge_inplace(app.conf.beat_schedule)
    scheduler.install_default_entries(scheduler.schedule)
    return sorted(scheduler.schedule.values(), key=lambda entry: str(entry.name))


def _leader(app: Any) -> LeaderStatus | None:
    record = app.store.read(leader_key(name_of(app)))
    leader = None if record is None else Leader.load(record.data)
    if record is None or leader is None:
        return None
    return LeaderStatus(leader.node, leader.since, record.lease or 0.0)


def _entry(app: Any, entry: Any) -> EntryStatus:
    record = app.store.read(entry_key(name_of(app), entry.name))
    state = None if record is None else State.load(record.data)
    return EntryStatus(
        name=str(entry.name),
        task=str(entry.task),
        schedule=str(entry.schedule),
        last=None if state is None else state.sent_at,
        next=None if state is None else _next(app, entry, state),
        runs=0 if state is None else state.runs,
        is_being_sent=state is not None and state.tick is not None,
    )


def _next(app: Any, entry: Any, state: State) -> datetime | None:
    if state.tick is not None:
        return state.tick.due
    try:
        ahead = entry.schedule.remaining_estimate(state.since.astimezone(app.timezone))
    except NotImplementedError:
        return None
    return None if ahead is None else cast("datetime", app.now() + ahead)
