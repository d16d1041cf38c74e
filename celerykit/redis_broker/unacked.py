"""
What was taken and not acknowledged, as it is kept in Redis: keys and scripts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import redis
from kombu.utils.json import dumps, loads

from celerykit.redis_broker.hold import Loose

__all__ = ["Row", "Unacked"]

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

#: Takes from the first of several lists that has something, and notes it, in one step: nothing is lost in between.
TAKE_FIRST = f"""{_NOW}
for i = 3, #KEYS do
    local item = redis.call('RPOP', KEYS[i])
    if item then
        redis.call('ZADD', KEYS[1], text(now + ARGV[2]), ARGV[1])
        redis.call('HSET', KEYS[2], ARGV[1], '[' .. item .. ',"",' .. ARGV[i] .. ']')
        return {{KEYS[i], item}}
    end
end
return false
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


class Row(NamedTuple):
    """A message that was taken."""

    tag: str
    #: As it was read; empty if it does not matter.
    score: str
    #: JSON of the envelope, the exchange and the routing key.
    message: bytes | None


class Unacked:
    """The messages that were taken by our workers, or by *stock* ones: a sorted set, and a hash."""

    def __init__(self, client: Any, channel: Any, *, of_stock: bool = False) -> None:
        self._client = client
        self._channel = channel
        index, messages = channel.stock_keys if of_stock else (channel.unacked_index_key, channel.unacked_key)
        self._prefix: str = channel.global_keyprefix
        self.keys = self._prefix + index, self._prefix + messages
        self._of_stock = of_stock

    def asking(self, tag: str, lists: Sequence[tuple[str, str]], *, lease: int) -> list[Any]:
        """
        Give the command that takes the next message: its reply is like that of ``BRPOP``, without the wait.

        Args:
            lists:
                Keys, and the queue that each belongs to.
        """
        keys = [*self.keys, *(self._prefix + key for key, _ in lists)]
        return ["EVAL", TAKE_FIRST, len(keys), *keys, tag, lease, *(dumps(queue) for _, queue in lists)]

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

    def expired(self) -> list[Row]:
        """Give some of what is leased no more, or was taken by a stock worker too long ago."""
        # Kombu scores by seconds, and by when it was taken.
        unit, age = (1_000_000, int(self._channel.visibility_timeout * 1_000_000)) if self._of_stock else (1, 0)
        rows = self._client.eval(_EXPIRED, 2, *self.keys, unit, age)
        return [Row(tag.decode(), score.decode(), message) for tag, score, message in rows]

    def acknowledge(self, tags: Sequence[str]) -> None:
        """Forget them."""
        for some in _by(1000, tags):
            with self._client.pipeline() as pipe:
                pipe.zrem(self.keys[0], *some).hdel(self.keys[1], *some).execute()

    def give_back(self, tags: Sequence[str]) -> None:
        """Put them back in line, the last one first."""
        for some in _by(100, tags):
            messages = self._client.hmget(self.keys[1], some)
            self.restore([Row(tag, "", message) for tag, message in zip(some, messages, strict=True)])

    def put_back(self, items: Sequence[Loose]) -> None:
        """Put items back that are in no list."""
        for key, item, tag, is_first in items:
            self._client.eval(_PUT_BACK, 3, *self.keys, key, tag, "RPUSH" if is_first else "LPUSH", item)

    def restore(self, rows: Sequence[Row]) -> tuple[int, list[tuple[Row, Exception]]]:
        """Put rows back in line, and give how many, and those for which there is no line."""
        failed: list[tuple[Row, Exception]] = []
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


def _by(size: int, items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
