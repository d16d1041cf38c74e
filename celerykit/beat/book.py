"""The states of a schedule's entries, in the store, where whoever leads next finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import NamedTuple

from celerykit import events
from celerykit.beat.ticks import State
from celerykit.stores import New, Record, Store, Swap

__all__ = ["Book", "entry_key"]

#: How long a state is kept after its last change, in seconds: longer than from one yearly run to the next.
_KEPT = 400 * 86400


def entry_key(app_name: str, entry: str) -> str:
    """Name the record of an entry."""
    return f"beat:{app_name}:entry:{entry}"


class _Known(NamedTuple):
    """
    What this beat knows of an entry.

    Attributes:
        version:
            What stands in the store; ``None`` when nothing does.

        free_at:
            By the clock: when the tick that is being sent may be taken over.
    """

    state: State
    version: str | None
    free_at: float


class Book:
    """
    The states of the entries, as one beat knows and changes them.

    Whatever it does not know, because others changed it, it learns when it
    tries to change it. All its methods but `state` and `wait` may raise
    `StoreUnavailable`.

    Args:
        by:
            What tells this beat from others.

        lease:
            How long a tick that is being sent stays its own, in seconds.

        clock:
            Seconds that never go back.
    """

    def __init__(self, store: Store, app_name: str, *, by: str, lease: float, clock: Callable[[], float]) -> None:
        self._store = store
        self._app_name = app_name
        self._by = by
        self._lease = lease
        self._clock = clock
        self._known: dict[str, _Known] = {}
        # What was sent: the swap that says so, and the id it was sent under.
        self._unnoted: dict[str, tuple[Swap, str]] = {}

    def open(self, entries: Iterable[str], *, now: datetime) -> None:
        """Read the states of all *entries*, in one round trip. Those nobody has heard of begin *now*."""
        # A store that has lost them gets back what this beat knows.
        new = {entry: self._known[entry].state if entry in self._known else State(since=now) for entry in entries}
        swaps = [Swap(self._key(entry), None, _written(state)) for entry, state in new.items()]
        found = self._store.swap(*swaps) if swaps else []
        self._known = {entry: _Known(state, state.version, free_at=0.0) for entry, state in new.items()}
        for entry, swapped in zip(new, found, strict=True):
            if not swapped.done:
                self._learn(entry, swapped.found)

    def forget(self) -> None:
        """Forget what other beats are changing now."""
        self._known = {}

    def state(self, entry: str) -> State:
        """Give the state of an entry, as far as it is known."""
        return self._known[entry].state

    def wait(self, entry: str) -> float:
        """Give the seconds until the tick that another beat is sending may be taken over; 0 when there is none."""
        state, _, free_at = self._known[entry]
        return 0.0 if state.tick is None or state.tick.by == self._by else max(0.0, free_at - self._clock())

    def claim(self, entry: str, *, due: datetime, at: datetime, id: str) -> State | None:  # noqa: A002
        """
        Claim a tick, for the length of a lease. A tick of this beat's own is claimed anew.

        Returns:
            The state with the tick to send; ``None`` when another beat was faster.
        """
        state = self.state(entry)
        is_theirs = state.tick is not None and state.tick.by != self._by
        claimed = state.claimed(due=due, at=at, id=id, by=self._by)
        return claimed if self._move(entry, claimed, lease=self._lease, lapsed=is_theirs) else None

    def skip(self, entry: str, *, at: datetime) -> None:
        """Leave out what was due until now: before it was claimed, or when nobody can send it."""
        state = self.state(entry)
        self._move(entry, state.skipped(at), lapsed=state.tick is not None and state.tick.by != self._by)

    def sent(self, entry: str) -> None:
        """Note that the tick was sent. If that fails, `note` does it later."""
        state, version, _ = self._known[entry]
        after = state.sent()
        sent_id = "" if state.tick is None else state.tick.id
        self._unnoted[entry] = (Swap(self._key(entry), version, _written(after)), sent_id)
        self._known[entry] = _Known(after, after.version, free_at=0.0)
        self.note()

    def note(self) -> None:
        """Note what was sent and could not be noted yet. Before that, nothing else may be sent."""
        if not self._unnoted:
            return
        swaps = [swap for swap, _ in self._unnoted.values()]
        for (entry, (swap, sent_id)), swapped in zip(self._unnoted.items(), self._store.swap(*swaps), strict=True):
            # It may have been done by a try whose answer was lost.
            is_noted = swapped.done or _version(swapped.found) == _version(swap.new)
            if is_noted:
                continue
            if entry in self._known:
                self._learn(entry, swapped.found)
            if swapped.found is not None:
                events.BEAT_DOUBTFUL.tell(entry=entry, id=sent_id)
        self._unnoted = {}

    def put_down(self) -> None:
        """Let others take over at once what this beat has claimed and not sent."""
        mine = {
            entry: known
            for entry, known in self._known.items()
            if known.state.tick is not None and known.state.tick.by == self._by
        }
        if mine:
            # The same state, and so the same version, without a lease.
            swaps = [Swap(self._key(entry), version, _written(state)) for entry, (state, version, _) in mine.items()]
            self._store.swap(*swaps)

    def _move(self, entry: str, state: State, *, lease: float | None = None, lapsed: bool = False) -> bool:
        swap = Swap(self._key(entry), self._known[entry].version, _written(state, lease=lease), lapsed=lapsed)
        [swapped] = self._store.swap(swap)
        if swapped.done:
            self._known[entry] = _Known(state, state.version, free_at=0.0)
        else:
            self._learn(entry, swapped.found)
        return swapped.done

    def _learn(self, entry: str, found: Record | None) -> None:
        if found is None:
            # The store has lost it; this beat has not.
            self._known[entry] = self._known[entry]._replace(version=None)
            return
        # What is no state is replaced by what this beat believes.
        state = State.load(found.data) or self._known[entry].state
        self._known[entry] = _Known(state, found.version, free_at=self._clock() + (found.lease or 0.0))

    def _key(self, entry: str) -> str:
        return entry_key(self._app_name, entry)


def _written(state: State, *, lease: float | None = None) -> New:
    return New(state.version, state.dump(), ttl=_KEPT, lease=lease)


def _version(record: Record | New | None) -> str | None:
    return None if record is None else record.version
