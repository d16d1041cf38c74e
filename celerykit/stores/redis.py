"""Counts and marks in Redis or Valkey: Redis 6.2 or newer, any Valkey."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from celerykit.errors import InvalidSettings, StoreUnavailable

__all__ = ["RedisStore"]

T = TypeVar("T")

_ADD = """
local count = redis.call('INCR', KEYS[1])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return count
"""

_SUBTRACT = """
local count = tonumber(redis.call('GET', KEYS[1]) or 0)
if count > 1 then redis.call('DECR', KEYS[1]) else redis.call('DEL', KEYS[1]) end
"""

#: `SET … NX GET` in one command needs Redis 7.
_MARK = """
local before = redis.call('GET', KEYS[1])
if not before then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
return before
"""

#: What Kombu and Celery write in URLs, in the words of the client.
_CERT_REQS = {"CERT_REQUIRED": "required", "CERT_OPTIONAL": "optional", "CERT_NONE": "none"}
_TLS = frozenset({"ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"})


class RedisStore:
    """
    Counts and marks under *prefix* in a Redis or Valkey database.

    Args:
        url:
            As `celerykit.settings.settle` leaves it.

        timeout:
            Seconds to connect in, and to wait for an answer. Nothing is tried twice.
    """

    is_shared = True

    def __init__(self, url: str, *, timeout: float, prefix: str, tls: Mapping[str, Any]) -> None:
        self._options = _options(url, tls)
        self._place = _place(self._options)
        self._timeout = timeout
        self._prefix = prefix
        self._client: redis.Redis | None = None
        self._pid = 0

    def add(self, key: str, *, ttl: float) -> int:
        """Add one to a count, and return it."""
        # Not EVALSHA: a server that has restarted would need a second round trip.
        return int(self._ask(lambda client: client.eval(_ADD, 1, self._prefix + key, _milliseconds(ttl))))

    def subtract(self, key: str) -> None:
        """Take one off a count, but never below 0."""
        self._ask(lambda client: client.eval(_SUBTRACT, 1, self._prefix + key))

    def mark(self, key: str, value: str, *, ttl: float) -> str | None:
        """Set *key* unless it is set, and return what was there."""
        return _text(self._ask(lambda client: client.eval(_MARK, 1, self._prefix + key, value, _milliseconds(ttl))))

    def get(self, key: str) -> str | None:
        """Return a mark or a count."""
        return _text(self._ask(lambda client: client.get(self._prefix + key)))

    def delete(self, key: str) -> None:
        """Forget *key*."""
        self._ask(lambda client: client.delete(self._prefix + key))

    def close(self) -> None:
        """Let connections go."""
        client, self._client = self._client, None
        if client is not None and self._pid == os.getpid():
            client.close()

    def _ask(self, command: Callable[[redis.Redis], T]) -> T:
        try:
            return command(self._connected())
        except redis.ResponseError as error:
            # Its text may repeat what was sent, and so may a traceback with it in.
            code = str(error).partition(" ")[0]
            raise StoreUnavailable(f"the store at {self._place} refused ({code}).") from None
        except (redis.RedisError, OSError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        raise StoreUnavailable(
            f"the store at {self._place} did not answer within {self._timeout:g} s ({type(error).__name__}: {error}). "
            "Check that it runs, and CELERYKIT_STORE_URL."
        ) from error

    def _connected(self) -> redis.Redis:
        if self._client is None or self._pid != os.getpid():
            # A forked process may inherit a pool whose lock a thread held that it did not inherit.
            self._client = redis.Redis(
                **self._options,
                socket_timeout=self._timeout,
                socket_connect_timeout=self._timeout,
                retry=Retry(NoBackoff(), 0),
                # Nothing newer is needed, and its greeting would be a round trip.
                protocol=2,
            )
            self._pid = os.getpid()
        return self._client


def _milliseconds(ttl: float) -> int:
    return max(1, round(ttl * 1000))


def _text(reply: Any) -> str | None:
    return reply.decode("utf-8", "replace") if isinstance(reply, bytes) else None if reply is None else str(reply)


def _options(url: str, tls: Mapping[str, Any]) -> dict[str, Any]:
    """Read a URL as Kombu and Celery write it, which is not quite how the client would."""
    try:
        parts = urlsplit(url)
        options = {**_address(parts), **_login(parts)}
    except ValueError:
        # It may quote a part of the URL: a password with a `/` in it looks like a port.
        raise InvalidSettings(
            "CELERYKIT_STORE_URL: the address cannot be read. In a user or password, write `@ : / ? # [ ]` and `%` "
            "as `%40` and so on."
        ) from None
    if parts.scheme == "rediss" or tls:
        query = {name: value for name, value in parse_qsl(parts.query) if name in _TLS}
        options |= {"ssl": True, **tls, **query}
        asked = options.get("ssl_cert_reqs") or "required"
        options["ssl_cert_reqs"] = _CERT_REQS.get(asked, asked)
    return options


def _address(parts: SplitResult) -> dict[str, Any]:
    query = dict(parse_qsl(parts.query))
    if parts.scheme == "redis+socket":
        return {"unix_socket_path": unquote(parts.path), "db": _database(query.get("virtual_host", ""))}
    return {"host": parts.hostname or "localhost", "port": parts.port or 6379, "db": _database(unquote(parts.path))}


def _database(name: str) -> int:
    return int(name.strip("/") or 0)


def _login(parts: SplitResult) -> dict[str, Any]:
    query = dict(parse_qsl(parts.query))
    return {
        "username": unquote(parts.username or "") or query.get("username"),
        "password": unquote(parts.password or "") or query.get("password"),
    }


def _place(options: Mapping[str, Any]) -> str:
    address = options.get("unix_socket_path") or f"{options['host']}:{options['port']}"
    return f"{address}, database {options['db']}"
