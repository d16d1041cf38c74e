"""
Event loops for tasks that are ``async def``.

Each pool child, or each thread of a threads pool, keeps one loop for as long as
it lives, so that clients and connection pools made in one task serve the next.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any

from billiard.exceptions import SoftTimeLimitExceeded

from celerykit.errors import InvalidOptions

__all__ = ["in_thread", "is_running", "refuse_green_threads", "run", "waiting_for"]

_Coroutine = Coroutine[Any, Any, Any]

_local = threading.local()


def run(make: Callable[[], _Coroutine]) -> Any:
    """
    Run what *make* gives on this thread's loop, and wait for it.

    When the soft time limit strikes, the running coroutine is cancelled, and
    ``SoftTimeLimitExceeded`` is raised once it has cleaned up.
    """
    # Each call in the context of its caller; a runner left to itself keeps that of its first.
    return _runner().run(_limited(make), context=contextvars.copy_context())


def in_thread(call: Callable[[], Any]) -> Any:
    """
    Make *call* on a thread of its own, and wait for it.

    For an eager call inside a running loop: waiting on this thread would stop
    that loop for good.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, call).result()


def waiting_for(function: Callable[..., _Coroutine]) -> Callable[..., Any]:
    """Make a plain function of a coroutine function: one that runs it, and waits for it."""

    @functools.wraps(function)
    def wait(*args: Any, **kwargs: Any) -> Any:
        # Within another coroutine it is awaited: `await super().run(...)`.
        return function(*args, **kwargs) if is_running() else run(lambda: function(*args, **kwargs))

    return wait


async def _limited(make: Callable[[], _Coroutine]) -> Any:
    task = asyncio.ensure_future(make())
    with _soft_limit_of(task) as limit:
        try:
            return await task
        except asyncio.CancelledError:
            if limit.struck:
                raise SoftTimeLimitExceeded from None
            # Left as it is, a BaseException, it would end the pool child and not the task.
            raise RuntimeError("the task's coroutine was cancelled from within") from None


class _SoftLimit:
    struck = False


@contextmanager
def _soft_limit_of(task: asyncio.Task[Any]) -> Iterator[_SoftLimit]:
    """
    Let the soft time limit cancel *task*.

    Celery's handler raises wherever the interpreter is at that moment; in the
    middle of the loop's own bookkeeping that can lose a callback. In the task's
    own code it is what we want: it interrupts what never awaits.
    """
    limit = _SoftLimit()
    before = _handler()
    if before is None:
        yield limit
        return
    loop = task.get_loop()

    def strike(signum: int, frame: FrameType | None) -> None:
        limit.struck = True
        if asyncio.current_task(loop) is task:
            raise SoftTimeLimitExceeded
        loop.call_soon_threadsafe(task.cancel)

    signal.signal(signal.SIGUSR1, strike)
    try:
        yield limit
    finally:
        signal.signal(signal.SIGUSR1, before)


def _handler() -> Any:
    """
    Give the handler of the soft time limit.

    The main thread of a prefork child has it. Any other handler of this signal
    means something else: a solo worker prints its stacks, a web server opens
    its logs again.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGUSR1"):
        return None
    handler = signal.getsignal(signal.SIGUSR1)
    return handler if getattr(handler, "__module__", "") == "billiard.pool" else None


def is_running() -> bool:
    """Tell whether a loop is running on this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class _Home:
    """The loop of one thread in one process, which ends with the thread."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.runner = asyncio.Runner()

    def close(self) -> None:
        if self.pid == os.getpid():
            self.runner.close()

    def __del__(self) -> None:
        # Closing starts a thread; one that starts while Python ends never begins, and would be waited for without end.
        if not sys.is_finalizing():
            self.close()


def _runner() -> asyncio.Runner:
    # A forked child must neither use nor close its parent's loop, as they share a selector; so it is kept, unused.
    homes: dict[int, _Home] = _local.__dict__.setdefault("homes", {})
    if os.getpid() not in homes:
        homes[os.getpid()] = home = _Home()
        if threading.current_thread() is threading.main_thread():
            atexit.register(home.close)  # it has no end before Python's own
    return homes[os.getpid()].runner


def refuse_green_threads(task: str) -> None:
    """
    Refuse an ``async def`` task under gevent or eventlet, whose loop is not asyncio's.

    Raises:
        InvalidOptions: The process is patched by one of them.
    """
    for library in filter(_is_patched, ("gevent", "eventlet")):
        raise InvalidOptions(
            f"{task}: an `async def` task cannot run under {library}; use the prefork, threads or solo pool."
        )


def _is_patched(library: str) -> bool:
    if library == "gevent" and "gevent.monkey" in sys.modules:
        return bool(sys.modules["gevent.monkey"].is_module_patched("socket"))
    if library == "eventlet" and "eventlet.patcher" in sys.modules:
        return bool(sys.modules["eventlet.patcher"].is_monkey_patched("socket"))
    return False
