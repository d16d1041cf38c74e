"""
The app that breaks: what it does goes into the ledger, and how it breaks is an argument.

Each process, and each test, has one of its own: it reads its broker, its
queue, and the folder of its scene in the environment.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

from celery import signals

from celerykit import Backoff, CeleryKit, Dead, Drop, Retry, Snooze
from tests.faults.ledger import Ledger

app = CeleryKit("tests.faults.shop")

#: Not shared with other apps, as Celery does by default: a test's process imports the shop anew for each test.
task: Any = partial(app.task, shared=False)

#: Where the ledger is, and files that say what a test wants: `gate`, `cured`.
FOLDER = Path(os.environ.get("FAULTS_FOLDER", "."))

ledger = Ledger(FOLDER / "ledger")

Moment = Literal["", "start", "half", "effect", "stored"]

#: No task waits longer for its test.
_PATIENCE = 90.0


def note(event: str) -> None:
    request = app.current_task.request  # type: ignore[union-attr]
    ledger.write(event, task_id=request.id, retries=request.retries)


def is_cured() -> bool:
    """Tell whether the test has repaired what is wrong."""
    return (FOLDER / "cured").exists()


def wait_for_gate() -> None:
    deadline = time.monotonic() + _PATIENCE
    while not (FOLDER / "gate").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def reach(moment: Moment, *, hold_at: Moment = "") -> None:
    """Write that the run came this far, and go no further until the test lets it."""
    note(moment)
    if moment == hold_at:
        wait_for_gate()


def _work(hold_at: Moment, seconds: float) -> str:
    reach("start", hold_at=hold_at)
    time.sleep(seconds)
    reach("half", hold_at=hold_at)
    reach("effect", hold_at=hold_at)
    note("end")
    return hold_at


@task()
def work(hold_at: Moment = "", seconds: float = 0.0) -> str:
    return _work(hold_at, seconds)


@task(on_crash="bury")
def work_once(hold_at: Moment = "", seconds: float = 0.0) -> str:
    return _work(hold_at, seconds)


@signals.task_postrun.connect(weak=False)
def _hold_when_stored(kwargs: dict[str, Any], **_: Any) -> None:
    # The result is stored by now, and the worker's parent process does not know it yet.
    if kwargs.get("hold_at") == "stored":
        wait_for_gate()


@signals.task_failure.connect(weak=False)
def _failure_told(task_id: str, **_: Any) -> None:
    ledger.write("task_failure", task_id=task_id)


@task()
def told(uuid: str) -> None:
    """Be an errback."""
    ledger.write("errback", task_id=uuid)


@task()
def total(values: list[str]) -> int:
    """Be the body of a chord."""
    reach("effect")
    return len(values)


# What kills its process


Death = Literal["exit", "segfault", "out of memory", "worker", "SystemExit", "KeyboardInterrupt", "MemoryError"]


def _die(how: Death) -> None:
    match how:
        case "exit":
            os._exit(3)
        case "segfault":
            ctypes.string_at(0)
        case "out of memory":  # as the kernel does it
            os.kill(os.getpid(), signal.SIGKILL)
        case "worker":
            time.sleep(0.3)  # for what is behind this message to arrive
            os.killpg(0, signal.SIGKILL)
        case "SystemExit":
            sys.exit(1)
        case "KeyboardInterrupt":
            raise KeyboardInterrupt
        case "MemoryError":
            raise MemoryError


@task()
def poison(how: Death) -> None:
    note("start")
    if not is_cured():
        _die(how)
    note("effect")


# What ends with an error


def _overrun() -> None:
    note("start")
    if not is_cured():
        time.sleep(_PATIENCE)
    note("effect")


@task(time_limit=1)
def over_hard_limit() -> None:
    _overrun()


@task(soft_time_limit=1)
def over_soft_limit() -> None:
    _overrun()


class Declined(Exception):
    """Is final."""


class Unimportant(Exception):
    """May be forgotten."""


@task(
    retry=Retry(
        on={ConnectionError: Backoff(base=0.2, cap=0.4), Declined: Dead(), Unimportant: Drop()},
        attempts=3,
    ),
)
def flaky(error: Literal["ConnectionError", "Declined", "Unimportant"] = "ConnectionError") -> str:
    note("start")
    if not is_cured():
        raise {"ConnectionError": ConnectionError, "Declined": Declined, "Unimportant": Unimportant}[error]("not yet")
    note("effect")
    return "done"


@task(retry=Retry(on={ConnectionError: Backoff(base=0.5, factor=1, cap=0.5, jitter=0)}, attempts=60))
def patient() -> None:
    """Try again, every half second, until the test has repaired it."""
    note("start")
    if not is_cured():
        raise ConnectionError("not yet")
    note("effect")


@task(retry=Retry(on={ConnectionError: Dead()}, attempts=2))
def sleepy(seconds: float) -> None:
    """Snooze more often than it has attempts."""
    note("start")
    if not is_cured():
        raise Snooze(seconds)
    note("effect")


@task()
def failing() -> None:
    note("start")
    if not is_cured():
        raise RuntimeError("out of order")
    note("effect")


@task()
def failing_later() -> None:
    """Fail once the test lets it."""
    reach("start", hold_at="" if is_cured() else "start")
    if not is_cured():
        note("raised")
        raise RuntimeError("out of order")
    note("effect")


@task(bind=True)
def rejecting(self: Any) -> None:
    from celery.exceptions import Reject

    note("start")
    if not is_cured():
        raise Reject("not mine", requeue=False)
    note("effect")


# What cannot be stored, or pickled


def _odd(kind: str) -> Any:
    values: dict[str, Any] = {"object": object(), "a lambda": lambda: None}
    if kind == "recursive":
        value: list[Any] = []
        value.append(value)
        return value
    if kind == "a lock":
        return threading.Lock()
    return values[kind]


@task()
def odd_result(kind: str):  # type: ignore[no-untyped-def]  (it has no type)
    note("start")
    note("effect")
    return _odd(kind)


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")

    __repr__ = __str__


class _TwoArguments(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def _error(kind: str) -> BaseException:
    if kind == "of a local class":

        class LocalError(Exception):
            pass

        return LocalError("local")
    errors: dict[str, BaseException] = {
        "with a lock in it": RuntimeError(threading.Lock()),
        "without words": _Unprintable(),
        "of 20 MB": RuntimeError("x" * 20_000_000),
        "that cannot be built again": _TwoArguments("one", "two"),
        "with surrogates": RuntimeError("\udc80"),
        "with an odd name": type("1 no name\n", (Exception,), {})("odd"),
    }
    return errors[kind]


@task()
def odd_error(kind: str) -> None:
    note("start")
    if not is_cured():
        raise _error(kind)
    note("effect")


# What only a newer deploy knows

if os.environ.get("FAULTS_DEPLOY") == "new":

    @task()
    def novelty() -> None:
        note("start")
        note("effect")
