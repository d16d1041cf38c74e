"""
Claims as records of a store: how they are named, read, and ended by whoever outlives a run.
"""

from __future__ import annotations

import time
from dataclasses import replace

from celerykit.errors import StoreUnavailable
from celerykit.idempotency.claim import LEGAL, Claim, Event, State, Turn, after
from celerykit.idempotency.keys import Identity
from celerykit.stores import Hold, New, Record, Store, Swap

__all__ = [
    "MOST_ROUNDS",
    "SENT_ANEW_AFTER",
    "changes_too_fast",
    "claim_in",
    "end_claim",
    "find_claim",
    "is_lapsed",
    "key_in",
    "record_of",
]

#: Before a key, in the name of its record.
_PREFIX = "once:"

#: Seconds after which a call that should be in its queue is sent once more by whoever joins it.
SENT_ANEW_AFTER = 60.0

#: Seconds that a lease may be renewed late.
_LATE = 1.0

#: How often a move is decided anew because the claim has changed meanwhile.
MOST_ROUNDS = 20


def record_of(key: str) -> str:
    """Name the record of a key in the store."""
    return f"{_PREFIX}{key}"


def key_in(name: str) -> str:
    """Give the key whose record has this name."""
    return name.removeprefix(_PREFIX)


def claim_in(record: Record | None) -> Claim | None:
    """Read the claim in a record, if it is one."""
    try:
        return None if record is None else Claim.of(record.data)
    except (ValueError, TypeError, KeyError):
        # Nobody's: as free as if it were not there, and overwritten by its version.
        return None


def is_lapsed(record: Record | None) -> bool:
    """Tell whether nothing was heard of a claim for longer than its lease."""
    return record is not None and record.lease is not None and record.lease <= 0


def find_claim(store: Store, key: str) -> Claim | None:
    """
    Give the claim of a key.

    Raises:
        StoreUnavailable: Nobody knows.
    """
    return claim_in(store.read(record_of(key)))


def end_claim(
    store: Store,
    name: str,
    id: str,  # noqa: A002  (Celery's name)
    turn: Turn,
    *,
    token: str | None,
    event: Event,
    why: str = "",
) -> None:
    """
    Move the claim of a call whose run is gone: it has failed, or is released.

    Claims of others, of later turns, and such that are over stay as they are,
    and so does a run of another *token* that renews its lease: the call was
    delivered twice.

    Raises:
        StoreUnavailable: Nobody knows.
    """
    record = store.read(name)
    for _ in range(MOST_ROUNDS):
        claim = claim_in(record)
        if record is None or claim is None or claim.id != id or claim.turn > turn or claim.is_over:
            return
        if claim.state is State.RUNNING and claim.token != token and not is_lapsed(record):
            # If that run is gone too, its claim goes with its lease: nothing will come that could end it.
            left = record.lease or 0.0
            store.renew([Hold(name, record.version, left, left + _LATE)])
            return
        if (claim.state, event) not in LEGAL:
            return  # it was handed back before it began
        new = None
        if (state := after(claim.state, event)) is not None:
            moved = replace(claim, state=state, token="", since=time.time(), outcome=why, runs=0)
            lease = SENT_ANEW_AFTER if state is State.CLAIMED else None
            new = New(moved.version, moved.data(), ttl=claim.keep + (lease or 0.0), lease=lease)
        [swapped] = store.swap(Swap(name, record.version, new))
        if swapped.done:
            return
        record = swapped.found


def changes_too_fast(identity: Identity) -> StoreUnavailable:
    """Make the error for a claim that cannot be caught."""
    return StoreUnavailable(f"the claim of {identity.key} has changed {MOST_ROUNDS} times while it was looked at.")
