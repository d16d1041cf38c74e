"""
Celery's own records as events: the same names and facts as if we had told them.

Celery tells most of what a worker does, as text; the facts stand in the
record's arguments. What is recognised here is written as an event, and so no
transition is told twice. `LIFTED` is the one table of it; a test names the
version of Celery that it was read from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from logging import LogRecord
from typing import Any

from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.app import trace
from celery.worker.consumer import consumer as stock_consumer
from structlog.contextvars import get_contextvars

from celerykit import events
from celerykit.dead_letters import error_fingerprint
from celerykit.errors import InvalidPayload
from celerykit.events import Event, describe
from celerykit.masks import mask_text

__all__ = ["LIFTED", "lift"]

Facts = dict[str, Any]

#: celery-types has less of it.
consumer: Any = stock_consumer

#: ``file.py:12: UserWarning: what``, and the line of source below.
_WARNING = re.compile(r"(?P<file>.*?):(?P<line>\d+): (?P<category>\w+): (?P<text>.*)", re.DOTALL)

#: ``Retry in 3.0s: ConnectionError('gone')``.
_RETRY_IN = re.compile(r"Retry (?:in|at) .*?: (?P<error>.*)", re.DOTALL)

#: What the retry of an attempt is, by what was noted of it.
_KINDS = {
    "retry": events.TASK_RETRY_SCHEDULED,
    "snooze": events.TASK_SNOOZED,
    "wait": events.TASK_WAITING,
}


# A call


def _received(record: LogRecord) -> tuple[Event, Facts]:
    data = _data(record)
    facts = _call(record)
    if eta := data.get("eta"):
        facts["eta"] = eta.isoformat() if hasattr(eta, "isoformat") else str(eta)
    return events.TASK_RECEIVED, facts


def _succeeded(record: LogRecord) -> tuple[Event, Facts]:
    # Not what it returned: that is the caller's, and may be a secret.
    run_ms = round(_data(record)["runtime"] * 1000, 1)
    return events.TASK_SUCCEEDED, {**_call(record), "run_ms": run_ms, "outcome": "succeeded"}


def _to_run_again(record: LogRecord) -> tuple[Event, Facts]:
    noted = get_contextvars()
    event = _KINDS.get(noted.get("kind", ""), events.TASK_RETRY_SCHEDULED)
    facts = {**_call(record), **_run_ms(noted), "outcome": _outcome(event)}
    if "error" not in noted and (found := _RETRY_IN.match(str(_data(record)["exc"]))):
        facts["error"] = found["error"]
    return event, facts


def _failed(record: LogRecord) -> tuple[Event, Facts]:
    data = _data(record)
    error = record.exc_info[1] if record.exc_info else None
    is_invalid = isinstance(error, InvalidPayload) and error.task == data["name"]
    event = events.TASK_INVALID if is_invalid else events.TASK_FAILED
    facts = {**_call(record), **_run_ms(get_contextvars()), "outcome": _outcome(event)}
    facts["error"] = data["exc"] if error is None else describe(error)
    if error is not None:
        facts["error_fingerprint"] = error_fingerprint(type(error).__name__, str(data["traceback"]))
        facts["traceback"] = str(data["traceback"]).rstrip()
    if data["internal"]:
        facts["internal"] = True
    return event, facts


def _run_ms(noted: Mapping[str, Any]) -> Facts:
    return {"run_ms": noted["run_ms"]} if "run_ms" in noted else {}


def _ignored(record: LogRecord) -> tuple[Event, Facts]:
    return events.TASK_IGNORED, {**_call(record), "outcome": "ignored"}


def _rejected(record: LogRecord) -> tuple[Event, Facts]:
    return events.TASK_REJECTED, {**_call(record), "outcome": "rejected", "reason": str(_data(record)["exc"])}


def _revoked(record: LogRecord) -> tuple[Event, Facts]:
    task, id_ = _arguments(record, 2)
    return events.TASK_REVOKED, {"task": task, "id": id_, "outcome": "revoked"}


def _over_soft(record: LogRecord) -> tuple[Event, Facts]:
    limit, task, id_ = _arguments(record, 3)
    return events.TASK_OVER_TIME, {"task": task, "id": id_, "limit": "soft", "seconds": limit}


def _over_hard(record: LogRecord) -> tuple[Event, Facts]:
    limit, task, id_ = _arguments(record, 3)
    return events.TASK_OVER_TIME, {"task": task, "id": id_, "limit": "hard", "seconds": limit}


def _cut_off(record: LogRecord) -> tuple[Event, Facts]:
    # Its call is that of the message at hand.
    [error] = _arguments(record, 1)
    reason = "timed_out" if isinstance(error, TimeLimitExceeded) else "lost" if _is_lost(error) else None
    facts = {"error": describe(error), "reason": reason, "outcome": "failed"}
    return events.TASK_CUT_OFF, {name: fact for name, fact in facts.items() if fact is not None}


def _is_lost(error: Any) -> bool:
    return isinstance(error, WorkerLostError | Terminated)


# Processes


def _process_died(record: LogRecord) -> tuple[Event, Facts]:
    process, pid, status = _arguments(record, 3)
    return events.WORKER_PROCESS_DIED, {"process": process, "pid": pid, "status": status}


def _ready(record: LogRecord) -> tuple[Event, Facts]:
    [worker] = _arguments(record, 1)
    return events.WORKER_READY, {"worker": worker}


def _connected(record: LogRecord) -> tuple[Event, Facts]:
    [url] = _arguments(record, 1)
    return events.BROKER_CONNECTED, {"url": mask_text(str(url))}


def _unreachable(record: LogRecord) -> tuple[Event, Facts]:
    url, error, then = _arguments(record, 3)
    return events.BROKER_UNREACHABLE, {"url": mask_text(str(url)), "error": error, "then": str(then).strip()}


def _lost(record: LogRecord) -> tuple[Event, Facts] | None:
    text, error = _arguments(record, 2)
    return (events.BROKER_LOST, {"error": error}) if text == consumer.CONNECTION_RETRY else None


def _sent_by_beat(record: LogRecord) -> tuple[Event, Facts]:
    entry, task = _arguments(record, 2)
    return events.BEAT_SENT, {"entry": entry, "task": task}


def _beat_stopping(record: LogRecord) -> tuple[Event, Facts]:
    return events.BEAT_STOPPING, {}


# What would go past the log


def _printed(record: LogRecord) -> tuple[Event, Facts]:
    return events.PROCESS_PRINTED, {"text": record.getMessage()}


def _warned(record: LogRecord) -> tuple[Event, Facts]:
    text = record.getMessage()
    found = _WARNING.match(text)
    if found is None:
        return events.PYTHON_WARNING, {"text": text.strip()}
    # Below it stands the line of source.
    said = found["text"].rstrip("\n").rpartition("\n  ")[0] or found["text"]
    return events.PYTHON_WARNING, {
        "text": said.strip(),
        "category": found["category"],
        "file": found["file"],
        "line": int(found["line"]),
    }


Lift = Callable[[LogRecord], "tuple[Event, Facts] | None"]


@cache
def LIFTED() -> Mapping[tuple[str, str], Lift]:  # noqa: N802  (a table, made when it is first read)
    """
    Say what is made of which record, by its logger and its message before anything is filled in.

    Read when logging is set up, as some change Celery's texts when their program starts.
    """
    return {
        ("celery.worker.strategy", trace.LOG_RECEIVED): _received,
        ("celery.app.trace", trace.LOG_SUCCESS): _succeeded,
        ("celery.app.trace", trace.LOG_RETRY): _to_run_again,
        # Also of errors that are expected, and of Celery's own: `LOG_INTERNAL_ERROR` is the same text.
        ("celery.app.trace", trace.LOG_FAILURE): _failed,
        ("celery.app.trace", trace.LOG_IGNORED): _ignored,
        ("celery.app.trace", trace.LOG_REJECTED): _rejected,
        ("celery.worker.request", "Discarding revoked task: %s[%s]"): _revoked,
        ("celery.worker.request", "Soft time limit (%ss) exceeded for %s[%s]"): _over_soft,
        ("celery.worker.request", "Hard time limit (%ss) exceeded for %s[%s]"): _over_hard,
        ("celery.worker.request", "Task handler raised error: %r"): _cut_off,
        ("multiprocessing", "Process %r pid:%r exited with %r"): _process_died,
        ("celery.apps.worker", "%s ready."): _ready,
        ("celery.worker.consumer.connection", "Connected to %s"): _connected,
        ("celery.worker.consumer.consumer", consumer.CONNECTION_ERROR): _unreachable,
        ("celery.worker.consumer.consumer", "%s (%r)"): _lost,
        ("celery.beat", "Scheduler: Sending due task %s (%s)"): _sent_by_beat,
        ("celery.beat", "beat: Shutting down..."): _beat_stopping,
    }


#: All that these loggers tell.
_BY_LOGGER: Mapping[str, Lift] = {"celery.redirected": _printed, "py.warnings": _warned}


def lift(record: LogRecord) -> tuple[Event, Facts] | None:
    """Give the event that a record of Celery's is, and its facts; ``None`` for any other record."""
    message = record.msg
    if type(message) is not str:
        return None
    found = LIFTED().get((record.name, message)) or _BY_LOGGER.get(record.name)
    if found is None:
        return None
    try:
        return found(record)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        # Somebody else's record, or another Celery's: it is told as it is.
        return None


def _data(record: LogRecord) -> Mapping[str, Any]:
    return record.data  # type: ignore[attr-defined,no-any-return]


def _call(record: LogRecord) -> Facts:
    data = _data(record)
    return {"task": data["name"], "id": data["id"]}


def _outcome(event: Event) -> str:
    return event.name.partition(".")[2]


def _arguments(record: LogRecord, count: int) -> tuple[Any, ...]:
    arguments = record.args
    if not isinstance(arguments, tuple) or len(arguments) != count:
        raise ValueError(arguments)
    return arguments
