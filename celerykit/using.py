"""
A task with options for its calls, whose arguments are as typed as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypedDict, TypeVar, cast
from uuid import UUID

if TYPE_CHECKING:
    from celerykit.canvas import Signature
    from celerykit.result import Result
    from celerykit.task import Task

__all__ = ["SendOptions", "Using"]

P = ParamSpec("P")
R = TypeVar("R")


class SendOptions(TypedDict, total=False):
    """The options of one call, as ``apply_async`` takes them."""

    countdown: float
    eta: datetime
    expires: float | datetime
    task_id: str
    key: str | int | UUID
    queue: Any
    exchange: Any
    routing_key: str
    priority: int
    headers: Mapping[str, Any]
    ignore_result: bool
    link: Any
    link_error: Any
    shadow: str
    serializer: str
    compression: str
    time_limit: float
    soft_time_limit: float
    retry: bool
    retry_policy: Mapping[str, Any]
    add_to_parent: bool
    producer: Any
    connection: Any
    reply_to: str
    argsrepr: str
    kwargsrepr: str
    delivery_mode: int
    expiration: float
    mandatory: bool


class Using(Generic[P, R]):
    """A task with options for its calls."""

    def __init__(self, task: Task[P, R], options: SendOptions) -> None:
        self._task = task
        self._options = cast("dict[str, Any]", options)

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> Result[R]:
        """Send a call with these options."""
        return self._task.apply_async(args, kwargs, **self._options)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> Result[R]:
        """Send a call with these options without blocking the event loop."""
        return await self._task.asend(args, kwargs, self._options)

    def s(self, *args: P.args, **kwargs: P.kwargs) -> Signature[R]:
        """Make a signature with these options."""
        return self._task.signature(args, kwargs, self._options)

    def si(self, *args: P.args, **kwargs: P.kwargs) -> Signature[R]:
        """Make an immutable signature with these options."""
        return self._task.signature(args, kwargs, self._options, immutable=True)
