"""
Dead letters: messages that no worker could finish, each with a note that says why.

A dead letter is the original message, body and headers as they were, with one
header more: its note. This module knows what is in a note, which letters a
person asks for, and how a message has to change to be sent again. Where letters
lie, and how they are moved, is `celerykit.letters`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, Self, get_args
from uuid import UUID, uuid5

from celerykit.headers import Attempt, Headers

__all__ = [
    "HEADER",
    "REASONS",
    "Filter",
    "Letter",
    "Mark",
    "Note",
    "Outgoing",
    "Payload",
    "Reason",
    "described",
    "error_fingerprint",
    "identify",
    "letter_id",
    "payload_of",
    "repaired",
    "replay_mark",
    "rewritten",
]

#: The header of a dead letter that is ours.
HEADER = "celerykit-dead"

Reason = Literal[
    "failed",
    "invalid_payload",
    "unknown_task",
    "undecodable",
    "malformed",
    "time_limit",
    "process_died",
    "interrupted",
    "expired",
    "rejected",
    "chord_failed",
]

REASONS: tuple[Reason, ...] = get_args(Reason)

#: The most a note takes, in bytes: RabbitMQ closes the connection when the headers of a message are too large.
_MAX_BYTES = 16 * 1024

#: What is cut, in this order, until a note fits. Of a traceback the end says most.
_CUTS: tuple[Callable[[dict[str, Any]], Any], ...] = (
    lambda facts: facts.update(traceback=_tail(facts["traceback"], 6000), message=_head(facts["message"], 2000)),
    lambda facts: facts.update(traceback=_tail(facts["traceback"], 2000), problems=facts["problems"][:10]),
    lambda facts: facts.update(ledger=facts["ledger"][-5:], message=_head(facts["message"], 500)),
    lambda facts: facts.update(traceback=_tail(facts["traceback"], 500), problems=facts["problems"][:2]),
    lambda facts: facts.update(traceback="", problems=[], ledger=[], message=_head(facts["message"], 100)),
    lambda facts: facts.update(message="", error=_head(facts["error"], 60), worker="", task=None, id=None, chord=None),
)

#: Names of our letters are made in this space.
_SPACE = UUID("7a3f5c52-7a0e-5b5e-9c3b-6a1c2d9b8e10")


# Who is who


def letter_id(task_id: str, attempt: int, replay: int, *more: Any) -> str:
    """
    Name the letter that this attempt of a call would be: always the same.

    Args:
        more:
            What else tells two calls apart.
    """
    return str(uuid5(_SPACE, json.dumps([task_id, attempt, replay, *more], default=str)))


def identify(headers: Mapping[str, Any] | None, body: bytes | str | None) -> str:
    """
    Name the letter that a message would be, from the message alone.

    The same for each delivery of it. Beside id, attempt and replay it counts
    which task it is and when it was sent: tasks replace themselves under one
    id, and people use one id for many calls.
    """
    headers = headers or {}
    ours, task_id = Headers.of(headers), headers.get("id")
    if isinstance(task_id, str) and task_id:
        more = (headers.get("task"), headers.get("replaced_task_nesting") or 0, ours.sent_at)
        return letter_id(task_id, ours.attempt, ours.replay, *more)
    known = json.dumps({name: headers[name] for name in headers if name not in _BROKERS}, sort_keys=True, default=repr)
    content = body.encode(errors="surrogatepass") if isinstance(body, str) else bytes(body or b"")
    return str(uuid5(_SPACE, hashlib.sha256(known.encode() + b"\n" + content).hexdigest()))


_FRAME = re.compile(r'^\s*File "([^"]+)", line \d+, in (.+?)\s*$', re.MULTILINE)

#: The same task fails in the same way under another version of these.
_PLUMBING = ("/celery/app/", "/celerykit/", "/billiard/")


def error_fingerprint(error_type: str, traceback: str) -> str:
    """
    Give twelve hexadecimal digits that two errors share when they have one cause.

    Taken over the type of the error, and files and functions of the
    traceback: neither line numbers, which a deploy moves, nor the message,
    which names ids and times.
    """
    frames: list[str] = []
    for file, function in _FRAME.findall(traceback):
        frame = f"{file.replace(chr(92), '/').rpartition('/')[2]}:{function}"
        if not any(part in file for part in _PLUMBING) and frame not in frames[-1:]:
            frames.append(frame)
    text = "\n".join([error_type.rpartition(".")[2], *frames])
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:12]


# The record


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """
    Why a message died. Holds no argument of the call.

    Attributes:
        letter:
            The letter's own id.

        error:
            The name of the error's type, or an empty text.

        problems:
            What pydantic found wrong, without the values.

        fingerprint:
            See `error_fingerprint`.

        queue:
            Where the message was sent first, and is sent again.

        sent_at, died_at:
            In seconds since 1970.

        replay:
            How often the call had been brought back before.

        chord:
            The id of the chord the call was a member or the body of.

        priority, expiration:
            The message's own, which a letter must not have: it would vanish.
    """

    letter: str
    reason: Reason
    died_at: float
    task: str | None = None
    id: str | None = None
    error: str = ""
    message: str = ""
    traceback: str = ""
    problems: list[dict[str, Any]] = field(default_factory=list)
    fingerprint: str = ""
    attempts: int = 1
    queue: str | None = None
    exchange: str | None = None
    routing_key: str | None = None
    sent_at: float | None = None
    worker: str = ""
    replay: int = 0
    chord: str | None = None
    priority: int | None = None
    expiration: str | None = None
    ledger: tuple[Attempt, ...] = ()

    def to_header(self, *, limit: int = _MAX_BYTES) -> str:
        """Write it as JSON of at most *limit* bytes (from 2 KiB on), leaving out what says least."""
        facts = asdict(self) | {"ledger": [attempt.row() for attempt in self.ledger]}
        written = _written(facts)
        for cut in _CUTS:
            if len(written) <= limit:
                break
            cut(facts)
            written = _written(facts)
        return written

    @classmethod
    def of(cls, headers: Mapping[str, Any] | None) -> Self | None:
        """Read the note among a message's headers; what cannot be read counts as absent."""
        facts = _mapping((headers or {}).get(HEADER))
        letter, reason = facts.get("letter"), facts.get("reason")
        if not isinstance(letter, str) or reason not in REASONS:
            return None
        known = {name: read(facts[name]) for name, read in _READERS.items() if name in facts}
        known = {name: value for name, value in known.items() if value is not None}
        return cls(letter=letter, reason=reason, **{"died_at": 0.0, **known})

    @classmethod
    def made_up(cls, headers: Mapping[str, Any], body: bytes | str | None, *, reason: Reason = "rejected") -> Self:
        """Write a note for a message that somebody else put among the letters, such as a queue's own limit."""
        ours, deaths = Headers.of(headers), headers.get("x-death")
        death = deaths[0] if isinstance(deaths, list) and deaths and isinstance(deaths[0], Mapping) else {}
        died = death.get("time")
        return cls(
            letter=identify(headers, body),
            reason=_BROKERS_REASONS.get(str(death.get("reason")), reason),
            died_at=died.replace(tzinfo=died.tzinfo or UTC).timestamp() if isinstance(died, datetime) else 0.0,
            task=_text(headers.get("task")),
            id=_text(headers.get("id")),
            attempts=ours.attempt,
            queue=ours.queue or _text(death.get("queue")),
            sent_at=ours.sent_at,
            replay=ours.replay,
            ledger=ours.ledger,
        )


#: What a broker calls the reasons that we have words for.
_BROKERS_REASONS: Mapping[str, Reason] = {"expired": "expired", "delivery_limit": "process_died"}


def _written(facts: Mapping[str, Any]) -> str:
    # In ASCII: a character is a byte, and a lone surrogate can be sent.
    return json.dumps({name: value for name, value in facts.items() if value not in (None, "", [])}, default=repr)


def _head(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _tail(text: str, length: int) -> str:
    return text if len(text) <= length else f"…{text[1 - length :]}"


def _mapping(value: Any) -> Mapping[str, Any]:
    """Read a JSON object, or one that somebody has read already."""
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _time(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # an int beyond all floats
        return None


def _rows(value: Any) -> tuple[Attempt, ...]:
    return tuple(filter(None, map(Attempt.of, value))) if isinstance(value, list) else ()


def _problems(value: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


_READERS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("task", "id", "error", "message", "traceback", "fingerprint", "queue", "exchange"), _text),
    **dict.fromkeys(("routing_key", "worker", "chord", "expiration"), _text),
    **dict.fromkeys(("attempts", "replay", "priority"), _count),
    **dict.fromkeys(("died_at", "sent_at"), _time),
    "ledger": _rows,
    "problems": _problems,
}


@dataclass(frozen=True, slots=True)
class Letter:
    """
    A dead letter: the message as it was, and the note of why it died.

    Attributes:
        headers:
            Celery's, without the note.

        properties:
            The message's ``correlation_id`` and ``reply_to``.
    """

    note: Note
    body: bytes = field(repr=False)
    headers: Mapping[str, Any] = field(repr=False)
    content_type: str | None = None
    content_encoding: str | None = None
    properties: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def id(self) -> str:
        """The letter's own id, which is not the task's."""
        return self.note.letter


# What is in it


class Payload(NamedTuple):
    """
    What a message calls its task with, as JSON.

    Attributes:
        embed:
            What follows: ``callbacks``, ``errbacks``, ``chain`` and ``chord``.
    """

    args: list[Any]
    kwargs: dict[str, Any]
    embed: dict[str, Any]


def payload_of(letter: Letter) -> Payload | None:
    """Read a letter's body; None when it is not JSON of Celery's shape."""
    body = _json_of(letter)
    if isinstance(body, Mapping) and "task" not in letter.headers:
        # Celery's first protocol has everything in the body.
        args, kwargs, embed = body.get("args") or [], body.get("kwargs") or {}, dict[str, Any]()
    elif isinstance(body, list) and len(body) == 3:
        args, kwargs, embed = body[0], body[1], body[2] or {}
    else:
        return None
    if isinstance(args, list) and isinstance(kwargs, dict) and isinstance(embed, dict):
        return Payload(args, kwargs, embed)
    return None


def _json_of(letter: Letter) -> Any:
    if letter.content_type != "application/json" or letter.headers.get("compression"):
        return None
    try:
        return json.loads(letter.body.decode(letter.content_encoding or "utf-8"))
    except (ValueError, LookupError, RecursionError):
        return None


def described(letter: Letter, *, arguments: bool) -> dict[str, Any]:
    """
    Write a letter as plain data.

    Args:
        arguments:
            With headers and body. These are the call's own, and may be secret.
    """
    note = {name: value for name, value in asdict(letter.note).items() if value is not None}
    note["ledger"] = [attempt._asdict() for attempt in letter.note.ledger]
    if not arguments:
        return note
    body = _json_of(letter)
    written = {"body": body} if body is not None else {"body_base64": base64.b64encode(letter.body).decode()}
    kinds = {"content_type": letter.content_type, "content_encoding": letter.content_encoding}
    return {"note": note, **written, **kinds, "headers": letter.headers, "properties": letter.properties}


def rewritten(
    letter: Letter,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    contract: str | None,
    encode: Callable[[Any], str] = json.dumps,
) -> Letter:
    """
    Give a letter with other arguments; what is to follow on its call stays.

    Args:
        contract:
            The fingerprint of the contract that they were checked against.
    """
    payload, headers = payload_of(letter), dict(letter.headers)
    # They show what the arguments were.
    for name in ("argsrepr", "kwargsrepr", "compression"):
        headers.pop(name, None)
    body: Any = [args, kwargs, payload.embed if payload else _NOTHING_FOLLOWS]
    if payload and "task" not in headers:
        body = {**_json_of(letter), "args": args, "kwargs": kwargs}
    return replace(
        letter,
        body=encode(body).encode(),
        headers=replace(Headers.of(headers), contract=contract, call=None).added_to(headers),
        content_type="application/json",
        content_encoding="utf-8",
    )


_NOTHING_FOLLOWS: Mapping[str, Any] = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))


# Which


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """
    Which letters a person asks for: those for which all that is given is true.

    Attributes:
        task:
            Its name; ``*`` and ``?`` stand for any text and any character.

        error:
            The name of the error's type, with ``*`` and ``?``, or a part of its message.

        since, until:
            Of the death, in seconds since 1970.

        id:
            Of the letter or the task. The first 8 characters of a letter's are enough.

        queue:
            Where the message was sent first.
    """

    task: str | None = None
    reason: str | Collection[str] | None = None
    error: str | None = None
    since: float | None = None
    until: float | None = None
    id: str | Collection[str] | None = None
    fingerprint: str | None = None
    queue: str | None = None
    _reasons: frozenset[str] = field(init=False, repr=False)
    _names: frozenset[str] = field(init=False, repr=False)
    _lengths: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # There may be thousands of names, and of letters.
        object.__setattr__(self, "_reasons", _several(self.reason))
        object.__setattr__(self, "_names", _several(self.id))
        object.__setattr__(self, "_lengths", frozenset(len(name) for name in self._names if len(name) >= 8))

    def matches(self, note: Note) -> bool:
        """Tell whether this is the note of such a letter."""
        return (
            (self.task is None or fnmatchcase(note.task or "", self.task))
            and (self.reason is None or note.reason in self._reasons)
            and (self.error is None or fnmatchcase(note.error, self.error) or self.error in note.message)
            and (self.since is None or note.died_at >= self.since)
            and (self.until is None or note.died_at < self.until)
            and (self.id is None or self._is_named(note))
            and (self.fingerprint is None or note.fingerprint == self.fingerprint)
            and (self.queue is None or note.queue == self.queue)
        )

    def _is_named(self, note: Note) -> bool:
        return note.id in self._names or any(note.letter[:length] in self._names for length in self._lengths)


def _several(value: str | Collection[str] | None) -> frozenset[str]:
    return frozenset(() if value is None else (value,) if isinstance(value, str) else value)


# Again


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message that is ready to be sent."""

    body: bytes = field(repr=False)
    headers: Mapping[str, Any] = field(repr=False)
    content_type: str | None
    content_encoding: str | None
    properties: Mapping[str, Any] = field(repr=False)
    queue: str | None
    priority: int | None


#: What brokers write among a message's headers: counts that would kill it again, and copies to further queues.
_BROKERS = frozenset({"CC", "BCC", "redelivered", "x-death", "x-delivery-count", "x-acquired-count", "x-delay"})
_BROKERS_PREFIXES = ("x-first-death-", "x-last-death-", "x-opt-")


def repaired(letter: Letter, *, now: float, nonce: str, new_id: str | None = None) -> Outgoing:
    """
    Make the message that runs a letter's call once more, without what would kill it again.

    Attempts start anew; id, stamps, callbacks and what is left of a chain stay.
    A member of a chord leaves it: the chord has ended, and must not count it twice.

    Args:
        now:
            In seconds since 1970.

        nonce:
            New for each time a message is sent; see `replay_mark`.

        new_id:
            In place of the task's id.
    """
    headers = {name: value for name, value in letter.headers.items() if name != HEADER and not _is_brokers(name)}
    old_id = headers.get("id")
    changes: dict[str, Any] = {"expires": None, "eta": _future(headers.get("eta"), now), "retries": 0}
    if new_id is not None:
        changes |= {"id": new_id, "root_id": new_id if headers.get("root_id") == old_id else headers.get("root_id")}
    first_protocol = "task" not in headers
    before = Headers.of(headers)
    ours = replace(
        before,
        attempt=1,
        queue=letter.note.queue,
        sent_at=now,
        due_at=None,
        ledger=letter.note.ledger or before.ledger,
        replay=letter.note.replay + 1,
        replayed_by=f"{letter.id}/{nonce}",
        turn=0,
        joined=None,
        waits=0,
        context=before.context if new_id is None else _with_correlation_id(before.context, headers),
    )
    return Outgoing(
        body=_body_of_first_protocol(letter, changes, now) if first_protocol else _without_chord(letter),
        headers=ours.added_to(headers if first_protocol else headers | changes),
        content_type=letter.content_type,
        content_encoding=letter.content_encoding,
        properties={**letter.properties, **({"correlation_id": new_id} if new_id is not None else {})},
        queue=letter.note.queue,
        priority=letter.note.priority,
    )


def _with_correlation_id(context: Mapping[str, Any] | None, headers: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Keep what the ids of a call stood in for, when it gets others."""
    root_id = headers.get("root_id") or headers.get("id")
    return {"correlation_id": root_id, **(context or {})} if isinstance(root_id, str) else context


def _is_brokers(name: str) -> bool:
    return name in _BROKERS or name.startswith(_BROKERS_PREFIXES)


def _future(eta: Any, now: float) -> Any:
    try:
        due = datetime.fromisoformat(eta)
    except (TypeError, ValueError):
        return None
    return eta if (due if due.tzinfo else due.replace(tzinfo=UTC)).timestamp() > now else None


def _without_chord(letter: Letter) -> bytes:
    payload = payload_of(letter)
    if payload is None or not payload.embed.get("chord"):
        return letter.body
    return _encoded(letter, [payload.args, payload.kwargs, {**payload.embed, "chord": None}])


def _body_of_first_protocol(letter: Letter, changes: Mapping[str, Any], now: float) -> bytes:
    body = _json_of(letter)
    if not isinstance(body, dict):
        return letter.body
    own_id = {} if "id" not in changes else {"id": changes["id"]}
    eta = _future(body.get("eta"), now)
    return _encoded(letter, {**body, **own_id, "expires": None, "eta": eta, "retries": 0, "chord": None})


def _encoded(letter: Letter, body: Any) -> bytes:
    return json.dumps(body).encode(letter.content_encoding or "utf-8")


class Mark(NamedTuple):
    """What a worker notes in the store when a replayed call starts."""

    key: str
    value: str


def replay_mark(headers: Mapping[str, Any] | Headers | None) -> Mark | None:
    """
    Tell by which mark two copies of one replayed letter know of each other; None for a call that is no replay.

    Whoever sends a letter again and dies before it is taken away leaves both,
    and the letter is sent once more. Each sending has a value of its own: a
    copy whose key is marked with another's value must not run, and one that
    finds its own has been delivered twice, as any message may be.
    """
    ours = headers if isinstance(headers, Headers) else Headers.of(headers)
    letter, _, nonce = (ours.replayed_by or "").partition("/")
    return Mark(f"replayed:{letter}", nonce) if ours.replay and letter and nonce else None
