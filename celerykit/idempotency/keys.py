"""
How a call's key is written.

A key is ``<task>:<32 hexadecimal digits>``: the first half of SHA-256 over a
JSON text without spaces, in ASCII, with sorted names, of one of

- ``{"fields": {"<path>": <value>, …}}`` for what `Key` marks: the path's steps
  with dots between them, and the value as JSON
- ``{"arguments": {"<parameter>": <value>, …}}`` when nothing is marked
- ``{"key": "<text>"}`` for one that was given, or that a function made
- ``{"id": "<task id>"}`` for a call that is remembered by its id

Values are those of `Contract.canonical`: validated, with defaults, by name. So
a key is the same for every spelling of a call, in every process, and does not
depend on the order of fields. Secrets have no part in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple
from uuid import UUID

from celerykit.contract import Contract
from celerykit.errors import InvalidContract, InvalidOptions
from celerykit.idempotency.policy import Key, Once
from celerykit.marks import Path, is_made_of, marked, paths_of, values_at
from celerykit.sealing import SECRETS

__all__ = ["Identity", "Keys", "check_marks", "key_by_id"]


class Identity(NamedTuple):
    """
    What a call is to the store.

    Attributes:
        key:
            ``<task>:<digest>``.

        call:
            A digest of all arguments, with the contract they fit: two calls
            with one key must not differ in it. Empty where the key says all.
    """

    key: str
    call: str = ""


class Keys:
    """Writes the keys of one task's calls."""

    def __init__(self, contract: Contract, policy: Once) -> None:
        self._contract = contract
        self._policy = policy

    @cached_property
    def _paths(self) -> tuple[Path, ...]:
        return paths_of(self._contract.types, Key)

    def identify(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, key: Any = None) -> Identity:
        """
        Give the identity of a call.

        Args:
            args, kwargs:
                Typed, or as JSON.

            key:
                What the sender gave as the key.

        Raises:
            InvalidPayload: They do not fit.

            InvalidOptions: The key cannot be one.
        """
        values = self._contract.canonical(args, kwargs)
        make = self._policy.key if key is None else None
        if make is not None:
            typed = self._contract.load(*self._contract.dump(args, kwargs))
            key = make(**self._contract.parameters.named_by(make, *typed))
        if make is not None or key is not None:
            return self._of({"key": _text(self._contract.task, key)}, values)
        if not self._paths:
            return Identity(f"{self._contract.task}:{_digest({'arguments': values})}")
        fields = {".".join(map(str, path)): values_at(values, path) for path in self._paths}
        if all(value is None for value in fields.values()):
            # It would be the key of all such calls.
            raise InvalidOptions(
                f"{self._contract.task}: nothing that is marked with Key() has a value ({', '.join(fields)}). "
                "The message was not sent; give a key with task.using(key=…)."
            )
        return self._of({"fields": fields}, values)

    def _of(self, said: Mapping[str, Any], values: Mapping[str, Any]) -> Identity:
        call = f"{self._contract.fingerprint}:{_digest(values)[:16]}"
        return Identity(f"{self._contract.task}:{_digest(said)}", call)


def check_marks(contract: Contract) -> None:
    """
    Refuse a `Key` on a secret, which no key is made of.

    Raises:
        InvalidContract: There is one.
    """
    if not contract.has_secrets:
        return
    for path, annotation in marked(contract.types, Key):
        if is_made_of(annotation, SECRETS):
            raise InvalidContract(
                f"{contract.task}: Key() stands on a secret, {'.'.join(map(str, path))}; a key can be read by whoever "
                "lists keys, so mark something else, such as an id."
            )


def key_by_id(task: str, call_id: str) -> Identity:
    """Give the identity of a call that is remembered by its id."""
    return Identity(f"{task}:{_digest({'id': call_id})}")


def _digest(value: Any) -> str:
    written = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(written.encode()).hexdigest()[:32]


def _text(task: str, key: Any) -> str:
    if isinstance(key, str | UUID) and str(key):
        return str(key)
    if isinstance(key, int) and not isinstance(key, bool):
        return str(key)
    given = "an empty text" if key == "" else type(key).__name__
    raise InvalidOptions(f"{task}: the key must be text, a number or a UUID, got {given}. The message was not sent.")
