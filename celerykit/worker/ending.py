"""
How a message can end that will not be acknowledged as done: read off the exception that came back from the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from billiard import einfo
from billiard.einfo import ExceptionInfo
from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from celery.exceptions import Reject
from celery.utils.serialization import UnpickleableExceptionWrapper, get_pickled_exception
from kombu.utils.encoding import safe_str

from celerykit.dead_letters import Reason
from celerykit.errors import InvalidPayload, Problem, TaskInterrupted, Undeliverable

__all__ = ["Ending", "ending_of", "error_in", "info_of"]


@dataclass(frozen=True, slots=True)
class Ending:
    """
    Why a message is dead.

    Attributes:
        error, message, traceback:
            Of the exception, where there was one.

        problems:
            Of a payload that does not fit, without the values.
    """

    reason: Reason
    error: str = ""
    message: str = ""
    traceback: str = ""
    problems: Sequence[Problem] = ()


#: What billiard puts around an exception that comes from another process. Not in its type stubs.
_Wrapped: Any = cast("Any", einfo).ExceptionWithTraceback


def error_in(info: Any) -> BaseException:
    """Take the exception out of billiard's wrappings."""
    error = info.exception
    return cast("BaseException", error.exc if isinstance(error, _Wrapped) else error)


def info_of(error: BaseException) -> Any:
    """Wrap an exception that was never raised as the pool would."""
    try:
        raise error from None
    except type(error):
        return ExceptionInfo()


def ending_of(error: BaseException, *, traceback: str = "", reason: Reason | None = None) -> Ending:
    """Read an exception that ends a message for good."""
    return Ending(
        reason=reason or _reason(error),
        error=_name(error),
        message=_said_by(error),
        traceback=safe_str(traceback or ""),
        problems=error.problems if isinstance(error, InvalidPayload) else (),
    )


def _reason(error: BaseException) -> Reason:
    for kinds, reason in _REASONS:
        if isinstance(error, kinds):
            return reason
    return "failed"


_REASONS: Sequence[tuple[tuple[type[BaseException], ...], Reason]] = (
    ((InvalidPayload,), "invalid_payload"),
    ((TimeLimitExceeded, SoftTimeLimitExceeded), "time_limit"),
    ((WorkerLostError, Undeliverable), "process_died"),
    ((TaskInterrupted, MemoryError, SystemExit, KeyboardInterrupt), "interrupted"),
    ((Reject,), "rejected"),
)


def _said_by(error: BaseException) -> str:
    try:
        return str(get_pickled_exception(cast("Exception", error)))
    except Exception:  # noqa: BLE001  (somebody's own `__str__`)
        return f"<{_name(error)} that cannot be written>"


def _name(error: BaseException) -> str:
    if isinstance(error, UnpickleableExceptionWrapper):
        return str(error.exc_cls_name)
    return type(error).__name__
