"""
Ends a worker in time, and gives back what it did not finish.

Celery has the signals and the phases (warm: running tasks end; soft: they have
some seconds for it; cold: what runs is cut off and goes back to the broker).
Here is what was missing in them: a warm shutdown that runs a task it also gives
back, and then stands still for half a minute; one that lasts as long as its
longest task, whatever the platform grants; and pools that cannot cut off a task.

`TaskPool` uses some of what is billiard's and Celery's own business; a test
names the versions.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

from billiard.pool import CLOSE
from celery import bootsteps, signals
from celery.concurrency import get_implementation, prefork
from celery.concurrency import solo as solo_pool
from celery.concurrency.base import BasePool
from celery.utils import threads
from celery.worker import state
from kombu.common import ignore_errors
from kombu.transport import virtual

from celerykit import events
from celerykit.logs import banners
from celerykit.settings import FROM_KIT

__all__ = ["TaskPool", "Worker", "cancel_active_requests", "may_start"]

#: celery-types knows half of them.
_Pool: Any = cast("Any", prefork.TaskPool).Pool

#: Seconds between two looks whether the running tasks have ended.
_TICK = 0.1

#: Seconds that a task which was cut off has to clean up, after which its process is killed.
_LAST_WORDS = 1.5

#: How long Kombu's Redis transport may wait for a message it has asked for: a second, and the way back.
_LONGEST_POP = 1.5


# What was sent to a process of the pool, and not yet accepted


class _Processes(_Pool):  # type: ignore[misc]
    """
    Processes that finish what they were sent before they close.

    The consumer flushes the pool when it closes, to forget jobs that will be
    delivered again. Celery forgets those, too, that a process has already got:
    it runs them although their messages go back, and as nobody counts its
    results any more, it waits 30 s for them to be counted before it exits
    (billiard's ``Worker._ensure_messages_consumed``). Half a job in its pipe
    makes it wait for ever.
    """

    def flush(self) -> None:
        """Forget what was not sent, and finish sending what was begun."""
        if self._state != CLOSE:
            super().flush()
            return
        for job in tuple(self._cache.values()):
            if not job.accepted():
                self._finish_sending(job) if _is_sent(job) else job.discard()
        self.outbound_buffer.clear()

    def _finish_sending(self, job: Any) -> None:
        writer = job._writer()  # (a weak reference, dead when all is written)
        if writer in self._active_writers:
            self._flush_writer(job._write_to, writer)

    def has_result_of(self, pid: int) -> bool:
        """Tell whether a process has written something that was not read yet."""
        return any(process.outq._reader.poll(0) for process in self._pool if process.pid == pid)


def _is_sent(job: Any) -> bool:
    process = job._write_to
    return process is not None and process._is_alive()


def _is_cold() -> bool:
    return _is_on(state.should_terminate)


def _is_on(flag: Any) -> bool:
    # The exit code, which may be 0.
    return flag is not None and flag is not False


class TaskPool(prefork.TaskPool):
    """
    Celery's prefork pool, which ends without standing still, and runs nothing that it gives back.

    Attributes:
        is_interrupted:
            Whether a signal is being handled. Celery stops the pool right
            there, on top of whatever was interrupted: half a job or half a
            result in a pipe would be waited for without end.
    """

    Pool = _Processes

    is_interrupted = False

    def stop(self) -> None:
        """End when what was begun has ended; where that was interrupted, leave it to `terminate`."""
        if not self.is_interrupted:
            super().stop()

    def terminate(self) -> None:
        """End now: what runs was cut off already, and what has ended is to be acknowledged."""
        self.is_interrupted = False
        self.stop()
        super().terminate()

    def has_result_of(self, request: Any) -> bool:
        """Tell whether a task has ended whose result was not read yet: nothing is, while a signal is handled."""
        pool: Any = cast("Any", self)._pool
        return pool is not None and hasattr(pool, "has_result_of") and pool.has_result_of(request.worker_pid)


# Ending in time


class Worker(banners.Worker):
    """
    A worker that ends within its grace period.

    After SIGTERM running tasks have `grace` seconds, where it has any, and are
    then cut off as by SIGQUIT.
    """

    prefetch_multiplier: int

    is_ending = is_cutting_off = False
    _is_timed = _is_overdue = _was_patient = False

    def setup_defaults(self, **told: Any) -> None:
        """Take what the worker was told, or the settings; on green threads, as many messages ahead as Celery does."""
        super().setup_defaults(**told)
        settings, name = self.app.settings, "worker_prefetch_multiplier"
        # The command line hands over the setting where nobody gave its option.
        is_ours = settings.sources.get(name) == FROM_KIT and self.prefetch_multiplier == settings.celery[name]
        if is_ours and get_implementation(self.pool_cls).is_green:
            # Celery looks for messages once a second there when a place becomes free: one ahead is one a second.
            self.prefetch_multiplier = settings.defaults[name]

    @property
    def grace(self) -> float | None:
        """How long running tasks have after SIGTERM, in seconds; ``None`` when as long as they take."""
        grace = self.app.settings.kit.shutdown_grace
        return None if grace is None else float(grace.total_seconds())

    @property
    def patience(self) -> float:
        """How long running tasks have after SIGQUIT, in seconds."""
        return float(self.app.conf.worker_soft_shutdown_timeout)

    def on_start(self) -> None:
        """Start, and listen for the signals that end it."""
        super().on_start()
        signals.worker_shutting_down.connect(self._on_signal, weak=False)

    def _on_signal(self, how: str = "", **_: Any) -> None:
        # Sent by the handler of a signal: on the solo pool nothing else runs before the task has ended.
        if how == "Warm" and self.grace is not None:
            self.cut_off(after=self.grace)

    def cut_off(self, *, after: float) -> None:
        """Cut off what still runs after some seconds."""
        if not self._is_timed:
            self._is_timed = True
            threading.Thread(target=self._wait_and_cut_off, args=(after,), daemon=True).start()

    def _wait_and_cut_off(self, seconds: float) -> None:
        if self.blueprint.shutdown_complete.wait(seconds) or self.is_cutting_off:
            # One more signal would end this process on the spot.
            return
        self._is_overdue = True
        events.WORKER_OUT_OF_TIME.tell(after=seconds)
        # Its handler runs on the main thread, whatever that is waiting for.
        os.kill(os.getpid(), signal.SIGQUIT)

    def wait_for_soft_shutdown(self) -> None:
        """Give running tasks their seconds, but no longer than they take. Called by the handler of SIGQUIT."""
        self.is_ending = self.pool.is_interrupted = True
        if _runs_on_main_thread(self.pool):
            self._leave_alone_what_was_interrupted()
            return
        if self._is_overdue:
            return
        deadline = time.monotonic() + self.patience
        if self.patience and any(_running(self.pool)):
            events.WORKER_SOFT_SHUTDOWN.tell(delay=self.patience)
        while time.monotonic() < deadline and self._has_to_wait():
            time.sleep(_TICK)

    def _has_to_wait(self) -> bool:
        if self.is_cutting_off:
            return False
        return bool(self.app.conf.worker_enable_soft_shutdown_on_idle) or any(_running(self.pool))

    def end_without_fail(self) -> None:
        """Cut off what starts or goes on after all was cut off; called by the handler of SIGQUIT."""
        threading.Thread(target=self._cut_off_again, daemon=True).start()

    def _cut_off_again(self) -> None:
        if not self.blueprint.shutdown_complete.wait(_LAST_WORDS):
            # What had been sent to a process, and was not accepted when the others were cut off.
            _cut_off(self.pool)
        if not self.blueprint.shutdown_complete.wait(_LAST_WORDS):
            self._kill_processes()

    def _kill_processes(self) -> None:
        # There is no pool any more to give its facts when it has just ended.
        with suppress(AttributeError):
            for pid in self.pool.info["processes"]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _leave_alone_what_was_interrupted(self) -> None:
        # Waiting here would keep the task from going on. And Celery is about to cancel the consumer, which waits for
        # the broker's answer, and runs, on top of the interrupted task, whatever arrives before it.
        if any(_running(self.pool)):
            self.consumer.task_consumer = None

    def has_to_be_patient(self) -> bool:
        """Give a task that is not waited for where signals are handled its seconds, if it has not had them."""
        if self._is_overdue or self._was_patient or not (self.patience and _runs_on_main_thread(self.pool)):
            return False
        self._was_patient = True
        self.cut_off(after=self.patience)
        return True

    def leave_soon(self) -> None:
        """Leave, when a message that may just have been taken from the broker is among those to give back."""
        if _runs_on_main_thread(self.pool) or self.blueprint.state != cast("Any", bootsteps).RUN:
            self.leave()
        # Or the handler would wait for its tasks. `terminate` comes next.
        self.consumer.pool = None
        if self.hub is not None:
            self.hub.call_soon(_nothing)

    def terminate(self, in_sighandler: bool = False) -> None:
        """End now."""
        if not can_cut_off(self.pool) and any(_running(self.pool)):
            self.leave()
        super().terminate(in_sighandler)

    def leave(self) -> None:
        """
        Give back what was not finished, and end this process under the tasks that nothing else can cut off.

        What they do after this is done for nothing: their messages are back.
        """
        # Celery sets it when this handler is done. Who looks at it keeps nothing for the tasks from here on.
        cast("Any", state).should_terminate = os.EX_OK
        try:
            for request in tuple(_running(self.pool)):
                request.on_cut_off()
            if self.hub is not None:
                # Acknowledges what has ended.
                ignore_errors(self.consumer, self.hub.close)
            _hand_back(self.consumer)
            if self.pidlock:
                self.pidlock.release()
            # All that an ordinary exit does, but for waiting for threads.
            atexit._run_exitfuncs()
        except BaseException as error:  # noqa: BLE001  (an edge: what this raised would be raised in somebody's task)
            events.WORKER_NOT_ALL_GIVEN_BACK.tell(error=error, exc_info=True)
        finally:
            os._exit(os.EX_OK)


def cancel_active_requests(consumer: Any) -> None:
    """
    Cut off what runs, at a cold shutdown; its messages go back.

    For the method of this name of a consumer. As Celery's, but what has ended
    counts as such even if its result was not read yet, nothing is told to be
    retried that nobody will retry, and it works on pools that cannot cut off
    a task, too.
    """
    worker = consumer.controller
    if can_cut_off(worker.pool):
        worker.is_cutting_off = True
        _cut_off(worker.pool)
        if isinstance(worker, Worker):
            worker.end_without_fail()
    elif isinstance(worker, Worker) and any(_running(worker.pool)) and not worker.has_to_be_patient():
        worker.is_cutting_off = True
        worker.leave_soon()


def _cut_off(pool: Any) -> None:
    for request in tuple(_running(pool)):
        request.cancel(pool, emit_retry=False)


def may_start(consumer: Any) -> bool:
    """
    Tell whether a message that has arrived may start now.

    At a shutdown more of them arrive, while the broker's answer to the end of
    consuming is waited for; left alone, they go back with the others. The solo
    pool would run them right there.
    """
    return not (_is_on(state.should_stop) or _is_cold() or getattr(consumer.controller, "is_ending", False))


def can_cut_off(pool: Any) -> bool:
    """Tell whether a pool can end one task."""
    # Of the prefork pool an attribute, not a method.
    return getattr(pool.terminate_job, "__func__", None) is not BasePool.terminate_job


def _running(pool: Any) -> Iterator[Any]:
    """Find what would have to run again if this process ended now."""
    has_result_of = getattr(pool, "has_result_of", lambda request: False)
    for request in tuple(state.active_requests):
        if request.task.acks_late and (request.acknowledged or request.id in state.successful_requests):
            continue
        if not has_result_of(request):
            yield request


def _runs_on_main_thread(pool: Any) -> bool:
    return isinstance(pool, solo_pool.TaskPool)


def _nothing() -> None:
    """Wake the event loop."""


def _hand_back(consumer: Any) -> None:
    """Give all messages back that were not acknowledged."""
    connection, consumer.connection = consumer.connection, None
    if connection is None or not isinstance(connection.transport, virtual.Transport):
        # Other brokers do it by themselves when a connection is gone.
        return
    # Each takes in what is on its way before it gives all back; on the solo pool nothing may come.
    cast("Any", threads).bound_open_broker_sockets(connection, _LONGEST_POP)
    for channel in tuple(cast("Any", connection.transport).channels):
        try:
            channel.close()
        except (*connection.connection_errors, *connection.channel_errors):
            ignore_errors(connection, channel.qos.restore_unacked_once)
