"""
The way to the broker: what may go out, how long it may take, and what is said when it does not arrive.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import kombu.exceptions
from amqp.exceptions import AMQPError, MessageNacked, PreconditionFailed
from kombu.utils.json import JSONEncoder

from celerykit.connections import Unroutable
from celerykit.contract import Contract
from celerykit.deadline import Deadline, DeadlinePassed, stop_in_time, within
from celerykit.errors import EnqueueError, InvalidOptions, Problem

if TYPE_CHECKING:
    from celerykit.app import CeleryKit

__all__ = [
    "FAILURES",
    "UnreachableBroker",
    "check_body",
    "check_delay",
    "explain_precondition",
    "is_told_of",
    "sending",
    "telling_of",
    "transport_options",
]

#: What comes out of a publish when the broker cannot be reached, fails, or refuses.
FAILURES: tuple[type[Exception], ...] = (
    kombu.exceptions.OperationalError,
    cast("Any", kombu.exceptions).BatchPublishError,
    AMQPError,
    MessageNacked,
    DeadlinePassed,
    Unroutable,
    EnqueueError,
)

#: Kombu's own encoder, as the body will be written by it, but refusing what is not JSON.
_encode = JSONEncoder(allow_nan=False).encode


class UnreachableBroker(EnqueueError, kombu.exceptions.OperationalError):
    """
    The broker did not take a message in time.

    Attributes:
        may_have_been_sent:
            Whether the message may have arrived all the same. ``False`` only
            when it was never handed to a connection, or came back.

        reason:
            What the broker did, in a few words.
    """

    def __init__(self, message: str, *, may_have_been_sent: bool = True, reason: str = "") -> None:
        super().__init__(message)
        self.may_have_been_sent = may_have_been_sent
        self.reason = reason


_told_of: ContextVar[list[str | None] | None] = ContextVar("celerykit_told_of", default=None)


@contextmanager
def telling_of() -> Iterator[list[str | None]]:
    """
    Let nothing be told of the single messages that are sent in the block: who sends them tells of them.

    It gives a list, which gets the queue of each.
    """
    queues: list[str | None] = []
    token = _told_of.set(queues)
    try:
        yield queues
    finally:
        _told_of.reset(token)


def is_told_of(queue: str | None) -> bool:
    """Tell whether somebody else tells of a message that is sent now to *queue*, and let him know it."""
    queues = _told_of.get()
    if queues is not None:
        queues.append(queue)
    return queues is not None


@contextmanager
def sending(app: CeleryKit, what: str) -> Iterator[Deadline | None]:
    """
    Bound a publish by ``CELERYKIT_PUBLISH_DEADLINE``, and say what was not taken, by which broker.

    Everything that sends goes through here: calls, retries, canvas, and what
    Celery sends in a worker for a task that has finished.
    """
    kit = app.settings.kit
    bound = nullcontext() if kit.profile == "stock" else within(kit.publish_deadline.total_seconds())
    with bound as deadline:
        try:
            yield deadline
        except FAILURES as error:
            if isinstance(error, EnqueueError):
                raise
            raise _unreachable(app, what, error, deadline) from error


def _unreachable(app: CeleryKit, what: str, error: Exception, deadline: Deadline | None) -> UnreachableBroker:
    sent = not _is_refused(error) if deadline is None else deadline.sent
    outcome = "The message may or may not have been sent." if sent else "The message was not sent."
    reason = _reason(error, deadline)
    return UnreachableBroker(
        f"{what}: the broker at {app.connection_for_write().as_uri()} did not take the message ({reason}). "
        f"{outcome} {_remedy(error, deadline)}",
        may_have_been_sent=sent,
        reason=reason,
    )


def _reason(error: Exception, deadline: Deadline | None) -> str:
    if deadline is not None and deadline.blocked:
        return f"it takes no messages for now; {error}"
    cause = _cause(error)
    if isinstance(cause, MessageNacked):
        return "it refused it, with a negative confirm"
    return str(cause) or type(cause).__name__


def _remedy(error: Exception, deadline: Deadline | None) -> str:
    if deadline is not None and deadline.blocked:
        return "RabbitMQ blocks publishers while it is low on memory or disk; see its log."
    cause = _cause(error)
    if isinstance(cause, PreconditionFailed):
        return explain_precondition(cause)
    if isinstance(cause, MessageNacked):
        return "A full queue with x-overflow=reject-publish does that."
    return "Check that the broker runs, and CELERY_BROKER_URL."


def _cause(error: Exception) -> BaseException:
    """Give what is inside of Kombu's own errors."""
    return (error.__cause__ if isinstance(error, _WRAPPERS) else None) or error


_WRAPPERS = (kombu.exceptions.OperationalError, cast("Any", kombu.exceptions).BatchPublishError)


def _is_refused(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False


def explain_precondition(error: BaseException) -> str:
    """Say what to do when RabbitMQ has a queue or an exchange of this name that is different (406)."""
    name = _NAMED.search(str(error))
    what = f"The {name[1]} {name[2]!r}" if name else "It"
    return (
        f"{what} was declared differently before, and RabbitMQ cannot change it. To stay with classic queues, set "
        "CELERY_TASK_DEFAULT_QUEUE_TYPE=classic. "
        "For quorum queues, whose messages survive a node: let the queue run empty, delete it and the exchange of "
        "its name, and start again; or give it another name."
    )


#: "PRECONDITION_FAILED - inequivalent arg 'type' for exchange 'celery' in vhost '/': …"
_NAMED = re.compile(r"for (queue|exchange) '([^']*)'")


def transport_options(url: Any, *, wait: float) -> dict[str, Any]:
    """
    Give the connection options that end a producer's waits, in seconds each.

    For producers only: a worker waits for its broker as long as it takes.
    These bound what no deadline is in force for, such as ``control.ping()``.
    """
    scheme = str(url or "").partition(":")[0]
    shared = {"errback": stop_in_time}
    if scheme.startswith(("redis", "sentinel")):
        return shared | {"socket_timeout": wait, "socket_connect_timeout": wait}
    if scheme in ("amqp", "amqps", "pyamqp", "py-amqp"):
        # Without confirms "sent" means "in a socket's buffer", and a message in there is lost with the broker.
        return shared | {"confirm_publish": True, "confirm_timeout": wait, "read_timeout": wait, "write_timeout": wait}
    return shared


def check_body(contract: Contract, args: Sequence[Any], kwargs: Mapping[str, Any], *, limit: int) -> None:
    """
    Refuse arguments that cannot travel as JSON, or are too large to.

    Args:
        limit:
            In bytes, of the arguments written as JSON.

    Raises:
        InvalidPayload: with the argument that is to blame.
    """
    try:
        size = _size((args, kwargs))
    except _NotJSON as error:
        raise contract.refuse([_located(contract, args, kwargs) or _not_json([], error)]) from None
    if size > limit:
        raise contract.refuse([_too_large(size, limit)])


class _NotJSON(Exception):
    """Says why a value is not JSON."""


def _size(value: Any) -> int:
    """Give the bytes of *value* as JSON."""
    try:
        text = _encode(value)
    except ValueError as error:
        circular = "Circular" in str(error)
        raise _NotJSON("refers to itself" if circular else "holds NaN or Infinity, which JSON does not have") from None
    except (TypeError, RecursionError):
        raise _NotJSON("holds something that cannot be written as JSON") from None
    # Escaped, as it is here, a lone surrogate passes; whoever decodes it gets a string that cannot be written again.
    if "\\ud" in text and _has_lone_surrogate(value):
        raise _NotJSON("holds text with a lone surrogate, which is not Unicode")
    return len(text)


def _has_lone_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, cls=JSONEncoder).encode()
    except UnicodeEncodeError:
        return True
    return False


def _located(contract: Contract, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Problem | None:
    for name, value in contract.parameters.bind(args, kwargs, partial=True).items():
        try:
            _size(value)
        except _NotJSON as error:
            return _not_json([name], error)
    return None


def _not_json(loc: list[str], error: _NotJSON) -> Problem:
    return {"loc": loc, "type": "not_json", "msg": str(error)}


def _too_large(size: int, limit: int) -> Problem:
    return {
        "loc": [],
        "type": "too_large",
        "msg": f"the arguments are {size} bytes as JSON, and CELERYKIT_MAX_PAYLOAD_BYTES is {limit}; "
        "store large data elsewhere and send a reference to it",
    }


def check_delay(task: str, options: Mapping[str, Any], *, now: datetime, limit: timedelta) -> None:
    """
    Refuse an ``eta`` or ``countdown`` that no broker should be trusted with.

    Raises:
        InvalidOptions: It is beyond *limit*, or not a time.
    """
    countdown, eta = options.get("countdown"), options.get("eta")
    if countdown is not None:
        _refuse_beyond(task, "countdown", _seconds(task, countdown), limit)
    if isinstance(eta, datetime):
        aware = eta if eta.tzinfo else eta.replace(tzinfo=now.tzinfo)
        _refuse_beyond(task, "eta", (aware - now).total_seconds(), limit)


def _seconds(task: str, countdown: Any) -> float:
    if isinstance(countdown, int | float) and math.isfinite(countdown):
        return float(countdown)
    raise InvalidOptions(
        f"{task}: countdown must be a finite number of seconds, got {type(countdown).__name__}. "
        "The message was not sent."
    )


def _refuse_beyond(task: str, option: str, seconds: float, limit: timedelta) -> None:
    if seconds > limit.total_seconds():
        raise InvalidOptions(
            f"{task}: {option} lies {seconds / 86400:.0f} days ahead, and CELERYKIT_MAX_ETA is {limit.days} days. "
            "The message was not sent; plan far dates in a schedule or a database."
        )
