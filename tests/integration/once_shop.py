"""
A shop whose calls have keys, and that writes down what it ran.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Annotated, Any

import redis
from celery import signals
from pydantic import BaseModel

from celerykit import Backoff, CeleryKit, Key, Once, Retry, Snooze, Task

app = CeleryKit("tests.integration.once_shop")

Name = Annotated[str, Key()]

AT_ONCE = Retry({OSError: Backoff(base=0.05, jitter=0)}, attempts=3)


class Receipt(BaseModel):
    name: str
    amount: int
    run: int


def ledger() -> redis.Redis:
    return redis.Redis.from_url(os.environ["LEDGER"], decode_responses=True)


def ran(name: str) -> int:
    """Write down that this was run, wait as long as somebody holds it, and say which run it is."""
    with ledger() as notes:
        run = int(notes.incr(f"ran {name}"))
        deadline = time.monotonic() + 20
        while notes.exists(f"hold {name}") and time.monotonic() < deadline:
            time.sleep(0.01)
        return run


def receipt(name: Name, amount: int = 1) -> Receipt:
    return Receipt(name=name, amount=amount, run=ran(name))


charge = app.task(name="charge", once=Once())(receipt)
refuse = app.task(name="refuse", once=Once(running="raise", done="raise"))(receipt)
skip = app.task(name="skip", once=Once(running="skip", done="skip"))(receipt)
rerun = app.task(name="rerun", once=Once(done="rerun"))(receipt)
briefly = app.task(name="briefly", once=Once(keep=0.5))(receipt)
unstored = app.task(name="unstored", once=Once(), ignore_result=True)(receipt)


@app.task(once=Once())
async def fetch(name: Name) -> Receipt:
    return Receipt(name=name, amount=0, run=await asyncio.to_thread(ran, name))


@app.task(once=Once())
def note(name: Name) -> None:
    ran(name)


@app.task(once=Once())
def untyped(name, amount=1):  # type: ignore[no-untyped-def]
    return [name, ran(name)]


@app.task(once=Once(), retry=AT_ONCE)
def flaky(name: Name, fail: int = 2) -> int:
    run = ran(name)
    if run <= fail:
        raise OSError(name)
    return run


@app.task(once=Once())
def snoozing(name: Name) -> int:
    run = ran(name)
    if run == 1:
        raise Snooze(0.05)
    return run


@app.task(bind=True, once=Once())
def by_hand(self: Task[..., Any], name: Name) -> int:
    run = ran(name)
    if run == 1:
        raise self.retry(countdown=0)
    return run


@app.task(bind=True, once=Once())
def replaced(self: Task[..., Any], name: Name) -> Receipt:
    ran(f"{name} before")
    return self.replace(charge.s(name, amount=7))  # type: ignore[return-value]


@app.task(remember=True)
def remembered(name: str) -> int:
    return ran(name)


@app.task(once=Once())
def ship(sent: Annotated[Receipt, Key()]) -> str:
    return f"{sent.name} {ran(f'{sent.name} shipped')}"


@app.task
def total(receipts: list[Receipt]) -> int:
    return sum(receipt.amount for receipt in receipts)


def _next_page(self: Task[..., Any], name: str, page: int) -> int:
    ran(f"{name} page {page}")
    return page if page == 3 else self.replace(self.si(name, page + 1))  # type: ignore[no-any-return]


pages = app.task(name="pages", bind=True, remember=True)(_next_page)
keyed_pages = app.task(name="keyed_pages", bind=True, once=Once(key=lambda name: name))(_next_page)


@app.task(once=Once(key=lambda names: names["first"]))
def picky(names: dict[str, str]) -> str:
    ran(names["first"])
    return names["first"]


@signals.task_prerun.connect(weak=False)
def _die_before_the_claim(task: Any, args: Any, **_: Any) -> None:
    if task.name == poison.name:
        ran(f"{args[0]} killed")
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(once=Once())
def poison(name: Name) -> int:
    """Never run: its process dies before it can ask for its key."""
    return 0
