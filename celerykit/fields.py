"""
Named values with types, to and from plain JSON values: what a contract is made of.

Two readings of a value exist. A caller hands over Python values (a model, a
``datetime``, ``bytes``) or, the second time a call passes, what the first time
made of them; a worker is handed JSON values only. They differ where one JSON
type stands for two Python types: a ``str`` for a ``bytes`` field is base64 in
JSON, and in strict mode only JSON may write a ``datetime`` as text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from datetime import datetime, time
from functools import cached_property, partial
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic_core import CoreConfig, SchemaSerializer, SchemaValidator, to_json
from typing_extensions import TypedDict

from celerykit.ciphers import Cipher
from celerykit.sealing import cannot_be_sealed, copied, inner, is_secret, mask, names_secret, reveal, seal

__all__ = ["Fields"]

_CONFIG = CoreConfig(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants")

#: Core schemas of values that JSON cannot carry, and what to write instead.
_UNSENDABLE = {
    "callable": "a function cannot travel in a message; send its name",
    "is-subclass": "a class cannot travel in a message; send its name",
    "generator": "an iterator can be read once only, and a call is read more often; use list[...]",
}


class Fields:
    """
    A set of named, typed values.

    Everything pydantic has to prepare is prepared when this is made.

    Args:
        types:
            The type of each name. Raises what pydantic raises for a type it
            does not know.

        strict:
            Whether values must be of their types, without pydantic's
            conversions (``"10"`` for an ``int``).

        cipher:
            Gives what secrets are encrypted with, when there is one to write
            or to read; ``None`` where there are no keys.
    """

    def __init__(
        self, types: Mapping[str, Any], *, strict: bool = False, cipher: Callable[[], Cipher | None] = lambda: None
    ) -> None:
        self.types = dict(types)
        self.strict = strict or None
        self._cipher = cipher
        self._adapter: TypeAdapter[dict[str, Any]] = _adapter(self.types)
        schema = self._schema = _configured(self._adapter.core_schema)
        self.has_secrets = _holds(schema, _is_secret)
        if self.has_secrets:
            schema = seal(schema, cipher=cipher, config=_CONFIG)
        # Not the validators and serializers that models have built for themselves: those know their own
        # configuration only.
        self._serializer = SchemaSerializer(schema, _CONFIG, _use_prebuilt=False)
        validator = SchemaValidator(schema, _CONFIG, _use_prebuilt=False)
        self._validate_python = validator.validate_python
        self._validate_json = validator.validate_json
        # Not those that pydantic makes secrets of: there is one way to write them.
        self._has_unions = _holds(self._schema, partial(_is_of_type, "union"), beside=is_secret)
        self._reads_twice = bool(strict) or self._has_unions or _holds(schema, _reads_json_differently)

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """
        Validate what a caller handed over: Python values, or what `dump` made.

        A value that is made of JSON types only is read as JSON where the two
        readings differ; `dump` of what was read twice is the same as once.
        """
        if not self._reads_twice:
            return cast("dict[str, Any]", self._validate_python(cast("Any", values), by_alias=True, by_name=True))
        plain = {name: value for name, value in values.items() if _is_plain(value)}
        python = {name: value for name, value in values.items() if name not in plain}
        return {
            **self._validate_json(_as_json(plain), strict=self.strict, by_alias=True, by_name=True),
            **self._validate_python(cast("Any", python), strict=self.strict, by_alias=True, by_name=True),
        }

    def read_exactly(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Validate Python values that are of their types already."""
        return cast(
            "dict[str, Any]", self._validate_exactly(cast("Any", values), strict=True, by_alias=True, by_name=True)
        )

    def load(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Validate what came out of a message or a result: JSON values."""
        return cast(
            "dict[str, Any]", self._validate_json(_as_json(values), strict=self.strict, by_alias=True, by_name=True)
        )

    def changed(self, values: Mapping[str, Any], written: Mapping[str, Any]) -> list[str]:
        """
        Name those of *values* that would not be loaded as the types they are.

        In a union two types may be one in JSON: of ``str | bytes``, all are
        ``str``.
        """
        if not self._has_unions:
            return []
        loaded = self.load(written)
        return [name for name, value in values.items() if not _are_of_one_type(value, loaded[name])]

    def dump(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """
        Write validated *values* as plain JSON values.

        A model that was changed into something invalid after it was validated
        is an error here, not in a worker.
        """
        return cast(
            "dict[str, Any]",
            self._serializer.to_python(values, mode="json", round_trip=True, by_alias=False, warnings="error"),
        )

    def canonical(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """
        Write validated *values* as `dump` does, with the items of sets in order.

        A set has no order of its own, and another one in each process. All
        secrets are the same asterisks: encrypted, they are different each time.
        """
        python = self._masking.to_python(values, round_trip=True, by_alias=False)
        written = self._masking.to_python(values, mode="json", round_trip=True, by_alias=False, warnings="error")
        return cast("dict[str, Any]", _with_sets_in_order(written, python))

    def secret_values(self, values: Mapping[str, Any]) -> list[Any]:
        """Give the secrets that are in validated *values*, as they are."""
        if not self.has_secrets:
            return []
        found: list[Any] = []
        self._revealing.to_python(values, round_trip=True, context=found)
        return found

    @cached_property
    def secrets(self) -> list[str]:
        """The names whose types hold a ``SecretStr``, which needs encryption."""
        return self._names_that_hold(_is_secret) if self.has_secrets else []

    @cached_property
    def unsealed(self) -> list[str]:
        """Those whose secrets are written by a serializer of the user's, and so cannot be encrypted."""
        return [name for name in self.secrets if cannot_be_sealed(_adapter({name: self.types[name]}).core_schema)]

    def with_cipher(self, cipher: Callable[[], Cipher | None]) -> Fields:
        """Give the same with another cipher."""
        return Fields(self.types, strict=bool(self.strict), cipher=cipher) if self.has_secrets else self

    @cached_property
    def unsendable(self) -> dict[str, str]:
        """The names whose types no message can carry, with the reason."""
        return {
            name: reason
            for kind, reason in _UNSENDABLE.items()
            for name in self._names_that_hold(partial(_is_of_type, kind))
        }

    @cached_property
    def excluded(self) -> list[str]:
        """The names whose types have a field that is never written (``exclude=True``)."""
        return self._names_that_hold(lambda node: node.get("serialization_exclude") is True)

    def has_aliases(self, name: str) -> bool:
        """Tell whether a field of *name* goes by another name too."""
        return name in self._names_that_hold(lambda node: bool(node.get("validation_alias")))

    def json_schema(self, name: str, *, of_output: bool = False) -> dict[str, Any]:
        """Describe *name* as JSON Schema, as it is read or, *of_output*, as it is written."""
        whole = self._adapter.json_schema(mode="serialization" if of_output else "validation", by_alias=False)
        schema = dict(whole["properties"][name])
        if "$defs" in whole:
            schema["$defs"] = whole["$defs"]
        return schema

    @cached_property
    def _masking(self) -> SchemaSerializer:
        if not self.has_secrets:
            return self._serializer
        return SchemaSerializer(mask(self._schema), _CONFIG, _use_prebuilt=False)

    @cached_property
    def _revealing(self) -> SchemaSerializer:
        return SchemaSerializer(reveal(self._schema), _CONFIG, _use_prebuilt=False)

    @cached_property
    def _validate_exactly(self) -> Callable[..., Any]:
        if not self.has_secrets:
            return self._validate_python
        # Any text would be a secret, and a text that is not at its place would be encrypted.
        schema = seal(self._schema, cipher=self._cipher, config=_CONFIG, exactly=True)
        return SchemaValidator(schema, _CONFIG, _use_prebuilt=False).validate_python

    def _names_that_hold(self, wanted: Callable[[Mapping[str, Any]], bool]) -> list[str]:
        if not _holds(self._adapter.core_schema, wanted):
            return []
        # Which one it is costs an adapter for each, and is asked for only to refuse.
        return [name for name, type_ in self.types.items() if _holds(_adapter({name: type_}).core_schema, wanted)]


def _adapter(types: Mapping[str, Any]) -> TypeAdapter[dict[str, Any]]:
    # A typed dict rather than a model: its keys may have any name ("copy", "_id", "model_config").
    # total=False: which arguments are missing is the business of `Parameters`.
    make: Any = TypedDict
    arguments = make("Arguments", dict(types), total=False)
    arguments.__pydantic_config__ = ConfigDict(extra="forbid")
    return TypeAdapter(arguments)


def _configured(node: Any) -> Any:
    """
    Copy a core schema, with our configuration where a model's author left it open.

    pydantic writes bytes as UTF-8 and NaN as null, unless a model says otherwise.
    """
    copy = copied(node, _configured)
    if isinstance(node, dict) and node.get("type") in ("model", "dataclass", "typed-dict"):
        copy["config"] = {**_CONFIG, **(node.get("config") or {})}
    return copy


def _as_json(values: Mapping[str, Any]) -> bytes:
    # A stock producer may have sent what kombu's JSON marks with "__type__" (a datetime, bytes, ...),
    # and kombu has made Python values of it already.
    return to_json(values, bytes_mode="base64", inf_nan_mode="constants")


def _are_of_one_type(one: Any, other: Any) -> bool:
    if isinstance(one, datetime | time):  # whose time zones JSON replaces
        return isinstance(other, datetime | time)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return all(map(_are_of_one_type, one.values(), other.values()))
    if isinstance(one, list | tuple):
        return all(map(_are_of_one_type, one, other))
    if isinstance(one, BaseModel) or is_dataclass(one):
        return all(map(_are_of_one_type, vars(one).values(), vars(other).values()))
    return True


def _is_plain(value: Any) -> bool:
    if value is None or type(value) in (str, int, float, bool):
        return True
    if type(value) is list:
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    return False


def _with_sets_in_order(written: Any, python: Any) -> Any:
    """Sort in *written*, JSON, what is a set in *python*, the same values."""
    if isinstance(python, dict):
        if len(written) != len(python):  # its keys are secrets, and all the same in JSON
            return written
        return {
            key: _with_sets_in_order(written[key], item) for key, item in zip(written, python.values(), strict=True)
        }
    if isinstance(python, list | tuple):
        return [_with_sets_in_order(*pair) for pair in zip(written, python, strict=True)]
    if isinstance(python, set | frozenset):
        items = [_with_sets_in_order(*pair) for pair in zip(written, python, strict=True)]
        return sorted(items, key=lambda item: json.dumps(item, sort_keys=True))
    return written


def _is_of_type(kind: str, node: Mapping[str, Any]) -> bool:
    return node.get("type") == kind


def _reads_json_differently(node: Mapping[str, Any]) -> bool:
    # A `json-or-python` schema may take no JSON value where it reads Python.
    return node.get("type") in ("bytes", "json-or-python")


def _is_secret(node: Mapping[str, Any]) -> bool:
    return is_secret(node) or names_secret(node)


def _nothing(node: Mapping[str, Any]) -> bool:
    return False


def _holds(
    schema: Any,
    wanted: Callable[[Mapping[str, Any]], bool],
    *,
    beside: Callable[[Mapping[str, Any]], bool] = _nothing,
) -> bool:
    """Tell whether any part of a core schema is *wanted*; what is in parts *beside* it does not count."""
    stack = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if beside(node):
                continue
            if wanted(node):
                return True
            stack += [item for item in inner(node) if item is not node.get("serialization")]
        elif isinstance(node, list | tuple):
            stack += node
    return False
