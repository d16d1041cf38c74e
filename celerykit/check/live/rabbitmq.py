"""
What a RabbitMQ says of itself, by AMQP alone: its management plug-in may not be there.

Most questions are requests that it must refuse, and its reason is the answer.
It looks at a user's rights before anything else, so that a declaration with
nonsense in it is refused for the nonsense only when the user may declare.
Nothing comes to be, and no message is moved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from amqp.exceptions import AccessRefused, NotFound, PreconditionFailed
from kombu.transport.native_delayed_delivery import (
    CELERY_DELAYED_DELIVERY_EXCHANGE,
    MAX_LEVEL,
    MAX_NUMBER_OF_BITS_TO_USE,
    level_name,
)

from celerykit.check.facts import Facts
from celerykit.settings import mask_text

__all__ = ["QueueAnswers", "RabbitMQAnswers", "ask_rabbitmq"]

#: The type, and an argument that no type of queue takes.
_NONSENSE = {"x-queue-type": "celerykit-check", "x-max-length": -1}


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueAnswers:
    """
    One queue as it is at the broker.

    Attributes:
        messages:
            How many wait; None without a queue.

        type:
            As it is at the broker, where that could be found out.

        missing_rights:
            What the user may not do with it: ``configure`` (declare it), ``read`` (consume).

        differs:
            RabbitMQ's words for how it is not what the app declares.
    """

    name: str
    messages: int | None = None
    type: str | None = None
    missing_rights: tuple[str, ...] = ()
    differs: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RabbitMQAnswers:
    """
    One broker.

    Attributes:
        is_rabbitmq:
            Others that speak AMQP 0.9.1 are not asked by what they must refuse.

        may_publish_letters:
            Whether the user may publish to the default exchange.

        missing_delays:
            Queues and exchanges of native delayed delivery that are not there.

        delays:
            Whether what is sent without a delay passes through all of them;
            None where it was not tried.
    """

    version: tuple[int, ...] = ()
    is_rabbitmq: bool = True
    queues: Sequence[QueueAnswers] = ()
    letters: QueueAnswers
    may_publish_letters: bool = True
    missing_delays: tuple[str, ...] = ()
    delays: bool | None = None


def ask_rabbitmq(app: Any, facts: Facts) -> RabbitMQAnswers:
    """Ask with the rights of who publishes, and of who consumes."""
    with app.connection_for_write() as writing, app.connection_for_read() as reading:
        writing.connect()
        reading.connect()
        return _Questions(writing, reading, confirm_within=facts.kit.publish_deadline.total_seconds()).all(app, facts)


class _Questions:
    def __init__(self, writing: Any, reading: Any, *, confirm_within: float) -> None:
        self._writing = writing
        self._reading = reading
        self._confirm_within = confirm_within
        server = writing.connection.server_properties
        self._version = tuple(int(number) for number in re.findall(r"\d+", str(server.get("version", "")))[:3])
        self._is_rabbitmq = server.get("product") == "RabbitMQ"

    def all(self, app: Any, facts: Facts) -> RabbitMQAnswers:
        work = {queue.name for queue in facts.queues if not queue.is_broadcast}
        missing = self._missing_delays() if facts.delays_natively else ()
        return RabbitMQAnswers(
            version=self._version,
            is_rabbitmq=self._is_rabbitmq,
            queues=[self._queue(name, queue) for name, queue in app.amqp.queues.items() if name in work],
            letters=self._queue(facts.kit.dead_letter_queue, None),
            may_publish_letters=self._may_publish(),
            missing_delays=missing,
            delays=self._delays() if facts.delays_natively and not missing else None,
        )

    def _queue(self, name: str, declared: Any) -> QueueAnswers:
        passive = self._on(self._writing, lambda channel: channel.queue_declare(queue=name, passive=True))
        messages = None if isinstance(passive, Exception) else passive.message_count
        if not self._is_rabbitmq:
            return QueueAnswers(name=name, messages=messages)
        refused = {"configure": self._declare_nonsense(name), "read": self._consume_nonsense(name)}
        missing_rights = tuple(right for right, answer in refused.items() if isinstance(answer, AccessRefused))
        differs = None
        if messages is not None and declared is not None and "configure" not in missing_rights:
            differs = self._on(self._writing, lambda channel: declared(channel).queue_declare())
        return QueueAnswers(
            name=name,
            messages=messages,
            type=_type(refused["configure"]) if messages is not None else None,
            missing_rights=missing_rights,
            differs=_reason(differs) if isinstance(differs, PreconditionFailed) else "",
        )

    def _declare_nonsense(self, name: str) -> Any:
        return self._on(
            self._writing,
            lambda channel: channel.queue_declare(queue=name, durable=True, auto_delete=False, arguments=_NONSENSE),
        )

    def _consume_nonsense(self, name: str) -> Any:
        return self._on(
            self._reading,
            lambda channel: channel.basic_consume(queue=name, arguments={"x-priority": "celerykit-check"}),
        )

    def _may_publish(self) -> bool:
        # To a queue that is not there: RabbitMQ drops it.
        answer = self._on(self._writing, lambda channel: self._publish(channel, "", f"celerykit-check-{uuid4()}"))
        return not isinstance(answer, AccessRefused)

    def _missing_delays(self) -> tuple[str, ...]:
        queues = [level_name(level) for level in range(MAX_LEVEL, -1, -1)]
        missing = [
            f"exchange {name}" for name in (*queues, CELERY_DELAYED_DELIVERY_EXCHANGE) if not self._has_exchange(name)
        ]
        return (*missing, *(f"queue {name}" for name in queues if not self._has_queue(name)))

    def _has_exchange(self, name: str) -> bool:
        declare = self._on(self._writing, lambda channel: channel.exchange_declare(name, "topic", passive=True))
        return not isinstance(declare, NotFound)

    def _has_queue(self, name: str) -> bool:
        declare = self._on(self._writing, lambda channel: channel.queue_declare(queue=name, passive=True))
        return not isinstance(declare, NotFound)

    def _delays(self) -> bool | None:
        """Send a message through every level to a queue of our own, which goes with this connection."""
        answer = self._on(self._writing, self._send_through)
        return None if isinstance(answer, AccessRefused) else answer is True

    def _send_through(self, channel: Any) -> bool:
        queue = channel.queue_declare(exclusive=True, auto_delete=True).queue
        key = f"celerykit-check-{uuid4()}"
        channel.queue_bind(queue, CELERY_DELAYED_DELIVERY_EXCHANGE, f"#.{key}")
        try:
            self._publish(channel, level_name(MAX_LEVEL), "0." * MAX_NUMBER_OF_BITS_TO_USE + key)
            return channel.basic_get(queue, no_ack=True) is not None
        finally:
            channel.queue_delete(queue)

    def _publish(self, channel: Any, exchange: str, routing_key: str) -> None:
        message = channel.prepare_message("", content_type="text/plain", content_encoding="utf-8")
        channel.basic_publish_confirm(
            message,
            exchange=exchange,
            routing_key=routing_key,
            confirm_timeout=self._confirm_within,
        )

    @staticmethod
    def _on(connection: Any, question: Callable[[Any], Any]) -> Any:
        """Ask on a channel of its own, which a refusal closes, and return the answer or the refusal."""
        channel = connection.channel()
        try:
            return question(channel)
        except connection.channel_errors as refusal:
            return refusal
        finally:
            channel.close()


def _reason(error: PreconditionFailed) -> str:
    return mask_text(str(error.reply_text)).removeprefix("PRECONDITION_FAILED - ")


def _type(refusal: Any) -> str | None:
    """Read a queue's type in the refusal of another."""
    found = re.search(r"current is (?:'(\w+)'|none)", str(refusal))
    # Without an argument it is what queues are there by default: classic, unless somebody changed that.
    return (found[1] or "classic") if found else None
