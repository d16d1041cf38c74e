"""
Where one case is measured: a fresh process, on a database of its own.

The lanes of a group are there at the same time and take turns: whatever else
the machine does, it does to all of them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, cast
from uuid import uuid4

import psutil  # type: ignore[import-untyped]
import redis

from celerykit.dev.processes import Process, say_exit
from celerykit.dev.servers import Server, find_binary
from tests.benchmarks.child import BULK, FOUND, GO, commands
from tests.benchmarks.subjects import SUBJECT, TALLY, URL, Subject, argument_for, arguments_for, declare

__all__ = ["Case", "Figures", "Lane", "Place", "RunsFirstCalls", "Sender", "Tells", "Worker", "place"]

#: What one measurement found, by name: microseconds of CPU or by the clock, and commands, for one call.
Figures = dict[str, float]

_ROOT = Path(__file__).parents[2]

#: Seconds for one measurement, and between two looks at it.
_WITHIN, _TICK = 60.0, 0.005

#: So much of a log is shown when something goes wrong: a worker may say the same for each call.
_MOST_LOG = 4000

#: Seconds in which a worker that has acknowledged its last call ends what it is doing.
_SETTLE = 0.03

#: The last of the databases that a server has unless it is told otherwise: for messages to copy.
_SPARE = 15

_QUEUE, _UNACKED = "celery", "unacked"

#: A queue of calls that no worker takes yet.
_HELD = "held"


@dataclass(frozen=True)
class Case:
    """
    One thing to measure.

    Attributes:
        how:
            How calls are sent, or the pool that runs them.
    """

    how: str
    subject: Subject


@dataclass(frozen=True)
class Place:
    """A server, and a folder for logs."""

    server: Server
    folder: Path

    @property
    def server_version(self) -> str:
        info = self.client(_SPARE).info("server")
        return str(info.get("valkey_version") or info["redis_version"])

    def urls(self, database: int) -> tuple[str, str]:
        """Give what Celery, and what a client, finds *database* by."""
        celerys, clients = self.server.url, self.server.client_url
        return celerys.replace("virtual_host=0", f"virtual_host={database}"), clients.replace("db=0", f"db={database}")

    def client(self, database: int) -> Any:
        """Connect to *database*, and leave nothing in it."""
        client: Any = redis.Redis.from_url(self.urls(database)[1])
        client.flushdb()
        return client

    def message_of(self, subject: Subject) -> bytes:
        """Give a message as *subject* itself sends it."""
        client = self.client(_SPARE)
        declare(subject, url=self.urls(_SPARE)[0]).delay(argument_for(subject))
        return cast("bytes", client.lpop(_QUEUE))


@contextmanager
def place() -> Iterator[Place]:
    """Start a server on a Unix socket, for as long as the block lasts."""
    for name in [name for name in os.environ if name.startswith("CELERY")]:
        del os.environ[name]
    # Elsewhere than here, where there may be an `.env`.
    with Server(find_binary(wheel_first=True)) as server, tempfile.TemporaryDirectory() as folder, chdir(folder):
        yield Place(server, Path(folder))


class Lane:
    """
    A process for one case.

    Args:
        database:
            The number of its own on the server.
    """

    def __init__(self, where: Place, case: Case, *, database: int) -> None:
        assert database < _SPARE
        self.where = where
        self.case = case
        self.url, self.client_url = where.urls(database)
        self.client = where.client(database)
        self.tally = where.folder / f"{database}.tally"
        self.tally.write_bytes(b"")
        self._log = where.folder / f"{database}.log"
        self.process = self._started()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill_group()

    def command(self) -> list[str]:
        """Give the words behind ``python -m``."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """Come back when it has connected, declared its queue, and filled its caches."""
        raise NotImplementedError

    def measure(self, count: int) -> Figures:
        """Let it send or run *count* calls."""
        raise NotImplementedError

    def until(self, is_so: Callable[[], bool]) -> None:
        """Wait, but not for a process that ended, nor for ever."""
        deadline = time.monotonic() + _WITHIN
        while not is_so():
            code = self.process.poll()
            if code is not None or time.monotonic() > deadline:
                how = f"not done within {_WITHIN:g} s" if code is None else say_exit(code)
                raise RuntimeError(f"{self.case}: {how}:\n{self._log.read_text(errors='replace')[-_MOST_LOG:]}")
            time.sleep(_TICK)

    def _started(self) -> Process:
        with self._log.open("wb") as output:
            return self._start(output)

    def _start(self, output: int | IO[bytes]) -> Process:
        ours = {TALLY: str(self.tally), URL: self.url, SUBJECT: self.case.subject.written()}
        if self.case.subject.log_format:
            ours["CELERYKIT_LOG_FORMAT"] = self.case.subject.log_format
        env: Mapping[str, str] = {**os.environ, "PYTHONPATH": str(_ROOT), **ours}
        return Process([sys.executable, "-m", *self.command()], env=env, output=output)


class Sender(Lane):
    """An interpreter that sends calls nobody runs."""

    def command(self) -> list[str]:
        return ["tests.benchmarks.child", self.case.how, self.case.subject.written(), self.url, self.client_url]

    def warm_up(self) -> None:
        self.measure(BULK)

    def measure(self, count: int) -> Figures:
        self.client.rpush(GO, count)
        self.until(lambda: bool(self.client.llen(FOUND)))
        found: Figures = json.loads(self.client.lpop(FOUND))
        return found


class Worker(Lane):
    """A worker with its children; calls are queued all at once."""

    #: Enough for both children.
    _warm_up = 200

    level = "WARNING"

    @property
    def pool(self) -> str:
        return self.case.how

    def command(self) -> list[str]:
        words = ["celery", "-A", "tests.benchmarks.node", "worker", f"--pool={self.pool}", "--concurrency=2"]
        return [*words, f"--loglevel={self.level}", "--without-mingle", "--without-gossip", "--without-heartbeat"]

    def warm_up(self) -> None:
        self._message = self.where.message_of(self.case.subject)
        self.hold(self._warm_up)
        self._run(self._warm_up)

    def measure(self, count: int) -> Figures:
        self.hold(count)
        asked, cpu, began = commands(self.client), self._cpu(), time.perf_counter()
        ended = self._run(count)
        cpu, asked = self._cpu() - cpu, commands(self.client) - asked
        return {"cpu": cpu / count * 1e6, "wall": (ended - began) / count * 1e6, "commands": asked / count}

    def hold(self, count: int) -> None:
        """Have *count* calls ready."""
        self.client.rpush(_HELD, *_copies(self._message, count))

    def _run(self, count: int) -> float:
        """Queue the calls that are ready, and say when the last one ran; come back when it was acknowledged."""
        goal = self.tally.stat().st_size + count
        self.client.rename(_HELD, _QUEUE)
        self.until(lambda: self.tally.stat().st_size >= goal)
        ended = time.perf_counter()
        self.until(lambda: not self.client.hlen(_UNACKED))
        time.sleep(_SETTLE)
        return ended

    def _cpu(self) -> float:
        """Give the seconds of CPU that the worker and its children have used."""
        parent = psutil.Process(self.process.pid)
        times = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
        return float(sum(spent.user + spent.system for spent in times))


class Tells(Worker):
    """A prefork worker that logs each call, to a pipe that somebody reads."""

    pool, level = "prefork", "INFO"

    def _started(self) -> Process:
        reading, writing = os.pipe()
        try:
            process = self._start(writing)
        finally:
            os.close(writing)
        threading.Thread(target=self._read, args=(reading,), daemon=True).start()
        return process

    def _read(self, pipe: int) -> None:
        with os.fdopen(pipe, "rb", buffering=0) as lines, self._log.open("wb", buffering=0) as log:
            while some := lines.read(1 << 16):
                log.write(some)


class RunsFirstCalls(Worker):
    """A prefork worker whose calls were sent each with a key of its own, if there are keys."""

    pool = "prefork"

    def warm_up(self) -> None:
        self._task = declare(self.case.subject, url=self.url)
        self.hold(self._warm_up)
        self._run(self._warm_up)

    def hold(self, count: int) -> None:
        """Send calls, to where no worker looks."""
        for argument in arguments_for(self.case.subject, count):
            self._task.apply_async((argument,), queue=_HELD)


def _copies(message: bytes, count: int) -> Iterator[bytes]:
    """Write the same call *count* times, each with ids of its own."""
    read = json.loads(message)
    ids = [read["headers"]["id"], read["properties"]["delivery_tag"]]
    for _ in range(count):
        copy = message
        for id_ in ids:
            copy = copy.replace(id_.encode(), str(uuid4()).encode())
        yield copy
