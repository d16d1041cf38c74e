"""
Makes the moves of one task's claims, in a store.

Each is one round trip when things are as they mostly are: what stands under the
key is guessed, and compared by the store. If it is something else, the store
says what, and it is decided anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar
from uuid import uuid4

from celerykit import events
from celerykit.errors import InvalidOptions, StoreUnavailable
from celerykit.idempotency.claim import Answer, Claim, Event, State, Turn, after, on_start, version
from celerykit.idempotency.keys import Identity, Keys, key_by_id
from celerykit.idempotency.policy import Once
from celerykit.idempotency.records import (
    MOST_ROUNDS,
    SENT_ANEW_AFTER,
    changes_too_fast,
    claim_in,
    is_lapsed,
    key_in,
    record_of,
)
from celerykit.idempotency.sending import Asked, Sending, send_all
from celerykit.stores import Hold, New, Store, Swap

__all__ = ["Claims", "Ended", "Run", "Starting"]

#: What follows when the run that has the key is gone.
_AFTER_A_RUN = (Answer.GO, Answer.BURY)

#: Seconds in which a message that nobody acknowledged comes again, wherever it was held.
_REDELIVERED_WITHIN = 7 * 86400.0

#: Seconds between the clocks of two machines, at most.
_CLOCKS_DIFFER = 5.0

#: Seconds between tries to record what a run has achieved.
_PAUSES = (0.1, 0.5, 1.0, 2.0)

T = TypeVar("T")


class Renewing(Protocol):
    """Keeps leases while a block runs."""

    def holding(self, store: Store, hold: Hold) -> AbstractContextManager[None]:
        """Keep one."""
        ...

    def drop(self, name: str) -> None:
        """Keep the one under this key no longer."""
        ...


class Run(NamedTuple):
    """A claim that this run holds."""

    key: str
    claim: Claim


class Starting(NamedTuple):
    """What becomes of a message, and the claim that was found, or that it runs with."""

    answer: Answer
    run: Run


class Ended(NamedTuple):
    """
    What the result backend says of a call that has ended.

    Attributes:
        at:
            When, in seconds since 1970.

        result:
            As JSON.

        error:
            The type of its error; empty when it has succeeded.
    """

    at: float
    result: Any = None
    error: str = ""


@dataclass(frozen=True, eq=False)
class Claims:
    """
    The claims of one task.

    Attributes:
        keys:
            ``None`` when calls are remembered by their ids.

        store, lease:
            Give them; they are known when the app is configured.

        may_rerun:
            Whether a call that was interrupted may start again.

        encode, decode:
            Write and read results as JSON, as the app does.

        most_runs:
            Gives how often one turn of a call may be started.

        ended:
            Looks for the stored outcome of a call, by its id.
    """

    task: str
    policy: Once
    keys: Keys | None
    store: Callable[[], Store]
    lease: Callable[[], float]
    renewal: Renewing
    may_rerun: bool
    encode: Callable[[Any], str]
    decode: Callable[[str], Any]
    ended: Callable[[str], Ended | None]
    most_runs: Callable[[], float] = lambda: math.inf

    def identify(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        id: str | None,  # noqa: A002  (Celery's name)
        key: Any = None,
    ) -> Identity:
        """
        Give the identity of a call.

        Raises:
            InvalidPayload: The arguments do not fit.

            InvalidOptions: The key cannot be one.
        """
        return self.keys.identify(args, kwargs, key=key) if self.keys else key_by_id(self.task, str(id))

    # A caller's

    def send(self, asked: Asked) -> Sending:
        """
        Claim a call's key, or tell who has it.

        Raises:
            StoreUnavailable: Nobody knows.
        """
        return send_all([asked])[0]

    def take_back(self, identity: Identity, call_id: str) -> None:
        """Free the key of a call that could not be sent. If the store is away, nothing: it frees itself."""
        expected = version(State.CLAIMED, call_id, Turn())
        try:
            self.store().swap(Swap(record_of(identity.key), expected, None))
        except StoreUnavailable as error:
            events.CLAIM_NOT_TAKEN_BACK.tell(key=identity.key, id=call_id, error=error)

    # A worker's

    def start(
        self,
        identity: Identity,
        id: str,  # noqa: A002  (Celery's name)
        turn: Turn,
        *,
        token: str,
        joined: str | None,
        was_sent: bool,
    ) -> Starting:
        """
        Take the claim of a message that is to run, or tell what becomes of it.

        Args:
            joined:
                The id of the call it has waited for.

            was_sent:
                Whether its key was probably claimed when it was sent.

        Raises:
            StoreUnavailable: Nobody knows.
        """
        name = record_of(identity.key)
        running = Claim(
            state=State.RUNNING,
            id=id,
            turn=turn,
            token=token or uuid4().hex,
            task=self.task,
            call=identity.call,
            since=time.time(),
            keep=self.policy.keep,
            runs=1,
        )
        expected = version(State.WAITING if turn.number else State.CLAIMED, id, turn) if was_sent else None
        is_taken_over = False
        for _ in range(MOST_ROUNDS):
            [swapped] = self.store().swap(Swap(name, expected, self._running(running), lapsed=is_taken_over))
            if swapped.done:
                return Starting(Answer.GO, Run(name, running))
            found = claim_in(swapped.found)
            expected = swapped.found.version if swapped.found else None
            answer = on_start(
                found,
                is_lapsed=is_lapsed(swapped.found),
                id=id,
                turn=turn,
                call=identity.call,
                joined=joined,
                policy=self.policy,
                may_rerun=self.may_rerun,
                most_runs=self.most_runs(),
            )
            # A run may be taken over if it was not renewed in the meantime.
            is_taken_over = found is not None and found.state is State.RUNNING and answer in _AFTER_A_RUN
            if found is not None and self.has_ended(name, found, is_gone=is_taken_over):
                continue
            if answer is not Answer.GO:
                return Starting(answer, Run(name, found or running))
            after(found.state if found else None, Event.START)
            is_next = found is not None and found.id == id and turn > found.turn
            # Whose run it was does not matter: two calls that take it from each other would have no end.
            runs = found.runs + 1 if found and is_taken_over and not is_next else 1
            taken_from = found.id if found and found.state is State.CLAIMED and found.id != id else ""
            running = replace(running, runs=runs, taken_from=taken_from)
        raise changes_too_fast(identity)

    def has_ended(self, name: str, found: Claim, *, is_gone: bool) -> bool:
        """
        Record that a call has ended which could not say so itself, if its stored outcome says that it has.

        Its process died, or the store was away; or another task went on with its id.
        """
        has_gone_on = found.state is State.WAITING and found.resume is None
        ended = self.ended(found.id) if is_gone or has_gone_on else None
        # People use one id for many calls. Who went on with it has a clock of its own.
        if ended is None or ended.at < found.since - (_CLOCKS_DIFFER if has_gone_on else 0):
            return False
        if ended.error and not has_gone_on:
            return False
        if ended.error:
            claim = found.moved(Event.FAIL, since=time.time(), outcome=ended.error)
        else:
            written = self._written(Run(name, found), ended.result)
            claim = found.moved(Event.FINISH, since=time.time(), outcome=written)
        self.store().swap(Swap(name, found.version, New(claim.version, claim.data(), ttl=self.policy.keep)))
        return True

    def _running(self, claim: Claim) -> New:
        return New(claim.version, claim.data(), ttl=self._runs_for, lease=self.lease())

    @property
    def _runs_for(self) -> float:
        """Seconds that a claim is known which is not renewed any more: what must not start twice, for longer."""
        return self.lease() + max(self.policy.keep, 0.0 if self.may_rerun else _REDELIVERED_WITHIN)

    def holding(self, run: Run) -> AbstractContextManager[None]:
        """Keep a running claim while the block runs."""
        lease = self.lease()
        hold = Hold(run.key, run.claim.version, lease, self._runs_for)
        return self.renewal.holding(self.store(), hold)

    def finish(self, run: Run, result: Any) -> None:
        """
        Record what a run has returned. The effect is there, so this raises nothing.

        Tries for a few seconds; then it is logged that nobody knows.
        """
        done = run.claim.moved(Event.FINISH, since=time.time(), outcome=self._written(run, result))
        new = New(done.version, done.data(), ttl=self.policy.keep)
        found = self._record(run, new)
        if found is not None and found.state is State.FAILED and _are_of_one_turn(found, run.claim):
            # It stood still for longer than its lease, was taken for gone, and buried; but what it did is done.
            after(found.state, Event.FINISH)
            self._patiently(lambda: self.store().swap(Swap(run.key, found.version, new)), run)

    def remember(self, run: Run, result: Any, *, on: Any) -> bool:
        """
        Record what a run is going to return, in the caller's transaction; tell whether it still holds the key.

        Raises:
            InvalidOptions: The store is no SQL database.
        """
        store: Any = self.store()
        if not store.is_shared:
            return True  # run in place: what is in this process's memory ends with it anyway
        if not hasattr(store, "on"):
            raise InvalidOptions(
                f"{self.task}: remember() needs a store in the database of your transaction; "
                "set CELERYKIT_STORE_URL to its address."
            )
        done = run.claim.moved(Event.FINISH, since=time.time(), outcome=self.encode(result))
        new = New(done.version, done.data(), ttl=self.policy.keep)
        # Its row is the transaction's now: a renewal would wait for that.
        self.renewal.drop(run.key)
        # A Session lends its connection.
        connection = on.connection() if hasattr(on, "get_bind") else on
        [swapped] = store.on(connection).swap(Swap(run.key, run.claim.version, new))
        return bool(swapped.done)

    def fail(self, run: Run, error: BaseException) -> None:
        """Record that a run has failed for good, which frees the key."""
        failed = run.claim.moved(Event.FAIL, since=time.time(), outcome=type(error).__name__)
        self._record(run, New(failed.version, failed.data(), ttl=self.policy.keep))

    def put_off(self, run: Run, *, delay: float, resume: Mapping[str, Any] | None) -> None:
        """
        Record that the call is to run again, before that is sent.

        Args:
            resume:
                How to send it, should this process die before it has; ``None``
                when it was sent already.
        """
        waiting = run.claim.moved(Event.PUT_OFF, turn=run.claim.turn.next(), token="", since=time.time(), resume=resume)
        ttl = delay + max(self.policy.keep, SENT_ANEW_AFTER)
        self._record(run, New(waiting.version, waiting.data(), ttl=ttl, lease=delay + SENT_ANEW_AFTER))

    def release(self, run: Run) -> None:
        """Free the key of a run that ended without an outcome."""
        after(run.claim.state, Event.RELEASE)
        self._record(run, None)

    def hand_back(self, run: Run) -> None:
        """Let a run go whose message goes back: it may start at once, and this start does not count."""
        claimed = run.claim.moved(Event.HAND_BACK, token="", since=time.time(), runs=0)
        ttl = SENT_ANEW_AFTER + self.policy.keep
        self._record(run, New(claimed.version, claimed.data(), ttl=ttl, lease=SENT_ANEW_AFTER))

    def _record(self, run: Run, new: New | None) -> Claim | None:
        """Write what became of a run, and give the claim that stands there if the run had lost it."""
        swap = Swap(run.key, run.claim.version, new)
        found = self._patiently(lambda: self.store().swap(swap)[0], run)
        if found is None or found.done:
            return None
        claim = claim_in(found.found)
        if new is None or claim is None or claim.version != new.version:
            # It ran past its lease, or was released by hand. What it did is done; nobody else's claim is touched.
            now = claim.state.value if claim is not None else "free"
            events.CLAIM_LOST.tell(key=key_in(run.key), id=run.claim.id, now=now, first=claim and claim.id)
        return claim

    def _patiently(self, ask: Callable[[], T], run: Run) -> T | None:
        for pause in (*_PAUSES, None):
            try:
                return ask()
            except StoreUnavailable as error:
                if pause is None:
                    events.CLAIM_NOT_RECORDED.tell(key=key_in(run.key), id=run.claim.id, error=error)
                    return None
                time.sleep(pause)
            except Exception as error:  # noqa: BLE001  (an edge: the run has ended as it has, whatever a store raises)
                # Without its text, which may quote the result.
                events.CLAIM_NOT_RECORDED.tell(key=key_in(run.key), id=run.claim.id, error=type(error).__name__)
                return None
        return None

    def _written(self, run: Run, result: Any) -> str:
        try:
            return self.encode(result)
        except Exception as error:  # noqa: BLE001  (encoders raise what they like, and the effect is there)
            events.CLAIM_RESULT_NOT_KEPT.tell(key=key_in(run.key), id=run.claim.id, error=type(error).__name__)
            return ""

    def result_of(self, claim: Claim) -> Any:
        """Give the result of a claim that is done, as JSON."""
        return self.decode(claim.outcome) if claim.outcome else None

    # For whoever outlives the run

    def abandon(self, key: str, of_version: str) -> None:
        """Let a lease go. If the store is away, it lapses by itself."""
        try:
            self.store().renew([Hold(key, of_version, 0.0, self._runs_for)])
        except StoreUnavailable as error:
            events.CLAIM_NOT_GIVEN_UP.tell(key=key_in(key), error=error)


def _are_of_one_turn(one: Claim, other: Claim) -> bool:
    return (one.id, one.turn) == (other.id, other.turn)
