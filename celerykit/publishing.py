"""
The way to the broker: what may go out, how long it may take, and what is said when it does not arrive.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import kombu.exceptions
from kombu.utils.json import JSONEncoder

from celerykit.contract import Contract
from celerykit.errors import EnqueueError, InvalidOptions, Problem

if TYPE_CHECKING:
    from celerykit.app import CeleryKit

__all__ = ["FAILURES", "UnreachableBroker", "check_body", "check_delay", "sending", "transport_options", "wait_within"]

#: What Kombu raises when a broker cannot be reached, or fails.
FAILURES: tuple[type[Exception], ...] = (
    kombu.exceptions.OperationalError,
    cast("Any", kombu.exceptions).BatchPublishError,
    EnqueueError,
)

#: Kombu's own encoder, as the body will be written by it, but refusing what is not JSON.
_encode = JSONEncoder(allow_nan=False).encode

#: A broker that stops answering is waited for when sending, connecting anew, and sending again.
_WAITS = 3


class UnreachableBroker(EnqueueError, kombu.exceptions.OperationalError):
    """
    The broker did not take a message in time.

    Attributes:
        may_have_been_sent:
            Whether the message may have arrived all the same: the broker was
            reached, and did not answer.
    """

    def __init__(self, message: str, *, may_have_been_sent: bool = True) -> None:
        super().__init__(message)
        self.may_have_been_sent = may_have_been_sent


@contextmanager
def sending(app: CeleryKit, what: str) -> Iterator[None]:
    """Say which message was not taken, by which broker, in place of Kombu's bare error."""
    try:
        yield
    except FAILURES as error:
        if isinstance(error, EnqueueError):
            raise
        raise _unreachable(app, what, error) from error


def _unreachable(app: CeleryKit, what: str, error: Exception) -> UnreachableBroker:
    refused = any(isinstance(cause, ConnectionRefusedError) for cause in _causes(error))
    outcome = "The message was not sent." if refused else "The message may or may not have been sent."
    return UnreachableBroker(
        f"{what}: the broker at {app.connection_for_write().as_uri()} did not take the message ({error}). {outcome} "
        "Check that the broker runs, and CELERY_BROKER_URL.",
        may_have_been_sent=not refused,
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def wait_within(deadline: float) -> float:
    """Give the seconds that one wait of a publish may take, for all of them to end within *deadline*."""
    return deadline / _WAITS


def transport_options(url: Any, *, wait: float) -> dict[str, Any]:
    """
    Give the connection options that end a producer's waits, in seconds each.

    For producers only: a worker waits for its broker as long as it takes.
    """
    scheme = str(url or "").partition(":")[0]
    if scheme.startswith(("redis", "sentinel")):
        return {"socket_timeout": wait, "socket_connect_timeout": wait}
    if scheme in ("amqp", "amqps", "pyamqp", "py-amqp"):
        # Without confirms "sent" means "in a socket's buffer", and a message in there is lost with the broker.
        return {"confirm_publish": True, "confirm_timeout": wait, "read_timeout": wait, "write_timeout": wait}
    return {}


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
