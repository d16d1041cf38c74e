"""
Signs of life of a worker: that its loop turns, and that it gets what waits for it.

The loop notes the time, and no more. A thread tells it on, every other second,
so that a slow disk does not hold up the loop, and a loop that stands still is
told of. A second thread asks the broker how much waits, once nothing has come
for a while: a connection may be open, answer pings, and bring nothing.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, MutableSet
from contextlib import suppress
from typing import Any, NamedTuple

from celery import bootsteps
from celery.concurrency import solo
from celery.worker import state
from kombu.transport import virtual

from celerykit import events
from celerykit.publishing import transport_options
from celerykit.pulse import Pulse
from celerykit.worker.leases import all_of

__all__ = ["TURN", "Progress", "Stuck", "Vitals"]

#: Seconds between two signs; and between two turns of a loop that has nothing to do.
_PAUSE, TURN = 2.0, 1.0

#: How long connecting may take between two signs, in seconds, beyond what a probe allows. Kombu waits for up to 30 s
#: between two attempts; but a broker that takes a connection and says nothing is waited for without end, and to restart
#: does not help as long as it is so.
_CONNECTING = 270.0

#: How long the broker may take for an answer, in seconds, and the most and the least between two questions.
_LONGEST_WAIT, _LONGEST_PAUSE, _SHORTEST_PAUSE = 2.0, 10.0, 0.5

#: Where what a broker calls ready is what it would give to any consumer that has room.
_TELLING = ("amqp", "redis")

#: Seconds that a thread has to end, when the worker does.
_LAST_WORDS = 1.0

_CLOSING = (bootsteps.CLOSE, bootsteps.TERMINATE)  # type: ignore[attr-defined]


class Stuck(NamedTuple):
    """
    What waits, and does not come.

    Attributes:
        depth:
            Messages in the queue.

        idle:
            Seconds since any came.
    """

    queue: str
    depth: int
    idle: float


class Progress:
    """
    Decides whether a worker is stuck, from what is seen now and then.

    Args:
        stall:
            How long messages may wait, in seconds, while a worker that has room for them gets none.
    """

    def __init__(self, stall: float) -> None:
        self._stall = stall
        self._waiting: dict[str, float] = {}
        self._received_at = 0.0

    @property
    def pause(self) -> float:
        """Seconds until the next look."""
        return min(max(self._stall / 6, _SHORTEST_PAUSE), _LONGEST_PAUSE)

    def see(self, depths: Mapping[str, int] | None, *, received_at: float, now: float) -> Stuck | None:
        """
        Take in what is seen now, and tell what does not come.

        Args:
            depths:
                How many messages wait in each queue; ``None`` when there is no room for them, or nobody knows.

            received_at:
                When the last one came.
        """
        if depths is None or received_at != self._received_at:
            self._waiting.clear()
        self._received_at = received_at
        # A queue that is found empty only once was worked off.
        self._waiting = {name: self._waiting.get(name, now) for name, depth in (depths or {}).items() if depth > 0}
        for name, since in self._waiting.items():
            if depths and now - since >= self._stall:
                return Stuck(name, depths[name], now - received_at)
        return None


class Vitals:
    """
    The signs of life of a worker, and what they are made of.

    Args:
        consumer:
            Of ours.
    """

    def __init__(self, consumer: Any) -> None:
        kit = consumer.app.settings.kit
        self._consumer = consumer
        self._pulse = Pulse("worker", str(consumer.hostname), folder=kit.health_dir)
        self._progress = Progress(kit.health_stall.total_seconds())
        self._is_solo = isinstance(consumer.pool, solo.TaskPool)
        self._is_consuming = self._was_lost = False
        self._turned_at = self._received_at = time.monotonic()
        self._attempts = 0
        self._task: tuple[str, float | None] | None = None
        # What RabbitMQ counts, and does not tell.
        self._held: MutableSet[Any] = weakref.WeakSet()
        self._counts_held = False
        self._stuck: Stuck | None = None
        self._has_warned = False
        self._ended, self._has_changed = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._connection: Any = None

    # What the loop does

    def turn(self) -> None:
        """Note that the loop turns."""
        self._turned_at = time.monotonic()

    def receive(self, message: Any) -> None:
        """Note that a message came."""
        self._received_at = time.monotonic()
        if self._counts_held:
            self._held.add(message)

    def begin(self, request: Any) -> bool:
        """Note that a task begins where the loop is, if it does. Then `end` is due."""
        if self._is_solo:
            limit = request.time_limits[0] or request.task.time_limit
            self._turned_at = time.monotonic()
            self._task = (f"{request.name} {request.id}", limit and float(limit))
        return self._is_solo

    def end(self) -> None:
        """Note that the task has ended."""
        self._turned_at = time.monotonic()
        self._task = None

    # What becomes of the consumer

    def start(self) -> None:
        """Begin to tell."""
        if self._threads:
            return
        atexit.register(self._pulse.end)
        self._threads = [
            threading.Thread(target=self._tell_on, name="celerykit-health", daemon=True),
            threading.Thread(target=self._look_on, name="celerykit-health-queues", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def consume(self) -> None:
        """Note that messages come from now on."""
        driver = getattr(self._consumer.connection.transport, "driver_type", None)
        self._counts_held = driver == "amqp"
        self._held = weakref.WeakSet()
        self._turned_at = self._received_at = time.monotonic()
        self._is_consuming, self._was_lost = True, False
        self._has_changed.set()

    def lose(self) -> None:
        """Note that the connection is lost."""
        self._turned_at = time.monotonic()
        self._is_consuming, self._was_lost = False, True
        self._has_changed.set()

    def stop(self) -> None:
        """Tell no more, and take back what was told: this worker ends as it should."""
        self._ended.set()
        self._has_changed.set()
        for thread in self._threads:
            thread.join(_LAST_WORDS)
        atexit.unregister(self._pulse.end)
        self._pulse.end()

    # Telling

    def _tell_on(self) -> None:
        while not self._ended.is_set():
            self._has_changed.clear()
            self._tell()
            self._has_changed.wait(_PAUSE)

    def _tell(self) -> None:
        try:
            self._pulse.tell(**self._facts())
        except OSError as error:
            if not self._has_warned:
                hint = "Set CELERYKIT_HEALTH_DIR to a directory that this user may write to."
                events.HEALTH_NOT_WRITTEN.tell(worker=self._pulse.name, error=error, hint=hint)
            self._has_warned = True
        except Exception as error:  # noqa: BLE001  (an edge: without this thread a worker that lives counts as dead)
            events.HEALTH_NOT_WRITTEN.tell(worker=self._pulse.name, error=error, exc_info=error)
        else:
            self._has_warned = False

    def _facts(self) -> dict[str, Any]:
        now, task, stuck = time.monotonic(), self._task, self._stuck
        if self._is_stopping():
            # Running tasks are waited for, however long they take.
            return {"state": "stopping", "is_ready": False}
        facts: dict[str, Any] = {"silence": max(0.0, now - max(self._turned_at, self._received_at))}
        if self._is_consuming:
            facts |= {"state": "consuming", "is_ready": True, "within": 0.0}
            if task is not None:
                facts |= {"task": task[0], "within": task[1]}
            if stuck is not None:
                told = {"queue": stuck.queue, "depth": stuck.depth, "idle": round(stuck.idle)}
                facts |= {"stuck": told, "is_ready": False}
            return facts
        attempts = int(self._consumer.broker_connection_retry_attempt)
        if attempts != self._attempts:
            # Celery counts them, and sleeps in between.
            self._attempts, self._turned_at, facts["silence"] = attempts, now, 0.0
        state = "connecting" if self._was_lost or attempts else "starting"
        return facts | {"state": state, "is_ready": False, "within": _CONNECTING}

    def _is_stopping(self) -> bool:
        is_asked = any(stop is not None and stop is not False for stop in (state.should_stop, state.should_terminate))
        blueprint = getattr(self._consumer.controller, "blueprint", None)
        return is_asked or getattr(blueprint, "state", None) in _CLOSING

    # Looking whether anything waits

    def _look_on(self) -> None:
        while not self._ended.wait(self._progress.pause):
            try:
                self._look()
            except Exception as error:  # noqa: BLE001  (an edge: what was asked goes away while the worker ends)
                events.HEALTH_NOT_WRITTEN.tell(worker=self._pulse.name, error=error, exc_info=error)
        self._let_go()

    def _look(self) -> None:
        received_at, now = self._received_at, time.monotonic()
        depths = None
        if now - received_at >= self._progress.pause and self._has_room():
            depths = self._ask()
        else:
            self._let_go()
        before, self._stuck = self._stuck, self._progress.see(depths, received_at=received_at, now=now)
        if self._stuck is not None and before is None:
            queue, depth, idle = self._stuck
            hint = "It has room for them, and is to be restarted."
            events.WORKER_STUCK.tell(worker=self._pulse.name, queue=queue, count=depth, after=round(idle, 1), hint=hint)
        elif self._stuck is None and before is not None:
            events.WORKER_UNSTUCK.tell(worker=self._pulse.name, queue=before.queue)

    def _has_room(self) -> bool:
        """Tell whether a message that came now could start, as far as can be told. In doubt, no."""
        consumer = self._consumer
        if not self._is_consuming or self._task is not None or self._is_stopping():
            return False
        try:
            places = int(consumer.pool.num_processes)
            if len(all_of(state.reserved_requests)) >= places:
                return False
            if isinstance(consumer.connection.transport, virtual.Transport):
                return bool(consumer.task_consumer.channel.qos.can_consume())
            window = int(consumer.qos.value)
            held = sum(not message.acknowledged for message in all_of(self._held))
        except (AttributeError, TypeError):
            # The connection was lost, or the pool is not there yet, or no more.
            return False
        return not window or held < window

    def _ask(self) -> dict[str, int] | None:
        """Ask the broker how much waits; ``None`` when it does not say."""
        consumer = self._consumer
        try:
            if consumer.connection.transport.driver_type not in _TELLING:
                return None
            queues = [queue.name for queue in tuple(consumer.task_consumer.queues) if _is_for_all(queue)]
        except AttributeError:
            return None
        try:
            return dict(self._depths(queues))
        except Exception:  # noqa: BLE001  (an edge: clients raise what they like. A broker that is away is none of its faults)
            self._let_go()
            return None

    def _depths(self, queues: list[str]) -> Iterator[tuple[str, int]]:
        for queue in queues:
            connection = self._connect()
            # One that asks for a queue which is not there is closed for it.
            with connection.channel() as channel:
                try:
                    yield queue, int(channel.queue_declare(queue, passive=True).message_count)
                except connection.channel_errors:
                    yield queue, 0

    def _connect(self) -> Any:
        if self._connection is None:
            app = self._consumer.app
            options = transport_options(app.conf.broker_read_url, wait=_LONGEST_WAIT)
            self._connection = app.connection_for_read(
                connect_timeout=_LONGEST_WAIT, heartbeat=0, transport_options=options
            )
        return self._connection

    def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # It is no use any more, whatever it says.
            with suppress(Exception):
                connection.release()


def _is_for_all(queue: Any) -> bool:
    """Tell whether each of a queue's consumers that has room gets what is in it."""
    arguments = {**(queue.queue_arguments or {}), **(queue.consumer_arguments or {})}
    # RabbitMQ: one consumer at a time; the one that comes first; messages that stay.
    return not (
        arguments.get("x-single-active-consumer")
        or "x-priority" in arguments
        or arguments.get("x-queue-type") == "stream"
    )
