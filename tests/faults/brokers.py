"""
The brokers, as the tests see them: what they hold, and how they break.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import amqp
import kombu
import psutil
import redis

from celerykit.dev.servers import Server
from tests.services import RabbitMQ, eventually

__all__ = ["Broker", "Rabbit", "Valkey"]


#: Of what Kombu and Celery keep, where no message is: who listens, and what a chord's members came to.
_NO_MESSAGES = ("_kombu.binding", "celery-taskset-meta-")


class Broker(Protocol):
    """
    A broker, and the queue that the shop of one test works on.

    Attributes:
        name:
            As in the table.
    """

    name: str
    url: str
    queue: str
    dead: str

    def held(self) -> dict[str, int]:
        """Say how many messages it holds, by where; dead letters are no messages."""

    def publish(self, body: Any, **properties: Any) -> None:
        """Put a message on the queue as anybody could, past all checks."""

    def refuse_letters(self) -> AbstractContextManager[None]:
        """Take messages, but no dead letters, for as long as this lasts."""

    def start(self) -> None: ...
    def kill(self) -> None: ...

    @property
    def pid(self) -> int | None: ...


@contextmanager
def frozen(broker: Broker) -> Iterator[None]:
    """Stop the broker where it stands; connections stay open, and nobody answers."""
    assert broker.pid
    os.kill(broker.pid, signal.SIGSTOP)
    # It may say something until all its threads stand.
    eventually(lambda: psutil.Process(broker.pid).status() == psutil.STATUS_STOPPED)
    try:
        yield
    finally:
        os.kill(broker.pid, signal.SIGCONT)


def _publish(url: str, queue: str, body: Any, properties: Mapping[str, Any]) -> None:
    with kombu.Connection(url) as connection, connection.Producer(serializer=None) as producer:
        producer.publish(body, exchange="", routing_key=queue, **properties)


class Valkey:
    """Valkey, one for each scene."""

    name = "Valkey"

    def __init__(self, server: Server, *, queue: str, dead: str) -> None:
        self.server = server
        self.queue = queue
        self.dead = dead
        self.url = server.url
        self.start, self.kill = server.start, server.kill

    @property
    def pid(self) -> int | None:
        return self.server.pid

    def held(self) -> dict[str, int]:
        with redis.Redis.from_url(self.server.client_url, socket_timeout=5.0) as client:
            return {name: size for name, size in self._sizes(client) if size}

    def _sizes(self, client: Any) -> Iterator[tuple[str, int]]:
        # Wherever a message may be: also in places that are not Kombu's own.
        for key in client.scan_iter(count=1000):
            name = key.decode(errors="replace")
            if name.startswith((self.dead, *_NO_MESSAGES)) or name.endswith(("pidbox", "_seen")):
                continue
            size = {b"list": client.llen, b"hash": client.hlen, b"zset": client.zcard}.get(client.type(key))
            if size is not None:
                yield name, size(key)

    def publish(self, body: Any, **properties: Any) -> None:
        _publish(self.url, self.queue, body, properties)

    @contextmanager
    def refuse_letters(self) -> Iterator[None]:
        with redis.Redis.from_url(self.server.client_url) as client:
            client.set(self.dead, "is no list")
            yield
            client.delete(self.dead)

    def publish_envelope(self, envelope: Any) -> None:
        """Put something on the queue's list that Kombu did not write."""
        text = envelope if isinstance(envelope, (str, bytes)) else json.dumps(envelope)
        with redis.Redis.from_url(self.server.client_url) as client:
            client.lpush(self.queue, text)


class Rabbit:
    """A RabbitMQ node, shared by the scenes of a session; each has queues of its own."""

    name = "RabbitMQ"

    def __init__(self, node: RabbitMQ, *, queue: str, dead: str) -> None:
        self.node = node
        self.queue = queue
        self.dead = dead
        self.url = node.url
        self._delays = [f"celery_delayed_{level}" for level in range(28)]
        for delay in self._delays:
            self._ask(lambda channel, delay=delay: channel.queue_purge(delay))

    @property
    def pid(self) -> int | None:
        return self.node.pid

    def start(self) -> None:
        self.node.start()

    def kill(self) -> None:
        # A quorum queue that was declared a moment before the node is killed never confirms anything again
        # (RabbitMQ 3.10: 0.3 s after, never within 100 s; 3 s after, always).
        time.sleep(3.0)
        self.node.kill()

    def held(self) -> dict[str, int]:
        # What a worker holds is not counted by RabbitMQ: ask again when it has ended.
        sizes = {name: self._size(name) for name in (self.queue, *self._delays)}
        return {name: size for name, size in sizes.items() if size}

    @contextmanager
    def refuse_letters(self) -> Iterator[None]:
        full = {"durable": True, "auto_delete": False, "arguments": {"x-max-length": 0, "x-overflow": "reject-publish"}}
        self._ask(lambda channel: channel.queue_declare(self.dead, **full).message_count)
        yield
        self._ask(lambda channel: channel.queue_delete(self.dead))

    def _size(self, queue: str) -> int:
        return self._ask(lambda channel: channel.queue_declare(queue, passive=True).message_count)

    def _ask(self, question: Any) -> int:
        with kombu.Connection(self.url, connect_timeout=5.0) as connection:
            try:
                return int(question(connection.default_channel) or 0)
            except amqp.exceptions.NotFound:
                return 0

    def publish(self, body: Any, **properties: Any) -> None:
        _publish(self.url, self.queue, body, properties)
