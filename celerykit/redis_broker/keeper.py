"""
Renews what is held, and gives back what dead workers held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from celerykit.redis_broker.hold import Hold
from celerykit.redis_broker.unacked import Unacked

__all__ = ["Keeper"]


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
        self._ours = Unacked(self._client, channel)
        self._stocks = Unacked(self._client, channel, of_stock=True)

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

    def _restore(self, unacked: Unacked) -> int:
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
