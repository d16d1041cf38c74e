"""
What becomes of a call whose key is looked at before it is sent, or that runs in place.
"""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any

import pytest
from celery import chain, chord, group
from celery.exceptions import TaskRevokedError
from pydantic import BaseModel

from celerykit import (
    DuplicateCall,
    EnqueueError,
    InvalidOptions,
    InvalidPayload,
    Key,
    KeyConflict,
    Once,
    Retry,
    Snooze,
    StoreUnavailable,
)
from celerykit.headers import Headers
from celerykit.idempotency import Claim, Claims, State, Turn, find_claim
from celerykit.idempotency.records import record_of
from celerykit.publishing import UnreachableBroker
from celerykit.stores.memory import MemoryStore


class Order(BaseModel):
    order_id: Annotated[int, Key()]
    amount: Decimal = Decimal(1)


class Receipt(BaseModel):
    total: Decimal


class Clock:
    now = 0.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(app: Any, clock: Clock) -> MemoryStore:
    app._store = MemoryStore(clock=lambda: clock.now)
    return app._store  # type: ignore[no-any-return]


@pytest.fixture
def declare(app: Any, store: MemoryStore) -> Callable[..., Any]:
    """Declare the task of these tests, with a policy."""

    def declare(policy: Once | None = None, **options: Any) -> Any:
        @app.task(name="shop.charge", once=policy or Once(), **options)
        def charge(order: Order, *, note: str = "") -> Receipt:
            return Receipt(total=order.amount)

        return charge

    return declare


@pytest.fixture
def charge(declare: Callable[..., Any]) -> Any:
    return declare()


@pytest.fixture
def sent(app: Any) -> Callable[[], list[Any]]:
    """Take what was sent out of the queue."""

    def take() -> list[Any]:
        messages = []
        with app.connection_for_read() as connection, connection.SimpleQueue("celery") as queue:
            while queue.qsize():
                messages.append(queue.get(block=False))
                messages[-1].ack()
        return messages

    take()  # of other tests: the broker is this process's memory
    return take


def claim_of(task: Any, *args: Any, key: Any = None) -> Claim | None:
    return find_claim(task.app.store, task.claims.identify(args, {}, id=None, key=key).key)


def is_done(task: Any, *args: Any, result: Any) -> str:
    """Let a worker have run this call, and give its id."""
    claims: Claims = task.claims
    identity = claims.identify(args, {}, id=None)
    started = claims.start(identity, "first", Turn(), token="", joined=None, was_sent=True)
    claims.finish(started.run, result)
    return "first"


# One key, one message


def test_a_second_call_is_not_sent_and_gets_the_result_of_the_first(charge: Any, sent: Any) -> None:
    first, second = charge.delay(Order(order_id=1)), charge.delay({"order_id": "1"})

    [message] = sent()
    assert first.id == second.id == message.headers["id"]
    assert (first.duplicate, second.duplicate) == (False, True)
    claim = claim_of(charge, {"order_id": 1})
    assert claim is not None
    assert (claim.state, claim.id) == (State.CLAIMED, first.id)


async def send_async(charge: Any, order: Any) -> Any:
    return await charge.adelay(order)


VERBS: dict[str, Callable[[Any, Any], Any]] = {
    "delay": lambda charge, order: charge.delay(order=order),
    "apply_async": lambda charge, order: charge.apply_async((order,), countdown=5),
    "using": lambda charge, order: charge.using(queue="celery").delay(order, note=""),
    "adelay": lambda charge, order: asyncio.run(send_async(charge, order)),
    "signature": lambda charge, order: charge.s(order).delay(),
    "immutable": lambda charge, order: charge.si(order).apply_async(),
    "send_task": lambda charge, order: charge.app.send_task(charge.name, (order,)),
    "enqueue_many": lambda charge, order: charge.enqueue_many([(order,)])[0],
    "app.enqueue_many": lambda charge, order: charge.app.enqueue_many([charge.s(order)])[0],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_claims_the_key_and_heeds_it(charge: Any, sent: Any, verb: str) -> None:
    first = VERBS[verb](charge, Order(order_id=1))
    others = [send(charge, Order(order_id=1)) for send in VERBS.values()]

    [message] = sent()
    assert message.headers["id"] == first.id
    assert {other.id for other in others} == {first.id}
    assert first.duplicate is False
    assert all(other.duplicate is True for other in others)
    assert isinstance(others[0], type(charge.AsyncResult("x")))


PLACED: dict[str, Callable[[Any, Any], Any]] = {
    "an id": lambda charge, order: charge.apply_async((order,), task_id="mine"),
    "a link": lambda charge, order: charge.apply_async((order,), link=charge.si(Order(order_id=9))),
    "an errback": lambda charge, order: charge.apply_async((order,), link_error=charge.si(Order(order_id=9))),
    "a chain": lambda charge, order: chain(charge.s(order), charge.si(Order(order_id=9))).delay(),
    "a group": lambda charge, order: group([charge.s(order)]).delay(),
    "a chord": lambda charge, order: chord([charge.s(order)], charge.si(Order(order_id=9))).delay(),
    "a queue for the answer": lambda charge, order: charge.apply_async((order,), reply_to="me"),
}


@pytest.mark.parametrize("place", PLACED)
def test_a_call_that_has_its_place_is_always_sent_and_claimed_where_it_runs(charge: Any, sent: Any, place: str) -> None:
    PLACED[place](charge, Order(order_id=1))
    assert claim_of(charge, Order(order_id=1)) is None

    charge.delay(Order(order_id=1))
    PLACED[place](charge, Order(order_id=1))

    messages = sent()
    assert len(messages) == 3
    key = charge.claims.identify((Order(order_id=1),), {}, id=None)
    assert {(Headers.of(m.headers).key, Headers.of(m.headers).call) for m in messages} == {(key.key, key.call)}


def test_calls_sent_together_are_told_apart(charge: Any, sent: Any) -> None:
    first = charge.delay(Order(order_id=2))

    results = charge.enqueue_many([(Order(order_id=number),) for number in (1, 2, 1, 3)])

    assert [message.headers["id"] for message in sent()] == [first.id, results[0].id, results[3].id]
    assert [result.duplicate for result in results] == [False, True, True, False]
    assert (results[1].id, results[2].id) == (first.id, results[0].id)


# What a duplicate is told


def test_a_task_may_refuse_duplicates(declare: Any, sent: Any) -> None:
    charge = declare(Once(running="raise", done="raise"))
    first = charge.delay(Order(order_id=1))

    with pytest.raises(DuplicateCall, match=f"is that of call {first.id}, which is claimed. The message was not") as no:
        charge.delay(Order(order_id=1))

    assert no.value.first == first.id
    assert no.value.key == charge.claims.identify((Order(order_id=1),), {}, id=None).key
    assert isinstance(pickle.loads(pickle.dumps(no.value)), DuplicateCall)
    is_done(charge, Order(order_id=2), result=None)
    with pytest.raises(DuplicateCall, match="which is done"):
        charge.delay(Order(order_id=2))
    assert len(sent()) == 1


def test_a_task_may_skip_duplicates(declare: Any, sent: Any) -> None:
    charge = declare(Once(running="skip", done="skip"))
    first = charge.delay(Order(order_id=1))
    is_done(charge, Order(order_id=2), result=None)

    for order_id in (1, 2):
        skipped = charge.delay(Order(order_id=order_id))
        assert (skipped.duplicate, skipped.state) == (True, "REVOKED")
        assert skipped.id != first.id
        with pytest.raises(TaskRevokedError, match=r"its key shop\.charge:[0-9a-f]+ is that of call"):
            skipped.get(timeout=0)
    assert len(sent()) == 1


def test_the_result_of_what_is_done_is_there_at_once_and_typed(charge: Any, sent: Any) -> None:
    is_done(charge, Order(order_id=1), result={"total": "7"})

    again = charge.delay(Order(order_id=1))

    assert again.get(timeout=0) == Receipt(total=Decimal(7))
    assert asyncio.run(again.aget(timeout=0.1)) == Receipt(total=Decimal(7))
    assert (again.id, again.duplicate, again.ready(), again.state) == ("first", True, True, "SUCCESS")
    assert sent() == []


def test_what_returns_nothing_is_done_all_the_same(app: Any, store: MemoryStore, sent: Any) -> None:
    @app.task(once=Once())
    def note(text: str) -> None: ...

    is_done(note, "x", result=None)

    assert note.delay("x").get(timeout=0) is None


def test_what_is_done_may_run_again_if_the_task_says_so(declare: Any, sent: Any) -> None:
    charge = declare(Once(done="rerun"))
    is_done(charge, Order(order_id=1), result={"total": "7"})

    again = charge.delay(Order(order_id=1))

    assert (again.duplicate, len(sent())) == (False, 1)
    assert charge.delay(Order(order_id=1)).id == again.id


def test_a_key_with_other_arguments_is_a_conflict(charge: Any, sent: Any) -> None:
    first = charge.delay(Order(order_id=1))

    with pytest.raises(KeyConflict, match=rf"call {first.id} has the same key .* The message was not sent\.") as no:
        charge.delay(Order(order_id=1, amount=Decimal(2)))

    assert no.value.first == first.id
    assert len(sent()) == 1


def test_a_key_may_be_given_for_one_call(charge: Any, sent: Any) -> None:
    first = charge.using(key="double click").delay(Order(order_id=1))

    assert charge.using(key="double click").delay(Order(order_id=1)).id == first.id
    assert charge.delay(Order(order_id=1)).id != first.id
    with pytest.raises(KeyConflict):
        charge.apply_async((Order(order_id=2),), key="double click")
    assert all("key" not in message.headers for message in sent())


def test_what_can_be_no_key_is_refused(app: Any, charge: Any, sent: Any) -> None:
    @app.task
    def plain(n: int) -> int: ...

    with pytest.raises(InvalidOptions, match=r"not declared with once=Once\(\). The message was not sent"):
        plain.using(key="x").delay(1)
    with pytest.raises(InvalidOptions, match="the key must be text"):
        charge.using(key=1.5).delay(Order(order_id=1))
    assert sent() == []


def test_what_nobody_checks_has_no_key_until_it_is_read(app: Any, store: MemoryStore, sent: Any) -> None:
    @app.task(once=Once(), typing=False)
    def charge(order: Order) -> None: ...

    charge.delay("nonsense")

    [message] = sent()
    assert Headers.of(message.headers).key is None


def test_an_error_of_the_user_s_function_is_the_caller_s(declare: Any, sent: Any) -> None:
    charge = declare(Once(key=lambda order: 1 / 0))

    with pytest.raises(ZeroDivisionError):
        charge.delay(Order(order_id=1))
    with pytest.raises(InvalidPayload):
        charge.delay("nonsense")
    assert sent() == []


def test_headers_that_are_passed_on_do_not_pass_on_a_key(charge: Any, app: Any, sent: Any) -> None:
    charge.delay(Order(order_id=1))
    [first] = sent()

    charge.apply_async((Order(order_id=2),), headers=dict(first.headers))

    [second] = sent()
    assert Headers.of(second.headers).key != Headers.of(first.headers).key


# What is not sent


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (UnreachableBroker("no", may_have_been_sent=False), None),
        (ValueError("it cannot be encoded"), None),
        (UnreachableBroker("perhaps", may_have_been_sent=True), State.CLAIMED),
    ],
)
@pytest.mark.parametrize("verb", ["delay", "send_task", "enqueue_many"])
def test_a_claim_is_taken_back_when_its_message_was_not_sent(
    charge: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, state: State | None, verb: str
) -> None:
    def publish(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(charge.app.amqp, "send_task_message", publish)

    with pytest.raises(type(error)):
        VERBS[verb](charge, Order(order_id=1))

    claim = claim_of(charge, Order(order_id=1))
    assert (claim and claim.state) == state


def test_of_many_those_that_were_not_sent_are_taken_back(
    charge: Any, sent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, left = charge.app.amqp.send_task_message, iter("ab")

    def two(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise UnreachableBroker("no", may_have_been_sent=False)
        return publish(*args, **kwargs)

    monkeypatch.setattr(charge.app.amqp, "send_task_message", two)

    with pytest.raises(EnqueueError) as failed:
        charge.enqueue_many([(Order(order_id=number),) for number in range(4)])

    held = [claim_of(charge, Order(order_id=number)) for number in range(4)]
    assert [claim and claim.id for claim in held] == [*(result.id for result in failed.value.sent), None, None]


def test_if_one_of_many_is_refused_none_is_sent(declare: Any, sent: Any) -> None:
    charge = declare(Once(running="raise"))
    charge.delay(Order(order_id=3))

    with pytest.raises(DuplicateCall):
        charge.enqueue_many([(Order(order_id=number),) for number in (1, 2, 3, 4)])

    assert len(sent()) == 1
    assert [claim_of(charge, Order(order_id=number)) is None for number in (1, 2, 3, 4)] == [True, True, False, True]


def test_what_nobody_has_heard_of_is_sent_again_as_the_same_call(charge: Any, sent: Any, clock: Clock) -> None:
    first = charge.delay(Order(order_id=1))
    run = charge.claims.start(
        charge.claims.identify((Order(order_id=1),), {}, id=None),
        first.id,
        Turn(),
        token="",
        joined=None,
        was_sent=True,
    ).run
    charge.claims.put_off(run, delay=5, resume={"at": 0, "attempt": 2, "kind": "retry"})
    sent()
    clock.now = 3600

    [again] = charge.enqueue_many([(Order(order_id=1),)])

    [message] = sent()
    header = Headers.of(message.headers)
    assert (again.id, again.duplicate, message.headers["id"]) == (first.id, True, first.id)
    assert (header.turn, header.attempt) == (1, 2)
    assert charge.delay(Order(order_id=1)).id == first.id
    assert sent() == []


def test_how_long_a_key_waits_is_read_off_the_options(charge: Any, store: MemoryStore, clock: Clock) -> None:
    def lives(order_id: int, **options: Any) -> tuple[int, int]:
        charge.apply_async((Order(order_id=order_id),), **options)
        key = record_of(charge.claims.identify((Order(order_id=order_id),), {}, id=None).key)
        record, began = store.read(key), clock.now
        assert record is not None
        assert record.lease is not None
        while store.read(key):
            clock.now += 10
        return round(record.lease), round(clock.now - began)

    day, in_an_hour = 86400, datetime.now(UTC) + timedelta(hours=1)
    assert lives(1) == (60, day + 60)
    assert lives(2, countdown=3600) == (3660, day + 3600)
    assert lives(3, eta=in_an_hour) == pytest.approx((3660, day + 3600), abs=10)
    assert lives(4, eta=in_an_hour.replace(tzinfo=None)) == pytest.approx((3660, day + 3600), abs=10)
    assert lives(5, expires=7200) == (60, day + 7200)
    assert lives(6, expires=in_an_hour) == pytest.approx((60, day + 3600), abs=10)


# The store is away


@pytest.fixture
def is_away(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(*swaps: Any) -> Any:
        raise StoreUnavailable("the store is away.")

    monkeypatch.setattr(store, "swap", swap)


@pytest.mark.usefixtures("is_away")
@pytest.mark.parametrize("policy", ["run", "retry"])
def test_without_the_store_a_call_is_sent_and_nobody_knows_whether_it_is_a_duplicate(
    declare: Any, sent: Any, policy: str
) -> None:
    charge = declare(on_store_down=policy)

    results = [charge.delay(Order(order_id=1)), *charge.enqueue_many([(Order(order_id=1),)])]

    assert [result.duplicate for result in results] == [None, None]
    assert [message.headers["id"] for message in sent()] == [result.id for result in results]


@pytest.mark.usefixtures("is_away")
def test_or_it_is_not_sent_if_the_task_says_so(declare: Any, sent: Any) -> None:
    charge = declare(on_store_down="fail")

    with pytest.raises(StoreUnavailable, match=r"shop\.charge: the store is away\. The message was not sent"):
        charge.delay(Order(order_id=1))
    with pytest.raises(StoreUnavailable):
        charge.enqueue_many([(Order(order_id=1),)])
    assert sent() == []


# In place


@pytest.fixture
def ran() -> list[Any]:
    return []


@pytest.fixture
def in_place(eager: Any, ran: list[Any]) -> Callable[..., Any]:
    """Declare a task that runs where it is called, and notes that it did."""

    def declare(policy: Once | None = None, **options: Any) -> Any:
        @eager.task(once=policy or Once(), **options)
        def double(n: Annotated[int, Key()], note: str = "") -> int:
            ran.append(n)
            return n * 2

        return double

    return declare


def test_in_place_a_key_counts_too(in_place: Any, ran: list[Any]) -> None:
    double = in_place()

    results = [double.delay(1), double.delay(n="1"), double.apply((1,)), double.s(1).delay(), double.delay(2)]

    assert [result.get() for result in results] == [2, 2, 2, 2, 4]
    assert [result.duplicate for result in results] == [False, True, True, True, False]
    assert ran == [1, 2]


def test_in_place_a_duplicate_is_skipped_or_refused(in_place: Any, ran: list[Any]) -> None:
    skipping = in_place(Once(done="skip"), name="unit.skipping")
    skipping.delay(1)
    skipped = skipping.delay(1)
    refusing = in_place(Once(done="raise"), name="unit.refusing")
    refusing.delay(1)
    refused = refusing.delay(1)

    assert (skipped.state, skipped.duplicate) == ("REVOKED", True)
    with pytest.raises(TaskRevokedError):
        skipped.get()
    assert refused.state == "FAILURE"
    with pytest.raises(DuplicateCall):
        refused.get()
    assert ran == [1, 1]


def test_in_place_a_key_that_is_given_is_the_key(in_place: Any, ran: list[Any]) -> None:
    double = in_place()
    double.using(key="x").delay(1)

    assert double.using(key="x").delay(1).duplicate is True
    assert double.delay(1).duplicate is False
    with pytest.raises(KeyConflict):
        double.using(key="x").delay(2).get()
    assert ran == [1, 1]


def test_in_place_a_retry_keeps_the_key(eager: Any) -> None:
    tries: list[int] = []

    @eager.task(once=Once(), retry=Retry(OSError, attempts=3))
    def by_policy(n: int) -> int:
        tries.append(n)
        if len(tries) < 3:
            raise OSError
        return len(tries)

    @eager.task(bind=True, once=Once(), max_retries=5)
    def by_hand(self: Any, n: int) -> int:
        tries.append(n)
        if len(tries) < 3:
            raise self.retry(countdown=0)
        return len(tries)

    @eager.task(once=Once())
    def snoozing(n: int) -> int:
        tries.append(n)
        if len(tries) < 3:
            raise Snooze(0)
        return len(tries)

    for task in (by_policy, by_hand, snoozing):
        for key in (None, "given"):
            tries.clear()
            assert [task.using(key=key).delay(1).get() for _ in range(2)] == [3, 3]
            claim = claim_of_eager(task, 1, key=key)
            assert (claim.state, claim.turn) == (State.DONE, Turn(0, 2))


def claim_of_eager(task: Any, *args: Any, key: Any) -> Claim:
    claims: Claims = task.eager_claims
    claim = find_claim(claims.store(), claims.identify(args, {}, id=None, key=key).key)
    assert claim is not None
    return claim


def test_in_place_a_failure_leaves_the_key_free(eager: Any) -> None:
    tries: list[int] = []

    @eager.task(once=Once())
    def fails_first(n: int) -> int:
        tries.append(n)
        return 1 // (len(tries) - 1)

    assert [fails_first.delay(1).state for _ in range(3)] == ["FAILURE", "SUCCESS", "SUCCESS"]
    assert tries == [1, 1]


def test_in_place_a_call_that_waits_for_itself_is_refused(eager: Any) -> None:
    @eager.task(once=Once())
    def calls_itself(n: int) -> int:
        return calls_itself.delay(n).get(disable_sync_subtasks=False)  # type: ignore[no-any-return]

    with pytest.raises(DuplicateCall, match="run in place, it never would"):
        calls_itself.delay(1).get()


def test_in_place_a_call_is_remembered_by_its_id(eager: Any, ran: list[Any]) -> None:
    @eager.task(remember=True)
    def double(n: int) -> int:
        ran.append(n)
        return n * 2

    assert [double.apply((1,), task_id=call_id).get() for call_id in ("a", "a", "b")] == [2, 2, 2]
    assert ran == [1, 1]


def test_in_place_all_members_of_a_chord_count(in_place: Any, eager: Any, ran: list[Any]) -> None:
    double = in_place()

    @eager.task
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    assert chord([double.s(1), double.s(1), double.s(2)])(total.s()).get() == 8
    assert ran == [1, 2]


def test_no_argument_is_in_the_store(charge: Any, store: MemoryStore) -> None:
    charge.delay(Order(order_id=1), note="a secret")

    [(name, record)] = store.find("")
    assert "a secret" not in name + record.version + record.data
    assert set(json.loads(record.data)) == {"state", "id", "turn", "task", "call", "since", "keep"}
