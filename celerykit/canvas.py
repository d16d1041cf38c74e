"""
Celery's canvas, with one verb more: ``then``, a chain whose joins are checked.

``charge.s(order).then(email_receipt, cc=None)`` is a real Celery chain. Type
checkers see that what ``charge`` returns is what ``email_receipt`` takes first,
and building it checks the same on the two contracts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, cast

import celery
import celery.canvas

from celerykit.contract import Contract
from celerykit.errors import InvalidPayload
from celerykit.marks import is_made_of
from celerykit.sealing import SECRETS

if TYPE_CHECKING:
    from celerykit.result import Result

__all__ = ["Chain", "Signature", "check_join"]

A_contra = TypeVar("A_contra", contravariant=True)
Q = ParamSpec("Q")
R_co = TypeVar("R_co", covariant=True)
S = TypeVar("S")
S_co = TypeVar("S_co", covariant=True)


class _Sendable(Protocol[A_contra, Q, S_co]):
    """A task, plain or ``async def``, by what sending it takes and gives."""

    def delay(self, first: A_contra, /, *args: Q.args, **kwargs: Q.kwargs) -> Result[S_co]: ...


class _Joinable(Generic[R_co]):
    """What can be followed by another task."""

    if TYPE_CHECKING:

        def delay(self, *args: Any, **kwargs: Any) -> Result[R_co]: ...
        def apply_async(self, args: Any = ..., kwargs: Any = ..., **options: Any) -> Result[R_co]: ...

    def then(self, task: _Sendable[R_co, Q, S], /, *args: Q.args, **kwargs: Q.kwargs) -> Chain[S]:
        """
        Make a chain in which *task* gets this result as its first argument.

        Args:
            *args, **kwargs:
                The other arguments of *task*; all that it requires.

        Raises:
            InvalidPayload: They do not fit, or *task* cannot take this result.
        """
        after: Any = task
        check_join(_contract_of(self), after.contract)
        written = after.contract.dump(args, kwargs, skip=1)
        make: Any = Signature
        return Chain(cast("Any", self), make(after, *written, app=after.app))


class Signature(_Joinable[R_co], celery.canvas.Signature, Generic[R_co]):  # type: ignore[misc]
    """Celery's signature of one task, made by `Task.s` with its arguments checked."""

    def clone(self, args: Any = None, kwargs: Any = None, **options: Any) -> Signature[R_co]:
        """Copy this signature, with more arguments in front and more options."""
        stock: Any = super().clone(args, kwargs, **options)
        copy: Any = type(self)(stock, app=stock._app)
        copy._type = stock._type
        return cast("Signature[R_co]", copy)

    # Celery's other name for it, which would stay Celery's own `clone`.
    partial = clone


class Chain(_Joinable[R_co], celery.chain, Generic[R_co]):  # type: ignore[misc]
    """Celery's chain, which can be followed by another task."""


def check_join(before: Contract | None, after: Contract | None) -> None:
    """
    Refuse to put *after* behind *before* when no result of the one can be an argument of the other.

    Compared is what travels, as JSON Schema: what may fit passes, and is
    checked again with the value.

    Raises:
        InvalidPayload: They cannot meet.
    """
    if before is None or after is None:
        return
    name = _first_parameter(after)
    if name is None:
        raise _cannot_meet(before, after, "takes no argument that a result could be")
    if is_made_of(before.returns, SECRETS) and name in after.types and not is_made_of(after.types[name], SECRETS):
        raise _cannot_meet(before, after, f"argument {name!r} is no secret, and would be the encrypted text")
    given, wanted = before.result_schema(), after.parameter_schema(name)
    if not _may_fit(_kinds(given, given), _kinds(wanted, wanted)):
        raise _cannot_meet(before, after, f"argument {name!r} takes {_named(wanted)}")
    missing = _required(wanted) - _properties(given)
    if missing and _properties(given) and not _is_open(given) and not after.has_aliases(name):
        raise _cannot_meet(before, after, f"argument {name!r} needs {', '.join(sorted(missing))}")


def _cannot_meet(before: Contract, after: Contract, why: str) -> InvalidPayload:
    returned = _named(before.result_schema())
    return InvalidPayload(
        f"{after.task}: {why}, but {before.task} returns {returned}. The chain was not built.", after.task
    )


def _first_parameter(contract: Contract) -> str | None:
    parameters = contract.parameters
    return parameters.positional[0] if parameters.positional else parameters.var_positional


def _contract_of(sig: Any) -> Contract | None:
    last = sig.tasks[-1] if isinstance(sig, celery.chain) else sig
    return getattr(last.type, "contract", None)


_Schema = Mapping[str, Any]


def _resolved(schema: _Schema, root: _Schema) -> _Schema:
    reference = schema.get("$ref")
    return root["$defs"][reference.rpartition("/")[2]] if reference else schema


def _kinds(schema: _Schema, root: _Schema) -> set[str]:
    """Give the JSON types that *schema* admits; none when it does not say."""
    schema = _resolved(schema, root)
    if "type" in schema:
        return {schema["type"]}
    choices = [_kinds(choice, root) for key in ("anyOf", "oneOf") for choice in schema.get(key, ())]
    return set().union(*choices) if all(choices) else set()


def _may_fit(given: set[str], wanted: set[str]) -> bool:
    if not given or not wanted:
        return True
    # A whole number is a number too.
    return bool(given & wanted) or ("integer" in given and "number" in wanted)


def _required(schema: _Schema) -> set[str]:
    return set(_resolved(schema, schema).get("required", ()))


def _is_open(schema: _Schema) -> bool:
    return bool(_resolved(schema, schema).get("additionalProperties"))


def _properties(schema: _Schema) -> set[str]:
    return set(_resolved(schema, schema).get("properties", ()))


def _named(schema: _Schema) -> str:
    title = _resolved(schema, schema).get("title") if "$ref" in schema or "properties" in schema else None
    return str(title) if title else " or ".join(sorted(_kinds(schema, schema))) or "a value of any type"
