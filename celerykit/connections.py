"""
Connections to the broker, through Kombu, whose every wait ends with the publish it serves.

Celery takes them through ``app.amqp``. Away from a publish, such as in a
worker's consumer, they are Kombu's. How long a publish may take is
`celerykit.deadline`; here it reaches py-amqp's and redis-py's sockets, and
Kombu's pools. Transports that are not known here stay as they are.

Not bounded: how long the operating system takes to find the address of a host.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, cast

import amqp.transport
import kombu
import kombu.connection
import kombu.exceptions
import kombu.messaging
import kombu.pools
from amqp import spec
from kombu.transport import pyamqp

from celerykit import deadline
from celerykit.deadline import DeadlinePassed, DeadlineSocket

__all__ = ["Connection", "Producer", "ProducerPool", "Unroutable", "ending_client", "keeps_to_deadline"]


#: How long others have their turn while Kombu waits, in seconds.
_TURN = 0.05


class Unroutable(Exception):
    """RabbitMQ has no queue for a message that must have one."""


# Kombu


class Connection(kombu.Connection):
    """Kombu's connection, over transports whose waits end."""

    def get_transport_cls(self) -> Any:
        """Give Kombu's class of transports, or one made of it."""
        return _ending(cast("Any", super().get_transport_cls()))

    def Pool(self, limit: int | None = None, **kwargs: Any) -> Any:  # noqa: N802  (Kombu's name)
        """Make a pool of such connections."""
        return _ConnectionPool(cast("Any", self), limit, **kwargs)

    def ensure_connection(self, *args: Any, **kwargs: Any) -> Any:
        """
        Connect, and try again, as Kombu does, which calls a worker's *callback* about once a second meanwhile.

        Kombu's own `sleep` is from before gevent or eventlet took its place, and would hold all greenlets up until
        the broker is back.
        """
        if callback := kwargs.get("callback"):
            kwargs["callback"] = partial(_yielding, callback)
        return super().ensure_connection(*args, **kwargs)


def _yielding(callback: Callable[[], Any]) -> None:
    callback()
    time.sleep(_TURN)


class _PooledConnection(Connection, kombu.connection.PooledConnection):
    """One of a pool."""


class _ConnectionPool(kombu.connection.ConnectionPool):
    """Kombu's pool, for which nobody waits longer than for a publish."""

    def new(self) -> Any:
        pattern: Any = self.connection
        make: Any = _PooledConnection
        return make(self, **pattern.info() | {"transport": pattern.transport_cls})

    def acquire(self, block: bool = False, timeout: float | None = None) -> Any:
        return _acquire(super().acquire, self, block, timeout)


class Producer(kombu.Producer):
    """Kombu's producer, which tries again only while there is time, and leaves no broken connection behind."""

    def publish(self, body: Any, *args: Any, **kwargs: Any) -> Any:
        """Publish, if there is time."""
        if deadline.current() is None:
            return super().publish(body, *args, **kwargs)
        if kwargs.get("retry"):
            kwargs["retry_policy"] = {**(kwargs.get("retry_policy") or {}), "errback": deadline.stop_in_time}
        try:
            return self._publish_anew(partial(super().publish, body, *args, **kwargs))
        except DeadlinePassed:
            # What it still has to say would be taken for the answer to somebody else.
            connection = cast("Any", self).connection
            connection.collect()
            self.revive(connection)
            raise

    def _publish_anew(self, publish: Callable[[], Any]) -> Any:
        try:
            return publish()
        except Unroutable:
            # Somebody deleted the queue since this connection declared it, and took it for there.
            cast("Any", self).connection.declared_entities.clear()
            return publish()


class ProducerPool(kombu.pools.ProducerPool):
    """
    Kombu's pool of producers, for which nobody waits longer than for a publish.

    Args:
        sending:
            What puts a deadline around the wait when none is in force, as for
            the one producer of a whole group.
    """

    Producer = Producer

    def __init__(self, connections: Any, *args: Any, sending: Callable[[], AbstractContextManager[Any]], **kwargs: Any):
        self._sending = sending
        super().__init__(connections, *args, **kwargs)

    def acquire(self, block: bool = False, timeout: float | None = None) -> Any:
        """Take a producer, and wait for one at the most as long as a publish may take."""
        with self._sending() if deadline.current() is None else nullcontext():
            return _acquire(super().acquire, self, block, timeout)

    def prepare(self, p: Any) -> Any:
        """Give a producer a connection."""
        try:
            return super().prepare(p)
        except DeadlinePassed:
            # Kombu would give back the connection it had last, which is somebody else's by now.
            p.__connection__ = None
            raise


def _acquire(acquire: Any, pool: Any, block: bool, timeout: float | None) -> Any:
    try:
        return acquire(block=block, timeout=deadline.left(timeout))
    except kombu.exceptions.LimitExceeded as error:
        if block and deadline.current() is not None:
            raise DeadlinePassed(
                f"all {pool.limit} connections to it were in use; broker_pool_limit says how many there are"
            ) from error
        raise


# Transports


def keeps_to_deadline(connection: Any) -> bool:
    """Tell whether the sockets of *connection* keep to the deadline, and note when a message leaves."""
    return bool(getattr(connection.transport, "keeps_to_deadline", False))


@cache
def _ending(transport: Any) -> Any:
    """Give a transport's class with sockets that keep to the deadline, if we know how."""
    if transport in (pyamqp.Transport, pyamqp.SSLTransport):
        return type(transport.__name__, (_Sharing, transport), {"Connection": _AMQPConnection})
    if transport.__module__ == "kombu.transport.redis":
        return _ending_redis(transport)
    # Somebody else's, or a worker's own (`celerykit.redis_broker`), which publishes nothing.
    return transport


class _Sharing:
    """For a transport of Kombu: a broker that is silent leaves time for the next in a list of them."""

    keeps_to_deadline = True
    client: Any

    def establish_connection(self) -> Any:
        stock: Any = super()
        with deadline.share_of(len(self.client.alt)):
            return stock.establish_connection()


class _Ending:
    """For a transport of py-amqp."""

    def _setup_transport(self) -> None:
        stock: Any = super()
        stock._setup_transport()
        self.sock: Any = DeadlineSocket(self.sock)
        self._quick_recv = self.sock.recv

    def _connect(self, host: str, port: int, timeout: float | None) -> None:
        stock: Any = super()
        stock._connect(host, port, _for_each_address(host, port, timeout))


class _TCPTransport(_Ending, amqp.transport.TCPTransport):
    def _setup_transport(self) -> None:
        super()._setup_transport()
        self._write = self.sock.sendall


class _SSLTransport(_Ending, amqp.transport.SSLTransport):
    pass


def _for_each_address(host: Any, port: Any, timeout: float | None) -> float | None:
    """Share what is left of a deadline among the addresses of *host*, which are tried in turn."""
    if deadline.current() is None or host is None:
        return deadline.left(timeout)
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return cast("float", deadline.left(timeout)) / max(1, len(addresses))


class _AMQPChannel(pyamqp.Channel):
    """Knows when a message leaves, and when it came back."""

    _returned: str | None = None

    def send_method(self, sig: Any, *args: Any, **kwargs: Any) -> Any:
        with deadline.leaving(sig == spec.Basic.Publish):
            return super().send_method(sig, *args, **kwargs)

    def basic_publish_confirm(self, *args: Any, **kwargs: Any) -> Any:
        """
        Publish, and wait for the broker's word.

        Raises:
            Unroutable: It was ``mandatory`` and there is no queue for it.
        """
        self._returned = None
        publish = deadline.current()
        may_be_there = publish is not None and publish.sent
        # py-amqp raises for what comes back, before it has read that the broker is done with it.
        cast("Any", self).events["basic_return"].add(self._on_returned)
        confirmed = super().basic_publish_confirm(*args, **kwargs)
        if self._returned is not None:
            if publish is not None:
                publish.sent = may_be_there
            raise Unroutable(self._returned)
        return confirmed

    def _on_returned(self, error: Exception, exchange: str, routing_key: str, message: Any) -> None:
        self._returned = f"no queue gets what is sent to exchange {exchange!r} with routing key {routing_key!r}"


class _AMQPConnection(pyamqp.Connection):
    """py-amqp's connection, over sockets that keep to the deadline."""

    Channel = _AMQPChannel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("on_blocked", _on_blocked)
        super().__init__(*args, **kwargs)

    def Transport(self, host: str, connect_timeout: Any, ssl: Any = False, *args: Any, **kwargs: Any) -> Any:  # noqa: N802
        make: Any = _SSLTransport if ssl else _TCPTransport
        options = dict(zip(("read_timeout", "write_timeout"), args, strict=False)) | kwargs
        return make(host, connect_timeout=deadline.left(connect_timeout), ssl=ssl, **options)

    def connect(self, callback: Any = None) -> Any:
        try:
            return super().connect(callback)
        except DeadlinePassed:
            self.collect()
            raise


def _on_blocked(reason: str) -> None:
    if (publish := deadline.current()) is not None:
        publish.blocked = True


@cache
def ending_client(connection: Any) -> Any:
    """Give a class of redis-py's connections, whose sockets keep to the deadline."""

    class EndingConnection(connection):  # type: ignore[misc]
        def _connect(self) -> Any:
            client: Any = self
            before = client.socket_connect_timeout
            # A Unix socket's has neither.
            host, port = getattr(self, "host", None), getattr(self, "port", None)
            client.socket_connect_timeout = _for_each_address(host, port, before)
            try:
                return DeadlineSocket(super()._connect())
            finally:
                client.socket_connect_timeout = before

        def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
            # In the middle of sending a command, when the connection was lost.
            with deadline.leaving(False):
                super().connect_check_health(*args, **kwargs)

    EndingConnection.__name__ = connection.__name__
    return EndingConnection


def _ending_redis(transport: Any) -> Any:
    """Give a class of Kombu's Redis transports, whose clients' sockets keep to the deadline."""
    # Imported when there is a Redis: redis-py takes its time.
    from redis import UnixDomainSocketConnection

    stock = transport.Channel

    class Channel(stock):  # type: ignore[misc, valid-type]
        connection_class = ending_client(stock.connection_class)
        connection_class_ssl = ending_client(stock.connection_class_ssl)

        def _connparams(self, asynchronous: bool = False) -> Any:
            found = super()._connparams(asynchronous)
            if found["connection_class"] is UnixDomainSocketConnection:
                found["connection_class"] = ending_client(UnixDomainSocketConnection)
            return found

        def basic_publish(self, *args: Any, **kwargs: Any) -> Any:
            with deadline.leaving():
                return super().basic_publish(*args, **kwargs)

    return type(transport.__name__, (_Sharing, transport), {"Channel": Channel})
