"""A shop whose workers can be made to stand still, and to hear nothing."""

from __future__ import annotations

import time
from typing import Any

from celery.worker.control import control_command

from celerykit import CeleryKit

app: Any = CeleryKit("health", set_as_current=False)


@app.task(ignore_result=True)
def nap(seconds: float) -> None:
    time.sleep(seconds)


@app.task(ignore_result=True, time_limit=1)
def short_nap(seconds: float) -> None:
    time.sleep(seconds)


@control_command()
def stand_still(state: Any, seconds: float) -> None:
    """Hold up the loop, as a call does that does not return."""
    time.sleep(seconds)


@control_command()
def go_deaf(state: Any) -> None:
    """Take no more messages, and know nothing of it: as after a reconnect that went wrong."""
    print("go_deaf")
    state.consumer.task_consumer.cancel()
