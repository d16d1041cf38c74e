"""
The step around a task: who has the key runs, and all others get what came of it.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Any, NamedTuple, NoReturn

from celerykit import events
from celerykit.call import Call, Later, Next, Outcome, Stopped
from celerykit.errors import DuplicateCall, InvalidPayload, KeyConflict, StoreUnavailable, Undeliverable
from celerykit.idempotency.claim import Answer, Claim, Turn
from celerykit.idempotency.claims import Claims, Run
from celerykit.idempotency.keys import Identity
from celerykit.idempotency.records import key_in

__all__ = ["Skipped", "Waiting", "once", "record_in"]

#: Seconds until a call looks again whether the one it waits for has ended; at first, and at most.
_FIRST_LOOK, _LAST_LOOK = 0.5, 5.0


class Waiting(Later):
    """
    The call waits for another one, or for its own run that may be gone. No attempt, no turn, no slot of the worker.

    Attributes:
        joined:
            The id of the call it waits for.
    """

    def __init__(self, delay: float, *, attempt: int, joined: str | None) -> None:
        super().__init__(delay, attempt=attempt, kind="wait")
        self.joined = joined


class Skipped(Outcome):
    """
    The call does nothing, and its result is revoked.

    Attributes:
        why:
            For people; ``None`` when the result is another run's to store.
    """

    def __init__(self, why: str | None = None) -> None:
        super().__init__(why)
        self.why = why


def once(call_next: Next, call: Call) -> Any:
    """
    Let a call run whose key is free, and remember what it returns; give all others what came of that.

    Stands outside of `validated`: what it keeps and gives is JSON.
    """
    claims: Claims | None = call.policies.get("once")
    if claims is None:
        return call_next(call)
    identity = _identity(claims, call)
    if identity is None:
        return call_next(call)  # which refuses it
    try:
        answer, run = claims.start(
            identity,
            call.id,
            turn_of(call),
            token=call.token,
            joined=call.headers.joined,
            was_sent=call.headers.key is not None,
        )
    except StoreUnavailable as error:
        return _without(error, call_next, call, identity)
    if answer is Answer.GO:
        return _run(call_next, call, claims, run)
    return _told(answer, call, claims, run)


def turn_of(call: Call) -> Turn:
    """Give the turn a call's message is for."""
    return Turn(call.headers.replay, call.headers.turn)


def _identity(claims: Claims, call: Call) -> Identity | None:
    if call.headers.key is not None:
        return Identity(call.headers.key, call.headers.call or "")
    try:
        return claims.identify(call.args, call.kwargs, id=call.id)
    except InvalidPayload:
        return None


def _without(error: StoreUnavailable, call_next: Next, call: Call, identity: Identity) -> Any:
    """Do what the task says for a store that is away."""
    policy = call.policies.get("on_store_down", "retry")
    events.CLAIM_UNKNOWN.tell(task=call.task, key=identity.key, id=call.id, then=policy, error=error)
    if policy == "run":
        return call_next(call)
    if policy == "fail":
        raise error
    raise Waiting(_pause(call), attempt=call.attempt, joined=call.headers.joined) from error


class _Current(NamedTuple):
    """What `record_in` needs to know of the run it is called in."""

    call: Call
    claims: Claims
    run: Run


_current: ContextVar[_Current | None] = ContextVar("celerykit_run", default=None)


def record_in(result: Any, *, on: Any) -> None:
    """
    Record in a transaction of the task's own what the running call is going to return, if it runs with a key.

    Raises:
        DuplicateCall: Another run has taken the key meanwhile.
    """
    current = _current.get()
    if current is None:
        return
    call, claims, run = current
    if not claims.remember(run, call.contract.dump_result(result), on=on):
        raise DuplicateCall(
            f"{call.task}: another run has taken its key {key_in(run.key)} meanwhile. Its effect was rolled back.",
            key_in(run.key),
            call.id,
        )


def _run(call_next: Next, call: Call, claims: Claims, run: Run) -> Any:
    token = _current.set(_Current(call, claims, run))
    try:
        with claims.holding(run):
            result = call_next(call)
    except Later as later:
        resume = {"at": time.time() + later.delay, "attempt": later.attempt, "kind": later.kind}
        claims.put_off(run, delay=later.delay, resume=resume)
        raise
    except Stopped as stopped:
        _stopped(stopped, claims, run)
        raise
    except Outcome:
        claims.release(run)
        raise
    except Exception as error:
        claims.fail(run, error)
        raise
    finally:
        _current.reset(token)
    claims.finish(run, result)
    return result


def _stopped(stopped: Stopped, claims: Claims, run: Run) -> None:
    """Record what became of a call that the task's function ended by one of Celery's own exceptions."""
    if stopped.how == "retried":
        claims.put_off(run, delay=stopped.delay, resume=None)
    elif stopped.how == "replaced":
        claims.put_off(run, delay=claims.policy.keep, resume=None)
    elif stopped.how == "handed back":
        claims.hand_back(run)
    elif stopped.how == "rejected":
        claims.fail(run, stopped.by)
    else:
        claims.release(run)


def _told(answer: Answer, call: Call, claims: Claims, run: Run) -> Any:
    found = run.claim
    if answer not in (Answer.JOIN, Answer.WAIT) or call.headers.joined != found.id:
        # The look at this key before, which has put it off, told it.
        events.TASK_DUPLICATE.tell(
            task=call.task, id=call.id, then=answer.name.lower(), key=key_in(run.key), first=found.id
        )
    if answer is Answer.SKIP and call.in_chord:
        # Its body waits for all members.
        answer = Answer.REUSE if found.is_over else Answer.JOIN
    if answer is Answer.REUSE:
        return claims.result_of(found)
    return _end(answer, call, key_in(run.key), found)


def _end(answer: Answer, call: Call, key: str, found: Claim) -> NoReturn:
    if answer in (Answer.JOIN, Answer.WAIT):
        raise Waiting(_pause(call), attempt=call.attempt, joined=found.id)
    if answer is Answer.RESUME:
        resume = found.resume or {}
        raise Later(
            max(0.0, float(resume.get("at", 0)) - time.time()),
            attempt=int(resume.get("attempt", call.attempt)),
            kind=resume.get("kind", "retry"),
        )
    if answer is Answer.BURY:
        raise Undeliverable(f"{call.task}: it was started {max(1, found.runs)} times without coming to an end.")
    if answer is Answer.SKIP:
        raise Skipped(f"{call.task}: its key {key} is that of call {found.id}, which is {found.state.value}.")
    if answer is Answer.DROP:
        raise Skipped
    raise _error(answer, call, key, found)


def _error(answer: Answer, call: Call, key: str, found: Claim) -> DuplicateCall:
    if answer is Answer.CONFLICT:
        return conflict(call.task, key, found)
    if answer is Answer.FAIL_TOO:
        return DuplicateCall(
            f"{call.task}: call {found.id}, which has the same key {key}, has failed ({found.outcome}).", key, found.id
        )
    return duplicate(call.task, key, found)


def duplicate(task: str, key: str, found: Claim, *, says: str = "It did not run.") -> DuplicateCall:
    """Make the error for a call whose key is another one's."""
    return DuplicateCall(
        f"{task}: its key {key} is that of call {found.id}, which is {found.state.value}. {says}", key, found.id
    )


def conflict(task: str, key: str, found: Claim, *, says: str = "It did not run.") -> KeyConflict:
    """Make the error for a call whose key is another one's, with other arguments."""
    return KeyConflict(
        f"{task}: call {found.id} has the same key {key}, and other arguments. {says} "
        "Mark with Key() what makes calls different, or give another key.",
        key,
        found.id,
    )


def _pause(call: Call) -> float:
    """Look again the more seldom the longer it has waited."""
    now = time.time()
    waited = now - (call.headers.sent_at or now)
    return min(max(_FIRST_LOOK, waited / 2), _LAST_LOOK)
