"""
Our defaults where they differ from Celery's, each with its reason.

Each must be safe for a project that changes one import, and fewer is better.
Left as Celery has them, on purpose: time limits (a new one kills the two-hour
job that runs today), events (a third more CPU, for nobody), how long results
are kept, JSON only and UTC (Celery's own defaults by now),
``broker_connection_retry_on_startup`` (None follows ``broker_connection_retry``,
and a value would overrule who turned that off), and
``worker_enable_soft_shutdown_on_idle`` (an idle worker would wait for nothing).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["OPINIONS", "Opinion", "hold", "is_container"]


def _always(values: Mapping[str, Any], container: bool) -> bool:
    return True


def _acks_late(values: Mapping[str, Any], container: bool) -> bool:
    # Who turned late acks off wants at most once: a crash must not bring the task back.
    return bool(values.get("task_acks_late"))


#: All of these or none: a queue or an exchange that exists cannot be changed.
_QUEUE_TYPES = (
    "task_default_queue_type",
    "task_default_exchange_type",
    "task_create_missing_queue_type",
    "task_create_missing_queue_exchange_type",
)
_RABBITMQ = frozenset({"amqp", "amqps", "pyamqp"})


def _quorum(values: Mapping[str, Any], container: bool) -> bool:
    # What a user set stands in the last map, below what is held of these.
    told = values.maps[-1] if isinstance(values, ChainMap) else values
    # Priorities need classic queues.
    if told.get("task_queue_max_priority") is not None or any(name in told for name in _QUEUE_TYPES):
        return False
    urls = [told[name] for name in ("broker_url", "broker_read_url", "broker_write_url") if told.get(name)]
    first = [url[0] if isinstance(url, list | tuple) else url for url in urls]
    # An app that has no URL yet may get one that is not RabbitMQ's.
    return bool(first) and all(str(url).partition(":")[0].lower() in _RABBITMQ for url in first)


def _in_container(values: Mapping[str, Any], container: bool) -> bool:
    return container


@dataclass(frozen=True, slots=True)
class Opinion:
    """
    One default of ours, and why.

    Attributes:
        when:
            Whether it holds, told what is set already (by the user, or by an
            opinion above this one) and whether this is a container.
    """

    name: str
    value: Any
    reason: str
    when: Callable[[Mapping[str, Any], bool], bool] = _always


#: In order: a later one may look at what an earlier one set.
OPINIONS = (
    Opinion(
        "task_acks_late",
        True,
        "A message is given back to the broker when the worker dies with it; acknowledged early, it is lost. "
        "SQS needs a visibility timeout longer than the longest task; Redis and Valkey do not.",
    ),
    Opinion(
        "task_reject_on_worker_lost",
        True,
        "Late acks alone still acknowledge a task whose process was killed, and it is lost. Only with late acks; "
        "`CELERYKIT_MAX_DELIVERIES` bounds it.",
        when=_acks_late,
    ),
    Opinion(
        "worker_consumer",
        "celerykit.worker.consumer:Consumer",
        "No message can stop it, and what a worker cannot finish is buried, not dropped.",
    ),
    Opinion(
        "worker_pool",
        "celerykit.worker.shutdown:TaskPool",
        "Celery's prefork pool. At a warm shutdown Celery's own may run a task that it also gives back, and then "
        "stands still for 30 s.",
    ),
    Opinion(
        "worker_prefetch_multiplier",
        1,
        "With late acks every message a worker holds is one that others cannot have, and one that is "
        "delivered again when the worker dies. Not on gevent and eventlet, where Celery looks for a message once a "
        "second when a place becomes free: there it is Celery's 4.",
    ),
    Opinion(
        "worker_soft_shutdown_timeout",
        8.0,
        "A cold shutdown first lets running tasks end. Less than the 10 s that `docker stop` waits before "
        "it kills (Kubernetes: 30 s), so that what is left goes back to the broker.",
    ),
    Opinion(
        "task_default_queue_type",
        "quorum",
        "On RabbitMQ: a quorum queue survives a node, and counts deliveries. A queue that exists cannot be "
        "changed: see docs/brokers.md. Not with `task_queue_max_priority`, nor when a queue or exchange type is set.",
        when=_quorum,
    ),
    Opinion(
        "task_create_missing_queue_type",
        "quorum",
        "The same for queues that are first heard of when a message is sent.",
        when=_quorum,
    ),
    Opinion(
        "task_default_exchange_type",
        "topic",
        "RabbitMQ's delayed delivery needs it; without, a worker holds each message with a countdown. With the "
        "two above.",
        when=_quorum,
    ),
    Opinion(
        "task_create_missing_queue_exchange_type",
        "topic",
        "The same for queues that are first heard of when a message is sent.",
        when=_quorum,
    ),
    Opinion(
        "beat_scheduler",
        "celerykit.beat:Scheduler",
        "Any number of beats may run: one leads, and what is due is sent once. Without a store that they share it is "
        "Celery's own.",
    ),
    Opinion(
        "worker_concurrency",
        "auto",
        "Celery counts the CPUs of the whole node; `auto` counts those this container may use. Only in a container.",
        when=_in_container,
    ),
)


def hold(values: Mapping[str, Any], *, container: bool) -> dict[str, Any]:
    """Return our defaults for what *values* leave open."""
    held: dict[str, Any] = {}
    settled = ChainMap(held, dict(values))
    for opinion in OPINIONS:
        if opinion.name not in values and opinion.when(settled, container):
            held[opinion.name] = opinion.value
    return held


def is_container(environ: Mapping[str, str]) -> bool:
    """Tell whether this process runs in a container: Docker, Podman or Kubernetes."""
    if environ.get("KUBERNETES_SERVICE_HOST"):
        return True
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
