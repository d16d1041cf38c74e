"""
A call goes out as models, runs in a stock worker, and comes back as a model.
"""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import time
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import celery
import pytest
import redis

from celerykit import InvalidPayload, ResultMismatch, ResultNotStored
from tests.services import eventually

WITHIN = 10


@pytest.fixture
def order(idle_shop: Any) -> Any:
    return idle_shop.Order(order_id=uuid4(), amount="1.50")


def test_models_go_out_and_a_model_comes_back(shop: Any, order: Any) -> None:
    receipt = shop.charge.delay(order, currency="USD").get(timeout=WITHIN)

    assert receipt == shop.Receipt(order_id=order.order_id, total=Decimal("1.50"), currency="USD")


def test_a_result_is_typed_by_its_id_and_after_pickling(shop: Any, order: Any) -> None:
    sent = shop.charge.delay(order)

    assert isinstance(shop.charge.AsyncResult(sent.id).get(timeout=WITHIN), shop.Receipt)
    assert isinstance(pickle.loads(pickle.dumps(sent)).get(timeout=WITHIN), shop.Receipt)
    assert pickle.loads(pickle.dumps(shop.charge)).name == shop.charge.name


def test_a_task_sent_by_name_is_checked_and_typed_where_it_is_known(shop: Any, order: Any) -> None:
    name = shop.charge.name

    assert isinstance(shop.app.send_task(name, (order,)).get(timeout=WITHIN), shop.Receipt)
    with pytest.raises(InvalidPayload, match="was not sent"):
        shop.app.send_task(name, ("nonsense",))


def test_every_verb_sends_the_same_typed_call(shop: Any, order: Any) -> None:
    sent = [
        shop.charge.apply_async((order,), countdown=0.1),
        shop.charge.apply_async(kwargs={"order": order}),
        shop.charge.using(priority=3).delay(order),
        shop.charge.s(order).delay(),
        shop.charge.using(countdown=0.1).s(order).apply_async(),
    ]

    assert {result.get(timeout=WITHIN).total for result in sent} == {Decimal("1.50")}


def test_an_event_loop_is_not_blocked_by_sending_or_waiting(shop: Any, order: Any) -> None:
    async def call() -> Any:
        sent = await shop.charge.adelay(order)
        again = await shop.charge.using(countdown=0.1).adelay(order)
        return [await sent.aget(timeout=WITHIN), await again.aget(timeout=WITHIN)]

    assert [type(receipt) for receipt in asyncio.run(call())] == [shop.Receipt, shop.Receipt]


def test_aget_ends_when_its_time_is_over(shop: Any, order: Any) -> None:
    async def call() -> None:
        sent = await shop.charge.using(countdown=60).adelay(order)
        await sent.aget(timeout=0.2)

    with pytest.raises(celery.exceptions.TimeoutError):
        asyncio.run(call())


def test_a_retry_keeps_its_arguments_and_its_header(shop: Any, order: Any) -> None:
    assert shop.flaky.delay(order, b"\xff\x00").get(timeout=WITHIN) == (2, order, b"\xff\x00")


def test_calls_made_as_functions_within_a_task_are_functions(shop: Any, order: Any) -> None:
    order.amount = Decimal(1)

    assert shop.calls_another.delay(order).get(timeout=WITHIN) == 2


def test_shared_class_based_and_pydantic_tasks_are_typed(shop: Any, order: Any) -> None:
    assert shop.shared.delay(order).get(timeout=WITHIN) == Decimal("1.50")
    assert shop.audited.delay(order, times=2).get(timeout=WITHIN) == Decimal("3.00")
    assert isinstance(shop.stock_pydantic.delay(order).get(timeout=WITHIN), shop.Receipt)


def test_untyped_tasks_work_as_in_stock_celery(shop: Any) -> None:
    assert shop.untyped.delay({"a": [1, None]}).get(timeout=WITHIN) == [{"a": [1, None]}, 2]


def test_a_user_s_step_runs_around_the_task(shop: Any) -> None:
    assert shop.described.delay().get(timeout=WITHIN)["tenant"] == "described"


def test_a_message_carries_its_contract_and_the_caller_s_headers(shop: Any) -> None:
    headers = shop.described.apply_async(headers={"x-mine": "1"}).get(timeout=WITHIN)["headers"]

    assert headers["x-mine"] == "1"
    ours = headers["celerykit"]
    assert abs(ours.pop("sent_at") - time.time()) < WITHIN
    assert ours == {"v": 1, "contract": shop.described.contract.fingerprint, "queue": "celery"}


def test_a_wrong_message_fails_in_the_worker_with_every_problem_and_does_not_run(shop: Any, broker: Any) -> None:
    stranger = celery.Celery(broker=broker.url, backend=broker.backend_url, set_as_current=False)

    result = stranger.send_task(shop.charge.name, ({"order_id": "x", "amount": -1},))

    with pytest.raises(InvalidPayload, match="The task did not run") as refused:
        result.get(timeout=WITHIN)
    assert [problem["loc"] for problem in refused.value.problems] == [["order", "order_id"], ["order", "amount"]]
    assert "was sent by somebody who did not check it" in str(refused.value)


def test_an_invalid_payload_is_not_retried(shop: Any, broker: Any, node: Any) -> None:
    stranger = celery.Celery(broker=broker.url, backend=broker.backend_url, set_as_current=False)

    result = stranger.send_task(shop.flaky.name, ("nonsense", 1))

    with pytest.raises(InvalidPayload):
        result.get(timeout=WITHIN)
    assert node.count("received", shop.flaky.name, result.id) == 1


def test_a_stock_producer_and_a_stock_reader_interoperate(shop: Any, order: Any, broker: Any) -> None:
    stranger = celery.Celery(broker=broker.url, backend=broker.backend_url, set_as_current=False)
    written = {"order_id": str(order.order_id), "amount": 1.5}

    receipt = stranger.send_task(shop.charge.name, kwargs={"order": written}).get(timeout=WITHIN)

    assert receipt == {"order_id": str(order.order_id), "total": "1.5", "currency": "EUR"}


def test_the_message_is_celery_s_own(idle_shop: Any, order: Any, broker: Any) -> None:
    idle_shop.charge.apply_async((order,), {"currency": "USD"}, queue="nobody")
    message = json.loads(redis.Redis.from_url(broker.client_url).rpop("nobody"))

    args, kwargs, embed = json.loads(base64.b64decode(message["body"]))
    assert args == [{"order_id": str(order.order_id), "amount": "1.50"}]
    assert kwargs == {"currency": "USD"}
    assert set(embed) == {"callbacks", "errbacks", "chain", "chord"}
    assert message["content-type"] == "application/json"


def test_a_result_that_is_not_of_its_type_is_a_failure(shop: Any) -> None:
    with pytest.raises(ResultMismatch, match="returned a value that is not of its return type Receipt"):
        shop.wrong_result.delay().get(timeout=WITHIN)


def test_a_stored_value_that_no_longer_fits_is_given_with_the_error(shop: Any, order: Any) -> None:
    sent = shop.app.send_task(shop.not_a_receipt.name)
    sent.get(timeout=WITHIN)

    with pytest.raises(ResultMismatch, match="has stored") as mismatch:
        shop.charge.AsyncResult(sent.id).get(timeout=WITHIN)

    assert mismatch.value.value == "not a receipt"


def test_a_task_that_returns_nothing_stores_nothing_and_says_so(shop: Any, tmp_path: Path) -> None:
    sent = shop.note.delay(tmp_path / "notes", "done")
    eventually(lambda: (tmp_path / "notes").exists(), within=WITHIN)

    for result in (sent, shop.note.AsyncResult(sent.id)):
        with pytest.raises(ResultNotStored, match="the task returns None"):
            result.get(timeout=WITHIN)
    assert not sent.exists()


def test_what_returns_nothing_can_be_kept(shop: Any, tmp_path: Path) -> None:
    assert shop.note.using(ignore_result=False).delay(tmp_path / "notes", "done").get(timeout=WITHIN) is None


def test_the_failure_of_a_task_that_returns_nothing_is_kept(shop: Any, tmp_path: Path) -> None:
    sent = shop.failing_note.delay(tmp_path)
    eventually(sent.failed, within=WITHIN)

    with pytest.raises(RuntimeError, match="no note"):
        sent.get(timeout=WITHIN)


def test_many_calls_are_checked_first_and_sent_together(shop: Any, order: Any) -> None:
    results = shop.charge.enqueue_many([(order,), {"order": order, "currency": "USD"}, shop.charge.s(order)])

    assert [result.get(timeout=WITHIN).currency for result in results] == ["EUR", "USD", "EUR"]


def test_many_calls_are_the_messages_that_single_calls_are(idle_shop: Any, order: Any, broker: Any) -> None:
    client, queue = redis.Redis.from_url(broker.client_url), "same"
    idle_shop.charge.using(queue=queue).delay(order)
    idle_shop.charge.enqueue_many([idle_shop.charge.using(queue=queue).s(order)] * 2)

    single, *many = (json.loads(client.rpop(queue)) for _ in range(3))
    for message in many:
        assert set(message["properties"]) == set(single["properties"])
        assert message["headers"].keys() == single["headers"].keys()
        assert message["headers"]["argsrepr"] == single["headers"]["argsrepr"]
        assert message["body"] == single["body"]


def test_one_wrong_call_among_many_sends_none(idle_shop: Any, order: Any, broker: Any) -> None:
    calls = [idle_shop.charge.using(queue="lonely").s(order) for _ in range(3)]
    calls.append(calls[0].clone(kwargs={"currency": "GBP"}))

    with pytest.raises(InvalidPayload, match="call 3: "):
        idle_shop.app.enqueue_many(calls)

    assert redis.Redis.from_url(broker.client_url).llen("lonely") == 0


def test_celery_s_own_commands_see_the_tasks(shop: Any) -> None:
    [tasks] = shop.app.control.inspect(timeout=2).registered().values()

    assert shop.charge.name in tasks


def test_a_task_that_returns_nothing_and_reports_progress_is_not_waited_for(shop: Any) -> None:
    sent = shop.reports_progress.delay()
    eventually(lambda: sent.state == "PROGRESS", within=WITHIN)

    with pytest.raises(ResultNotStored):
        sent.get(timeout=WITHIN)


def test_a_call_made_on_a_loop_within_a_task_is_its_child(shop: Any, order: Any) -> None:
    sent = shop.sends_from_a_loop.delay(order)

    child = sent.get(timeout=WITHIN)

    assert [result.id for result in sent.children] == [child]


def test_a_task_s_own_timeout_is_not_taken_for_ours(shop: Any) -> None:
    sent = shop.times_out.using(ignore_result=False).delay()

    with pytest.raises(TimeoutError, match="mine"):
        asyncio.run(sent.aget(timeout=WITHIN))


def test_celery_s_positional_options_are_taken(shop: Any, order: Any) -> None:
    assert shop.charge.apply_async((order,), {}, "my-own-id").id == "my-own-id"
    assert shop.app.send_task(shop.charge.name, (order,), {}, 0.1).get(timeout=WITHIN)
    with pytest.raises(InvalidPayload, match="args must be a list or a tuple"):
        shop.charge.apply_async(order)
