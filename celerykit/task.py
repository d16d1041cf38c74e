"""
The task: where calls leave a program, and where they come in again.

Out go `apply_async` and `signature`, which check arguments and write them as
JSON; in comes `__call__`, which puts the steps around the function.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, Unpack, cast, overload

import celery

from celerykit import bulk, loops
from celerykit.call import Call, Next, Step, compose, validated
from celerykit.canvas import Signature
from celerykit.contract import Contract
from celerykit.errors import InvalidOptions, InvalidPayload
from celerykit.headers import Headers
from celerykit.publishing import check_body, check_delay
from celerykit.result import EagerResult, Result
from celerykit.using import SendOptions, Using

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from celerykit.app import CeleryKit

__all__ = ["STEPS", "AsyncTask", "Task"]

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

#: Outermost first. A user's steps come before these: they may refuse a call that was not read yet.
STEPS: tuple[Step, ...] = (validated,)

#: Celery's tasks that call another task's function with items of their own message.
_MAPPERS = ("celery.map", "celery.starmap")

#: The options that Celery takes by position too, in its order.
_POSITIONAL = ("task_id", "producer", "link", "link_error", "shadow")

# Marks on the request of a running task; each run has a request of its own.
_ENTERED, _FINISHED = "celerykit_entered", "celerykit_finished"


class _Sign(Protocol[P, R_co]):
    @overload
    def __call__(self) -> Signature[R_co]: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Signature[R_co]: ...


class Task(celery.Task[P, R], Generic[P, R]):
    """
    A Celery task with a contract.

    Attributes:
        contract:
            What the task may be called with, and what it gives back;
            ``None`` for Celery's own tasks, which stay as they are.

        strict:
            Whether arguments must be of their types, without pydantic's
            conversions. Set with ``@app.task(strict=True)``.
    """

    abstract = True
    contract: Contract | None = None
    strict: bool = False

    #: The function of an `async def` task, whose `run` waits for it.
    _coroutine_function: Callable[..., Any] | None = None

    #: What the task, or a class it inherits from, was told; Celery fills in `ignore_result` for those that were not.
    _told_ignore_result: bool | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "ignore_result" in vars(cls):
            cls._told_ignore_result = cls.ignore_result
        run = vars(cls).get("run")
        function = run.__func__ if isinstance(run, staticmethod) else run
        if inspect.iscoroutinefunction(function):
            # What runs is a plain function, so that Celery's `autoretry_for`, which wraps it, sees its errors.
            waits = loops.waiting_for(function)
            cls.run = staticmethod(waits) if isinstance(run, staticmethod) else waits  # type: ignore[method-assign]
            cls._coroutine_function = run
        elif run is not None:
            cls._coroutine_function = None

    @classmethod
    def bind(cls, app: Any) -> Any:
        """Build the contract, if the decorator has not, before Celery fills in the options nobody gave."""
        if not hasattr(app, "call_steps"):
            # A stock app: the task is as stock as its app.
            cls.contract = None
        elif cls.name and not cls.name.startswith("celery."):
            cls._declare()
        return super().bind(app)

    @classmethod
    def _declare(cls) -> None:
        if "contract" not in vars(cls):  # a class it inherits from has its own
            run = inspect.getattr_static(cls, "run")
            is_bound = not isinstance(run, staticmethod)
            function = run if is_bound else run.__func__
            cls.contract = Contract(str(cls.name), function, drop_first=is_bound, strict=cls.strict)
        cls.ignore_result = cast("Any", cls._told_ignore_result)
        if cls._told_ignore_result is None and cast("Contract", cls.contract).returns_nothing:
            cls.ignore_result = True
            cls.store_errors_even_if_ignored = True
        if cls._coroutine_function is not None:
            loops.refuse_green_threads(str(cls.name))

    # Out

    if TYPE_CHECKING:

        def delay(self, *args: P.args, **kwargs: P.kwargs) -> Result[R]:
            """Check a call, and send it; `apply_async` without options."""

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *positional: Any,
        **options: Any,
    ) -> Result[R]:
        """
        Check a call, and send it.

        Takes all of Celery's options.

        Raises:
            InvalidPayload: The arguments do not fit; nothing was sent.

            InvalidOptions: The options do not make sense; nothing was sent.

            EnqueueError: The broker did not take the message in time.
        """
        options |= zip(_POSITIONAL, positional, strict=False)
        if self.contract is None:
            return cast("Result[R]", super().apply_async(cast("Any", args), cast("Any", kwargs), **options))
        return self.send_prepared(*self.prepare(args, kwargs, options))

    def prepare(
        self, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None, options: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any], dict[str, Any]]:
        """Check a call, and give what is to be sent: arguments as JSON values, and options with our header."""
        args, kwargs = self._checked(args, kwargs, options)
        options = dict(options)
        options["headers"] = Headers(contract=self._contract.fingerprint).added_to(options.get("headers"))
        if options.get("chord") is not None:
            # Backends without a join of their own look for the members' results; without them a chord never ends.
            options["ignore_result"] = False
        return args, kwargs, options

    def send_prepared(self, args: Sequence[Any], kwargs: Mapping[str, Any], options: dict[str, Any]) -> Result[R]:
        """Send what `prepare` gave."""
        return cast("Result[R]", super().apply_async(cast("Any", args), cast("Any", kwargs), **options))

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> Result[R]:
        """
        Do what ``delay`` does without blocking the event loop.

        A wrong call is refused at once; the publish runs on a thread, and is
        given up after ``CELERYKIT_PUBLISH_DEADLINE``.
        """
        return await self.asend(args, kwargs, {})

    async def asend(self, args: Any, kwargs: Any, options: Mapping[str, Any]) -> Result[R]:
        """Do what `apply_async` does without blocking the event loop."""
        parent = self.app.current_worker_task
        prepared = self.prepare(args, kwargs, {**_family(parent), **options})
        send = partial(self.send_prepared, *prepared)
        if self.app.conf.task_always_eager:  # a task may take longer than a publish
            return await asyncio.to_thread(send)
        sent = await self._kit.publish_in_thread(str(self.name), send)
        if parent is not None and options.get("add_to_parent", True):
            parent.add_trail(sent)
        return sent

    def using(self, **options: Unpack[SendOptions]) -> Using[P, R]:
        """Give this task with options for its next calls, whose arguments are as typed as before."""
        return Using(self, options)

    def enqueue_many(self, calls: Iterable[bulk.Arguments | Signature[R]]) -> list[Result[R]]:
        """
        Send many calls of this task together.

        Args:
            calls:
                A tuple of positional arguments, a mapping of named ones, or a
                signature, for each call.

        Raises:
            InvalidPayload: One does not fit; nothing was sent.

            EnqueueError: The broker failed; ``sent`` and ``uncertain`` say which calls it had taken.
        """
        return bulk.enqueue(self._kit, bulk.of_task(self, calls))

    def signature(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        *rest: Any,
        immutable: bool = False,
        **more: Any,
    ) -> Signature[R]:
        """
        Make a signature whose arguments are checked now.

        One that is not immutable may still get arguments, in front of those it has; what it has is checked.
        """
        if self.contract is not None:
            check = self.contract.dump if immutable else self.contract.dump_partial
            args, kwargs = check(args or (), kwargs or {})
        more.setdefault("app", self.app)
        make: Any = Signature
        return cast("Signature[R]", make(self, args, kwargs, options, *rest, immutable=immutable, **more))

    # Celery's other name for it, which would stay Celery's own `signature`.
    subtask = signature

    if TYPE_CHECKING:
        # With all its arguments, or with none yet: behind another task, in a chain.
        s: _Sign[P, R]

        def si(self, *args: P.args, **kwargs: P.kwargs) -> Signature[R]:
            """Make a signature that takes no more arguments, and so must have all."""

    def map(self, it: Iterable[Any]) -> Any:
        """Make a signature that runs this task on each item, one after the other, in one worker."""
        return super().map([self._item((item,))[0] for item in it])

    def starmap(self, it: Iterable[Sequence[Any]]) -> Any:
        """Make a signature that runs this task on each tuple of arguments, in one worker."""
        return super().starmap([self._item(item) for item in it])

    def chunks(self, it: Iterable[Sequence[Any]], n: int) -> Any:
        """Make signatures that run this task on *n* tuples of arguments each."""
        return super().chunks([self._item(item) for item in it], n)

    def _item(self, args: Sequence[Any]) -> Sequence[Any]:
        return args if self.contract is None else self.contract.dump(args, {})[0]

    def apply(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *positional: Any,
        **options: Any,
    ) -> EagerResult[R]:
        """Run a call in place, through the same checks and steps as in a worker."""
        options |= zip(("link", "link_error", "task_id", "retries", "throw"), positional, strict=False)
        if self.contract is not None:
            args, kwargs = self._checked(args, kwargs, options)
        return EagerResult.of(super().apply(cast("Any", args), cast("Any", kwargs), **options), self.contract)

    def AsyncResult(self, task_id: str, **kwargs: Any) -> Result[R]:  # noqa: N802  (Celery's name)
        """Give the typed result of the call with this id."""
        return Result(task_id, backend=self.backend, task_name=self.name, app=self.app, **kwargs)

    def _checked(self, args: Any, kwargs: Any, options: Mapping[str, Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        args, kwargs = args or (), kwargs or {}
        if not isinstance(args, list | tuple) or not isinstance(kwargs, Mapping):
            raise InvalidPayload(
                f"{self.name}: args must be a list or a tuple and kwargs a mapping, got {type(args).__name__} and "
                f"{type(kwargs).__name__}. The message was not sent.",
                str(self.name),
            )
        try:
            return self._refusing(args, kwargs, options)
        except (InvalidPayload, InvalidOptions) as error:
            # `typing=False` is Celery's way to say that callers are not checked.
            if self._speaks_for_finished(options) or (not self.typing and isinstance(error, InvalidPayload)):
                return args, kwargs
            raise

    def _refusing(self, args: Any, kwargs: Any, options: Mapping[str, Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        settings = self._kit.settings.kit
        self._contract.check_secrets()
        args, kwargs = self._contract.dump(args, kwargs)
        if (options.get("serializer") or self.serializer) == "json":
            check_body(self._contract, args, kwargs, limit=settings.max_payload_bytes)
        if "countdown" in options or "eta" in options:
            check_delay(str(self.name), options, now=self.app.now(), limit=settings.max_eta)
        return args, kwargs

    def _speaks_for_finished(self, options: Mapping[str, Any]) -> bool:
        """
        Tell whether this is sent for a task that has run: a chain's next, a link, a chord's body.

        An error here would make a failure of that task, so what it passes on is sent as it is, and refused in its own
        worker.
        """
        parent = self.app.current_worker_task
        if parent is None:
            # A worker's parent process sends for a task whose child is gone, and names it.
            return options.get("parent_id") is not None
        return str(parent.name).startswith("celery.") or hasattr(parent.request, _FINISHED)

    # In

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """
        Run the task: as a plain function, or, from a worker, within its steps.

        A task that is called as a function inside a run of its own sees that
        run's request; only the first call in a request is the worker's.
        """
        request = self.request
        if request.called_directly or hasattr(request, _ENTERED):
            return cast("R", self._called_as_function(args, kwargs))
        if self.contract is None:
            return self.run(*args, **kwargs)
        setattr(request, _ENTERED, True)
        try:
            return cast("R", self._pipeline(self._call(request, args, kwargs)))
        finally:
            setattr(request, _FINISHED, True)

    def _called_as_function(self, args: Any, kwargs: Any) -> Any:
        caller = self.app.current_task
        if self.contract is None or caller is None or caller.name not in _MAPPERS:
            plain: Callable[..., Any] = self._coroutine_function or super().__call__
            return plain(*args, **kwargs)
        # `map` and `starmap` hand over the items of their own message.
        args, kwargs = self.contract.load(args, kwargs)
        return self.contract.dump_result(super().__call__(*args, **kwargs))

    def _call(self, request: Any, args: Any, kwargs: Any) -> Call:
        return Call(
            task=str(self.name),
            id=request.id,
            attempt=(request.retries or 0) + 1,
            headers=Headers.of(request.headers),
            contract=self._contract,
            args=tuple(args),
            kwargs=kwargs,
        )

    @cached_property
    def _pipeline(self) -> Next:
        return compose((*self._kit.call_steps, *STEPS), self._run)

    def _run(self, call: Call) -> Any:
        run: Callable[..., Any] = partial(self.run, *call.args, **call.kwargs)
        if self._coroutine_function is not None and loops.is_running():
            return loops.in_thread(partial(self._run_with, self.request, run))
        return run()

    def _run_with(self, request: Any, run: Callable[[], Any]) -> Any:
        # Celery keeps the running request by thread.
        self.request_stack.push(request)
        try:
            return run()
        finally:
            self.request_stack.pop()

    @property
    def _contract(self) -> Contract:
        return cast("Contract", self.contract)

    @property
    def _kit(self) -> CeleryKit:
        return cast("CeleryKit", self.app)


def _family(parent: Any) -> dict[str, Any]:
    # Celery knows the running task by its thread, and `adelay` publishes on another one.
    if parent is None:
        return {}
    request = parent.request
    family = {"parent_id": request.id, "root_id": request.root_id or request.id}
    if parent.app.conf.task_inherit_parent_priority:
        family["priority"] = (request.delivery_info or {}).get("priority")
    return family


class AsyncTask(Task[P, R]):
    """
    What type checkers see of an ``async def`` task.

    Sent, it is a task like any other; called, it is the coroutine function.
    """

    if TYPE_CHECKING:

        def __call__(  # type: ignore[override]
            self, *args: P.args, **kwargs: P.kwargs
        ) -> Coroutine[Any, Any, R]:
            """Give the function's coroutine."""
