"""
The types that a function's annotations name, ready to read and write values with.

A declaration that cannot be a contract is refused here, with the parameter.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, get_args, get_origin

import typing_extensions
from pydantic import PydanticSchemaGenerationError, PydanticUserError

from celerykit.errors import InvalidContract
from celerykit.fields import Fields
from celerykit.parameters import Parameters

__all__ = ["NOTHING", "UnresolvedAnnotation", "fields_of_parameters", "fields_of_result", "hints_of", "name_of"]

#: Not checked and not converted: they pass as the serializer takes them, as in stock Celery.
_UNTYPED = (inspect.Parameter.empty, Any, object)

#: What a task without a result says that it returns.
NOTHING = (None, type(None), NoReturn, typing.Never)


class UnresolvedAnnotation(InvalidContract):
    """An annotation names something that does not exist yet, or not here."""


def hints_of(task: str, function: Callable[..., Any], namespace: Mapping[str, Any] | None) -> dict[str, Any]:
    """
    Evaluate a function's annotations, which may be strings.

    Raises:
        UnresolvedAnnotation: One names something that does not exist, or not yet.

        InvalidContract: One is no type.
    """
    try:
        return typing.get_type_hints(function, localns=dict(namespace or {}), include_extras=True)
    except (NameError, AttributeError) as error:
        raise UnresolvedAnnotation(
            f"{task}: the annotation {error.name!r} is not defined; define or import it "
            "in the task's module (an import under TYPE_CHECKING does not exist when the program runs)."
        ) from error
    except (TypeError, SyntaxError) as error:
        raise InvalidContract(f"{task}: an annotation is not a type: {error}.") from error


def _type_of(name: str, annotation: Any, parameters: Parameters) -> Any:
    if name == parameters.var_positional:
        return list[annotation]
    if name != parameters.var_keyword:
        return annotation
    if get_origin(annotation) in (typing.Unpack, typing_extensions.Unpack):
        return get_args(annotation)[0]
    return dict[str, annotation]


def _fields(task: str, types: dict[str, Any], *, strict: bool) -> Fields:
    try:
        fields = Fields(types, strict=strict)
    except (PydanticUserError, TypeError, NameError) as error:
        raise _first_refused(task, types, error) from error
    for name, reason in fields.unsendable.items():
        raise InvalidContract(f"{task}: {_what(name)}: {reason}.")
    return fields


def fields_of_parameters(task: str, hints: Mapping[str, Any], parameters: Parameters, *, strict: bool) -> Fields:
    """
    Give the types of the parameters that have one.

    Raises:
        InvalidContract: One cannot travel in a message.
    """
    types = {
        name: _type_of(name, hints[name], parameters)
        for name in parameters.names
        if hints.get(name, inspect.Parameter.empty) not in _UNTYPED
    }
    fields = _fields(task, types, strict=strict)
    for name in fields.excluded:
        raise InvalidContract(
            f"{task}: {_what(name)} has a field with exclude=True, which would not arrive; "
            "give the task a model of what it needs."
        )
    return fields


def fields_of_result(task: str, returns: Any) -> Fields | None:
    """Give the type of what a task returns; ``None`` when it is not typed, or there is nothing."""
    return None if returns in (*_UNTYPED, *NOTHING) else _fields(task, {"return": returns}, strict=False)


def _first_refused(task: str, types: dict[str, Any], whole: Exception) -> InvalidContract:
    """Find out which of *types* pydantic does not take."""
    for name, annotation in types.items():
        try:
            Fields({name: annotation})
        except PydanticSchemaGenerationError:
            return InvalidContract(
                f"{task}: {_what(name)}: {name_of(annotation)} cannot be read from JSON; "
                "use a type pydantic knows, or leave it without a type (Any) to pass it as it is."
            )
        except NameError as error:  # PydanticUndefinedAnnotation is one
            return UnresolvedAnnotation(f"{task}: {_what(name)}: {error.name!r} is not defined.")
        except (PydanticUserError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            return InvalidContract(f"{task}: {_what(name)}: {name_of(annotation)}: {reason}")
    return InvalidContract(f"{task}: {whole}")


def _what(name: str) -> str:
    return "the return type" if name == "return" else f"parameter {name!r}"


def name_of(annotation: Any) -> str:
    """Name a type for a person."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
