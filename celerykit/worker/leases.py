"""
Keeps this worker's messages its own, on Redis and Valkey.

Celery's visibility timeout has to be longer than the longest task and the
furthest countdown, and as long does a dead worker's message wait. A lease is
short, because the worker renews it: from a thread with a client of its own,
since the event loop ticks neither on the solo pool, nor while the parent is
blocked, nor to the end of a shutdown.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Collection, MutableSet
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import redis
from celery.worker import state

from celerykit import events

if TYPE_CHECKING:
    from celerykit.redis_broker import Hold, Keeper, OnGarbage

__all__ = ["Leases"]

#: Renewals in the time of a lease: two may fail.
_RENEWALS = 3

#: Seconds until the next try when the server did not answer, and how long an answer is waited for.
_LONGEST_PAUSE, _LONGEST_WAIT = 2.0, 5.0


class Leases:
    """
    The messages of one worker, over all its connections.

    Does nothing for brokers other than Redis and Valkey.

    Args:
        lease:
            How long they stay its own after its last sign of life.

        on_garbage:
            ``on_garbage(queue, item, error)``: what to do with items in a
            queue that are not messages. If it raises, the item goes back to
            the end of its queue. Called where the queue is read, and now and
            then from a thread.

        pool:
            The worker's.
    """

    def __init__(self, lease: timedelta, *, on_garbage: OnGarbage | None = None, pool: Any = None) -> None:
        self._lease = lease.total_seconds()
        self._on_garbage = on_garbage
        # One without a semaphore, such as of threads, takes all that it is given, and forgets nothing of it
        # when the connection is lost: what waits in it will run.
        self._has_line = not getattr(pool, "uses_semaphore", True)
        self._in_line: MutableSet[Any] = weakref.WeakSet()
        self._hold: Hold | None = None
        self._keeper: Keeper | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._renewed_at = 0
        self._is_failing = False

    def guard(self, connection: Any) -> Any:
        """Return a connection to consume by, in place of one that is not connected yet."""
        if getattr(connection.get_transport_cls(), "driver_type", None) != "redis":
            return connection
        # Imported for Redis only.
        from celerykit.redis_broker import Hold, guard

        if self._hold is None:
            self._hold = Hold(lease=self._lease, on_garbage=self._on_garbage, running=self._running)
        return guard(connection, self._hold)

    def follow(self, connection: Any) -> None:
        """
        Renew what comes by this connection from now on. Call it once that is connected, and before it consumes.

        What came by the one before and was not started goes back to its
        queue; what runs stays leased until it ends.
        """
        hold: Hold | None = getattr(connection, "hold", None)
        if hold is None:
            return
        if getattr(connection.transport, "driver_type", None) != "redis":
            # After a failover to another broker.
            return
        from celerykit.redis_broker import Keeper

        keeper = Keeper(connection.default_channel, hold, timeout=min(_LONGEST_WAIT, max(1.0, self._pause)))
        with self._lock:
            before, self._keeper = self._keeper, keeper
        if before is not None:
            before.close()
        if self._thread is None or not self._thread.is_alive():
            self._stopped.clear()
            self._thread = threading.Thread(target=self._run, name="celerykit-leases", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """
        End the thread, after a last renewal. For workers that do not end with their process.

        Call it when the pool has stopped, and the connection is closed.
        """
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(2 * _LONGEST_WAIT)
        if self._keeper is not None:
            self._keeper.close()

    @property
    def _pause(self) -> float:
        return self._lease / _RENEWALS

    def _run(self) -> None:
        while not self._stopped.wait(min(self._pause, _LONGEST_PAUSE) if self._is_failing else self._pause):
            self._tick()
        self._tick()

    def _tick(self) -> None:
        with self._lock:
            keeper = self._keeper
        if keeper is None:
            return
        try:
            self._look_back(keeper.renew())
            self._sweep(keeper)
        except (redis.RedisError, OSError) as error:
            if not self._is_failing:
                events.LEASES_NOT_RENEWED.tell(error=error)
            self._is_failing = True
        except Exception as error:  # noqa: BLE001  (an edge: without this thread the worker's messages would run twice)
            events.LEASES_NOT_RENEWED.tell(error=error, exc_info=True)
            self._is_failing = True
        else:
            self._is_failing = False

    def _running(self) -> Collection[str]:
        """Give the tags of what runs on, or will, if it does: not once the worker ends."""
        if any(stop is not None and stop is not False for stop in (state.should_stop, state.should_terminate)):
            return ()
        if self._has_line:
            # Celery forgets these once a connection is lost.
            self._in_line |= all_of(state.reserved_requests)
        requests = all_of(state.active_requests) | all_of(self._in_line)
        return {request.message.delivery_tag for request in requests if not request.acknowledged}

    def _look_back(self, now: int) -> None:
        """Say so when this worker was away for longer than a lease."""
        away, self._renewed_at = (now - self._renewed_at) / 1_000_000, now
        if self._lease < away < now / 1_000_000:
            events.LEASES_LAPSED.tell(after=round(away, 1), lease=self._lease)

    def _sweep(self, keeper: Keeper) -> None:
        # Not for so long that the next renewal would have to wait.
        until = time.monotonic() + self._pause / 2
        total = restored = keeper.sweep()
        while restored and time.monotonic() < until:
            restored = keeper.sweep()
            total += restored
        if total:
            events.LEASES_RESTORED.tell(count=total)


def all_of(requests: MutableSet[Any]) -> set[Any]:
    while True:
        try:
            return set(requests)
        except RuntimeError:
            # Another thread started or ended a task in the meantime.
            continue
