"""
The task: where calls leave a program, and where they come in again.

Out go `apply_async` and `signature`, which check arguments and write them as
JSON; in comes `__call__`, which puts the steps around the function.
"""

from __future__ import annotations

import asyncio
import inspect
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, ParamSpec, Protocol, TypeVar, Unpack, cast, overload

import celery
import celery.result
from celery import states
from celery.exceptions import Ignore, Reject, TaskRevokedError, WorkerShutdown, WorkerTerminate
from celery.exceptions import Retry as StockRetry

from celerykit import again, bulk, claiming, loops, redact, running, schedules, sentry
from celerykit.call import Call, Later, Next, Step, Stopped, compose, validated
from celerykit.canvas import Signature
from celerykit.contract import Contract
from celerykit.errors import DuplicateCall, InvalidOptions, InvalidPayload, KeyConflict, ResultMismatch, TaskInterrupted
from celerykit.headers import HEADER, Headers
from celerykit.idempotency import Claims, Identity, Once, Skipped, once
from celerykit.idempotency.keys import check_marks
from celerykit.limits import Limits, Rule, limited
from celerykit.looks import STOCK, Look, can_be_told, told
from celerykit.marks import RESULT
from celerykit.publishing import check_body, check_delay
from celerykit.result import EagerResult, Result
from celerykit.retry import DROPPED, Retry, Snooze, retried
from celerykit.rollout import pause_for_newer
from celerykit.scrubbing import scrub_error
from celerykit.stores import Store
from celerykit.using import SendOptions, Using

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from celerykit.app import CeleryKit

__all__ = ["FINISHED", "HANDED_BACK", "STEPS", "AsyncTask", "Task"]

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

#: Outermost first. A user's steps come before these: they may refuse a call that was not read yet. What a key has led
#: to is kept and given as JSON, so `once` stands outside of `validated`; and it sees final outcomes only, so `retried`
#: stands inside of it. What is not valid is not retried, so it does not come as far as the retries; nor does what
#: is put off by a limit, which is counted by typed arguments.
STEPS: tuple[Step, ...] = (once, validated, limited, retried)

#: Why a message goes back that a newer deploy may understand; beside it stands for how long it is held before.
HANDED_BACK = "celerykit: its contract is not this worker's"

#: A pool's process is told to end by a `SystemExit` with such a code (billiard.common._shutdown_cleanup).
_ENDED_BY_SIGNAL = range(-256, -191)

#: Celery's tasks that call another task's function with items of their own message.
_MAPPERS = ("celery.map", "celery.starmap")

#: The options that Celery takes by position too, in its order.
_POSITIONAL = ("task_id", "producer", "link", "link_error", "shadow")

# Marks on the request of a running task, beside the one in `again`; each run has a request of its own.
_RAN, FINISHED, _REPLACED = "celerykit_ran", "celerykit_finished", "celerykit_replaced"

#: Of ids that are derived from another call's.
_DERIVED = uuid.UUID("0d4be1b1-7d5c-5d3c-9f3c-6f0f6c2d7b61")


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

        retry_policy:
            What follows on which error; ``None`` to fail at once. Set with
            ``@app.task(retry=Retry(...))``.

        on_crash:
            What becomes of a message whose process died: ``rerun`` starts it
            again, so its effects may be repeated; ``bury`` never starts
            anything twice, and leaves it to a person.

        once_policy:
            That calls with one key take effect once; ``None`` for calls
            without keys. Set with ``@app.task(once=Once(...))``.

        remember:
            Whether a call that has succeeded never runs again, however often
            its message is delivered. It always is with `once_policy`.

        on_store_down:
            What becomes of a call while the store does not answer: ``run``
            runs it, though it may be a duplicate; ``retry`` puts it off;
            ``fail`` refuses it.

        limit_rules:
            How often it starts, and how many of it run at once, in all
            workers. Set with ``@app.task(limits=(Rate(...), ...))``.

        schedule:
            When beat sends it by itself, without arguments. A class that
            inherits from the task is another task, without it.
    """

    abstract = True
    contract: Contract | None = None
    strict: bool = False
    retry_policy: Retry | None = None
    on_crash: Literal["rerun", "bury"] = "rerun"
    once_policy: Once | None = None
    remember: bool = False
    on_store_down: Literal["run", "retry", "fail"] = "retry"
    limit_rules: Sequence[Rule] = ()
    schedule: schedules.When | None = None
    Request = "celerykit.worker.request:Request"

    #: The function of an `async def` task, whose `run` waits for it.
    _coroutine_function: Callable[..., Any] | None = None

    #: What the task, or a class it inherits from, was told; Celery fills in `ignore_result` for those that were not.
    _told_ignore_result: bool | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(vars(cls).get("retry"), Retry):
            raise InvalidOptions(f"{cls.__name__}: retry is a method of every task; call the policy retry_policy.")
        if isinstance(vars(cls).get("once"), Once):
            raise InvalidOptions(f"{cls.__name__}: on a class, the option once is called once_policy.")
        if isinstance(vars(cls).get("limits"), Sequence):
            raise InvalidOptions(f"{cls.__name__}: on a class, the option limits is called limit_rules.")
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
            cls._declare(app)
        return super().bind(app)

    @classmethod
    def _was_told(cls, *options: str) -> bool:
        """Tell whether the task, or a class of the user's that it inherits from, has one of these."""
        own = cls.__mro__[: cls.__mro__.index(Task)]
        return any(option in vars(one) for one in own for option in options)

    @classmethod
    def _declare(cls, app: Any) -> None:
        if "contract" not in vars(cls):  # a class it inherits from has its own
            run = inspect.getattr_static(cls, "run")
            is_bound = not isinstance(run, staticmethod)
            function = run if is_bound else run.__func__
            cls.contract = Contract(str(cls.name), function, drop_first=is_bound, strict=cls.strict)
        # A shared task's contract has been made without an app.
        cls.contract = cast("Contract", cls.contract).with_cipher(lambda: app.cipher)
        check_marks(cls.contract)
        if "__header__" in vars(cls):
            cast("Any", cls).__header__ = staticmethod(_unchecked(vars(cls)["__header__"]))
        if not cls._was_told("retry_policy", "max_retries", "autoretry_for"):
            cls.retry_policy = app.retry_policy
        if cls.retry_policy is not None:
            # Attempts are counted in our header; Celery would count what was only put off, too.
            cls.max_retries = None
        if cls.on_crash == "bury":
            cls.acks_late, cls.reject_on_worker_lost = True, False
            cast("Any", cls).retry_on_worker_lost = False
        cls.ignore_result = cast("Any", cls._told_ignore_result)
        if cls._told_ignore_result is None and cls.contract.returns_nothing:
            cls.ignore_result = True
            cls.store_errors_even_if_ignored = True
        if cls._coroutine_function is not None:
            loops.refuse_green_threads(str(cls.name))
        schedules.declare_task(app, cls)

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

        Takes all of Celery's options, and ``key``, the idempotency key of
        this call in place of its task's. A duplicate is not sent: what is
        returned is the first one's result, as ``duplicate`` says.

        Raises:
            InvalidPayload: The arguments do not fit; nothing was sent.

            DuplicateCall: Another call has the key, and the task is declared to refuse that; or, `KeyConflict`, it
                has other arguments.

            InvalidOptions: The options do not make sense; nothing was sent.

            EnqueueError: The broker did not take the message in time.
        """
        options |= zip(_POSITIONAL, positional, strict=False)
        if self.contract is None:
            claiming.refuse_key(str(self.name), options)
            return cast("Result[R]", super().apply_async(cast("Any", args), cast("Any", kwargs), **options))
        return self.send_prepared(*self.prepare(args, kwargs, options))

    def prepare(
        self, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None, options: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any], dict[str, Any]]:
        """Check a call, and give what is to be sent: arguments as JSON values, and options with our header."""
        args, kwargs = self._checked(args, kwargs, options)
        options = dict(options)
        header, key = self._header(options), options.pop("key", None)
        if header.key is None and (identity := self._identity(args, kwargs, key, options)):
            replaced = self._replaced(options)
            call = replaced.call if replaced is not None and replaced.key == identity.key else identity.call
            header = replace(header, key=identity.key, call=call or None)
        options["headers"] = header.added_to(options.get("headers"))
        if options.get("chord") is not None:
            # Backends without a join of their own look for the members' results; without them a chord never ends.
            options["ignore_result"] = False
        return args, kwargs, options

    def _header(self, options: Mapping[str, Any]) -> Headers:
        headers, now = options.get("headers"), time.time()
        replaced = self._replaced(options)
        turn = 0 if replaced is None else replaced.turn + 1
        contract = self._contract.fingerprint
        if headers and HEADER in headers and options.get("task_id"):  # a retry, which goes on from what was
            header = Headers.of(headers)
            return replace(header, contract=contract, sent_at=header.sent_at or now)
        return Headers(contract=contract, sent_at=now, due_at=_due_at(options, now), turn=turn)

    def _replaced(self, options: Mapping[str, Any]) -> Headers | None:
        """Give the header of the running call, if this goes on with its id in its place: the key may be the same."""
        request: Any = getattr(self.app.current_worker_task, "request", None)
        if not hasattr(request, _REPLACED) or options.get("task_id") != request.id:
            return None
        return Headers.of(request.headers)

    def _identity(self, args: Any, kwargs: Any, key: Any, options: Mapping[str, Any]) -> Identity | None:
        try:
            return claiming.identity_of(self, args, kwargs, key=key)
        except Exception:  # (a key is made by a user's function)
            if self._speaks_for_finished(options):
                return None  # its worker says so
            raise

    def send_prepared(self, args: Sequence[Any], kwargs: Mapping[str, Any], options: dict[str, Any]) -> Result[R]:
        """Send what `prepare` gave, unless it is a duplicate."""
        if not claiming.is_claimed_when_sent(self, options):
            return self.publish_prepared(args, kwargs, options)
        return claiming.send(self, options, partial(self.publish_prepared, args, kwargs))

    def publish_prepared(self, args: Sequence[Any], kwargs: Mapping[str, Any], options: dict[str, Any]) -> Result[R]:
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
        if self.contract is None:
            return EagerResult.of(super().apply(cast("Any", args), cast("Any", kwargs), **options), None)
        args, kwargs = self._checked(args, kwargs, options)
        header, key = Headers.of(options.get("headers")), options.pop("key", None)
        if header.key is None and (identity := self._identity(args, kwargs, key, options)):
            header = replace(header, key=identity.key, call=identity.call or None)
            options["headers"] = header.added_to(options.get("headers"))
        is_duplicate = claiming.is_eager_duplicate(self, header)
        ran = super().apply(cast("Any", args), cast("Any", kwargs), **options)
        if is_duplicate and str(ran.state) == states.IGNORED:
            skipped: Any = TaskRevokedError("its key is another call's")
            ran = celery.result.EagerResult(ran.id, skipped, states.REVOKED)
        result = EagerResult.of(ran, self.contract)
        result.duplicate = is_duplicate
        return result

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
            # A validator of the user's may have quoted what it was given.
            scrub_error(error, redact.Secrets(self.look.secrets(args, kwargs)))
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
        return str(parent.name).startswith("celery.") or hasattr(parent.request, FINISHED)

    # Again

    def retry(self, *args: Any, **options: Any) -> Any:
        """
        Send the running call again, as Celery's ``retry`` does.

        It counts as an attempt of the task's policy, if there is one and no
        ``max_retries`` is given. When it cannot be sent, the message goes back
        to its queue; Celery would drop it.
        """
        request = self.request
        stock_retry: Any = super().retry
        if self.contract is None or request.called_directly:
            return stock_retry(*args, **options)
        policy, header = self.retry_policy, Headers.of(request.headers)
        given = options.get("headers")
        if policy is not None and options.get("max_retries") is None and header.attempt >= policy.attempts:
            options["max_retries"] = request.retries
        error = options.get("exc") or (args[2] if len(args) > 2 else None)
        following = again.headers_of_next(request, header, header.attempt + 1, outcome="retry", error=error)
        # What is given may be the headers of this very message, with one more.
        options["headers"] = following if given is None else {**given, HEADER: following[HEADER]}
        if header.queue is not None:
            # A delayed message of RabbitMQ says where its delay ended, and not where it belongs.
            options.setdefault("queue", header.queue)
        others = {**dict(zip(("args", "kwargs"), args, strict=False)), **options}
        options = {**again.descriptions(request, args=others.get("args"), kwargs=others.get("kwargs")), **options}
        try:
            return stock_retry(*args, **options)
        except Reject as error:
            raise again.not_sent(cast("Any", error).reason) from error

    def replace(self, sig: Any) -> Any:
        """Go on with another task in place of this one, under the same id, as Celery's ``replace`` does."""
        setattr(self.request, _REPLACED, True)
        return super().replace(sig)

    def send_event(self, type_: str, retry: bool = True, retry_policy: Any = None, **fields: Any) -> Any:
        """Send an event of the task's own, as Celery's ``send_event`` does; without the secrets of the running call."""
        told = redact.clean(fields) if redact.is_active() else fields
        return super().send_event(type_, retry=retry, retry_policy=retry_policy, **told)

    # In

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """
        Run the task: as a plain function, or, from a worker, within its steps.

        A task that is called as a function inside a run of its own sees that
        run's request; only the first call in a request is the worker's.
        """
        request = self.request
        if request.called_directly or hasattr(request, again.ENTERED):
            return cast("R", self._called_as_function(args, kwargs))
        if self.contract is None:
            return self.run(*args, **kwargs)
        setattr(request, again.ENTERED, time.time())
        call = self._call(request, args, kwargs)
        try:
            self._learn(request, self.look.secrets(args, kwargs))
            return cast("R", self._entered(request, call))
        except Exception as error:
            bound: redact.Bound | None = getattr(request, running.SECRETS, None)
            scrubbed = error if bound is None else self._scrubbed(error, bound.secrets)
            if scrubbed is error:
                raise
        raise scrubbed

    def _scrubbed(self, error: Exception, secrets: redact.Secrets) -> BaseException:
        # Pickled results are stored with all that an error has; others have its arguments, and texts.
        return scrub_error(error, secrets, is_stored_whole=getattr(self.backend, "serializer", None) == "pickle")

    def _learn(self, request: Any, secrets: Iterable[str]) -> None:
        """Keep secrets of a call out of what is told until its run is over: Celery and others go on after its end."""
        bound: redact.Bound | None = getattr(request, running.SECRETS, None)
        if bound is not None:
            bound.secrets.add(secrets)
        elif (bound := redact.bind(secrets)) is not None:
            setattr(request, running.SECRETS, bound)
            sentry.cover(bound.secrets)

    def _entered(self, request: Any, call: Call) -> Any:
        try:
            result = self._pipeline(call)
            if self.claims is not None and request.callbacks and not request.is_eager:
                _name_callbacks(request)
            if self.look.may_return_secrets:
                self._learn(request, self.look.secrets_of_result(result))
            return result if request.is_eager or not self._tells_result else told(result, self.look)
        except Stopped as stopped:
            if isinstance(stopped.by, StockRetry):
                again.note_again(_headers_in(stopped.by), kind="retry", delay=stopped.delay, error=stopped.by.exc)
            raise stopped.by from None
        except Skipped as skipped:
            self._revoke(request, skipped.why)
        except Later as later:
            again.send(self, request, call.headers, later)
        except Snooze as snooze:  # raised by a step of the user's, which stands outside of ours
            put_off = Later(snooze.delay, attempt=call.attempt, kind="snooze", error=snooze)
            again.send(self, request, call.headers, put_off)
        except InvalidPayload as error:
            if not hasattr(request, _RAN):
                self._hand_back_to_newer(call)
            again.note_failed(error)
            raise
        except (SystemExit, KeyboardInterrupt, MemoryError) as interruption:  # of a step
            if _is_told_to_end(interruption):
                raise
            raise TaskInterrupted(f"{self.name}: a step raised {interruption!r}") from interruption
        except Exception as error:
            if isinstance(error, DuplicateCall) and not isinstance(error, KeyConflict) and not hasattr(request, _RAN):
                # What it was to do is done, or has a letter of its own.
                vars(error)[DROPPED] = True
            if isinstance(error, ResultMismatch):
                scrub_error(error, redact.Secrets(self.look.secrets_of_result(error.value)))
            again.note_failed(error)
            if DROPPED in vars(error):
                again.raise_dropped(error)
            raise
        finally:
            setattr(request, FINISHED, True)

    @cached_property
    def _tells_result(self) -> bool:
        return can_be_told(self.backend)

    def _revoke(self, request: Any, why: str | None) -> NoReturn:
        """End a call that does nothing; tell who waits for it, if *why* is given."""
        if why and not request.is_eager:
            stores = not request.ignore_result or self.store_errors_even_if_ignored
            self.backend.mark_as_revoked(request.id, why, request=request, store_result=stores)
        raise Ignore(cast("Any", why)) from None

    def _hand_back_to_newer(self, call: Call) -> None:
        """Hand a payload back that does not fit here, but may fit a newer deploy, while that is coming up."""
        if call.headers.contract in (None, self._contract.fingerprint) or self.request.is_eager:
            return
        if not self.acks_late or self._kit.settings.kit.profile == "stock":
            # It was acknowledged when it started; or, by a consumer that is not ours, it would be back at once.
            return
        grace = self._kit.settings.kit.unknown_task_grace
        pause = pause_for_newer(self._kit.store, call.id, grace=grace)
        if pause is not None:
            raise Reject(cast("Any", (HANDED_BACK, pause)), requeue=True) from None

    def _called_as_function(self, args: Any, kwargs: Any) -> Any:
        caller = self.app.current_task
        if self.contract is None or caller is None or caller.name not in _MAPPERS:
            plain: Callable[..., Any] = self._coroutine_function or super().__call__
            return plain(*args, **kwargs)
        # `map` and `starmap` hand over the items of their own message.
        bound = redact.bind(self.look.secrets(args, kwargs))
        try:
            args, kwargs = self.contract.load(args, kwargs)
            return self.contract.dump_result(super().__call__(*args, **kwargs))
        except Exception as error:
            scrubbed = error if bound is None else self._scrubbed(error, bound.secrets)
            if scrubbed is error:
                raise
        finally:
            redact.unbind(bound)
        raise scrubbed

    def _call(self, request: Any, args: Any, kwargs: Any) -> Call:
        headers = running.header_of(request)
        return Call(
            task=str(self.name),
            id=request.id,
            attempt=headers.attempt,
            headers=headers,
            contract=self._contract,
            args=tuple(args),
            kwargs=kwargs,
            policies={
                "retry": self.retry_policy,
                "on_crash": self.on_crash,
                "once": self.eager_claims if request.is_eager else self.claims,
                "on_store_down": self.on_store_down,
                "limits": self.eager_limits if request.is_eager else self.limits,
            },
            token=getattr(request, again.TOKEN, "") or "",
            in_chord=bool(request.chord),
        )

    @cached_property
    def look(self) -> Look:
        """How this task's calls are written for people."""
        return STOCK if self.contract is None else Look(self.contract)

    @cached_property
    def claims(self) -> Claims | None:
        """What claims the keys of this task's calls."""
        return claiming.claims_of(self)

    @cached_property
    def limits(self) -> Limits | None:
        """What keeps this task's calls within their limits."""
        return self._limits(lambda: self._kit.store)

    @cached_property
    def eager_limits(self) -> Limits | None:
        """The same for calls that run in place."""
        return self._limits(lambda: self._kit.eager_store)

    def _limits(self, store: Callable[[], Store]) -> Limits | None:
        if not self.limit_rules:
            return None
        lease, renewal = self._kit.settings.kit.lease.total_seconds, self._kit.renewal
        return Limits(self._contract, self.limit_rules, store=store, lease=lease, renewal=renewal)

    @cached_property
    def eager_claims(self) -> Claims | None:
        """The same for calls that run in place, whose keys are this process's."""
        return claiming.claims_of(self, eagerly=True)

    @cached_property
    def _pipeline(self) -> Next:
        # What the task has no use for is left out once, and not passed through by each call.
        idle: dict[Step, bool] = {once: self.claims is None, limited: not self.limit_rules}
        steps = (step for step in STEPS if not idle.get(step))
        return compose((*self._kit.call_steps, *steps), self._run)

    def _run(self, call: Call) -> Any:
        run: Callable[..., Any] = partial(self.run, *call.args, **call.kwargs)
        setattr(self.request, _RAN, True)
        if self._contract.has_secrets:  # which are encrypted in the message
            values = self._contract.secret_values(call.args, call.kwargs)
            self._learn(self.request, redact.secrets_in(values, (RESULT,), name=RESULT))
        try:
            if self._coroutine_function is not None and loops.is_running():
                return loops.in_thread(partial(self._run_with, self.request, run))
            return run()
        except (StockRetry, Ignore, Reject) as control:
            raise self._stopped(control) from None
        except (SystemExit, KeyboardInterrupt, MemoryError) as interruption:
            if _is_told_to_end(interruption):
                raise
            raise TaskInterrupted(f"{self.name} raised {interruption!r}") from interruption

    def _stopped(self, control: Any) -> Stopped:
        if isinstance(control, StockRetry):
            return Stopped(control, how="retried", delay=float(_countdown(control)))
        if isinstance(control, Reject):
            return Stopped(control, how="handed back" if cast("Any", control).requeue else "rejected")
        return Stopped(control, how="replaced" if hasattr(self.request, _REPLACED) else "ignored")

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


def _name_callbacks(request: Any) -> None:
    """
    Derive the ids of what follows on a remembered call from its own.

    When it is delivered again they are sent again, and are known for the same. A chain or a group gets other ids.
    """
    for place, sig in enumerate(request.callbacks):
        if not sig.get("subtask_type"):
            sig["options"].setdefault("task_id", str(uuid.uuid5(_DERIVED, f"{request.id} {sig['task']} {place}")))


def _countdown(retry: StockRetry) -> float:
    when: Any = retry.when
    if isinstance(when, datetime):
        when = (when - datetime.now(when.tzinfo)).total_seconds()
    return max(0.0, when or 0.0)


def _headers_in(retry: StockRetry) -> Mapping[str, Any]:
    options: Mapping[str, Any] = getattr(cast("Any", retry).sig, "options", None) or {}
    return options.get("headers") or {}


def _due_at(options: Mapping[str, Any], now: float) -> float | None:
    countdown, eta = options.get("countdown"), options.get("eta")
    if countdown:
        return float(now + countdown)
    # Without a timezone it is the app's, which only Celery knows; the worker reads it from the message.
    return eta.timestamp() if isinstance(eta, datetime) and eta.tzinfo else None


def _unchecked(header: Any) -> Callable[..., None]:
    """
    Make what Celery calls to look at arguments look no more: the contract does.

    Celery would refuse what is sent for a finished task. It also reads from its signature what an errback takes.
    """

    def check(*args: Any, **kwargs: Any) -> None: ...

    check.__signature__ = inspect.signature(header)  # type: ignore[attr-defined]
    return check


def _is_told_to_end(interruption: BaseException) -> bool:
    """Tell whether it is the worker that ends, or this process of its pool, and not only the task."""
    if isinstance(interruption, WorkerShutdown | WorkerTerminate):
        return True
    return isinstance(interruption, SystemExit) and interruption.code in _ENDED_BY_SIGNAL


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
