"""
One call has one key, in whatever words it is written, and the key never changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from enum import IntEnum, StrEnum
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, field_validator
from typing_extensions import TypedDict

from celerykit.contract import Contract
from celerykit.errors import InvalidOptions, InvalidPayload
from celerykit.idempotency import Identity, Key, Once
from celerykit.idempotency.claim import Answer, Claim, State, on_send
from celerykit.idempotency.keys import Keys, key_by_id

ID = UUID("6b8b4567-327b-43c6-a453-1c2e3d4f5a6b")


class Order(BaseModel):
    order_id: Annotated[UUID, Key()]
    tags: set[str] = set()
    note: str = ""


class Line(BaseModel, populate_by_name=True):
    number: Annotated[int, Key(), Field(alias="no")]


class Mail(BaseModel):
    to: Annotated[str, Key()]

    @field_validator("to")
    @classmethod
    def in_small_letters(cls, to: str) -> str:
        return to.lower()


def charge(order: Order, *, currency: Literal["EUR", "USD"] = "EUR") -> None: ...


def add(a: int, b: int = 2, *, c: str | None = None) -> int: ...


def keys_of(function: Callable[..., Any], policy: Once | None = None) -> Keys:
    return Keys(Contract(f"shop.{function.__name__}", function), policy or Once())


def key_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    return keys_of(function).identify(args, kwargs).key


def call_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    return keys_of(function).identify(args, kwargs).call


# The format


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def test_keys_stay_as_they_were() -> None:
    """These are in stores: with any other value, what has been done would be done again after an upgrade."""
    named = keys_of(charge, Once(key=lambda order: order.order_id))

    assert key_of(add, 1) == "shop.add:024a4e7fe98397521311256cd4f8e2e3"
    assert key_of(charge, Order(order_id=ID, tags={"b", "a"})) == "shop.charge:41c84fe6db2aff9dbe5f57e08d2840bf"
    assert named.identify((Order(order_id=ID),), {}).key == "shop.charge:fc67767267974eaab73dfd21f10e6062"
    assert key_by_id("shop.add", "an-id").key == "shop.add:4b4cea52eafbe2f2ac51f479c2d17517"


def test_a_key_is_a_digest_of_what_the_documentation_says() -> None:
    written = {
        key_of(add, 1, c="ö"): '{"arguments":{"a":1,"b":2,"c":"\\u00f6"}}',
        key_of(charge, Order(order_id=ID)): f'{{"fields":{{"order.order_id":"{ID}"}}}}',
        keys_of(add).identify((1,), {}, key="x y").key: '{"key":"x y"}',
    }

    assert [key.partition(":")[2] for key in written] == [digest(text) for text in written.values()]


def test_two_tasks_have_no_key_in_common() -> None:
    def other(a: int, b: int = 2, *, c: str | None = None) -> int: ...

    assert key_of(other, 1).partition(":")[0] == "shop.other"
    assert key_of(other, 1) != key_of(add, 1)


# One call, one key


def test_every_spelling_of_a_call_has_one_key() -> None:
    spellings = [
        key_of(add, 1),
        key_of(add, 1, 2),
        key_of(add, 1, b=2, c=None),
        key_of(add, a=1),
        key_of(add, c=None, b="2", a="1"),
        key_of(add, 1.0, True + 1),
    ]

    assert len(set(spellings)) == 1
    assert key_of(add, 2) != spellings[0] != key_of(add, 1, c="")


def test_a_model_and_its_json_in_any_order_have_one_key() -> None:
    def ship(order: Order) -> None: ...

    written = {"tags": ["b", "a"], "order_id": str(ID).upper(), "note": ""}

    assert key_of(ship, written) == key_of(ship, Order(order_id=ID, tags={"a", "b"}))
    assert call_of(ship, written) == call_of(ship, Order(order_id=ID, tags={"a", "b"}))


def test_names_and_aliases_are_one() -> None:
    def ship(line: Line) -> None: ...

    assert key_of(ship, {"no": 1}) == key_of(ship, {"number": "1"}) == key_of(ship, Line(no=1))
    assert key_of(ship, {"no": 1}) == "shop.ship:" + digest('{"fields":{"line.number":1}}')


def test_the_order_in_which_fields_are_declared_does_not_matter() -> None:
    def make(*names: str) -> Any:
        return type("Pair", (BaseModel,), {"__annotations__": {name: Annotated[int, Key()] for name in names}})

    def with_type(pair: Any) -> Keys:
        def f(x: int, pair: Any) -> None: ...

        f.__annotations__["pair"] = pair
        return keys_of(f)

    one, other = with_type(make("a", "b")), with_type(make("b", "a"))

    assert one.identify((1, {"a": 1, "b": 2}), {}).key == other.identify((1, {"a": 1, "b": 2}), {}).key


def test_a_validator_has_its_say_before() -> None:
    def send(mail: Mail) -> None: ...

    assert key_of(send, Mail(to="A@B.c")) == key_of(send, {"to": "a@b.C"})


def test_a_task_without_types_has_keys_of_plain_json() -> None:
    def plain(a, b=2, **more):  # type: ignore[no-untyped-def]
        ...

    assert key_of(plain, {"x": 1, "y": [None]}) == key_of(plain, a={"y": [None], "x": 1}, b=2)
    assert key_of(plain, 1, z=1, y=2) == key_of(plain, 1, y=2, z=1) != key_of(plain, 1, z=2, y=1)
    # Nobody says that a text is a number.
    assert key_of(plain, 1) != key_of(plain, "1")


def test_a_key_is_the_same_in_every_process() -> None:
    script = "from tests.unit.test_idempotency_keys import shown; print(shown())"

    def shown_with(seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert {shown_with("1"), shown_with("2")} == {shown()}


def shown() -> str:
    """Write the identity of a call with sets in it, at all depths."""

    def nested(order: Order, sets: dict[str, list[frozenset[str]]], either: set[int] | set[str]) -> None: ...

    tags = {f"tag {number}" for number in range(20)}
    order = Order(order_id=ID, tags=tags)
    return json.dumps(keys_of(nested).identify((order,), {"sets": {"a": [frozenset(tags)]}, "either": tags}))


# What is marked


@dataclasses.dataclass
class Stamp:
    by: Annotated[str, Key()]
    at: int = 0


class Point(NamedTuple):
    x: Annotated[int, Key()]
    y: int = 0


class Place(TypedDict):
    city: Annotated[str, Key]
    street: str


class Basket(BaseModel):
    orders: list[Order]
    by_name: dict[str, Order] = {}
    stamp: Stamp | None = None


def test_a_mark_on_a_parameter_leaves_the_others_out() -> None:
    def pay(order: Annotated[int, Key()], note: str, *, tenant: Annotated[str, Key()] = "a") -> None: ...

    assert key_of(pay, 1, "x") == key_of(pay, 1, note="y", tenant="a")
    assert key_of(pay, 1, "x") == "shop.pay:" + digest('{"fields":{"order":1,"tenant":"a"}}')
    assert len({key_of(pay, 1, "x"), key_of(pay, 2, "x"), key_of(pay, 1, "x", tenant="b")}) == 3


@pytest.mark.parametrize(
    ("type_", "one", "same", "other"),
    [
        (Order, {"order_id": ID}, {"order_id": ID, "note": "x"}, {"order_id": UUID(int=1)}),
        (Stamp, {"by": "a"}, Stamp("a", 5), Stamp("b")),
        (Point, [1, 2], Point(1, 3), Point(2, 2)),
        (Place, {"city": "a", "street": "b"}, {"city": "a", "street": "c"}, {"city": "b", "street": "b"}),
        (list[Stamp], [{"by": "a"}, {"by": "b"}], [Stamp("a", 1), Stamp("b", 2)], [Stamp("b"), Stamp("a")]),
        (dict[str, Stamp], {"x": {"by": "a"}}, {"x": Stamp("a", 5)}, {"x": Stamp("b")}),
        (Stamp | None, Stamp("a"), {"by": "a"}, Stamp("b")),
        (Basket, {"orders": [{"order_id": ID}]}, Basket(orders=[Order(order_id=ID, note="x")]), Basket(orders=[])),
        (Annotated[Stamp, Key()], Stamp("a", 1), {"by": "a", "at": "1"}, Stamp("a", 2)),
    ],
)
def test_marks_inside_of_types_are_found(type_: Any, one: Any, same: Any, other: Any) -> None:
    def f(n: int, value: Any) -> None: ...

    f.__annotations__["value"] = type_

    assert key_of(f, 1, one) == key_of(f, 2, same)
    assert key_of(f, 1, one) != key_of(f, 1, other)


def test_a_call_without_a_value_for_any_mark_is_refused() -> None:
    def pay(note: str, order: Annotated[int | None, Key()] = None) -> None: ...

    with pytest.raises(InvalidOptions, match=r"shop.pay: nothing that is marked with Key\(\) has a value \(order\)"):
        key_of(pay, "x")


def test_what_is_marked_tells_calls_apart_and_the_rest_must_be_equal() -> None:
    one, same, other = (call_of(charge, Order(order_id=ID, note=note)) for note in ("a", "a", "b"))

    assert one == same != other
    assert one.startswith(Contract("shop.charge", charge).fingerprint + ":")
    assert call_of(charge, Order(order_id=ID), currency="EUR") == call_of(charge, Order(order_id=ID))
    assert call_of(charge, Order(order_id=ID), currency="USD") != call_of(charge, Order(order_id=ID))


def test_a_key_of_all_arguments_has_nothing_left_to_compare() -> None:
    assert keys_of(add).identify((1,), {}).call == ""


def test_a_call_of_another_contract_is_no_conflict() -> None:
    """A field that a deploy adds is in no call of before."""

    class Order(BaseModel):
        order_id: Annotated[UUID, Key()]
        gift: bool = False

    before = keys_of(charge).identify(({"order_id": ID},), {})

    def charge_now(order: Order) -> None: ...

    now = Keys(Contract("shop.charge", charge_now), Once()).identify(({"order_id": ID, "gift": True},), {})

    assert now.key == before.key
    assert answer(before, now) is Answer.JOIN
    assert answer(before, keys_of(charge).identify(({"order_id": ID, "note": "x"},), {})) is Answer.CONFLICT


def answer(before: Identity, now: Identity) -> Answer:
    found = Claim(State.RUNNING, "first", call=before.call)
    return on_send(found, is_lapsed=False, call=now.call, policy=Once(), may_rerun=True)


# What is given


class Colour(StrEnum):
    RED = "red"


class Size(IntEnum):
    SMALL = 1


@pytest.mark.parametrize(
    ("given", "text"),
    [("x", "x"), (7, "7"), (ID, str(ID)), (Colour.RED, "red"), (Size.SMALL, "1"), (0, "0"), ("ключ", "ключ")],
)
def test_a_key_may_be_given(given: Any, text: str) -> None:
    keys = keys_of(charge)
    call = ({"order_id": ID},), {}

    assert keys.identify(*call, key=given) == keys.identify(*call, key=text)
    assert (
        keys.identify(*call, key=given).key == f"shop.charge:{digest(json.dumps({'key': text}, separators=(',', ':')))}"
    )
    # What the key is of may not differ.
    assert keys.identify(*call, key=given).call == keys.identify(*call).call


@pytest.mark.parametrize(
    ("given", "shown"),
    [("", "an empty text"), (True, "bool"), (1.5, "float"), (b"x", "bytes"), ([1], "list"), (object(), "object")],
)
def test_what_can_be_no_key_is_refused_and_not_repeated(given: Any, shown: str) -> None:
    with pytest.raises(
        InvalidOptions, match=f"shop.add: the key must be text, a number or a UUID, got {shown}"
    ) as refused:
        keys_of(add).identify((1,), {}, key=given)

    assert "0x" not in str(refused.value)


def test_a_function_makes_the_key_of_what_it_names_however_the_call_is_written() -> None:
    def pay(order: Order, amount: int = 5, *, tenant: str = "a", **more: Any) -> None: ...

    def made(make: Callable[..., Any]) -> set[str]:
        keys = keys_of(pay, Once(key=make))
        written = {"order_id": str(ID)}
        return {
            keys.identify((written,), {}).key,
            keys.identify((Order(order_id=ID), "5"), {}).key,
            keys.identify((), {"tenant": "a", "amount": 5, "order": written}).key,
        }

    assert made(lambda order: order.order_id) == {keys_of(pay).identify(({"order_id": ID},), {}, key=ID).key}
    for make in (
        lambda tenant, amount: f"{tenant} {amount + 1}",
        lambda **call: f"{call['order'].order_id} {sorted(call)}",
        lambda order, tenant, unknown="?": f"{tenant} {order.order_id} {unknown}",
        lambda: "one for all",
    ):
        assert len(made(make)) == 1


def test_a_key_that_is_given_goes_before_the_function() -> None:
    keys = keys_of(add, Once(key=lambda a: pytest.fail("it was asked")))

    assert keys.identify((1,), {}, key="x") == keys_of(add).identify((1,), {}, key="x")


def test_a_function_that_makes_no_key_is_refused() -> None:
    with pytest.raises(InvalidOptions, match="got NoneType"):
        keys_of(add, Once(key=lambda a: None)).identify((1,), {})


def test_what_does_not_fit_has_no_key() -> None:
    with pytest.raises(InvalidPayload):
        keys_of(charge).identify(({"order_id": "x"},), {})


# For all values

texts = st.text(st.characters(codec="utf-8"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def untyped(a: Any, b: Any = None, **more: Any) -> None: ...


UNTYPED = keys_of(untyped)


def shuffled(value: Any) -> Any:
    """Write an equal value in another order."""
    if isinstance(value, Mapping):
        return {name: shuffled(value[name]) for name in reversed(list(value))}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(json_values, json_values, st.dictionaries(st.sampled_from("xyz"), json_values))
def test_equal_calls_have_one_key(a: Any, b: Any, more: dict[str, Any]) -> None:
    one = UNTYPED.identify((a, b), more)

    assert UNTYPED.identify((), {**shuffled(more), "b": shuffled(b), "a": shuffled(a)}) == one
    assert UNTYPED.identify((json.loads(json.dumps(a)),), {"b": b, **more}) == one


@given(json_values, json_values)
def test_other_calls_have_other_keys(one: Any, other: Any) -> None:
    as_text = [json.dumps(value, sort_keys=True) for value in (one, other)]

    assert (UNTYPED.identify((one,), {}) == UNTYPED.identify((other,), {})) is (as_text[0] == as_text[1])


ORDERS = st.builds(Order, order_id=st.uuids(), tags=st.sets(texts), note=texts)
CHARGES = keys_of(charge)


@given(ORDERS, st.sampled_from(["EUR", "USD"]))
def test_what_was_sent_has_the_key_of_what_was_said(order: Order, currency: str) -> None:
    """A worker reads the key off a message of somebody who wrote none."""
    contract = Contract("shop.charge", charge)
    args, kwargs = json.loads(json.dumps(contract.dump((order,), {"currency": currency})))

    assert CHARGES.identify(args, kwargs) == CHARGES.identify((order,), {"currency": currency})


@given(texts.filter(bool))
def test_any_text_is_a_key_of_one_form(text: str) -> None:
    task, _, hexadecimal = CHARGES.identify(({"order_id": ID},), {}, key=text).key.partition(":")

    assert task == "shop.charge"
    assert len(hexadecimal) == 32
    assert int(hexadecimal, 16) >= 0
