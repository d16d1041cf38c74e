# ruff: noqa: D102  (the methods are documented in `LetterQueue`)

"""
Dead letters where a letter is sent by publishing a copy, and acknowledged then: RabbitMQ, and what else Kombu knows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import amqp.exceptions
import kombu

from celerykit.connections import Unroutable
from celerykit.dead_letters import Letter, Note, Outgoing
from celerykit.errors import LettersLocked
from celerykit.letter_queues.messages import exists, letter_in_amqp, letter_of, publish, version_of_rabbitmq
from celerykit.letter_queues.queue import Held, LetterQueue, NoQueue
from celerykit.publishing import sending

if TYPE_CHECKING:
    from celerykit.app import CeleryKit

__all__ = ["AMQPQueue", "OtherQueue"]


class _PublishingQueue(LetterQueue):
    """Where a letter is sent to another queue by publishing a copy, then acknowledging the letter."""

    def __init__(self, app: CeleryKit, connection: Any) -> None:
        super().__init__(app, connection)
        self._known: set[str] = set()
        self._publishing: Any = None

    def _producer(self) -> Any:
        # On a channel of its own: the letters' must not be lost with it.
        if self._publishing is None or not getattr(self._publishing, "is_open", True):
            self._publishing = self.connection.channel()
        return kombu.Producer(self._publishing)

    def send(self, held: Held, message: Outgoing) -> bool:
        if not message.queue:
            raise NoQueue("it does not say which queue it came from")
        self._make(message.queue)
        with sending(self.app, f"replay of dead letter {held.letter.id}"):
            self._producer().publish(
                message.body,
                exchange="",
                routing_key=message.queue,
                headers=dict(message.headers),
                content_type=message.content_type or "application/data",
                content_encoding=message.content_encoding or "binary",
                priority=message.priority or 0,
                delivery_mode=2,
                mandatory=True,
                **message.properties,
            )
        return self.remove(held)

    def replace(self, held: Held, letter: Letter) -> bool:
        with sending(self.app, f"dead letter {letter.id}"):
            publish(self._producer(), letter, queue=self.name)
        return self.remove(held)

    def _make(self, name: str) -> None:
        if name in self._known:
            return
        try:
            if version_of_rabbitmq(self.connection.default_channel) is None or not exists(self.connection, name):
                queue: Any = self.app.amqp.queues[name]
                with self.connection.channel() as channel:
                    queue(channel).declare()
        except (KeyError, Unroutable, amqp.exceptions.AMQPError) as error:
            raise NoQueue(f"there is no queue {name}, and it could not be declared ({error!r})") from error
        self._known.add(name)


class AMQPQueue(_PublishingQueue):
    """A queue of RabbitMQ."""

    #: Letters that are on the way at a time; each may be a megabyte.
    _WINDOW = 200

    #: Seconds after which letters are put back and fetched anew: RabbitMQ closes the channel of who keeps one too long,
    #: which is 30 minutes.
    _LONGEST = 600.0

    #: Seconds to wait for letters that the broker has, and does not send.
    _PATIENCE = 10

    def __init__(self, app: CeleryKit, connection: Any) -> None:
        super().__init__(app, connection)
        self._channel: Any = None
        self._unacknowledged = 0
        self._locking: Any = None
        self._expected = 0

    def lock(self, within: float) -> None:
        # A queue that only its connection may use, and that ends with it, however that ends.
        name, deadline = f"{self.name}.lock", time.monotonic() + within
        while True:
            try:
                self._locking = self.connection.channel()
                self._locking.queue_declare(name, exclusive=True, auto_delete=True, durable=False)
            except amqp.exceptions.ResourceLocked:
                if time.monotonic() > deadline:
                    raise LettersLocked(
                        f"Somebody else is walking through {self.name}, and was not done within {within:g} s. "
                        "On RabbitMQ one person can at a time."
                    ) from None
                time.sleep(0.1)
            else:
                return

    def walk(self) -> Iterator[Held]:
        seen: set[int] = set()
        while True:
            until = time.monotonic() + self._LONGEST
            again = bool(seen)
            for held in self._walk():
                if again and hash(held.letter.id) in seen:
                    continue
                seen.add(hash(held.letter.id))
                yield held
                if time.monotonic() > until:
                    break
            else:
                return

    def _walk(self) -> Iterator[Held]:
        self._put_back()
        left = self._expected = self.count()
        arrived: deque[Any] = deque()
        self._channel = channel = self.connection.channel()
        channel.basic_qos(0, self._WINDOW, False)
        while left > 0:
            # Letters that are held count against their consumer, so each window has its own.
            self._unacknowledged = 0
            tag = channel.basic_consume(self.name, callback=arrived.append)
            while left > 0 and self._unacknowledged < self._WINDOW:
                if not arrived and not self._receive():
                    return
                while arrived and left > 0:
                    message = arrived.popleft()
                    left -= 1
                    self._unacknowledged += 1
                    yield Held(letter_in_amqp(message), message.delivery_tag)
            channel.basic_cancel(tag)

    def _receive(self) -> bool:
        """Wait for letters; tell whether there may be more."""
        for _ in range(self._PATIENCE):
            try:
                self.connection.drain_events(timeout=1.0)
            except TimeoutError:
                if self.count() == 0:
                    return False
            else:
                return True
        return False

    def count(self) -> int:
        try:
            with self.connection.channel() as channel:
                return int(channel.queue_declare(self.name, passive=True).message_count)
        except amqp.exceptions.NotFound:
            return 0

    def remove(self, held: Held) -> bool:
        self._channel.basic_ack(held.handle)
        self._unacknowledged -= 1
        self._expected -= 1
        return True

    def replace(self, held: Held, letter: Letter) -> bool:
        self._expected += 1
        return super().replace(held, letter)

    def _put_back(self) -> None:
        """Close the channel, which puts back what it held, and wait until it is there: the next one counts it."""
        if self._channel is None:
            return
        self._channel.close()
        self._channel = None
        deadline = time.monotonic() + 10.0
        while self.count() < self._expected and time.monotonic() < deadline:
            time.sleep(0.01)

    def close(self) -> None:
        # Whatever is wrong with the connection, its end puts everything back.
        with suppress(*self.connection.connection_errors, *self.connection.channel_errors):
            self._put_back()


class OtherQueue(_PublishingQueue):
    """A queue of any other broker that Kombu knows, through what all of them can do."""

    def __init__(self, app: CeleryKit, connection: Any) -> None:
        super().__init__(app, connection)
        self._channel = connection.channel()
        self._held: dict[Any, Any] = {}

    def walk(self) -> Iterator[Held]:
        self._put_back()
        for _ in range(self.count()):
            message = self._channel.basic_get(self.name)
            if message is None:
                return
            self._held[message.delivery_tag] = message
            note = Note.of(message.headers) or Note.made_up(message.headers, message.body)
            yield Held(letter_of(message, note), message.delivery_tag)

    def count(self) -> int:
        try:
            return int(self._channel.queue_declare(self.name, passive=True).message_count)
        except self.connection.channel_errors:
            return 0

    def remove(self, held: Held) -> bool:
        self._held.pop(held.handle).ack()
        return True

    def close(self) -> None:
        self._put_back()

    def _put_back(self) -> None:
        # In the order in which they came.
        while self._held:
            self._held.pop(next(iter(self._held))).reject(requeue=True)
