"""What an app says of itself, without asking anybody else."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import celery

from celerykit.contract import Contract
from celerykit.errors import InvalidPayload
from celerykit.idempotency import Key
from celerykit.needs import needs_store
from celerykit.settings import Kit, mask_text

__all__ = ["Facts", "QueueFacts", "TaskFacts", "facts_of"]

#: Seconds after which a broker with a visibility timeout delivers again, where nobody says otherwise: Kombu's defaults.
_VISIBILITY = {"redis": 3600.0, "sqs": 1800.0}

#: Return annotations that say nothing.
_UNTYPED = (inspect.Parameter.empty, Any)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFacts:
    """
    One task, with what it inherits from the settings.

    Attributes:
        time_limit, soft_time_limit:
            In seconds; None without one.

        on_crash:
            ``rerun`` or ``bury``.

        has_policy:
            Whether it has a ``retry=`` of ours.

        returns_value:
            Whether its return annotation promises a result that is to be kept.

        returns_untyped:
            Whether a result is kept of which nobody says what it is.

        needs:
            Its options that mean nothing without a store.

        keep:
            Seconds that a call is remembered which is done; None when none is.

        on_done:
            What a second call does then.

        has_marks:
            Whether a parameter is marked with ``Key()``.

        secrets_problem:
            Why its calls are refused for a secret; empty if they are not.
    """

    name: str
    time_limit: float | None = None
    soft_time_limit: float | None = None
    acks_late: bool = True
    reject_on_worker_lost: bool = True
    retry_on_worker_lost: bool = True
    acks_on_failure: bool = True
    acks_on_timeout: bool = True
    on_crash: str = "rerun"
    has_policy: bool = False
    autoretries: bool = False
    max_retries: int | None = 3
    retry_backoff: float = 0
    retry_backoff_max: float = 600
    returns_value: bool = False
    returns_untyped: bool = False
    serializer: str = "json"
    needs: Sequence[str] = ()
    keep: float | None = None
    on_done: str = "reuse"
    has_marks: bool = False
    secrets_problem: str = ""

    @property
    def has_keys(self) -> bool:
        """Whether its calls hold keys: by what they are called with, or by their ids."""
        return self.keep is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueFacts:
    """
    One queue as a worker would declare it.

    Attributes:
        is_broadcast:
            Whether each worker has a copy of its own, which goes with it.
    """

    name: str
    type: str = "classic"
    exchange_type: str = "direct"
    is_durable: bool = True
    is_auto_delete: bool = False
    is_broadcast: bool = False
    arguments: Mapping[str, Any]

    @property
    def delivery_limit(self) -> int | None:
        """After how many deliveries RabbitMQ throws a message away, as it is told."""
        limit = self.arguments.get("x-delivery-limit")
        return limit if isinstance(limit, int) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """
    All that is known without asking a broker.

    Attributes:
        conf:
            Celery's settings as they are in force.

        broker:
            Kombu's name of its kind: ``redis`` (Valkey too), ``amqp``, ``sqs``, …

        broker_problem, backend_problem:
            Why there can be none: a package is missing, say.

        visibility:
            Seconds after which the broker gives an unacknowledged message to
            somebody else; None where it does not, or where leases are renewed.

        leases_problem:
            Why leases cannot be renewed.

        has_backend:
            Whether results are kept at all.

        can_join:
            Whether the result backend can start a chord's body.

        chords:
            Modules of the project that have Celery's ``chord`` at hand.

        store_is_shared:
            Whether counts and marks are seen by all workers.
    """

    kit: Kit
    conf: Mapping[str, Any]
    broker: str = "redis"
    broker_problem: str = ""
    backend_problem: str = ""
    visibility: float | None = None
    leases_problem: str = ""
    has_backend: bool = True
    can_join: bool = True
    chords: Sequence[str] = ()
    store_is_shared: bool = True
    tasks: Sequence[TaskFacts] = ()
    queues: Sequence[QueueFacts] = ()

    @property
    def delivered_again_after(self) -> float | None:
        """Seconds after which a message comes again whose worker is gone; None where it does at once."""
        return self.kit.lease.total_seconds() if self.broker == "redis" and not self.visibility else self.visibility

    @property
    def needing_store(self) -> tuple[TaskFacts, ...]:
        """Those that mean little where each process has a store of its own."""
        return tuple(task for task in self.tasks if task.needs)

    @property
    def delays_natively(self) -> bool:
        """Whether countdowns wait at RabbitMQ instead of in a worker; Celery's own condition."""
        return self.broker == "amqp" and any(queue.type == "quorum" for queue in self.queues)


def facts_of(app: Any) -> Facts:
    """Gather what *app* says of itself; its tasks are imported already."""
    broker, broker_problem = _broker(app)
    has_backend, can_join, backend_problem = _backend(app)
    leases_problem = _leases_problem(broker)
    tasks = [task for name, task in sorted(app.tasks.items()) if not name.startswith("celery.")]
    return Facts(
        kit=app.settings.kit,
        conf=app.conf,
        broker=broker,
        broker_problem=broker_problem,
        backend_problem=backend_problem,
        visibility=_visibility(app, broker, leases_problem),
        leases_problem=leases_problem,
        has_backend=has_backend,
        can_join=can_join,
        chords=sorted(_with_chord(tasks)),
        store_is_shared=_store_is_shared(app),
        tasks=[_task(task) for task in tasks],
        queues=[_queue(queue) for queue in app.amqp.queues.values()],
    )


def _broker(app: Any) -> tuple[str, str]:
    try:
        return str(app.connection_for_read().transport.driver_type), ""
    except Exception as error:  # noqa: BLE001  (an edge: a transport's package may be missing, or raise anything)
        return "", _told(error)


def _backend(app: Any) -> tuple[bool, bool, str]:
    try:
        backend = app.backend
    except Exception as error:  # noqa: BLE001  (an edge: as above)
        return False, False, _told(error)
    try:
        backend.ensure_chords_allowed()
    except NotImplementedError:
        return not _is_disabled(backend), False, ""
    return True, True, ""


def _is_disabled(backend: Any) -> bool:
    from celery.backends.base import DisabledBackend

    return isinstance(backend, DisabledBackend)


def _told(error: Exception) -> str:
    return mask_text(f"{type(error).__name__}: {error}").strip().removesuffix(".")


def _leases_problem(broker: str) -> str:
    if broker != "redis":
        return ""
    from celerykit.redis_broker import whats_unknown

    unknown = whats_unknown()
    return unknown and f"this is Kombu {version('kombu')}, and {unknown}"


def _visibility(app: Any, broker: str, leases_problem: str) -> float | None:
    has_leases = broker == "redis" and app.settings.kit.profile != "stock" and not leases_problem
    if broker not in _VISIBILITY or has_leases:
        return None
    return float(app.conf.broker_transport_options.get("visibility_timeout") or _VISIBILITY[broker])


def _store_is_shared(app: Any) -> bool:
    store = getattr(app, "store", None)
    return store is None or bool(store.is_shared)


def _with_chord(tasks: Sequence[Any]) -> Iterator[str]:
    packages = {str(task.__module__).partition(".")[0] for task in tasks}
    for name, module in list(sys.modules.items()):
        is_theirs = name.partition(".")[0] in packages
        if is_theirs and any(value is celery.chord for value in vars(module).values()):
            yield name


def _task(task: Any) -> TaskFacts:
    conf = task.app.conf
    contract = getattr(task, "contract", None)
    claims = getattr(task, "claims", None)
    return TaskFacts(
        name=task.name,
        time_limit=task.time_limit or conf.task_time_limit,
        soft_time_limit=task.soft_time_limit or conf.task_soft_time_limit,
        acks_late=bool(task.acks_late),
        reject_on_worker_lost=bool(task.reject_on_worker_lost),
        retry_on_worker_lost=bool(task.retry_on_worker_lost),
        acks_on_failure=bool(task.acks_on_failure),
        acks_on_timeout=bool(task.acks_on_timeout),
        on_crash=getattr(task, "on_crash", "rerun"),
        has_policy=getattr(task, "retry_policy", None) is not None,
        autoretries=bool(getattr(task, "autoretry_for", ())),
        max_retries=task.max_retries,
        retry_backoff=float(getattr(task, "retry_backoff", 0) or 0),
        retry_backoff_max=float(getattr(task, "retry_backoff_max", 600)),
        returns_value=contract is not None and not contract.returns_nothing and not task.ignore_result,
        returns_untyped=contract is not None and contract.returns in _UNTYPED and not task.ignore_result,
        serializer=str(task.serializer),
        needs=needs_store(task),
        keep=claims.policy.keep if claims else None,
        on_done=claims.policy.done if claims else "reuse",
        has_marks=contract is not None and any(map(_is_marked, contract.types.values())),
        secrets_problem="" if contract is None else _secrets_problem(contract),
    )


def _secrets_problem(contract: Contract) -> str:
    try:
        contract.check_secrets()
    except InvalidPayload as error:
        [problem] = error.problems
        return f"argument {problem['loc'][0]!r} {problem['msg']}"
    return ""


def _is_marked(kind: Any) -> bool:
    return any(isinstance(mark, Key) or mark is Key for mark in getattr(kind, "__metadata__", ()))


def _queue(queue: Any) -> QueueFacts:
    from kombu.common import Broadcast

    arguments = queue.queue_arguments or {}
    return QueueFacts(
        name=queue.name,
        type=str(arguments.get("x-queue-type") or "classic"),
        exchange_type=queue.exchange.type if queue.exchange else "direct",
        is_durable=bool(queue.durable),
        is_auto_delete=bool(queue.auto_delete),
        is_broadcast=isinstance(queue, Broadcast),
        arguments=dict(arguments),
    )
