"""A shop whose tasks say something, in every way there is."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import warnings
from datetime import timedelta

import structlog
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.log import get_task_logger

from celerykit import Backoff, CeleryKit, Retry

#: Not the current app of a test process, whose other tests may read its settings before these are made.
app = CeleryKit("logs", set_as_current=False)


@app.task
def speak(order: str = "A-1") -> str:
    structlog.get_logger("shop").info("paid", order=order, password="hunter2")
    get_task_logger("shop.tasks").info("by a logger of tasks: %s", order)
    logging.getLogger("library").warning("by a library", extra={"status": 503})
    print("printed", order)
    sys.stderr.write("to stderr, in\ntwo lines\n")
    warnings.warn("careful", UserWarning, stacklevel=1)
    try:
        raise KeyError("caught")
    except KeyError:
        logging.getLogger("library").exception("with a traceback")
        traceback.print_exc()
    logging.getLogger("library").error("%d arguments do not fit", "these")
    thread = threading.Thread(target=lambda: 1 / 0, name="helper")
    thread.start()
    thread.join()
    return order


@app.task(retry=Retry({ConnectionError: Backoff(base=0.05, cap=0.05)}, attempts=2), ignore_result=False)
def flaky() -> None:
    raise ConnectionError("gone")


@app.task(ignore_result=False)
def fail() -> None:
    raise ValueError("bad news")


@app.task(soft_time_limit=0.3, ignore_result=False)
def log_on() -> str:
    """Log, which takes its time, until a soft time limit strikes; it has none where it is on another thread."""
    is_limited = threading.current_thread() is threading.main_thread()
    try:
        for number in range(300 if is_limited else 1):
            logging.getLogger("shop").info("line %s", number, extra={"items": [object()] * 15_000})
    except SoftTimeLimitExceeded:
        return "struck"
    return "went on"


@app.task(schedule=timedelta(seconds=0.5), shared=False)
def tick() -> None: ...
