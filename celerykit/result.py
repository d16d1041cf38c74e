"""
Results that know their type.

A result finds its task by name when it is read, so it may be made anywhere, be
pickled, or come out of a chain; it is typed wherever the task is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar, cast

import celery.exceptions
import celery.result
from celery import states
from celery.backends.base import DisabledBackend

from celerykit.contract import Contract
from celerykit.errors import ResultNotStored

__all__ = ["EagerResult", "GroupResult", "Result", "ResultSet"]

R_co = TypeVar("R_co", covariant=True)

#: Seconds between two looks at the backend in `Result.aget`: at first, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5

_Callback = Callable[[str, Any], Any]


class Result(celery.result.AsyncResult[R_co], Generic[R_co]):
    """
    An ``AsyncResult`` whose ``get`` gives the task's return type.

    ``result`` and ``info`` are Celery's, and show the stored JSON value.
    """

    def __init__(
        self,
        id: str,  # noqa: A002  (Celery's name)
        backend: Any = None,
        task_name: str | None = None,
        app: Any = None,
        parent: Any = None,
    ) -> None:
        super().__init__(id, backend, task_name, app, parent)
        self.task_name = task_name
        # Unknown, until `send_task` says so: a result made from an id does not know how the call was sent.
        self._ignored: bool | None = None
        #: Whether the call that gave this was another one's duplicate, which was not sent; ``None`` when the store
        #: did not answer, and a worker will find out.
        self.duplicate: bool | None = False

    def know(self, state: str, result: Any) -> None:
        """Take *state* and *result*, as JSON or an error, for what is stored; the backend is not asked."""
        self._cache = {"status": state, "result": result, "traceback": None, "children": []}

    def get(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        *args: Any,
        callback: _Callback | None = None,
        **kwargs: Any,
    ) -> R_co:
        """
        Wait for the task, and give what it returned.

        Args:
            timeout:
                In seconds; ``None`` waits for ever, as in Celery.

            propagate:
                Whether a failed task's error is raised, or returned.

        Raises:
            ResultMismatch: What is stored is not of the return type.

            ResultNotStored: Nothing is stored, nor will be.

            celery.exceptions.TimeoutError: The task did not finish in time.
        """
        self.check_stored()
        typed = callback and self._typed(callback)
        stock: Any = super().get
        value = stock(timeout, propagate, *args, callback=typed, **kwargs)
        return cast("R_co", self.load(value))

    # Celery's old name for it, which would stay Celery's own `get`.
    wait = get

    async def aget(self, timeout: float | None = None, *, propagate: bool = True) -> R_co:
        """
        Wait for the task without blocking the event loop, and give what it returned.

        Looks at the backend from time to time, on a thread. Raises what `get`
        raises.
        """
        try:
            async with asyncio.timeout(timeout) as limit:
                return await self._poll(propagate=propagate)
        except TimeoutError:
            if not limit.expired():  # it is the task's own
                raise
            raise celery.exceptions.TimeoutError("The operation timed out.") from None

    async def _poll(self, *, propagate: bool) -> R_co:
        await asyncio.to_thread(self.check_stored)
        pause = _FIRST_PAUSE
        while not await asyncio.to_thread(self._is_over, propagate=propagate):
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)
        return cast("R_co", self.load(self.maybe_throw(propagate=propagate)))

    def _is_over(self, *, propagate: bool) -> bool:
        if propagate and self.parent is not None:
            cast("Any", self)._maybe_reraise_parent_error()
        return bool(self.ready())

    def load(self, value: Any) -> Any:
        """Read a stored *value* into the return type; errors, and values of unknown tasks, stay as they are."""
        contract = self._contract
        return value if contract is None or isinstance(value, BaseException) else contract.load_result(value)

    def check_stored(self) -> None:
        """
        Make sure that there is something to wait for.

        A failure is kept even where results are not, and is waited for like
        any result once it is there.

        Raises:
            ResultNotStored: The task's results are not stored.
        """
        if cast("Any", self)._cache is not None:
            self._ignored = False
            return
        if isinstance(self.backend, DisabledBackend):
            raise ResultNotStored(
                f"{self._what}: no result is stored, because no result backend is configured; "
                "set CELERY_RESULT_BACKEND."
            )
        if self._is_ignored and self.state not in states.READY_STATES:
            self._raise_not_stored()
        # Celery's `get` gives None for an ignored result without looking.
        self._ignored = False

    @property
    def _is_ignored(self) -> bool:
        if self._ignored is not None:
            return self._ignored
        return bool(getattr(self._task, "ignore_result", False))

    def _raise_not_stored(self) -> NoReturn:
        contract = self._contract
        why = "the task returns None" if contract and contract.returns_nothing else "it was sent with ignore_result"
        raise ResultNotStored(
            f"{self._what}: the result is not stored, because {why}. "
            "To keep it, declare the task with ignore_result=False, or send it with .using(ignore_result=False)."
        )

    @property
    def _what(self) -> str:
        return f"{self.task_name or 'task'}[{self.id}]"

    @property
    def _task(self) -> Any:
        return self.app.tasks.get(self.task_name) if self.task_name else None

    @property
    def _contract(self) -> Contract | None:
        return getattr(self._task, "contract", None)

    def _typed(self, callback: _Callback) -> _Callback:
        return lambda task_id, value: callback(task_id, self.load(value))

    def __copy__(self) -> Result[R_co]:
        return type(self)(self.id, self.backend, self.task_name, self.app, self.parent)

    def __reduce_args__(self) -> Any:
        return self.id, self.backend, self.task_name, None, self.parent


class EagerResult(celery.result.EagerResult[R_co], Generic[R_co]):
    """The result of a call that was run in place, as typed as one from a worker."""

    _contract: Contract | None = None

    #: Whether the call had been done before, so that nothing ran.
    duplicate: bool | None = False

    @classmethod
    def of(cls, stock: celery.result.EagerResult[Any], contract: Contract | None) -> EagerResult[Any]:
        """Take over what Celery's own eager call gave."""
        result = cls(*cast("Any", stock).__reduce_args__())
        result._contract = contract
        return result

    def get(self, timeout: float | None = None, propagate: bool = True, *args: Any, **kwargs: Any) -> R_co:
        """Give what the task returned, or raise its error."""
        value: Any = super().get(timeout, propagate, *args, **kwargs)
        if self._contract is None or isinstance(value, BaseException):
            return cast("R_co", value)
        return cast("R_co", self._contract.load_result(value))

    wait = get

    async def aget(self, timeout: float | None = None, *, propagate: bool = True) -> R_co:
        """Give what `get` gives; nothing is waited for."""
        return self.get(timeout, propagate)


class _Joined:
    """Several results that are read each in its own type."""

    results: Any

    def join(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Gather all results, in order; each is read by its own `Result.get`."""
        self._check_stored()
        return cast("list[Any]", super().join(*args, **kwargs))  # type: ignore[misc]

    def join_native(
        self,
        timeout: float | None = None,
        propagate: bool = True,
        interval: float = 0.5,
        callback: _Callback | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Gather all results, in order, in the one way the backend does best."""
        self._check_stored()
        typed = callback and self._typed(callback)
        values = super().join_native(timeout, propagate, interval, typed, *args, **kwargs)  # type: ignore[misc]
        if values is None:  # what Celery gives when a callback took them
            return None
        return [_load(result, value) for result, value in zip(self.results, values, strict=True)]

    def _check_stored(self) -> None:
        for result in self.results:
            if isinstance(result, Result):
                result.check_stored()

    def _typed(self, callback: _Callback) -> _Callback:
        by_id = {result.id: result for result in self.results}
        return lambda task_id, value: callback(task_id, _load(by_id.get(task_id), value))


class ResultSet(_Joined, celery.result.ResultSet):
    """A ``ResultSet`` whose ``get`` gives each result in its task's type."""


class GroupResult(_Joined, celery.result.GroupResult):
    """A ``GroupResult`` whose ``get`` gives each result in its task's type."""


def _load(result: Any, value: Any) -> Any:
    return result.load(value) if isinstance(result, Result) else value
