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
from contextlib import suppress
from contextvars import ContextVar, Token
from dataclasses import fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, cast
from urllib.parse import quote, quote_plus
from uuid import UUID

from celery.exceptions import SoftTimeLimitExceeded
from pydantic import BaseModel

from celerykit.marks import Redact, names_of
from celerykit.masks import MASK
from celerykit.sealing import SECRETS

__all__ = [
    "MASK",
    "PLAIN",
    "Bound",
    "Redact",
    "Secrets",
    "bind",
    "clean",
    "is_active",
    "is_hidden",
    "is_secret_name",
    "marked_in",
    "running",
    "scrub",
    "scrubbed",
    "secrets_in",
    "shown",
    "unbind",
]

#: Shorter values cannot be told from other text.
_SHORTEST = 3

#: What is longer is no name, but a key of data.
_LONGEST_NAME = 200

#: Further in than this, a value is shown as an ellipsis.
_DEEPEST = 20

#: Of more than this, the rest is left out of what is shown.
_MOST = 20_000
_MORE = "…"

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


def is_hidden(name: Any, value: Any, names: Collection[str]) -> bool:
    """Tell whether a value is shown masked: for *names*, and names that say so; whether there is one is no secret."""
    if value is None or not isinstance(name, str):
        return False
    return name in names or (not isinstance(value, bool) and is_secret_name(name))


@lru_cache(maxsize=512)
def marked_in(kind: type) -> frozenset[str]:
    """Give the names of fields that are marked in a class."""
    try:
        return names_of({"": kind}, Redact)
    except SoftTimeLimitExceeded:
        raise
    except Exception:  # noqa: BLE001  (an edge: any class may be logged, and its annotations may be anything)
        return frozenset()


# Values


def secrets_in(value: Any, names: Collection[str] = (), *, name: str = "") -> Iterator[str]:
    """
    Give the secret texts in a value, JSON or not: those under *names*, or under a name that says so.

    Args:
        name:
            That of the value itself.
    """
    waiting = [(value, is_hidden(name, value, names))]
    # With the values, or another one may get the place of one that is gone.
    seen: dict[tuple[int, bool], Any] = {}
    while waiting:
        one, hides = waiting.pop()
        if isinstance(one, str | bytes | int | float | None):
            if hides and (text := _text_of(one)):
                yield from _with_parts(text)
        elif isinstance(one, SECRETS):
            waiting.append((one.get_secret_value(), True))
        elif (id(one), hides) in seen:
            continue
        elif isinstance(one, list | tuple | set | frozenset) and not hasattr(one, "_asdict"):
            seen[id(one), hides] = one
            waiting += [(item, hides) for item in one]
        elif (pairs := _pairs_of(one)) is not None:
            seen[id(one), hides] = one
            within = names if isinstance(one, Mapping) else {*names, *marked_in(cast("Any", type(one)))}
            waiting += [(item, hides or is_hidden(key, item, within)) for key, item in pairs]
        elif hides and isinstance(one, PLAIN):
            yield str(one)


def _text_of(value: Any) -> str | None:
    if value is None or isinstance(value, bool):
        return None
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text if len(text) >= _SHORTEST else None


def _with_parts(text: str) -> Iterator[str]:
    """Give a secret, and what is as secret as the whole: what follows on ``Bearer``, and the lines of a key."""
    yield text
    bare = text.strip()
    if bare != text and len(bare) >= _SHORTEST:
        yield bare
    if match := _SCHEME.fullmatch(bare):
        yield match[1]
    if "\n" in bare:
        yield from (line for line in bare.splitlines() if len(line) >= _LONG_LINE)


_SCHEME = re.compile(r"(?:bearer|basic|token|digest)\s+(\S{3,})", re.IGNORECASE)
_LONG_LINE = 8

#: Of what is longer, so much at its beginning gives it away: texts that are too long are cut.
_LONG, _HEAD = 24, 16


class Secrets:
    """The secret values of one call."""

    def __init__(self, values: Iterable[str]) -> None:
        self.values: frozenset[str] = frozenset()
        self.add(values)

    def add(self, values: Iterable[str]) -> None:
        """Know more of them."""
        # One that is all asterisks is its own mask.
        new = {value for value in values if len(value) >= _SHORTEST and value.strip("*")}
        self.values = self.values | new
        for made in ("_forms", "_heads"):
            vars(self).pop(made, None)

    def scrub(self, text: str) -> str:
        """Give *text* without them, in any of the ways they are written within another text."""
        scrubbed = self._scrub(text)
        while scrubbed != text:  # a mask may make one whole that has asterisks in it
            text, scrubbed = scrubbed, self._scrub(scrubbed)
        return text

    def _scrub(self, text: str) -> str:
        for form in self._forms:
            if form in text:
                text = text.replace(form, MASK)
        for head in self._heads:
            if head in text:
                text = re.sub(rf"{re.escape(head)}[^\s'\"]*", MASK, text)
        return text

    @property
    def longest(self) -> int:
        """How long a text may be that is one of them."""
        return len(self._forms[0]) if self._forms else 0

    # Looking for each is faster than one pattern of all, which takes its time to compile, and more with many.
    @cached_property
    def _forms(self) -> list[str]:
        forms = {form for value in self.values for form in _forms(value)}
        return sorted(forms, key=len, reverse=True)

    @cached_property
    def _heads(self) -> list[str]:
        return [form[:_HEAD] for form in self._forms if len(form) > _LONG]


def _forms(value: str) -> set[str]:
    """Give the ways in which a text is written within texts, and within texts in these."""
    if _PLAINLY.fullmatch(value):
        return {value}
    encoded = value.encode(errors="surrogatepass")
    urls = {quote(encoded), quote(encoded, safe=""), quote_plus(encoded)}
    once = _written(value)
    return urls | once.union(*map(_written, once))


_PLAINLY = re.compile(r"[\w.-]+", re.ASCII)


def _written(text: str) -> set[str]:
    """Write a text as Python and as JSON do. Which quotes Python escapes depends on what else is in the text."""
    encoded = text.encode(errors="surrogatepass")
    forms = {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
    for written in (repr(f"\"'{text}")[4:-1], ascii(f"\"'{text}")[4:-1], repr(b"\"'" + encoded)[5:-1]):
        forms |= {written, written.replace("\\'", "'")}
    return forms


# The running call


class Bound(NamedTuple):
    """The secrets of a call that runs."""

    secrets: Secrets
    token: Token[Secrets | None]


_running: ContextVar[Secrets | None] = ContextVar("celerykit_secrets", default=None)

#: Of all calls that this process runs: another thread of a call's does not have its context.
_active: dict[int, Secrets] = {}


def bind(values: Iterable[str]) -> Bound | None:
    """
    Make these the secret values of the running call, until `unbind`; ``None`` when there are none.

    A call that runs within another one has the secrets of that, too.
    """
    secrets = Secrets(values)
    if not secrets.values:
        return None
    outer = _running.get()
    if outer is not None:
        secrets.add(outer.values)
    _active[id(secrets)] = secrets
    return Bound(secrets, _running.set(secrets))


def unbind(bound: Bound | None) -> None:
    """Forget what `bind` bound."""
    if bound is None:
        return
    _active.pop(id(bound.secrets), None)
    with suppress(ValueError):  # another thread's, whose context is its own
        _running.reset(bound.token)


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


def scrubbed(value: Any, secrets: Secrets) -> Any:
    """Give JSON values with *secrets* taken out of each text."""
    if isinstance(value, str):
        return secrets.scrub(value)
    if isinstance(value, Mapping):
        return {key: scrubbed(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(item, secrets) for item in value]
    return value


# What is shown

#: Values without anything in them, beside texts.
PLAIN = (int, float, date, time, timedelta, Decimal, UUID)


def clean(value: Any, names: Collection[str] = (), *, most: int = _MOST) -> Any:
    """
    Give *value* as it may be told: plain data, with secrets masked.

    Models, dataclasses and named tuples are dicts then, masked by their
    marks; mappings by the names of their keys; texts by the running call's
    secret values. What is none of these is its repr.

    Args:
        most:
            After so many items the rest is left out: a value may contain
            itself, in many ways.
    """
    return _Cleaner(most).clean(value, names, 0)


class _Cleaner:
    """Goes through a value, but not for ever."""

    def __init__(self, most: int) -> None:
        self._left = most

    def clean(self, value: Any, names: Collection[str], deep: int) -> Any:
        if value is None or isinstance(value, PLAIN):
            # A number that has a secret's digits somewhere is not the secret.
            return MASK if _active and any(str(value) in secrets.values for secrets in running()) else value
        if isinstance(value, str):
            return scrub(value) if _active else value
        self._left -= 1
        if deep > _DEEPEST or self._left < 0:
            return _MORE
        if isinstance(value, Enum):
            return self.clean(value.value, names, deep + 1)
        if (pairs := _pairs_of(value)) is not None:
            within = names if isinstance(value, Mapping) else {*names, *marked_in(cast("Any", type(value)))}
            return dict(self._pairs(pairs, within, deep))
        if isinstance(value, list | tuple | set | frozenset):
            return [self.clean(item, names, deep + 1) for item in self._some(value)]
        return scrub(shown(value))

    def _pairs(self, pairs: Iterable[tuple[Any, Any]], names: Collection[str], deep: int) -> Iterator[tuple[str, Any]]:
        for key, item in self._some(pairs):
            name = key if isinstance(key, str) else shown(key)
            yield name, MASK if is_hidden(key, item, names) else self.clean(item, names, deep + 1)

    def _some(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._left -= 1
            if self._left < 0:
                return
            yield item


def _pairs_of(value: Any) -> Iterable[tuple[Any, Any]] | None:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, BaseModel):
        return iter(value)
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name, None)) for field in fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return value._asdict().items()  # type: ignore[no-any-return]
    return None


def shown(value: Any) -> str:
    """Write an object for people, whatever its repr does."""
    if isinstance(value, SECRETS):
        return MASK
    try:
        return f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else repr(value)
    except SoftTimeLimitExceeded:
        raise
    except Exception:  # noqa: BLE001  (an edge: a repr of anybody's)
        return f"<{type(value).__name__}>"
