"""
Takes messages: pops them, notes them in a `Hold`, and acknowledges them.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any, NamedTuple

import redis
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.json import dumps

from celerykit import events
from celerykit.redis_broker.hold import Hold, Loose
from celerykit.redis_broker.message import Garbage, TakenMessage
from celerykit.redis_broker.unacked import Unacked

__all__ = ["OUR_KEYS", "Channel"]

#: Before the names of Kombu's keys: what our workers have taken is not what stock workers have taken.
OUR_KEYS = "celerykit."

#: celery-types knows less of it.
_StockQoS: Any = getattr(stock, "QoS", object)


class _Popped(NamedTuple):
    key: str
    queue: str
    item: bytes
    #: Under which it is noted already; empty if it is not.
    tag: str = ""


class _QoS(_StockQoS):  # type: ignore[misc]
    """Kombu's book of what was taken: leased, and kept in a `Hold` too."""

    def __init__(self, channel: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(channel, *args, **kwargs)
        self._connection = channel.connection.client
        self._hold: Hold = self._connection.hold
        self._kept: tuple[Any, Unacked] | None = None

    def append(self, message: Any, delivery_tag: str) -> None:
        if not message.is_noted:
            self._note(message, delivery_tag)
        virtual.QoS.append(self, message, delivery_tag)

    def _note(self, message: Any, delivery_tag: str) -> None:
        self._hold.take(delivery_tag, by=self._connection)
        try:
            self._unacked().take(delivery_tag, message._raw, queue=message.queue, lease=self._hold.microseconds)
        except Exception:
            self._hold.drop(delivery_tag)
            self._hold.loose.append(Loose(message.key, dumps(message._raw), delivery_tag, is_first=True))
            raise

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
        self.channel.forget_what_was_asked_for()
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

    def asking(self, tag: str, lists: Any) -> list[Any]:
        """Give the command that takes and notes a message; it is held from now on, whenever the answer comes."""
        self._hold.take(tag, by=self._connection)
        return self._unacked().asking(tag, lists, lease=self._hold.microseconds)

    def got_nothing(self, tag: str) -> None:
        """Forget a tag under which nothing was taken."""
        self._hold.drop(tag)

    def got_lost(self, tag: str) -> None:
        """Give back what may have been taken under a tag, whose answer nobody will read."""
        self._hold.drop(tag)
        self._hold.unwanted.append(tag)

    def _unacked(self) -> Unacked:
        # Clients are slow to make, and Kombu makes one for each message. A channel that was closed has another pool.
        pool = self.channel.pool
        if self._kept is None or self._kept[0] is not pool:
            self._kept = pool, Unacked(redis.Redis(connection_pool=pool), self.channel)
        return self._kept[1]

    def _tried(self, do: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        """Tell whether this channel could do it: not one that is closed, or whose server is away."""
        if getattr(self.channel.connection, "client", None) is None:
            return False
        try:
            do(*args, **kwargs)
        except (*self.channel.connection_errors, redis.RedisError) as error:
            events.LEASES_LATER.tell(error=type(error).__name__)
            return False
        return True


class Channel:
    """Mixed with a channel of Kombu's Redis transport: lets nothing in that is not a message, and loses nothing."""

    Message = TakenMessage
    QoS = _QoS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._getting = ""
        #: The tag that was sent along with a question that is not answered yet.
        self._asked = ""
        self._is_to_wait = False
        kombus: Any = super()
        kombus.__init__(*args, **kwargs)
        channel: Any = self
        self.stock_keys: tuple[str, str] = channel.unacked_index_key, channel.unacked_key
        self.unacked_index_key, self.unacked_key = (OUR_KEYS + key for key in self.stock_keys)

    def _create_client(self, asynchronous: bool = False) -> Any:
        kombus: Any = super()
        client = kombus._create_client(asynchronous)
        client.set_response_callback("BRPOP", self._on_brpop)
        client.set_response_callback("RPOP", self._on_rpop)
        return client

    def _brpop_start(self, timeout: Any = None) -> Any:
        """
        Ask for a message: by a script, which also notes it; only if there is none, by Kombu's ``BRPOP``, which waits.

        What ``BRPOP`` takes is noted a moment later, so a worker that is killed in that moment loses it. Under load
        that moment would come with every message.
        """
        channel: Any = self
        kombus: Any = super()
        queues = channel._queue_cycle.consume(len(channel.active_queues))
        self.forget_what_was_asked_for()
        if self._is_to_wait or not queues:
            self._is_to_wait = False
            return kombus._brpop_start(timeout)
        self._asked = channel._next_delivery_tag()
        lists = [
            (channel._q_for_pri(queue, priority), queue) for priority in channel.priority_steps for queue in queues
        ]
        command = channel.qos.asking(self._asked, lists)
        channel._in_poll = channel.client.connection
        channel._brpop_sent_at = monotonic()
        return channel.client.connection.send_command(*command)

    def forget_what_was_asked_for(self) -> None:
        """Give back what a question may have taken that was never answered: its connection is gone."""
        asked, self._asked = self._asked, ""
        if asked:
            channel: Any = self
            channel.qos.got_lost(asked)

    def _on_brpop(self, reply: Any, **options: Any) -> Any:
        asked, self._asked = self._asked, ""
        if not reply:
            # To the script at once, to the other after a while: next comes the other.
            self._is_to_wait = bool(asked)
            if asked:
                channel: Any = self
                channel.qos.got_nothing(asked)
            return None
        self._remember(reply[0].decode("utf-8", "replace"), reply[1], tag=asked)
        return tuple(reply)

    def _on_rpop(self, reply: Any, **options: Any) -> Any:
        if reply:
            channel: Any = self
            self._remember(channel.global_keyprefix + self._getting, reply)
        return reply

    def _remember(self, key: str, item: bytes, *, tag: str = "") -> None:
        """Keep what has left its list, until it is known to be a message."""
        channel: Any = self
        queue = key.removeprefix(channel.global_keyprefix).rsplit(channel.sep, 1)[0]
        channel.connection.popped = _Popped(key, queue, item, tag)

    def _brpop_read(self, **options: Any) -> Any:
        kombus: Any = super()
        return self._popping(kombus._brpop_read, **options)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """Take a message, unless there is none."""
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
            hold.drop(popped.tag)
            if not hold.hand_over(popped.queue, popped.item, error):
                # Last in line, and by the thread: it must not come back at once, again and again.
                hold.loose.append(Loose(popped.key, popped.item, tag=popped.tag, is_first=False))
            elif popped.tag:
                hold.finished.append(popped.tag)
            return None

    def _deliver_fanout_message(self, message: Any, exchange: str) -> Any:
        kombus: Any = super()
        try:
            return kombus._deliver_fanout_message(message, exchange)
        except Garbage as error:
            events.GARBAGE_IGNORED.tell(exchange=exchange, error=error)
            return False
