"""For programs that have logging of their own: our part of it, to put into theirs."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any

import structlog
from structlog.contextvars import merge_contextvars

from celerykit import redact
from celerykit.events import Said
from celerykit.logs.lifting import lift
from celerykit.logs.lines import is_of_call

__all__ = ["configure_structlog", "lifted", "redacted"]

EventDict = MutableMapping[str, Any]


def lifted(logger: Any, method: str, event_dict: EventDict) -> EventDict:
    """
    Write our events and Celery's records as names with facts: a processor for structlog.

    For the ``foreign_pre_chain`` of a ``ProcessorFormatter``. With
    ``pass_foreign_args=True`` also those records are known whose facts stand
    in their arguments only.
    """
    record = event_dict.get("_record")
    if record is None or event_dict.get("_from_structlog"):
        return event_dict
    arguments = event_dict.pop("positional_args", None)
    if type(record.msg) is Said:
        said = record.msg.event, dict(record.msg.facts)
    else:
        whole = copy.copy(record)
        # structlog has taken them away.
        whole.args = arguments or record.args
        found = lift(whole)
        if found is None:
            return event_dict
        said = found
    event_dict["event"] = said[0].name
    for name, value in said[1].items():
        event_dict[name] = value
    return event_dict


_KEPT = ("_record", "_from_structlog", "exc_info")


def redacted(logger: Any, method: str, event_dict: EventDict) -> EventDict:
    """Mask what is secret by its name, its mark or its value: a processor for structlog, before it is rendered."""
    kept = {name: value for name, value in event_dict.items() if name in _KEPT or is_of_call(name, value)}
    return {**redact.clean({name: value for name, value in event_dict.items() if name not in kept}), **kept}


# structlog, where nobody has configured it


class _Text:
    """The message of a record that structlog made, for formatters that write a text."""

    def __init__(self, event: str, facts: EventDict) -> None:
        self._event, self._facts = event, facts

    def __str__(self) -> str:
        return " ".join([str(self._event), *(f"{name}={value!s}" for name, value in self._facts.items())])


def _as_text(logger: Any, method: str, event_dict: EventDict) -> tuple[tuple[Any, ...], dict[str, Any]]:
    event = event_dict.pop("event", "")
    taken = {name: event_dict.pop(name) for name in ("exc_info", "stack_info", "stacklevel") if name in event_dict}
    facts = redact.clean(dict(event_dict))
    return (_Text(event, facts),), {**taken, "extra": {"data": facts}}


def configure_structlog(*, joined: bool) -> None:
    """
    Have structlog hand its events to `logging`, unless somebody has configured it.

    Args:
        joined:
            Whether other formatters than ours write them.
    """
    if structlog.is_configured():
        return
    last: Any = _as_text if joined else structlog.stdlib.ProcessorFormatter.wrap_for_formatter
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.processors.StackInfoRenderer(),
            *([merge_contextvars] if joined else []),
            last,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
