"""
The queue of dead letters on each kind of broker: walked through without being consumed.

A letter is read as it lies there, and never decoded: Kombu raises for a message
that it cannot unpack, and hides all that come after. Letters are taken away one
by one:

- On Redis and Valkey the list stays as it is, and a letter moves to another
  queue in one atomic step. Any number of people may do so at once.
- On RabbitMQ letters are held unacknowledged and go back at the end, so one
  person walks at a time. A letter that is sent elsewhere is acknowledged after
  the broker confirmed the copy; who dies in between leaves both.
- Other brokers are treated as RabbitMQ, without the lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from celerykit.letter_queues.messages import declare, letter_of, publish
from celerykit.letter_queues.published import AMQPQueue, OtherQueue
from celerykit.letter_queues.queue import Held, LetterQueue, NoQueue
from celerykit.letter_queues.redis import RedisQueue
from celerykit.publishing import FAILURES, UnreachableBroker, sending

if TYPE_CHECKING:
    from celerykit.app import CeleryKit

__all__ = ["Held", "LetterQueue", "NoQueue", "declare", "letter_of", "letter_queue", "publish"]

_KINDS: dict[str, type[LetterQueue]] = {"redis": RedisQueue, "amqp": AMQPQueue}


@contextmanager
def letter_queue(app: CeleryKit, *, lock_within: float) -> Iterator[LetterQueue]:
    """
    Open the app's queue of dead letters.

    Args:
        lock_within:
            How long to wait for somebody else who walks through it, in seconds.

    Raises:
        LettersLocked: They did not come to their end.

        EnqueueError: The broker cannot be reached.
    """
    # Without heartbeats, which nobody would send while a person looks at a letter.
    connection: Any = app.connection_for_write(heartbeat=0, transport_options={"confirm_publish": True})
    with connection, _telling_failures(connection):
        with sending(app, "dead letters"):
            connection.ensure_connection(max_retries=1, interval_start=0)
        kind = _KINDS.get(connection.transport.driver_type, OtherQueue)
        queue = kind(app, connection)
        try:
            queue.lock(lock_within)
            yield queue
        finally:
            queue.close()


@contextmanager
def _telling_failures(connection: Any) -> Iterator[None]:
    try:
        yield
    except UnreachableBroker:
        raise
    except (*FAILURES, *connection.connection_errors, *connection.channel_errors) as error:
        if isinstance(error, KeyError):
            # Among the connection errors of Kombu's Redis transport.
            raise
        raise UnreachableBroker(f"dead letters: the broker at {connection.as_uri()} failed ({error!r}).") from error
