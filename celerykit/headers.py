"""
What celerykit adds to a message: one header beside Celery's own.

It is built when a message is sent, never when a signature is made, and must be
read by workers older and newer than the sender: unknown facts are kept, and
what cannot be read counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

__all__ = ["HEADER", "VERSION", "Headers"]

#: The one header of a message that is ours.
HEADER = "celerykit"

#: Raised when an older worker could misread the header, not when a fact is added.
VERSION = 1


@dataclass(frozen=True, slots=True)
class Headers:
    """
    The facts in our header.

    Attributes:
        contract:
            The fingerprint of the contract the sender checked the arguments
            against; ``None`` when nobody did.
    """

    contract: str | None = None

    @classmethod
    def of(cls, message_headers: Mapping[str, Any] | None) -> Self:
        """Read a message's headers; a foreign message has none of ours."""
        ours = (message_headers or {}).get(HEADER)
        if not isinstance(ours, Mapping):
            return cls()
        contract = ours.get("contract")
        return cls(contract=contract if isinstance(contract, str) else None)

    def added_to(self, message_headers: Mapping[str, Any] | None) -> dict[str, Any]:
        """
        Write these facts among *message_headers*.

        Those of a retry hold the header of the attempt before; what a newer
        sender put there stays.
        """
        before = (message_headers or {}).get(HEADER)
        kept = before if isinstance(before, Mapping) else {}
        return {**(message_headers or {}), HEADER: {**kept, "v": VERSION, "contract": self.contract}}
