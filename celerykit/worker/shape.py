"""
What is wrong with a message, before anything is done with it.

Celery finds some of this when it is too late: in its event loop, which ends the
worker, or in the pool, where nobody hears of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

__all__ = ["Malformed", "check_body", "check_eta", "check_headers"]


class Malformed(ValueError):
    """A message is not what a task's message looks like."""


def check_headers(headers: Any) -> None:
    """
    Check the headers of a protocol 2 message; other messages pass.

    Raises:
        Malformed: with the header that is wrong, not its value.
    """
    if not isinstance(headers, Mapping):
        raise Malformed("its headers are not a mapping")
    if "task" not in headers:
        return
    for name, (is_right, what) in _HEADERS.items():
        if not is_right(headers.get(name)):
            raise Malformed(f"its header {name!r} must be {what}")


def check_body(body: Any) -> None:
    """
    Check a decoded body: ``[args, kwargs, embed]``, or the mapping of protocol 1.

    Raises:
        Malformed: with the part that is wrong.
    """
    if isinstance(body, Mapping):
        args, kwargs, embed = body.get("args", ()), body.get("kwargs", {}), {}
        if not _is_name(body.get("id")) or not _is_name(body.get("task")):
            raise Malformed("it names no task, or has no id")
    elif isinstance(body, list | tuple) and len(body) == 3:
        args, kwargs, embed = body
    else:
        raise Malformed("its body must be a list of arguments, named arguments and options")
    if not isinstance(args, list | tuple):
        raise Malformed("its arguments must be a list")
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise Malformed("its named arguments must be a mapping")
    if not isinstance(embed, Mapping):
        raise Malformed("its options, the third part of the body, must be a mapping")
    for name, (is_right, what) in _EMBED.items():
        if not is_right(embed.get(name)):
            raise Malformed(f"its option {name!r} must be {what}")


def check_eta(eta: datetime | None, *, now: datetime, limit: timedelta) -> None:
    """
    Refuse an ETA that a worker would keep a message for without an end.

    Raises:
        Malformed: It is further ahead than *limit* and a day.
    """
    if eta is None:
        return
    aware = eta if eta.tzinfo else eta.replace(tzinfo=now.tzinfo)
    try:
        aware.astimezone()
    except (OverflowError, ValueError):
        raise Malformed("its ETA lies before all time") from None
    if aware > now + limit + timedelta(days=1):
        raise Malformed(f"its ETA lies more than {limit.days} days ahead (CELERYKIT_MAX_ETA)")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _maybe(kind: type | tuple[type, ...]) -> Callable[[Any], bool]:
    return lambda value: value is None or isinstance(value, kind)


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and value >= 0)


def _is_limits(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_maybe((int, float)), value))


def _are_signatures(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple) and all(isinstance(one, Mapping) for one in value))


_TEXT = (_maybe(str), "text")

_HEADERS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "task": (_is_name, "the name of a task"),
    "id": (_is_name, "an id"),
    "root_id": _TEXT,
    "parent_id": _TEXT,
    "group": _TEXT,
    "shadow": _TEXT,
    "eta": _TEXT,
    "expires": _TEXT,
    "retries": (_is_count, "a number from 0"),
    "timelimit": (_is_limits, "a pair of numbers"),
    "stamps": (_maybe(Mapping), "a mapping"),
    "stamped_headers": (_maybe((list, tuple)), "a list"),
    "replaced_task_nesting": (_is_count, "a number from 0"),
}

_EMBED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "callbacks": (_are_signatures, "a list of signatures"),
    "errbacks": (_are_signatures, "a list of signatures"),
    "chain": (_are_signatures, "a list of signatures"),
    "chord": (_maybe(Mapping), "a signature"),
}
