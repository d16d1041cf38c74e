"""What would go past the log: what is printed, and exceptions that nobody catches."""

from __future__ import annotations

import sys
import threading
from typing import Any

from celery import signals
from celery.utils import log

from celerykit import events

__all__ = ["Printed", "tell_uncaught"]

#: A line is told when it is that long, even if it has not ended.
_LONGEST = 8 * 1024


#: celery-types has it wrong.
_Proxy: Any = log.LoggingProxy


class Printed(_Proxy):  # type: ignore[misc]
    """
    What stands in place of `sys.stdout` and `sys.stderr`, as Celery's, but line by line.

    Python's ``print`` writes each of its arguments on its own.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, logger: Any, loglevel: Any = None) -> None:
        super().__init__(logger, loglevel)
        self._begun = threading.local()

    def write(self, data: Any) -> int:
        """Tell the lines that end in *data*, and keep what begins."""
        text = data if isinstance(data, str) else str(data)
        *lines, rest = (getattr(self._begun, "text", "") + text).split("\n")
        if len(rest) > _LONGEST:
            lines, rest = [*lines, rest], ""
        self._begun.text = rest
        for line in lines:
            if line.strip():
                super().write(line)
        return len(text)

    def flush(self) -> None:
        """Tell what has begun as if its line had ended."""
        if getattr(self._begun, "text", ""):
            self.write("\n")


def _flush(**_: Any) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Printed):
            stream.flush()


# What a task prints is told while it runs.
signals.task_postrun.connect(_flush, weak=False, dispatch_uid="celerykit.logs.printed")


def tell_uncaught() -> None:
    """Tell exceptions that end a thread or this process, unless somebody does already."""
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _thread_failed
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _crashed


def _thread_failed(what: Any) -> None:
    if what.exc_type is SystemExit:
        return
    error = what.exc_value or what.exc_type()
    name = what.thread.name if what.thread is not None else None
    events.PROCESS_THREAD_FAILED.tell(thread=name, error=error, exc_info=(what.exc_type, error, what.exc_traceback))


def _crashed(kind: Any, error: BaseException, traceback: Any) -> None:
    if issubclass(kind, Exception):
        events.PROCESS_CRASHED.tell(error=error, exc_info=(kind, error, traceback))
    else:
        sys.__excepthook__(kind, error, traceback)
