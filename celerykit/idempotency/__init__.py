"""
Each key once: a call with an idempotency key takes effect once, whoever sends it, however often it is delivered.

::

    policy    what a user declares: Once, and Key on a field
    keys      how a call's key is written
    claim     what is known of a key, the moves it can make, and what follows from what is found
    records   claims in a store: named, read, ended
    sending   claims the keys of calls that are sent
    claims    what a worker does with the claims of one task
    step      around the task in a worker

A *claim* is the hold of one call on a key. It is taken when the call is sent,
and enforced again where it runs, so that a call counts once by whatever way it
comes. Deciding is pure (`claim`); a store only compares and swaps.
"""

from __future__ import annotations

from celerykit.idempotency.claim import LEGAL, Claim, State, Turn
from celerykit.idempotency.claims import Claims, Run
from celerykit.idempotency.keys import Identity
from celerykit.idempotency.policy import Key, Once
from celerykit.idempotency.records import find_claim
from celerykit.idempotency.sending import Sending
from celerykit.idempotency.step import Skipped, Waiting, once

__all__ = [
    "LEGAL",
    "Claim",
    "Claims",
    "Identity",
    "Key",
    "Once",
    "Run",
    "Sending",
    "Skipped",
    "State",
    "Turn",
    "Waiting",
    "find_claim",
    "once",
]
