"""
What a user declares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeAlias, get_args

from celerykit.errors import InvalidOptions

__all__ = ["Key", "OnDone", "OnRunning", "Once"]

OnRunning: TypeAlias = Literal["join", "raise", "skip"]
OnDone: TypeAlias = Literal["reuse", "skip", "raise", "rerun"]


class Key:
    """
    Marks what makes two calls the same: ``order_id: Annotated[UUID, Key()]``, on a parameter or a model's field.

    Several marks are one key together. What is not marked does not tell calls
    apart: with the same key and other arguments, a call is refused.
    """

    def __repr__(self) -> str:
        return "Key()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key)

    def __hash__(self) -> int:
        return hash(Key)


@dataclass(frozen=True, slots=True, init=False)
class Once:
    """
    A call with the same key takes effect once.

    The key is what `Key` marks; without a mark, all arguments together. For
    one call, ``task.using(key=…)`` says it.

    Args:
        running:
            What a second call does while the first is queued or runs:
            ``join`` gives the first one's result, ``raise`` raises
            `DuplicateCall`, ``skip`` does nothing, and its result is revoked.

        done:
            What it does when the first is done: ``reuse`` gives the stored
            result, ``skip`` and ``raise`` as above, ``rerun`` runs it.

        keep:
            How long a finished call is remembered: seconds or a timedelta.
            Afterwards the key is free.

        key:
            Makes the key of a call: gets those of its typed arguments that it
            names, defaults too, and returns text, a whole number or a UUID.

    A call that has failed for good leaves its key free.
    """

    running: OnRunning = "join"
    done: OnDone = "reuse"
    keep: float = 86400.0
    key: Callable[..., Any] | None = None

    def __init__(
        self,
        *,
        running: OnRunning = "join",
        done: OnDone = "reuse",
        keep: float | timedelta = 86400.0,
        key: Callable[..., Any] | None = None,
    ) -> None:
        _check("running", running, get_args(OnRunning))
        _check("done", done, get_args(OnDone))
        seconds = keep.total_seconds() if isinstance(keep, timedelta) else keep
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
            raise InvalidOptions(f"Once(keep=…) must be seconds or a timedelta, more than nothing; got {keep!r}.")
        if key is not None and not callable(key):
            raise InvalidOptions(
                f"Once(key=…) must be a function of the task's arguments, got {type(key).__name__}. "
                "The key of one call is given with task.using(key=…)."
            )
        for name, value in {"running": running, "done": done, "keep": float(seconds), "key": key}.items():
            object.__setattr__(self, name, value)


def _check(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        *most, last = map(repr, known)
        raise InvalidOptions(f"Once({name}=…) must be {', '.join(most)} or {last}, got {value!r}.")
