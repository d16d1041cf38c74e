"""
Each key once, on real workers: whoever sends it, by whatever way it comes.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import celery
import pytest
import redis
from billiard.exceptions import WorkerLostError
from celery import chain, chord, group
from celery.exceptions import TaskRevokedError

from celerykit import CeleryKit, DuplicateCall, EnqueueError, KeyConflict, Once, ResultNotStored
from celerykit.dev.servers import Server
from celerykit.errors import Undeliverable
from celerykit.idempotency import State, find_claim
from tests import services
from tests.integration.conftest import ROOT
from tests.services import eventually

WITHIN = 10

SHOP = "tests.integration.once_shop"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with services.valkey() as server:
        yield server


@pytest.fixture(scope="module")
def worker(server: Server) -> Iterator[services.Worker]:
    env = {"CELERY_RESULT_BACKEND": server.backend_url, "LEDGER": server.client_url, "CELERYKIT_LEASE": "2"}
    with services.worker(SHOP, url=server.url, env=env, concurrency=3, cwd=ROOT) as node:
        yield node


@pytest.fixture(scope="module")
def idle_shop(server: Server) -> Any:
    from tests.integration import once_shop

    once_shop.app.conf.update(broker_url=server.url, result_backend=server.backend_url)
    return once_shop


@pytest.fixture
def shop(idle_shop: Any, worker: services.Worker) -> Any:
    return idle_shop


@pytest.fixture
def stranger(server: Server) -> Any:
    """Stock Celery, which knows nothing of keys."""
    return celery.Celery(broker=server.url, backend=server.backend_url, set_as_current=False)


@pytest.fixture
def notes(server: Server) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.client_url, decode_responses=True) as notes:
        yield notes


@pytest.fixture
def name() -> str:
    """What this test's calls are about, and nobody else's."""
    return uuid.uuid4().hex[:8]


@pytest.fixture
def runs(notes: redis.Redis) -> Callable[[str], int]:
    return lambda name: int(notes.get(f"ran {name}") or 0)  # type: ignore[arg-type]


@pytest.fixture
def held(notes: redis.Redis, runs: Callable[[str], int]) -> Any:
    """Let what is run under a name not end before the block does."""

    @contextmanager
    def held(name: str) -> Iterator[Callable[[], None]]:
        notes.set(f"hold {name}", 1)
        try:
            yield lambda: eventually(lambda: runs(name) >= 1, within=WITHIN)
        finally:
            notes.delete(f"hold {name}")

    return held


def state_of(task: Any, *args: Any, key: Any = None) -> State | None:
    claim = find_claim(task.app.store, task.claims.identify(args, {}, id=None, key=key).key)
    return claim and claim.state


# By every way


async def send_async(task: Any, name: str) -> Any:
    return await task.adelay(name)


VERBS: list[Callable[[Any, str], Any]] = [
    lambda task, name: task.delay(name, 1),
    lambda task, name: task.apply_async(kwargs={"name": name}),
    lambda task, name: task.app.send_task(task.name, (name,)),
    lambda task, name: task.enqueue_many([(name,)])[0],
    lambda task, name: asyncio.run(send_async(task, name)),
    lambda task, name: task.s(name).delay(),
]


def test_whoever_calls_while_the_first_is_queued_or_runs_gets_its_result(
    shop: Any, held: Any, runs: Any, name: str
) -> None:
    with held(name) as running:
        results = [send(shop.charge, name) for send in VERBS]
        running()
        results += [send(shop.charge, name) for send in VERBS]

    assert {result.id for result in results} == {results[0].id}
    assert [result.duplicate for result in results] == [False] + [True] * 11
    assert {result.get(timeout=WITHIN).run for result in results} == {1}
    assert isinstance(results[-1].get(timeout=WITHIN), shop.Receipt)
    assert runs(name) == 1


def test_whoever_calls_when_it_is_done_gets_the_stored_result_without_waiting(shop: Any, runs: Any, name: str) -> None:
    first = shop.charge.delay(name)
    first.get(timeout=WITHIN)
    eventually(lambda: state_of(shop.charge, name) is State.DONE, within=WITHIN)

    for send in VERBS:
        again = send(shop.charge, name)
        assert (again.id, again.duplicate) == (first.id, True)
        assert again.get(timeout=0) == shop.Receipt(name=name, amount=1, run=1)
    assert runs(name) == 1


def test_a_call_whose_sender_knows_nothing_of_keys_waits_and_has_the_same_result(
    shop: Any, held: Any, stranger: Any, runs: Any, name: str
) -> None:
    with held(name) as running:
        first = shop.charge.delay(name)
        running()
        other = stranger.send_task("charge", (name,))
        eventually(lambda: other.state == "RETRY", within=WITHIN)
    done = first.get(timeout=WITHIN)

    assert other.get(timeout=WITHIN) == done.model_dump()
    assert stranger.send_task("charge", kwargs={"name": name, "amount": "1"}).get(timeout=WITHIN) == done.model_dump()
    assert runs(name) == 1


def test_a_stranger_s_call_may_be_the_first(shop: Any, held: Any, stranger: Any, runs: Any, name: str) -> None:
    with held(name) as running:
        first = stranger.send_task("charge", (name,))
        running()
        second = shop.charge.delay(name)

    assert (second.id, second.duplicate) == (first.id, True)
    assert second.get(timeout=WITHIN).run == 1


def test_a_task_may_refuse_duplicates(shop: Any, held: Any, stranger: Any, runs: Any, name: str) -> None:
    with held(name) as running:
        first = shop.refuse.delay(name)
        running()
        with pytest.raises(DuplicateCall, match="which is running"):
            shop.refuse.delay(name)
        with pytest.raises(DuplicateCall, match="which is running") as refused:
            shop.refuse.apply_async((name,), task_id=f"{name} by id").get(timeout=WITHIN)
    assert refused.value.first == first.id
    first.get(timeout=WITHIN)

    with pytest.raises(DuplicateCall, match="which is done"):
        shop.refuse.delay(name)
    with pytest.raises(Exception, match="which is done"):
        stranger.send_task("refuse", (name,)).get(timeout=WITHIN)
    assert runs(name) == 1


def test_a_task_may_skip_duplicates(shop: Any, held: Any, stranger: Any, runs: Any, name: str) -> None:
    with held(name) as running:
        first = shop.skip.delay(name)
        running()
        skipped = [shop.skip.delay(name), stranger.send_task("skip", (name,))]
        with pytest.raises(TaskRevokedError):
            skipped[1].get(timeout=WITHIN)
    first.get(timeout=WITHIN)
    skipped += [shop.skip.delay(name), stranger.send_task("skip", (name,))]

    for result in skipped:
        with pytest.raises(TaskRevokedError, match=f"is that of call {first.id}"):
            result.get(timeout=WITHIN)
    assert [skipped[0].duplicate, skipped[2].duplicate] == [True, True]
    assert runs(name) == 1


def test_a_task_may_run_again_when_it_is_done(shop: Any, runs: Any, name: str) -> None:
    for run in (1, 2):
        assert shop.rerun.delay(name).get(timeout=WITHIN).run == run
        eventually(lambda: state_of(shop.rerun, name) is State.DONE, within=WITHIN)
    assert shop.rerun.apply_async((name,), task_id=name).get(timeout=WITHIN).run == 3


def test_a_key_is_free_again_when_it_was_kept_long_enough(shop: Any, runs: Any, name: str) -> None:
    assert shop.briefly.delay(name).get(timeout=WITHIN).run == 1
    eventually(lambda: state_of(shop.briefly, name) is None, within=WITHIN)

    assert shop.briefly.delay(name).get(timeout=WITHIN).run == 2


def test_a_key_with_other_arguments_is_a_conflict_wherever_it_is_seen(
    shop: Any, stranger: Any, runs: Any, name: str
) -> None:
    shop.charge.delay(name).get(timeout=WITHIN)

    with pytest.raises(KeyConflict, match="The message was not sent"):
        shop.charge.delay(name, amount=2)
    with pytest.raises(KeyConflict, match="It did not run"):
        shop.charge.apply_async((name, 2), task_id=name).get(timeout=WITHIN)
    with pytest.raises(Exception, match="and other arguments"):
        stranger.send_task("charge", (name, 2)).get(timeout=WITHIN)
    assert runs(name) == 1


def test_a_key_may_be_given(shop: Any, runs: Any, name: str) -> None:
    first = shop.charge.using(key=f"key {name}").delay(name)
    first.get(timeout=WITHIN)

    assert shop.charge.using(key=f"key {name}").delay(name).id == first.id
    assert shop.charge.delay(name).get(timeout=WITHIN).run == 2


# Canvas


def test_duplicate_members_complete_their_chord(shop: Any, runs: Any, name: str) -> None:
    header = [task.s(name + suffix, 3) for task in (shop.charge, shop.skip) for suffix in ("a", "a", "b")]

    assert chord(header)(shop.total.s()).get(timeout=WITHIN) == 18
    assert chord(header)(shop.total.s()).get(timeout=WITHIN) == 18

    # One of each, by two tasks.
    assert (runs(name + "a"), runs(name + "b")) == (2, 2)


def test_a_second_chain_gets_as_far_and_does_nothing(shop: Any, runs: Any, name: str) -> None:
    chains = [chain(shop.charge.s(name), shop.ship.s()).delay() for _ in range(2)]

    assert [result.get(timeout=WITHIN) for result in chains] == [f"{name} 1"] * 2
    assert (runs(name), runs(f"{name} shipped")) == (1, 1)


def test_members_of_a_group_are_each_answered(shop: Any, runs: Any, name: str) -> None:
    receipts = group(shop.charge.si(name) for _ in range(4)).delay().get(timeout=WITHIN)

    assert [receipt.run for receipt in receipts] == [1, 1, 1, 1]
    assert runs(name) == 1


# Messages that come twice


@pytest.fixture
def twice(idle_shop: Any, notes: redis.Redis, name: str) -> Callable[..., None]:
    """Give a message to the worker two times, the second one after something is so."""

    def send(publish: Callable[[str], Any], then: Callable[[], bool]) -> None:
        publish(name)  # a queue that nobody reads
        message = notes.lpop(name)
        assert isinstance(message, str)
        sent = json.loads(message)
        sent["properties"]["delivery_info"] = {"exchange": "", "routing_key": "celery"}
        for _ in range(2):
            sent["properties"]["delivery_tag"] = uuid.uuid4().hex
            notes.lpush("celery", json.dumps(sent))
            eventually(then, within=WITHIN)

    return send


def test_what_is_done_does_not_run_when_it_is_delivered_again(
    shop: Any, twice: Any, worker: services.Worker, runs: Any, name: str
) -> None:
    twice(lambda queue: shop.charge.apply_async((name,), queue=queue, task_id=f"{name}-1"), lambda: runs(name) == 1)
    twice(
        lambda queue: shop.remembered.apply_async((name + "m",), queue=queue, task_id=f"{name}-2"),
        lambda: runs(name + "m") == 1,
    )

    for call_id in (f"{name}-1", f"{name}-2"):
        eventually(lambda call_id=call_id: worker.count("succeeded", call_id) == 2, within=WITHIN)  # type: ignore[misc]
    assert (runs(name), runs(name + "m")) == (1, 1)
    assert shop.charge.AsyncResult(f"{name}-1").get(timeout=WITHIN).run == 1
    assert shop.remembered.AsyncResult(f"{name}-2").get(timeout=WITHIN) == 1


@pytest.mark.parametrize("links", [1, 2])
def test_what_is_linked_to_a_call_is_sent_with_one_id_however_often(
    shop: Any, twice: Any, worker: services.Worker, runs: Any, name: str, links: int
) -> None:
    linked = [shop.remembered.si(f"{name} linked {number}") for number in range(links)]
    twice(
        lambda queue: shop.charge.apply_async((name,), queue=queue, task_id=name, link=linked),
        lambda: runs(name) == 1,
    )

    eventually(lambda: worker.count("succeeded", "charge", name) == 2, within=WITHIN)
    for number in range(links):
        eventually(lambda number=number: runs(f"{name} linked {number}") == 1, within=WITHIN)  # type: ignore[misc]
    shop.remembered.delay(f"{name} after").get(timeout=WITHIN)
    assert [runs(f"{name} linked {number}") for number in range(links)] == [1] * links


# While it waits


@pytest.mark.parametrize(("task", "tries"), [("flaky", 3), ("snoozing", 2), ("by_hand", 2)])
def test_a_call_that_is_put_off_keeps_its_key_and_its_callers(
    shop: Any, stranger: Any, runs: Any, name: str, task: str, tries: int
) -> None:
    called = getattr(shop, task)
    results = [called.delay(name) for _ in range(3)]
    other = stranger.send_task(called.name, (name,))

    assert [result.get(timeout=WITHIN) for result in results] == [tries] * 3
    assert other.get(timeout=WITHIN) == tries
    assert called.delay(name).get(timeout=WITHIN) == tries
    assert runs(name) == tries


def test_a_call_that_has_failed_leaves_its_key_free_and_who_waited_fails_too(
    shop: Any, held: Any, stranger: Any, runs: Any, name: str
) -> None:
    with held(name) as running:
        first = shop.flaky.delay(name, fail=3)
        running()
        joined, other = shop.flaky.delay(name, fail=3), stranger.send_task(shop.flaky.name, (name, 3))
        eventually(lambda: other.state == "RETRY", within=WITHIN)

    for result in (first, joined):
        with pytest.raises(OSError, match=name):
            result.get(timeout=WITHIN)
    with pytest.raises(Exception, match=f"call {first.id}, which has the same key .* has failed"):
        other.get(timeout=WITHIN)
    assert shop.flaky.delay(name, fail=3).get(timeout=WITHIN) == 4


def test_what_a_call_was_replaced_with_answers_for_it(
    shop: Any, held: Any, stranger: Any, runs: Any, name: str
) -> None:
    with held(name) as running:
        first = shop.replaced.delay(name)
        running()
        joined, other = shop.replaced.delay(name), stranger.send_task(shop.replaced.name, (name,))

    assert joined.id == first.id
    assert {result.get(timeout=WITHIN).amount for result in (first, joined)} == {7}
    assert other.get(timeout=WITHIN)["amount"] == 7
    again = shop.replaced.delay(name)
    assert (again.duplicate, again.get(timeout=WITHIN).run) == (True, 1)
    assert (runs(f"{name} before"), runs(name)) == (1, 1)


@pytest.mark.parametrize("task", ["pages", "keyed_pages"])
def test_a_call_goes_on_with_itself_under_its_key(shop: Any, runs: Any, name: str, task: str) -> None:
    pages = getattr(shop, task)

    first = pages.delay(name, 1)

    assert first.get(timeout=WITHIN) == 3
    assert [runs(f"{name} page {page}") for page in (1, 2, 3)] == [1, 1, 1]
    if task == "keyed_pages":
        again = pages.delay(name, 1)
        assert (again.duplicate, again.id, again.get(timeout=WITHIN)) == (True, first.id, 3)


def test_a_function_that_has_no_key_for_a_message_stops_no_worker(shop: Any, stranger: Any, name: str) -> None:
    sent = [stranger.send_task(shop.picky.name, ({"second": name},)) for _ in range(8)]

    for result in sent:
        with pytest.raises(KeyError):
            result.get(timeout=WITHIN)
    services.eventually(lambda: shop.app.dead_letters.count(task=shop.picky) == 8, within=WITHIN)
    assert shop.picky.delay({"first": name}).get(timeout=WITHIN) == name


def test_what_kills_its_process_before_its_key_is_claimed_comes_to_an_end(shop: Any, runs: Any, name: str) -> None:
    killed = shop.poison.delay(name)

    with pytest.raises((Undeliverable, WorkerLostError)):
        killed.get(timeout=WITHIN)

    assert runs(f"{name} killed") == 3
    [letter] = shop.app.dead_letters.find(task=shop.poison)
    assert letter.note.reason == "process_died"


def test_a_call_that_is_not_due_yet_holds_its_key(shop: Any, runs: Any, name: str) -> None:
    first = shop.charge.using(countdown=0.5).delay(name)
    second = shop.charge.delay(name)

    assert second.id == first.id
    assert second.get(timeout=WITHIN).run == 1


def test_a_call_that_expires_leaves_its_key_free_and_who_joined_it_sees_that(shop: Any, runs: Any, name: str) -> None:
    expired = [shop.charge.using(countdown=0.5, expires=0.2).delay(name) for _ in range(2)]

    for result in expired:
        with pytest.raises(TaskRevokedError):
            result.get(timeout=WITHIN)
    assert [result.duplicate for result in expired] == [False, True]
    eventually(lambda: state_of(shop.charge, name) is State.FAILED, within=WITHIN)
    assert shop.charge.delay(name).get(timeout=WITHIN).run == 1


def test_a_call_that_is_revoked_leaves_its_key_free(shop: Any, name: str) -> None:
    revoked = [shop.charge.using(countdown=0.5).delay(name) for _ in range(2)]
    shop.app.control.revoke(revoked[0].id)

    for result in revoked:
        with pytest.raises(TaskRevokedError):
            result.get(timeout=WITHIN)
    # Celery says so at once, and discards the message when it is due.
    eventually(lambda: state_of(shop.charge, name) is None, within=WITHIN)
    assert shop.charge.delay(name).get(timeout=WITHIN).run == 1


# Kinds of tasks


def test_async_and_untyped_tasks_have_keys_too(shop: Any, held: Any, runs: Any, name: str) -> None:
    for task in (shop.fetch, shop.untyped):
        own = f"{name} {task.name}"
        with held(own) as running:
            results = [task.delay(own)]
            running()
            results.append(task.delay(name=own))
        values = [result.get(timeout=WITHIN) for result in results]
        assert values[0] == values[1] == task.delay(own).get(timeout=WITHIN)
        assert runs(own) == 1


def test_a_task_that_returns_nothing_is_done_all_the_same(shop: Any, held: Any, runs: Any, name: str) -> None:
    with held(name) as running:
        first = shop.note.delay(name)
        running()
        second = shop.note.delay(name)
        with pytest.raises(ResultNotStored):
            second.get(timeout=WITHIN)
    eventually(lambda: state_of(shop.note, name) is State.DONE, within=WITHIN)

    assert first.id == second.id
    assert shop.note.delay(name).get(timeout=0) is None
    assert runs(name) == 1


def test_a_result_that_no_backend_keeps_is_in_the_claim(shop: Any, runs: Any, name: str) -> None:
    first = shop.unstored.delay(name)
    eventually(lambda: state_of(shop.unstored, name) is State.DONE, within=WITHIN)

    assert shop.unstored.delay(name).get(timeout=0) == shop.Receipt(name=name, amount=1, run=1)
    with pytest.raises(ResultNotStored):
        first.get(timeout=0)


# What was not sent


def test_a_claim_is_taken_back_when_the_broker_is_away(
    shop: Any, server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELERYKIT_STORE_URL", server.url)
    with services.refused() as port:
        cut_off = CeleryKit("cut off", broker=f"redis://127.0.0.1:{port}", set_as_current=False)
        charge = cut_off.task(name="charge", once=Once(), shared=False)(shop.receipt)
        with pytest.raises(EnqueueError, match="was not sent"):
            charge.delay(name)

    assert state_of(shop.charge, name) is None
    assert shop.charge.delay(name).get(timeout=WITHIN).run == 1


def test_in_place_everything_is_as_it_was(
    idle_shop: Any, server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEDGER", server.client_url)
    monkeypatch.setitem(idle_shop.app.conf, "task_always_eager", True)

    assert [idle_shop.flaky.delay(name).get() for _ in range(2)] == [3, 3]
    assert [result.duplicate for result in (idle_shop.charge.delay(name), idle_shop.charge.delay(name))] == [
        False,
        True,
    ]
