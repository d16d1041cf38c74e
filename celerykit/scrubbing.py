"""
Takes the secret values of a call out of an error that leaves it: to logs, results, events, letters.

An error stays the object it is wherever it can be changed: its type decides
what follows. One that cannot be is replaced by one that has its name and its
text without the secrets.

What leaves of an error is its text, its arguments and its notes. An object that
it keeps as an attribute stays that object: hooks and callers go on from it. Only
where it would be told or stored, a copy takes its place, with its secret fields masked.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, cast

from celery.canvas import Signature
from pydantic import BaseModel, SecretBytes, ValidationError
from pydantic_core import PydanticCustomError

from celerykit.redact import MASK, PLAIN, Secrets, is_hidden, marked_in
from celerykit.sealing import SECRETS

__all__ = ["scrub_error"]

#: Further in than this, nothing of a value is written by anybody.
_DEEPEST = 12

_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)


def scrub_error(error: BaseException, secrets: Secrets, *, is_stored_whole: bool = False) -> BaseException:
    """
    Take *secrets* out of an error, and of all that it leads to.

    Args:
        is_stored_whole:
            Whether its attributes are stored with it: objects in them are
            replaced, too.

    Returns:
        The error, or what stands for it.
    """
    try:
        return _Scrubber(secrets, is_stored_whole).error(error)
    except Exception:  # noqa: BLE001  (an edge: an error's class may do anything; what is unknown must not leave)
        return _stand_in(error, f"({MASK})")


class _Scrubber:
    def __init__(self, secrets: Secrets, is_stored_whole: bool) -> None:
        self._text = secrets.scrub
        self._is_stored_whole = is_stored_whole
        self._done: dict[int, BaseException] = {}
        # With the values, or another one may get the place of one that is gone.
        self._values: dict[tuple[int, bool], tuple[Any, Any]] = {}

    def error(self, error: BaseException) -> BaseException:
        if id(error) in self._done:
            return self._done[id(error)]
        self._done[id(error)] = error  # errors may lead to themselves
        new = self._without(error)
        self._done[id(error)] = new
        self._link(new, error)
        return new

    def _link(self, new: BaseException, old: BaseException) -> None:
        suppressed = old.__suppress_context__
        if old.__cause__ is not None:
            new.__cause__ = self.error(old.__cause__)
        if old.__context__ is not None:
            new.__context__ = self.error(old.__context__)
        new.__suppress_context__ = suppressed
        if new is not old:
            new.__traceback__ = old.__traceback__
            for note in getattr(old, "__notes__", ()):
                new.add_note(self._text(str(note)))

    def _without(self, error: BaseException) -> BaseException:
        if isinstance(error, ValidationError):
            return self._validation(error)
        if isinstance(error, BaseExceptionGroup):
            return self._group(error)
        before = _texts(error)
        self._in_place(error, objects=self._is_stored_whole)
        if not self._is_fit(error, before):
            self._in_place(error, objects=True)
        if self._is_fit(error, before):
            return error
        shown = _texts(error)[0]
        return _stand_in(error, self._text(shown if shown is not None else before[0] or ""))

    def _is_fit(self, error: BaseException, before: tuple[str | None, str | None]) -> bool:
        """Tell whether an error's texts hold no secret; and whether they can still be made, where they could be."""
        return all(
            self._text(text) == text if text is not None else was is None
            for text, was in zip(_texts(error), before, strict=True)
        )

    def _in_place(self, error: BaseException, *, objects: bool) -> None:
        args = cast("Any", BaseException.__dict__["args"])
        given = args.__get__(error)
        kept = self.value(given)
        if kept is not given:
            args.__set__(error, kept)
        self._facts_in_place(error, objects=objects)
        for slot in _slots(cast("Any", type(error))):
            with suppress(Exception):
                value = slot.__get__(error)
                kept = self.value(value, objects=objects)
                if kept is not value:
                    slot.__set__(error, kept)

    def _facts_in_place(self, error: BaseException, *, objects: bool) -> None:
        facts = getattr(error, "__dict__", {})
        for name, value in list(facts.items()):
            kept = self.value(value, objects=objects)
            if kept is not value:
                facts[name] = kept

    def _group(self, group: BaseExceptionGroup[Any]) -> BaseException:
        members = [self.error(member) for member in group.exceptions]
        message = self._text(group.message)
        if message == group.message and all(map(_is, members, group.exceptions)):
            self._facts_in_place(group, objects=self._is_stored_whole)
            return group
        if message == group.message:
            return group.derive(members)
        with suppress(Exception):
            return cast("BaseException", type(group)(message, members))
        return BaseExceptionGroup(message, members)

    def _validation(self, error: ValidationError) -> BaseException:
        # Its text shows the input, and shortens it: of a secret, the half would be left.
        lines: list[Any] = [
            {
                "type": PydanticCustomError(cast("Any", line["type"]), cast("Any", self._text(line["msg"]))),
                "loc": tuple(self.value(step) for step in line["loc"]),
                "input": self.value(line["input"]),
            }
            for line in error.errors(include_url=False, include_context=False)
        ]
        return ValidationError.from_exception_data(self._text(error.title), lines, hide_input=True)

    # Values

    def value(self, value: Any, deep: int = 0, *, objects: bool = True) -> Any:
        """
        Give *value* itself when there is nothing in it.

        Args:
            objects:
                Whether objects are looked into; else only texts, numbers and
                what is made of them.
        """
        if value is None or isinstance(value, bool | type | types.TracebackType | Signature):
            return value
        if isinstance(value, BaseException):
            return self.error(value)
        if isinstance(value, str):
            return value if (kept := self._text(value)) == value else kept
        if isinstance(value, bytes):
            text = value.decode("utf-8", "surrogateescape")
            return value if (kept := self._text(text)) == text else kept.encode("utf-8", "surrogateescape")
        if deep > _DEEPEST:
            return value
        place = id(value), objects
        if place not in self._values:
            self._values[place] = value, value  # it may contain itself
            self._values[place] = value, self._within(value, deep + 1, objects=objects)
        return self._values[place][1]

    def _within(self, value: Any, deep: int, *, objects: bool) -> Any:
        kind = type(value)
        if kind is dict:
            pairs = {
                self.value(key, deep, objects=objects): self.value(item, deep, objects=objects)
                for key, item in value.items()
            }
            return value if all(map(_is, pairs.values(), value.values())) and [*pairs] == [*value] else pairs
        if kind in (list, tuple, set, frozenset):
            items = [self.value(item, deep, objects=objects) for item in value]
            return value if all(map(_is, items, value)) else kind(items)
        if not objects and not isinstance(value, PLAIN):
            return value
        made = self._copied(value, deep)
        shown = _said(made, repr)
        return made if shown is None or (kept := self._text(shown)) == shown else kept

    def _copied(self, value: Any, deep: int) -> Any:
        """Give a copy of a model or the like, with what is secret in its fields masked."""
        if isinstance(value, SECRETS):
            return cast("Any", type(value))(MASK.encode() if isinstance(value, SecretBytes) else MASK)
        facts = _facts(value)
        names = marked_in(cast("Any", type(value))) if facts else ()
        kept = {
            name: MASK if is_hidden(name, item, names) and not isinstance(item, SECRETS) else self.value(item, deep)
            for name, item in facts.items()
        }
        changed = {name: item for name, item in kept.items() if item is not facts[name]}
        if not changed:
            return value
        try:
            return _with(value, changed)
        except Exception:  # noqa: BLE001  (an edge: anybody's class; what it shows is looked at next)
            return value


def _facts(value: Any) -> dict[str, Any]:
    """Give the fields of what can be copied without consequences."""
    if hasattr(value, "_sa_instance_state"):  # a row of SQLAlchemy's: a copy would have the state of the first
        return {}
    if isinstance(value, BaseModel):
        return {**vars(value), **(value.__pydantic_extra__ or {})}
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value) if hasattr(value, field.name)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(cast("Any", value)._asdict())
    return {}


def _with(value: Any, changed: Mapping[str, Any]) -> Any:
    # Without asking its type, which would refuse a mask, or a change.
    if isinstance(value, tuple):
        return cast("Any", value)._replace(**changed)
    made = copy.copy(value)
    extra = getattr(made, "__pydantic_extra__", None) or {}
    for name, item in changed.items():
        if name in extra:
            extra[name] = item
        else:
            object.__setattr__(made, name, item)
    return made


def _is(one: Any, other: Any) -> bool:
    return one is other


@lru_cache(maxsize=256)
def _slots(kind: type) -> tuple[Any, ...]:
    """Give what an error of *kind* keeps beside its dict: ``OSError.filename``, ``UnicodeError.object``, slots."""
    return tuple(
        slot
        for base in kind.__mro__
        if base not in (BaseException, object)
        for name, slot in vars(base).items()
        if isinstance(slot, _SLOTS) and not name.startswith("__")
    )


def _texts(error: BaseException) -> tuple[str | None, str | None]:
    return _said(error), _said(error, repr)


def _said(value: Any, write: Callable[[Any], str] = str) -> str | None:
    try:
        return write(value)
    except Exception:  # noqa: BLE001  (an edge: anybody's text)
        return None


def _stand_in(error: BaseException, text: str) -> BaseException:
    kind = type(error)
    named: Mapping[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made: type[BaseException] = type(kind.__name__, (Exception,), dict(named))
    new = made(text)
    new.__traceback__ = error.__traceback__
    return new
