"""
Claims in a store: who is first when several send, how long a claim holds, and what is not to be read.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import time_machine

from celerykit.errors import StoreUnavailable
from celerykit.idempotency import Claim, Claims, Identity, Once, Sending, State, Turn, find_claim
from celerykit.idempotency.claim import Answer, Event
from celerykit.idempotency.claims import Ended
from celerykit.idempotency.records import end_claim, record_of
from celerykit.idempotency.sending import Asked, send_all
from celerykit.stores import Hold, New, Record, Store, Swap, Swapped
from celerykit.stores.memory import MemoryStore

KEY = Identity("shop.pay:1", "contract:a")
OTHER = Identity("shop.pay:2", "contract:b")

LEASE, KEEP = 10.0, 100.0

#: So long a call that is queued is thought to be on its way.
ON_ITS_WAY = 60.0


class Clock:
    now = 0.0


class NotRenewed:
    def holding(self, store: Store, hold: Hold) -> AbstractContextManager[None]:
        return nullcontext()

    def drop(self, name: str) -> None: ...


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemoryStore:
    return MemoryStore(clock=lambda: clock.now)


@pytest.fixture
def claims(store: MemoryStore) -> Claims:
    return Claims(
        task="shop.pay",
        policy=Once(keep=KEEP),
        keys=None,
        store=lambda: store,
        lease=lambda: LEASE,
        renewal=NotRenewed(),
        may_rerun=True,
        encode=json.dumps,
        decode=json.loads,
        ended=lambda call_id: None,
    )


@pytest.fixture(autouse=True)
def at_a_time() -> Iterator[None]:
    with time_machine.travel(1_900_000_000, tick=False):
        yield


def send(claims: Claims, id: str, identity: Identity = KEY, **facts: Any) -> Sending:  # noqa: A002
    return claims.send(Asked(claims, identity, id, **facts))


def start(claims: Claims, id: str, turn: Turn = Turn(), **facts: Any) -> Any:  # noqa: A002, B008
    asked: dict[str, Any] = {"token": "", "joined": None, "was_sent": True}
    return claims.start(KEY, id, turn, **(asked | facts))


def found(store: Store, identity: Identity = KEY) -> Claim | None:
    return find_claim(store, identity.key)


def lease_and_life(store: MemoryStore, clock: Clock) -> tuple[float, float]:
    """Find out how long a record has, in steps of a second."""
    record = store.read(record_of(KEY.key))
    assert record is not None
    assert record.lease is not None
    began = clock.now
    while store.read(record_of(KEY.key)) is not None:
        clock.now += 1
    life, clock.now = clock.now - began, began
    return record.lease, life


# Sending


def test_the_first_who_sends_has_the_key_and_others_are_told_who(claims: Claims, store: MemoryStore) -> None:
    answer, claim = send(claims, "first")

    assert answer is Answer.GO
    assert claim == found(store)
    assert claim is not None
    assert (claim.state, claim.id, claim.turn, claim.token) == (State.CLAIMED, "first", Turn(), "")
    assert (claim.task, claim.call, claim.keep) == ("shop.pay", KEY.call, KEEP)
    assert send(claims, "second") == (Answer.JOIN, claim)


def test_of_many_threads_one_is_first(claims: Claims) -> None:
    told: list[Sending] = []
    threads = [threading.Thread(target=lambda n=n: told.append(send(claims, f"{n}"))) for n in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    [first] = [claim for answer, claim in told if answer is Answer.GO]
    assert first is not None
    assert {claim.id for answer, claim in told if answer is Answer.JOIN and claim} == {first.id}


def test_of_many_that_are_sent_together_the_first_of_each_key_goes(claims: Claims, store: MemoryStore) -> None:
    other_task = replace(claims, task="shop.ship", policy=Once(running="skip"))
    asked = [
        Asked(claims, KEY, "a"),
        Asked(claims, OTHER, "b"),
        Asked(claims, KEY, "c"),
        Asked(other_task, KEY, "d"),
    ]

    told = send_all(asked)

    assert [answer for answer, _ in told] == [Answer.GO, Answer.GO, Answer.JOIN, Answer.SKIP]
    assert [claim.id for _, claim in told if claim] == ["a", "b", "a", "a"]
    assert send_all([]) == []


def test_many_free_keys_cost_one_round_trip(
    claims: Claims, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    swap = store.swap
    monkeypatch.setattr(store, "swap", lambda *swaps: asked.append(len(swaps)) or swap(*swaps))

    send_all([Asked(claims, Identity(f"shop.pay:{number}"), f"{number}") for number in range(50)])
    start(claims, "1")
    assert asked == [50, 1]

    send(claims, "free")
    start(claims, "free")
    assert asked == [50, 1, 1, 1]


@pytest.mark.parametrize(
    ("facts", "lease", "life"),
    [
        ({}, ON_ITS_WAY, ON_ITS_WAY + KEEP),
        ({"delay": 3600.0}, 3600 + ON_ITS_WAY, 3600 + KEEP),
        ({"until": 30.0}, ON_ITS_WAY, ON_ITS_WAY + KEEP),
        ({"until": 900.0}, ON_ITS_WAY, 900 + KEEP),
        ({"delay": 600.0, "until": 900.0}, 600 + ON_ITS_WAY, 900 + KEEP),
    ],
)
def test_a_queued_claim_lasts_until_it_is_due_or_expires_and_then_as_long_as_it_is_kept(
    claims: Claims, store: MemoryStore, clock: Clock, facts: dict[str, float], lease: float, life: float
) -> None:
    send(claims, "first", **facts)

    assert lease_and_life(store, clock) == (lease, life)


def test_what_nobody_has_heard_of_is_sent_once_more_and_only_once(
    claims: Claims, store: MemoryStore, clock: Clock
) -> None:
    """Whoever sent it may have died before the broker had it."""
    _, first = send(claims, "first")
    clock.now = ON_ITS_WAY

    assert send(claims, "second") == (Answer.SEND_AGAIN, first)
    assert send(claims, "third") == (Answer.JOIN, first)


def test_what_was_put_off_is_sent_again_at_the_turn_it_waits_for(claims: Claims, clock: Clock) -> None:
    run = start(claims, "first").run
    claims.put_off(run, delay=30, resume={"attempt": 2})
    clock.now = 30 + ON_ITS_WAY - 1
    assert send(claims, "second").answer is Answer.JOIN

    clock.now += 1
    answer, claim = send(claims, "second")

    assert answer is Answer.SEND_AGAIN
    assert claim is not None
    assert (claim.id, claim.turn, claim.resume) == ("first", Turn(0, 1), {"attempt": 2})


def test_what_was_running_and_is_gone_is_sent_again_and_starts_at_once(claims: Claims, clock: Clock) -> None:
    start(claims, "first")
    clock.now = LEASE

    assert send(claims, "second").answer is Answer.SEND_AGAIN

    again = start(claims, "first")
    assert (again.answer, again.run.claim.runs) == (Answer.GO, 2)
    assert send(claims, "third").answer is Answer.JOIN


def test_of_several_that_find_a_lapsed_claim_one_sends_it_again(
    claims: Claims, store: MemoryStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(claims, "first")
    clock.now = ON_ITS_WAY
    others: list[Sending] = []
    swap = store.swap

    def somebody_is_faster(*swaps: Swap) -> list[Swapped]:
        monkeypatch.setattr(store, "swap", swap)
        swapped = swap(*swaps)
        others.append(send(claims, "faster"))
        return swapped

    monkeypatch.setattr(store, "swap", somebody_is_faster)

    assert send(claims, "second").answer is Answer.JOIN
    assert [answer for answer, _ in others] == [Answer.SEND_AGAIN]


def test_what_could_not_be_sent_is_taken_back_and_nothing_else(claims: Claims, store: MemoryStore) -> None:
    send(claims, "first")
    claims.take_back(KEY, "second")
    assert found(store) is not None

    claims.take_back(KEY, "first")
    assert found(store) is None

    start(claims, "first")
    claims.take_back(KEY, "first")
    claim = found(store)
    assert claim is not None
    assert claim.state is State.RUNNING


def test_a_claim_that_cannot_be_taken_back_frees_itself(
    claims: Claims, store: MemoryStore, clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(claims, "first")
    with monkeypatch.context() as away:
        away.setattr(store, "swap", is_away)
        claims.take_back(KEY, "first")

    assert f"claim.not_taken_back key={KEY.key} id=first error='StoreUnavailable: away'" in caplog.text
    clock.now = ON_ITS_WAY
    assert send(claims, "second").answer is Answer.SEND_AGAIN


def is_away(*swaps: Swap) -> Any:
    raise StoreUnavailable("away")


def test_a_caller_is_told_that_nobody_knows(
    claims: Claims, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "swap", is_away)

    with pytest.raises(StoreUnavailable):
        send(claims, "first")


def test_what_another_task_has_ended_meanwhile_is_known_to_who_sends(claims: Claims, store: MemoryStore) -> None:
    run = start(claims, "first").run
    claims.put_off(run, delay=KEEP, resume=None)
    assert send(claims, "second").answer is Answer.JOIN

    ended = replace(claims, ended={"first": Ended(run.claim.since + 1, "paid")}.get)
    answer, claim = send(ended, "second")

    assert answer is Answer.REUSE
    assert claim is not None
    assert claims.result_of(claim) == "paid"


def test_what_a_call_that_went_on_by_hand_waits_for_is_no_end(claims: Claims) -> None:
    """Its id may have a result of long ago."""
    run = start(claims, "first").run
    claims.put_off(run, delay=5, resume=None)

    ended = replace(claims, ended={"first": Ended(run.claim.since - 3600, "of yesterday")}.get)

    assert send(ended, "second").answer is Answer.JOIN


# Starting


def test_a_claim_is_its_holder_s_for_a_lease_and_remembered_after_it(
    claims: Claims, store: MemoryStore, clock: Clock
) -> None:
    start(claims, "first")

    assert lease_and_life(store, clock) == (LEASE, LEASE + KEEP)


@pytest.mark.parametrize("was_sent", [True, False])
def test_a_wrong_guess_of_what_stands_there_changes_nothing(claims: Claims, was_sent: bool) -> None:
    """Somebody else's message may say nothing of a key, or speak of one that nobody claimed."""
    first = start(claims, "first", was_sent=was_sent)
    assert first.answer is Answer.GO
    claims.put_off(first.run, delay=0, resume=None)

    second = start(claims, "first", Turn(0, 1), was_sent=was_sent)

    assert second.answer is Answer.GO
    assert second.run.claim.turn == Turn(0, 1)


def test_a_claim_that_is_let_go_may_be_taken_at_once(claims: Claims, store: MemoryStore, clock: Clock) -> None:
    run = start(claims, "first").run
    assert start(claims, "first").answer is Answer.WAIT

    claims.abandon(run.key, run.claim.version)

    again = start(claims, "first")
    assert again.answer is Answer.GO
    assert again.run.claim.runs == 2
    claims.abandon(run.key, run.claim.version)  # of the run before: nothing
    assert start(claims, "first").answer is Answer.WAIT


def test_starts_are_counted_until_one_comes_to_an_end(claims: Claims, clock: Clock) -> None:
    def runs(id: str, turn: Turn = Turn()) -> Any:  # noqa: A002, B008
        clock.now += LEASE
        return start(claims, id, turn).run

    assert [runs(id).claim.runs for id in ("first", "first", "second")] == [1, 2, 3]  # noqa: A001

    claims.put_off(runs("first"), delay=0, resume=None)
    assert runs("first", Turn(0, 1)).claim.runs == 1
    assert runs("first", Turn(0, 2)).claim.runs == 1
    claims.hand_back(runs("first", Turn(0, 2)))
    assert runs("first", Turn(0, 2)).claim.runs == 1


@pytest.mark.parametrize("written", ["", "nonsense", "[]", "{}", '{"state": "asleep", "id": "x"}', '{"state": "done"}'])
def test_what_cannot_be_read_is_no_claim_and_is_written_over(claims: Claims, store: MemoryStore, written: str) -> None:
    store.swap(Swap(record_of(KEY.key), None, New("of somebody", written, ttl=KEEP, lease=LEASE)))
    assert found(store) is None

    assert send(claims, "first").answer is Answer.GO
    store.swap(
        Swap(record_of(KEY.key), "claimed:first:0.0:", New("of somebody", written, ttl=KEEP, lease=LEASE)),
    )
    assert start(claims, "first").answer is Answer.GO


def test_what_changes_each_time_it_is_looked_at_is_not_looked_at_for_ever(
    claims: Claims, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Claim(State.FAILED, "other")
    answers = itertools.cycle([None, Record(failed.version, failed.data(), None)])
    asked = 0

    def changing(*swaps: Swap) -> list[Swapped]:
        nonlocal asked
        asked += 1
        return [Swapped(False, next(answers))]

    monkeypatch.setattr(store, "swap", changing)

    for ask in (send, start):
        with pytest.raises(StoreUnavailable, match=r"the claim of shop\.pay:1 has changed 20 times"):
            ask(claims, "first")
    assert asked < 50


# The end, from outside


def ended_by(store: MemoryStore, event: Event, turn: Turn = Turn(), **facts: Any) -> str:  # noqa: B008
    asked: dict[str, Any] = {"id": "first", "token": None, "why": "gone"}
    end_claim(store, record_of(KEY.key), turn=turn, event=event, **(asked | facts))
    claim = found(store)
    return "free" if claim is None else f"{claim.state} {claim.outcome}".strip()


def test_what_is_queued_or_waits_is_ended(claims: Claims, store: MemoryStore) -> None:
    send(claims, "first")
    assert ended_by(store, Event.FAIL) == "failed gone"

    claims.put_off(start(claims, "first").run, delay=0, resume=None)
    assert ended_by(store, Event.FAIL) == "waiting"  # by a message of the turn before: not its to end
    assert ended_by(store, Event.RELEASE, Turn(0, 1)) == "free"
    assert ended_by(store, Event.FAIL) == "free"


def test_a_run_is_ended_by_who_knows_its_token_or_when_it_is_gone(
    claims: Claims, store: MemoryStore, clock: Clock
) -> None:
    start(claims, "first", token="drawn")

    assert ended_by(store, Event.FAIL) == "running"
    assert ended_by(store, Event.FAIL, token="of another delivery") == "running"
    assert ended_by(store, Event.FAIL, id="second", token="drawn") == "running"
    assert ended_by(store, Event.FAIL, token="drawn") == "failed gone"

    start(claims, "first", token="drawn")
    clock.now += LEASE
    assert ended_by(store, Event.RELEASE) == "free"


def test_what_is_over_stays_as_it_is(claims: Claims, store: MemoryStore) -> None:
    run = start(claims, "first", token="drawn").run
    claims.finish(run, "paid")

    for event in (Event.FAIL, Event.RELEASE, Event.HAND_BACK):
        assert ended_by(store, event, token="drawn") == 'done "paid"'


def test_a_run_that_goes_back_is_queued_again_and_no_run_of_its_own(claims: Claims, store: MemoryStore) -> None:
    start(claims, "first", token="drawn")

    assert ended_by(store, Event.HAND_BACK, token="drawn", why="") == "claimed"
    assert ended_by(store, Event.HAND_BACK, token="drawn", why="") == "claimed"
    claim = found(store)
    assert claim is not None
    assert (claim.token, claim.runs) == ("", 0)
    assert send(claims, "second").answer is Answer.JOIN
    assert start(claims, "first").answer is Answer.GO


def test_nothing_is_left_when_a_key_was_kept_for_long_enough(claims: Claims, store: MemoryStore, clock: Clock) -> None:
    endings: list[Any] = [
        lambda run: claims.finish(run, "paid"),
        lambda run: claims.fail(run, ValueError()),
        lambda run: claims.release(run),
        lambda run: claims.put_off(run, delay=5, resume=None),
        lambda run: claims.hand_back(run),
        lambda run: claims.abandon(run.key, run.claim.version),
        lambda run: None,
    ]
    for number, end in enumerate(endings):
        identity = Identity(f"shop.pay:{number}")
        send(claims, "first", identity)
        end(claims.start(identity, "first", Turn(), token="", joined=None, was_sent=True).run)

    clock.now = KEEP - 1
    assert len(list(store.find(""))) == len(endings) - 1
    clock.now = KEEP + ON_ITS_WAY
    assert list(store.find("")) == []
