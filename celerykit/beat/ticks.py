"""
What is known of an entry: when it last ran, and the tick that is being sent.

::

    idle ──claimed──▶ being sent ──sent──▶ idle
      ╰────────────skipped───────────────────╯

A tick that is being sent has a lease. When that has lapsed, its sender is gone,
and nobody knows how far it came: whoever takes it over sends it, under the id it
has, so that what came twice can be told.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, Self

__all__ = ["State", "Tick"]


@dataclass(frozen=True, slots=True)
class Tick:
    """
    A run that is being sent.

    Attributes:
        due:
            When it was to be sent.

        at:
            When it was claimed.

        id:
            Of its message, whoever sends it in the end.

        by:
            The beat that claimed it.
    """

    due: datetime
    at: datetime
    id: str
    by: str


@dataclass(frozen=True, slots=True)
class State:
    """
    What is known of an entry.

    Attributes:
        since:
            What its next run is counted from: its last one, or when it was
            first heard of.

        sent_at:
            When it last ran, if it ever did.

        runs:
            How often it did.

        tick:
            The run that is being sent.
    """

    since: datetime
    sent_at: datetime | None = None
    runs: int = 0
    tick: Tick | None = None

    def claimed(self, *, due: datetime, at: datetime, id: str, by: str) -> Self:  # noqa: A002  (Celery's word)
        """Begin to send the tick that is *due*, or go on with the one that is being sent."""
        if self.tick is not None:
            due, id = self.tick.due, self.tick.id  # noqa: A001
        return replace(self, tick=Tick(due, at, id, by))

    def sent(self) -> Self:
        """Note that the tick was sent."""
        if self.tick is None:
            return self
        return replace(self._after(self.tick.at), sent_at=self.tick.at, runs=self.runs + 1)

    def skipped(self, at: datetime) -> Self:
        """Leave out what was due until now."""
        return self._after(at)

    def _after(self, at: datetime) -> Self:
        # Beats may have different clocks: the one that is behind must not send again what the other one has.
        due = at if self.tick is None else self.tick.due
        return replace(self, since=max(self.since, at, due), tick=None)

    @property
    def version(self) -> str:
        """Tell it from all other states of the entry."""
        return blake2b(self.dump().encode(), digest_size=12).hexdigest()

    def dump(self) -> str:
        """Write it as text."""
        tick = self.tick
        facts = {
            "since": _text(self.since),
            "sent_at": _text(self.sent_at),
            "runs": self.runs,
            "tick": tick and {"due": _text(tick.due), "at": _text(tick.at), "id": tick.id, "by": tick.by},
        }
        return json.dumps({name: fact for name, fact in facts.items() if fact is not None})

    @classmethod
    def load(cls, text: str) -> Self | None:
        """Read what `dump` wrote, by this version or a newer one; ``None`` when it is something else."""
        try:
            facts = json.loads(text)
            tick, sent_at = facts.get("tick"), facts.get("sent_at")
            return cls(
                since=_time(facts["since"]),
                sent_at=None if sent_at is None else _time(sent_at),
                runs=int(facts["runs"]),
                tick=None if tick is None else _tick(tick),
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


def _tick(facts: Any) -> Tick:
    return Tick(_time(facts["due"]), _time(facts["at"]), str(facts["id"]), str(facts["by"]))


def _text(time: datetime | None) -> str | None:
    return None if time is None else time.astimezone(UTC).isoformat()


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)
