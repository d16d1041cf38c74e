"""
The step around a task: who has the key runs, and all others get what came of that.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

import pytest
import time_machine
from celery.exceptions import Ignore

from celerykit.call import Call, Later, Outcome, Stopped
from celerykit.contract import Contract
from celerykit.errors import DuplicateCall, InvalidPayload, KeyConflict, StoreUnavailable, Undeliverable
from celerykit.headers import Headers
from celerykit.idempotency import Claim, Claims, Key, Once, Skipped, State, Turn, Waiting, find_claim, once
from celerykit.idempotency.claims import Ended
from celerykit.idempotency.keys import Keys
from celerykit.idempotency.records import record_of
from celerykit.stores import Hold, New, Store, Swap
from celerykit.stores.memory import MemoryStore

NOW = 1_900_000_000.0
LEASE, KEEP = 10.0, 100.0


def pay(order: Annotated[int, Key()], note: str = "") -> str: ...


CONTRACT = Contract("shop.pay", pay)
IDENTITY = Keys(CONTRACT, Once()).identify((1,), {})


class Clock:
    now = 0.0


class Faltering(MemoryStore):
    """A store that is away for the next so many questions."""

    away = 0

    def _locked(self) -> Any:
        if self.away > 0:
            self.away -= 1
            raise StoreUnavailable("the store is away")
        return super()._locked()


class Renewal:
    """Knows what it keeps."""

    def __init__(self) -> None:
        self.holds: list[Hold] = []

    @contextmanager
    def holding(self, store: Store, hold: Hold) -> Iterator[None]:
        self.holds.append(hold)
        try:
            yield
        finally:
            self.holds.remove(hold)

    def drop(self, name: str) -> None: ...


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Faltering:
    return Faltering(clock=lambda: clock.now)


@pytest.fixture
def stored() -> dict[str, Ended]:
    """What the result backend has, by id."""
    return {}


@pytest.fixture
def claims(store: Faltering, stored: dict[str, Ended]) -> Claims:
    policy = Once(keep=KEEP)
    return Claims(
        task="shop.pay",
        policy=policy,
        keys=Keys(CONTRACT, policy),
        store=lambda: store,
        lease=lambda: LEASE,
        renewal=Renewal(),
        may_rerun=True,
        encode=json.dumps,
        decode=json.loads,
        ended=stored.get,
    )


@pytest.fixture(autouse=True)
def at_a_time() -> Iterator[None]:
    with time_machine.travel(NOW, tick=False):
        yield


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr("celerykit.idempotency.claims.time.sleep", pauses.append)
    return pauses


def with_policy(claims: Claims, **options: Any) -> Claims:
    return replace(claims, policy=Once(keep=KEEP, **options))


def call_of(claims: Claims | None, *args: Any, id: str = "second", **facts: Any) -> Call:  # noqa: A002
    """Build a call whose sender has claimed its key, unless the header says otherwise."""
    header = facts.pop("header", {})
    sent = Headers(**{"key": IDENTITY.key, "call": IDENTITY.call, "sent_at": NOW, **header})
    policies = {"once": claims, "on_store_down": facts.pop("on_store_down", "retry")}
    return Call("shop.pay", id, 1, sent, CONTRACT, args or (1,), {}, policies, **facts)


def never(call: Call) -> Any:
    pytest.fail("it ran")


def raising(error: BaseException) -> Callable[[Call], Any]:
    def run(call: Call) -> Any:
        raise error

    return run


def claim_in(store: Store) -> Claim | None:
    return find_claim(store, IDENTITY.key)


def state_in(store: Store) -> str:
    claim = claim_in(store)
    return "free" if claim is None else str(claim.state)


def put(store: Store, state: str, **facts: Any) -> None:
    """Let the first call have brought the key to this state."""
    claim = Claim(State(state), "first", **{"task": "shop.pay", "call": IDENTITY.call, "keep": KEEP, **facts})
    lease = None if claim.is_over else LEASE
    store.swap(Swap(record_of(IDENTITY.key), None, New(claim.version, claim.data(), ttl=KEEP, lease=lease)))


# Who has the key


def test_a_task_without_keys_is_left_alone(store: Faltering) -> None:
    assert once(lambda call: "ran", call_of(None)) == "ran"
    assert list(store.find("")) == []


def test_a_call_whose_key_is_free_runs_and_is_remembered(claims: Claims, store: Faltering) -> None:
    assert once(lambda call: {"paid": call.args[0]}, call_of(claims)) == {"paid": 1}

    claim = claim_in(store)
    assert claim is not None
    assert (claim.state, claim.id, claim.task, claim.call) == (State.DONE, "second", "shop.pay", IDENTITY.call)
    assert (claim.since, claim.keep, claims.result_of(claim)) == (NOW, KEEP, {"paid": 1})


def test_it_is_running_and_kept_while_it_runs(claims: Claims, store: Faltering) -> None:
    def run(call: Call) -> None:
        [hold] = claims.renewal.holds  # type: ignore[attr-defined]
        claim = claim_in(store)
        assert claim is not None
        assert (claim.state, claim.token) == (State.RUNNING, "drawn")
        assert hold == Hold(record_of(IDENTITY.key), claim.version, LEASE, LEASE + KEEP)

    once(run, call_of(claims, token="drawn"))

    assert claims.renewal.holds == []  # type: ignore[attr-defined]


def test_a_token_is_drawn_for_each_run_where_nobody_has(claims: Claims, store: Faltering) -> None:
    tokens = set()

    def run(call: Call) -> None:
        claim = claim_in(store)
        assert claim is not None
        tokens.add(claim.token)
        raise Later(1, attempt=1, kind="retry")

    for turn in (0, 1, 2):
        with pytest.raises(Later):
            once(run, call_of(claims, header={"turn": turn}))

    assert len(tokens - {""}) == 3


def test_a_redelivery_of_what_is_done_gets_the_result(claims: Claims) -> None:
    once(lambda call: "paid", call_of(claims))

    assert once(never, call_of(claims)) == "paid"


def test_a_call_of_somebody_who_knows_nothing_of_keys_has_the_same_key(claims: Claims) -> None:
    once(lambda call: "paid", call_of(claims))
    foreign = replace(call_of(claims, "1", "", id="third"), headers=Headers())

    assert once(never, foreign) == "paid"


def test_a_key_that_the_sender_gave_goes_before_the_arguments(claims: Claims) -> None:
    given = claims.identify((1,), {}, id=None, key="x")
    header = {"key": given.key, "call": given.call}
    once(lambda call: "paid", call_of(claims, header=header))

    assert once(never, call_of(claims, header=header, id="third")) == "paid"
    assert once(lambda call: "paid by its order", call_of(claims, id="third")) == "paid by its order"


def test_arguments_that_do_not_fit_are_left_to_whoever_refuses_them(claims: Claims, store: Faltering) -> None:
    foreign = replace(call_of(claims, "nonsense"), headers=Headers())

    with pytest.raises(InvalidPayload):
        once(raising(InvalidPayload("no")), foreign)

    assert list(store.find("")) == []


def test_a_call_may_be_remembered_by_its_id_only(claims: Claims) -> None:
    by_id = replace(claims, keys=None)
    one, other = (replace(call_of(by_id, id=call_id), headers=Headers()) for call_id in ("one", "other"))

    assert [once(lambda call: call.id, call) for call in (one, other)] == ["one", "other"]
    assert [once(never, call) for call in (one, other)] == ["one", "other"]


# What the others are told

TOLD: list[tuple[str, dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ("claimed", {"running": "raise"}, {}, DuplicateCall, "is that of call first, which is claimed. It did not run."),
    ("running", {"running": "raise"}, {}, DuplicateCall, "is that of call first, which is running. It did not run."),
    ("done", {"done": "raise"}, {}, DuplicateCall, "is that of call first, which is done. It did not run."),
    ("running", {"running": "skip"}, {}, Skipped, "is that of call first, which is running."),
    ("done", {"done": "skip"}, {}, Skipped, "is that of call first, which is done."),
    ("running", {}, {"call": "c:other"}, KeyConflict, "call first has the same key"),
    (
        "failed",
        {},
        {"joined": "first"},
        DuplicateCall,
        r"call first, which has the same key .*, has failed \(OSError\)",
    ),
]


@pytest.mark.parametrize(("state", "policy", "header", "error", "says"), TOLD)
def test_a_duplicate_is_told_what_the_task_says(
    claims: Claims,
    store: Faltering,
    state: str,
    policy: dict[str, Any],
    header: dict[str, Any],
    error: type[Exception],
    says: str,
) -> None:
    put(store, state, outcome="OSError", **({"call": "c:mine"} if "call" in header else {}))
    before = claim_in(store)

    with pytest.raises(error, match=says) as told:
        once(never, call_of(with_policy(claims, **policy), header=header))

    assert claim_in(store) == before
    if isinstance(told.value, DuplicateCall):
        assert (told.value.key, told.value.first) == (IDENTITY.key, "first")


def test_a_duplicate_that_waits_is_told_once(
    claims: Claims, store: Faltering, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    put(store, "running")
    for header in ({}, {"joined": "first"}, {"joined": "first"}):
        with pytest.raises(Waiting):
            once(never, call_of(claims, header=header))
    claim = claim_in(store)
    assert claim is not None
    done = replace(claim, state=State.DONE)
    store.swap(Swap(record_of(IDENTITY.key), claim.version, New(done.version, done.data(), ttl=KEEP)))

    once(never, call_of(claims, header={"joined": "first"}))

    assert [record.data for record in caplog.records] == [  # type: ignore[attr-defined]
        {"task": "shop.pay", "id": "second", "then": then, "key": IDENTITY.key, "first": "first"}
        for then in ("join", "reuse")
    ]


def test_no_argument_is_in_what_is_told(claims: Claims, store: Faltering, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    put(store, "running", call="c:mine")

    with pytest.raises(KeyConflict) as told:
        once(never, call_of(claims, 1, "a secret", header={"call": "c:other"}))

    assert "a secret" not in f"{told.value!r} {caplog.text}"


@pytest.mark.parametrize(("sent", "looks_after"), [(0, 0.5), (0.6, 0.5), (4, 2), (60, 5), (-3, 0.5), (None, 0.5)])
def test_a_duplicate_waits_for_the_first_and_looks_the_more_seldom_the_longer(
    claims: Claims, store: Faltering, sent: float | None, looks_after: float
) -> None:
    put(store, "running")
    sent_at = None if sent is None else NOW - sent

    with pytest.raises(Waiting) as told:
        once(never, call_of(claims, header={"sent_at": sent_at}))

    assert (told.value.joined, told.value.kind, told.value.attempt) == ("first", "wait", 1)
    assert told.value.delay == looks_after


def test_whoever_has_waited_gets_what_the_first_returned_whatever_the_task_says(
    claims: Claims, store: Faltering
) -> None:
    put(store, "done", outcome='"paid"')

    for done in ("reuse", "raise", "skip", "rerun"):
        assert once(never, call_of(with_policy(claims, done=done), header={"joined": "first"})) == "paid"


def test_a_member_of_a_chord_is_never_skipped(claims: Claims, store: Faltering) -> None:
    """Its body waits for all of them."""
    claims = with_policy(claims, running="skip", done="skip")
    put(store, "running")

    with pytest.raises(Waiting):
        once(never, call_of(claims, in_chord=True))
    store.swap(Swap(record_of(IDENTITY.key), Claim(State.RUNNING, "first").version, None))
    put(store, "done", outcome='"paid"')

    assert once(never, call_of(claims, in_chord=True)) == "paid"


def test_a_redelivery_waits_until_it_is_known_whether_its_run_is_gone(
    claims: Claims, store: Faltering, clock: Clock
) -> None:
    put(store, "running")

    with pytest.raises(Waiting) as told:
        once(never, call_of(claims, id="first"))
    assert told.value.joined == "first"

    clock.now = LEASE
    assert once(lambda call: "ran again", call_of(claims, id="first")) == "ran again"


def test_what_must_not_start_twice_is_buried(claims: Claims, store: Faltering, clock: Clock) -> None:
    put(store, "running", runs=1)
    clock.now = LEASE

    with pytest.raises(Undeliverable, match=r"shop\.pay: it was started 1 times without coming to an end"):
        once(never, call_of(replace(claims, may_rerun=False), id="first"))


def test_what_kills_its_process_each_time_is_buried_whoever_starts_it(
    claims: Claims, store: Faltering, clock: Clock
) -> None:
    claims = replace(claims, most_runs=lambda: 3)

    class Killed(BaseException): ...

    for call_id in ("first", "second", "first"):
        with pytest.raises(Killed):
            once(raising(Killed()), call_of(claims, id=call_id))
        clock.now += LEASE

    with pytest.raises(Undeliverable, match="started 3 times"):
        once(never, call_of(claims, id="first"))
    with pytest.raises(Waiting):
        once(never, call_of(claims, id="second"))


# How a run ends


def test_a_call_that_is_put_off_holds_its_key(claims: Claims, store: Faltering) -> None:
    later = Later(30, attempt=2, kind="retry", error=OSError())

    with pytest.raises(Later) as raised:
        once(raising(later), call_of(claims))

    assert raised.value is later
    claim, record = claim_in(store), store.read(record_of(IDENTITY.key))
    assert claim is not None
    assert record is not None
    assert (claim.state, claim.turn, claim.token) == (State.WAITING, Turn(0, 1), "")
    assert claim.resume == {"at": NOW + 30, "attempt": 2, "kind": "retry"}
    assert record.lease is not None
    assert record.lease > 30
    with pytest.raises(Waiting):
        once(never, call_of(claims, id="third"))
    assert once(lambda call: "paid", call_of(claims, header={"turn": 1})) == "paid"


def test_a_redelivery_of_a_turn_that_is_over_sends_the_next_one_again(claims: Claims) -> None:
    """Its process may have died between the record and the broker."""
    with pytest.raises(Later):
        once(raising(Later(30, attempt=2, kind="retry")), call_of(claims))

    with time_machine.travel(NOW + 10, tick=False), pytest.raises(Later) as resumed:
        once(never, call_of(claims))
    with time_machine.travel(NOW + 40, tick=False), pytest.raises(Later) as late:
        once(never, call_of(claims))

    assert not isinstance(resumed.value, Waiting)
    assert (resumed.value.delay, resumed.value.attempt, resumed.value.kind) == (20, 2, "retry")
    assert late.value.delay == 0


def test_a_redelivery_of_a_turn_whose_next_has_begun_is_dropped(claims: Claims, store: Faltering) -> None:
    with pytest.raises(Later):
        once(raising(Later(0, attempt=2, kind="retry")), call_of(claims))

    def while_it_runs(call: Call) -> str:
        with pytest.raises(Skipped) as dropped:
            once(never, call_of(claims))
        assert dropped.value.why is None
        return "paid"

    assert once(while_it_runs, call_of(claims, header={"turn": 1})) == "paid"


def test_a_call_that_has_failed_leaves_its_key_free(claims: Claims, store: Faltering) -> None:
    error = OSError("no money")

    with pytest.raises(OSError, match="no money"):
        once(raising(error), call_of(claims))

    claim = claim_in(store)
    assert claim is not None
    assert (claim.state, claim.outcome) == (State.FAILED, "OSError")
    assert once(lambda call: "paid", call_of(claims, id="third")) == "paid"


@pytest.mark.parametrize(
    ("stopped", "state"),
    [
        (Stopped(Ignore(), how="ignored"), "free"),
        (Stopped(Ignore(), how="rejected"), "failed"),
        (Stopped(Ignore(), how="handed back"), "claimed"),
        (Stopped(Ignore(), how="retried", delay=5), "waiting"),
        (Stopped(Ignore(), how="replaced"), "waiting"),
        (Outcome(), "free"),
    ],
)
def test_a_call_that_stops_leaves_its_key(claims: Claims, store: Faltering, stopped: Outcome, state: str) -> None:
    with pytest.raises(Outcome) as raised:
        once(raising(stopped), call_of(claims))

    assert raised.value is stopped
    assert state_in(store) == state
    if state in ("claimed", "waiting"):
        claim = claim_in(store)
        assert claim is not None
        assert claim.resume is None
        with pytest.raises(Waiting):  # unless it is only queued, it is waited for
            once(never if state == "waiting" else raising(Waiting(0, attempt=1, joined=None)), call_of(claims, id="3"))


def test_a_run_that_ends_with_its_process_says_nothing(claims: Claims, store: Faltering) -> None:
    """Its parent does."""
    with pytest.raises(SystemExit):
        once(raising(SystemExit(-256)), call_of(claims))

    assert state_in(store) == "running"
    assert claims.renewal.holds == []  # type: ignore[attr-defined]


def test_a_message_that_was_handed_back_starts_at_once_and_that_start_did_not_count(
    claims: Claims, store: Faltering
) -> None:
    with pytest.raises(Stopped):
        once(raising(Stopped(Ignore(), how="handed back")), call_of(claims, header={"turn": 2}))

    def run(call: Call) -> None:
        claim = claim_in(store)
        assert claim is not None
        assert claim.runs == 1

    once(run, call_of(claims, header={"turn": 2}))


def test_what_another_task_goes_on_with_is_done_when_its_result_is_there(
    claims: Claims, store: Faltering, stored: dict[str, Ended]
) -> None:
    with pytest.raises(Stopped):
        once(raising(Stopped(Ignore(), how="replaced")), call_of(claims))
    with pytest.raises(Waiting):
        once(never, call_of(claims, id="third"))

    stored["second"] = Ended(NOW + 1, "paid by another")

    assert once(never, call_of(claims, id="third", header={"joined": "second"})) == "paid by another"
    assert state_in(store) == "done"


def test_what_another_task_goes_on_with_fails_with_it(
    claims: Claims, store: Faltering, stored: dict[str, Ended]
) -> None:
    with pytest.raises(Stopped):
        once(raising(Stopped(Ignore(), how="replaced")), call_of(claims))

    stored["second"] = Ended(NOW + 1, error="OSError")

    with pytest.raises(DuplicateCall, match=r"call second.*has failed \(OSError\)"):
        once(never, call_of(claims, id="third", header={"joined": "second"}))
    assert once(lambda call: "paid", call_of(claims, id="fourth")) == "paid"


# What its process could not say


@pytest.mark.parametrize("may_rerun", [True, False])
def test_a_run_that_is_gone_and_whose_result_is_stored_has_succeeded(
    claims: Claims, store: Faltering, clock: Clock, stored: dict[str, Ended], may_rerun: bool
) -> None:
    put(store, "running", since=NOW)
    stored["first"] = Ended(NOW + 5, "paid")

    for call_id in ("first", "second"):
        with pytest.raises(Waiting):  # it is alive, and may be about to say so
            once(never, call_of(replace(claims, may_rerun=may_rerun), id=call_id))
    clock.now = LEASE

    assert once(never, call_of(replace(claims, may_rerun=may_rerun), id="first")) == "paid"
    assert state_in(store) == "done"


def test_a_result_from_before_it_began_is_not_its_own(
    claims: Claims, store: Faltering, clock: Clock, stored: dict[str, Ended]
) -> None:
    """People use one id for many calls."""
    put(store, "running", since=NOW)
    stored["first"] = Ended(NOW - 60, "another one's")
    clock.now = LEASE

    assert once(lambda call: "ran", call_of(claims, id="first")) == "ran"


def test_a_run_that_is_gone_and_whose_failure_is_stored_may_run_again(
    claims: Claims, store: Faltering, clock: Clock, stored: dict[str, Ended]
) -> None:
    put(store, "running", since=NOW)
    stored["first"] = Ended(NOW + 5, error="WorkerLostError")
    clock.now = LEASE

    with pytest.raises(Undeliverable):  # unless it must not
        once(never, call_of(replace(claims, may_rerun=False), id="first"))
    assert once(lambda call: "ran", call_of(claims, id="first")) == "ran"


def test_a_run_that_is_renewed_at_the_last_moment_is_not_taken_over(
    claims: Claims, store: Faltering, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "running")
    clock.now = LEASE
    swap, version = store.swap, Claim(State.RUNNING, "first").version

    def renewed_after(*swaps: Swap) -> Any:
        swapped = swap(*swaps)
        store.renew([Hold(record_of(IDENTITY.key), version, LEASE, KEEP)])
        return swapped

    monkeypatch.setattr(store, "swap", renewed_after)

    for call_id in ("first", "second"):
        with pytest.raises(Waiting):
            once(never, call_of(claims, id=call_id))


def test_a_run_that_has_lost_its_key_tells_so_and_leaves_it_alone(
    claims: Claims, store: Faltering, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """It was frozen for longer than its lease. What it did is done, and its result is stored as any other."""

    def frozen(call: Call) -> str:
        clock.now += LEASE
        once(lambda call: "paid by the other", call_of(claims, id="third"))
        return "paid, too"

    assert once(frozen, call_of(claims)) == "paid, too"

    claim = claim_in(store)
    assert claim is not None
    assert (claim.id, claims.result_of(claim)) == ("third", "paid by the other")
    assert f"claim.lost key={IDENTITY.key} id=second now=done first=third" in caplog.text


# The store is away


def test_before_the_effect_a_call_waits_for_the_store(claims: Claims, store: Faltering) -> None:
    store.away = 1

    with pytest.raises(Waiting) as told:
        once(never, call_of(claims, header={"joined": "first"}))

    assert (told.value.delay, told.value.joined) == (0.5, "first")
    assert isinstance(told.value.__cause__, StoreUnavailable)


def test_or_runs_without_a_key_if_the_task_says_so(
    claims: Claims, store: Faltering, caplog: pytest.LogCaptureFixture
) -> None:
    store.away = 1

    assert once(lambda call: "ran", call_of(claims, on_store_down="run")) == "ran"

    assert state_in(store) == "free"
    assert f"key={IDENTITY.key} id=second then=run error='StoreUnavailable: the store is away'" in caplog.text


def test_or_fails_if_the_task_says_so(claims: Claims, store: Faltering) -> None:
    store.away = 1

    with pytest.raises(StoreUnavailable):
        once(never, call_of(claims, on_store_down="fail"))


#: Ways to end, and what is recorded.
ENDS: list[tuple[BaseException | None, str]] = [
    (None, "done"),
    (OSError("no money"), "failed"),
    (Later(5, attempt=2, kind="retry"), "waiting"),
    (Stopped(Ignore(), how="ignored"), "free"),
]


@pytest.mark.parametrize(("end", "state"), ENDS)
def test_after_the_effect_the_store_is_waited_for(
    claims: Claims, store: Faltering, slept: list[float], end: BaseException | None, state: str
) -> None:
    assert ended(claims, store, end, away=2) is end

    assert state_in(store) == state
    assert slept == [0.1, 0.5]


@pytest.mark.parametrize(("end", "state"), ENDS)
@pytest.mark.parametrize("policy", ["retry", "fail", "run"])
def test_but_not_for_ever_and_the_outcome_stays_what_it_was(
    claims: Claims,
    store: Faltering,
    slept: list[float],
    caplog: pytest.LogCaptureFixture,
    end: BaseException | None,
    state: str,
    policy: str,
) -> None:
    assert ended(claims, store, end, away=5, on_store_down=policy) is end

    assert state_in(store) == "running"
    assert sum(slept) < 5
    assert f"claim.not_recorded key={IDENTITY.key} id=second error='StoreUnavailable: the store is away'" in caplog.text


def ended(claims: Claims, store: Faltering, end: BaseException | None, *, away: int, **facts: Any) -> Any:
    """Let a run come to this end while the store is away, and give what came out."""

    def run(call: Call) -> str:
        store.away = away
        if end is not None:
            raise end
        return "paid"

    try:
        assert once(run, call_of(claims, **facts)) == "paid"
    except BaseException as error:
        return error
    return None


def test_a_store_that_breaks_does_not_break_what_was_done(
    claims: Claims, store: Faltering, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(call: Call) -> str:
        monkeypatch.setattr(store, "swap", lambda *swaps: 1 / 0)
        return "paid"

    assert once(run, call_of(claims)) == "paid"
    assert "claim.not_recorded" in caplog.text


def test_a_result_that_cannot_be_kept_is_the_result_all_the_same(
    claims: Claims, store: Faltering, caplog: pytest.LogCaptureFixture
) -> None:
    result = {1, 2}

    assert once(lambda call: result, call_of(claims)) is result

    assert state_in(store) == "done"
    assert "claim.result_not_kept" in caplog.text
    assert once(never, call_of(claims, id="third")) is None
