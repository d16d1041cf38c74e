"""
Takes the secret values of a call out of an error that leaves it: to logs, results, events, letters.

An error stays the object it is wherever it can be changed: its type decides
what follows. One that cannot be is replaced by one that has its name and its
text without the secrets.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, cast

from celery.canvas import Signature
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from celerykit.redact import MASK, Secrets

__all__ = ["scrub_error"]

#: Further in than this, nothing of a value is written by anybody.
_DEEPEST = 12

_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)


def scrub_error(error: BaseException, secrets: Secrets) -> BaseException:
    """Take *secrets* out of an error, and of all that it leads to. Gives the error, or what stands for it."""
    try:
        return _Scrubber(secrets).error(error)
    except Exception:  # noqa: BLE001  (an edge: an error's class may do anything; what is unknown must not leave)
        return _stand_in(error, f"({MASK})")


class _Scrubber:
    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._text = secrets.scrub
        self._done: dict[int, BaseException] = {}

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
        self._in_place(error)
        return _stand_in(error, self._text(_said(error))) if self._shows(error) else error

    def _shows(self, error: BaseException) -> bool:
        return any(self._text(text) != text for text in (_said(error), _said(error, repr)))

    def _in_place(self, error: BaseException) -> None:
        args = cast("Any", BaseException.__dict__["args"])
        given = args.__get__(error)
        kept = self.value(given)
        if kept is not given:
            args.__set__(error, kept)
        facts = getattr(error, "__dict__", {})
        for name, value in list(facts.items()):
            kept = self.value(value)
            if kept is not value:
                facts[name] = kept
        for slot in _slots(cast("Any", type(error))):
            with suppress(Exception):
                value = slot.__get__(error)
                kept = self.value(value)
                if kept is not value:
                    slot.__set__(error, kept)

    def _group(self, group: BaseExceptionGroup[Any]) -> BaseException:
        members = [self.error(member) for member in group.exceptions]
        message = self._text(group.message)
        if message == group.message and all(map(_is, members, group.exceptions)):
            self._in_place_but_args(group)
            return group
        if message == group.message:
            return group.derive(members)
        with suppress(Exception):
            return cast("BaseException", type(group)(message, members))
        return BaseExceptionGroup(message, members)

    def _in_place_but_args(self, group: BaseExceptionGroup[Any]) -> None:
        facts = group.__dict__
        for name, value in list(facts.items()):
            facts[name] = self.value(value)

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

    def value(self, value: Any, deep: int = 0) -> Any:
        """Give *value* itself when there is nothing in it."""
        if value is None or isinstance(value, bool | type | types.TracebackType | Signature):
            return value
        if isinstance(value, BaseException):
            return self.error(value)
        if isinstance(value, str):
            return value if (kept := self._text(value)) == value else kept
        if isinstance(value, bytes):
            text = value.decode("utf-8", "surrogateescape")
            return value if (kept := self._text(text)) == text else kept.encode("utf-8", "surrogateescape")
        return self._within(value, deep)

    def _within(self, value: Any, deep: int) -> Any:
        kind = type(value)
        if deep > _DEEPEST:
            return value
        if kind is dict:
            pairs = {self.value(key, deep + 1): self.value(item, deep + 1) for key, item in value.items()}
            return value if all(map(_is, pairs.values(), value.values())) and [*pairs] == [*value] else pairs
        if kind in (list, tuple, set, frozenset):
            items = [self.value(item, deep + 1) for item in value]
            return value if all(map(_is, items, value)) else kind(items)
        shown = _said(value, repr)
        return value if (kept := self._text(shown)) == shown else kept


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


def _said(value: Any, write: Callable[[Any], str] = str) -> str:
    try:
        return write(value)
    except Exception:  # noqa: BLE001  (an edge: anybody's text)
        return ""


def _stand_in(error: BaseException, text: str) -> BaseException:
    kind = type(error)
    named: Mapping[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made: type[BaseException] = type(kind.__name__, (Exception,), dict(named))
    new = made(text)
    new.__traceback__ = error.__traceback__
    return new
