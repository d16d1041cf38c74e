"""
The worker's side of Kombu's Redis transport: what it has taken stays its own while it lives, and not longer.

All that is private in ``kombu.transport.redis`` is used here and nowhere else.
Where Kombu is one that we do not know, `guard` leaves it as it is.

Kombu notes each message that was taken in a hash, and in a sorted set by the
time it was taken, and gives back what was taken too long ago. Here the sorted
set says until when a message is leased, by the server's clock, and the keys are
our own: stock workers, which renew nothing, keep theirs beside them.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import kombu
import redis
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.json import dumps, loads
from redis.backoff import NoBackoff
from redis.retry import Retry

__all__ = ["Connection", "Garbage", "Hold", "Keeper", "OnGarbage", "guard", "whats_unknown"]

log = logging.getLogger(__name__)

_kombu: Any = kombu

#: Before the names of Kombu's keys: what our workers have taken is not what stock workers have taken.
_OURS = "celerykit."

#: Kombu's minor versions that this was tried with.
KNOWN = {(5, 7)}

#: What is used of Kombu beyond its documentation.
NEEDED: Mapping[str, tuple[str, ...]] = {
    "Channel": (
        "_brpop_read",
        "_create_client",
        "_deliver_fanout_message",
        "_do_restore_message",
        "_get_message_priority",
        "_get_pool",
        "_next_delivery_tag",
        "_q_for_pri",
        "basic_get",
        "from_transport_options",
        "global_keyprefix",
        "keyprefix_queue",
        "pool",
        "sep",
        "typeof",
        "unacked_index_key",
        "unacked_key",
        "visibility_timeout",
    ),
    "QoS": ("ack", "append", "reject", "restore_by_tag", "restore_unacked", "restore_visible", "_delivered"),
    "Transport": ("Channel", "driver_type"),
}

#: Called with the queue, what lay in it, and what is wrong with that. If it raises, the item goes back.
OnGarbage = Callable[[str, bytes, Exception], Any]


def whats_unknown() -> str:
    """Say what about this Kombu is unknown to us; nothing if it is as we know it."""
    version = tuple(_kombu.VERSION[:2])
    missing = [
        f"{name}.{attribute}"
        for name, attributes in NEEDED.items()
        for attribute in attributes
        if not hasattr(getattr(stock, name, None), attribute)
    ]
    if missing:
        return f"its Redis transport has no {', '.join(missing)}"
    return "" if version in KNOWN else "celerykit was not tried with it"


class Garbage(Exception):
    """An item in a queue that is not a message."""


# What is held


class Loose(NamedTuple):
    """An item that is in no list, and under which tag it may have been noted."""

    key: str
    item: Any
    tag: str
    is_first: bool


class Hold:
    """
    What a worker has taken and not finished, over all its connections. Safe from any thread.

    Args:
        lease:
            Seconds that a message stays this worker's after its last sign of life.

        on_garbage:
            What to do with items that are not messages. Called where the
            queue is read, and from the thread of a `Keeper`.

        running:
            Gives the tags of messages that would go on running here if they were given back.
    """

    def __init__(
        self,
        *,
        lease: float,
        on_garbage: OnGarbage | None = None,
        running: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self.lease = lease
        self.on_garbage = on_garbage
        self.running = running
        #: Tags, newest first, that are to be given back, and those to be acknowledged, where a connection could not.
        self.unwanted: deque[str] = deque()
        self.finished: deque[str] = deque()
        self.loose: deque[Loose] = deque()
        self._tags: dict[str, object] = {}
        self._idle: set[str] = set()
        self._lock = threading.Lock()

    @property
    def microseconds(self) -> int:
        """The lease."""
        return int(self.lease * 1_000_000)

    def take(self, tag: str, *, by: object) -> None:
        """Note a message that came by a connection."""
        with self._lock:
            self._tags[tag] = by

    def drop(self, tag: str) -> bool:
        """Forget it, and tell whether it was held."""
        with self._lock:
            return self._tags.pop(tag, None) is not None

    def tags(self) -> list[str]:
        """List what is held: prefetched, waiting for its time, running. Oldest first."""
        with self._lock:
            return list(self._tags)

    def leave(self, connection: object) -> None:
        """
        Give back what came by other connections than this one, unless it runs: nobody will start it here.

        Only what was seen so the last time too: a task that ends at this
        moment runs no more, and is not acknowledged yet.
        """
        with self._lock:
            others = [tag for tag, by in self._tags.items() if by is not connection]
        running = self.running() if others else ()
        idle = [tag for tag in others if tag not in running]
        for tag in reversed(idle):
            if tag in self._idle and self.drop(tag):
                self.unwanted.append(tag)
        self._idle = set(idle)

    def hand_over(self, queue: str, item: bytes, error: Exception) -> bool:
        """Give an item that is no message to whom it concerns, and tell whether that took it."""
        if self.on_garbage is None:
            return False
        try:
            self.on_garbage(queue, item, error)
        except Exception:  # (an edge: whatever it is, the item must not be lost)
            log.exception("garbage.kept queue=%s", queue)
            return False
        return True


# Taking


class Connection(kombu.Connection):
    """
    A connection that a worker takes messages by.

    Mixed with the class of the connection it is made from, see `guard`.
    """

    hold: Hold

    def get_transport_cls(self) -> Any:
        """Give the class of the broker's transport, with a channel of ours if it is Redis."""
        found: Any = super().get_transport_cls()
        # After a failover it may be another broker's.
        return _guarding(found) if _is_redis(found) else found

    def clone(self, **kwargs: Any) -> Any:
        """Make another one, whose messages are noted in the same hold."""
        copy: Any = super().clone(**kwargs)
        copy.hold = self.hold
        return copy


def guard(connection: Any, hold: Hold) -> Any:
    """
    Return a connection like this one, not yet connected, whose messages are noted in *hold*.

    One to another broker, or by a Kombu that we do not know, is returned as it is.
    """
    if not _is_redis(connection.get_transport_cls()):
        return connection
    if unknown := whats_unknown():
        log.warning(
            "leases.off: this is Kombu %s, and %s. A dead worker's messages come back after Celery's "
            "visibility_timeout; what takes longer than that runs twice.",
            _kombu.__version__,
            unknown,
        )
        return connection
    kind: Any = type(connection)
    guarded = _mixed(kind)(**connection.info() | {"transport": connection.transport_cls})
    guarded.hold = hold
    return guarded


@cache
def _mixed(connection: Any) -> Any:
    return type(connection.__name__, (Connection, connection), {})


@cache
def _guarding(transport: Any) -> Any:
    channel = type("Channel", (_Channel, transport.Channel), {})
    return type(transport.__name__, (transport,), {"Channel": channel, "popped": None})


def _is_redis(transport: Any) -> bool:
    return getattr(transport, "driver_type", None) == "redis"


class _Popped(NamedTuple):
    key: str
    queue: str
    item: bytes


#: celery-types knows less of them.
_StockMessage: Any = virtual.Message
_StockQoS: Any = getattr(stock, "QoS", object)


class _Message(_StockMessage):  # type: ignore[misc]
    """A message that knows the queue it was taken from, as its ``queue``."""

    def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None:
        transport = channel.connection
        try:
            _check(payload)
            # Anew for each delivery: a worker that was away for too long must not renew or acknowledge
            # what is another's by now.
            payload["properties"]["delivery_tag"] = channel._next_delivery_tag()
            super().__init__(payload, channel=channel, **kwargs)
        except Exception as error:
            raise Garbage(f"it is not a message: {type(error).__name__}: {error}") from error
        popped, transport.popped = transport.popped, None
        self.queue = popped.queue if popped else None
        self.key = popped.key if popped else None


def _check(payload: Any) -> None:
    """Refuse what Kombu would fall over, now or later."""
    _must_be(Mapping, "envelope", payload)
    properties = _must_be(Mapping, "properties", payload.get("properties"))
    delivery = _must_be(Mapping, "delivery_info", properties.get("delivery_info"))
    _must_be((str, int), "delivery_tag", properties.get("delivery_tag"))
    for name in ("exchange", "routing_key"):
        _must_be(str, name, delivery.get(name))
    _must_be(Mapping, "headers", payload.get("headers") or {})
    _must_be((str, bytes), "body", payload.get("body") or "")


def _must_be(kind: Any, name: str, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is missing" if value is None else f"{name} is of type {type(value).__name__}")
    return value


class _QoS(_StockQoS):  # type: ignore[misc]
    """Kombu's book of what was taken: leased, and kept in a `Hold` too."""

    def __init__(self, channel: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(channel, *args, **kwargs)
        self._connection = channel.connection.client
        self._hold: Hold = self._connection.hold
        self._kept: tuple[Any, _Unacked] | None = None

    def append(self, message: Any, delivery_tag: str) -> None:
        self._hold.take(delivery_tag, by=self._connection)
        try:
            self._unacked().take(delivery_tag, message._raw, queue=message.queue, lease=self._hold.microseconds)
        except Exception:
            self._hold.drop(delivery_tag)
            self._hold.loose.append(Loose(message.key, dumps(message._raw), delivery_tag, is_first=True))
            raise
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        self._hold.drop(delivery_tag)
        if not self._tried(lambda: self._unacked().acknowledge([delivery_tag])):
            self._hold.finished.append(delivery_tag)
        virtual.QoS.ack(self, delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        self._hold.drop(delivery_tag)
        if not self._tried(super().reject, delivery_tag, requeue=requeue):
            (self._hold.unwanted if requeue else self._hold.finished).append(delivery_tag)
            virtual.QoS.ack(self, delivery_tag)

    def restore_unacked(self, client: Any = None) -> None:
        running = self._hold.running()
        # The last one that is given back is the first in line.
        back = [tag for tag in reversed(list(self._delivered)) if tag not in running]
        for tag in back:
            self._hold.drop(tag)
        if not self._tried(lambda: self._unacked().give_back(back)):
            self._hold.unwanted.extend(back)
        self._delivered.clear()

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: a `Keeper` does it, also while the event loop stands still."""

    def _unacked(self) -> _Unacked:
        # Clients are slow to make, and Kombu makes one for each message. A channel that was closed has another pool.
        pool = self.channel.pool
        if self._kept is None or self._kept[0] is not pool:
            self._kept = pool, _Unacked(redis.Redis(connection_pool=pool), self.channel)
        return self._kept[1]

    def _tried(self, do: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        """Tell whether this channel could do it: not one that is closed, or whose server is away."""
        if getattr(self.channel.connection, "client", None) is None:
            return False
        try:
            do(*args, **kwargs)
        except (*self.channel.connection_errors, redis.RedisError) as error:
            log.info("leases.later: %s", type(error).__name__)
            return False
        return True


class _Channel:
    """Mixed with a channel of Kombu's Redis transport: lets nothing in that is not a message, and loses nothing."""

    Message = _Message
    QoS = _QoS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._getting = ""
        kombus: Any = super()
        kombus.__init__(*args, **kwargs)
        channel: Any = self
        self.stock_keys: tuple[str, str] = channel.unacked_index_key, channel.unacked_key
        self.unacked_index_key, self.unacked_key = (_OURS + key for key in self.stock_keys)

    def _create_client(self, asynchronous: bool = False) -> Any:
        kombus: Any = super()
        client = kombus._create_client(asynchronous)
        client.set_response_callback("BRPOP", self._on_brpop)
        client.set_response_callback("RPOP", self._on_rpop)
        return client

    def _on_brpop(self, reply: Any, **options: Any) -> Any:
        if not reply:
            return None
        self._remember(reply[0].decode("utf-8", "replace"), reply[1])
        return tuple(reply)

    def _on_rpop(self, reply: Any, **options: Any) -> Any:
        if reply:
            channel: Any = self
            self._remember(channel.global_keyprefix + self._getting, reply)
        return reply

    def _remember(self, key: str, item: bytes) -> None:
        """Keep what has left its list, until it is known to be a message."""
        channel: Any = self
        queue = key.removeprefix(channel.global_keyprefix).rsplit(channel.sep, 1)[0]
        channel.connection.popped = _Popped(key, queue, item)

    def _brpop_read(self, **options: Any) -> Any:
        kombus: Any = super()
        return self._popping(kombus._brpop_read, **options)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        kombus: Any = super()
        self._getting = queue
        return self._popping(kombus.basic_get, queue, no_ack=no_ack, **kwargs)

    def _popping(self, pop: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        channel: Any = self
        transport = channel.connection
        transport.popped = None
        try:
            return pop(*args, **kwargs)
        except Exception as error:
            popped, transport.popped = transport.popped, None
            if popped is None:
                # Not of the item: of the connection, or of who received a message.
                raise
            hold = transport.client.hold
            if not hold.hand_over(popped.queue, popped.item, error):
                # Last in line, and by the thread: it must not come back at once, again and again.
                hold.loose.append(Loose(popped.key, popped.item, tag="", is_first=False))
            return None

    def _deliver_fanout_message(self, message: Any, exchange: str) -> Any:
        kombus: Any = super()
        try:
            return kombus._deliver_fanout_message(message, exchange)
        except Garbage as error:
            log.warning("garbage.ignored exchange=%s: %s", exchange, error)
            return False


# Keys and scripts


#: Microseconds, by the server's clock: those of hosts differ.
_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function text(number) return string.format('%.0f', number) end
"""

_TAKE = f"""{_NOW}
redis.call('ZADD', KEYS[1], text(now + ARGV[2]), ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
"""

#: Later by a microsecond each, so that they keep their order.
_RENEW = f"""{_NOW}
for i = 2, #ARGV do
    redis.call('ZADD', KEYS[1], 'XX', text(now + ARGV[1] + i), ARGV[i])
end
return text(now)
"""

#: How long the server has been seen without a gap.
_SEEN = f"""{_NOW}
local seen = redis.call('HGET', KEYS[1], 'seen')
if not seen or now - seen > tonumber(ARGV[1]) then redis.call('HSET', KEYS[1], 'since', text(now)) end
redis.call('HSET', KEYS[1], 'seen', text(now))
return text(now - redis.call('HGET', KEYS[1], 'since'))
"""

#: A few, newest first, with their messages, up to some megabytes.
_EXPIRED = f"""{_NOW}
local before = string.format('%.6f', (now - ARGV[2]) / ARGV[1])
local found = redis.call('ZRANGE', KEYS[1], before, '-inf', 'BYSCORE', 'REV', 'LIMIT', 0, 100, 'WITHSCORES')
local rows, size = {{}}, 0
for i = 1, #found, 2 do
    local message = redis.call('HGET', KEYS[2], found[i])
    rows[#rows + 1] = {{found[i], found[i + 1], message}}
    size = size + (message and #message or 0)
    if size > 4000000 then break end
end
return rows
"""

#: Unless it was renewed, given back or acknowledged in the meantime.
_GIVE_BACK = """
local score = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not score or (ARGV[2] ~= '' and tonumber(score) > tonumber(ARGV[2])) then return 0 end
redis.call('ZREM', KEYS[1], ARGV[1])
if redis.call('HDEL', KEYS[2], ARGV[1]) == 1 then
    for i = 3, #KEYS do redis.call('RPUSH', KEYS[i], ARGV[3]) end
end
return 1
"""

_PUT_BACK = """
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call(ARGV[2], KEYS[3], ARGV[3])
"""


class _Row(NamedTuple):
    tag: str
    #: As it was read; empty if it does not matter.
    score: str
    #: JSON of the envelope, the exchange and the routing key.
    message: bytes | None


class _Unacked:
    """The messages that were taken by our workers, or by *stock* ones: a sorted set, and a hash."""

    def __init__(self, client: Any, channel: Any, *, of_stock: bool = False) -> None:
        self._client = client
        self._channel = channel
        index, messages = channel.stock_keys if of_stock else (channel.unacked_index_key, channel.unacked_key)
        self._prefix: str = channel.global_keyprefix
        self.keys = self._prefix + index, self._prefix + messages
        self._of_stock = of_stock

    def take(self, tag: str, raw: Any, *, queue: str, lease: int) -> None:
        """Note a message. No exchange, and its queue: it goes back to that one only, whatever is bound to what."""
        self._client.eval(_TAKE, 2, *self.keys, tag, lease, dumps([raw, "", queue]))

    def renew(self, tags: Sequence[str], *, lease: int) -> int:
        """Lease them anew, those that are still there, and give the server's time."""
        now = 0
        for some in _by(1000, tags) or [()]:
            now = int(self._client.eval(_RENEW, 1, self.keys[0], lease, *some))
        return now

    def seen(self, *, gap: int) -> int:
        """Say for how long workers have seen this server without a gap."""
        return int(self._client.eval(_SEEN, 1, f"{self.keys[0]}_seen", gap))

    def expired(self) -> list[_Row]:
        """Give some of what is leased no more, or was taken by a stock worker too long ago."""
        # Kombu scores by seconds, and by when it was taken.
        unit, age = (1_000_000, int(self._channel.visibility_timeout * 1_000_000)) if self._of_stock else (1, 0)
        rows = self._client.eval(_EXPIRED, 2, *self.keys, unit, age)
        return [_Row(tag.decode(), score.decode(), message) for tag, score, message in rows]

    def acknowledge(self, tags: Sequence[str]) -> None:
        """Forget them."""
        for some in _by(1000, tags):
            with self._client.pipeline() as pipe:
                pipe.zrem(self.keys[0], *some).hdel(self.keys[1], *some).execute()

    def give_back(self, tags: Sequence[str]) -> None:
        """Put them back in line, the last one first."""
        for some in _by(100, tags):
            messages = self._client.hmget(self.keys[1], some)
            self.restore([_Row(tag, "", message) for tag, message in zip(some, messages, strict=True)])

    def put_back(self, items: Sequence[Loose]) -> None:
        """Put items back that are in no list."""
        for key, item, tag, is_first in items:
            self._client.eval(_PUT_BACK, 3, *self.keys, key, tag, "RPUSH" if is_first else "LPUSH", item)

    def restore(self, rows: Sequence[_Row]) -> tuple[int, list[tuple[_Row, Exception]]]:
        """Put rows back in line, and give how many, and those for which there is no line."""
        failed: list[tuple[_Row, Exception]] = []
        with self._client.pipeline(transaction=False) as pipe:
            for row in rows:
                try:
                    lists, item = self._restored(row.message)
                except (redis.RedisError, OSError):
                    raise
                except Exception as error:  # noqa: BLE001  (anything may be wrong with what others have written)
                    failed.append((row, error))
                    continue
                keys = *self.keys, *lists
                pipe.eval(_GIVE_BACK, len(keys), *keys, row.tag, row.score, item)
            return sum(pipe.execute()), failed

    def _restored(self, message: bytes | None) -> tuple[list[str], str]:
        """Give the lists to put a message in, and how it is written there."""
        if message is None:
            return [], ""
        raw, exchange, routing_key = loads(message.decode())
        for part in (raw.get("headers"), raw["properties"].get("delivery_info")):
            if isinstance(part, dict):
                part["redelivered"] = True
        priority = self._channel._get_message_priority(raw, reverse=False)
        lists = [self._channel._q_for_pri(queue, priority) for queue in self._queues(exchange, routing_key)]
        return [self._prefix + name for name in lists], dumps(raw)

    def _queues(self, exchange: str, routing_key: str) -> Collection[str]:
        if not exchange:
            return [routing_key]
        key = self._prefix + self._channel.keyprefix_queue % exchange
        bindings = [tuple(row.decode().split(self._channel.sep)) for row in self._client.smembers(key)]
        queues: Collection[str] = self._channel.typeof(exchange).lookup(bindings, exchange, routing_key, None)
        if not queues:
            raise LookupError(f"no queue is bound to exchange {exchange!r} with routing key {routing_key!r}")
        return queues


class Keeper:
    """
    Renews what is held, and gives back what dead workers held. Over a client of its own, from any one thread.

    Args:
        channel:
            One of a guarded connection, for where the server is and what its keys are called.

        timeout:
            Seconds to wait for the server.
    """

    def __init__(self, channel: Any, hold: Hold, *, timeout: float) -> None:
        self._hold = hold
        self._connection = channel.connection.client
        self._client = _client_for(channel, timeout)
        self._ours = _Unacked(self._client, channel)
        self._stocks = _Unacked(self._client, channel, of_stock=True)

    def renew(self) -> int:
        """
        Do what a lost connection could not, and renew the rest.

        Returns:
            The server's time, in microseconds.
        """
        self._hold.leave(self._connection)
        self._drain(self._hold.finished, self._ours.acknowledge)
        self._drain(self._hold.unwanted, self._ours.give_back)
        self._drain(self._hold.loose, self._ours.put_back)
        return self._ours.renew(self._hold.tags(), lease=self._hold.microseconds)

    def sweep(self) -> int:
        """
        Give back some of what is leased no more, and say how many.

        Not when the server was away a moment ago: then nobody could renew,
        and everybody has to be given the time to.
        """
        lease = self._hold.microseconds
        if self._ours.seen(gap=lease) < lease:
            return 0
        return sum(self._restore(unacked) for unacked in (self._ours, self._stocks))

    def close(self) -> None:
        """Let the connection go."""
        self._client.connection_pool.disconnect()

    def _restore(self, unacked: _Unacked) -> int:
        rows = unacked.expired()
        if not rows:
            return 0
        restored, failed = unacked.restore(rows)
        for row, error in failed:
            if self._hold.hand_over("", row.message or b"", error):
                unacked.acknowledge([row.tag])
        return restored

    def _drain(self, waiting: deque[Any], do: Callable[[list[Any]], Any]) -> None:
        some = list(islice(waiting, len(waiting)))
        if some:
            do(some)
        for _ in some:
            waiting.popleft()


def _client_for(channel: Any, timeout: float) -> Any:
    """Make a client from what the channel knows: sockets, TLS, sentinels, credentials."""
    before = channel._sentinel_manager
    pool = channel._get_pool()
    sentinels, channel._sentinel_manager = channel._sentinel_manager, before
    limits = {"socket_timeout": timeout, "socket_connect_timeout": timeout, "retry": Retry(NoBackoff(), 0)}
    others = [sentinel.connection_pool for sentinel in sentinels.sentinels] if sentinels is not before else []
    for one in (pool, *others):
        one.connection_kwargs.update(limits)
    return redis.Redis(connection_pool=pool)


def _by(size: int, items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
