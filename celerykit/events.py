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

__all__ = ["EVENTS", "Event", "Said", "observe"]

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
        if self.logger.isEnabledFor(self.level):
            said: Any = Said(self, facts)
            self.logger.log(self.level, said, exc_info=exc_info, extra={"data": facts}, stacklevel=2)


def _written(value: Any) -> str:
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return repr(text) if not text or any(character.isspace() for character in text) else text


_DEBUG, _INFO, _WARNING, _ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR

# A call, from its sender to its end

TASK_SENT = Event("task.sent", _INFO, "A call was handed to its broker.")
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
TASK_REVOKED = Event("task.revoked", _WARNING, "A call was revoked, or had expired, and does not run.")
TASK_HANDED_BACK = Event("task.handed_back", _WARNING, "A call goes back to its queue: a newer deploy may know it.")
TASK_DEAD = Event("task.dead", _ERROR, "A call was buried among the dead letters.")
