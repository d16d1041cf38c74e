"""
What is known of a key, the moves it can make, and what follows from what is found.

Pure: nothing here waits, asks a store or looks at a clock. Every move there is
stands in `LEGAL`; `Claim.moved` makes no other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum, auto
from typing import Any, NamedTuple, Self

from celerykit.idempotency.policy import Once

__all__ = ["LEGAL", "Answer", "Claim", "Event", "IllegalMove", "State", "Turn", "on_send", "on_start"]


class State(StrEnum):
    """Where a claim stands. A key without a claim is free."""

    CLAIMED = "claimed"
    RUNNING = "running"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"


class Event(Enum):
    """What moves a claim."""

    #: A caller takes it for the call that it sends.
    SEND = auto()
    #: The call could not be sent.
    TAKE_BACK = auto()
    #: A caller sends the call once more, as nothing was heard of it for longer than a lease.
    SEND_AGAIN = auto()
    #: A worker starts the call.
    START = auto()
    #: The call is to run again later: it has a next turn.
    PUT_OFF = auto()
    #: Its run was cut off, and its message goes back: it may start anew, and this start does not count.
    HAND_BACK = auto()
    FINISH = auto()
    FAIL = auto()
    #: The call is revoked, or an operator lets the key go.
    RELEASE = auto()


#: All moves: from which state, by what, to which. ``None`` is a free key.
LEGAL: Mapping[tuple[State | None, Event], State | None] = {
    (None, Event.SEND): State.CLAIMED,
    (State.FAILED, Event.SEND): State.CLAIMED,
    (State.DONE, Event.SEND): State.CLAIMED,  # done="rerun"
    (State.CLAIMED, Event.TAKE_BACK): None,
    (State.CLAIMED, Event.SEND_AGAIN): State.CLAIMED,
    (State.RUNNING, Event.SEND_AGAIN): State.RUNNING,
    (State.WAITING, Event.SEND_AGAIN): State.WAITING,
    (None, Event.START): State.RUNNING,
    (State.CLAIMED, Event.START): State.RUNNING,
    (State.WAITING, Event.START): State.RUNNING,
    (State.RUNNING, Event.START): State.RUNNING,  # whose lease has lapsed
    (State.DONE, Event.START): State.RUNNING,  # done="rerun"
    (State.FAILED, Event.START): State.RUNNING,
    (State.RUNNING, Event.PUT_OFF): State.WAITING,
    (State.RUNNING, Event.HAND_BACK): State.CLAIMED,
    (State.RUNNING, Event.FINISH): State.DONE,
    (State.WAITING, Event.FINISH): State.DONE,  # by what the task was replaced with
    (State.FAILED, Event.FINISH): State.DONE,  # by the run that was only thought to be gone
    (State.CLAIMED, Event.FAIL): State.FAILED,
    (State.WAITING, Event.FAIL): State.FAILED,
    (State.RUNNING, Event.FAIL): State.FAILED,
    (State.CLAIMED, Event.RELEASE): None,
    (State.WAITING, Event.RELEASE): None,
    (State.RUNNING, Event.RELEASE): None,
    (State.DONE, Event.RELEASE): None,
    (State.FAILED, Event.RELEASE): None,
}


class IllegalMove(Exception):
    """A claim cannot make this move. It is a mistake of this package, and no user's."""


class Turn(NamedTuple):
    """
    Which run of a call: how often it was replayed, and how often its owner has put it off since.

    Turns are ordered, and a message knows its own.
    """

    replay: int = 0
    number: int = 0

    def next(self) -> Turn:
        """Give the turn after this one."""
        return Turn(self.replay, self.number + 1)


@dataclass(frozen=True, slots=True)
class Claim:
    """
    What the store knows of a key.

    Attributes:
        id:
            Of the call that holds it.

        turn:
            The run it is at, or waits for.

        token:
            Drawn for each run: a redelivery has the same id and turn.

        task:
            Its name.

        call:
            See `celerykit.idempotency.keys.Identity`.

        since:
            When it came into this state, in seconds since 1970.

        keep:
            How long it is remembered when it is done, in seconds.

        outcome:
            Done: the result, as the app's JSON text. Failed: the error's type.

        runs:
            Running: how often it was started, this time included, since it last came to an end.

        taken_from:
            The id of a call that was to run, and came later than this one.

        resume:
            Waiting: how the next turn is sent, should it not have been.
    """

    state: State
    id: str
    turn: Turn = field(default_factory=Turn)
    token: str = ""
    task: str = ""
    call: str = ""
    since: float = 0.0
    keep: float = 0.0
    outcome: str = ""
    runs: int = 0
    taken_from: str = ""
    resume: Mapping[str, Any] | None = None

    @property
    def version(self) -> str:
        """What tells this claim from every other one that could stand under its key."""
        return version(self.state, self.id, self.turn, self.token)

    @property
    def is_over(self) -> bool:
        """Tell whether its call is done or has failed."""
        return self.state in (State.DONE, State.FAILED)

    def moved(self, event: Event, **changes: Any) -> Self:
        """
        Give the claim after *event*.

        Raises:
            IllegalMove: It is not in the table, or frees the key.
        """
        state = after(self.state, event)
        if state is None:
            raise IllegalMove(f"{event.name} leaves no claim behind")
        return replace(self, state=state, **changes)

    def data(self) -> str:
        """Write it, without what says nothing."""
        facts = {
            "state": self.state.value,
            "id": self.id,
            "turn": list(self.turn),
            "token": self.token,
            "task": self.task,
            "call": self.call,
            "since": round(self.since, 3),
            "keep": self.keep,
            "outcome": self.outcome,
            "runs": self.runs,
            "taken_from": self.taken_from,
            "resume": self.resume,
        }
        return json.dumps({name: fact for name, fact in facts.items() if fact}, separators=(",", ":"))

    @classmethod
    def of(cls, data: str) -> Self:
        """
        Read what `data` wrote. A newer version may have written more.

        Raises:
            ValueError: It is no claim.
        """
        facts = json.loads(data)
        known = {name: facts[name] for name in cls.__dataclass_fields__ if name in facts}
        return cls(**{**known, "state": State(facts["state"]), "turn": Turn(*facts.get("turn", ()))})


def after(state: State | None, event: Event) -> State | None:
    """
    Give the state that follows, or None for a free key.

    Raises:
        IllegalMove: None does.
    """
    try:
        return LEGAL[state, event]
    except KeyError:
        raise IllegalMove(f"{event.name} cannot move a claim that is {state.value if state else 'not there'}") from None


def version(state: State, call_id: str, turn: Turn, token: str = "") -> str:
    """Write a claim's version; that of a claim which was just sent can be known beforehand."""
    return f"{state.value}:{call_id}:{turn.replay}.{turn.number}:{token}"


class Answer(Enum):
    """What follows for a call from what is found under its key."""

    #: The key is its own: it is sent, or runs.
    GO = auto()
    #: The first call is sent once more, under its own id, and this one joins it.
    SEND_AGAIN = auto()
    #: It is the first call's, and gets that one's result when there is one.
    JOIN = auto()
    #: The result is there.
    REUSE = auto()
    #: The call it has joined has failed.
    FAIL_TOO = auto()
    RAISE = auto()
    SKIP = auto()
    CONFLICT = auto()
    #: Whoever runs it may be gone; wait until that is known.
    WAIT = auto()
    #: Its next turn was to be sent, and may not have been.
    RESUME = auto()
    #: A later turn of it is on its way, or was.
    DROP = auto()
    #: It has started, and must not start twice.
    BURY = auto()


_ON_RUNNING = {"join": Answer.JOIN, "raise": Answer.RAISE, "skip": Answer.SKIP}
_ON_DONE = {"reuse": Answer.REUSE, "raise": Answer.RAISE, "skip": Answer.SKIP, "rerun": Answer.GO}


def on_send(found: Claim | None, *, is_lapsed: bool, call: str, policy: Once, may_rerun: bool) -> Answer:
    """
    Tell a caller what becomes of its call.

    Args:
        call:
            The digest of its arguments.

        is_lapsed:
            Whether nothing was heard of the claim for longer than its lease.

        may_rerun:
            Whether a call that was interrupted may start again.
    """
    if found is None or found.state is State.FAILED:
        return Answer.GO
    if _differ(found.call, call):
        return Answer.CONFLICT
    if found.state is State.DONE:
        return _ON_DONE[policy.done]
    if is_lapsed and (may_rerun or found.state is not State.RUNNING):
        return Answer.SEND_AGAIN
    return _ON_RUNNING[policy.running]


def on_start(
    found: Claim | None,
    *,
    is_lapsed: bool,
    id: str,  # noqa: A002  (Celery's name)
    turn: Turn,
    call: str,
    joined: str | None,
    policy: Once,
    may_rerun: bool,
    most_runs: float = math.inf,
) -> Answer:
    """
    Tell a worker what becomes of a message.

    Args:
        id, turn, call:
            Of the message.

        joined:
            The id of the call it has waited for.

        most_runs:
            How often a claim may be started without coming to an end: what
            kills its process each time must have one.

    The others are those of `on_send`.
    """
    if found is None:
        return Answer.GO
    may_rerun = may_rerun and found.runs < most_runs
    if found.id == id:
        return _on_own(found, turn=turn, is_lapsed=is_lapsed, may_rerun=may_rerun)
    if found.taken_from == id:
        # Its caller was told that it is the first.
        joined, policy = found.id, replace(policy, running="join")
    if joined == found.id and found.is_over:
        return Answer.REUSE if found.state is State.DONE else Answer.FAIL_TOO
    if found.state is State.FAILED:
        return Answer.GO
    if _differ(found.call, call):
        return Answer.CONFLICT
    if found.state is State.DONE:
        # What comes back from among the dead letters has been done since.
        return Answer.REUSE if turn.replay and policy.done == "rerun" else _ON_DONE[policy.done]
    return _on_anothers(found, is_lapsed=is_lapsed, policy=policy, may_rerun=may_rerun)


def _on_own(found: Claim, *, turn: Turn, is_lapsed: bool, may_rerun: bool) -> Answer:
    if found.state is State.DONE:
        return Answer.REUSE
    if turn < found.turn:
        return Answer.RESUME if found.resume is not None else Answer.DROP
    if found.state is not State.RUNNING:
        return Answer.GO
    if not is_lapsed:
        return Answer.WAIT
    # What has a next turn has not been interrupted: it has sent that itself.
    return Answer.GO if may_rerun or turn > found.turn else Answer.BURY


def _on_anothers(found: Claim, *, is_lapsed: bool, policy: Once, may_rerun: bool) -> Answer:
    if is_lapsed and (may_rerun or found.state is not State.RUNNING):
        return Answer.GO
    if found.state is State.CLAIMED and policy.running == "join":
        # Who is only in the queue may as well be the one that waits.
        return Answer.GO
    return _ON_RUNNING[policy.running]


def _differ(one: str, other: str) -> bool:
    """Tell whether two calls have other arguments. With another contract nobody can tell: a deploy lies between."""
    one_contract, _, one_call = one.partition(":")
    other_contract, _, other_call = other.partition(":")
    return bool(one_call and other_call and one_contract == other_contract and one_call != other_call)
