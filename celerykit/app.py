"""
The app: a real ``celery.Celery`` that reads its settings and makes typed tasks.
"""

from __future__ import annotations

import asyncio
import contextvars
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    Protocol,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    overload,
)

import celery
from celery.app.backends import BACKEND_ALIASES
from celery.fixups.django import DjangoFixup
from celery.loaders.app import AppLoader
from celery.schedules import BaseSchedule
from kombu.transport import TRANSPORT_ALIASES

from celerykit import bulk, claiming, running, schedules, traces
from celerykit.amqp import due_soon
from celerykit.annotations import UnresolvedAnnotation
from celerykit.call import Step
from celerykit.canvas import Signature
from celerykit.ciphers import Cipher, cipher_of
from celerykit.context import Context
from celerykit.context import check_class as check_context
from celerykit.contract import Contract
from celerykit.deadline import within
from celerykit.errors import InvalidOptions
from celerykit.idempotency import Once
from celerykit.idempotency.keys import check_marks
from celerykit.limits import Rule, check_limits
from celerykit.options import by_new_name, command_options, config_name, option_table
from celerykit.publishing import UnreachableBroker, sending, transport_options
from celerykit.renewal import Renewal
from celerykit.result import GroupResult, Result, ResultSet
from celerykit.retry import Retry
from celerykit.settings import load, settle
from celerykit.stores import Store, default_url, open_store
from celerykit.task import AsyncTask, Task
from celerykit.using import SendOptions

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from celerykit.keys import Keyring
    from celerykit.letters import DeadLetters
    from celerykit.settings import Settings

__all__ = ["CeleryKit", "Loader", "TaskOptions", "shared_task"]

P = ParamSpec("P")
R = TypeVar("R")

#: How long the store may take for an answer, in seconds: a worker's parent process asks it, too.
_STORE_TIMEOUT = 2.0

#: Threads that `Task.adelay` publishes on; as many as Celery's pool has connections to the broker.
_PUBLISHERS = 10

#: What a thread gets beyond its deadline, in seconds, to say itself how far it came.
_GRACE = 0.25


class TaskOptions(TypedDict, total=False):
    """The options a task can be declared with."""

    name: str
    base: type[celery.Task[Any, Any]]
    strict: bool
    retry: Retry | None
    on_crash: Literal["rerun", "bury"]
    once: Once | None
    remember: bool
    on_store_down: Literal["run", "retry", "fail"]
    limits: Sequence[Rule]
    schedule: schedules.When | None
    shared: bool
    lazy: bool
    filter: Callable[[Any], Any]
    queue: str
    exchange: str
    routing_key: str
    priority: int
    expires: float
    serializer: str
    compression: str
    ignore_result: bool
    store_errors_even_if_ignored: bool
    track_started: bool
    trail: bool
    send_events: bool
    acks_late: bool
    acks_on_failure: bool
    acks_on_timeout: bool
    acks_on_failure_or_timeout: bool
    reject_on_worker_lost: bool
    retry_on_worker_lost: bool
    time_limit: float
    soft_time_limit: float
    rate_limit: str
    throws: tuple[type[BaseException], ...]
    typing: bool
    max_retries: int | None
    default_retry_delay: float
    autoretry_for: tuple[type[BaseException], ...]
    dont_autoretry_for: tuple[type[BaseException], ...]
    retry_kwargs: Mapping[str, Any]
    retry_backoff: bool | int
    retry_backoff_max: int
    retry_jitter: bool
    resultrepr_maxsize: int
    Strategy: str
    Request: Any
    backend: Any
    pydantic: bool
    pydantic_strict: bool
    pydantic_context: Mapping[str, Any]
    pydantic_dump_kwargs: Mapping[str, Any]


class Loader(AppLoader):
    """Celery's loader, with result backends that do not slow publishing down."""

    override_backends = {  # noqa: RUF012  (Celery's own attribute)
        "redis": "celerykit.backends:RedisBackend",
        "rediss": "celerykit.backends:RedisBackend",
        "sentinel": "celerykit.backends:SentinelBackend",
        "valkey": "celerykit.backends:RedisBackend",
        "valkeys": "celerykit.backends:RedisBackend",
    }


class _Bind(Protocol):
    """Declares a function whose first parameter is its task."""

    @overload
    def __call__(self, fun: Callable[Concatenate[Task[..., Any], P], Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, fun: Callable[Concatenate[Task[..., Any], P], R], /) -> Task[P, R]: ...


class _Plain(Protocol):
    """Declares a function."""

    @overload
    def __call__(self, fun: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, fun: Callable[P, R], /) -> Task[P, R]: ...


class _Declare(Protocol):
    """The decorator that makes tasks, with and without options."""

    @overload
    def __call__(self, fun: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, fun: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def __call__(self, *, bind: Literal[True], **options: Unpack[TaskOptions]) -> _Bind: ...
    @overload
    def __call__(self, *, bind: Literal[False] = ..., **options: Unpack[TaskOptions]) -> _Plain: ...


class CeleryKit(celery.Celery):
    """
    A Celery app whose tasks are typed and whose settings are checked.

    Takes what ``celery.Celery`` takes. Nothing is read when it is made: the
    environment is, once, when the configuration is first needed.

    Args:
        steps:
            What else happens around each task: functions
            ``step(call_next, call)``, the first one outermost.

        retry:
            The policy of tasks that say nothing about retries themselves.

        context:
            The class of what calls take along.
    """

    task_cls = cast("Any", Task)
    loader_cls = "celerykit.app:Loader"
    amqp_cls = cast("Any", "celerykit.amqp:AMQP")
    log_cls = cast("Any", "celerykit.logs:Logging")

    def __init__(
        self,
        main: str | None = None,
        *args: Any,
        steps: Sequence[Step] = (),
        retry: Retry | None = None,
        context: type[Context] = Context,
        **kwargs: Any,
    ) -> None:
        check_context(context)
        self.context_class = context
        # `steps` is Celery's name for what is added to a worker.
        self.call_steps = tuple(steps)
        self.retry_policy = retry
        self._settings: Settings | None = None
        self._store: Store | None = None
        #: What is sent by itself, by name; in `beat_schedule` once the app is finalized.
        self.schedules: dict[str, schedules.Entry] = {}
        self._publishers: dict[int, ThreadPoolExecutor] = {}
        running.connect()
        traces.connect()
        super().__init__(main, *args, **kwargs)
        self.steps["worker"].add("celerykit.worker.metrics_step:MetricsStep")
        if self.task_cls is Task and any(isinstance(fixup, DjangoFixup) for fixup in cast("Any", self)._fixups):
            # Celery gives Django's methods to the tasks of apps that have no task class of their own.
            self.task_cls = "celerykit.contrib.django:DjangoTask"

    def __reduce_keys__(self) -> dict[str, Any]:
        return {
            **super().__reduce_keys__(),
            "steps": self.call_steps,
            "retry": self.retry_policy,
            "context": self.context_class,
        }

    # Settings

    @property
    def settings(self) -> Settings:
        """What was read from the environment, and where each value came from."""
        if self._settings is None:
            self.conf.finalize()
        return cast("Settings", self._settings)

    def prepare_config(self, c: Any) -> Any:
        """Put the environment over the configuration object, and our defaults under it."""
        stock = cast("Any", self)
        config = by_new_name(c, namespace=stock.namespace)
        # What the constructor and `app.conf` were given before anything was read.
        code = {name: value for name, value in stock._preconf.items() if name != "deprecated_settings"}
        self._settings = load(
            option_table(),
            code=code,
            config=config,
            config_source=config_name(stock._config_source),
            transports=TRANSPORT_ALIASES,
            backends=BACKEND_ALIASES,
            command_options=command_options,
        )
        # Celery lays these over what it gets from here; laid over as they were read, "False" is false.
        stock._preconf.update({name: self._settings.celery[name] for name in code if name in self._settings.celery})
        return super().prepare_config(cast("Any", dict(self._settings.celery)))

    # State

    @cached_property
    def dead_letters(self) -> DeadLetters:
        """What no worker could finish: to find, repair and replay."""
        from celerykit.letters import DeadLetters

        return DeadLetters(self)

    @cached_property
    def keys(self) -> Keyring:
        """Which call holds which key: to look at, and to let go."""
        from celerykit.keys import Keyring

        return Keyring(self)

    @property
    def store(self) -> Store:
        """Where counts and marks are kept: ``CELERYKIT_STORE_URL``, or the broker or result backend if it can."""
        if self._store is None:
            url, of = self._store_url()
            # Where several apps share a server, they tell their keys apart by this.
            prefix = (self.conf.broker_transport_options or {}).get("global_keyprefix") or ""
            self._store = open_store(url, timeout=_STORE_TIMEOUT, prefix=f"{prefix}celerykit:", **of)
        return self._store

    def _store_url(self) -> tuple[str, dict[str, Any]]:
        conf, told = self.conf, self.settings.kit.store_url
        broker, backend = str(conf.broker_write_url or ""), str(conf.result_backend or "")
        url = told.get_secret_value() if told else default_url(broker, backend)
        is_backends = url in backend and url not in broker
        tls = conf.redis_backend_use_ssl if is_backends else conf.broker_use_ssl
        options = conf.result_backend_transport_options if is_backends else conf.broker_transport_options
        return url, {"tls": tls if isinstance(tls, Mapping) else None, "options": options}

    @property
    def cipher(self) -> Cipher | None:
        """What encrypts secrets on their way: with ``CELERYKIT_SECRET_KEYS``, or nothing."""
        return cipher_of(self.settings.kit.secret_keys)

    @cached_property
    def eager_store(self) -> Store:
        """Where calls that run in place keep what others keep in `store`: in this process."""
        return open_store("memory://", timeout=_STORE_TIMEOUT)

    @cached_property
    def renewal(self) -> Renewal:
        """The one timer of this process that keeps leases."""
        return Renewal(lambda: self.settings.kit.lease.total_seconds())

    # Tasks

    if TYPE_CHECKING:
        task: _Declare  # type: ignore[assignment]
    else:

        def task(self, *args: Any, **options: Any) -> Any:
            """
            Make a task of a function.

            Takes Celery's options; ``strict=True`` for arguments that must be of
            their types without conversion; ``retry=Retry(...)`` for what follows
            on which error; ``on_crash="bury"`` for what must never start twice;
            and ``schedule=`` for what beat sends by itself, without arguments:
            a ``timedelta``, seconds, cron text or a schedule of Celery's.

            Raises:
                InvalidContract: The function's signature cannot be a contract.

                InvalidOptions: An option is misspelt, or would hide a method.
            """
            return _declaring(super().task, args, options, _namespace_of_caller(), self)

    def finalize(self, auto: bool = False) -> None:
        """Evaluate what is pending, as Celery does, and put the declared schedules into ``beat_schedule``."""
        was_finalized = cast("Any", self).finalized
        super().finalize(auto=auto)
        if not was_finalized:
            # Not at Celery's signal, which logs the errors of its receivers.
            schedules.install(self)

    def schedule(
        self,
        sig: Signature[Any],
        *,
        every: schedules.Every | BaseSchedule | None = None,
        cron: str | BaseSchedule | None = None,
        name: str | None = None,
        missed: schedules.Missed = "once",
        **options: Unpack[SendOptions],
    ) -> str:
        """
        Let beat send a call again and again.

        Args:
            sig:
                ``task.s(...)`` with all its arguments, which are checked now.

            every:
                Seconds, or a ``timedelta``.

            cron:
                Five fields, ``"*/5 8-18 * * mon-fri"``, in the app's time zone.

            name:
                That of the task unless given; one task may have several schedules.

            missed:
                What follows on runs for which no beat was there: ``once``, one
                run, or ``skip``, none.

            **options:
                As for ``apply_async``.

        Returns:
            The name.

        Raises:
            InvalidPayload: The arguments do not fit.

            InvalidOptions: The schedule cannot be read, or the name is taken.
        """
        return schedules.declare(self, sig, every=every, cron=cron, name=name, missed=missed, options=options)

    def enqueue_many(self, calls: Iterable[Signature[Any]]) -> list[Result[Any]]:
        """
        Send many calls together: the signatures of any typed tasks.

        Raises:
            InvalidPayload: One does not fit; nothing was sent.

            EnqueueError: The broker failed; ``sent`` and ``uncertain`` say which calls it had taken.
        """
        return bulk.enqueue(self, bulk.of_signatures(calls))

    def send_task(self, name: str, args: Any = None, kwargs: Any = None, *positional: Any, **options: Any) -> Any:
        """
        Send a call by the task's name.

        A task that this app knows is checked, and its result typed, as if it
        had been called itself; any other is sent as it is.

        Raises:
            InvalidPayload: The arguments do not fit a task that is known here.

            EnqueueError: The broker did not take the message in time.
        """
        options |= zip(("countdown", "eta", "task_id", "producer", "connection"), positional, strict=False)
        # Not `self.tasks`, which would declare every task there is to send one that may live elsewhere.
        task = None if "task_type" in options else cast("Any", self)._tasks.get(name)
        if getattr(task, "contract", None) is not None:
            args, kwargs, options = cast("Any", task).prepare(args, kwargs, options)
            options.setdefault("result_cls", cast("Any", task).AsyncResult)
            if claiming.is_claimed_when_sent(task, options):
                return claiming.send(task, options, partial(self._send_task, name, args, kwargs))
        else:
            claiming.refuse_key(name, options)
        return self._send_task(name, args, kwargs, options)

    def _send_task(self, name: str, args: Any, kwargs: Any, options: Any) -> Any:
        if options.get("countdown") or options.get("eta"):
            options = due_soon(options, now=self.now())
        with sending(self, name):
            return super().send_task(name, args, kwargs, **options)

    @cached_property
    def Worker(self) -> Any:  # noqa: N802  (Celery's name)
        """Celery's class of workers, which here end in time."""
        is_stock = self.settings.kit.profile == "stock"
        name = "celery.apps.worker:Worker" if is_stock else "celerykit.worker.shutdown:Worker"
        return self.subclass_with_self(cast("Any", name))

    @cached_property
    def Beat(self) -> Any:  # noqa: N802  (Celery's name)
        """Celery's class of beats, which here tells what it otherwise prints."""
        is_stock = self.settings.kit.profile == "stock"
        return self.subclass_with_self(
            cast("Any", "celery.apps.beat:Beat" if is_stock else "celerykit.logs.banners:Beat")
        )

    @cached_property
    def AsyncResult(self) -> Any:  # noqa: N802  (Celery's name)
        """Celery's class of results, which here is typed when it knows its task."""
        return self.subclass_with_self(Result, name="AsyncResult", reverse="AsyncResult")

    @cached_property
    def ResultSet(self) -> Any:  # noqa: N802  (Celery's name)
        """Celery's class of several results, each of its own type."""
        return self.subclass_with_self(ResultSet)

    @cached_property
    def GroupResult(self) -> Any:  # noqa: N802  (Celery's name)
        """Celery's class of a group's results, each of its own type."""
        return self.subclass_with_self(GroupResult)

    # Publishing

    def connection_for_write(self, url: Any = None, **kwargs: Any) -> Any:
        """Connect to publish: as Celery does, but no wait on the broker is without an end."""
        kit = self.settings.kit
        url = self._settled(url or self.conf.broker_write_url)
        if kit.profile == "stock":
            return super().connection_for_write(url, **kwargs)
        # The deadline that counts is in force while something is sent (`publishing.sending`).
        wait = kit.publish_deadline.total_seconds()
        kwargs.setdefault("connect_timeout", wait)
        kwargs["transport_options"] = {
            **transport_options(url, wait=wait),
            **self.conf.broker_transport_options,
            **(kwargs.get("transport_options") or {}),
        }
        return super().connection_for_write(url, **kwargs)

    def connection_for_read(self, url: Any = None, **kwargs: Any) -> Any:
        """Connect to consume, as Celery does."""
        return super().connection_for_read(self._settled(url or self.conf.broker_read_url), **kwargs)

    def _settled(self, url: Any) -> Any:
        # Celery takes CELERY_BROKER_URL from the environment by itself, past our settings.
        return settle(url, has_tls_options=bool(self.conf.broker_use_ssl))

    async def publish_in_thread(self, what: str, send: Callable[[], R]) -> R:
        """
        Run *send* on a thread, for no longer than a publish may take.

        Raises:
            EnqueueError: It took longer.
        """
        seconds = self.settings.kit.publish_deadline.total_seconds()
        # Counted from here: the thread may have to wait for its turn.
        with within(seconds) as deadline:
            future = self._publisher.submit(contextvars.copy_context().run, send)
        try:
            async with asyncio.timeout(seconds + _GRACE) as limit:
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if not limit.expired():
                raise
            raise UnreachableBroker(
                f"{what}: the broker did not take the message within {seconds:g} s (CELERYKIT_PUBLISH_DEADLINE). "
                f"The message {'may have been' if deadline.sent else 'was not'} sent.",
                may_have_been_sent=deadline.sent,
            ) from None

    @property
    def _publisher(self) -> ThreadPoolExecutor:
        # By process id: threads do not survive a fork.
        pid = os.getpid()
        if pid not in self._publishers:
            self._publishers[pid] = ThreadPoolExecutor(_PUBLISHERS, thread_name_prefix="celerykit-publish")
        return self._publishers[pid]


if TYPE_CHECKING:
    shared_task: _Declare
else:

    def shared_task(*args: Any, **options: Any) -> Any:
        """Make a typed task of a function for every app there is or will be, as Celery's ``shared_task``."""
        return _declaring(celery.shared_task, args, options, _namespace_of_caller(), None)


def _declaring(
    stock: Callable[..., Any], args: Any, options: dict[str, Any], namespace: Mapping[str, Any], app: CeleryKit | None
) -> Any:
    """Declare through Celery's own decorator *stock*, with the contract among the options."""
    if len(args) == 1 and callable(args[0]):
        return stock(**_declared(args[0], options, namespace, app))(args[0])
    if args:
        return stock(*args, **options)  # which refuses them
    return lambda fun: stock(**_declared(fun, options, namespace, app))(fun)


def _declared(
    fun: Callable[..., Any], options: dict[str, Any], namespace: Mapping[str, Any], app: CeleryKit | None
) -> dict[str, Any]:
    naming = celery.current_app if app is None else app
    name = options.get("name") or naming.gen_task_name(fun.__name__, fun.__module__)
    if name.startswith("celery."):
        return options
    _check_options(name, options)
    # As attributes of the task, which Celery makes of every option, they would hide `Task.retry`, and read badly.
    options = {_KEPT_AS.get(option, option): value for option, value in options.items()}
    if options.get("schedule") is not None:
        options["schedule"] = schedules.read(options["schedule"], what=name)
    base = options.get("base")
    if base is not None and not issubclass(base, Task):
        # A base class written for stock Celery keeps its say, in front of ours.
        options = {
            **options,
            "base": type(base.__name__, (base, Task if app is None else app.Task), {"abstract": True}),
        }
    try:
        contract = Contract(
            name,
            fun,
            drop_first=bool(options.get("bind")),
            strict=bool(options.get("strict")),
            namespace=namespace,
        )
    except UnresolvedAnnotation:
        # Something that is defined further down: it is there when the task is first used, and built then.
        return options
    if options.get("schedule") is not None:
        schedules.check_call(contract, what=name)
    check_limits(contract, options.get("limit_rules", ()))
    check_marks(contract)
    return {**options, "contract": contract}


#: Under which name an option is an attribute of its task.
_KEPT_AS = {"retry": "retry_policy", "once": "once_policy", "limits": "limit_rules"}


def _check_options(task: str, options: Mapping[str, Any]) -> None:
    _check_policies(task, options)
    known = {*TaskOptions.__annotations__, "bind"}
    base = options.get("base") or Task
    for option, value in options.items():
        if option in known:
            continue
        if callable(getattr(base, option, None)) and not callable(value):
            # Celery makes an attribute of the task of every option.
            raise InvalidOptions(f"{task}: the option {option!r} would hide the method Task.{option}; rename it.")
        near = difflib.get_close_matches(option, known, n=1, cutoff=0.8)
        if near and not hasattr(base, option):
            raise InvalidOptions(f"{task}: there is no option {option!r}; did you mean {near[0]!r}?")


def _check_policies(task: str, options: Mapping[str, Any]) -> None:
    retry, on_crash = options.get("retry"), options.get("on_crash", "rerun")
    if not isinstance(retry, Retry | None):
        given = type(retry).__name__
        raise InvalidOptions(f"{task}: retry must be a Retry, such as Retry(ConnectionError); got {given}.")
    rivals = [name for name in ("autoretry_for", "max_retries") if name in options]
    if retry is not None and rivals:
        raise InvalidOptions(f"{task}: retry takes the place of {' and '.join(rivals)}; leave one of them out.")
    if on_crash not in ("rerun", "bury"):
        raise InvalidOptions(f"{task}: on_crash must be 'rerun' or 'bury', got {on_crash!r}.")
    if not isinstance(options.get("once"), Once | None):
        raise InvalidOptions(f"{task}: once must be a Once, such as Once(); got {type(options['once']).__name__}.")
    if (down := options.get("on_store_down", "retry")) not in ("run", "retry", "fail"):
        raise InvalidOptions(f"{task}: on_store_down must be 'run', 'retry' or 'fail', got {down!r}.")
    if on_crash == "bury" and options.get("acks_late") is False:
        raise InvalidOptions(f"{task}: on_crash='bury' needs late acks; leave acks_late=False out.")


def _namespace_of_caller() -> Mapping[str, Any]:
    """Give the names of the function in which a task is declared; annotations may be strings that use them."""
    frame = sys._getframe(2)
    return {} if frame.f_locals is frame.f_globals else dict(frame.f_locals)
