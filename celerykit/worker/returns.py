"""
Gives messages back to their queue after a while: what made them come back may not be over.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import kombu
from kombu.transport.native_delayed_delivery import MAX_LEVEL, calculate_routing_key, level_name

from celerykit import events
from celerykit.dead_letters import Note
from celerykit.errors import EnqueueError
from celerykit.headers import Headers
from celerykit.letters import letter_of
from celerykit.publishing import sending

__all__ = ["Returns", "undelayed"]

#: Before the routing key of a message that RabbitMQ has delayed.
_LEVELS = re.compile(rf"^(?:[01]\.){{{MAX_LEVEL + 1}}}")

#: Messages that are held at a time, and for which others may come in their place.
_MOST_HELD = 100


class Returns:
    """
    What goes back later, of one consumer.

    A message is held, unacknowledged, and others may come in its place. Where
    they may not, as RabbitMQ's quorum queues fix how many a worker has, it is
    sent again with a delay instead, so that it does not keep a worker from work.
    """

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._held = 0

    def give_back(
        self, message: Any, *, reject: Callable[..., Any], acknowledge: Callable[[], Any], after: float = 1.0
    ) -> None:
        """
        Give *message* back after some seconds.

        Args:
            reject:
                Called with ``requeue=True``.

            acknowledge:
                Called in its place when the message was sent again.
        """
        if after >= 1 and self._is_room_fixed() and self._is_sent_again(message, int(after)):
            acknowledge()
        else:
            self._hold(after, lambda: reject(requeue=True))

    def _is_room_fixed(self) -> bool:
        consumer = self._consumer
        return consumer.connection.transport.driver_type == "amqp" and consumer.qos_global is False

    def _hold(self, seconds: float, then: Callable[[], Any]) -> None:
        # A flood of them is not to fill this process.
        makes_room = self._held < _MOST_HELD
        self._held += 1
        # A new connection has one of its own.
        qos = self._consumer.qos
        if makes_room:
            qos.increment_eventually()

        def let_go() -> None:
            self._held -= 1
            if makes_room:
                qos.decrement_eventually()
            then()

        self._consumer.timer.call_after(seconds, let_go)

    def _is_sent_again(self, message: Any, seconds: int) -> bool:
        queue = self._queue_of(message)
        if queue is None or queue.exchange.type == "direct":
            return False
        try:
            self._send(message, queue, seconds)
        except EnqueueError as error:
            headers = message.headers
            events.MESSAGE_HELD.tell(task=headers.get("task"), id=headers.get("id"), queue=queue.name, error=error)
            return False
        return True

    def _send(self, message: Any, queue: Any, seconds: int) -> None:
        app = self._consumer.app
        copy = letter_of(message, Note.made_up(message.headers, message.body))
        priority = message.properties.get("priority")
        with sending(app, f"{message.headers.get('task')}"):
            app.amqp.reach(queue)
            with app.producer_pool.acquire(block=True) as producer:
                producer.publish(
                    copy.body,
                    exchange=kombu.Exchange(level_name(MAX_LEVEL), type="topic"),
                    routing_key=calculate_routing_key(seconds, queue.routing_key),
                    headers=copy.headers,
                    content_type=copy.content_type,
                    content_encoding=copy.content_encoding,
                    delivery_mode=2,
                    mandatory=True,
                    priority=priority,
                    **copy.properties,
                )

    def _queue_of(self, message: Any) -> Any:
        queues = self._consumer.app.amqp.queues
        name = Headers.of(message.headers).queue or undelayed(message.delivery_info.get("routing_key"))
        return queues[name] if name in queues.consume_from else None


def undelayed(routing_key: Any) -> Any:
    """Take away what RabbitMQ's delayed delivery put before a routing key: a digit for each of its levels."""
    return _LEVELS.sub("", routing_key) if isinstance(routing_key, str) else routing_key
