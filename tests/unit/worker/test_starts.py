"""
How often a message may be started.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from celerykit.errors import StoreUnavailable
from celerykit.stores.memory import MemoryStore
from celerykit.worker.starts import Starts, Verdict, buried_key, letter_of


def request(*, redelivered: bool = True, on_crash: str = "rerun", headers: dict[str, Any] | None = None) -> Any:
    header = {"task": "t", "id": "1", "retries": 0, **(headers or {})}
    return SimpleNamespace(
        id="1",
        name="t",
        starts=1,
        task=SimpleNamespace(on_crash=on_crash),
        delivery_info={"redelivered": redelivered},
        request_dict=header,
        message=SimpleNamespace(headers=header, body=b"[]"),
    )


class SharedStore(MemoryStore):
    is_shared = True


class BrokenStore(SharedStore):
    def get(self, key: str) -> str | None:
        raise StoreUnavailable("down")

    add = mark = get  # type: ignore[assignment]


@pytest.fixture
def store() -> SharedStore:
    return SharedStore()


@pytest.fixture
def starts(store: SharedStore) -> Starts:
    return Starts(store, limit=3, keep=60)


def test_a_fresh_message_starts_without_asking_the_store() -> None:
    assert Starts(BrokenStore(), limit=3, keep=60).judge(request(redelivered=False)) is Verdict.START


def test_a_message_is_started_three_times(starts: Starts) -> None:
    verdicts = [starts.judge(request(redelivered=number > 0)) for number in range(4)]

    assert verdicts == [Verdict.START] * 3 + [Verdict.BURY]


def test_a_start_that_was_handed_back_does_not_count(starts: Starts) -> None:
    for _ in range(20):
        again = request()
        assert starts.judge(again) is Verdict.START
        starts.forgive(again)


def test_a_retry_is_counted_anew(starts: Starts) -> None:
    for retries in range(9):
        assert starts.judge(request(headers={"retries": retries})) is Verdict.START


def test_what_is_buried_already_is_only_acknowledged(starts: Starts, store: SharedStore) -> None:
    store.mark(buried_key(letter_of(request())), "failed", ttl=60)

    assert starts.judge(request()) is Verdict.ACKNOWLEDGE


def test_on_crash_bury_starts_once(starts: Starts) -> None:
    assert starts.judge(request(redelivered=False, on_crash="bury")) is Verdict.START
    assert starts.judge(request(on_crash="bury")) is Verdict.BURY


def test_on_crash_bury_starts_what_was_only_held_before(starts: Starts) -> None:
    assert starts.judge(request(on_crash="bury")) is Verdict.START


def test_on_crash_bury_believes_the_broker_when_nobody_else_counts() -> None:
    assert Starts(MemoryStore(), limit=3, keep=60).judge(request(on_crash="bury")) is Verdict.BURY


def test_without_a_shared_store_the_broker_s_count_is_a_hint() -> None:
    starts = Starts(MemoryStore(), limit=3, keep=60)

    assert starts.judge(request(headers={"x-delivery-count": 30})) is Verdict.START
    assert starts.judge(request(headers={"x-delivery-count": 31})) is Verdict.BURY


def test_with_the_store_down_work_goes_on_but_nothing_that_must_not_run_twice() -> None:
    starts = Starts(BrokenStore(), limit=3, keep=60)

    assert starts.judge(request()) is Verdict.START
    assert starts.judge(request(on_crash="bury")) is Verdict.WAIT


def test_a_second_copy_of_a_replay_does_not_start(starts: Starts) -> None:
    first, second = (
        request(redelivered=False, headers={"celerykit": {"v": 1, "replay": 1, "replayed_by": f"letter/{nonce}"}})
        for nonce in ("a", "b")
    )

    assert [starts.judge(one) for one in (first, second, first)] == [Verdict.START, Verdict.ACKNOWLEDGE, Verdict.START]
