"""
What is declared, the moves of a claim, and what a caller and a worker are told.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celerykit.errors import InvalidOptions
from celerykit.idempotency import LEGAL, Claim, Key, Once, State, Turn
from celerykit.idempotency.claim import Answer, Event, IllegalMove, after, on_send, on_start, version

# Declaring


def test_a_policy_is_a_value() -> None:
    policy = Once(running="raise", done="skip", keep=timedelta(hours=1))

    assert policy.keep == 3600
    assert policy == Once(running="raise", done="skip", keep=3600) == pickle.loads(pickle.dumps(policy))
    assert len({policy, Once(running="raise", done="skip", keep=3600.0)}) == 1


def test_without_a_word_a_duplicate_joins_and_gets_the_result_for_a_day() -> None:
    assert (Once().running, Once().done, Once().keep, Once().key) == ("join", "reuse", 86400, None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"running": "wait"}, r"Once\(running=…\) must be 'join', 'raise' or 'skip', got 'wait'"),
        ({"done": "join"}, r"Once\(done=…\) must be 'reuse', 'skip', 'raise' or 'rerun', got 'join'"),
        ({"done": ["reuse"]}, "got \\['reuse'\\]"),
        ({"keep": 0}, r"Once\(keep=…\) must be seconds or a timedelta, more than nothing; got 0"),
        ({"keep": timedelta(-1)}, "more than nothing"),
        ({"keep": float("inf")}, "more than nothing"),
        ({"keep": float("nan")}, "more than nothing"),
        ({"keep": True}, "more than nothing"),
        ({"keep": "1d"}, "got '1d'"),
        ({"key": "order-1"}, r"must be a function of the task's arguments, got str.*task.using\(key=…\)"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_declared(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidOptions, match=says):
        Once(**options)


def test_marks_are_all_the_same() -> None:
    assert Key() == Key()
    assert hash(Key()) == hash(Key())
    assert Key() != "Key()"
    assert repr(Key()) == "Key()"


# Moves

#: From the states on the left, by the events above: to which state; "free" frees the key, and a dot is no move.
MOVES = """
            SEND     TAKE_BACK  SEND_AGAIN  START    PUT_OFF  FINISH  FAIL    RELEASE  HAND_BACK
  free      claimed  .          .           running  .        .       .       .        .
  claimed   .        free       claimed     running  .        .       failed  free     .
  running   .        .          running     running  waiting  done    failed  free     claimed
  waiting   .        .          waiting     running  .        done    failed  free     .
  done      claimed  .          .           running  .        .       .       free     .
  failed    claimed  .          .           running  .        done    .       free     .
"""


def moves() -> Iterator[tuple[State | None, Event, str]]:
    head, *rows = (line.split() for line in MOVES.strip().splitlines())
    for state, *cells in rows:
        for event, to in zip(head, cells, strict=True):
            yield None if state == "free" else State(state), Event[event], to


def test_the_table_has_a_cell_for_each_state_and_event() -> None:
    assert {(state, event) for state, event, _ in moves()} == {(s, e) for s in (None, *State) for e in Event}


@pytest.mark.parametrize(("state", "event", "to"), list(moves()))
def test_a_claim_makes_the_moves_in_the_table_and_no_other(state: State | None, event: Event, to: str) -> None:
    if to == ".":
        assert (state, event) not in LEGAL
        with pytest.raises(IllegalMove, match=f"{event.name} cannot move a claim that is {state or 'not there'}"):
            after(state, event)
    else:
        assert after(state, event) == (None if to == "free" else State(to))


def test_a_claim_is_moved_as_a_whole() -> None:
    running = Claim(State.RUNNING, "a", token="t", resume={"at": 1})

    waiting = running.moved(Event.PUT_OFF, turn=running.turn.next(), token="", since=3.0)

    assert (waiting.state, waiting.turn, waiting.token, waiting.since) == (State.WAITING, Turn(0, 1), "", 3.0)
    assert (running.state, running.turn) == (State.RUNNING, Turn(0, 0))


def test_what_frees_a_key_leaves_no_claim_to_move_to() -> None:
    with pytest.raises(IllegalMove, match="leaves no claim behind"):
        Claim(State.DONE, "a").moved(Event.RELEASE)


def test_turns_are_ordered_and_a_replay_begins_anew() -> None:
    assert Turn() < Turn().next() < Turn(0, 2) < Turn(1, 0) < Turn(1, 1)


# Writing

claims = st.builds(
    Claim,
    state=st.sampled_from(State),
    id=st.text(min_size=1),
    turn=st.builds(Turn, st.integers(0, 9), st.integers(0, 9)),
    token=st.text("0123456789abcdef", max_size=4),
    task=st.text(),
    call=st.text(),
    since=st.integers(0, 10**10).map(lambda thousandths: thousandths / 1000),
    keep=st.floats(0, 1e9),
    outcome=st.text(),
    runs=st.integers(0, 9),
    resume=st.none() | st.dictionaries(st.text(), st.integers(), min_size=1),
)


@given(claims)
def test_a_claim_comes_back_as_it_was_written(claim: Claim) -> None:
    assert Claim.of(claim.data()) == claim
    assert Claim.of(claim.data()).version == claim.version


@given(claims, claims)
def test_two_claims_of_one_version_are_of_one_run(one: Claim, other: Claim) -> None:
    # Neither a state nor a token has a colon in it, nor has a turn.
    same = (one.state, one.id, one.turn, one.token) == (other.state, other.id, other.turn, other.token)

    assert (one.version == other.version) is same


def test_what_says_nothing_is_not_written() -> None:
    assert json.loads(Claim(State.CLAIMED, "a").data()) == {"state": "claimed", "id": "a", "turn": [0, 0]}


def test_what_a_newer_version_has_written_beside_it_is_passed_over() -> None:
    written = {"state": "done", "id": "a", "turn": [0, 2], "mood": "good"}

    assert Claim.of(json.dumps(written)) == Claim(State.DONE, "a", turn=Turn(0, 2))


def test_the_version_of_what_was_just_sent_can_be_known_beforehand() -> None:
    assert Claim(State.CLAIMED, "a").version == version(State.CLAIMED, "a", Turn()) == "claimed:a:0.0:"


# What a caller is told

ALIVE, LAPSED = False, True


def found(state: str, **facts: Any) -> Claim | None:
    return None if state == "free" else Claim(State(state), "first", call="contract:args", **facts)


def sent(
    state: str,
    *,
    is_lapsed: bool = ALIVE,
    policy: Once | None = None,
    may_rerun: bool = True,
    call: str = "contract:args",
) -> str:
    answer = on_send(found(state), is_lapsed=is_lapsed, call=call, policy=policy or Once(), may_rerun=may_rerun)
    return answer.name


@pytest.mark.parametrize("running", ["join", "raise", "skip"])
@pytest.mark.parametrize("done", ["reuse", "raise", "skip", "rerun"])
@pytest.mark.parametrize("state", ["free", *State])
def test_a_caller_is_told_what_its_task_says(state: str, running: Any, done: Any) -> None:
    on_done = "GO" if done == "rerun" else done.upper()
    answers = {"free": "GO", "failed": "GO", "done": on_done}

    assert sent(state, policy=Once(running=running, done=done)) == answers.get(state, running.upper())


@pytest.mark.parametrize(
    ("state", "may_rerun", "answer"),
    [
        ("claimed", True, "SEND_AGAIN"),
        ("claimed", False, "SEND_AGAIN"),  # it has not started
        ("waiting", True, "SEND_AGAIN"),
        ("waiting", False, "SEND_AGAIN"),
        ("running", True, "SEND_AGAIN"),
        ("running", False, "JOIN"),
    ],
)
def test_what_nothing_was_heard_of_is_sent_again_unless_it_may_have_started_and_must_not_twice(
    state: str, may_rerun: bool, answer: str
) -> None:
    assert sent(state, is_lapsed=LAPSED, may_rerun=may_rerun) == answer


@pytest.mark.parametrize(
    ("state", "answer"),
    [
        ("free", "GO"),
        ("failed", "GO"),
        ("claimed", "CONFLICT"),
        ("running", "CONFLICT"),
        ("waiting", "CONFLICT"),
        ("done", "CONFLICT"),
    ],
)
def test_a_key_with_other_arguments_is_a_conflict_while_it_is_held(state: str, answer: str) -> None:
    assert sent(state, call="contract:others") == answer
    assert sent(state, call="contract:others", is_lapsed=LAPSED) == answer


@pytest.mark.parametrize("call", ["", "newer contract:others", "contract:", "newer contract:args"])
def test_what_cannot_be_compared_is_no_conflict(call: str) -> None:
    """A deploy with another contract lies between the two calls, or the key says all there is to say."""
    assert sent("claimed", call=call) == "JOIN"


# What a worker is told


def started(claim: Claim | None, **facts: Any) -> str:
    asked: dict[str, Any] = {
        "is_lapsed": ALIVE,
        "id": "first",
        "turn": Turn(),
        "call": "contract:args",
        "joined": None,
        "policy": Once(),
        "may_rerun": True,
    }
    return on_start(claim, **(asked | facts)).name


RESUME = {"at": 1.0, "attempt": 2, "kind": "retry"}


@pytest.mark.parametrize(
    ("claim", "facts", "answer"),
    [
        (found("free"), {}, "GO"),
        (found("claimed"), {}, "GO"),
        (found("failed"), {}, "GO"),
        (found("done"), {}, "REUSE"),
        # A redelivery of what runs: it may run, or its process may be gone.
        (found("running"), {}, "WAIT"),
        (found("running"), {"is_lapsed": LAPSED}, "GO"),
        (found("running"), {"is_lapsed": LAPSED, "may_rerun": False}, "BURY"),
        # What kills its process each time is not started for ever.
        (found("running", runs=2), {"is_lapsed": LAPSED, "most_runs": 3}, "GO"),
        (found("running", runs=3), {"is_lapsed": LAPSED, "most_runs": 3}, "BURY"),
        (found("running", runs=3), {"most_runs": 3}, "WAIT"),
        (found("running", runs=3), {"is_lapsed": LAPSED, "most_runs": 3, "turn": Turn(0, 1)}, "GO"),
        # Its next turn, which the one before has sent: it may not have ended yet.
        (found("waiting", turn=Turn(0, 1)), {"turn": Turn(0, 1)}, "GO"),
        (found("running"), {"turn": Turn(0, 1)}, "WAIT"),
        (found("running"), {"turn": Turn(0, 1), "is_lapsed": LAPSED}, "GO"),
        (found("running"), {"turn": Turn(0, 1), "is_lapsed": LAPSED, "may_rerun": False}, "GO"),
        (found("running", turn=Turn(0, 1)), {"turn": Turn(0, 1)}, "WAIT"),
        # A turn that is over: the next one is sent again, if nobody knows that it was.
        (found("waiting", turn=Turn(0, 1), resume=RESUME), {}, "RESUME"),
        (found("waiting", turn=Turn(0, 1)), {}, "DROP"),
        (found("running", turn=Turn(0, 1)), {}, "DROP"),
        (found("failed", turn=Turn(0, 1)), {}, "DROP"),
        (found("done", turn=Turn(0, 1)), {}, "REUSE"),
        # A replay begins anew, and does nothing where the call was done after all.
        (found("failed", turn=Turn(0, 3)), {"turn": Turn(1, 0)}, "GO"),
        (found("failed", turn=Turn(1, 0)), {"turn": Turn(0, 3)}, "DROP"),
        (found("done", turn=Turn(0, 3)), {"turn": Turn(1, 0)}, "REUSE"),
        (found("done"), {"turn": Turn(1, 0), "policy": Once(done="rerun")}, "REUSE"),
    ],
)
def test_a_call_finds_its_own_claim(claim: Claim | None, facts: dict[str, Any], answer: str) -> None:
    assert started(claim, **facts) == answer


@pytest.mark.parametrize(
    ("state", "facts", "answer"),
    [
        ("failed", {}, "GO"),
        # What is only queued may as well wait itself; so may what is gone.
        ("claimed", {}, "GO"),
        ("running", {}, "JOIN"),
        ("running", {"is_lapsed": LAPSED}, "GO"),
        ("running", {"is_lapsed": LAPSED, "may_rerun": False}, "JOIN"),
        ("running", {"is_lapsed": LAPSED, "most_runs": 0}, "JOIN"),
        ("waiting", {}, "JOIN"),
        # Nothing was heard of it for longer than it should take: what was to go on with it is gone.
        *(
            (state, {"is_lapsed": LAPSED, "policy": Once(running=policy)}, "GO")
            for state in ("claimed", "running", "waiting")
            for policy in ("join", "raise", "skip")
        ),
        *((state, {"policy": Once(running="raise")}, "RAISE") for state in ("claimed", "running", "waiting")),
        *((state, {"policy": Once(running="skip")}, "SKIP") for state in ("claimed", "running", "waiting")),
        ("done", {}, "REUSE"),
        ("done", {"policy": Once(done="raise")}, "RAISE"),
        ("done", {"policy": Once(done="skip")}, "SKIP"),
        ("done", {"policy": Once(done="rerun")}, "GO"),
        # A letter that is replayed when its key was done by another call since.
        ("done", {"policy": Once(done="rerun"), "turn": Turn(1, 0)}, "REUSE"),
        # It has waited for the first one, and so gets what came of that.
        ("done", {"joined": "first"}, "REUSE"),
        ("done", {"joined": "first", "policy": Once(done="raise")}, "REUSE"),
        ("done", {"joined": "first", "policy": Once(done="rerun")}, "REUSE"),
        ("failed", {"joined": "first"}, "FAIL_TOO"),
        ("running", {"joined": "first"}, "JOIN"),
        # It has waited for one that is gone, and this is a third.
        ("done", {"joined": "other"}, "REUSE"),
        ("failed", {"joined": "other"}, "GO"),
        ("running", {"joined": "other"}, "JOIN"),
        # Other arguments.
        ("claimed", {"call": "contract:others"}, "CONFLICT"),
        ("running", {"call": "contract:others"}, "CONFLICT"),
        ("done", {"call": "contract:others"}, "CONFLICT"),
        ("failed", {"call": "contract:others"}, "GO"),
        ("running", {"call": "newer contract:others"}, "JOIN"),
    ],
)
def test_a_call_finds_the_claim_of_another(state: str, facts: dict[str, Any], answer: str) -> None:
    assert started(found(state), **({"id": "second"} | facts)) == answer


@given(
    st.sampled_from(["free", *State]),
    st.sampled_from(["first", "second"]),
    st.fixed_dictionaries(
        {
            "is_lapsed": st.booleans(),
            "turn": st.builds(Turn, st.integers(0, 1), st.integers(0, 1)),
            "joined": st.sampled_from([None, "first", "other"]),
            "policy": st.builds(
                Once,
                running=st.sampled_from(["join", "raise", "skip"]),
                done=st.sampled_from(["reuse", "raise", "skip", "rerun"]),
            ),
            "may_rerun": st.booleans(),
            "call": st.sampled_from(["", "contract:args", "contract:others"]),
        }
    ),
)
def test_who_may_go_can_make_the_move(state: str, id: str, facts: dict[str, Any]) -> None:  # noqa: A002
    claim = found(state, turn=Turn(0, 1))

    if started(claim, id=id, **facts) == Answer.GO.name:
        assert after(claim.state if claim else None, Event.START) is State.RUNNING
        # Never beside a run that may be alive.
        assert state != State.RUNNING or facts["is_lapsed"]


@pytest.mark.parametrize("policy", [Once(), Once(running="raise", done="raise"), Once(running="skip", done="skip")])
@pytest.mark.parametrize(("state", "answer"), [("running", "JOIN"), ("waiting", "JOIN"), ("done", "REUSE")])
def test_who_was_told_to_be_the_first_and_comes_later_is_no_duplicate(state: str, answer: str, policy: Once) -> None:
    claim = replace(found(state), taken_from="second")

    assert started(claim, policy=policy, id="second") == answer
