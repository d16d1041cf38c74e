"""Who sends: one of any number of beats, as long as it renews its lease in the store."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Self

from celerykit import events
from celerykit.stores import Hold, New, Record, Store, Swap

__all__ = ["Lead", "Leader", "leader_key"]

#: Renewals in the time of a lease: two may fail.
_RENEWALS = 3

#: Seconds between two looks of a beat that stands by: one that stops gives up its lead before its lease ends.
_LONGEST_PAUSE = 1.0

#: How long the last leader is remembered, in seconds: for people.
_REMEMBERED = 7 * 86400


def leader_key(app_name: str) -> str:
    """Name the record of who leads."""
    return f"beat:{app_name}:leader"


@dataclass(frozen=True, slots=True)
class Leader:
    """
    What a leader says of itself.

    Attributes:
        node:
            Where it runs, for a person.

        since:
            When it took the lead.

        schedule:
            What tells its schedule from others.
    """

    node: str
    since: datetime
    schedule: str = ""

    def dump(self) -> str:
        """Write it as text."""
        return json.dumps({**asdict(self), "since": self.since.isoformat()})

    @classmethod
    def load(cls, text: str) -> Self | None:
        """Read what `dump` wrote; ``None`` when it is something else."""
        try:
            facts = json.loads(text)
            since = datetime.fromisoformat(facts["since"]).astimezone(UTC)
            return cls(str(facts["node"]), since, str(facts.get("schedule", "")))
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


class Lead:
    """
    One beat's part in who leads.

    Args:
        id:
            What tells it from all other beats there ever were.

        lease:
            How long it leads after its last sign of life, in seconds.

        clock:
            Seconds that never go back.

    Attributes:
        me:
            What this beat says of itself when it leads.

        term:
            How often this beat has taken the lead.

        pause:
            Seconds until it should be asked for again.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        *,
        me: Leader,
        id: str,  # noqa: A002  (Celery's word)
        lease: float,
        clock: Callable[[], float],
        now: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._key = key
        self.me = me
        self._id = id
        self._lease = lease
        self._clock = clock
        self._now = now
        self._leads = False
        self._renewed_at = 0.0
        self._followed: str | None = None
        self.term = 0
        self.pause = 0.0

    @property
    def leads(self) -> bool:
        """Whether this beat does, as far as it knows."""
        return self._leads

    def take(self) -> bool:
        """
        Take the lead if nobody has it, keep it if this beat has, and tell whether it does.

        Raises:
            StoreUnavailable: Nobody can say; nothing may be sent.
        """
        if self._leads:
            self._keep()
        if not self._leads:
            self._try()
        return self._leads

    def give_up(self) -> None:
        """Let another beat lead at once, if this one does."""
        if self._leads:
            self._leads = False
            self._store.swap(Swap(self._key, self._id, None))

    def _keep(self) -> None:
        asked = self._clock()
        away = asked - self._renewed_at
        if away >= self._lease / _RENEWALS:
            [self._leads] = self._store.renew([Hold(self._key, self._id, lease=self._lease, ttl=_REMEMBERED)])
            if not self._leads:
                events.BEAT_LOST.tell(after=round(away, 1), lease=self._lease)
                return
            self._renewed_at = asked
        self.pause = self._lease / _RENEWALS - (asked - self._renewed_at)

    def _try(self) -> None:
        asked = self._clock()
        me = replace(self.me, since=self._now())
        new = New(self._id, me.dump(), ttl=_REMEMBERED, lease=self._lease)
        [swapped] = self._store.swap(Swap(self._key, None, new))
        found = swapped.found
        if found is not None and (found.version == self._id or _has_lapsed(found)):
            # By this beat's own id: it took the lead, and did not hear that it did.
            [swapped] = self._store.swap(Swap(self._key, found.version, new, lapsed=found.version != self._id))
            found = swapped.found or found
        if not swapped.done:
            self._follow(found)
            return
        self._leads, self._renewed_at, self._followed = True, asked, None
        self.term += 1
        self.pause = self._lease / _RENEWALS

    def _follow(self, found: Record | None) -> None:
        lease = found.lease if found is not None and found.lease is not None else 0.0
        self.pause = max(0.0, min(lease, _LONGEST_PAUSE, self._lease / _RENEWALS)) + 0.01
        if found is None or found.version == self._followed:
            return
        self._followed = found.version
        leader = Leader.load(found.data) or Leader("unknown", self._now())
        events.BEAT_STANDS_BY.tell(leader=leader.node, since=leader.since.isoformat(timespec="seconds"))
        if leader.schedule != self.me.schedule:
            events.BEAT_UNLIKE.tell(
                leader=leader.node,
                hint="If it is no older version of this app, give the app another name.",
            )


def _has_lapsed(record: Record) -> bool:
    return record.lease is None or record.lease <= 0
