"""
What can be done with a queue of dead letters, whatever the broker.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from celerykit.dead_letters import Letter, Outgoing

if TYPE_CHECKING:
    from celerykit.app import CeleryKit

__all__ = ["Held", "LetterQueue", "NoQueue"]


class NoQueue(Exception):
    """The queue that a letter is to be sent to does not exist, and cannot be made."""


class Held(NamedTuple):
    """
    A letter in its queue.

    Attributes:
        handle:
            What the broker calls it: only for the walk it came from.
    """

    letter: Letter
    handle: Any


class LetterQueue:
    """The queue of dead letters, while somebody walks through it."""

    #: Whether letters lie in the order in which they came.
    is_ordered = False

    def __init__(self, app: CeleryKit, connection: Any) -> None:
        self.app = app
        self.name = app.settings.kit.dead_letter_queue
        self.connection = connection

    def lock(self, within: float) -> None:
        """Keep others out, where they would be in the way."""

    def walk(self) -> Iterator[Held]:
        """Give the letters that are there now, oldest first; the last one given may be taken away."""
        raise NotImplementedError

    def count(self) -> int:
        """Count them."""
        raise NotImplementedError

    def send(self, held: Held, message: Outgoing) -> bool:
        """
        Send a message in a letter's place, and take the letter away.

        Returns:
            Whether this was done; not if somebody else took it away before.

        Raises:
            NoQueue: There is no such queue.
        """
        raise NotImplementedError

    def replace(self, held: Held, letter: Letter) -> bool:
        """Put another letter in a letter's place; tell whether it was still there."""
        raise NotImplementedError

    def remove(self, held: Held) -> bool:
        """Take a letter away; tell whether it was still there."""
        raise NotImplementedError

    def close(self) -> None:
        """Put back what was held."""
