"""
One timer per process keeps what is leased.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack

import pytest

from celerykit.errors import StoreUnavailable
from celerykit.renewal import Renewal
from celerykit.stores import Hold, New, Swap
from celerykit.stores.memory import MemoryStore
from tests.services import eventually

LEASE, TTL = 10.0, 100.0

#: Short enough to wait for.
SHORT = 0.03


class Clock:
    now = 0.0


class Watched(MemoryStore):
    """A store that tells what it was asked to renew."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock=lambda: clock.now)
        self.asked: list[list[str]] = []

    def renew(self, holds: Sequence[Hold]) -> list[bool]:
        self.asked.append([hold.key for hold in holds])
        return super().renew(holds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Watched:
    return Watched(clock)


@pytest.fixture
def renewal(monkeypatch: pytest.MonkeyPatch) -> Renewal:
    """One without a thread."""
    monkeypatch.setattr(Renewal, "_wake", lambda self, here: None)
    return Renewal(lambda: LEASE)


def hold(store: MemoryStore, key: str, version: str = "v") -> Hold:
    """Put a record there whose lease is to be kept."""
    store.swap(Swap(key, None, New(version, "", ttl=TTL, lease=LEASE)))
    return Hold(key, version, LEASE, TTL)


def lease(store: MemoryStore, key: str) -> float:
    record = store.read(key)
    assert record is not None
    assert record.lease is not None
    return record.lease


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "celerykit-renewal"}


def test_a_lease_begins_anew_while_its_block_runs(renewal: Renewal, store: Watched, clock: Clock) -> None:
    with renewal.holding(store, hold(store, "k")):
        clock.now = 9
        renewal.renew()
        assert lease(store, "k") == LEASE
    clock.now = 18
    renewal.renew()

    assert lease(store, "k") == 1
    assert store.asked == [["k"]]


def test_all_of_a_store_are_renewed_in_one_round_trip(renewal: Renewal, store: Watched, clock: Clock) -> None:
    other = Watched(clock)
    with ExitStack() as stack:
        for key in "abc":
            stack.enter_context(renewal.holding(store, hold(store, key)))
        stack.enter_context(renewal.holding(other, hold(other, "a")))
        renewal.renew()

    assert (store.asked, other.asked) == ([["a", "b", "c"]], [["a"]])


def test_what_ends_with_an_error_is_kept_no_longer(renewal: Renewal, store: Watched) -> None:
    for error in (ValueError(), SystemExit()):
        with pytest.raises(type(error)), renewal.holding(store, hold(store, f"{error!r}")):
            raise error
    renewal.renew()

    assert store.asked == []


def test_what_was_lost_is_told_once(renewal: Renewal, store: Watched, caplog: pytest.LogCaptureFixture) -> None:
    with renewal.holding(store, hold(store, "mine")), renewal.holding(store, hold(store, "yours")):
        store.swap(Swap("mine", "v", New("another's", "", ttl=TTL, lease=LEASE)))
        renewal.renew()
        renewal.renew()

    assert store.asked == [["mine", "yours"], ["yours"]]
    assert caplog.text.count("lease.lost record=mine") == 1


def test_a_run_that_ends_while_its_renewal_is_on_its_way_was_not_lost(
    renewal: Renewal, store: Watched, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, renew = ExitStack(), store.renew
    stack.enter_context(renewal.holding(store, hold(store, "k")))

    def late(holds: Sequence[Hold]) -> list[bool]:
        stack.close()
        store.swap(Swap("k", "v", New("done", "", ttl=TTL)))
        return renew(holds)

    monkeypatch.setattr(store, "renew", late)
    renewal.renew()

    record = store.read("k")
    assert record is not None
    assert (record.version, record.lease) == ("done", None)
    assert caplog.text == ""


def test_the_next_run_of_a_key_is_kept_when_the_last_one_s_renewal_comes_too_late(
    renewal: Renewal, store: Watched, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, renew = ExitStack(), ExitStack(), store.renew
    first.enter_context(renewal.holding(store, hold(store, "k", "first")))

    def late(holds: Sequence[Hold]) -> list[bool]:
        monkeypatch.setattr(store, "renew", renew)
        first.close()
        store.swap(Swap("k", "first", None))
        second.enter_context(renewal.holding(store, hold(store, "k", "second")))
        return renew(holds)

    monkeypatch.setattr(store, "renew", late)
    renewal.renew()
    clock.now = 9
    renewal.renew()

    assert lease(store, "k") == LEASE
    second.close()


def test_a_run_in_place_within_a_run_of_the_same_key_leaves_that_one_kept(
    renewal: Renewal, store: Watched, clock: Clock
) -> None:
    in_place = Watched(clock)
    with renewal.holding(store, hold(store, "k", "outer")):
        with renewal.holding(in_place, hold(in_place, "k", "inner")):
            renewal.renew()
        clock.now = 9
        renewal.renew()

        assert lease(store, "k") == LEASE


def test_a_record_that_is_dropped_is_kept_no_longer(renewal: Renewal, store: Watched) -> None:
    with renewal.holding(store, hold(store, "k")), renewal.holding(store, hold(store, "other")):
        renewal.drop("k")
        renewal.drop("unknown")
        renewal.renew()

    assert store.asked == [["other"]]


def test_a_store_that_is_away_is_asked_again(
    renewal: Renewal, store: Watched, clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(holds: Sequence[Hold]) -> list[bool]:
        raise StoreUnavailable("away")

    with renewal.holding(store, hold(store, "k")):
        with monkeypatch.context() as patch:
            patch.setattr(store, "renew", away)
            renewal.renew()
            patch.setattr(store, "renew", lambda holds: 1 / 0)
            renewal.renew()
        clock.now = 9
        renewal.renew()

        assert lease(store, "k") == LEASE
    assert "lease.not_renewed count=1 error='StoreUnavailable: away'" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_what_one_cannot_renew_does_not_keep_the_others_from_it(
    renewal: Renewal, caplog: pytest.LogCaptureFixture
) -> None:
    renewed: list[str] = []
    renewal.keep("a", lambda: renewed.append("a"))
    renewal.keep("bad", lambda: [][0])
    renewal.keep("b", lambda: renewed.append("b"))

    renewal.renew()
    renewal.drop("a")
    renewal.renew()

    assert renewed == ["a", "b", "b"]
    assert caplog.text.count("lease.not_renewed slot=bad error='IndexError: list index out of range'") == 2


# Its thread


def test_a_thread_renews_three_times_in_a_lease_and_only_while_there_is_something(store: Watched) -> None:
    renewal, before = Renewal(lambda: SHORT), threads()
    for key in ("first", "second"):
        store.asked.clear()
        with renewal.holding(store, hold(store, key)):
            eventually(lambda: len(store.asked) >= 3)
        assert [key] in store.asked

    [thread] = threads() - before
    assert thread.daemon
    asked = len(store.asked)
    threading.Event().wait(SHORT)
    assert len(store.asked) <= asked + 1  # which was on its way


def test_there_is_no_thread_before_there_is_something_and_one_for_all(store: Watched) -> None:
    before = threads()
    renewal = Renewal(lambda: SHORT)
    assert threads() == before

    with ExitStack() as stack:
        for number in range(20):
            stack.enter_context(renewal.holding(store, hold(store, f"{number}")))
        renewal.keep("slot", lambda: None)
        assert len(threads() - before) == 1
        eventually(lambda: any(len(asked) == 20 for asked in store.asked))
    renewal.drop("slot")


def test_threads_that_begin_and_end_runs_do_not_disturb_each_other(store: Watched) -> None:
    renewal = Renewal(lambda: SHORT)
    lost: list[str] = []

    def work(name: int) -> None:
        for number in range(200):
            held = hold(store, f"{name} {number % 3}", f"{number}")
            with renewal.holding(store, held):
                if store.read(held.key) is None:
                    lost.append(held.key)
            store.swap(Swap(held.key, held.version, None))

    workers = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert lost == []
    with renewal.holding(store, hold(store, "after all")):
        store.asked.clear()
        eventually(lambda: ["after all"] in store.asked)


def test_a_forked_process_begins_with_none_and_has_a_thread_of_its_own(
    store: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewal = Renewal(lambda: 3600.0)
    with renewal.holding(store, hold(store, "parent's")):
        before = threads()
        renewal._here.lock.acquire()  # by a thread that the child does not have
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with renewal.holding(store, hold(store, "child's")):
            renewal.drop("parent's")
            renewal.renew()
            assert len(threads() - before) == 1
        monkeypatch.undo()
        renewal._here.lock.release()
        renewal.renew()

    assert store.asked == [["child's"], ["parent's"]]


def test_threads_that_begin_at_once_after_a_fork_are_all_kept(
    renewal: Renewal, store: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(8)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    keys = [f"{number}" for number in range(8)]
    asked: list[str] = []

    def work(key: str) -> None:
        together.wait(5)
        with renewal.holding(store, hold(store, key)):
            together.wait(5)
            together.wait(5)

    workers = [threading.Thread(target=work, args=(key,)) for key in keys[1:]]
    for worker in workers:
        worker.start()
    together.wait(5)
    with renewal.holding(store, hold(store, keys[0])):
        together.wait(5)
        renewal.renew()
        asked += sorted(store.asked[0])
        together.wait(5)
    for worker in workers:
        worker.join()

    assert asked == keys
