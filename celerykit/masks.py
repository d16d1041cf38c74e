"""
Settings as they may be shown: without what may be a secret in them.

When in doubt, too much is masked. Nothing here decides what a setting is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from datetime import timedelta
from enum import Enum
from pathlib import PurePath
from typing import Any

__all__ = ["MASK", "Masked", "is_secret", "mask_text", "shown"]

MASK = "***"

_WORDS = r"pass|pwd|secret|token|credential|signature|api_?key|access_?key|account_?key|shared_?access|private"

#: ``security_key`` is a path by Celery's book, but people put the key itself there.
#: A schedule's ``args`` and ``kwargs`` are a task's payload.
_SECRET_NAME = re.compile(rf"{_WORDS}|^security_key|(^|_)(auth|key|sig|args|kwargs)$", re.IGNORECASE)

#: From ``://`` to the last ``@``: a password may hold ``/``, ``;``, ``#``, ``@`` and blanks itself.
_USER = re.compile(r"://([^:@/?#;\s]*)(:?).*@", re.DOTALL)

#: ``?password=…`` in a URL, ``AccountKey=…`` in a connection string. Begins where a name does, and takes all of it at
#: once: the message of an error may be long, and be one word.
_PAIR = re.compile(rf"(?<![\w.-])(?=[\w.-]*(?:{_WORDS}|\bkey|sig))([\w.-]++=)[^&;#\s]*", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Tell from its name whether the whole value may be a secret."""
    return bool(_SECRET_NAME.search(name))


def mask_text(text: str) -> str:
    """
    Mask passwords in every URL and ``name=value`` of *text*.

    Several URLs joined by ``;`` or ``,`` keep their hosts only when each is a
    URL of its own; otherwise all up to the last ``@`` is masked.
    """
    urls = re.split(r"(?<=[;,])(?=[A-Za-z][\w+.]*://)", text)
    return "".join(_PAIR.sub(rf"\1{MASK}", _mask_users(url)) for url in urls)


def _mask_users(url: str) -> str:
    # What comes behind the last @ has no user, and may be long.
    before, at, behind = url.rpartition("@")
    return _USER.sub(_mask_user, before + at) + behind


def _mask_user(match: re.Match[str]) -> str:
    user, colon = match.groups()
    # Alone, what stands before the @ may be a token rather than a name.
    return f"://{user}:{MASK}@" if colon and user else f"://{MASK}@" if user else f"://:{MASK}@"


def shown(name: str, value: Any) -> Any:
    """
    Return *value* as it may be shown: plain data that JSON can write.

    Objects show their class only: their repr is not ours to trust.
    """
    if value is None or isinstance(value, bool):
        return value
    if is_secret(name) or isinstance(value, bytes):
        return MASK
    if isinstance(value, str):
        return mask_text(value)
    if type(value) in (int, float):
        return value if abs(value) != float("inf") else str(value)
    return _shown_whole(name, value)


def _shown_whole(name: str, value: Any) -> Any:
    if isinstance(value, (timedelta, Enum, PurePath)):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): shown(str(key), item) for key, item in value.items()}
    if isinstance(value, Collection):
        return [shown(name, item) for item in value]
    return f"<{type(value).__name__}>"


class Masked(dict[str, Any]):
    """Settings ready for use, which a log line or a traceback cannot give away."""

    def __repr__(self) -> str:
        return repr({name: shown(name, value) for name, value in self.items()})
