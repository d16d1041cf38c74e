"""
The app whose calls have keys: what its tasks do goes into the ledger under the number of the order.

A test writes an order's *fate*: at which point the process that handles it is
to die. The points lie inside the tasks, at the signals of Celery's, and around
the store, so that they are where nobody could say afterwards what was done.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

from celery import signals
from pydantic import BaseModel

from celerykit import Backoff, CeleryKit, Key, Once, Retry, Snooze
from celerykit.stores import Store, Swap, Swapped
from tests.faults.ledger import Ledger

#: Where the ledger is, and files that say what a test wants: `gate-…`, `cured-…`, `fate-…`.
FOLDER = Path(os.environ.get("FAULTS_FOLDER", "."))

ledger = Ledger(FOLDER / "ledger")

#: No process waits longer for its test.
_PATIENCE = 60.0


# Fates

_SIGNALS = {"die": signal.SIGKILL, "freeze": signal.SIGSTOP}


def strike(point: str) -> None:
    """Let the fate that is written for this point come true, once."""
    number = _number()
    for what, how in _SIGNALS.items():
        if _takes(what, point, number):
            ledger.write(what, task_id=number or "sender")
            os.kill(os.getpid(), how)


def _takes(what: str, point: str, number: str | None) -> bool:
    """
    Take a fate away, if there is this one.

    A sender's is in its environment: who handles the same call has another.
    """
    if number is None:
        is_fated = os.environ.get("FAULTS_FATE") == f"{what} {point}"
        return is_fated and bool(os.environ.pop("FAULTS_FATE"))
    try:
        (FOLDER / f"fate-{number}-{what}-{point.replace(' ', '-')}").unlink()
    except FileNotFoundError:
        return False
    return True


def _number() -> str | None:
    """Give the number of the order that is handled here; ``None`` in a process that only sends."""
    task = app.current_worker_task
    return None if task is None else str((task.request.kwargs or {}).get("number", ""))


class Doomed:
    """A store whose user may die just before, or just after, it has moved a claim, or claimed the tick of a beat."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def swap(self, *swaps: Swap) -> list[Swapped]:
        for state in _states(swaps):
            strike(f"before {state}")
        swapped = self._store.swap(*swaps)
        for state in _states(swap for swap, one in zip(swaps, swapped, strict=True) if one.done):
            strike(f"after {state}")
        return swapped


def _states(swaps: Iterable[Swap]) -> set[str]:
    written = [swap.new for swap in swaps if swap.new is not None]
    return {"tick" if '"tick"' in new.data else new.version.partition(":")[0] for new in written}


class Shop(CeleryKit):
    @cached_property
    def store(self) -> Any:
        return Doomed(super().store)


app = Shop("tests.faults.keys_shop")

#: Not shared with other apps: a test's process imports the shop anew for each scene.
task: Any = partial(app.task, shared=False)

#: Longer than any row takes, and shorter than a day.
kept = Once(keep=600)


@signals.task_postrun.connect(weak=False)
def _stored(**_: Any) -> None:
    # The result is stored by now, and the worker's parent process does not know it yet.
    strike("stored")


@signals.after_task_publish.connect(weak=False)
def _published(**_: Any) -> None:
    strike("published")


# Tasks


class Receipt(BaseModel):
    """What is told of an order; *run* tells one run from every other one."""

    number: str
    run: str


def reach(point: str) -> None:
    request: Any = app.current_task.request  # type: ignore[union-attr]
    number = request.kwargs.get("number") or request.id
    ledger.write(point, task_id=number, retries=request.retries)
    strike(point)


def wait_for(what: str, number: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not (FOLDER / f"{what}-{number}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def is_cured(number: str) -> bool:
    return (FOLDER / f"cured-{number}").exists()


def _pay(number: str, held: bool) -> Receipt:
    reach("start")
    if held:
        wait_for("gate", number)
    return _paid(number)


def _paid(number: str) -> Receipt:
    reach("effect")
    return Receipt(number=number, run=uuid4().hex)


#: What makes calls the same. `held` is part of their arguments, and not of their key.
Number = Annotated[str, Key()]


@task(once=kept)
def pay(number: Number, held: bool = False) -> Receipt:
    return _pay(number, held)


@task(once=kept, on_crash="bury")
def pay_at_most_once(number: Number, held: bool = False) -> Receipt:
    return _pay(number, held)


@task(once=kept, on_store_down="run")
def pay_all_the_same(number: Number, held: bool = False) -> Receipt:
    return _pay(number, held)


@task(once=kept, on_store_down="fail")
def pay_or_fail(number: Number, held: bool = False) -> Receipt:
    return _pay(number, held)


@task(once=Once(keep=2))
def pay_and_forget(number: Number, held: bool = False) -> Receipt:
    return _pay(number, held)


_soon = Retry(on={ConnectionError: Backoff(base=0.3, factor=1, cap=0.3, jitter=0)}, attempts=5)


def _begun(number: str, held: int) -> int:
    """Begin a run, and say which it is; the one that is *held* waits for its test."""
    reach("start")
    run = ledger.count("start", number)
    if run == held:
        wait_for("gate", number)
    return run


@task(once=kept, retry=_soon)
def pay_the_third_time(number: Number, held: int = 0) -> Receipt:
    """Fail twice, and be retried."""
    if _begun(number, held) < 3:
        raise ConnectionError("not yet")
    return _paid(number)


@task(once=kept)
def pay_when_awake(number: Number, held: int = 0) -> Receipt:
    """Snooze twice."""
    if _begun(number, held) < 3:
        raise Snooze(0.3)
    return _paid(number)


@task(once=kept)
def pay_if_cured(number: Number, held: bool = False) -> Receipt:
    """Fail unless the test has repaired it."""
    reach("start")
    if held:
        wait_for("gate", number)
    if not is_cured(number):
        raise RuntimeError("out of order")
    return _paid(number)


@task(remember=True)
def mail(number: str, held: bool = False) -> str:
    """Have no key, and yet not run again once it is done."""
    reach("start")
    reach("effect")
    return uuid4().hex


@task(remember=True)
def follow(number: str) -> None:
    """Be what a call leads to."""
    reach("followed")


@task(once=kept)
def stamp(number: Number) -> None:
    """Be one of thousands."""
    reach("start")
    reach("effect")


@task()
def total(receipts: list[Receipt]) -> int:
    """Be the body of a chord: count what is different."""
    return len({receipt.run for receipt in receipts})


# Beats

#: Seconds between two ticks.
EVERY = 0.5


@app.task(shared=False, remember=True, bind=True)
def tick(self: Any, number: str = "tick") -> None:
    """Be sent by beats. Each tick has an id, whoever sends it."""
    ledger.write("tick", task_id=self.request.id)


app.schedule(tick.s(), every=EVERY, name="tick")
