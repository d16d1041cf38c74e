"""How facts are written for a person, and for a program."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from celerykit.settings import mask_text

__all__ = ["as_json", "columns", "said", "shortened", "time_of"]

#: Of an error's message, as many letters are shown.
_WIDTH = 200


def as_json(facts: Any) -> str:
    """Write facts for a program."""
    return json.dumps(facts, indent=2, ensure_ascii=False, default=str)


def said(error: BaseException) -> str:
    """Name an error, without what may be a secret in it: those of clients quote URLs."""
    return shortened(f"{type(error).__name__}: {error}")


def shortened(text: str) -> str:
    """Give one line of *text*, without what may be a secret in it."""
    text = mask_text(" ".join(text.split())).removesuffix(": ").rstrip(":")
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def time_of(seconds: float) -> str:
    """Write a time, given in seconds since 1970."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):  # headers may be anybody's
        return f"{seconds:g} s after 1970"


def columns(lines: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Write names, and what belongs to each beside it."""
    lines = list(lines)
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        first, *rest = text.split("\n")
        yield f"  {name:{width}}  {first}".rstrip()
        yield from (f"  {'':{width}}  {line}" for line in rest)
