"""
A contract checks what goes into a message, writes it as JSON, and reads it back into the same types.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import typing
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr, computed_field
from pydantic_core import core_schema
from typing_extensions import TypedDict

from celerykit.annotations import UnresolvedAnnotation
from celerykit.contract import Contract
from celerykit.errors import InvalidContract, InvalidPayload, ResultMismatch

T = TypeVar("T")


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    at: datetime


class Options(TypedDict, total=False):
    limit: int


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    tricks: list[str] = []


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]


class Page(BaseModel, Generic[T]):
    items: list[T]


class Order(BaseModel):
    order_id: UUID
    amount: Decimal

    @computed_field
    def label(self) -> str:
        return f"order {self.order_id}"


class Aliased(BaseModel):
    model_config = ConfigDict(extra="forbid")
    order_id: int = Field(alias="orderId")


def contract_of(function: Any, **how: Any) -> Contract:
    return Contract("shop.task", function, **how)


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def round_trip(contract: Contract, *args: Any, **kwargs: Any) -> Any:
    """Send a call as a worker gets it: written, sent as JSON, read."""
    written = contract.dump(args, kwargs)
    sent_args, sent_kwargs = through_json(written)
    return contract.load(sent_args, sent_kwargs)


def typed(annotation: Any) -> Contract:
    def task(value):  # type: ignore[no-untyped-def]
        ...

    task.__annotations__ = {"value": annotation, "return": annotation}
    return contract_of(task)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, 7),
        (float, 1.5),
        (bool, True),
        (str, "naïve"),
        (bytes, b"\xff\x00"),
        (datetime, datetime(2026, 1, 2, 3, 4, 5, 6)),
        (date, date(2026, 1, 2)),
        (timedelta, timedelta(days=1, microseconds=5)),
        (UUID, UUID(int=7)),
        (Decimal, Decimal("1.10")),
        (Path, Path("/srv/x")),
        (Colour, Colour.RED),
        (Literal["a", 1], "a"),
        (Point, Point(1, datetime(2026, 1, 2))),
        (Options, {"limit": 3}),
        (Pet, Dog(tricks=["sit"])),
        (Page[Order], Page[Order](items=[Order(order_id=UUID(int=7), amount=Decimal(1))])),
        (Aliased, Aliased(orderId=3)),
        (set[UUID], {UUID(int=1), UUID(int=2)}),
        (frozenset[int], frozenset({1, 2})),
        (tuple[int, datetime], (1, datetime(2026, 1, 2))),
        (list[bytes], [b"a", b"\xff"]),
        (dict[int, Decimal], {1: Decimal("0.1")}),
        (Order | None, None),
        (int | str, "1"),
        (Annotated[int, Field(gt=3)], 4),
    ],
)
def test_a_value_arrives_as_it_was_sent(annotation: Any, value: Any) -> None:
    contract = typed(annotation)

    assert round_trip(contract, value) == ((value,), {})
    assert contract.load_result(through_json(contract.dump_result(value))) == value


def test_arguments_keep_the_shape_in_which_they_came() -> None:
    def task(a: int, b: UUID, *, c: Decimal = Decimal(1)) -> None: ...

    contract, key = contract_of(task), uuid4()

    assert contract.dump((1, key), {}) == ((1, str(key)), {})
    assert contract.dump((1,), {"b": key}) == ((1,), {"b": str(key)})
    assert contract.dump((), {"c": Decimal(2), "b": key, "a": 1}) == ((), {"c": "2", "b": str(key), "a": 1})


def test_every_kind_of_parameter_is_typed() -> None:
    def task(a: UUID, /, b: UUID, *rest: UUID, c: UUID, **named: UUID) -> None: ...

    keys = [uuid4() for _ in range(6)]
    args, kwargs = tuple(keys[:4]), {"c": keys[4], "d": keys[5]}

    assert round_trip(contract_of(task), *args, **kwargs) == (args, kwargs)


def test_unpacked_keywords_are_typed() -> None:
    def task(**options: typing.Unpack[Options]) -> None: ...

    assert round_trip(contract_of(task), limit=3) == ((), {"limit": 3})
    with pytest.raises(InvalidPayload, match=r"options.limit"):
        contract_of(task).dump((), {"limit": "many"})


def test_a_parameter_without_a_type_passes_as_it_is() -> None:
    def task(a, b: Any, c: object, d: int) -> None:  # type: ignore[no-untyped-def]
        ...

    thing = object()

    assert contract_of(task).dump((thing, thing, thing, "4"), {}) == ((thing, thing, thing, 4), {})


def test_a_bound_task_does_not_count_itself() -> None:
    def task(self: Any, a: int) -> None: ...

    assert contract_of(task, drop_first=True).dump((1,), {}) == ((1,), {})


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((), {}, "argument 'order': is missing"),
        (("x",), {}, "argument 'order': Input should be a valid dictionary or instance of Order (got str)"),
        (({"order_id": "x", "amount": 1},), {}, "argument 'order.order_id': Input should be a valid UUID"),
        ((None,), {"currenci": 1}, "argument 'currenci': is not a parameter (did you mean 'currency'?)"),
        ((1, 2, 3), {}, "takes 2 positional arguments, got 3"),
        ((1,), {"order": 2, "currency": "EUR"}, "argument 'order': is given twice"),
    ],
)
def test_a_wrong_call_is_told_what_which_and_what_to_do(args: Any, kwargs: Any, says: str) -> None:
    def charge(order: Order, currency: str = "EUR") -> None: ...

    with pytest.raises(InvalidPayload) as refused:
        Contract("shop.charge", charge).dump(args, kwargs)

    assert str(refused.value).startswith("shop.charge: ")
    assert says in str(refused.value)
    assert str(refused.value).endswith("The message was not sent.")
    assert refused.value.problems


def test_a_refusal_never_repeats_the_value() -> None:
    def task(pin: int) -> None: ...

    with pytest.raises(InvalidPayload) as refused:
        contract_of(task).dump(("hunter2",), {})

    assert "hunter2" not in repr(refused.value)
    assert "hunter2" not in json.dumps(refused.value.problems)


def test_a_refusal_is_a_type_error_and_survives_a_result_backend() -> None:
    def task(a: int) -> None: ...

    with pytest.raises(TypeError) as refused:
        contract_of(task).dump(("x",), {})
    again = InvalidPayload(*through_json(refused.value.args))

    assert str(again) == str(refused.value)
    assert (again.task, again.problems) == ("shop.task", refused.value.problems)  # type: ignore[attr-defined]


def test_a_strict_task_does_not_convert_and_still_reads_what_it_wrote() -> None:
    def task(when: datetime, count: int, raw: bytes) -> None: ...

    contract = contract_of(task, strict=True)
    args = (datetime(2026, 1, 2), 3, b"\xff")

    assert round_trip(contract, *args) == (args, {})
    assert contract.dump(*contract.dump(args, {})) == contract.dump(args, {})
    with pytest.raises(InvalidPayload, match="count"):
        contract.dump((datetime(2026, 1, 2), "3", b""), {})


def test_a_signature_s_arguments_may_stand_behind_a_result() -> None:
    def ship(order: Order, when: datetime, express: bool = False) -> None: ...

    contract = contract_of(ship)

    assert contract.dump_partial((datetime(2026, 1, 2),), {}) == (("2026-01-02T00:00:00",), {})
    assert contract.dump_partial((), {"express": True}) == ((), {"express": True})
    assert contract.dump_partial((), {}) == ((), {})
    with pytest.raises(InvalidPayload, match="is not a parameter"):
        contract.dump_partial((), {"expres": True})
    with pytest.raises(InvalidPayload, match="argument 'order'"):
        contract.dump_partial((object(),), {})


def test_all_spellings_of_a_call_are_one_call() -> None:
    def charge(order: Order, currency: str = "EUR", *, urgent: bool = False) -> None: ...

    contract, order = contract_of(charge), Order(order_id=uuid4(), amount=Decimal("1.5"))
    spellings: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((order,), {}),
        ((), {"order": order}),
        ((order, "EUR"), {"urgent": False}),
        ((order.model_dump(mode="json", exclude={"label"}),), {}),
    ]

    canonical = [contract.canonical(*spelling) for spelling in spellings]

    assert all(one == canonical[0] for one in canonical)
    assert list(canonical[0]) == ["order", "currency", "urgent"]


def test_a_default_that_is_not_of_its_type_is_left_alone() -> None:
    def task(order: Order = None) -> None:  # type: ignore[assignment]
        ...

    contract = contract_of(task)

    assert round_trip(contract) == ((), {})
    assert contract.canonical((), {}) == {"order": None}


def test_a_result_that_does_not_fit_is_told_with_the_value() -> None:
    contract = typed(Order)

    with pytest.raises(ResultMismatch, match=r"shop.task: returned a value that is not of its return type Order"):
        contract.dump_result("nothing")
    with pytest.raises(ResultMismatch, match="has stored") as refused:
        contract.load_result({"old": "shape"})

    assert refused.value.value == {"old": "shape"}


class Blob(BaseModel):
    data: bytes
    score: float = 0


class HexBlob(BaseModel):
    model_config = ConfigDict(ser_json_bytes="hex", val_json_bytes="hex")
    data: bytes


@dataclasses.dataclass
class Holder:
    blob: Blob
    raw: bytes


@pytest.mark.parametrize("value", [Blob(data=b"\xff"), HexBlob(data=b"\xff"), Holder(Blob(data=b"\xfe"), b"\xfd")])
def test_bytes_travel_as_base64_wherever_they_are_unless_a_model_says_otherwise(value: Any) -> None:
    """This rests on `_use_prebuilt=False`, which pydantic-core 2.50 has and marks as its own."""
    assert round_trip(typed(type(value)), value) == ((value,), {})


class Celsius:
    """Read from a number in JSON, and from nothing but itself in Python."""

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Celsius) and other.degrees == self.degrees

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return core_schema.json_or_python_schema(
            json_schema=core_schema.no_info_after_validator_function(cls, core_schema.float_schema()),
            python_schema=core_schema.is_instance_schema(cls),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value.degrees),
        )


def test_a_type_that_python_reads_otherwise_passes_twice() -> None:
    contract = typed(Celsius)
    once = contract.dump((Celsius(3.5),), {})

    assert contract.dump(*once) == once == ((3.5,), {})
    assert round_trip(contract, Celsius(3.5)) == ((Celsius(3.5),), {})


def test_nan_within_a_model_is_not_turned_into_nothing() -> None:
    [written], _ = typed(Blob).dump((Blob(data=b"", score=float("nan")),), {})

    assert written["score"] != written["score"]


def test_what_a_union_would_change_is_refused() -> None:
    assert round_trip(typed(date | datetime), date(2026, 1, 1)) == ((date(2026, 1, 1),), {})
    assert typed(datetime | date).dump(("2026-01-01",), {}) == (("2026-01-01",), {})
    with pytest.raises(InvalidPayload, match="argument 'value': would arrive as another type of its union"):
        typed(str | bytes).dump((b"x",), {})


def test_a_field_that_is_never_written_is_refused_when_declared() -> None:
    class Hidden(BaseModel):
        a: int = Field(default=1, exclude=True)

    with pytest.raises(InvalidContract, match="exclude=True"):
        typed(Hidden)


def test_a_tag_that_is_unknown_is_not_quoted() -> None:
    with pytest.raises(InvalidPayload, match="unknown tag") as refused:
        typed(Pet).dump(({"kind": "4111-1111"},), {})

    assert "4111" not in repr(refused.value)


def test_what_cannot_be_a_key_is_refused() -> None:
    with pytest.raises(InvalidPayload, match="cannot be written as JSON"):
        typed(dict[frozenset[int], int]).dump(({frozenset({1}): 1},), {})


def test_a_model_that_was_spoilt_after_it_was_made_is_refused() -> None:
    order = Order(order_id=uuid4(), amount=Decimal(1))
    order.amount = object()  # type: ignore[assignment]

    with pytest.raises(InvalidPayload):
        typed(Order).dump((order,), {})


class Login(BaseModel):
    password: SecretStr


@pytest.mark.parametrize("annotation", [SecretStr, Login, list[Login], Login | None])
def test_a_secret_is_refused_rather_than_sent_as_asterisks(annotation: Any) -> None:
    with pytest.raises(InvalidPayload, match="SecretStr"):
        typed(annotation).check_secrets()


def test_a_contract_without_secrets_may_be_sent() -> None:
    typed(Order).check_secrets()

    assert typed(Order)._fields.secrets == []


class Unknown: ...


@pytest.mark.parametrize(
    ("annotation", "says"),
    [
        (Unknown, "Unknown cannot be read from JSON"),
        (typing.Callable[[], int], "send its name"),
        (type[Unknown], "send its name"),
        (typing.Iterable[int], "use list"),
        ("list[", "not a type"),
    ],
)
def test_a_declaration_that_cannot_be_a_contract_names_the_parameter(annotation: Any, says: str) -> None:
    def task(good: int, bad) -> None:  # type: ignore[no-untyped-def]
        ...

    task.__annotations__["bad"] = annotation

    with pytest.raises(InvalidContract, match=says) as refused:
        contract_of(task)

    assert "shop.task" in str(refused.value)
    assert "'bad'" in str(refused.value) or "annotation" in str(refused.value)


def test_an_annotation_that_does_not_exist_is_told_apart() -> None:
    def task(order: Nowhere) -> None:  # type: ignore[name-defined]  # noqa: F821
        ...

    with pytest.raises(UnresolvedAnnotation, match="'Nowhere' is not defined"):
        contract_of(task)


def test_names_of_the_declaring_function_can_be_used() -> None:
    class Local(BaseModel):
        a: int

    def task(value: Local) -> Local: ...

    assert round_trip(contract_of(task, namespace=locals()), Local(a=1)) == ((Local(a=1),), {})


def test_a_fingerprint_changes_with_the_contract_only() -> None:
    def one(a: int) -> int: ...
    def same(a: int) -> int: ...
    def other_type(a: str) -> int: ...
    def other_result(a: int) -> str: ...
    def optional(a: int = 0) -> int: ...

    fingerprints = [contract_of(f).fingerprint for f in (one, same, other_type, other_result, optional)]

    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 4


def test_what_a_stock_producer_marks_in_its_json_is_read() -> None:
    """Kombu has decoded a datetime, bytes and a Decimal before a contract sees them."""

    def task(when: datetime, raw: bytes, amount: Decimal) -> None: ...

    sent = (datetime(2026, 1, 2), b"\xff", Decimal("1.1"))

    assert contract_of(task).load(sent, {}) == (sent, {})
