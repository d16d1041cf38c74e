# ruff: noqa: D102  (the methods are documented in `LetterQueue`)

"""
Dead letters in lists of Redis or Valkey.

What is private of Kombu's Redis channel is used here, and nowhere else for letters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from kombu.utils.json import dumps

from celerykit.dead_letters import HEADER, Letter, Outgoing
from celerykit.letter_queues.messages import letter_in_list
from celerykit.letter_queues.queue import Held, LetterQueue, NoQueue

if TYPE_CHECKING:
    from celerykit.app import CeleryKit

__all__ = ["RedisQueue"]

#: Gives the letters that follow the newest of some known ones, from the old end, until they are enough bytes; and how
#: many are older than what comes next. What others take away moves positions, so a place is found by its content.
_FOLLOWING = """
local list, limit, start, found = KEYS[1], tonumber(ARGV[1]), 0, {0}
for i = 3, #ARGV do
  local at = redis.call('LPOS', list, ARGV[i], 'RANK', -1)
  if at then
    start = redis.call('LLEN', list) - at
    break
  end
end
start = math.max(start, tonumber(ARGV[2]))
while limit > 0 do
  local some = redis.call('LRANGE', list, -(start + 10), -(start + 1))
  if #some == 0 then break end
  for i = #some, 1, -1 do
    found[#found + 1] = some[i]
    limit = limit - #some[i] - 1000
  end
  start = start + #some
end
found[1] = start
return found
"""

_MOVE = """
if redis.call('LREM', KEYS[1], -1, ARGV[1]) == 0 then return 0 end
redis.call('LPUSH', KEYS[2], ARGV[2])
return 1
"""

_EXCHANGE = """
local at = redis.call('LPOS', KEYS[1], ARGV[1], 'RANK', -1)
if not at then return 0 end
redis.call('LSET', KEYS[1], at, ARGV[2])
return 1
"""


class RedisQueue(LetterQueue):
    """Lists of Redis or Valkey, as Kombu keeps them: new letters at the head, old ones at the tail."""

    is_ordered = True

    #: Bytes that are fetched at a time.
    _CHUNK = 1_000_000

    #: How many letters that stay are remembered, to find the place again when others are taken away around it.
    _ANCHORS = 8

    def __init__(self, app: CeleryKit, connection: Any) -> None:
        super().__init__(app, connection)
        from redis import Redis

        self._channel = connection.channel()
        # Kombu's own client prefixes keys, but not those of every command.
        self._client = Redis(connection_pool=self._channel.pool)
        self._following = self._client.register_script(_FOLLOWING)
        self._move = self._client.register_script(_MOVE)
        self._exchange = self._client.register_script(_EXCHANGE)
        self._anchors: deque[bytes] = deque(maxlen=self._ANCHORS)

    def walk(self) -> Iterator[Held]:
        for step in self._channel.priority_steps:
            self._anchors.clear()
            yield from self._walk(self._key(self.name, step))

    def _walk(self, key: str) -> Iterator[Held]:
        seen: set[int] = set()
        least = 0
        while True:
            end, *items = self._following(keys=[key], args=[self._CHUNK, least, *reversed(self._anchors)])
            if not items:
                return
            # Nothing new: all that was remembered is gone, so that this is the beginning again; or items are the same.
            least = end
            for item in items:
                self._anchors.append(item)
                if hash(item) not in seen:
                    seen.add(hash(item))
                    least = 0
                    yield Held(letter_in_list(item), (key, item))

    def count(self) -> int:
        with self._client.pipeline() as pipe:
            for step in self._channel.priority_steps:
                pipe.llen(self._key(self.name, step))
            return sum(pipe.execute())

    def send(self, held: Held, message: Outgoing) -> bool:
        if not message.queue:
            raise NoQueue("it does not say which queue it came from")
        key, item = held.handle
        envelope = self._envelope(message)
        target = self._key(message.queue, self._channel._get_message_priority(envelope, reverse=False))
        return self._taken(item, self._move(keys=[key, target], args=[item, dumps(envelope)]))

    def replace(self, held: Held, letter: Letter) -> bool:
        key, item = held.handle
        headers = {**letter.headers, HEADER: letter.note.to_header()}
        kinds = (letter.content_type, letter.content_encoding, letter.properties)
        envelope = self._envelope(Outgoing(letter.body, headers, *kinds, queue=self.name, priority=None))
        return self._taken(item, self._exchange(keys=[key], args=[item, dumps(envelope)]))

    def remove(self, held: Held) -> bool:
        key, item = held.handle
        return self._taken(item, self._client.lrem(key, -1, cast("Any", item)))

    def _taken(self, item: bytes, count: Any) -> bool:
        with suppress(ValueError):
            self._anchors.remove(item)
        return bool(count)

    def _key(self, queue: str, priority: int) -> str:
        return f"{self._channel.global_keyprefix}{self._channel._q_for_pri(queue, priority)}"

    def _envelope(self, message: Outgoing) -> Any:
        envelope = self._channel.prepare_message(
            message.body,
            priority=message.priority or 0,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            headers=dict(message.headers),
            properties={"delivery_mode": 2, **message.properties},
        )
        self._channel._inplace_augment_message(envelope, "", message.queue)
        return envelope
