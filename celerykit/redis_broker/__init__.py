"""
The worker's side of Kombu's Redis transport: what it has taken stays its own while it lives, and not longer.

All that is private in ``kombu.transport.redis`` is used here and nowhere else.
Where Kombu is one that we do not know, `guard` leaves it as it is.

Kombu notes each message that was taken in a hash, and in a sorted set by the
time it was taken, and gives back what was taken too long ago. Here the sorted
set says until when a message is leased, by the server's clock, and the keys are
our own: stock workers, which renew nothing, keep theirs beside them.

::

    connection  the one to consume by, made from a worker's own
    channel     takes messages, notes them, and acknowledges them
    message     what is a message, and what is garbage
    hold        what a worker has taken and not finished
    unacked     the same in Redis, of all workers: keys and scripts
    keeper      renews what is held, and gives back what dead workers held
    known       which Kombu this was made for, and what it uses of it
"""

from __future__ import annotations

from celerykit.redis_broker.channel import OUR_KEYS
from celerykit.redis_broker.connection import Connection, guard
from celerykit.redis_broker.hold import Hold, OnGarbage
from celerykit.redis_broker.keeper import Keeper
from celerykit.redis_broker.known import KNOWN, NEEDED, whats_unknown
from celerykit.redis_broker.message import Garbage

__all__ = [
    "Connection",
    "Garbage",
    "Hold",
    "KNOWN",
    "Keeper",
    "NEEDED",
    "OUR_KEYS",
    "OnGarbage",
    "guard",
    "whats_unknown",
]
