"""
What is told of a queue, and of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Depth", "Depths"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """
    One queue. ``None`` stands for what the broker does not tell.

    Attributes:
        ready:
            Messages that a worker could take.

        unacked:
            Messages that workers have taken and not finished.

        scheduled:
            Messages that a worker holds until they are due.

        oldest_seconds:
            For how long the oldest message that is ready could have been run; 0 if there is none.

        consumers:
            How many consume.

        missing:
            Whether there is no such queue.
    """

    ready: int | None = None
    unacked: int | None = None
    scheduled: int | None = None
    oldest_seconds: float | None = None
    consumers: int | None = None
    missing: bool = False

    @property
    def total(self) -> int | None:
        """All of them, as far as they are told."""
        told = [number for number in (self.ready, self.unacked, self.scheduled) if number is not None]
        return sum(told) if told else None

    def facts(self) -> dict[str, Any]:
        """Give it as JSON values."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True, slots=True)
class Depths:
    """
    The queues of an app.

    Attributes:
        queues:
            By name.

        dead_letter_queue, dead_letters:
            Its name, and how many are kept there.

        delayed:
            Messages that wait in RabbitMQ's delayed delivery, for whichever
            queue; ``None`` where there is none.
    """

    queues: Mapping[str, Depth]
    dead_letter_queue: str
    dead_letters: int | None
    delayed: int | None = None

    def facts(self) -> dict[str, Any]:
        """Give them as JSON values."""
        return {
            "queues": {name: depth.facts() for name, depth in self.queues.items()},
            "dead_letters": {"queue": self.dead_letter_queue, "count": self.dead_letters},
            "delayed": self.delayed,
        }
