"""Rules about an app's settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import kombu.serialization

from celerykit.check.facts import Facts
from celerykit.check.findings import Finding, Severity, named

__all__ = ["RULES"]

#: Seconds until a SIGKILL follows SIGTERM, unless somebody says otherwise.
_DOCKER, _KUBERNETES = 10, 30

#: A shorter lease is over while a machine pauses, or a network blinks.
_SHORTEST_LEASE = 5

_TRIED = ("redis", "amqp")

_A_STORE = "Set CELERYKIT_STORE_URL to a Redis, a Valkey or an SQL database."

#: Of which any number may run; and those of Celery's that have a file each.
_OUR_BEAT = "celerykit.beat:Scheduler"
_STOCK_BEATS = ("celery.beat:PersistentScheduler", "celery.beat.PersistentScheduler", "celery.beat:Scheduler")


def unusable(facts: Facts) -> Iterator[Finding]:
    """Find a broker or a result backend that cannot even be made."""
    if facts.broker_problem:
        yield Finding(
            "broker-unusable",
            "error",
            f"There is no way to the broker: {facts.broker_problem}.",
            "Install what its transport needs, or correct broker_url.",
        )
    if facts.backend_problem:
        yield Finding(
            "backend-unusable",
            "error",
            f"The result backend cannot be made: {facts.backend_problem}.",
            "Install what it needs, or correct result_backend.",
        )


def untried_broker(facts: Facts) -> Iterator[Finding]:
    """Find a broker on which celerykit's promises do not hold, or were not tried."""
    if facts.broker == "memory":
        yield Finding(
            "broker-in-process",
            "warning",
            "The broker is memory://, which no other process sees and which ends with this one.",
            "Set CELERY_BROKER_URL to Redis, Valkey or RabbitMQ.",
        )
    elif facts.broker and facts.broker not in _TRIED:
        yield Finding(
            "broker-untried",
            "info",
            f"The guarantees of celerykit were tried on Redis, Valkey and RabbitMQ, and not on {facts.broker}.",
            "Try on your broker what happens to a task when its worker is killed.",
        )


def pickle_accepted(facts: Facts) -> Iterator[Finding]:
    """Find settings by which a message may run code."""
    names = [name for name in ("accept_content", "result_accept_content") if "pickle" in _types(facts.conf[name])]
    if names:
        yield Finding(
            "pickle-accepted",
            "error",
            f"{named(names)} has pickle: who can write to the broker can run any code in the workers.",
            "Accept json only; let queues that still hold pickled messages run empty first.",
        )


def serializer_refused(facts: Facts) -> Iterator[Finding]:
    """Find a serializer whose messages our own workers would refuse."""
    accepted = _types(facts.conf["accept_content"])
    written = {facts.conf["task_serializer"]: "task_serializer"} | {
        task.serializer: task.name for task in facts.tasks if task.serializer != facts.conf["task_serializer"]
    }
    for serializer, where in written.items():
        if not _types([serializer]) <= accepted:
            yield Finding(
                "serializer-refused",
                "error",
                f"{where} writes messages as {serializer}, which accept_content does not have: workers refuse them.",
                "Write json, or add it to accept_content.",
            )


def _types(names: Sequence[str] | None) -> set[str]:
    # Either a name or a content type; compared by the name of what reads it.
    registry: Any = cast("Any", kombu.serialization).registry
    names_of = {content_type: name for name, content_type in registry.name_to_type.items()}
    return {names_of.get(name, name) for name in names or ()}


def eager(facts: Facts) -> Iterator[Finding]:
    """Find tasks that run where they are called."""
    if facts.conf["task_always_eager"]:
        yield Finding(
            "always-eager",
            "warning",
            "task_always_eager is on: tasks run in their caller, and nothing is sent.",
            "Turn it off everywhere but in tests.",
        )


def transient_messages(facts: Facts) -> Iterator[Finding]:
    """Find messages that a restart of the broker loses."""
    if facts.broker == "amqp" and facts.conf["task_default_delivery_mode"] in (1, "transient"):
        yield Finding(
            "transient-messages",
            "error",
            "task_default_delivery_mode is transient: a restart of RabbitMQ loses every waiting task.",
            "Set it to persistent (2), Celery's default.",
        )


def grace(facts: Facts) -> Iterator[Finding]:
    """Find a grace period that is none, or longer than whoever stops the worker waits."""
    seconds = float(facts.conf["worker_soft_shutdown_timeout"] or 0)
    if not seconds:
        yield Finding(
            "no-grace",
            "warning",
            "worker_soft_shutdown_timeout is 0: a cold shutdown cuts running tasks off at once.",
            f"Set it to some seconds less than your platform waits before SIGKILL (docker stop: {_DOCKER} s, "
            f"Kubernetes: {_KUBERNETES} s).",
        )
    elif seconds >= _KUBERNETES:
        yield _long_grace("warning", seconds, f"Kubernetes waits {_KUBERNETES} s, and docker stop {_DOCKER} s")
    elif seconds >= _DOCKER:
        yield _long_grace("info", seconds, f"docker stop waits {_DOCKER} s")


def _long_grace(severity: Severity, seconds: float, who: str) -> Finding:
    return Finding(
        "long-grace",
        severity,
        f"worker_soft_shutdown_timeout is {seconds:g} s, and {who} before SIGKILL: tasks would not be handed back.",
        "Give the platform some seconds more (terminationGracePeriodSeconds, stop_grace_period), or shorten it.",
    )


def prefetch(facts: Facts) -> Iterator[Finding]:
    """Find workers that take all there is."""
    if facts.conf["worker_prefetch_multiplier"] == 0:
        yield Finding(
            "prefetch-unlimited",
            "warning",
            "worker_prefetch_multiplier is 0: one worker takes the whole queue, and the others have nothing to do.",
            "Set it to 1.",
        )


def short_lease(facts: Facts) -> Iterator[Finding]:
    """Find a lease that ends under a living worker."""
    seconds = facts.kit.lease.total_seconds()
    of_messages = facts.broker == "redis" and facts.kit.profile != "stock"
    if (of_messages or facts.needing_store) and seconds < _SHORTEST_LEASE:
        what = "messages" if of_messages else "keys and slots"
        yield Finding(
            "short-lease",
            "warning",
            f"CELERYKIT_LEASE is {seconds:g} s: a worker that pauses for as long loses its {what} to another, and "
            "tasks run twice.",
            f"Make it {_SHORTEST_LEASE} s or more; 30 s is the default.",
        )


def leases(facts: Facts) -> Iterator[Finding]:
    """Find messages that nobody renews."""
    if facts.leases_problem:
        yield Finding(
            "leases-off",
            "warning",
            f"Leases are off: {facts.leases_problem}.",
            "Use a version of Kombu that this celerykit knows, or a newer celerykit.",
        )


def store(facts: Facts) -> Iterator[Finding]:
    """Find counts that only one process sees."""
    if facts.store_is_shared:
        return
    names = tuple(task.name for task in facts.tasks if task.on_crash == "bury")
    if names:
        yield Finding(
            "bury-without-store",
            "error",
            f'{named(names)}: on_crash="bury" needs a store that all workers see, and here each has its own.',
            _A_STORE,
            names,
        )
    yield from _needing_store(facts)
    yield Finding(
        "store-per-process",
        "info",
        "Counts and marks are in the memory of each worker: a message that kills its worker counts anew in the next.",
        _A_STORE,
    )


def _needing_store(facts: Facts) -> Iterator[Finding]:
    # Calls that run in their caller have a store of their own.
    if not facts.needing_store or facts.conf["task_always_eager"]:
        return
    names = tuple(task.name for task in facts.needing_store)
    needs = {option for task in facts.needing_store for option in task.needs}
    options = [f"{option}=" for option in ("once", "remember", "limits") if option in needs]
    yield Finding(
        "needs-store",
        "error",
        f"{named(names)}: declared with {' and '.join(options)}; that needs a store which all workers see, and here "
        "each has its own.",
        _A_STORE,
        names,
    )


def beats(facts: Facts) -> Iterator[Finding]:
    """Find a schedule that each beat would send."""
    is_ours = facts.conf["beat_scheduler"] == _OUR_BEAT and facts.store_is_shared
    if not facts.conf["beat_schedule"] or is_ours or facts.conf["beat_scheduler"] not in (_OUR_BEAT, *_STOCK_BEATS):
        return
    also = "" if facts.store_is_shared else ", and CELERYKIT_STORE_URL to a Redis, a Valkey or an SQL database"
    yield Finding(
        "one-beat-only",
        "info",
        "There is a schedule, and a second beat would send all of it a second time; so would a deploy, for a moment.",
        f"Set beat_scheduler to {_OUR_BEAT}{also}.",
    )


def dead_letters(facts: Facts) -> Iterator[Finding]:
    """Find workers that would run their dead letters."""
    queue = facts.kit.dead_letter_queue
    if queue in [queue.name for queue in facts.queues]:
        yield Finding(
            "dead-letters-are-work",
            "error",
            f"The dead letters go to {queue}, which workers consume: they would run them over and over.",
            "Take it out of task_queues, or rename one: CELERYKIT_DEAD_LETTER_QUEUE.",
            (queue,),
        )


def chords(facts: Facts) -> Iterator[Finding]:
    """Find chords that cannot be sent."""
    if facts.can_join or facts.backend_problem:
        return
    fix = "Set result_backend to one that can: Redis, Valkey, a database, Memcached."
    if facts.chords:
        yield Finding(
            "chord-without-join",
            "error",
            f"{named(facts.chords)} has chord, and the result backend cannot join its members: sending one raises.",
            fix,
            tuple(facts.chords),
        )
    elif facts.has_backend:
        yield Finding(
            "no-chords",
            "info",
            "The result backend cannot join: a chord, or a group with a task behind it, cannot be sent.",
            fix,
        )


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    unusable,
    untried_broker,
    pickle_accepted,
    serializer_refused,
    eager,
    transient_messages,
    grace,
    prefetch,
    short_lease,
    leases,
    store,
    beats,
    dead_letters,
    chords,
)
