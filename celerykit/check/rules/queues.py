"""Rules about RabbitMQ's queues as a worker would declare them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from celerykit.check.facts import Facts, QueueFacts
from celerykit.check.findings import Finding, Severity, named

__all__ = ["RULES"]

#: Arguments by which a queue throws messages away that nobody has seen.
_DROPPING = ("x-message-ttl", "x-expires", "x-max-length", "x-max-length-bytes")

#: What a full queue may be told instead.
_REFUSING = frozenset({"reject-publish", "reject-publish-dlx"})


def _work(facts: Facts) -> list[QueueFacts]:
    """Give RabbitMQ's queues that hold work; a broadcast's come and go with their worker."""
    return [queue for queue in facts.queues if facts.broker == "amqp" and not queue.is_broadcast]


def _about(queues: Iterable[QueueFacts], code: str, severity: Severity, *, what: str, fix: str) -> Iterator[Finding]:
    names = tuple(queue.name for queue in queues)
    if names:
        yield Finding(code, severity, f"{named(names)}: {what}", fix, names)


def classic(facts: Facts) -> Iterator[Finding]:
    """Find queues that live on one node, and count no deliveries."""
    yield from _about(
        (queue for queue in _work(facts) if queue.type == "classic"),
        "classic-queue",
        "warning",
        what="a classic queue is on one node only, counts no deliveries, and cannot hold countdowns.",
        fix="Declare it as a quorum queue (x-queue-type: quorum), under a new name or after the old one has run empty.",
    )


def priority(facts: Facts) -> Iterator[Finding]:
    """Find quorum queues that cannot be declared."""
    yield from _about(
        (queue for queue in _work(facts) if queue.type == "quorum" and "x-max-priority" in queue.arguments),
        "priority-on-quorum",
        "error",
        what="a quorum queue takes no x-max-priority: RabbitMQ refuses to declare it.",
        fix="Remove x-max-priority (and task_queue_max_priority), and use a queue for each priority.",
    )


def transient(facts: Facts) -> Iterator[Finding]:
    """Find queues that go with the broker, or with their last consumer."""
    yield from _about(
        (queue for queue in _work(facts) if not queue.is_durable or queue.is_auto_delete),
        "transient-queue",
        "error",
        what="the queue goes, with all that waits in it, when RabbitMQ restarts or its last worker stops.",
        fix="Declare it with durable=True and auto_delete=False, as is the default.",
    )


def dropping(facts: Facts) -> Iterator[Finding]:
    """Find queues that throw tasks away."""
    yield from _about(
        (queue for queue in _work(facts) if _drops(queue)),
        "queue-drops-tasks",
        "warning",
        what="by its arguments the queue throws away tasks that nobody ran, and leaves no dead letter.",
        fix="Use expires on the task instead of a TTL, and x-overflow: reject-publish beside a maximum length.",
    )


def _drops(queue: QueueFacts) -> bool:
    dropping = [name for name in _DROPPING if name in queue.arguments]
    if queue.arguments.get("x-overflow") in _REFUSING:
        dropping = [name for name in dropping if not name.startswith("x-max-length")]
    return bool(dropping)


def delivery_limit(facts: Facts) -> Iterator[Finding]:
    """Find queues that throw a message away before our worker can bury it."""
    quorum = [queue for queue in _work(facts) if queue.type == "quorum"]
    yield from _about(
        (queue for queue in quorum if _is_low(queue.delivery_limit, facts.kit.max_deliveries)),
        "low-delivery-limit",
        "error",
        what=f"RabbitMQ throws a message away after x-delivery-limit deliveries, before {facts.kit.max_deliveries} "
        "starts (CELERYKIT_MAX_DELIVERIES) make a dead letter of it.",
        fix="Set x-delivery-limit to 100 or more: deliveries at each deploy count, and starts do not.",
    )
    yield from _about(
        (queue for queue in quorum if queue.delivery_limit is None),
        "no-delivery-limit",
        "warning",
        what="without x-delivery-limit RabbitMQ 4 throws a message away after 20 deliveries, each deploy one.",
        fix="Set x-delivery-limit to 100 or more.",
    )


def _is_low(limit: int | None, starts: int) -> bool:
    # Below 0 there is none, to RabbitMQ 4.
    return limit is not None and 0 <= limit <= starts


RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (classic, priority, transient, dropping, delivery_limit)
