"""The messages in Redis or Valkey, looked at where Kombu laid them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["messages"]

#: Messages that are fetched at a time; each may be a megabyte.
_BATCH = 50

_TAKEN = "was taken by a worker, which runs it or keeps it for its time"


def messages(channel: Any, *, skip: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """
    Give the place of each message, what happens to it, and its headers.

    There is one list for each queue and priority, and a hash of what workers have taken.

    Args:
        skip:
            A queue that is left out.
    """
    # Imported for Redis only.
    from celerykit.redis_broker import OUR_KEYS

    client, prefix = _client(channel), channel.global_keyprefix or ""
    for name in sorted(_queues(client, channel, prefix) - {skip}):
        for step in channel.priority_steps:
            key = f"{prefix}{name}{channel.sep}{step}" if step else f"{prefix}{name}"
            for item in _listed(client, key):
                yield f"queue {name}", "is waiting", _headers(_read(item))
    for owner in (OUR_KEYS, ""):
        for _, item in client.hscan_iter(f"{prefix}{owner}{channel.unacked_key}", count=_BATCH):
            match _read(item):
                case [message, _, name, *_]:
                    yield f"queue {name}", _TAKEN, _headers(message)


def _client(channel: Any) -> Any:
    # Kombu's own puts the prefix in front of the keys of some commands only.
    from redis import Redis

    return Redis(connection_pool=channel.pool)


def _queues(client: Any, channel: Any, prefix: str) -> set[str]:
    """Name every queue that anybody declared."""
    names: set[str] = set()
    for key in client.scan_iter(f"{prefix}{channel.keyprefix_queue % '*'}", count=1000):
        names.update(_text(member).rpartition(channel.sep)[2] for member in client.smembers(key))
    return {name for name in names if not name.endswith(".pidbox") and not name.startswith("celeryev.")}


def _listed(client: Any, key: str) -> Iterator[Any]:
    # From the end where messages come in: those that are added meanwhile move the rest towards us.
    start = 0
    while items := client.lrange(key, start, start + _BATCH - 1):
        yield from items
        start += _BATCH


def _read(item: Any) -> Any:
    try:
        return json.loads(item)
    except ValueError:
        return None


def _headers(found: Any) -> Mapping[str, Any]:
    """Give the headers of what may be a message."""
    headers = found.get("headers") if isinstance(found, dict) else None
    return headers if isinstance(headers, dict) else {}


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
