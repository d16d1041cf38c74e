"""
What celerykit says: events by name, each with facts.

An event is told through `logging`, on the logger of its subject (``task.sent``
on ``celerykit.task``), so it appears wherever a program's logs go. Its message
reads ``task.sent task=shop.charge id=…``; ``record.data`` holds the facts.

Names are an interface: they stand here, and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from celerykit.masks import mask_text

__all__ = ["EVENTS", "FACTS", "Event", "Said", "describe", "observe"]

#: What is told of each event, whatever the level of logs is: counters.
_observers: list[Callable[[Event, Mapping[str, Any]], None]] = []

#: By name.
EVENTS: dict[str, Event] = {}


def observe(observer: Callable[[Event, Mapping[str, Any]], None]) -> None:
    """Have *observer* called with each event that this process tells, before it is logged. It must not raise."""
    if observer not in _observers:
        _observers.append(observer)


@dataclass(frozen=True, slots=True)
class Said:
    """The message of a log record: an event and its facts, written when somebody wants a text."""

    event: Event
    facts: Mapping[str, Any]

    def __str__(self) -> str:
        return " ".join([self.event.name, *(f"{name}={_written(value)}" for name, value in self.facts.items())])


@dataclass(frozen=True)
class Event:
    """
    Something that happens, under its name.

    Attributes:
        level:
            Of `logging`.

        meaning:
            One sentence, for the table in the docs.
    """

    name: str
    level: int
    meaning: str
    logger: logging.Logger = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "logger", logging.getLogger(f"celerykit.{self.name.partition('.')[0]}"))
        EVENTS[self.name] = self

    @property
    def is_wanted(self) -> bool:
        """Tell whether anybody hears of it: for those whose facts cost something."""
        return bool(_observers) or self._is_logged()

    def tell(self, *, exc_info: Any = None, **facts: Any) -> None:
        """
        Tell it.

        Args:
            exc_info:
                As for `logging`: whether, or of which error, the traceback is told, too.

            **facts:
                Ids, names and numbers; an ``error`` may be the exception. Never payloads: they may hold secrets.
                What is ``None`` is left out.
        """
        facts = {name: value for name, value in facts.items() if value is not None}
        for observer in _observers:
            observer(self, facts)
        if self._is_logged():
            said: Any = Said(self, facts)
            self.logger.log(self.level, said, exc_info=exc_info, extra={"data": facts}, stacklevel=2)

    def _is_logged(self) -> bool:
        if self.logger.disabled:
            # `logging.config` does it, unless it is told otherwise, to each logger that it finds. Nobody means ours:
            # who does not want an event sets a level.
            self.logger.disabled = False
        return self.logger.isEnabledFor(self.level)


def describe(error: BaseException) -> str:
    """
    Write an error in one text, without the passwords of URLs: clients of brokers and databases quote theirs.

    Of one that cannot be written it is the name.
    """
    try:
        text = mask_text(str(error)).strip()
    except Exception as broken:  # (an edge: anybody's error)
        if type(broken).__name__ == _INTERRUPTION:
            raise
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


#: What ends a run wherever it is, in the name of a limit; Celery's, which is not known here.
_INTERRUPTION = "SoftTimeLimitExceeded"


def _written(value: Any) -> str:
    if isinstance(value, BaseException):
        value = describe(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return repr(text) if not text or any(character.isspace() for character in text) else text


_DEBUG, _INFO, _WARNING, _ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR

# A call, from its sender to its end

TASK_SENT = Event("task.sent", _INFO, "A call was handed to its broker.")
TASK_SENT_MANY = Event("task.sent_many", _INFO, "A batch of a task's calls was handed to its broker.")
TASK_RECEIVED = Event("task.received", _INFO, "A worker has got a call, and holds it. Celery's record.")
TASK_STARTED = Event("task.started", _INFO, "A call begins to run.")
TASK_SUCCEEDED = Event("task.succeeded", _INFO, "A call has run, and its result is stored. Celery's record.")
TASK_RETRY_SCHEDULED = Event("task.retry_scheduled", _INFO, "An attempt failed, and the next one was sent.")
TASK_SNOOZED = Event("task.snoozed", _INFO, "A call asked to run later; it costs no attempt.")
TASK_WAITING = Event("task.waiting", _INFO, "A call was put off, because of a limit or of another call with its key.")
TASK_DUPLICATE = Event("task.duplicate", _INFO, "A call's key is another one's, and it does not run.")
TASK_FAILED = Event("task.failed", _ERROR, "A call has failed for good. Celery's record, with the traceback.")
TASK_INVALID = Event("task.invalid", _ERROR, "A call's arguments do not fit its contract, and it did not run.")
TASK_IGNORED = Event("task.ignored", _INFO, "A call has ended without a result, by its own word.")
TASK_REJECTED = Event("task.rejected", _WARNING, "A call was refused, or handed back, by its own word.")
TASK_REVOKED = Event("task.revoked", _INFO, "A call was revoked, or had expired, and does not run. Celery's record.")
TASK_OVER_TIME = Event("task.over_time", _WARNING, "A call runs longer than its soft or hard limit. Celery's record.")
# We count it, and Celery's record tells it.
TASK_CUT_OFF = Event("task.cut_off", _DEBUG, "A run was ended from outside: `reason` is `lost` or `timed_out`.")
TASK_HANDED_BACK = Event("task.handed_back", _WARNING, "A call goes back to its queue: a newer deploy may know it.")
TASK_DEAD = Event("task.dead", _ERROR, "A call, or what was no call's message, was buried among the dead letters.")
TASK_REPLAYED = Event("task.replayed", _INFO, "A dead letter was sent again, as a call.")

# What calls take along

CONTEXT_TOO_LARGE = Event("context.too_large", _WARNING, "A field of the context was left out: it is too large.")
CONTEXT_NOT_JSON = Event("context.not_json", _WARNING, "A field of the context was left out: JSON cannot hold it.")

# Keys of calls

CLAIM_UNKNOWN = Event("claim.unknown", _WARNING, "The store did not say whose a key is; `then` is what was done.")
CLAIM_SENT_AGAIN = Event("claim.sent_again", _WARNING, "A call was sent once more: nothing was heard of it for long.")
CLAIM_LOST = Event("claim.lost", _WARNING, "A run came to its end, and its key was another's by then.")
CLAIM_NOT_RECORDED = Event("claim.not_recorded", _ERROR, "What came of a run could not be written at its key.")
CLAIM_RESULT_NOT_KEPT = Event("claim.result_not_kept", _ERROR, "A run is recorded as done, but its result cannot be.")
CLAIM_NOT_ENDED = Event("claim.not_ended", _WARNING, "A buried or revoked call's key was not freed; its lease ends.")
CLAIM_NOT_TAKEN_BACK = Event("claim.not_taken_back", _WARNING, "The key of a call that was not sent is freed later.")
CLAIM_NOT_GIVEN_UP = Event("claim.not_given_up", _WARNING, "The key of a run that is gone is freed by its lease.")

# What is leased: keys and slots, by their tasks' processes

LEASE_NOT_RENEWED = Event("lease.not_renewed", _WARNING, "Leases of running calls were not renewed; tried again.")
LEASE_LOST = Event("lease.lost", _WARNING, "A running call's key is another's now, or was released.")

LIMIT_UNKNOWN = Event("limit.unknown", _WARNING, "The store gave no slot of a limit; `then` is what was done.")
LIMIT_LOST = Event("limit.lost", _WARNING, "A slot's lease had run out, and others have all slots: more run than may.")
LIMIT_NOT_GIVEN_BACK = Event("limit.not_given_back", _WARNING, "A slot was not given back. It is free after `delay`.")

# Messages, and those who hold them

LEASES_OFF = Event("leases.off", _WARNING, "This Kombu is unknown: a dead worker's messages come back late.")
LEASES_LATER = Event("leases.later", _INFO, "A message could not be given back at once; its keeper will.")
LEASES_NOT_RENEWED = Event("leases.not_renewed", _WARNING, "A worker could not renew the leases of its messages.")
LEASES_LAPSED = Event("leases.lapsed", _WARNING, "A worker was away: others may have started again what it was doing.")
LEASES_RESTORED = Event("leases.restored", _WARNING, "Messages of a worker that is gone went back to their queues.")

MESSAGE_HELD = Event("message.held", _WARNING, "A message could not be sent again with a delay; this worker holds it.")
GARBAGE_KEPT = Event("garbage.kept", _ERROR, "An item that is no message could not be buried; it stays in its queue.")
GARBAGE_IGNORED = Event("garbage.ignored", _WARNING, "What a fanout exchange brought is no message, and was dropped.")

STARTS_NOT_COUNTED = Event("starts.not_counted", _WARNING, "The store did not count a redelivered call's start.")
STARTS_NOT_FORGIVEN = Event("starts.not_forgiven", _WARNING, "A start whose message goes back counts as one.")

RESULT_NOT_STORED = Event("result.not_stored", _ERROR, "A call that did not run has no result in the backend.")
RESULT_NOT_READ = Event("result.not_read", _WARNING, "A result that may be there could not be read.")

DEAD_LETTER_NOT_WRITTEN = Event("dead_letter.not_written", _ERROR, "A letter could not be written; `then` tells more.")
DEAD_LETTER_NOT_NOTED = Event("dead_letter.not_noted", _WARNING, "A letter is written, and may be a second time.")
DEAD_LETTER_EVICTED = Event("dead_letter.evicted", _WARNING, "A letter was thrown away: too old, or too many.")
DEAD_LETTER_NOT_EVICTED = Event("dead_letter.not_evicted", _WARNING, "Old letters could not be thrown away; later.")
DEAD_LETTER_RESULT_KEPT = Event("dead_letter.result_kept", _WARNING, "A replayed call's old result is still there.")

# Processes

WORKER_STARTING = Event("worker.starting", _INFO, "A worker begins, and what it has been told. Instead of a banner.")
WORKER_READY = Event("worker.ready", _INFO, "A worker takes calls from now on. Celery's record.")
WORKER_PROCESS_DIED = Event("worker.process_died", _ERROR, "A process of the pool is gone. Celery's record.")
WORKER_STOPPING = Event("worker.stopping", _INFO, "A worker was asked to end; `how` is warm or cold.")
WORKER_OUT_OF_TIME = Event("worker.out_of_time", _WARNING, "What still runs goes back to its queue: time is up.")
WORKER_SOFT_SHUTDOWN = Event("worker.soft_shutdown", _WARNING, "A worker ends. What runs has `delay` to end, too.")
WORKER_NOT_ALL_GIVEN_BACK = Event("worker.not_all_given_back", _ERROR, "A worker ended on an error of its own.")
WORKER_STUCK = Event("worker.stuck", _ERROR, "A worker gets nothing of what waits for it. `celerykit health` says so.")
WORKER_UNSTUCK = Event("worker.unstuck", _INFO, "A worker that was stuck is not, any more.")
HEALTH_NOT_WRITTEN = Event("health.not_written", _WARNING, "There is no sign of life for `celerykit health` to read.")

BEAT_STARTING = Event("beat.starting", _INFO, "Beat begins, and what it has been told. Instead of a banner.")
BEAT_SENT = Event("beat.sent", _INFO, "What was due is sent. Celery's record.")
BEAT_STOPPING = Event("beat.stopping", _INFO, "Beat ends. Celery's record.")
BEAT_LEADS = Event("beat.leads", _INFO, "This beat sends from now on.")
BEAT_STANDS_BY = Event("beat.stands_by", _INFO, "Another beat sends.")
BEAT_UNLIKE = Event("beat.unlike", _WARNING, "The leader has other entries, or other schedules, and its own count.")
BEAT_LOST = Event("beat.lost", _WARNING, "This beat, or the store, was away for so long that another may lead.")
BEAT_MISSED = Event("beat.missed", _WARNING, "A tick was not sent when it was due; `then` is what follows.")
BEAT_NOT_SENT = Event("beat.not_sent", _WARNING, "The broker did not take a tick; it is tried again after `delay`.")
BEAT_DOUBTFUL = Event("beat.doubtful", _WARNING, "A tick was sent, and may have been by another beat as well.")
BEAT_STORE_UNAVAILABLE = Event("beat.store_unavailable", _WARNING, "Nothing is sent until the store is back.")
BEAT_FOUND_STORE = Event("beat.found_store", _INFO, "The store is back, and the schedule goes on.")
BEAT_NOT_SHARED = Event("beat.not_shared", _WARNING, "There is no store that beats share: this is Celery's scheduler.")

BROKER_CONNECTED = Event("broker.connected", _INFO, "A worker has a connection. Celery's record.")
BROKER_LOST = Event("broker.lost", _WARNING, "A worker's connection is gone; it makes another. Celery's record.")
BROKER_UNREACHABLE = Event("broker.unreachable", _ERROR, "A worker cannot connect, and tries again. Celery's record.")

# What would go past the log

PROCESS_PRINTED = Event("process.printed", _WARNING, "A line that somebody printed, to either stream.")
PROCESS_THREAD_FAILED = Event("process.thread_failed", _ERROR, "An exception that nobody caught has ended a thread.")
PROCESS_CRASHED = Event("process.crashed", logging.CRITICAL, "An exception that nobody caught has ended a process.")
PYTHON_WARNING = Event("python.warning", _WARNING, "A warning of Python's `warnings`.")
LOG_DROPPED = Event("log.dropped", _WARNING, "Lines that were not written: nobody read what was, and no room was left.")
LOG_UNREADABLE = Event("log.unreadable", _ERROR, "A record that cannot be written; `logger` has told it.")

# Numbers

METRICS_SERVED = Event("metrics.served", _INFO, "A worker serves its numbers at `address`.")
METRICS_NOT_SERVED = Event("metrics.not_served", _WARNING, "A worker's port is taken; it is tried again and again.")
METRICS_NO_QUEUES = Event("metrics.no_queues", _WARNING, "The broker was asked how full its queues are, and failed.")
METRICS_INCOMPLETE = Event("metrics.incomplete", _WARNING, "The program's own metrics could not be read.")

# Facts

#: By name. An event has those it can know, and no other.
FACTS: dict[str, str] = {
    "task": "The task's name.",
    "id": "The call's id. A retry has that of its call.",
    "root_id": "The id of the call with which it all began.",
    "parent_id": "The id of the call that sent this one.",
    "correlation_id": "What a request, and all calls that come of it, have in common: see [Context](context.md).",
    "attempt": "Which attempt, from 1. To wait for a limit, a key or a snooze costs none.",
    "queue": "Where the message was sent, or lies.",
    "worker": "The worker's name.",
    "key": "The call's key: see [Calls that run once](once.md).",
    "wait_ms": "Milliseconds from when the call was sent, or due, until it began to run.",
    "run_ms": "Milliseconds that it ran.",
    "outcome": "What came of it.",
    "error": "The error's type, and its message where that can hold no secret.",
    "error_fingerprint": "Twelve digits that errors of one cause share, as in `celerykit dead top`.",
    "reason": "Why, in one word if there is one: see [Dead letters](dead-letters.md).",
    "traceback": "Where an error was raised.",
    "internal": "Whether Celery itself failed, and not the task.",
    "hint": "What to do about it.",
    "then": "What follows.",
    "delay": "Seconds until what follows.",
    "eta": "When a call is to run at the earliest.",
    "first": "The id of the call that has the key; of many calls, the id of the first.",
    "now": "Whose a key is by now: the state of its claim, or `free`.",
    "count": "How many: calls of a batch, messages, records, entries of a schedule.",
    "letter": "The id of the dead letter.",
    "died_at": "When it died.",
    "slot": "The name of a limit's slot.",
    "record": "The name of a record in the store.",
    "field": "The name of a field of the context.",
    "bytes": "How large it is.",
    "limit": "How much there may be at most; of time limits, `soft` or `hard`.",
    "seconds": "How long a time limit is.",
    "exchange": "Where the broker took it from.",
    "after": "Seconds that have passed.",
    "lease": "Seconds that a lease lasts.",
    "entry": "The name of an entry of the schedule.",
    "due": "When it was to be sent.",
    "late": "By how many seconds it is late.",
    "leader": "The beat that sends.",
    "since": "Since when it does.",
    "version": "Celery's.",
    "app": "The app's name.",
    "broker": "The broker's address, without its password.",
    "backend": "The result backend's, too.",
    "pool": "Which kind of pool.",
    "concurrency": "How many calls run at a time.",
    "queues": "The queues that a worker takes from.",
    "tasks": "How many tasks it knows.",
    "scheduler": "Beat's scheduler.",
    "entries": "How many entries the schedule has.",
    "how": "How a worker is to end: warm or cold.",
    "signal": "Which signal told it.",
    "url": "The broker's address, without its password.",
    "text": "What was printed, or warned of.",
    "category": "The class of a warning.",
    "file": "Where it was raised.",
    "line": "In which line of that.",
    "process": "The name of a pool's process.",
    "pid": "Its id.",
    "status": "Its exit code, or the signal that ended it.",
    "thread": "The name of a thread.",
    "logger": "The logger of a record.",
    "address": "Where a worker serves its numbers.",
}
