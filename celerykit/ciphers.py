"""
Keys, and what they make of a secret on its way.

Encrypted is ``ck1:`` and a token of Fernet (AES in CBC mode, and HMAC-SHA256
against changes), as text. `cryptography` (``pip install 'celerykit[crypto]'``)
is imported with the first secret, so that programs without any need neither it
nor its 20 ms.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

__all__ = ["HOW_TO_MAKE", "Cipher", "Undecipherable", "cipher_of", "is_encrypted", "keys_in"]

HOW_TO_MAKE = 'python -c "from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())"'

_PREFIX = "ck1:"

#: A token begins with its version, 0x80, and the time in 8 bytes, whose first three are 0 for the next 500 years.
_START = f"{_PREFIX}gAAAA"

#: 32 bytes in base64. Fernet itself takes text around it, too.
_KEY = re.compile(r"[A-Za-z0-9_+/-]{43}=")


class Undecipherable(Exception):
    """A text was encrypted with another key, or changed since."""


class Cipher:
    """
    Encrypts with one key, and decrypts with any of several.

    Args:
        keys:
            As `keys_in` gives them. The first encrypts.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = tuple(keys)

    def __repr__(self) -> str:
        return f"<Cipher with {len(self._keys)} keys>"

    def encrypt(self, data: bytes) -> str:
        """Encrypt; the same data gives another text each time."""
        return _PREFIX + self._fernet.encrypt(data).decode()

    def decrypt(self, text: str) -> bytes:
        """
        Decrypt what `encrypt` gave.

        Raises:
            Undecipherable: None of the keys fits.
        """
        from cryptography.fernet import InvalidToken

        try:
            return self._fernet.decrypt(text.removeprefix(_PREFIX).encode(errors="replace"))
        except InvalidToken:
            raise Undecipherable("is encrypted with a key that is not among CELERYKIT_SECRET_KEYS") from None

    @cached_property
    def _fernet(self) -> MultiFernet:
        from cryptography.fernet import Fernet, MultiFernet

        return MultiFernet([Fernet(key) for key in self._keys])


@lru_cache(maxsize=8)
def cipher_of(keys: SecretStr | None) -> Cipher | None:
    """Give what encrypts with *keys*, separated by commas, which have been checked; ``None`` without."""
    return None if keys is None else Cipher(keys_in(keys.get_secret_value()))


def is_encrypted(value: Any) -> bool:
    """Tell whether *value* looks like what `Cipher.encrypt` gives."""
    return isinstance(value, str) and value.startswith(_START)


def keys_in(text: str) -> list[str]:
    """
    Read keys that are separated by commas.

    Raises:
        ValueError: One is no key, or they cannot be used here. It says which, and never the key.
    """
    keys = [key.strip() for key in text.split(",")]
    for place, key in enumerate(keys, 1):
        if not _KEY.fullmatch(key):
            which = "it" if len(keys) == 1 else f"key {place} of {len(keys)}"
            what = f"{which} is {'empty' if not key else 'no Fernet key (32 bytes in URL-safe base64)'}"
            raise ValueError(f"{what}; make one with {HOW_TO_MAKE}")
    if find_spec("cryptography") is None:
        raise ValueError("encryption needs a package that is not installed; pip install 'celerykit[crypto]'")
    return keys
