"""The store beside a model of it: whatever is asked in whatever order, both say the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from celerykit.stores import Hold, New, Record, Store, Swap, Swapped
from celerykit.stores.memory import MemoryStore

#: Few of each, so that they meet.
KEYS = st.sampled_from(["a", "b", "ключ *"])
VERSIONS = st.sampled_from(["1", "2", "3"])
HOLDERS = st.sampled_from(["x", "y", "z"])

#: Time goes by in whole steps, and everything ends in the middle of one: real stores need not be exact to the second.
STEP = 1000.0
TIMES = st.sampled_from([0.5 * STEP, 1.5 * STEP, 3.5 * STEP])

NEWS = st.builds(New, VERSIONS, st.text("ab", max_size=3), ttl=TIMES, lease=st.none() | TIMES)
SWAPS = st.builds(Swap, KEYS, st.none() | VERSIONS, st.none() | NEWS, st.booleans())


@dataclass
class Kept:
    version: str
    data: str
    lease_ends: float | None
    expires: float


@dataclass
class Model:
    """What a store does, as simply as it can be said."""

    now: float = 0.0
    records: dict[str, Kept] = field(default_factory=dict)
    slots: dict[str, dict[str, float]] = field(default_factory=dict)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.records = {key: kept for key, kept in self.records.items() if kept.expires > self.now}
        for key, taken in self.slots.items():
            self.slots[key] = {holder: ends for holder, ends in taken.items() if ends > self.now}

    def read(self, key: str) -> Record | None:
        kept = self.records.get(key)
        if kept is None:
            return None
        return Record(kept.version, kept.data, None if kept.lease_ends is None else kept.lease_ends - self.now)

    def swap(self, swap: Swap) -> Swapped:
        found = self.read(swap.key)
        is_there = found is not None and found.version == swap.expected
        has_lapsed = found is not None and (found.lease is None or found.lease <= 0)
        if not (found is None if swap.expected is None else is_there and (has_lapsed or not swap.lapsed)):
            return Swapped(done=False, found=found)
        self.records.pop(swap.key, None)
        if swap.new is not None:
            lease_ends = None if swap.new.lease is None else self.now + swap.new.lease
            self.records[swap.key] = Kept(swap.new.version, swap.new.data, lease_ends, self.now + swap.new.ttl)
        return Swapped(done=True, found=None)

    def renew(self, hold: Hold) -> bool:
        kept = self.records.get(hold.key)
        if kept is None or kept.version != hold.version:
            return False
        kept.lease_ends, kept.expires = self.now + hold.lease, self.now + hold.ttl
        return True

    def take(self, key: str, holder: str, *, limit: int, ttl: float) -> float:
        taken = self.slots.setdefault(key, {})
        if holder not in taken and len(taken) >= limit:
            # So many must end before it is one less than the limit.
            return sorted(taken.values())[len(taken) - limit] - self.now
        taken[holder] = self.now + ttl
        return 0.0

    def give(self, key: str, holder: str) -> None:
        self.slots.get(key, {}).pop(holder, None)


class Comparison(RuleBasedStateMachine):
    """Ask both the same."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.store = self.open()

    def open(self) -> Store:
        """Return an empty store."""
        raise NotImplementedError

    def pass_time(self, seconds: float) -> None:
        """Let the store believe that so much time has gone by."""
        raise NotImplementedError

    @rule(swaps=st.lists(SWAPS, min_size=1, max_size=4))
    def swap(self, swaps: list[Swap]) -> None:
        assert_alike(self.store.swap(*swaps), [self.model.swap(swap) for swap in swaps])

    @rule(holds=st.lists(st.builds(Hold, KEYS, VERSIONS, lease=TIMES, ttl=TIMES), max_size=3))
    def renew(self, holds: list[Hold]) -> None:
        assert self.store.renew(holds) == [self.model.renew(hold) for hold in holds]

    @rule(key=KEYS, holder=HOLDERS, limit=st.integers(1, 3), ttl=TIMES)
    def take(self, key: str, holder: str, limit: int, ttl: float) -> None:
        waits = [asked.take(key, holder, limit=limit, ttl=ttl) for asked in (self.store, self.model)]
        assert (waits[0] > 0) == (waits[1] > 0)
        assert_alike(*waits)

    @rule(key=KEYS, holder=HOLDERS)
    def give(self, key: str, holder: str) -> None:
        for asked in (self.store, self.model):
            asked.give(key, holder)

    @rule(steps=st.integers(1, 4))
    def time_goes_by(self, steps: int) -> None:
        self.pass_time(steps * STEP)
        self.model.pass_time(steps * STEP)

    @rule(prefix=st.sampled_from(["", "a", "ключ *", "?"]))
    def find(self, prefix: str) -> None:
        found = dict(self.store.find(prefix))
        assert_alike(found, {key: self.model.read(key) for key in self.model.records if key.startswith(prefix)})

    @invariant()
    def they_hold_the_same(self) -> None:
        for key in ("a", "b", "ключ *"):
            assert_alike(self.store.read(key), self.model.read(key))


def assert_alike(one: Any, other: Any) -> None:
    """Compare, but times only to a quarter of a step."""
    if isinstance(one, float) and isinstance(other, float):
        assert abs(one - other) < STEP / 4
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        assert_alike(list(one.values()), [other[key] for key in one])
    elif isinstance(one, (list, tuple)) and other is not None:
        assert len(one) == len(other)
        for mine, yours in zip(one, other, strict=True):
            assert_alike(mine, yours)
    else:
        assert one == other


class MemoryComparison(Comparison):
    def open(self) -> Store:
        self.now = 0.0
        return MemoryStore(clock=lambda: self.now)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


TestMemoryStore = MemoryComparison.TestCase
TestMemoryStore.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
