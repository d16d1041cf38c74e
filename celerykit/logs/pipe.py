"""
Writes lines to a stream that may be slow to read, without waiting for it.

A pipe holds 64 KiB, and whoever writes into a full one stands still until
somebody reads: a worker whose log collector hangs would hang with it. So what
does not fit waits here, up to a bound, and a thread writes it when there is
room; beyond the bound lines are dropped and counted.

As long as nothing waits, a line is in the pipe before `emit` returns: a process
that is killed has lost nothing.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import socket
import stat
import struct
import sys
import termios
import threading
import time
import weakref
from collections import deque
from typing import Any, Protocol

from celery import signals
from celery.exceptions import SoftTimeLimitExceeded

from celerykit.events import LOG_DROPPED
from celerykit.logs.handlers import Stream

__all__ = ["BACKLOG", "PipeHandler", "handler_for"]

#: The most that waits in one process, in bytes.
BACKLOG = 4 * 1024 * 1024

#: Seconds that a process which ends waits for a reader.
_FLUSH_WITHIN = 2.0

#: Seconds between two looks at a pipe that nobody reads, and at one that has room, but not for a long line.
_LOOK, _TICK = 0.5, 0.002


def handler_for(stream: Any) -> logging.Handler:
    """Give a handler that writes to *stream*: one that does not wait, where waiting is possible."""
    if stream is not None and not _is_green():
        try:
            mode = os.fstat(stream.fileno()).st_mode
        except (OSError, ValueError, AttributeError):  # closed, or no file at all
            mode = 0
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            return PipeHandler(stream)
    return Stream(stream)


def _is_green() -> bool:
    """Tell whether gevent or eventlet have put themselves in the place of threads, and of waiting."""
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    is_gevent = gevent is not None and bool(gevent.is_module_patched("threading"))
    return is_gevent or (eventlet is not None and bool(eventlet.is_monkey_patched("thread")))


class _Sink(Protocol):
    """Takes bytes, as many as there is room for."""

    fd: int

    def write(self, data: bytes) -> int: ...

    def close(self) -> None: ...


class _Pipe:
    """
    A pipe, opened anew.

    Not to wait is a property of what was opened, and what we inherited is
    shared with others who may want to wait.
    """

    def __init__(self, fd: int) -> None:
        self.fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def write(self, data: bytes) -> int:
        if len(data) <= select.PIPE_BUF:
            return os.write(self.fd, data)
        # One long line at a time: each looks for room first.
        fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            _check_room(self.fd, len(data))
            return os.write(self.fd, data)
        finally:
            fcntl.flock(self.fd, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self.fd)


class _Socket:
    """A socket, such as systemd's journal."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=os.dup(fd))
        self.fd = self._socket.fileno()

    def write(self, data: bytes) -> int:
        return self._socket.send(data, socket.MSG_DONTWAIT)

    def close(self) -> None:
        self._socket.close()


class _Shared:
    """
    A pipe that cannot be opened anew: there is no ``/proc``, or it is another user's.

    New kernels can be asked not to wait for one write. Of others it is known
    that where there is room there is room for PIPE_BUF bytes, unless another
    process takes it in between.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._can_be_asked = hasattr(os, "RWF_NOWAIT")

    def write(self, data: bytes) -> int:
        _check_room(self.fd, len(data))
        if self._can_be_asked:
            try:
                return os.pwritev(self.fd, [data], -1, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
                self._can_be_asked = False
        if not _has_room(self.fd, 0.0):
            raise BlockingIOError(errno.EAGAIN, "full")
        return os.write(self.fd, data[: select.PIPE_BUF])

    def close(self) -> None:
        """Leave it open: it is not ours."""


#: How a kernel says that it does not know `RWF_NOWAIT`, or not for pipes.
_CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ESPIPE)


#: What a pipe is made of, and how many of them others may take while a long line is written.
_PAGE, _SPARE = 4096, 2


def _check_room(fd: int, size: int) -> None:
    """
    Raise for a long line that would have to be written in two goes.

    Up to PIPE_BUF bytes are written at once or not at all. Of more, a part may
    be, and then a line of another process comes in between.
    """
    if size <= select.PIPE_BUF or not hasattr(fcntl, "F_GETPIPE_SZ"):
        return
    pages = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) // _PAGE
    [held] = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    # Two neighbours hold more than a page together, or they would be one. The first may be read in part.
    taken = 2 * held // _PAGE + 2
    # An empty pipe has what it ever will have.
    if held and pages - taken < size // _PAGE + 2 + _SPARE:
        raise BlockingIOError(errno.EAGAIN, "not enough room")


def _open(fd: int) -> _Sink:
    try:
        return _Socket(fd) if stat.S_ISSOCK(os.fstat(fd).st_mode) else _Pipe(fd)
    except OSError:
        return _Shared(fd)


def _has_room(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(seconds * 1000))


class PipeHandler(logging.StreamHandler[Any]):
    """
    Writes each record as one line to a pipe or a socket, and never waits for its reader.

    Attributes:
        dropped:
            How many lines were thrown away since that was last told.
    """

    terminator = "\n"

    def __init__(self, stream: Any, *, backlog: int = BACKLOG) -> None:
        super().__init__(stream)
        self._most = backlog
        self._forget()
        _handlers.add(self)

    def _forget(self) -> None:
        """Begin anew: with nothing that waits, and no thread."""
        self._sink: _Sink | None = None
        self._waiting: deque[bytes] = deque()
        self._held = 0
        self._thread: threading.Thread | None = None
        self.dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write it now if there is room, and else when there is. Called with the handler's lock."""
        try:
            line = f"{self.format(record)}{self.terminator}".encode(errors="backslashreplace")
        except SoftTimeLimitExceeded:
            raise
        except Exception:  # noqa: BLE001  (an edge: anybody's formatter)
            self.handleError(record)
            return
        if not self._waiting:
            line = self._write(line)
        if line:
            self._wait_with(line)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (`logging`'s name)
        """Say nothing: ``sys.stderr`` may lead back to this handler."""

    def flush(self) -> None:
        """Write what waits, for as long as a process that ends may take."""
        deadline = time.monotonic() + _FLUSH_WITHIN
        while self._waiting and (left := deadline - time.monotonic()) > 0:
            self._write_some(min(left, _LOOK))

    def close(self) -> None:
        """Write what waits, and close what was opened for it."""
        self.flush()
        self.acquire()
        try:
            if self._sink is not None:
                self._sink.close()
            self._forget()
        finally:
            self.release()
        super().close()

    # With the handler's lock

    def _write(self, data: bytes) -> bytes:
        """Write as much as there is room for, and give the rest; what nobody can ever read is gone."""
        try:
            if self._sink is None:
                self._sink = _open(self.stream.fileno())
            while data:
                written = self._sink.write(data)
                data = data[written:]
        except BlockingIOError:
            return data
        except (OSError, ValueError):
            # Its reader is gone, or it is closed. That is no reason to end, and there is nobody to tell.
            return b""
        return b""

    def _wait_with(self, line: bytes) -> None:
        if self._held + len(line) > self._most:
            self.dropped += 1
            return
        self._waiting.append(line)
        self._held += len(line)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._write_all, name="celerykit-log", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the interpreter ends: `flush` writes it
                self._thread = None

    # Without

    def _write_all(self) -> None:
        me = threading.current_thread()
        while True:
            self._write_some(_LOOK)
            self.acquire()
            try:
                if self._thread is not me:
                    return
                if not self._waiting:
                    self._thread = None
                    dropped, self.dropped = self.dropped, 0
                    break
            finally:
                self.release()
        if dropped:
            LOG_DROPPED.tell(count=dropped)

    def _write_some(self, seconds: float) -> None:
        """Wait for room, and fill it with what has waited longest."""
        held = self._held
        sink = self._sink
        if sink is not None and not _has_room(sink.fd, seconds):
            return
        self.acquire()
        try:
            while self._waiting:
                line = self._waiting.popleft()
                self._held -= len(line)
                rest = self._write(line)
                if rest:
                    self._waiting.appendleft(rest)
                    self._held += len(rest)
                    break
        finally:
            self.release()
        if self._held == held:
            time.sleep(_TICK)

    def after_fork(self) -> None:
        """Leave to the parent what it has not written yet, and its thread."""
        sink = self._sink
        self._forget()
        if sink is not None:
            sink.close()


#: All there are in this process.
_handlers: weakref.WeakSet[PipeHandler] = weakref.WeakSet()


def _after_fork() -> None:
    for handler in tuple(_handlers):
        handler.after_fork()


def _flush(**_: Any) -> None:
    for handler in tuple(_handlers):
        handler.flush()


os.register_at_fork(after_in_child=_after_fork)
# billiard's processes end without what Python does at an exit.
signals.worker_process_shutdown.connect(_flush, weak=False, dispatch_uid="celerykit.logs")
