"""
Celery's canvas works with typed tasks, and arguments are checked when a signature is made.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from celery import chain, chord, chunks, group

from celerykit import InvalidPayload, ResultNotStored

WITHIN = 10


@pytest.fixture
def order(idle_shop: Any) -> Any:
    return idle_shop.Order(order_id=uuid4(), amount="1.50")


def test_a_chain_passes_models_on(shop: Any, order: Any) -> None:
    sent = chain(shop.charge.s(order), shop.mail.s("bob")).apply_async()

    assert sent.get(timeout=WITHIN) == "1.50 EUR bob"
    assert isinstance(sent.parent.get(timeout=WITHIN), shop.Receipt)


def test_operators_make_the_same_chain(shop: Any, order: Any) -> None:
    assert (shop.charge.s(order) | shop.mail.s(cc="bob")).delay().get(timeout=WITHIN) == "1.50 EUR bob"


def test_then_is_a_chain_whose_join_is_checked(shop: Any, order: Any) -> None:
    chained = shop.charge.s(order).then(shop.mail, cc="bob")

    assert isinstance(chained, chain)
    assert chained.delay().get(timeout=WITHIN) == "1.50 EUR bob"


def test_a_long_then_keeps_its_order(shop: Any, order: Any) -> None:
    chained = shop.charge.s(order).then(shop.mail).then(shop.untyped, 3)

    assert chained.delay().get(timeout=WITHIN) == ["1.50 EUR None", 3]


def test_a_group_gives_each_result_in_its_type(shop: Any, order: Any) -> None:
    sent = group([shop.charge.s(order), shop.calls_another.s(order)]).apply_async()
    seen: dict[str, Any] = {}

    assert [type(value) for value in sent.get(timeout=WITHIN)] == [shop.Receipt, Decimal]
    sent.get(timeout=WITHIN, callback=lambda task_id, value: seen.__setitem__(task_id, value))
    assert {type(value) for value in seen.values()} == {shop.Receipt, Decimal}


def test_a_chord_s_body_gets_models(shop: Any, order: Any) -> None:
    sent = chord([shop.charge.s(order) for _ in range(3)], shop.turnover.s()).apply_async()

    assert sent.get(timeout=WITHIN) == Decimal("4.50")


def test_a_member_that_returns_nothing_does_not_hang_its_chord(shop: Any, tmp_path: Any) -> None:
    sent = chord([shop.note.s(tmp_path / "notes", str(n)) for n in range(3)], shop.untyped.s()).apply_async()

    assert sent.get(timeout=WITHIN) == [[None, None, None], 2]


def test_a_group_of_tasks_that_store_nothing_says_so(shop: Any, tmp_path: Any) -> None:
    with pytest.raises(ResultNotStored):
        group([shop.note.s(tmp_path / "notes", "1")] * 2).apply_async().get(timeout=WITHIN)


def test_links_get_models_and_errbacks_the_id(shop: Any, order: Any, tmp_path: Any) -> None:
    sent = shop.charge.apply_async((order,), link=shop.mail.s(cc="linked"))
    sent.get(timeout=WITHIN)
    told = shop.on_error.s().set(task_id=str(uuid4()))
    failed = shop.failing_note.apply_async((tmp_path,), link_error=told)

    [mailed] = sent.children
    assert mailed.get(timeout=WITHIN) == "1.50 EUR linked"
    assert shop.on_error.AsyncResult(told.id).get(timeout=WITHIN) == failed.id


def test_map_starmap_and_chunks_read_and_write_models(shop: Any, order: Any) -> None:
    written = {"order_id": str(order.order_id), "total": "1.50", "currency": "EUR"}

    assert shop.charge.map([order, order]).apply_async().get(timeout=WITHIN) == [written, written]
    assert shop.charge.starmap([(order,)]).apply_async().get(timeout=WITHIN) == [written]
    assert shop.charge.chunks([(order,), (order,)], 1).apply_async().get(timeout=WITHIN) == [[written], [written]]
    assert shop.doubled.map([order]).apply_async().get(timeout=WITHIN) == ["3.00"]
    assert chunks(shop.untyped.s(), [(1,), (2,)], 1).apply_async().get(timeout=WITHIN) == [[[1, 2]], [[2, 2]]]


def test_a_replaced_task_gives_its_replacement_s_result(shop: Any, order: Any) -> None:
    assert shop.replaced.delay(order).get(timeout=WITHIN).currency == "USD"


def test_stamps_and_immutable_signatures_work(shop: Any, order: Any) -> None:
    stamped = shop.charge.si(order)
    stamped.stamp(customer="42")

    assert isinstance(stamped.delay().get(timeout=WITHIN), shop.Receipt)


def test_a_wrong_argument_is_found_when_the_signature_is_made(idle_shop: Any) -> None:
    with pytest.raises(InvalidPayload):
        idle_shop.charge.s("nonsense", currency="EUR")
    with pytest.raises(InvalidPayload, match="is missing"):
        idle_shop.charge.si()
    with pytest.raises(InvalidPayload):
        idle_shop.charge.map(["nonsense"])


def test_a_join_that_cannot_be_is_found_when_it_is_built(idle_shop: Any, order: Any) -> None:
    first = idle_shop.charge.s(order)

    with pytest.raises(
        InvalidPayload, match=r"on_error: argument 'task_id' takes string, but .*charge returns Receipt"
    ):
        first.then(idle_shop.on_error)
    with pytest.raises(InvalidPayload, match="needs amount"):
        first.then(idle_shop.charge)
    with pytest.raises(InvalidPayload, match="is not a parameter"):
        first.then(idle_shop.mail, bcc="x")
    with pytest.raises(InvalidPayload, match="takes no argument that a result could be"):
        first.then(idle_shop.described)


def test_a_wrong_result_in_a_chain_fails_the_next_task_and_not_the_one_that_ran(shop: Any) -> None:
    """What a finished task passes on is sent as it is, and refused in its own worker."""
    sent = chain(shop.not_a_receipt.s(), shop.mail.s()).apply_async()

    with pytest.raises(InvalidPayload, match="The task did not run"):
        sent.get(timeout=WITHIN)
    assert sent.parent.get(timeout=WITHIN) == "not a receipt"


def test_a_next_task_that_is_too_far_ahead_does_not_fail_the_one_that_ran(shop: Any, order: Any) -> None:
    sent = chain(shop.charge.s(order), shop.mail.s().set(countdown=400 * 86400, queue="far")).apply_async()

    assert isinstance(sent.parent.get(timeout=WITHIN), shop.Receipt)


def test_a_wrong_call_from_within_a_task_is_refused_there(shop: Any) -> None:
    assert shop.sends_nonsense.delay().get(timeout=WITHIN) == "InvalidPayload"
