"""Tasks with limits, that write down when they run."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis

from celerykit import CeleryKit, Concurrent, Rate, Task

app = CeleryKit("tests.integration.limits_shop")


def ledger() -> redis.Redis:
    return redis.Redis.from_url(os.environ["LEDGER"], decode_responses=True)


@contextmanager
def counted(name: str) -> Iterator[redis.Redis]:
    """Note when it runs, and how many do."""
    with ledger() as notes:
        notes.rpush(f"starts {name}", time.time())
        notes.rpush(f"at once {name}", notes.incr(f"running {name}"))
        yield notes
        notes.decr(f"running {name}")


@app.task(limits=Concurrent(2))
def in_pairs(name: str, seconds: float) -> None:
    with counted(name):
        time.sleep(seconds)


@app.task(limits=Concurrent(2))
async def in_pairs_too(name: str, seconds: float) -> None:
    with counted(name):
        await asyncio.sleep(seconds)


@app.task(bind=True, limits=Rate("5/s"))
def paced(self: Task[..., Any]) -> int:
    with counted("paced"):
        return int(self.request.headers["celerykit"].get("attempt", 1))


@app.task(limits=Concurrent(1, by="tenant"))
def alone(tenant: str) -> None:
    with counted(tenant) as notes:
        deadline = time.monotonic() + 60
        while notes.exists(f"hold {tenant}") and time.monotonic() < deadline:
            time.sleep(0.02)


@app.task
def free() -> str:
    return "free"
