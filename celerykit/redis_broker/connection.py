"""
A connection to consume by, in place of a worker's own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import kombu

from celerykit import events
from celerykit.redis_broker.channel import Channel
from celerykit.redis_broker.hold import Hold
from celerykit.redis_broker.known import whats_unknown

__all__ = ["Connection", "guard"]

_kombu: Any = kombu


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
        events.LEASES_OFF.tell(
            reason=f"this is Kombu {_kombu.__version__}, and {unknown}",
            hint="A dead worker's messages come back after Celery's visibility_timeout; "
            "what takes longer than that runs twice.",
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
    channel = type("Channel", (Channel, transport.Channel), {})
    return type(transport.__name__, (transport,), {"Channel": channel, "popped": None})


def _is_redis(transport: Any) -> bool:
    return getattr(transport, "driver_type", None) == "redis"
