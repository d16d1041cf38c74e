"""
One record, one line: JSON for machines, or text for people.

A line has when, how bad and what, then the facts of the event, then those of
the call that runs, then who says it. Whatever it is given it writes something,
and never raises: who logs does not expect that anything can go wrong. Only a
soft time limit passes, which may strike here as anywhere in a task.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from collections.abc import Mapping
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any, Literal, cast
from uuid import UUID

from celery.exceptions import SoftTimeLimitExceeded
from structlog.contextvars import get_contextvars

from celerykit import redact, running
from celerykit.dead_letters import error_fingerprint
from celerykit.events import EVENTS, LOG_UNREADABLE, Said, describe
from celerykit.logs.lifting import lift

__all__ = ["MOST_BYTES", "Fields", "Formatter", "fields_of", "is_of_call"]

Fields = dict[str, Any]

#: The most that a line takes, in bytes: container runtimes cut longer ones into several.
MOST_BYTES = 16 * 1024

#: How long a text may be where a line would be longer than that: tried in this order.
_CLIPS = (6000, 2000, 500, 100, 20)

#: Of a list or a dict that is written with care: so deep, and so many items.
_DEEPEST, _WIDEST = 6, 100

#: What a record has by itself. All else was given to it with `extra`.
_OWN = frozenset(
    (
        *vars(logging.makeLogRecord({})),
        *("message", "asctime", "taskName", "data", "_logger", "_name", "stack_info"),
        # Celery's own formatter leaves them behind.
        *("task_id", "task_name"),
    )
)

#: What only this module may say.
_RESERVED = frozenset(("timestamp", "level", "event", "logger"))

#: What we bind for a running call, in the order in which it is written. None of it can be a secret: a short secret may
#: stand in an id by chance, and is not told by it.
_OF_CALL = ("task", "id", "root_id", "parent_id", "correlation_id", "attempt", "queue", "worker", "key", "wait_ms")
_NOTED = ("kind", "delay", "next_attempt", "run_ms", "reason", "error_fingerprint")
_OURS = frozenset((*_OF_CALL, *_NOTED))

#: What of it stands on the line with which a run ends, and on no other.
_OF_AN_END = ("kind", "run_ms")

#: What of it belongs to that one call only. A line about another call has none of it.
_ONE_CALLS = _OURS - {"root_id", "correlation_id", "worker"}

#: What is told of a running call, and of nothing else meanwhile; the rest only if something was noted.
_ALWAYS_TAKEN = frozenset((*_OF_CALL, "outcome"))
_TAKEN = _ALWAYS_TAKEN | _OURS

#: What of an event can be no secret, either.
_OPEN = frozenset((*_OF_CALL, "run_ms", "outcome", "error_fingerprint", "kind", "next_attempt", "letter", "first"))

#: What tells of a process, and not of the call that it runs at that moment.
_OF_PROCESSES = frozenset(
    name for name in EVENTS if name.partition(".")[0] in ("worker", "beat", "broker", "metrics", "health")
)

#: What a person who reads text does not need on each line.
_LEFT_OUT_OF_TEXT = frozenset(("root_id", "parent_id", "queue", "worker", "wait_ms", "logger", "outcome"))


class Formatter(logging.Formatter):
    """
    Writes records as lines of JSON, or as text.

    For a program's own ``dictConfig``, too:
    ``{"formatters": {"json": {"()": "celerykit.logs.Formatter"}}}``.

    Args:
        format:
            ``json`` or ``text``.

        colours:
            Whether text has them.

        worker:
            The name of the worker that writes.
    """

    def __init__(
        self,
        format: Literal["json", "text"] = "json",  # noqa: A002  (what `dictConfig` calls it)
        *,
        colours: bool = False,
        worker: str | None = None,
    ) -> None:
        super().__init__()
        self.kind = format
        self.colours = colours
        self.worker = worker

    def format(self, record: logging.LogRecord) -> str:
        """Write one line; text has the traceback below it."""
        try:
            fields = fields_of(record, worker=self.worker)
            return _as_text(fields, record, self.colours) if self.kind == "text" else _as_json(fields)
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:  # noqa: BLE001  (an edge: who logs does not expect an error)
            return _unreadable(record, error)


# What is said


def fields_of(record: logging.LogRecord, *, worker: str | None = None) -> Fields:
    """Give what a line says, by name, in order."""
    event, facts, is_ours = _said(record)
    _describe_error(facts)
    is_active = redact.is_active()
    if is_ours:
        context = {} if event in _OF_PROCESSES else _context(facts)
        if is_active:
            facts = _cleaned(facts, _OPEN)
    else:
        # Celery has some that tell of a call and are no event.
        context = _context(facts if record.name.startswith("celery.") else {})
        facts = _cleaned(_beside(facts, context))
        event = redact.scrub(event) if is_active else event
    if is_active:
        context = _cleaned(context, _OPEN)
    fields: Fields = {"timestamp": _timestamp(record), "level": record.levelname.lower(), "event": event}
    for name, value in facts.items():
        fields[f"{name}_" if name in _RESERVED else name] = value
    for name, value in context.items():
        if name not in fields:
            fields[name] = value
    if worker is not None:
        fields.setdefault("worker", worker)
    fields["logger"] = record.name
    _add_error(fields, record)
    _add_trace(fields)
    return fields


def is_of_call(name: str, value: Any) -> bool:
    """Tell whether it is a fact of the running call, which is no secret."""
    if name not in _OF_CALL:
        return False
    call = running.at_work.get() if name != "correlation_id" else None
    known = (get_contextvars() if call is None else call).get(name)
    return type(known) is type(value) and bool(known == value)


def _said(record: logging.LogRecord) -> tuple[str, Fields, bool]:
    """Give the event, its facts, and whether both are ours or Celery's."""
    message: Any = record.msg
    if type(message) is Said:
        return message.event.name, dict(message.facts), True
    lifted = lift(record)
    if lifted is not None:
        event, facts = lifted
        return event.name, facts, True
    if isinstance(message, dict) and "_logger" in vars(record):
        # As structlog hands its events over: see `ProcessorFormatter.wrap_for_formatter`.
        facts = {str(name): value for name, value in message.items() if name not in _STRUCTLOGS}
        return _text_of(message.get("event", "")), facts, False
    data = vars(record).get("data")
    facts = {str(name): value for name, value in data.items()} if isinstance(data, Mapping) else {}
    for name in vars(record).keys() - _OWN:
        facts[name] = vars(record)[name]
    return _message(record), facts, False


def _beside(facts: Fields, context: Fields) -> Fields:
    """Have what somebody calls as a fact of the running call is called stand beside that."""
    if "id" not in context or _TAKEN.isdisjoint(facts):
        return facts
    beside: Fields = {}
    for name, value in facts.items():
        known = context.get(name)
        if name in _ALWAYS_TAKEN or (known is not None and name in _NOTED):
            if type(value) is type(known) and value == known:
                continue  # structlog's `merge_contextvars` was before
            name = f"{name}_"
        beside[name] = value
    return beside


def _cleaned(facts: Fields, but: frozenset[str] = frozenset()) -> Fields:
    if but.isdisjoint(facts):
        return _cleaned_all(facts)
    cleaned = _cleaned_all({name: value for name, value in facts.items() if name not in but})
    # In the order that they had.
    return {name: cleaned[name] if name in cleaned else facts[name] for name in facts if name in cleaned or name in but}


def _cleaned_all(facts: Fields) -> Fields:
    try:
        return cast("Fields", redact.clean(facts))
    except SoftTimeLimitExceeded:
        raise
    except Exception:  # noqa: BLE001  (an edge: a key, or an error, that cannot be written)
        return {name: _cleaned_alone(name, value) for name, value in facts.items()}


def _cleaned_alone(name: str, value: Any) -> Any:
    try:
        return redact.clean({name: value})[name]
    except SoftTimeLimitExceeded:
        raise
    except Exception:  # noqa: BLE001  (as above; what cannot be cleaned may be a secret)
        return f"<{type(value).__name__}>"


#: What of structlog's is said otherwise.
_STRUCTLOGS = frozenset(("event", "exc_info", "level", "timestamp", "logger", "stack_info"))


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except SoftTimeLimitExceeded:
        raise
    except Exception as error:  # noqa: BLE001  (an edge: arguments that do not fit, or that cannot be written)
        return f"{_text_of(record.msg)} (with arguments that do not fit: {type(error).__name__})"


def _context(facts: Mapping[str, Any]) -> Fields:
    bound, call = get_contextvars(), running.at_work.get()
    if call is None:
        if not bound.get("id") and (headers := running.at_hand.get()) is not None:
            bound = running.facts_of(headers)
        call = bound
    own = facts.get("id")
    is_of_another = own is not None and own != call.get("id")
    context: Fields = {}
    for name in _OF_CALL:
        known = bound if name == "correlation_id" else call
        if name in known and not (is_of_another and name in _ONE_CALLS):
            context[name] = known[name]
    for name, value in bound.items():
        if name not in _OURS:
            context[name] = redact.MASK if redact.is_secret_name(name) else value
        elif name in _NOTED:
            if name not in _OF_AN_END and not is_of_another:
                context[name] = value
        elif name not in context or value is not context[name]:
            _add_bound(context, call, name, value)
    return context


def _add_bound(context: Fields, call: Mapping[str, Any], name: str, value: Any) -> None:
    """Have what somebody has bound under the name of a fact of the running call stand beside that."""
    known = call.get(name)
    if name != "correlation_id" and not (type(value) is type(known) and value == known):
        context[f"{name}_"] = value


#: The second that was written last, and how.
_second: tuple[int, str] = (0, "")


def _timestamp(record: logging.LogRecord) -> str:
    global _second
    seconds = int(record.created)
    known, text = _second
    if known != seconds:
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        _second = (seconds, text)
    return f"{text}.{int((record.created - seconds) * 1000):03d}Z"


def _add_error(fields: Fields, record: logging.LogRecord) -> None:
    exc_info: Any = record.exc_info
    if exc_info is None and isinstance(record.msg, dict):
        exc_info = record.msg.get("exc_info")
    if exc_info:
        _add_exception(fields, _exception_of(exc_info), record)
    stack: Any = record.stack_info or (isinstance(record.msg, dict) and record.msg.get("stack"))
    if stack and isinstance(stack, str):
        fields["stack"] = stack


def _describe_error(facts: Fields) -> None:
    error = facts.get("error")
    if isinstance(error, BaseException):
        facts["error"] = describe(error)
        if "error_fingerprint" not in facts:
            text = _writer.formatException((type(error), error, error.__traceback__))
            facts["error_fingerprint"] = error_fingerprint(type(error).__name__, text)


def _exception_of(exc_info: Any) -> Any:
    if isinstance(exc_info, BaseException):
        return type(exc_info), exc_info, exc_info.__traceback__
    return exc_info if isinstance(exc_info, tuple) else sys.exc_info()


def _add_exception(fields: Fields, exc_info: Any, record: logging.LogRecord) -> None:
    if "traceback" in fields or exc_info[0] is None:
        return
    text = record.exc_text or _writer.formatException(exc_info)
    if "error" not in fields:
        fields["error"] = redact.scrub(describe(exc_info[1]))
    fields.setdefault("error_fingerprint", error_fingerprint(exc_info[0].__name__, text))
    fields["traceback"] = redact.scrub(text)


_writer = logging.Formatter()


def _add_trace(fields: Fields) -> None:
    tracing = sys.modules.get("opentelemetry.trace")
    if tracing is None:
        return
    span = tracing.get_current_span().get_span_context()
    if span.is_valid:
        fields.setdefault("trace_id", f"{span.trace_id:032x}")
        fields.setdefault("span_id", f"{span.span_id:016x}")


# JSON


def _plain(value: Any) -> Any:
    """Give something that JSON has, for something that it has not."""
    if isinstance(value, BaseException):
        return describe(value)
    if isinstance(value, timedelta):
        return round(value.total_seconds(), 6)
    if isinstance(value, date | time_of_day):
        return value.isoformat()
    if isinstance(value, UUID | Decimal | PurePath):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    shown = redact.clean(value)
    return shown if isinstance(shown, str | int | float | dict | list) or shown is None else _text_of(shown)


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_plain).encode

#: What some readers take for the end of a line.
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")


def _as_json(fields: Fields) -> str:
    try:
        line = _encode(fields)
    except SoftTimeLimitExceeded:
        raise
    except Exception:  # noqa: BLE001  (an edge: NaN, a circle, a key that is no text, a repr that raises)
        line = _encode(_careful(fields, _CLIPS[0]))
    if len(line) > MOST_BYTES // 4:
        line = _bounded(line, fields)
    return line if line.isascii() else _sound(line)


def _sound(line: str) -> str:
    # Half a character becomes the escape that it came from, which is JSON, too.
    line = line.encode(errors="backslashreplace").decode()
    return _LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def _bounded(line: str, fields: Fields) -> str:
    for clip in _CLIPS:
        if len(line.encode(errors="backslashreplace")) < MOST_BYTES:
            return line
        line = _encode(_careful(fields, clip))
    if len(line.encode(errors="backslashreplace")) < MOST_BYTES:
        return line
    return _encode({**_careful(dict(list(fields.items())[:12]), _CLIPS[-1]), "clipped": True})


def _careful(value: Any, clip: int, depth: int = 0) -> Any:
    """Give *value* as JSON has it, with an end to it whatever it is."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _clipped(value, clip)
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else _clipped(_text_of(value), clip)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return _careful_items(value, clip, depth)
    try:
        return _careful(_plain(value), clip, depth + 1) if depth < _DEEPEST else _clipped(_text_of(value), clip)
    except SoftTimeLimitExceeded:
        raise
    except Exception:  # noqa: BLE001  (an edge: anybody's object)
        return _clipped(_text_of(value), clip)


def _careful_items(value: Any, clip: int, depth: int) -> Any:
    if depth >= _DEEPEST:
        return "…"
    items = list(value.items() if isinstance(value, Mapping) else value)
    some = items[:_WIDEST]
    if isinstance(value, Mapping):
        written = {_clipped(_text_of(key), 100): _careful(item, clip, depth + 1) for key, item in some}
        return written if len(items) == len(some) else {**written, "…": f"{len(items) - len(some)} more"}
    listed = [_careful(item, clip, depth + 1) for item in some]
    return listed if len(items) == len(some) else [*listed, f"… {len(items) - len(some)} more"]


def _clipped(text: str, clip: int) -> str:
    if len(text) <= clip:
        return text
    # Of a traceback the end says most.
    head, tail = clip // 3, clip - clip // 3
    return f"{text[:head]} […{len(text) - clip} characters…] {text[-tail:]}"


def _text_of(value: Any) -> str:
    try:
        return str(value)
    except SoftTimeLimitExceeded:
        raise
    except Exception:  # noqa: BLE001  (an edge: anybody's object)
        return f"<{type(value).__name__}>"


def _unreadable(record: logging.LogRecord, error: Exception) -> str:
    return json.dumps(
        {
            "timestamp": _timestamp(record),
            "level": "error",
            "event": LOG_UNREADABLE.name,
            "logger": str(record.name),
            "error": type(error).__name__,
        }
    )


# Text

_COLOURS = {"debug": "34", "warning": "33", "error": "31", "critical": "35"}


def _as_text(fields: Fields, record: logging.LogRecord, colours: bool) -> str:
    below = [str(fields[name]) for name in ("stack", "traceback") if name in fields]
    seconds = int(record.created)
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    level = f"{fields['level']:<8}"
    event = _one_line(_clipped(_text_of(fields["event"]), _CLIPS[0]))
    if fields["event"] == "process.printed":
        event = f"{event}  {_one_line(_clipped(_text_of(fields['text']), _CLIPS[0]))}"
    facts = " ".join(f"{name}={_shown(value)}" for name, value in _for_people(fields))
    if colours:
        at, event = f"\x1b[2m{at}", f"\x1b[1m{event}\x1b[0m"
        level = f"\x1b[0m\x1b[{_COLOURS.get(fields['level'], '32')}m{level}\x1b[0m"
    line = f"{at}.{int((record.created - seconds) * 1000):03d} {level} {event}{'  ' if facts else ''}{facts}"
    text = "\n".join([line, *(_clipped(text, MOST_BYTES) for text in below)])
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def _for_people(fields: Fields) -> list[tuple[str, Any]]:
    hidden = {"timestamp", "level", "event", "stack", "traceback", *_LEFT_OUT_OF_TEXT}
    if fields.get("correlation_id") in (fields.get("id"), fields.get("root_id")):
        hidden.add("correlation_id")
    if fields.get("attempt") == 1:
        hidden.add("attempt")
    if fields["event"] == "process.printed":
        hidden.add("text")
    return [(name, value) for name, value in fields.items() if name not in hidden]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, BaseException):
        return _shown(describe(value))
    text = value if isinstance(value, str) else _text_of(_careful(value, _CLIPS[1]))
    text = _clipped(text, _CLIPS[1])
    return repr(text) if not text or any(character.isspace() for character in text) else text


def _one_line(text: str) -> str:
    return text if text.isprintable() else "\\n".join(text.splitlines())
