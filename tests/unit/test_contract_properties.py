"""
What holds for every value that fits a contract.
"""

from __future__ import annotations

import dataclasses
import json
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from celerykit.contract import Contract


@dataclasses.dataclass
class Stamp:
    at: datetime
    by: UUID


class Line(BaseModel):
    sku: str
    count: int
    price: Decimal
    data: dict[str, float] = {}


class Order(BaseModel):
    order_id: UUID
    due: date | None
    within: timedelta
    lines: list[Line]
    stamps: tuple[Stamp, ...]
    tags: set[str]


def ship(order: Order, raw: bytes, speed: Literal["slow", "fast"] = "slow", *, copies: int = 1) -> Order: ...


CONTRACT = Contract("shop.ship", ship)

text = st.text(st.characters(codec="utf-8"))
lines = st.builds(
    Line,
    sku=text,
    count=st.integers(),
    price=st.decimals(allow_nan=False, allow_infinity=False),
    data=st.dictionaries(text, st.floats(allow_nan=False, allow_infinity=False)),
)
orders = st.builds(
    Order,
    order_id=st.uuids(),
    due=st.none() | st.dates(),
    within=st.timedeltas(timedelta(days=-9999), timedelta(days=9999)),
    lines=st.lists(lines, max_size=3),
    stamps=st.lists(st.builds(Stamp, at=st.datetimes(), by=st.uuids()), max_size=2).map(tuple),
    tags=st.sets(text, max_size=3),
)
speeds = st.sampled_from(["slow", "fast"])


def sent(args: Any, kwargs: Any) -> Any:
    return json.loads(json.dumps([args, kwargs]))


@given(orders, st.binary(), speeds, st.integers())
def test_what_is_loaded_equals_what_was_dumped(order: Order, raw: bytes, speed: str, copies: int) -> None:
    args, kwargs = sent(*CONTRACT.dump((order, raw), {"speed": speed, "copies": copies}))

    assert CONTRACT.load(args, kwargs) == ((order, raw), {"speed": speed, "copies": copies})


@given(orders, st.binary(), speeds)
def test_a_second_passage_changes_nothing(order: Order, raw: bytes, speed: str) -> None:
    """A retry and a signature pass `dump` again with what it made."""
    once = CONTRACT.dump((order, raw, speed), {})

    # Compared as they are loaded: the items of a set may come in another order.
    for twice in (CONTRACT.dump(*once), CONTRACT.dump(*sent(*once)), CONTRACT.dump_partial(*once)):
        assert CONTRACT.load(*twice) == CONTRACT.load(*once)


@given(orders, st.binary())
def test_spellings_have_one_canonical_form(order: Order, raw: bytes) -> None:
    positional = CONTRACT.canonical((order, raw, "slow"), {"copies": 1})

    assert CONTRACT.canonical((), {"copies": 1, "raw": raw, "speed": "slow", "order": order}) == positional
    assert CONTRACT.canonical((order, raw), {}) == positional
    assert CONTRACT.canonical(*CONTRACT.dump((order,), {"raw": raw})) == positional


@given(orders)
def test_a_result_comes_back_equal(order: Order) -> None:
    assert CONTRACT.load_result(json.loads(json.dumps(CONTRACT.dump_result(order)))) == order
