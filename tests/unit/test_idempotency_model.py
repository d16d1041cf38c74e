"""
One key among callers, workers and crashes, beside a small model of what may have happened.

Callers send and die, messages come twice, runs are put off, cut off, frozen and killed, and time goes by. Whatever
they do in whatever order: there are never two live runs, what was done is not done again, and nothing is left over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from celerykit.idempotency import Claims, Identity, Once, State, Turn
from celerykit.idempotency import Run as Held
from celerykit.idempotency.claim import Answer, Claim, Event
from celerykit.idempotency.records import end_claim, find_claim, record_of
from celerykit.idempotency.sending import Asked
from celerykit.stores import Hold, Store, Swap
from celerykit.stores.memory import MemoryStore

KEY = "shop.charge:1"
LEASE, KEEP = 10.0, 100.0

#: Longer than anything that is queued is thought to be on its way.
LONG = 61.0


class RenewedByTheModel:
    """The model itself says which runs are heard of."""

    def holding(self, store: Store, hold: Hold) -> AbstractContextManager[None]:
        return nullcontext()

    def drop(self, name: str) -> None: ...


@dataclass(frozen=True)
class Message:
    id: str
    turn: Turn = Turn()  # noqa: RUF009
    joined: str | None = None
    call: str = "contract:a"


@dataclass
class Running:
    """A run that a worker has begun."""

    message: Message
    held: Held

    #: When it was last heard of.
    heard: float

    #: It is heard of no more, and knows nothing of that.
    is_frozen: bool = False

    #: An operator has taken its key away.
    is_released: bool = False

    @property
    def is_live(self) -> bool:
        return not (self.is_frozen or self.is_released)


class OneKey(RuleBasedStateMachine):
    """Callers and workers around one key."""

    @initialize(
        running=st.sampled_from(["join", "join", "raise", "skip"]),
        done=st.sampled_from(["reuse", "reuse", "raise", "skip", "rerun"]),
        may_rerun=st.booleans(),
        most_runs=st.sampled_from([math.inf, 2]),
        is_poison=st.booleans(),
    )
    def begin(self, running: Any, done: Any, may_rerun: bool, most_runs: float, is_poison: bool) -> None:
        self.now = 0.0
        self.store = MemoryStore(clock=lambda: self.now)
        self.policy = Once(running=running, done=done, keep=KEEP)
        self.claims = Claims(
            task="shop.charge",
            policy=self.policy,
            keys=None,
            store=lambda: self.store,
            lease=lambda: LEASE,
            renewal=RenewedByTheModel(),
            may_rerun=may_rerun,
            encode=json.dumps,
            decode=json.loads,
            most_runs=lambda: most_runs,
            ended=lambda call_id: None,
        )
        self.ends_badly = is_poison and most_runs < math.inf
        self.ids = 0
        self.queue: list[Message] = []
        self.runs: list[Running] = []
        self.letters: list[Message] = []
        #: Who was sent, and who has an outcome that can be waited for.
        self.sent: set[str] = set()
        self.ended: set[str] = set()
        #: What was done: by whom, and until when it is remembered.
        self.done: tuple[Held, float] | None = None
        #: What has started and said nothing of how it ended, and until when that is remembered.
        self.interrupted: dict[tuple[str, Turn], float] = {}
        #: The turns that calls are at, as far as that was recorded.
        self.due: dict[str, Turn] = {}

    def new_id(self) -> str:
        self.ids += 1
        return f"call {self.ids}"

    def claim(self) -> Claim | None:
        return find_claim(self.store, KEY)

    def is_lapsed(self) -> bool:
        record = self.store.read(record_of(KEY))
        return record is not None and record.lease is not None and record.lease <= 0

    # Callers

    @rule(then=st.sampled_from(["sent", "sent", "sent", "refused", "died"]), call=st.sampled_from("aaab"))
    def somebody_sends(self, then: str, call: str) -> None:
        message = Message(self.new_id(), call=f"contract:{call}")
        before, is_lapsed = self.claim(), self.is_lapsed()

        answer, claim = self.claims.send(Asked(self.claims, Identity(KEY, message.call), message.id))

        assert answer.name == self.told(before, message, is_lapsed=is_lapsed)
        if answer is Answer.SEND_AGAIN:
            assert claim is not None
            message = Message(claim.id, claim.turn, call=message.call)
        if answer in (Answer.GO, Answer.SEND_AGAIN):
            self.leaves(message, then, is_new=answer is Answer.GO)
        if answer is Answer.REUSE:
            assert claim is not None
            assert self.claims.result_of(claim) == claim.id

    def leaves(self, message: Message, then: str, *, is_new: bool) -> None:
        if then == "sent":
            self.publish(message)
        elif then == "refused" and is_new:
            self.claims.take_back(Identity(KEY), message.id)
            assert self.claim() is None

    def told(self, found: Claim | None, message: Message, *, is_lapsed: bool) -> str:
        """Say in other words what a caller is told."""
        if found is None or found.state is State.FAILED:
            return "GO"
        if found.call != message.call:
            return "CONFLICT"
        if found.state is State.DONE:
            return "GO" if self.policy.done == "rerun" else self.policy.done.upper()
        must_not_start_again = found.state is State.RUNNING and not self.claims.may_rerun
        return "SEND_AGAIN" if is_lapsed and not must_not_start_again else self.policy.running.upper()

    @rule(call=st.sampled_from("aaab"))
    def a_message_is_sent_whose_key_nobody_claimed(self, call: str) -> None:
        """By a chain, a chord, or somebody who knows nothing of keys."""
        self.publish(Message(self.new_id(), call=f"contract:{call}"))

    def publish(self, message: Message) -> None:
        self.sent.add(message.id)
        self.queue.append(message)

    # Workers

    @precondition(lambda self: self.queue)
    @rule(data=st.data(), token=st.uuids())
    def a_message_is_delivered(self, data: st.DataObject, token: Any) -> None:
        self.deliver(self.queue.pop(data.draw(st.integers(0, len(self.queue) - 1))), token.hex)

    def deliver(self, message: Message, token: str) -> None:
        live, before = [run for run in self.runs if run.is_live], self.claim()
        answer, held = self.claims.start(
            Identity(KEY, message.call), message.id, message.turn, token=token, joined=message.joined, was_sent=True
        )
        if answer is Answer.GO:
            assert not live
            self.check_may_run(message, before)
            self.runs.append(Running(message, held, heard=self.now))
            self.due = {message.id: message.turn}
        elif answer in (Answer.JOIN, Answer.WAIT):
            self.publish(replace(message, joined=held.claim.id))
        elif answer is Answer.RESUME:
            self.publish(replace(message, turn=message.turn.next(), joined=None))
        elif answer is Answer.BURY:
            assert not self.claims.may_rerun or held.claim.runs >= self.claims.most_runs()
            self.bury(message, token)
        elif answer is not Answer.DROP:
            self.ended.add(message.id)

    def check_may_run(self, message: Message, found: Claim | None) -> None:
        if found is not None and found.id == message.id:
            assert message.turn >= self.due.get(message.id, Turn())
        if self.done is not None and self.policy.done != "rerun":
            assert self.now >= self.done[1]
        if not self.claims.may_rerun:
            assert self.now >= self.interrupted.get((message.id, message.turn), 0)

    def is_interrupted(self, run: Running, *, remembered: float | None = None) -> None:
        """Its message comes back, without a word of what came of it."""
        self.queue.append(run.message)
        if self.holds(run):
            until = run.heard + LEASE + KEEP if remembered is None else self.now + remembered
            self.interrupted[run.message.id, run.message.turn] = until

    def one(self, data: st.DataObject, which: Callable[[Running], bool] = lambda run: True) -> Running:
        run = data.draw(st.sampled_from([run for run in self.runs if which(run)]))
        self.runs.remove(run)
        return run

    def holds(self, run: Running) -> bool:
        claim = self.claim()
        return claim is not None and claim.version == run.held.claim.version

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def a_run_succeeds(self, data: st.DataObject) -> None:
        self.succeed(self.one(data))

    def succeed(self, run: Running) -> None:
        held_it, before = self.holds(run), self.claim()
        self.claims.finish(run.held, run.message.id)
        self.ended.add(run.message.id)
        if held_it:
            self.done = (run.held, self.now + KEEP)
        else:
            assert self.claim() == before

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), is_cut_off=st.booleans())
    def a_run_fails(self, data: st.DataObject, is_cut_off: bool) -> None:
        """It raises, or its process dies and the worker's parent says so."""
        run = self.one(data)
        if not is_cut_off:
            self.claims.fail(run.held, ValueError())
        self.interrupted.clear()
        if not run.is_frozen:
            self.bury(run.message, run.held.claim.token)

    def bury(self, message: Message, token: str) -> None:
        end_claim(self.store, record_of(KEY), message.id, message.turn, token=token, event=Event.FAIL, why="gone")
        self.interrupted.clear()
        self.ended.add(message.id)
        self.letters.append(message)

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), then=st.sampled_from(["sent", "sent", "died before", "died after"]))
    def a_run_is_put_off(self, data: st.DataObject, then: str) -> None:
        """By its policy: first it is recorded, then it is sent."""
        run = self.one(data)
        following = replace(run.message, turn=run.message.turn.next(), joined=None)
        if self.holds(run):
            self.due = {following.id: following.turn}
        self.claims.put_off(run.held, delay=5.0, resume={"at": 0})
        if then != "died before":
            self.publish(following)
        if then != "sent":
            self.queue.append(run.message)

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), then=st.sampled_from(["recorded", "recorded", "died before", "died after"]))
    def a_run_sends_itself_again(self, data: st.DataObject, then: str) -> None:
        """By ``self.retry()``: it is sent before that can be recorded."""
        run = self.one(data)
        following = replace(run.message, turn=run.message.turn.next(), joined=None)
        self.publish(following)
        if then == "died before":
            self.is_interrupted(run)
            return
        if self.holds(run):
            self.due = {following.id: following.turn}
        self.claims.put_off(run.held, delay=5.0, resume=None)
        if then == "died after":
            self.queue.append(run.message)

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), parent=st.sampled_from(["dies too", "gives up", "hands back"]))
    def a_worker_dies(self, data: st.DataObject, parent: str) -> None:
        """Its message comes back; a parent that lives lets the lease go, or says that it ended the run itself."""
        run = self.one(data)
        if parent == "hands back":
            self.claims.hand_back(run.held)
            self.interrupted.clear()
            self.queue.append(run.message)
        elif parent == "gives up":
            self.claims.abandon(run.held.key, run.held.claim.version)
            self.is_interrupted(run, remembered=KEEP)
        else:
            self.is_interrupted(run)

    @precondition(lambda self: any(run.is_live for run in self.runs))
    @rule(data=st.data())
    def a_worker_freezes(self, data: st.DataObject) -> None:
        """The broker gives its message to another one."""
        run = self.one(data, lambda run: run.is_live)
        self.runs.append(replace(run, is_frozen=True))
        self.is_interrupted(run)

    @precondition(lambda self: self.queue or self.runs)
    @rule(data=st.data())
    def a_message_comes_twice(self, data: st.DataObject) -> None:
        self.queue.append(data.draw(st.sampled_from([*self.queue, *(run.message for run in self.runs)])))

    # Operators

    @precondition(lambda self: self.letters)
    @rule(data=st.data())
    def a_letter_is_replayed(self, data: st.DataObject) -> None:
        letter = data.draw(st.sampled_from(self.letters))
        self.letters.remove(letter)
        self.publish(replace(letter, turn=Turn(letter.turn.replay + 1), joined=None))

    @rule()
    def a_key_is_released_by_hand(self) -> None:
        claim = self.claim()
        if claim is None:
            return
        self.store.swap(Swap(record_of(KEY), claim.version, None))
        self.runs = [replace(run, is_released=True) for run in self.runs]
        self.forget()

    @precondition(lambda self: self.queue)
    @rule(data=st.data())
    def a_call_is_revoked(self, data: st.DataObject) -> None:
        message = data.draw(st.sampled_from(self.queue))
        self.queue.remove(message)
        end_claim(self.store, record_of(KEY), message.id, message.turn, token=None, event=Event.RELEASE)
        self.interrupted.clear()
        self.ended.add(message.id)

    def forget(self) -> None:
        self.done = None
        self.interrupted.clear()
        self.due.clear()

    # Time

    @rule(seconds=st.sampled_from([1.0, LEASE / 2, LEASE + 1, LONG, KEEP / 2, KEEP + 1]))
    def time_goes_by(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + LEASE / 3)
            for run in self.runs:
                if run.is_live:
                    hold = Hold(run.held.key, run.held.claim.version, LEASE, LEASE + KEEP)
                    assert self.store.renew([hold]) == [True]
                    run.heard = self.now

    # What holds at any time

    @invariant()
    def there_is_one_live_run_at_most_and_it_has_the_key(self) -> None:
        live = [run for run in self.runs if run.is_live]

        assert len(live) <= 1
        for run in live:
            assert self.holds(run)

    @invariant()
    def what_was_done_is_remembered(self) -> None:
        if self.done is None or self.policy.done == "rerun":
            return
        held, until = self.done
        claim = self.claim()
        if self.now < until:
            assert claim is not None
            assert (claim.state, claim.token) == (State.DONE, held.claim.token)
            assert self.claims.result_of(claim) == held.claim.id

    def teardown(self) -> None:
        """
        Let everything end. What was sent has an outcome then, and at last nothing is left.

        Even if each run kills its worker, that comes to an end where there is a bound.
        """
        for _ in range(50):
            if not (self.queue or self.runs):
                break
            waiting, self.queue = self.queue, []
            for message in waiting:
                self.deliver(message, self.new_id())
            runs, self.runs = self.runs, []
            for run in runs:
                if self.ends_badly and not run.is_frozen:
                    self.queue.append(run.message)
                else:
                    self.succeed(run)
            self.time_goes_by(LONG)
        else:
            pytest.fail(f"these wait for ever: {self.queue}")
        assert self.sent <= self.ended
        self.time_goes_by(LONG + KEEP + LEASE)
        assert list(self.store.find("")) == []


TestOneKey = OneKey.TestCase
TestOneKey.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
