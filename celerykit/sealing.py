"""
Secrets in the core schema of a type: where they are, and what is written for them.

pydantic writes a ``SecretStr``, ``SecretBytes`` or ``Secret[T]`` as asterisks.
A sealed schema writes the JSON that the value would be, encrypted, as one text,
and reads that text where it reads a secret, and nowhere else: a text that was
moved into another field stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

from pydantic import Secret, SecretBytes, SecretStr, SerializationInfo, TypeAdapter
from pydantic_core import (
    CoreConfig,
    PydanticCustomError,
    PydanticSerializationError,
    PydanticSerializationUnexpectedValue,
    SchemaValidator,
    to_json,
)

from celerykit.ciphers import Cipher, Undecipherable, is_encrypted

__all__ = [
    "NO_KEYS",
    "SECRETS",
    "cannot_be_sealed",
    "copied",
    "inner",
    "is_secret",
    "mask",
    "names_secret",
    "reveal",
    "seal",
]

#: What the error of a value says that cannot be written without keys.
NO_KEYS = "a secret, and there is no CELERYKIT_SECRET_KEYS"

#: What holds functions of pydantic's, or a user's value, and no schemas.
_NO_SCHEMAS = ("metadata", "default")

#: The types that are secrets.
SECRETS = (SecretStr, SecretBytes, Secret)

_MASK = "**********"

#: Which of its parts a node hands its value on to, unchanged.
_HANDS_ON_TO = {
    "default": "schema",
    "nullable": "schema",
    "function-before": "schema",
    "function-after": "schema",
    "function-wrap": "schema",
    "lax-or-strict": "lax_schema",
}

_Node = dict[str, Any]


def inner(node: Mapping[str, Any]) -> Iterator[Any]:
    """Give what may hold schemas in a dict of a core schema, which is a schema itself, or has some by name."""
    is_schema = isinstance(node.get("type"), str)
    return (item for key, item in node.items() if not (is_schema and key in _NO_SCHEMAS))


def copied(node: Any, copy: Callable[[Any], Any]) -> Any:
    """Give a part of a core schema, with copies of what may hold schemas in it."""
    if isinstance(node, dict):
        is_schema = isinstance(node.get("type"), str)
        return {key: item if is_schema and key in _NO_SCHEMAS else copy(item) for key, item in node.items()}
    return type(node)(map(copy, node)) if isinstance(node, list | tuple) else node


def is_secret(node: Mapping[str, Any]) -> bool:
    """Tell whether a node is what pydantic makes of a secret."""
    if node.get("type") != "json-or-python" or node["json_schema"].get("type") != "function-after":
        return False
    python = node["python_schema"]
    # A `Secret[T]` has no class in its schema: what it has is a function that is made for each.
    return _code_of(python) is _code_of_generic() or any(map(names_secret, python.get("choices", ())))


def names_secret(node: Mapping[str, Any]) -> bool:
    """Tell whether a node speaks of the class of a secret."""
    return any(isinstance(item, type) and issubclass(item, SECRETS) for item in node.values())


def seal(schema: Any, *, cipher: Callable[[], Cipher | None], config: CoreConfig, exactly: bool = False) -> Any:
    """
    Copy a core schema, with secrets that are written encrypted, and read both ways.

    Args:
        cipher:
            Gives the one to use, when there is something to encrypt or
            decrypt; ``None`` where there are no keys.

        config:
            For the values inside of secrets.

        exactly:
            Whether plain text is no secret.
    """
    return _Sealed(schema, cipher, config, exactly=exactly).schema


def mask(schema: Any) -> Any:
    """Copy a core schema, with secrets that are all written as the same text."""
    write = {"type": "function-plain", "function": _masked, "info_arg": True}
    return _with_secrets(schema, lambda node, **_: {**node, "serialization": write})


def _masked(value: Any, info: SerializationInfo) -> Any:
    return _MASK if info.mode == "json" else value


def reveal(schema: Any) -> Any:
    """Copy a core schema, with secrets that are put into the context, a list, when they are written."""
    write = {"type": "function-plain", "function": _revealed, "info_arg": True}
    return _with_secrets(schema, lambda node, **_: {**node, "serialization": write})


def _revealed(value: Any, info: SerializationInfo) -> None:
    if isinstance(value, SECRETS) and isinstance(info.context, list):
        info.context.append(value.get_secret_value())


def cannot_be_sealed(schema: Any) -> bool:
    """Tell whether there is a secret that something else writes: a serializer of the user's around it."""
    definitions = {node["ref"]: node for node in schema.get("definitions", ())}
    sealed = _with_secrets(schema, lambda _, **__: {"type": "none", "sealed": True})
    return any(
        names_secret(node) or (_is_users(node.get("serialization")) and _holds_sealed(node, definitions))
        for node in _nodes(sealed)
    )


class _Sealed:
    def __init__(self, schema: Any, cipher: Callable[[], Cipher | None], config: CoreConfig, *, exactly: bool) -> None:
        self._cipher = cipher
        self._config = config
        self._is_exact = exactly
        self.schema = _with_secrets(schema, self._seal)

    def _seal(self, node: _Node, *, is_in_union: bool) -> _Node:
        decrypted = partial(self._decrypted, is_in_union=is_in_union)
        as_json = {"type": "json", "schema": node["json_schema"]}
        return {
            **node,
            "json_schema": _before(partial(_as_json, decrypted), as_json),
            "python_schema": _before(self._reader(as_json, decrypted), node["python_schema"]),
            "serialization": {
                "type": "function-wrap",
                "function": self._write,
                "schema": node["json_schema"]["schema"],
            },
        }

    def _write(self, value: Any, write: Callable[[Any], Any]) -> str:
        if not isinstance(value, SECRETS):
            raise PydanticSerializationUnexpectedValue("Expected a secret")
        written = to_json(write(value.get_secret_value()), inf_nan_mode="constants")
        cipher = self._cipher()
        if cipher is None:
            raise PydanticSerializationError(NO_KEYS)
        return cipher.encrypt(written)

    def _reader(self, as_json: _Node, decrypted: Callable[[str], bytes]) -> Callable[[Any], Any]:
        """Make what reads a secret among Python values: of a list, some may have been written already."""

        @cache
        def validator() -> SchemaValidator:
            definitions = self.schema.get("definitions", [])
            schema: Any = {"type": "definitions", "schema": as_json, "definitions": definitions}
            return SchemaValidator(schema, self._config, _use_prebuilt=False)

        def read(value: Any) -> Any:
            if is_encrypted(value):
                return validator().validate_python(decrypted(value))
            if self._is_exact and not isinstance(value, SECRETS):
                raise PydanticCustomError("secret_type", "Input should be a secret")
            return value

        return read

    def _decrypted(self, text: str, *, is_in_union: bool) -> bytes:
        try:
            cipher = self._cipher()
            if cipher is None:
                raise Undecipherable("is encrypted, and CELERYKIT_SECRET_KEYS is not set here")
            return cipher.decrypt(text)
        except Undecipherable as error:
            if is_in_union:
                # Not an error of pydantic's: it would go on to the next type, and that may take any text.
                raise
            raise PydanticCustomError("undecipherable", "{why}", {"why": f"Input {error}"}) from None


def _as_json(decrypted: Callable[[str], bytes], value: Any) -> bytes:
    return decrypted(value) if is_encrypted(value) else to_json(value, inf_nan_mode="constants")


def _before(function: Callable[[Any], Any], schema: Any) -> _Node:
    return {"type": "function-before", "function": {"type": "no-info", "function": function}, "schema": schema}


def _with_secrets(node: Any, change: Callable[..., _Node], *, is_in_union: bool = False) -> Any:
    """Copy a core schema, with what *change* makes of its secrets, and without serializers of a secret alone."""
    here = (isinstance(node, dict) and node.get("type") == "union") or is_in_union
    copy = copied(node, partial(_with_secrets, change=change, is_in_union=here))
    if not isinstance(node, dict):
        return copy
    if is_secret(node):
        return change(copy, is_in_union=is_in_union)
    if _is_users(node.get("serialization")) and _leads_to_secret(node):
        # Mostly one that writes the value as it is, for want of encryption.
        del copy["serialization"]
    return copy


def _leads_to_secret(node: Any) -> bool:
    while node.get("type") in _HANDS_ON_TO:
        node = node[_HANDS_ON_TO[node["type"]]]
    return is_secret(node)


def _is_users(serialization: Any) -> bool:
    function = (serialization or {}).get("function")
    return function is not None and not str(getattr(function, "__module__", "")).startswith("pydantic.")


def _holds_sealed(schema: Any, definitions: Mapping[str, Any]) -> bool:
    waiting, seen = [schema], set[str]()
    while waiting:
        for node in _nodes(waiting.pop()):
            if node.get("sealed"):
                return True
            ref = str(node.get("schema_ref"))
            if ref in definitions and ref not in seen:
                seen.add(ref)
                waiting.append(definitions[ref])
    return False


def _nodes(schema: Any) -> Iterator[_Node]:
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += inner(node)
        elif isinstance(node, list | tuple):
            waiting += node


def _code_of(node: Mapping[str, Any]) -> Any:
    function = node.get("function")
    return getattr(function.get("function"), "__code__", None) if isinstance(function, Mapping) else None


@cache
def _code_of_generic() -> Any:
    schema: Any = TypeAdapter(Secret[str]).core_schema
    return _code_of(schema["python_schema"])
