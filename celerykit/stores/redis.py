"""A store in Redis or Valkey: Redis 6.2 or newer, any Valkey."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from celerykit.errors import StoreUnavailable
from celerykit.stores import Hold, Record, Swap, Swapped, scripts
from celerykit.stores.addresses import Sentinels, read_address

__all__ = ["RedisStore"]

T = TypeVar("T")

#: How many keys the server looks at in one step of a walk, and how many records are read at once: they may be large.
_LOOK_AT = 1000
_READ_AT_ONCE = 50


class RedisStore:
    """
    Everything under *prefix* in a Redis or Valkey database.

    No command touches two keys.

    Args:
        url:
            As `celerykit.settings.settle` leaves it.

        timeout:
            Seconds to connect in, and to wait for an answer. Nothing is tried twice.

        options:
            As in ``broker_transport_options``: what Sentinel needs.
    """

    is_shared = True

    def __init__(
        self, url: str, *, timeout: float, prefix: str, tls: Mapping[str, Any], options: Mapping[str, Any] | None = None
    ) -> None:
        self._address = read_address(url, tls=tls, options=options or {})
        self._timeout = timeout
        self._prefix = prefix
        self._client: redis.Redis | None = None
        self._pid = 0

    # Counts and marks

    def add(self, key: str, *, ttl: float) -> int:
        """Add one to a count, and return it."""
        return int(self._run(scripts.ADD, self._count_key(key), _milliseconds(ttl)))

    def subtract(self, key: str) -> None:
        """Take one off a count, but never below 0."""
        self._run(scripts.SUBTRACT, self._count_key(key))

    def mark(self, key: str, value: str, *, ttl: float) -> str | None:
        """Set *key* unless it is set, and return what was there."""
        return _text(self._run(scripts.MARK, self._count_key(key), value, _milliseconds(ttl)))

    def get(self, key: str) -> str | None:
        """Return a mark or a count."""
        return _text(self._ask(lambda client: client.get(self._count_key(key))))

    def delete(self, key: str) -> None:
        """Forget *key*."""
        self._ask(lambda client: client.delete(self._count_key(key)))

    # Records

    def read(self, key: str) -> Record | None:
        """Return the record under *key*."""
        return _record(self._run(scripts.READ, self._record_key(key)))

    def swap(self, *swaps: Swap) -> list[Swapped]:
        """Compare and swap, one after the other, in one round trip."""
        replies = self._run_all((scripts.SWAP, self._record_key(swap.key), *_asked(swap)) for swap in swaps)
        return [Swapped(reply == 1, None if reply == 1 else _record(reply)) for reply in replies]

    def renew(self, holds: Sequence[Hold]) -> list[bool]:
        """Begin leases anew, and tell which records are still there as they were; one round trip for all."""
        replies = self._run_all(
            (
                scripts.RENEW,
                self._record_key(hold.key),
                hold.version,
                _microseconds(hold.lease),
                _milliseconds(hold.ttl),
            )
            for hold in holds
        )
        return [reply == 1 for reply in replies]

    def find(self, prefix: str) -> Iterator[tuple[str, Record]]:
        """Walk through the records whose keys begin so; one may come twice."""
        start = self._record_key("")
        for names in self._names(self._record_key(prefix)):
            replies = self._run_all((scripts.READ, name) for name in names)
            for name, reply in zip(names, replies, strict=True):
                record = _record(reply)
                if record is not None:
                    yield str(_text(name.removeprefix(start))), record

    # Slots

    def take(self, key: str, holder: str, *, limit: int, ttl: float) -> float:
        """Take one of *limit* slots, or tell in how many seconds the next one is free."""
        return _seconds(self._run(scripts.TAKE, self._slots_key(key), _sent(holder), limit, _microseconds(ttl)))

    def give(self, key: str, holder: str) -> None:
        """Give a slot back."""
        self._ask(lambda client: client.zrem(self._slots_key(key), _sent(holder)))

    def close(self) -> None:
        """Let connections go."""
        client, self._client = self._client, None
        if client is not None and self._pid == os.getpid():
            client.close()

    def _count_key(self, key: str) -> bytes:
        return _sent(f"{self._prefix}{key}")

    def _record_key(self, key: str) -> bytes:
        return _sent(f"{self._prefix}record:{key}")

    def _slots_key(self, key: str) -> bytes:
        return _sent(f"{self._prefix}slots:{key}")

    def _names(self, prefix: bytes) -> Iterator[list[bytes]]:
        """Walk through the names of keys, a few at a time."""
        pattern, cursor = re.sub(rb"([\\*?\[\]])", rb"\\\1", prefix) + b"*", 0
        while True:
            cursor, names = self._ask(partial(_scan, cursor=cursor, pattern=pattern))
            for start in range(0, len(names), _READ_AT_ONCE):
                yield names[start : start + _READ_AT_ONCE]
            if not cursor:
                return

    def _run(self, script: str, key: bytes, *arguments: Any) -> Any:
        # Not EVALSHA: a server that has restarted would need a second round trip.
        return self._ask(lambda client: client.eval(script, 1, key, *arguments))

    def _run_all(self, runs: Iterator[tuple[Any, ...]]) -> list[Any]:
        def send(client: redis.Redis) -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            for script, key, *arguments in runs:
                pipeline.eval(script, 1, key, *arguments)
            # What it would raise repeats the command.
            return pipeline.execute(raise_on_error=False)

        replies = self._ask(send)
        for reply in replies:
            if isinstance(reply, redis.ResponseError):
                self._refuse(reply)
        return replies

    def _ask(self, command: Callable[[redis.Redis], T]) -> T:
        try:
            return command(self._connected())
        except redis.ResponseError as error:
            self._refuse(error)
        except (redis.RedisError, OSError) as error:
            self._fail(error)

    def _refuse(self, error: Exception) -> NoReturn:
        # Its text may repeat what was sent, and so may a traceback with it in.
        code = str(error).partition(" ")[0]
        raise StoreUnavailable(f"the store at {self._address.place} refused ({code}).") from None

    def _fail(self, error: Exception) -> NoReturn:
        raise StoreUnavailable(
            f"the store at {self._address.place} did not answer within {self._timeout:g} s "
            f"({type(error).__name__}: {error}). Check that it runs, and CELERYKIT_STORE_URL."
        ) from error

    def _connected(self) -> redis.Redis:
        if self._client is None or self._pid != os.getpid():
            # A forked process may inherit a pool whose lock a thread held that it did not inherit.
            self._client = self._connect()
            self._pid = os.getpid()
        return self._client

    def _connect(self) -> redis.Redis:
        options = {**self._address.options, **_patience(self._timeout)}
        sentinels = self._address.sentinels
        return redis.Redis(**options) if sentinels is None else _of_master(sentinels, options, timeout=self._timeout)


def _patience(timeout: float) -> dict[str, Any]:
    return {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        # Nothing newer is needed, and its greeting would be a round trip.
        "protocol": 2,
    }


def _of_master(sentinels: Sentinels, options: Mapping[str, Any], *, timeout: float) -> redis.Redis:
    # Each has its share, so that those that are silent leave time for one that is not.
    share = timeout / len(sentinels.hosts)
    manager = cast("Any", Sentinel)(
        list(sentinels.hosts),
        sentinel_kwargs={**sentinels.options, **_patience(share)},
        min_other_sentinels=sentinels.min_others,
    )
    master: redis.Redis = manager.master_for(sentinels.master_name, redis_class=redis.Redis, **options)
    return master


def _scan(client: redis.Redis, *, cursor: int, pattern: bytes) -> tuple[int, list[bytes]]:
    cursor, names = client.scan(cursor, match=pattern, count=_LOOK_AT)
    return cursor, cast("list[bytes]", names)


def _asked(swap: Swap) -> list[Any]:
    must_be = "nothing" if swap.expected is None else "lapsed" if swap.lapsed else "version"
    if swap.new is None:
        return [must_be, swap.expected or ""]
    lease = "" if swap.new.lease is None else _microseconds(swap.new.lease)
    return [must_be, swap.expected or "", swap.new.version, swap.new.data, _milliseconds(swap.new.ttl), lease]


def _record(reply: Any) -> Record | None:
    if reply is None:
        return None
    version, data, *lease = reply
    return Record(str(_text(version)), str(_text(data)), _seconds(lease[0]) if lease else None)


def _milliseconds(ttl: float) -> int:
    return max(1, math.ceil(ttl * 1000))


def _microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)


def _seconds(reply: bytes) -> float:
    return int(reply) / 1_000_000


def _sent(text: str) -> bytes:
    # Half a character, which the client does not send, in a stranger's id is no reason to fail.
    return text.encode("utf-8", "surrogatepass")


def _text(reply: Any) -> str | None:
    return reply.decode("utf-8", "replace") if isinstance(reply, bytes) else None if reply is None else str(reply)
