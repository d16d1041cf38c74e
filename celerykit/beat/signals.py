"""The signals that end a beat, put off until a tick is at its end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["uninterrupted"]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """
    Put the signals that end a beat off until the end of the block, the first time.

    Celery's handler raises where it finds the program: with a tick claimed
    and, perhaps, sent.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {
        number: handler
        for number in (signal.SIGTERM, signal.SIGINT)
        if (handler := signal.getsignal(number)) is not None
    }
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        restore()
    if came:
        signal.raise_signal(came[0])
