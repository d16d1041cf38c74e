"""
Claims the keys of calls that are sent, or tells who has them.

One round trip when the keys are free, however many they are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from celerykit.idempotency.claim import Answer, Claim, Event, State, after, on_send
from celerykit.idempotency.keys import Identity
from celerykit.idempotency.records import (
    MOST_ROUNDS,
    SENT_ANEW_AFTER,
    changes_too_fast,
    claim_in,
    is_lapsed,
    record_of,
)
from celerykit.stores import New, Record, Store, Swap

if TYPE_CHECKING:
    from celerykit.idempotency.claims import Claims

__all__ = ["Asked", "Sending", "send_all"]


class Asked(NamedTuple):
    """
    A call that is to be sent.

    Attributes:
        delay, until:
            Seconds from now: when it is to start, and when it expires, if it does.
    """

    claims: Claims
    identity: Identity
    id: str
    delay: float = 0.0
    until: float | None = None


class Sending(NamedTuple):
    """
    What becomes of a call that is sent.

    Attributes:
        claim:
            What is found under its key, or its own; ``None`` when the store did not answer.
    """

    answer: Answer
    claim: Claim | None


def send_all(calls: Sequence[Asked]) -> list[Sending]:
    """
    Claim the keys of many calls, in one round trip if all are free.

    Raises:
        StoreUnavailable: Nobody knows.
    """
    if not calls:
        return []
    store = calls[0].claims.store()
    swapped = store.swap(*(_first(asked) for asked in calls))
    return [
        Sending(Answer.GO, _claimed(asked, None)) if one.done else _settle(store, asked, one.found)
        for asked, one in zip(calls, swapped, strict=True)
    ]


def _settle(store: Store, asked: Asked, found: Record | None) -> Sending:
    name = record_of(asked.identity.key)
    for _ in range(MOST_ROUNDS):
        answer, claim, new = _decide(asked, found)
        if answer is Answer.JOIN and claim is not None and asked.claims.has_ended(name, claim, is_gone=False):
            found = store.read(name)
            continue
        if new is None:
            return Sending(answer, claim)
        expected = found.version if found else None
        [swapped] = store.swap(Swap(name, expected, new, lapsed=answer is Answer.SEND_AGAIN))
        if swapped.done:
            return Sending(answer, claim)
        found = swapped.found
    raise changes_too_fast(asked.identity)


def _decide(asked: Asked, record: Record | None) -> tuple[Answer, Claim | None, New | None]:
    """Tell what becomes of a call, and what is to be written."""
    found = claim_in(record)
    answer = on_send(
        found,
        is_lapsed=is_lapsed(record),
        call=asked.identity.call,
        policy=asked.claims.policy,
        may_rerun=asked.claims.may_rerun,
    )
    if answer is Answer.GO:
        claim = _claimed(asked, found)
        return answer, claim, _sent(claim, asked)
    if answer is Answer.SEND_AGAIN and found is not None and found.state is not State.RUNNING:
        claim = found.moved(Event.SEND_AGAIN)
        return answer, claim, _sent(claim, asked)
    return answer, found, None


def _claimed(asked: Asked, found: Claim | None) -> Claim:
    """Give the claim of a call that is sent."""
    state = after(found.state if found else None, Event.SEND)
    return Claim(
        state=State(str(state)),
        id=asked.id,
        task=asked.claims.task,
        call=asked.identity.call,
        since=time.time(),
        keep=asked.claims.policy.keep,
    )


def _sent(claim: Claim, asked: Asked) -> New:
    lease = asked.delay + SENT_ANEW_AFTER
    lives = max(asked.delay, asked.until or 0.0, SENT_ANEW_AFTER)
    return New(claim.version, claim.data(), ttl=lives + asked.claims.policy.keep, lease=lease)


def _first(asked: Asked) -> Swap:
    """Give the swap for a key that is free."""
    return Swap(record_of(asked.identity.key), None, _sent(_claimed(asked, None), asked))
