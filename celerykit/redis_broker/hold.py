"""
What a worker has taken and not finished.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from celerykit import events

__all__ = ["Hold", "Loose", "OnGarbage"]

#: Called with the queue, what lay in it, and what is wrong with that. If it raises, the item goes back.
OnGarbage = Callable[[str, bytes, Exception], Any]


class Loose(NamedTuple):
    """An item that is in no list, and under which tag it may have been noted."""

    key: str
    item: Any
    tag: str
    is_first: bool


class Hold:
    """
    What a worker has taken and not finished, over all its connections. Safe from any thread.

    Args:
        lease:
            Seconds that a message stays this worker's after its last sign of life.

        on_garbage:
            What to do with items that are not messages. Called where the
            queue is read, and from the thread of a `Keeper`.

        running:
            Gives the tags of messages that would go on running here if they were given back.
    """

    def __init__(
        self,
        *,
        lease: float,
        on_garbage: OnGarbage | None = None,
        running: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self.lease = lease
        self.on_garbage = on_garbage
        self.running = running
        #: Tags, newest first, that are to be given back, and those to be acknowledged, where a connection could not.
        self.unwanted: deque[str] = deque()
        self.finished: deque[str] = deque()
        self.loose: deque[Loose] = deque()
        self._tags: dict[str, object] = {}
        self._idle: set[str] = set()
        self._lock = threading.Lock()

    @property
    def microseconds(self) -> int:
        """The lease."""
        return int(self.lease * 1_000_000)

    def take(self, tag: str, *, by: object) -> None:
        """Note a message that came by a connection."""
        with self._lock:
            self._tags[tag] = by

    def drop(self, tag: str) -> bool:
        """Forget it, and tell whether it was held."""
        with self._lock:
            return self._tags.pop(tag, None) is not None

    def tags(self) -> list[str]:
        """List what is held: prefetched, waiting for its time, running. Oldest first."""
        with self._lock:
            return list(self._tags)

    def leave(self, connection: object) -> None:
        """
        Give back what came by other connections than this one, unless it runs: nobody will start it here.

        Only what was seen so the last time too: a task that ends at this
        moment runs no more, and is not acknowledged yet.
        """
        with self._lock:
            others = [tag for tag, by in self._tags.items() if by is not connection]
        running = self.running() if others else ()
        idle = [tag for tag in others if tag not in running]
        for tag in reversed(idle):
            if tag in self._idle and self.drop(tag):
                self.unwanted.append(tag)
        self._idle = set(idle)

    def hand_over(self, queue: str, item: bytes, error: Exception) -> bool:
        """Give an item that is no message to whom it concerns, and tell whether that took it."""
        if self.on_garbage is None:
            return False
        try:
            self.on_garbage(queue, item, error)
        except Exception as failure:  # noqa: BLE001  (an edge: whatever it is, the item must not be lost)
            events.GARBAGE_KEPT.tell(queue=queue, error=failure, exc_info=True)
            return False
        return True
