"""
celerykit: typed tasks on real Celery.
"""

from celerykit.app import CeleryKit, shared_task
from celerykit.call import Call, Next, Step
from celerykit.canvas import Signature
from celerykit.errors import (
    CelerykitError,
    EnqueueError,
    InvalidContract,
    InvalidOptions,
    InvalidPayload,
    InvalidSettings,
    ResultMismatch,
    ResultNotStored,
)
from celerykit.result import Result
from celerykit.task import Task

__version__ = "0.1.0"

__all__ = [
    "Call",
    "CeleryKit",
    "CelerykitError",
    "EnqueueError",
    "InvalidContract",
    "InvalidOptions",
    "InvalidPayload",
    "InvalidSettings",
    "Next",
    "Result",
    "ResultMismatch",
    "ResultNotStored",
    "Signature",
    "Step",
    "Task",
    "shared_task",
]
