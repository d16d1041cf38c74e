"""
Queues in Redis and Valkey: one list for each priority, and a hash of what workers have taken.

What is private of Kombu's Redis channel is used here as in `celerykit.redis_broker`.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from celerykit.queues.depth import Depth

__all__ = ["RedisQueues"]

#: For each list its length, and since when its oldest message is there. Messages stay at the server: they may be large.
_READY = """
local found = {}
for i, key in ipairs(KEYS) do
    local item = redis.call('LINDEX', key, -1) or ''
    found[i] = {
        redis.call('LLEN', key),
        string.match(item, '"due_at": ?([%d.]+)') or string.match(item, '"sent_at": ?([%d.]+)') or '',
        string.match(item, '"eta": ?"([^"]+)"') or ''
    }
end
return found
"""

#: Of some of the messages that were taken: the tag, the exchange and the routing key, and until when it waits.
_TAKEN = """
local reply = redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
local found, items = {reply[1]}, reply[2]
for i = 1, #items, 2 do
    found[#found + 1] = items[i]
    found[#found + 1] = string.match(items[i + 1], ', ?("[^"]*", ?"[^"]*")%]$', -1000) or ''
    found[#found + 1] = string.match(items[i + 1], '"eta": ?"([^"]+)"') or ''
end
return found
"""

#: Looked at in one go, which no other client interrupts.
_BATCH = 200

#: Looked at in all; what is beyond counts as if it were like the rest.
_MOST = 10_000


class RedisQueues:
    """The queues behind a connection."""

    def __init__(self, connection: Any) -> None:
        # Imported for Redis only.
        from redis import Redis

        self._channel = connection.channel()
        # Kombu's own client prefixes keys, but not those of every command.
        self._client = Redis(connection_pool=self._channel.pool)
        self._prefix: str = self._channel.global_keyprefix or ""
        self._known: dict[bytes, Sequence[str]] = {}

    def depths(self, names: Sequence[str]) -> dict[str, Depth]:
        """Look at the queues of these names."""
        now = time.time()
        ready = self._ready(names, now)
        unacked, scheduled = self._taken(now)
        return {
            name: Depth(
                ready=ready[name][0],
                oldest_seconds=ready[name][1],
                unacked=unacked[name],
                scheduled=scheduled[name],
            )
            for name in names
        }

    def delayed(self) -> int | None:
        """What waits for its time is held by workers."""
        return None

    def _ready(self, names: Sequence[str], now: float) -> dict[str, tuple[int, float | None]]:
        steps = self._channel.priority_steps
        keys = [f"{self._prefix}{self._channel._q_for_pri(name, step)}" for name in names for step in steps]
        rows: Any = self._client.eval(_READY, len(keys), *keys)
        found = {}
        for number, name in enumerate(names):
            lists = [row for row in rows[number * len(steps) : (number + 1) * len(steps)] if row[0]]
            ages = [age for row in lists if (age := _age(row, now)) is not None]
            oldest = max(ages, default=None) if lists else 0.0
            found[name] = sum(row[0] for row in lists), oldest
        return found

    def _taken(self, now: float) -> tuple[Counter[str], Counter[str]]:
        """Count what our workers and stock ones have taken, by queue: what runs or may, and what waits for its time."""
        from celerykit.redis_broker import OUR_KEYS

        unacked: Counter[str] = Counter()
        scheduled: Counter[str] = Counter()
        for owner in (OUR_KEYS, ""):
            key = f"{self._prefix}{owner}{self._channel.unacked_key}"
            here: Counter[tuple[str, bool]] = Counter()
            seen: set[bytes] = set()
            for tag, place, eta in self._rows(key):
                if tag not in seen:
                    seen.add(tag)
                    here.update((queue, _moment(eta) > now) for queue in self._queues(place))
            share = max(1.0, self._client.hlen(key) / len(seen)) if len(seen) >= _MOST else 1.0
            for (queue, is_scheduled), number in here.items():
                (scheduled if is_scheduled else unacked)[queue] += round(number * share)
        return unacked, scheduled

    def _rows(self, key: str) -> Iterator[tuple[bytes, bytes, bytes]]:
        cursor, number = b"0", 0
        while True:
            cursor, *flat = self._client.eval(_TAKEN, 1, key, cursor, _BATCH)
            yield from zip(flat[::3], flat[1::3], flat[2::3], strict=True)
            number += len(flat) // 3
            if int(cursor) == 0 or number >= _MOST:
                return

    def _queues(self, place: bytes) -> Sequence[str]:
        """Name the queues that a message goes back to."""
        if place not in self._known:
            try:
                self._known[place] = self._bound(*json.loads(b"[%s]" % place))
            except (ValueError, TypeError):
                # Anybody may have written anything there.
                self._known[place] = ()
        return self._known[place]

    def _bound(self, exchange: str, routing_key: str) -> Sequence[str]:
        if not exchange:
            return (routing_key,)
        # Taken by a stock worker. With Celery's own exchanges, which are direct, it is the queue's name.
        members: Any = self._client.smembers(self._prefix + self._channel.keyprefix_queue % exchange)
        bindings = [tuple(row.decode().split(self._channel.sep)) for row in members]
        found = self._channel.typeof(exchange).lookup(bindings, exchange, routing_key, None)
        return tuple(found or (routing_key,))


def _age(row: Any, now: float) -> float | None:
    _, since, eta = row
    try:
        times = [float(since)] if since else []
    except ValueError:
        times = []
    if eta:
        times.append(_moment(eta))
    return max(0.0, now - max(times)) if times else None


def _moment(eta: bytes) -> float:
    try:
        moment = datetime.fromisoformat(eta.decode()) if eta else None
        return 0.0 if moment is None else (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return 0.0
