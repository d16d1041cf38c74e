"""
A task's contract: what it may be called with, and what it gives back.

It is built once, when a task is declared, from the function's signature. Both
ends of a queue use it: the caller checks arguments and writes them as JSON, the
worker reads them back into the same types; with results it is the other way
round.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from pydantic import ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic_core import PydanticSerializationError, to_jsonable_python

from celerykit.annotations import NOTHING, fields_of_parameters, fields_of_result, hints_of, name_of
from celerykit.ciphers import Cipher, Undecipherable
from celerykit.errors import InvalidPayload, Problem, ResultMismatch
from celerykit.fields import Fields
from celerykit.marks import RESULT, Redact, names_of
from celerykit.parameters import BindingError, Parameters
from celerykit.sealing import NO_KEYS, SECRETS

__all__ = ["Contract"]

#: More problems than this are counted, not listed: a message is read by a person.
_SHOWN_PROBLEMS = 5

#: What pydantic raises for a value that it cannot write, a `TypeError` for one that cannot be a key, and what is
#: raised for a secret that cannot be read.
_NOT_WRITABLE = (PydanticSerializationError, UnicodeError, TypeError, Undecipherable)

_NEEDS_KEYS = (
    "holds a SecretStr, which JSON would turn into asterisks; set CELERYKIT_SECRET_KEYS to send it encrypted "
    "(pip install 'celerykit[crypto]'), or send a reference to the secret instead"
)
_ENCRYPTED_ONLY = "a secret travels encrypted only, and that needs CELERYKIT_SECRET_KEYS"
_UNSEALED = (
    "holds a SecretStr in something that has a serializer of its own, and so cannot be encrypted; take the serializer "
    "away, or send a reference to the secret instead"
)

_NOT_SENT = "The message was not sent."
_NOT_RUN = "The task did not run."

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_Conversion = Callable[[Mapping[str, Any]], dict[str, Any]]


class Contract:
    """
    The typed signature of one task.

    Arguments keep the shape in which they came (by position or by name), so
    that a message is what stock Celery would have sent.

    Args:
        task:
            The task's name, for messages.

        function:
            What is read; annotations may be strings.

        drop_first:
            Whether the first parameter is the task itself.

        strict:
            Whether values must be of their types, without conversions.

        namespace:
            Names that string annotations may use beside the function's
            module, such as those of the function it is declared in.
    """

    def __init__(
        self,
        task: str,
        function: Callable[..., Any],
        *,
        drop_first: bool = False,
        strict: bool = False,
        namespace: Mapping[str, Any] | None = None,
    ) -> None:
        self.task = task
        self.parameters = Parameters.of(function, drop_first=drop_first)
        hints = hints_of(task, function, namespace)
        self.returns = hints.get("return", inspect.Parameter.empty)
        self._fields = fields_of_parameters(task, hints, self.parameters, strict=strict)
        self._result = fields_of_result(task, self.returns)
        self._cipher: Callable[[], Cipher | None] = lambda: None
        self._all_typed = len(self._fields.types) == len(self.parameters.names)

    def __repr__(self) -> str:
        return f"<Contract of {self.task}>"

    @property
    def types(self) -> Mapping[str, Any]:
        """The types of the parameters that have one."""
        return self._fields.types

    @property
    def returns_nothing(self) -> bool:
        """Whether the task says that it has no result (``-> None``)."""
        return self.returns in NOTHING

    # The caller's side

    def dump(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, skip: int = 0) -> Arguments:
        """
        Check the arguments of a call, and write them as JSON values.

        May be done twice: what it returns passes, and comes back the same.

        Args:
            skip:
                How many positional parameters will be filled later, in front.

        Raises:
            InvalidPayload: with every problem.
        """
        return self._dump(args, kwargs, self._fields.read, skip=skip)

    def dump_partial(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """
        Check and write as much of a call as is known.

        The arguments of a signature that is not complete may stand further
        right than where they are, because results are put in front of them.
        The first place at which their types fit as they are is taken, or else
        the first at which they can be made to fit.

        Raises:
            InvalidPayload: when they fit nowhere.
        """
        places = range(max(1, len(self.parameters.positional) - len(args) + 1))
        for read in (self._fields.read_exactly, self._fields.read):
            for skip in places:
                with suppress(InvalidPayload):
                    return self._dump(args, kwargs, read, skip=skip, partial=True)
        return self._dump(args, kwargs, self._fields.read, partial=True)

    def canonical(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """
        Write a call's arguments in the one way that all its spellings share.

        JSON values by parameter name, in the order of declaration, with
        defaults filled in. Secrets are left out: all of them are asterisks.

        Raises:
            InvalidPayload: with every problem.
        """
        values = self._bind(args, kwargs, says=_NOT_SENT)
        values = {**self._written_defaults, **self._written(values, is_canonical=True)}
        try:
            return {name: to_jsonable_python(values[name]) for name in self.parameters.names if name in values}
        except _NOT_WRITABLE as error:
            raise self._refusal([_unsendable(error)], says=_NOT_SENT) from None

    # The worker's side

    def load(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """
        Read the arguments of a message into their types.

        Raises:
            InvalidPayload: with every problem.
        """
        values = self._bind(args, kwargs, says=_NOT_RUN)
        try:
            values |= self._fields.load(self._typed(values))
        except ValidationError as error:
            raise self._refusal(_problems(error), says=_NOT_RUN) from None
        except _NOT_WRITABLE as error:
            raise self._refusal([_unsendable(error)], says=_NOT_RUN) from None
        return self.parameters.unbind(values, args, kwargs)

    # Results

    def dump_result(self, value: Any) -> Any:
        """
        Check what the function returned, and write it as a JSON value.

        Raises:
            ResultMismatch: The function has run; its effects are there.
        """
        if self._result is None:
            return value
        try:
            return self._result.dump(self._result.read({"return": value}))["return"]
        except (ValidationError, *_NOT_WRITABLE) as error:
            raise self._mismatch("returned", value, error) from None

    def load_result(self, value: Any) -> Any:
        """
        Read a stored result into the return type.

        Raises:
            ResultMismatch: with the stored value.
        """
        if self._result is None:
            return value
        try:
            return self._result.load({"return": value})["return"]
        except (ValidationError, *_NOT_WRITABLE) as error:
            raise self._mismatch("has stored", value, error) from None

    # What others may want to know

    @cached_property
    def fingerprint(self) -> str:
        """
        Twelve hexadecimal digits that change when the contract does.

        Taken over the JSON Schema of parameters and return type; another
        version of pydantic may write the same schema in other words.
        """
        described = json.dumps([self.describe(), list(self.parameters.required)], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:12]

    @cached_property
    def redacted(self) -> frozenset[str]:
        """The names of what is marked ``Redact()``, in the parameters and in the result."""
        returned = {RESULT: self.returns} if self._result else {}
        return names_of({**self._fields.types, **returned}, Redact, kinds=SECRETS)

    def describe(self) -> dict[str, Any]:
        """Give the JSON Schema of each parameter, and of ``return``; ``{}`` for what is not typed."""
        described = {name: self.parameter_schema(name) for name in self.parameters.names}
        return {**described, "return": self.result_schema()}

    def parameter_schema(self, name: str) -> dict[str, Any]:
        """Give the JSON Schema of one parameter."""
        return _schema(self._fields, name) if name in self._fields.types else {}

    def has_aliases(self, name: str) -> bool:
        """Tell whether one parameter can be written with other names than its fields have."""
        return self._fields.has_aliases(name)

    def result_schema(self) -> dict[str, Any]:
        """Give the JSON Schema of the result."""
        if self.returns_nothing:
            return {"type": "null"}
        return _schema(self._result, "return", of_output=True) if self._result else {}

    # Secrets

    @cached_property
    def has_secrets(self) -> bool:
        """Whether a parameter's type, or the return type, holds a ``SecretStr`` or the like."""
        return any(fields.has_secrets for fields in self._all_fields)

    def with_cipher(self, cipher: Callable[[], Cipher | None]) -> Contract:
        """Give the same contract, whose secrets are encrypted with what *cipher* gives when there are some."""
        if not self.has_secrets:
            return self
        contract = copy.copy(self)
        contract._cipher = cipher
        contract._fields = self._fields.with_cipher(cipher)
        contract._result = self._result and self._result.with_cipher(cipher)
        return contract

    def check_secrets(self) -> None:
        """
        Refuse to send what cannot be encrypted.

        Raises:
            InvalidPayload: A parameter's type, or the return type, holds a ``SecretStr``, and there are no keys; or
                a serializer of the user's would write it.
        """
        if not self.has_secrets:
            return
        if unsealed := [name for fields in self._all_fields for name in fields.unsealed]:
            raise self._refusal([_secret(unsealed[0], _UNSEALED)], says=_NOT_SENT)
        if self._cipher() is None:
            secret = next(name for fields in self._all_fields for name in fields.secrets)
            raise self._refusal([_secret(secret, _NEEDS_KEYS)], says=_NOT_SENT)

    def secret_values(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Give the secrets that are in arguments which `load` has read, as they are."""
        if not self._fields.has_secrets:
            return []
        return self._fields.secret_values(self._typed(self.parameters.bind(args, kwargs)))

    @property
    def _all_fields(self) -> list[Fields]:
        return [self._fields, *([self._result] if self._result else [])]

    def refuse(self, problems: list[Problem]) -> InvalidPayload:
        """Make the error for a call that was refused before it was sent."""
        return self._refusal(problems, says=_NOT_SENT)

    # Behind them

    @cached_property
    def _written_defaults(self) -> dict[str, Any]:
        return {name: self._written_default(name, value) for name, value in self.parameters.defaults.items()}

    def _written_default(self, name: str, value: Any) -> Any:
        try:
            return self._written({name: value}, is_canonical=True)[name]
        except InvalidPayload:
            # Python does not check defaults (`order: Order = None`), and nor does a call that leaves them out.
            return to_jsonable_python(value, fallback=repr)

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, says: str, **how: Any) -> dict[str, Any]:
        try:
            return self.parameters.bind(args, kwargs, **how)
        except BindingError as error:
            raise self._refusal(error.problems, says=says) from None

    def _dump(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        read: _Conversion,
        *,
        skip: int = 0,
        partial: bool = False,
    ) -> Arguments:
        values = self._bind(args, kwargs, says=_NOT_SENT, skip=skip, partial=partial)
        return self.parameters.unbind(self._written(values, read=read), args, kwargs, skip=skip)

    def _written(
        self, values: dict[str, Any], *, read: _Conversion | None = None, is_canonical: bool = False
    ) -> dict[str, Any]:
        read, write = read or self._fields.read, self._fields.canonical if is_canonical else self._fields.dump
        try:
            typed = read(self._typed(values))
            written = write(typed)
            # Asterisks are not to be read again; and what is canonical is sent, too, and looked at then.
            changed = [] if is_canonical and self._fields.has_secrets else self._fields.changed(typed, written)
        except ValidationError as error:
            raise self._refusal(_problems(error), says=_NOT_SENT) from None
        except _NOT_WRITABLE as error:
            raise self._refusal([_unsendable(error)], says=_NOT_SENT) from None
        if changed:
            raise self._refusal([_ambiguous(name) for name in changed], says=_NOT_SENT)
        return values | written

    def _typed(self, values: dict[str, Any]) -> dict[str, Any]:
        if self._all_typed:
            return values
        return {name: value for name, value in values.items() if name in self._fields.types}

    def _refusal(self, problems: list[Problem], *, says: str) -> InvalidPayload:
        shown = "; ".join(map(_sentence, problems[:_SHOWN_PROBLEMS]))
        more = len(problems) - _SHOWN_PROBLEMS
        rest = f"; and {more} more" if more > 0 else ""
        return InvalidPayload(f"{self.task}: {shown}{rest}. {says}", self.task, problems)

    def _mismatch(self, verb: str, value: Any, error: Exception) -> ResultMismatch:
        problems = _problems(error) if isinstance(error, ValidationError) else [_unsendable(error)]
        what = "; ".join(_sentence(problem) for problem in problems[:_SHOWN_PROBLEMS])
        return ResultMismatch(
            f"{self.task}: {verb} a value that is not of its return type {name_of(self.returns)}: {what}.",
            self.task,
            value,
        )


def _schema(fields: Fields, name: str, *, of_output: bool = False) -> dict[str, Any]:
    try:
        return fields.json_schema(name, of_output=of_output)
    except PydanticInvalidForJsonSchema:
        return {"title": name_of(fields.types[name])}


def _problems(error: ValidationError) -> list[Problem]:
    return [
        {
            "loc": list(found["loc"]),
            "type": found["type"],
            "msg": f"{_message(found)} (got {type(found['input']).__name__})",
        }
        for found in error.errors(include_url=False, include_context=False)
    ]


def _message(found: Any) -> str:
    # The one message of pydantic's that quotes what it was given.
    return "Input has an unknown tag" if found["type"] == "union_tag_invalid" else str(found["msg"])


def _ambiguous(name: str) -> Problem:
    return {
        "loc": [name],
        "type": "ambiguous",
        "msg": "would arrive as another type of its union, which JSON cannot tell apart; "
        "use models with a discriminator",
    }


def _secret(name: str, msg: str) -> Problem:
    return {"loc": [name], "type": "secret", "msg": msg}


def _unsendable(error: Exception) -> Problem:
    if isinstance(error, Undecipherable):
        return {"loc": [], "type": "undecipherable", "msg": f"a secret {error}"}
    if NO_KEYS in str(error):
        return {"loc": [], "type": "secret", "msg": _ENCRYPTED_ONLY}
    # The error's own words may quote the value.
    kind = "text or bytes that are not UTF-8" if "utf-8" in str(error).lower() else type(error).__name__
    return {"loc": [], "type": "not_json", "msg": f"the arguments cannot be written as JSON ({kind})"}


def _sentence(problem: Problem) -> str:
    where = ".".join(map(str, problem["loc"]))
    return f"argument {where!r}: {problem['msg']}" if where else str(problem["msg"])
