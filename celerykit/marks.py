"""
Marks on types: which fields of a task's parameters carry one, and what their values are in a call.

    class Order(BaseModel):
        order_id: Annotated[UUID, Key()]

    def charge(order: Order) -> None: ...

The field marked ``Key()`` is at the path ``("order", "order_id")``. Paths are found once, when a task is declared.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any, Final, ForwardRef, NamedTuple, NewType, TypeAlias, TypeVar, get_args, get_origin
from uuid import UUID

import typing_extensions
from pydantic import AliasChoices, AliasPath, BaseModel, Json, RootModel
from pydantic.fields import FieldInfo

from celerykit.errors import InvalidContract

__all__ = [
    "EACH",
    "RESULT",
    "Part",
    "Path",
    "Redact",
    "is_made_of",
    "marked",
    "names_at",
    "names_of",
    "parts_of",
    "paths_of",
    "types_of_field",
    "values_at",
]

#: The step that stands for each item of a list, set, tuple of any length, or dict.
EACH: Final = "*"

#: From a parameter's name inwards: names of fields, places in a tuple that has a type for each, and `EACH`.
Path: TypeAlias = tuple[str | int, ...]

#: The name of what a task returns, among those of its parameters.
RESULT: Final = "return"

#: Types that refer to each other in more ways than this are not one call's arguments.
_MOST = 10_000

_ALIASES: tuple[Any, ...] = (
    typing_extensions.TypeAliasType,
    getattr(typing, "TypeAliasType", typing_extensions.TypeAliasType),
)
_UNIONS = (typing.Union, types.UnionType)
_UNPACKED = (typing.Unpack, typing_extensions.Unpack)

#: What is written without names.
_KNOWN = (str, bytes, int, float, Decimal, date, time, timedelta, UUID, Enum, PurePath, Sequence, Set, types.NoneType)

#: What stands around a field's type, and says nothing of its values.
_WRAPPERS = (
    typing.Final,
    typing.Required,
    typing.NotRequired,
    typing_extensions.Required,
    typing_extensions.NotRequired,
    typing_extensions.ReadOnly,
    getattr(typing, "ReadOnly", typing_extensions.ReadOnly),
)


#: A step to where no path goes.
_UNREACHED = "\0"


@dataclass(frozen=True, slots=True)
class Redact:
    """
    Marks a value that nobody is to read: ``Annotated[str, Redact()]``.

    It is shown as ``***`` in logs, events, descriptions and notes, and taken
    out of the errors of its call. Tasks, messages and stored results have it
    as it is.
    """


class _Hidden(NamedTuple):
    """A type whose values are written where no path goes."""

    annotation: Any


class Part(NamedTuple):
    """A type inside another one, and the steps from that one to it."""

    steps: Path
    annotation: Any
    marks: Sequence[Any] = ()


class _Named(NamedTuple):
    """A type, and the names of the field it is the type of."""

    names: tuple[str, ...]
    part: Part


class _Place(NamedTuple):
    """A type, where it stands, and the types with a name that are around it."""

    path: Path
    annotation: Any
    marks: Sequence[Any] = ()
    above: tuple[Any, ...] = ()


def paths_of(types: Mapping[str, Any], mark: type) -> tuple[Path, ...]:
    """
    Find what carries a *mark* in ``Annotated[...]``, as a class or an instance of it.

    Where a type contains itself, the marks in it are found once, and not again
    further in.

    Args:
        types:
            The type of each parameter; pydantic must know them.

    Raises:
        InvalidContract: A mark stands on the keys of a dict; or the types refer to each other in too many ways.
    """
    return tuple({path: None for path, _ in marked(types, mark)})


def marked(types: Mapping[str, Any], mark: type) -> Iterator[tuple[Path, Any]]:
    """Give what `paths_of` finds, each with the type that carries the mark."""
    for name, annotation in types.items():
        yield from _found((name,), annotation, mark)


def is_made_of(annotation: Any, kinds: tuple[type, ...]) -> bool:
    """Tell whether a type is one of *kinds*, or has them as its members or items, but not in fields."""
    waiting, seen = [annotation], list[Any]()
    while waiting:
        one = waiting.pop()
        if _is_one_of(one, kinds):
            return True
        if one not in seen and not (isinstance(get_origin(one) or one, type) and _may_contain_itself(one)):
            seen.append(one)
            waiting += [part.annotation for part in parts_of(one)]
    return False


def names_of(types: Mapping[str, Any], mark: type, *, kinds: tuple[type, ...] = ()) -> frozenset[str]:
    """
    Find the names under which what carries a *mark* stands in JSON values, aliases included.

    It is the nearest name: for a mark on a list's items, or on what is
    written without names, that of the field or parameter around it.

    Args:
        kinds:
            What counts as marked by its type alone.
    """
    found: set[str] = set()
    waiting = [_Named((name,), Part((), annotation)) for name, annotation in types.items()]
    seen: list[tuple[Any, tuple[str, ...]]] = []
    for _ in range(_MOST):
        if not waiting:
            return frozenset(found)
        names, (_, annotation, marks) = waiting.pop()
        names = (*names, *_aliases_in(marks))
        if any(_is(mark, item) for item in marks) or _is_one_of(annotation, kinds):
            found.update(names)
        if _may_contain_itself(annotation):
            if (annotation, names) in seen:
                continue
            seen.append((annotation, names))
        waiting += [_Named(names_at(annotation, part) or names, part) for part in parts_of(annotation)]
    raise _too_many(next(iter(types), ""))


def all_names(types: Mapping[str, Any]) -> frozenset[str] | None:
    """Give all names under which something may stand in JSON values; ``None`` when there may be any."""
    found, seen = set(types), list[Any]()
    waiting = list(types.values())
    for _ in range(_MOST):
        if not waiting:
            return frozenset(found)
        annotation = waiting.pop()
        origin = get_origin(annotation) or annotation
        if origin in (Any, object) or isinstance(origin, TypeVar) or _takes_any_name(origin):
            return None
        if _may_contain_itself(annotation):
            if annotation in seen:
                continue
            seen.append(annotation)
        for part in parts_of(annotation):
            found.update(names_at(annotation, part))
            waiting.append(part.annotation)
    return None


def _takes_any_name(kind: Any) -> bool:
    if not isinstance(kind, type):
        return False
    if issubclass(kind, BaseModel):
        return kind.model_config.get("extra") == "allow"
    # A class that nothing is known of may be written in any way.
    return issubclass(kind, Mapping) or (not _has_fields(kind) and not issubclass(kind, _KNOWN) and kind not in _UNIONS)


def names_at(kind: Any, part: Part) -> tuple[str, ...]:
    """Give the names under which a part of *kind* may stand in JSON; none when it has no name."""
    step = part.steps[-1] if part.steps else None
    if not isinstance(step, str) or step in (EACH, _UNREACHED):
        return ()
    origin = get_origin(kind) or kind
    known = getattr(origin, "__pydantic_fields__", None) or {}
    return (step, *(_aliases_of(known[step]) if step in known else ()))


def _aliases_in(marks: Sequence[Any]) -> Iterator[str]:
    for item in marks:
        if isinstance(item, FieldInfo):
            yield from _aliases_of(item)


def _aliases_of(field: FieldInfo) -> Iterator[str]:
    given = field.validation_alias
    for alias in (
        field.alias,
        field.serialization_alias,
        *(given.choices if isinstance(given, AliasChoices) else [given]),
    ):
        name = (
            next((step for step in reversed(alias.path) if isinstance(step, str)), None)
            if isinstance(alias, AliasPath)
            else alias
        )
        if name:
            yield name


def values_at(values: Any, path: Path) -> Any:
    """
    Read what is at *path* out of JSON values by parameter name.

    Names of fields are those of `Contract.canonical`, not their aliases. What
    is not there is ``None``, as what is null; `EACH` gives a list, of a dict
    in the order of its keys.
    """
    if not path:
        return values
    if path[0] != EACH:
        return values_at(_inside(values, path[0]), path[1:])
    items = [values[key] for key in sorted(values)] if isinstance(values, dict) else values
    return [values_at(item, path[1:]) for item in items] if isinstance(items, list) else None


def _inside(value: Any, step: str | int) -> Any:
    if isinstance(step, int):
        return value[step] if isinstance(value, list) and step < len(value) else None
    return value.get(step) if isinstance(value, Mapping) else None


# Finding


def _found(path: Path, annotation: Any, mark: type) -> Iterator[tuple[Path, Any]]:
    """Go inwards, but only to where there is a mark."""
    waiting = [_Place(path, annotation)]
    for _ in range(_MOST):
        if not waiting:
            return
        place = waiting.pop()
        if not _leads_to(mark, place):
            continue
        if _is_marked(place, mark):
            yield _reachable(place.path, mark), place.annotation
        if place.annotation not in place.above:
            waiting += reversed(_inner(place))
    raise _too_many(path[0])


def _leads_to(mark: type, place: _Place) -> bool:
    waiting, seen = [place], list(place.above)
    for _ in range(_MOST):
        if not waiting:
            return False
        place = waiting.pop()
        if _is_marked(place, mark):
            return True
        if _may_contain_itself(place.annotation):
            if place.annotation in seen:
                continue
            seen.append(place.annotation)
        waiting += _inner(place)
    raise _too_many(place.path[0])


def _inner(place: _Place) -> list[_Place]:
    above = place.above
    if _may_contain_itself(place.annotation):
        above = (*above, place.annotation)
    return [
        _Place((*place.path, *part.steps), part.annotation, part.marks, above) for part in parts_of(place.annotation)
    ]


def _is_marked(place: _Place, mark: type) -> bool:
    return any(_is(mark, item) for item in place.marks)


def _is(kind: type, item: Any) -> bool:
    return isinstance(item, kind) or (isinstance(item, type) and issubclass(item, kind))


def _may_contain_itself(annotation: Any) -> bool:
    """Tell whether it has a name of its own: without one, a type cannot be written inside itself."""
    origin = get_origin(annotation) or annotation
    return isinstance(origin, _ALIASES) or (isinstance(origin, type) and _has_fields(origin))


def _reachable(path: Path, mark: type) -> Path:
    if _UNREACHED not in path:
        return path
    outside = ".".join(map(str, path[: path.index(_UNREACHED)]))
    raise InvalidContract(
        f"parameter {outside!r}: {mark.__name__}() stands on the keys of a dict, or inside of Json[...], "
        "where no field is; let it stand on the whole."
    )


def _too_many(parameter: Any) -> InvalidContract:
    return InvalidContract(
        f"parameter {parameter!r}: its types refer to each other in too many ways to look for marks in them; "
        "give the task a model of what it needs."
    )


# What is inside a type


def parts_of(annotation: Any) -> Iterable[Part]:
    """Give the types inside a type, each with the steps to it; none for those that are the same value."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (typing.Annotated, typing_extensions.Annotated):
        return [_annotated(args[0], args[1:])]
    if origin in _WRAPPERS or origin in _UNPACKED:
        return [Part((), args[0])]
    if origin in _UNIONS:
        return [Part((), member) for member in args]
    if isinstance(annotation, str | ForwardRef):
        raise InvalidContract(f"the annotation {annotation!r} is not defined.")
    return _named(origin or annotation, args) if _may_contain_itself(annotation) else _unnamed(annotation)


def _annotated(annotation: Any, metadata: Sequence[Any], steps: Path = ()) -> Part:
    if any(_is(Json, item) for item in metadata):  # written as one text
        return Part(steps, _Hidden(annotation), metadata)
    return Part(steps, annotation, metadata)


def _named(origin: Any, args: Sequence[Any]) -> Iterator[Part]:
    variables = getattr(origin, "__type_params__", ()) or getattr(origin, "__parameters__", ())
    replaced = dict(zip(variables, args, strict=False))
    parts = [Part((), _value_of(origin))] if isinstance(origin, _ALIASES) else _fields(origin)
    for part in parts:
        yield part._replace(annotation=_substituted(part.annotation, replaced))


def _unnamed(annotation: Any) -> Iterable[Part]:
    origin, args = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, _Hidden):
        return [Part((_UNREACHED,), annotation.annotation)]
    if isinstance(annotation, NewType):
        return [Part((), annotation.__supertype__)]
    if isinstance(annotation, TypeVar):
        return [Part((), one) for one in (annotation.__bound__, *annotation.__constraints__) if one is not None]
    if _is_kind(origin, tuple) and args[-1:] != (Ellipsis,) and not any(_is_unpacked(item) for item in args):
        return [Part((place,), item) for place, item in enumerate(args)]
    if _is_kind(origin, Mapping):
        return [Part((_UNREACHED,), args[0]), *(Part((EACH,), item) for item in args[1:])]
    if _is_kind(origin, Collection) or origin is typing.get_origin(Iterable[Any]):
        # What is unpacked into a tuple has items of its own.
        return [Part(() if _is_unpacked(item) else (EACH,), item) for item in args if item is not Ellipsis]
    return []


def _is_unpacked(annotation: Any) -> bool:
    return get_origin(annotation) in _UNPACKED or getattr(annotation, "__unpacked__", False)


def _is_one_of(annotation: Any, kinds: tuple[type, ...]) -> bool:
    origin = get_origin(annotation) or annotation
    return isinstance(origin, type) and issubclass(origin, kinds)


def _is_kind(origin: Any, kind: type) -> bool:
    return isinstance(origin, type) and issubclass(origin, kind)


def _value_of(alias: Any) -> Any:
    def holder() -> None: ...

    holder.__annotations__ = {"value": alias.__value__}
    module = vars(sys.modules.get(alias.__module__, typing))
    names = {alias.__name__: alias}
    return typing_extensions.get_type_hints(holder, globalns=module, localns=names, include_extras=True)["value"]


def _substituted(annotation: Any, replaced: Mapping[Any, Any]) -> Any:
    if isinstance(annotation, TypeVar):
        return replaced.get(annotation, annotation)
    wanted = () if isinstance(annotation, type) else getattr(annotation, "__parameters__", ())
    if not replaced or not wanted:
        return annotation
    return annotation[tuple(replaced.get(one, one) for one in wanted)]


# Fields


def _has_fields(kind: type) -> bool:
    return (
        issubclass(kind, BaseModel)
        or is_dataclass(kind)
        or _is_named_tuple(kind)
        or typing_extensions.is_typeddict(kind)
    )


def _is_named_tuple(kind: type) -> bool:
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


def _fields(kind: Any) -> list[Part]:
    if issubclass(kind, BaseModel):
        return _fields_of_model(kind)
    if "__pydantic_fields__" in vars(kind):  # a dataclass of pydantic's
        known = vars(kind)["__pydantic_fields__"]
        return [_annotated(known[name].annotation, known[name].metadata, (name,)) for name in _names(kind)]
    hints = _hints(kind)
    if is_dataclass(kind):
        return [Part((name,), hints[name]) for name in _names(kind)]
    if _is_named_tuple(kind):  # written as a list
        return [Part((place,), hints.get(name)) for place, name in enumerate(kind._fields)]
    return [Part((name,), hint) for name, hint in hints.items()]


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]  # without what its `__init__` takes only


def _fields_of_model(kind: type[BaseModel]) -> list[Part]:
    if not kind.__pydantic_complete__:  # it spoke of what was not there yet
        kind.model_rebuild(raise_errors=False)
    is_root = issubclass(kind, RootModel)
    return [
        _annotated(field.annotation, field.metadata, () if is_root else (name,))
        for name, field in kind.model_fields.items()
    ]


def _hints(kind: type) -> dict[str, Any]:
    try:
        return typing_extensions.get_type_hints(kind, include_extras=True)
    except NameError:  # a class of a function's, which may speak of itself
        names = {**vars(kind), kind.__name__: kind}
        return typing_extensions.get_type_hints(kind, localns=names, include_extras=True)


# By name, of Python values


def types_of_field(annotation: Any, name: str) -> list[Any]:
    """
    Give the types that the field *name* of a Python value may have; none when values have no such field.

    ``Any`` when nothing is known of it: of a property, a key of a dict, or a value that is not typed.
    """
    found: list[Any] = []
    for kind in _members(annotation):
        if kind is not None and kind is not type(None):
            found += _types_of_field(kind, name)
    return found


def _members(annotation: Any) -> list[Any]:
    """Look through unions, aliases and ``Annotated``."""
    waiting, seen, found = [annotation], list[Any](), list[Any]()
    while waiting:
        kind = waiting.pop(0)
        inner = [] if _is_kind(kind, BaseModel) else [part.annotation for part in parts_of(kind) if not part.steps]
        if not inner:
            found.append(kind)
        elif kind not in seen:
            seen.append(kind)
            waiting += inner
    return found


def _types_of_field(kind: Any, name: str) -> list[Any]:
    origin = get_origin(kind) or kind
    if not isinstance(origin, type) or origin in (Any, object) or _takes_any(origin):
        return [Any]
    if _is_kind(origin, Mapping) and not _has_fields(origin):
        return list(get_args(kind)[1:]) or [Any]
    found = [part.annotation for part in parts_of(kind) if part.steps == (name,)]
    is_attribute = hasattr(origin, name) and not callable(getattr(origin, name))
    return found or ([Any] if is_attribute else [])


def _takes_any(origin: type) -> bool:
    if not issubclass(origin, BaseModel):
        return False
    return issubclass(origin, RootModel) or origin.model_config.get("extra") == "allow"
