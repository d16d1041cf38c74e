"""
Several beats, one tick: a scheduler for Celery's own ``celery beat``, any number of which may run.

    ticks       what is known of an entry of the schedule, and how it moves; pure
    book        those states in the store
    lead        who sends: one of the beats, as long as it renews its lease
    scheduler   what ``celery beat`` runs
    signals     those that end it, put off until a tick is at its end
    pulse       signs of life
    status      what a person may want to know
    events      what is said of it in the log

The lead keeps all but one beat quiet, and is not what keeps a tick from being
sent twice: a leader that was frozen may go on in the middle of its work. Each
tick is claimed in the store, by a compare and swap of its entry's state, before
it is sent.
"""

from __future__ import annotations

from celerykit.beat.scheduler import Scheduler
from celerykit.beat.status import EntryStatus, LeaderStatus, Status, status

__all__ = ["EntryStatus", "LeaderStatus", "Scheduler", "Status", "status"]
