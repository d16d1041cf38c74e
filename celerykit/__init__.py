"""
celerykit: typed tasks on real Celery.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celerykit.app import CeleryKit, shared_task
    from celerykit.call import Call, Next, Outcome, Step
    from celerykit.canvas import Signature
    from celerykit.claiming import remember
    from celerykit.context import Context
    from celerykit.errors import (
        CelerykitError,
        DuplicateCall,
        EnqueueError,
        InvalidContract,
        InvalidOptions,
        InvalidPayload,
        InvalidSettings,
        KeyConflict,
        LetterNotFound,
        LettersLocked,
        LimitReached,
        ResultMismatch,
        ResultNotStored,
        StoreUnavailable,
        TaskInterrupted,
        Undeliverable,
    )
    from celerykit.idempotency import Key, Once
    from celerykit.limits import Concurrent, Rate
    from celerykit.marks import Redact
    from celerykit.result import Result
    from celerykit.retry import Backoff, Dead, Drop, Retry, RetryAfter, Snooze
    from celerykit.task import Task

__version__ = "0.1.0"

#: Where each public name lives. Imported when it is used: Celery imports our command line's plug-in on every
#: `celery ...`, and should not have to import pydantic for it.
_HOMES = {
    "Backoff": "retry",
    "Call": "call",
    "CeleryKit": "app",
    "CelerykitError": "errors",
    "Concurrent": "limits",
    "Context": "context",
    "Dead": "retry",
    "Drop": "retry",
    "DuplicateCall": "errors",
    "EnqueueError": "errors",
    "InvalidContract": "errors",
    "InvalidOptions": "errors",
    "InvalidPayload": "errors",
    "InvalidSettings": "errors",
    "Key": "idempotency",
    "KeyConflict": "errors",
    "LetterNotFound": "errors",
    "LettersLocked": "errors",
    "LimitReached": "errors",
    "Next": "call",
    "Once": "idempotency",
    "Outcome": "call",
    "Rate": "limits",
    "Redact": "marks",
    "Result": "result",
    "ResultMismatch": "errors",
    "ResultNotStored": "errors",
    "Retry": "retry",
    "RetryAfter": "retry",
    "Signature": "canvas",
    "Snooze": "retry",
    "Step": "call",
    "StoreUnavailable": "errors",
    "Task": "task",
    "TaskInterrupted": "errors",
    "Undeliverable": "errors",
    "remember": "claiming",
    "shared_task": "app",
}

__all__ = [
    "Backoff",
    "Call",
    "CeleryKit",
    "CelerykitError",
    "Concurrent",
    "Context",
    "Dead",
    "Drop",
    "DuplicateCall",
    "EnqueueError",
    "InvalidContract",
    "InvalidOptions",
    "InvalidPayload",
    "InvalidSettings",
    "Key",
    "KeyConflict",
    "LetterNotFound",
    "LettersLocked",
    "LimitReached",
    "Next",
    "Once",
    "Outcome",
    "Rate",
    "Redact",
    "Result",
    "ResultMismatch",
    "ResultNotStored",
    "Retry",
    "RetryAfter",
    "Signature",
    "Snooze",
    "Step",
    "StoreUnavailable",
    "Task",
    "TaskInterrupted",
    "Undeliverable",
    "remember",
    "shared_task",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'celerykit' has no attribute {name!r}")
    value = getattr(import_module(f"celerykit.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
