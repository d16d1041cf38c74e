"""
What is secret in a call, and its two ways to stay so.

By name: a value is secret where it is marked ``Redact()``, or where its field
is called ``password``, ``api_key`` or the like. By value: while a call runs, its
secret values are known, and every text that leaves has them taken out.

Too much is masked rather than too little; a value shorter than three
characters cannot be told from any other text, and is masked by name only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar, Token
from dataclasses import fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import cached_property, lru_cache
from typing import Any, Final
from urllib.parse import quote, quote_plus
from uuid import UUID

from pydantic import BaseModel, SecretBytes, SecretStr

from celerykit.marks import Redact, names_of

__all__ = [
    "MASK",
    "Redact",
    "Secrets",
    "bind",
    "clean",
    "is_active",
    "is_secret_name",
    "running",
    "scrub",
    "secrets_in",
    "unbind",
]

#: What stands in place of a secret.
MASK: Final = "***"

#: Shorter values cannot be told from other text.
_SHORTEST = 3

#: What is longer is no name, but a key of data.
_LONGEST_NAME = 200

#: Further in than this, a value is shown as an ellipsis.
_DEEPEST = 20

# Names


#: Secret, where they stand in the name as whole words. The words of a name are joined by ``_``.
_SECRET = re.compile(
    r"(?<![a-z])(pass_?words?|passwd|pwd|pass_?(phrase|code)|secrets?|token|jwt|otp|bearer|authorization|cookies?"
    r"|credentials?|(api|access|private|secret|signing|encryption|session|auth|account)_?keys?|auth_header"
    r"|card_?number|cv[vc]|security_code|ssn)(?![a-z])"
    r"|^(auth|pass|pin)$"
)

#: Words of what is said *of* a secret, and is none: ``token_count``, ``secret_name``, ``password_changed_at``.
_ABOUT = re.compile(
    r"(?<![a-z0-9])(counts?|len|length|size|type|kind|names?|ttl|expir(es|y|ation)|at|max|min|limit|total|num|is|has"
    r"|required|enabled|policy|budget|usage)(?![a-z0-9])"
)

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+[0-9]*|[0-9]+")


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Tell from a field's name whether its value may be a secret. Whole words count: ``idempotency_key`` is none."""
    words = "_".join(_WORD.findall(name[:_LONGEST_NAME])).lower()
    return bool(_SECRET.search(words)) and not _ABOUT.search(words)


def _is_secret(name: Any, names: Collection[str]) -> bool:
    return isinstance(name, str) and (name in names or is_secret_name(name))


@lru_cache(maxsize=512)
def _marked_in(kind: type) -> frozenset[str]:
    try:
        return names_of({"": kind}, Redact)
    except Exception:  # noqa: BLE001  (an edge: any class may be logged, and its annotations may be anything)
        return frozenset()


# Values


def secrets_in(value: Any, names: Collection[str] = (), *, is_secret: bool = False) -> Iterator[str]:
    """Give the secret texts in JSON values: those under *names*, or under a name that says so."""
    waiting = [(value, is_secret)]
    while waiting:
        one, hides = waiting.pop()
        if isinstance(one, Mapping):
            waiting += [(item, hides or _is_secret(key, names)) for key, item in one.items()]
        elif isinstance(one, list | tuple):
            waiting += [(item, hides) for item in one]
        elif hides and (text := _text_of(one)) is not None:
            yield text


def _text_of(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | bytes | int | float):
        return None
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text if len(text) >= _SHORTEST else None


class Secrets:
    """The secret values of one call."""

    def __init__(self, values: Iterable[str]) -> None:
        self.values = frozenset(values)

    def scrub(self, text: str) -> str:
        """Give *text* without them, in any of the ways they are written within another text."""
        return self._pattern.sub(MASK, text)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        forms = {form for value in self.values for form in _forms(value)}
        return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True))))


def _forms(value: str) -> Iterator[str]:
    yield value
    yield repr(value)[1:-1]
    yield ascii(value)[1:-1]
    yield json.dumps(value)[1:-1]
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    try:
        yield quote(value)
        yield quote(value, safe="")
        yield quote_plus(value)
    except UnicodeEncodeError:
        return


# The running call

_running: ContextVar[Secrets | None] = ContextVar("celerykit_secrets", default=None)

#: Of all calls that this process runs: another thread of a call's does not have its context.
_active: dict[int, Secrets] = {}


def bind(values: Iterable[str]) -> Token[Secrets | None] | None:
    """Make these the secret values of the running call, until `unbind`; ``None`` when there are none."""
    secrets = Secrets(values)
    if not secrets.values:
        return None
    _active[id(secrets)] = secrets
    return _running.set(secrets)


def unbind(token: Token[Secrets | None] | None) -> None:
    """Forget what `bind` bound."""
    if token is None:
        return
    secrets = _running.get()
    _active.pop(id(secrets), None)
    _running.reset(token)


def running() -> tuple[Secrets, ...]:
    """Give the secrets of the running call; where none is known to run, those of all calls of this process."""
    if not _active:
        return ()
    own = _running.get()
    return (own,) if own is not None else tuple(_active.values())


def is_active() -> bool:
    """Tell whether there may be secret values to take out of texts."""
    return bool(_active)


def scrub(text: str) -> str:
    """Give *text* without the secret values of the running call."""
    for secrets in running():
        text = secrets.scrub(text)
    return text


# What is shown

_PLAIN = (int, float, date, time, timedelta, Decimal, UUID)


def clean(value: Any, names: Collection[str] = (), *, deep: int = 0) -> Any:
    """
    Give *value* as it may be told: plain data, with secrets masked.

    Models, dataclasses and named tuples are dicts then, masked by their
    marks; mappings by the names of their keys; texts by the running call's
    secret values. What is none of these is its repr.
    """
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, str):
        return scrub(value) if _active else value
    if deep > _DEEPEST:
        return "…"
    if isinstance(value, Enum):
        return clean(value.value, names, deep=deep + 1)
    fields_of = _fields_of(value)
    if fields_of is not None:
        kind: Any = type(value)
        names = {*names, *_marked_in(kind)}
        return {name: _cleaned(name, item, names, deep) for name, item in fields_of}
    if isinstance(value, Mapping):
        return {str(key): _cleaned(key, item, names, deep) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [clean(item, names, deep=deep + 1) for item in value]
    return _shown(value)


def _cleaned(name: Any, value: Any, names: Collection[str], deep: int) -> Any:
    if value is not None and not isinstance(value, bool) and _is_secret(name, names):
        return MASK
    return clean(value, names, deep=deep + 1)


def _fields_of(value: Any) -> Iterable[tuple[str, Any]] | None:
    if isinstance(value, BaseModel):
        return iter(value)
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name, None)) for field in fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return value._asdict().items()  # type: ignore[no-any-return]
    return None


def _shown(value: Any) -> str:
    if isinstance(value, SecretStr | SecretBytes):
        return MASK
    if isinstance(value, BaseException):
        return scrub(f"{type(value).__name__}: {value}")
    try:
        return scrub(repr(value))
    except Exception:  # noqa: BLE001  (an edge: a repr of anybody's)
        return f"<{type(value).__name__}>"
