"""Rules about a RabbitMQ that was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kombu.transport.native_delayed_delivery import CELERY_DELAYED_DELIVERY_EXCHANGE

from celerykit.check.facts import Facts
from celerykit.check.findings import Finding, named
from celerykit.check.live import Answers
from celerykit.check.live.rabbitmq import RabbitMQAnswers

__all__ = ["RULES"]

#: For quorum queues whose messages have a time to live, which countdowns are made of.
_OLDEST = (3, 10)


def old(facts: Facts, broker: RabbitMQAnswers) -> Iterator[Finding]:
    """Find a broker that is too old."""
    if broker.is_rabbitmq and broker.version and broker.version < _OLDEST:
        yield Finding(
            "rabbitmq-old",
            "error",
            f"The broker is RabbitMQ {'.'.join(map(str, broker.version))}, whose quorum queues cannot hold countdowns.",
            f"Upgrade it to {'.'.join(map(str, _OLDEST))} or newer.",
        )


def differing(facts: Facts, broker: RabbitMQAnswers) -> Iterator[Finding]:
    """Find queues that a worker could not declare."""
    for queue in broker.queues:
        if queue.differs:
            yield Finding(
                "queue-differs",
                "error",
                f"{queue.name} is not at the broker as the app declares it, and no worker can start: {queue.differs}.",
                "Let it run empty and delete it, or declare it in task_queues as it is.",
                (queue.name,),
            )


def work_rights(facts: Facts, broker: RabbitMQAnswers) -> Iterator[Finding]:
    """Find queues that the user may not work with."""
    for queue in broker.queues:
        if queue.missing_rights:
            yield Finding(
                "queue-no-rights",
                "error",
                f"The broker's user has no right to {_rights(queue.missing_rights)} the queue {queue.name}.",
                "Give it the right with rabbitmqctl set_permissions.",
                (queue.name,),
            )


def letter_rights(facts: Facts, broker: RabbitMQAnswers) -> Iterator[Finding]:
    """Find dead letters that could not be written, or not be read again."""
    rights, queue = broker.letters.missing_rights, broker.letters.name
    if rights:
        yield Finding(
            "dead-letters-no-rights",
            "error",
            f"The broker's user has no right to {_rights(rights)} the queue {queue}: what dies could not be "
            f"{'kept' if 'configure' in rights else 'listed or replayed'}.",
            f"Give it configure, write and read on {queue} with rabbitmqctl set_permissions.",
            (queue,),
        )
    if not broker.may_publish_letters:
        yield Finding(
            "dead-letters-no-write",
            "error",
            f"The broker's user has no right to publish to the default exchange, by which dead letters go to {queue}.",
            "Give it write on amq.default with rabbitmqctl set_permissions.",
            (queue,),
        )


def letter_queue(facts: Facts, broker: RabbitMQAnswers) -> Iterator[Finding]:
    """Find dead letters that are less safe than the work was."""
    queue = broker.letters
    if queue.type not in (None, "quorum"):
        yield Finding(
            "dead-letters-not-quorum",
            "warning",
            f"{queue.name} is a {queue.type} queue, on one node only; a quorum queue is what celerykit makes.",
            "Export or replay its letters, and delete it: it is made anew when it is needed.",
            (queue.name,),
        )


def negative_limit(facts: Facts, broker: RabbitMQAnswers) -> Iterator[Finding]:
    """Find what means no limit to RabbitMQ 4, and none at all to RabbitMQ 3."""
    names = tuple(queue.name for queue in facts.queues if (queue.delivery_limit or 0) < 0)
    if names and broker.is_rabbitmq and broker.version < (4,):
        yield Finding(
            "negative-delivery-limit",
            "error",
            f"{named(names)}: to RabbitMQ before 4, an x-delivery-limit below 0 throws away what is given back once.",
            "Set it to a large number.",
            names,
        )


def _rights(missing: tuple[str, ...]) -> str:
    words = {"configure": "declare", "read": "consume from"}
    return " or ".join(words[right] for right in missing)


def delays(facts: Facts, broker: RabbitMQAnswers) -> Iterator[Finding]:
    """Find countdowns that would get lost on their way."""
    missing = broker.missing_delays
    if f"exchange {CELERY_DELAYED_DELIVERY_EXCHANGE}" in missing:
        yield Finding(
            "delays-not-set-up",
            "info",
            "Native delayed delivery, where countdowns wait, is not set up yet.",
            "Start a worker, which sets it up; its user needs configure, write and read on celery_delayed.*.",
            missing,
        )
    elif missing:
        yield Finding(
            "delays-missing",
            "error",
            f"Of native delayed delivery there is no {named(missing)}: countdowns are lost on their way.",
            "Restart a worker, which declares all of it again.",
            missing,
        )
    if broker.delays is False:
        yield Finding(
            "delays-broken",
            "error",
            "A message did not come through the exchanges of native delayed delivery: a binding is missing.",
            "Restart a worker, which binds them again, and look at its log.",
        )


def unknown(facts: Facts, broker: RabbitMQAnswers) -> Iterator[Finding]:
    """Say what AMQP cannot tell."""
    bindings = ", and whether each queue is bound to celery_delayed_delivery" if facts.delays_natively else ""
    yield Finding(
        "rabbitmq-untold",
        "info",
        f"AMQP does not tell RabbitMQ's consumer_timeout (30 min unless set){bindings}.",
        "Look there yourself: rabbitmqctl environment, rabbitmqctl list_bindings.",
    )


_OF_BROKER: tuple[Callable[[Facts, RabbitMQAnswers], Iterator[Finding]], ...] = (
    old,
    differing,
    work_rights,
    letter_rights,
    letter_queue,
    negative_limit,
    delays,
    unknown,
)


def the_broker(facts: Facts, answers: Answers) -> Iterator[Finding]:
    """Judge the broker, if it was asked."""
    if answers.rabbitmq is not None:
        for rule in _OF_BROKER:
            yield from rule(facts, answers.rabbitmq)


RULES: tuple[Callable[[Facts, Answers], Iterator[Finding]], ...] = (the_broker,)
