"""
One deadline for all the waits of a publish: for a free connection, to connect, to write, for an answer, to try again.

It stands in a context variable, where the sockets of `celerykit.connections`
find it. Each wait gets what is left, so a broker that answers byte by byte ends
no later than one that says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import monotonic
from typing import Any

__all__ = [
    "Deadline",
    "DeadlinePassed",
    "DeadlineSocket",
    "current",
    "leaving",
    "left",
    "mark_as_sent",
    "share_of",
    "stop_in_time",
    "within",
]


class DeadlinePassed(Exception):
    """
    A publish took as long as it may.

    Not an ``OSError``, nor anything else that Kombu or a broker's client
    would try again after.
    """


@dataclass(slots=True)
class Deadline:
    """
    When a publish must have come to its end, and what is known of it so far.

    Attributes:
        until:
            By the monotonic clock.

        seconds:
            What it was given at first.

        sent:
            Whether the message was handed to a connection, and so may have arrived.

        blocked:
            Whether the broker said that it takes no messages for now.

        leaving:
            Whether what is written now is the message, and no preparation for it.
    """

    until: float
    seconds: float
    sent: bool = False
    blocked: bool = False
    leaving: bool = False
    outer: Deadline | None = None

    def left(self) -> float:
        """
        Give the seconds that are left.

        Raises:
            DeadlinePassed: None are.
        """
        seconds = self.until - monotonic()
        if seconds <= 0:
            raise DeadlinePassed(f"no answer within {self.seconds:g} s")
        return seconds


_current: ContextVar[Deadline | None] = ContextVar("celerykit_publish_deadline", default=None)

#: The deadline that is in force here, if any.
current = _current.get


@contextmanager
def within(seconds: float) -> Iterator[Deadline]:
    """Let whatever is published in here end within *seconds*, or with the deadline that is in force already."""
    outer = _current.get()
    until = monotonic() + seconds
    deadline = Deadline(until if outer is None else min(until, outer.until), seconds, outer=outer)
    token = _current.set(deadline)
    try:
        yield deadline
    finally:
        _current.reset(token)


@contextmanager
def share_of(parts: int) -> Iterator[None]:
    """
    Give what is done in here one of so many equal parts of what is left.

    Raises:
        TimeoutError: That has passed, and the deadline has not.
    """
    outer = _current.get()
    if outer is None or parts < 2:
        yield
        return
    try:
        with within(outer.left() / parts):
            yield
    except DeadlinePassed as error:
        outer.left()
        raise TimeoutError(str(error)) from error


def left(seconds: float | None) -> float | None:
    """Cut a wait of *seconds*, or one without an end, to what is left."""
    deadline = _current.get()
    if deadline is None:
        return seconds
    return deadline.left() if seconds is None else min(seconds, deadline.left())


@contextmanager
def leaving(message: bool = True) -> Iterator[None]:
    """Tell that what is written in here is the *message*, or that it is something else."""
    deadline = _current.get()
    if deadline is None:
        yield
        return
    before, deadline.leaving = deadline.leaving, message
    try:
        yield
    finally:
        deadline.leaving = before


def mark_as_sent() -> None:
    """Remember that from here on the message may have arrived."""
    deadline = _current.get()
    while deadline is not None:
        deadline.sent = True
        deadline = deadline.outer


def _on_write() -> None:
    deadline = _current.get()
    if deadline is not None and deadline.leaving:
        mark_as_sent()


def stop_in_time(error: BaseException, interval: Any = 0) -> None:
    """
    Stop Kombu from trying again, when the deadline passes in the *interval* it would wait before.

    An ``errback`` of Kombu's. A function and not a method, because Kombu
    keeps it with the connection, which outlives the deadline.
    """
    deadline = _current.get()
    if deadline is not None and monotonic() + interval >= deadline.until:
        raise DeadlinePassed(str(error)) from error


class DeadlineSocket:
    """
    A socket whose waits end with the deadline that is in force; without one, as their timeout says.

    It wraps what py-amqp and redis-py wait in: to read and to write.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._timeout: float | None = sock.gettimeout()
        self._applied = self._timeout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def gettimeout(self) -> float | None:
        """Give the timeout that was asked for."""
        return self._timeout

    def settimeout(self, timeout: float | None) -> None:
        """Ask for a timeout, in seconds."""
        self._timeout = timeout

    def recv(self, *args: Any) -> Any:
        """Wait for bytes."""
        return self._waiting(self._sock.recv, args)

    def recv_into(self, *args: Any) -> Any:
        """Wait for bytes."""
        return self._waiting(self._sock.recv_into, args)

    def read(self, *args: Any) -> Any:
        """Wait for bytes, on TLS."""
        return self._waiting(self._sock.read, args)

    def sendall(self, *args: Any) -> Any:
        """Wait until all is written."""
        _on_write()
        return self._waiting(self._sock.sendall, args)

    def write(self, *args: Any) -> Any:
        """Wait until some is written, on TLS."""
        _on_write()
        return self._waiting(self._sock.write, args)

    def _waiting(self, wait: Any, args: Any) -> Any:
        timeout = left(self._timeout)
        if timeout != self._applied:
            self._sock.settimeout(timeout)
            self._applied = timeout
        try:
            return wait(*args)
        except (TimeoutError, BlockingIOError):
            # Theirs, or ours: only ours has passed.
            left(None)
            raise
