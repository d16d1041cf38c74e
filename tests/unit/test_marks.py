"""
Marks in annotations are found wherever pydantic takes one, and their values in what a call is written as.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Generic, NamedTuple, NewType, NotRequired, Optional, Required, TypeVar, Union
from uuid import UUID, uuid4

import pydantic.dataclasses
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, Json, RootModel, create_model
from typing_extensions import TypeAliasType, TypedDict

from celerykit.contract import Contract
from celerykit.errors import InvalidContract
from celerykit.fields import Fields
from celerykit.marks import EACH, Path, paths_of, types_of_field, values_at

T = TypeVar("T")
U = TypeVar("U")


class Key: ...


class Redact: ...


class SharpKey(Key): ...


class Line(BaseModel):
    sku: Annotated[str, Key()]
    count: int = 1


class Order(BaseModel):
    order_id: Annotated[UUID, Key()]
    card: Annotated[str, Redact()] = ""
    lines: list[Line] = []


class Rush(Order):
    until: Annotated[int, Field(gt=0), Key()] = Field(default=1, le=10)


class Page(BaseModel, Generic[T]):
    first: Annotated[T, Key()]
    items: list[T] = []


class Ids(RootModel[list[Annotated[int, Key()]]]): ...


class Renamed(BaseModel):
    order_id: Annotated[int, Key()] = Field(alias="orderId")


class Node(BaseModel):
    id: Annotated[int, Key()]
    children: list[Node] = []
    owner: Owner | None = None


class Owner(BaseModel):
    name: Annotated[str, Key()]
    nodes: list[Node] = []


class Plain(BaseModel):
    again: list[Plain] = []


@dataclasses.dataclass
class Stamp:
    by: Annotated[str, Key()]
    at: int = 0
    before: Stamp | None = None
    seen: dataclasses.InitVar[Annotated[int, Key()]] = 0


@dataclasses.dataclass
class Box(Generic[T]):
    content: T
    spare: list[T] = dataclasses.field(default_factory=list)


@pydantic.dataclasses.dataclass
class Checked(Stamp):
    count: Annotated[int, Field(ge=0), Key] = 0


class Options(TypedDict, total=False):
    tenant: Required[Annotated[str, Key()]]
    zone: Annotated[NotRequired[str], Key()]
    note: str


class Point(NamedTuple):
    x: int
    y: Annotated[int, Key()]


class Cat(BaseModel):
    kind: typing.Literal["cat"] = "cat"
    cat_id: Annotated[int, Key()]


class Dog(BaseModel):
    kind: typing.Literal["dog"] = "dog"
    dog_id: Annotated[int, Key()]


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]
OrderId = Annotated[UUID, Key()]
UserId = NewType("UserId", Annotated[int, Key()])  # type: ignore[valid-newtype]
LaterId = TypeAliasType("LaterId", Annotated[int, Key()])
KeyOf = TypeAliasType("KeyOf", Annotated[T | None, Key()], type_params=(T,))
Second = TypeAliasType("Second", tuple[T, Annotated[U, Key()]], type_params=(T, U))
Tree = TypeAliasType("Tree", "dict[str, Tree] | Annotated[int, Key()]")
Bound = TypeVar("Bound", bound=Order)


def paths(annotation: Any, mark: type = Key) -> tuple[Path, ...]:
    """What is found in a parameter `p`, without that name."""
    found = paths_of({"p": annotation}, mark)
    assert all(path[0] == "p" for path in found)
    return tuple(path[1:] for path in found)


ORDER: tuple[Path, ...] = (("order_id",), ("lines", EACH, "sku"))

FOUND: dict[str, tuple[Any, tuple[Path, ...]]] = {
    "no type": (Any, ()),
    "nothing marked": (dict[str, list[int]], ()),
    "the parameter": (Annotated[UUID, Key()], ((),)),
    "the class of the mark": (Annotated[UUID, Key], ((),)),
    "a subclass of the mark": (Annotated[UUID, SharpKey()], ((),)),
    "among others": (Annotated[int, Field(gt=1), Key(), Redact()], ((),)),
    "an alias": (OrderId, ((),)),
    "an alias within": (Annotated[OrderId, Field(description="x")], ((),)),
    "a type alias": (LaterId, ((),)),
    "a generic type alias": (KeyOf[int], ((),)),
    "what a type alias is given": (list[Second[int, Annotated[str, Key()]]], ((EACH, 1),)),
    "a new type": (UserId, ((),)),
    "a type variable": (Bound, ORDER),
    "an option": (Annotated[int, Key()] | None, ((),)),
    "an option outside": (Annotated[int | None, Key()], ((),)),
    "a union of the old kind": (Union[Order, str], ORDER),  # noqa: UP007
    "all members of a union": (Pet | None, (("cat_id",), ("dog_id",))),
    "a model": (Order, ORDER),
    "inherited": (Rush, (*ORDER, ("until",))),
    "a generic model": (Page[int], (("first",),)),
    "what a generic model is given": (Page[Annotated[int, Key()]], (("first",), ("items", EACH))),
    "models of a generic model": (
        Page[Line],
        (("first",), ("first", "sku"), ("items", EACH, "sku")),
    ),
    "a root model": (Ids, ((EACH,),)),
    "a field's own name": (Renamed, (("order_id",),)),
    "itself": (Node, (("id",), ("owner", "name"))),
    "itself, without marks": (Plain, ()),
    "each other": (Owner, (("name",), ("nodes", EACH, "id"))),
    "twice beside each other": (
        tuple[Node, Node],
        ((0, "id"), (0, "owner", "name"), (1, "id"), (1, "owner", "name")),
    ),
    "a dataclass": (Stamp, (("by",),)),
    "a dataclass of pydantic's": (Checked, (("by",), ("before", "by"), ("count",))),
    "a generic dataclass": (Box[Annotated[int, Key()]], (("content",), ("spare", EACH))),
    "a typed dict": (Options, (("tenant",), ("zone",))),
    "a named tuple": (Point, ((1,),)),
    "a list": (list[Order], ((EACH, "order_id"), (EACH, "lines", EACH, "sku"))),
    "a sequence": (Sequence[Annotated[int, Key()]], ((EACH,),)),
    "anything to go through": (Iterable[Annotated[int, Key()]], ((EACH,),)),
    "a set": (frozenset[Annotated[int, Key()]], ((EACH,),)),
    "a tuple of any length": (tuple[Annotated[int, Key()], ...], ((EACH,),)),
    "one place of a tuple": (tuple[int, Annotated[int, Key()]], ((1,),)),
    "a tuple with a rest": (tuple[int, *tuple[Annotated[int, Key()], ...]], ((EACH,),)),
    "no tuple": (tuple[()], ()),
    "a dict": (dict[str, Annotated[int, Key()]], ((EACH,),)),
    "a mapping": (Mapping[str, list[Point]], ((EACH, EACH, 1),)),
    "a whole text of JSON": (Annotated[Json[list[int]], Key()], ((),)),
    "a function": (Callable[[Annotated[int, Key()]], None], ()),
    "a class": (type[Order], ()),
    "a type that is a tree": (Tree, ((),)),
}


@pytest.mark.parametrize("case", FOUND)
def test_marks_are_found_in(case: str) -> None:
    annotation, expected = FOUND[case]

    assert paths(annotation) == expected


def test_each_kind_of_mark_is_found_by_itself() -> None:
    assert paths(Order, Redact) == (("card",),)


def test_parameters_come_in_their_order() -> None:
    types = {"order": Order, "note": str, "by": Annotated[str, Key()]}

    assert paths_of(types, Key) == (("order", "order_id"), ("order", "lines", EACH, "sku"), ("by",))


def test_an_annotation_that_does_not_exist_is_refused() -> None:
    class Early(BaseModel):
        late: list[Late]  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(InvalidContract, match="Late"):
        paths(Early)


def test_a_dataclass_of_a_function_may_speak_of_itself() -> None:
    @dataclasses.dataclass
    class Ring:
        id: Annotated[int, Key()]
        next: Ring | None = None

    assert paths(Ring) == (("id",),)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the statement came with Python 3.12")
def test_marks_are_found_in_type_statements() -> None:
    names: dict[str, Any] = {"Annotated": Annotated, "Key": Key}
    exec("type Marked[T] = Annotated[T, Key()]\ntype Chain = tuple[Marked[int], Chain | None]", names)

    assert paths(names["Marked"][int]) == ((),)
    assert paths(names["Chain"]) == ((0,),)


@pytest.mark.parametrize(
    "annotation",
    [dict[Annotated[str, Key()], int], Mapping[tuple[Point, int], int], Json[list[Line]], Annotated[list[Line], Json]],
)
def test_a_mark_that_would_find_nothing_is_refused(annotation: Any) -> None:
    with pytest.raises(InvalidContract, match=r"^parameter 'p\.\*': Key\(\) stands on the keys of a dict, or inside"):
        paths(list[annotation])


def test_models_that_all_speak_of_each_other_are_each_looked_through_once() -> None:
    names = [f"Model{number}" for number in range(40)]
    models: dict[str, Any] = {}
    for name in names:
        others: dict[str, Any] = {other.lower(): (Optional[other], None) for other in names}  # noqa: UP045
        models[name] = create_model(name, **others)
    for model in models.values():
        model.model_rebuild(_types_namespace=models)

    # Looked through each for itself, they would take longer than a test may.
    assert paths(models["Model0"]) == ()
    marked = create_model("Marked", id=(Annotated[int, Key()], 0), __base__=models["Model0"])
    assert paths(marked) == (("id",),)


def test_types_that_are_too_entangled_are_refused() -> None:
    names = [f"Knot{number}" for number in range(9)]
    models: dict[str, Any] = {}
    for name in names:
        others: dict[str, Any] = {other.lower(): (Optional[other], None) for other in names}  # noqa: UP045
        models[name] = create_model(name, id=(Annotated[int, Key()], 0), **others)
    for model in models.values():
        model.model_rebuild(_types_namespace=models)

    with pytest.raises(InvalidContract, match=r"^parameter 'p': its types refer to each other in too many ways"):
        paths(models["Knot0"])


# Values


def values(function: Callable[..., Any], *args: Any) -> list[Any]:
    contract = Contract("shop.task", function)
    written = contract.canonical(args, {})
    types = typing.get_type_hints(function, include_extras=True)
    return [values_at(written, path) for path in paths_of(types, Key)]


def test_values_are_read_by_the_names_of_fields() -> None:
    def task(renamed: Renamed) -> None: ...

    assert values(task, {"orderId": 7}) == [7]


def test_values_are_those_of_json() -> None:
    def task(order: Order, by: Annotated[UserId, Key()]) -> None: ...

    order_id = uuid4()
    order = Order(order_id=order_id, lines=[Line(sku="a"), Line(sku="b")])

    assert values(task, order, "3") == [str(order_id), ["a", "b"], 3]


def test_values_in_tuples_are_read_by_their_place() -> None:
    def task(points: list[Point], pair: tuple[int, Annotated[str, Key()]]) -> None: ...

    assert values(task, [Point(1, 2), Point(3, 4)], (1, "b")) == [[2, 4], "b"]


def test_what_is_not_there_is_none() -> None:
    def task(node: Node, pet: Pet | None = None, options: Options | None = None) -> None: ...

    assert values(task, Node(id=1)) == [1, None, None, None, None, None]
    assert values(task, Node(id=1), Cat(cat_id=2), {"tenant": "x"}) == [1, None, 2, None, "x", None]


def test_no_items_are_an_empty_list_and_no_list_is_none() -> None:
    assert values_at({"p": []}, ("p", EACH, "id")) == []
    assert values_at({"p": {}}, ("p", EACH)) == []
    assert values_at({"p": None}, ("p", EACH, "id")) is None
    assert values_at({}, ("p", EACH)) is None


def test_a_value_of_another_member_of_a_union_is_none() -> None:
    assert values_at({"p": 3}, ("p", "id")) is None
    assert values_at({"p": "text"}, ("p", 0)) is None
    assert values_at({"p": [1]}, ("p", 1)) is None
    assert values_at({"p": "text"}, ("p", EACH)) is None
    assert values_at({"p": [None, {"id": 1}]}, ("p", EACH, "id")) == [None, 1]


def test_items_of_a_dict_come_in_the_order_of_its_keys() -> None:
    path = ("p", EACH)

    assert values_at({"p": {"b": 2, "a": 1}}, path) == values_at({"p": {"a": 1, "b": 2}}, path) == [1, 2]


# Fields by name

NAMED: dict[str, tuple[Any, str, list[Any]]] = {
    "a model": (Order, "lines", [list[Line]]),
    "nothing of a model": (Order, "line", []),
    "a method is no field": (Order, "model_dump", []),
    "an option": (Annotated[Order, Key()] | None, "card", [str]),
    "one member of a union": (Cat | Dog | int, "dog_id", [int]),
    "several members": (Pet | None, "kind", [typing.Literal["cat"], typing.Literal["dog"]]),
    "a generic dataclass": (Box[int], "content", [int]),
    "a typed dict": (Options, "note", [str]),
    "a named tuple": (Point, "x", [Any]),
    "a dict": (dict[str, Line], "whatever", [Line]),
    "a list": (list[Order], "lines", []),
    "a tree": (Tree, "whatever", [Tree]),
    "a root model": (Ids, "root", [Any]),
    "anything": (Any, "whatever", [Any]),
    "nothing": (None, "whatever", []),
}


@pytest.mark.parametrize("case", NAMED)
def test_fields_are_known_by_name_in(case: str) -> None:
    annotation, name, expected = NAMED[case]

    assert types_of_field(annotation, name) == expected


# For any types: a strategy gives a type, a value of it, and what is marked in that value.

Sample = tuple[Any, Any, list[int]]

plain: st.SearchStrategy[Sample] = st.integers().map(lambda number: (int, number, []))
marked: st.SearchStrategy[Sample] = st.integers().map(lambda number: (Annotated[int, Key()], number, [number]))


def in_list(sample: Sample, *, times: int) -> Sample:
    inner, value, found = sample
    return list[inner], [value] * times, found * times  # type: ignore[valid-type]


def in_dict(sample: Sample, *, key: str) -> Sample:
    inner, value, found = sample
    return dict[str, inner], {key: value}, found  # type: ignore[valid-type]


def in_option(sample: Sample, *, there: bool) -> Sample:
    inner, value, found = sample
    return Optional[inner], value if there else None, found if there else []  # noqa: UP045


def marked_in(samples: list[Sample]) -> list[int]:
    return [number for sample in samples for number in sample[2]]


def in_tuple(samples: list[Sample]) -> Sample:
    return tuple[*(s[0] for s in samples)], tuple(s[1] for s in samples), marked_in(samples)


def in_model(samples: list[Sample]) -> Sample:
    fields: dict[str, Any] = {f"f{place}": (s[0], Field(alias=f"F{place}")) for place, s in enumerate(samples)}
    values = {f"F{place}": s[1] for place, s in enumerate(samples)}
    return create_model("Made", **fields), values, marked_in(samples)


def in_dataclass(samples: list[Sample]) -> Sample:
    made = dataclasses.make_dataclass("Made", [(f"f{place}", s[0]) for place, s in enumerate(samples)])
    values = {f"f{place}": s[1] for place, s in enumerate(samples)}
    return made, values, marked_in(samples)


def in_typed_dict(samples: list[Sample]) -> Sample:
    make: Any = TypedDict
    made = make("Made", {f"f{place}": s[0] for place, s in enumerate(samples)})
    return made, {f"f{place}": s[1] for place, s in enumerate(samples)}, marked_in(samples)


def wider(inner: st.SearchStrategy[Sample]) -> st.SearchStrategy[Sample]:
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.builds(in_list, inner, times=st.integers(0, 3)),
        st.builds(in_dict, inner, key=st.text(max_size=3)),
        st.builds(in_option, inner, there=st.booleans()),
        st.builds(in_tuple, several),
        st.builds(in_model, several),
        st.builds(in_dataclass, several),
        st.builds(in_typed_dict, several),
    )


def numbers_in(value: Any) -> list[int]:
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [] if value is None else [value]


@given(st.recursive(plain | marked, wider, max_leaves=6))
def test_all_that_is_marked_is_found_and_nothing_else(sample: Sample) -> None:
    annotation, value, expected = sample
    types = {"p": annotation}
    fields = Fields(types)

    written = fields.canonical(fields.read({"p": value}))
    found = [values_at(written, path) for path in paths_of(types, Key)]

    assert sorted(numbers_in(found)) == sorted(expected)
