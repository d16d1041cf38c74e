"""
Queues of other brokers, as far as Kombu can tell without making any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kombu.transport import virtual

from celerykit.queues.depth import Depth

__all__ = ["OtherQueues"]


class OtherQueues:
    """The queues behind a connection."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def depths(self, names: Sequence[str]) -> dict[str, Depth]:
        """Look at the queues of these names."""
        with self._connection.channel() as channel:
            return {name: self._depth(channel, name) for name in names}

    def delayed(self) -> int | None:
        """What waits for its time is held by workers."""
        return None

    def _depth(self, channel: Any, name: str) -> Depth:
        if _would_declare(channel):
            return Depth()
        try:
            answer = channel.queue_declare(name, passive=True)
        except self._connection.channel_errors:
            return Depth(ready=0, missing=True)
        return Depth(ready=int(answer.message_count))


def _would_declare(channel: Any) -> bool:
    """Tell whether a passive declaration makes a queue, as Kombu's does where it cannot ask for one."""
    kind, stock = type(channel), virtual.Channel
    asks = getattr(kind, "_has_queue", None) is not stock._has_queue
    makes = getattr(kind, "_new_queue", None) is not stock._new_queue
    return isinstance(channel, stock) and makes and not asks
