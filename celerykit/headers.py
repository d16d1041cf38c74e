"""
What celerykit adds to a message: one header beside Celery's own.

It is built when a message is sent, never when a signature is made, and must be
read by workers older and newer than the sender: unknown facts are kept, and
what cannot be read counts as absent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Self

__all__ = ["HEADER", "VERSION", "Attempt", "Headers"]

#: The one header of a message that is ours.
HEADER = "celerykit"

#: Raised when an older worker could misread the header, not when a fact is added.
VERSION = 1

#: The most our header may take of a message, in bytes: brokers put a bound on headers.
_MAX_BYTES = 8 * 1024


class Attempt(NamedTuple):
    """
    One row of the ledger: what came of one run of a message.

    Attributes:
        started:
            When, in seconds since 1970.

        waited:
            Seconds in the queue before: since it was sent, or was due.

        ran:
            Seconds.

        outcome:
            ``retry``, ``snooze``, ``failed``, …

        error:
            The fingerprint of the error, or an empty text.

        worker:
            Where.
    """

    started: float
    waited: float
    ran: float
    outcome: str
    error: str
    worker: str

    @classmethod
    def of(cls, row: Any) -> Self | None:
        """Read a row; what is none counts as absent."""
        try:
            started, waited, ran, outcome, error, worker = row
            return cls(float(started), float(waited), float(ran), str(outcome), str(error), str(worker))
        except (TypeError, ValueError, OverflowError):
            return None

    def row(self) -> list[Any]:
        """Write it shortly: it travels with every retry."""
        return [round(self.started, 3), round(self.waited, 3), round(self.ran, 3), *self[3:]]


@dataclass(frozen=True)
class Headers:
    """
    The facts in our header.

    Attributes:
        contract:
            The fingerprint of the contract the sender checked the arguments
            against; ``None`` when nobody did.

        attempt:
            The run this message is for, from 1. Celery counts waits among its
            ``retries``; this does not.

        queue:
            Where it was sent. RabbitMQ's delayed delivery hides that.

        sent_at:
            When the call was first sent, in seconds since 1970.

        due_at:
            When this attempt was to start at the earliest.

        ledger:
            What came of the attempts before this one, oldest first.

        replay:
            How often the call was brought back from among the dead letters.

        replayed_by:
            What tells two copies of one replay apart.

        turn:
            How often the call was put off, by a retry or a snooze, since it
            was sent or replayed.

        key:
            The idempotency key, as the store knows it.

        call:
            The digest of the arguments that belong to the key.

        joined:
            The id of the call with the same key that this one waits for.

        waits:
            How often this turn was sent once more, to wait.

        context:
            What the call takes along, as JSON values; see `celerykit.context`.
    """

    contract: str | None = None
    attempt: int = 1
    queue: str | None = None
    sent_at: float | None = None
    due_at: float | None = None
    ledger: tuple[Attempt, ...] = ()
    replay: int = 0
    replayed_by: str | None = None
    turn: int = 0
    key: str | None = None
    call: str | None = None
    joined: str | None = None
    waits: int = 0
    context: Mapping[str, Any] | None = field(default=None, hash=False)

    @classmethod
    def of(cls, message_headers: Mapping[str, Any] | None) -> Self:
        """Read a message's headers; a foreign message has none of ours."""
        ours = message_headers.get(HEADER) if message_headers else None
        if not isinstance(ours, Mapping):
            return cls()
        read = cls.__new__(cls)
        # Past `__init__`, which would set each field by itself: this is done several times for each message.
        vars(read).update({name: _READ[name](value) for name, value in ours.items() if name in _READ})
        return read

    def added_to(self, message_headers: Mapping[str, Any] | None) -> dict[str, Any]:
        """
        Write these facts among *message_headers*.

        Those of a retry hold the header of the attempt before; what a newer
        sender put there stays.
        """
        before = (message_headers or {}).get(HEADER)
        theirs = before if isinstance(before, Mapping) else {}
        kept = {name: value for name, value in theirs.items() if name not in _FACTS}
        return {**(message_headers or {}), HEADER: {**kept, "v": VERSION, **self._facts()}}

    def _facts(self) -> dict[str, Any]:
        # Only what says something: most messages are first attempts.
        facts: dict[str, Any] = {"contract": self.contract}
        if self.attempt != 1:
            facts["attempt"] = self.attempt
        for name in _SAID_IF_ANY:
            if value := getattr(self, name):
                facts[name] = value
        if self.ledger:
            facts["ledger"] = _fitting([attempt.row() for attempt in self.ledger])
        return facts


_SAID_IF_ANY = (
    "queue",
    "sent_at",
    "due_at",
    "replay",
    "replayed_by",
    "turn",
    "key",
    "call",
    "joined",
    "waits",
    "context",
)
_FACTS = {*Headers.__dataclass_fields__, "v"}


def _fitting(rows: list[list[Any]]) -> list[list[Any]]:
    """Leave out the oldest rows but the first, until the rest fits."""
    while len(rows) > 1 and len(json.dumps(rows)) > _MAX_BYTES // 2:
        del rows[1]
    return rows


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: Any, *, least: int = 0) -> int:
    return value if isinstance(value, int) and value >= least else least


def _time(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # an int beyond all floats
        return None


def _ledger(value: Any) -> tuple[Attempt, ...]:
    return tuple(filter(None, map(Attempt.of, value))) if isinstance(value, list | tuple) else ()


def _mapping(value: Any) -> Mapping[str, Any] | None:
    return value if isinstance(value, Mapping) else None


#: How each fact is read. What cannot be counts as absent.
_READ: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("contract", "queue", "replayed_by", "key", "call", "joined"), _text),
    **dict.fromkeys(("sent_at", "due_at"), _time),
    **dict.fromkeys(("replay", "turn", "waits"), _count),
    "attempt": partial(_count, least=1),
    "ledger": _ledger,
    "context": _mapping,
}
