"""
The app whose workers serve their numbers.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from prometheus_client import Counter

from celerykit import CeleryKit, Snooze, Task, metrics

app = CeleryKit("tests.integration.metrics_shop", set_as_current=False)

# As a module does that a website imports, too.
metrics.enable(app)

OWN = Counter("shop_charged", "A metric of the shop's own.")


@app.task
def add(a: int, b: int = 0) -> None:
    OWN.inc()


@app.task
def orders(number: int) -> None:
    add.enqueue_many([(n,) for n in range(number)])
    add.delay(number)


@app.task
def fails() -> None:
    raise ValueError("no")


@app.task(bind=True)
def flaky(self: Task[..., Any]) -> None:
    if self.request.retries == 0:
        raise self.retry(countdown=0.05)
    if self.request.retries == 1:
        raise Snooze(0.05)


@app.task(on_crash="bury")
def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(time_limit=0.5)
def overruns() -> None:
    time.sleep(30)


@app.task
def waits_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
