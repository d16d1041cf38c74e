"""Child processes: each in its group, stopped by its id, their lines in one stream."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import click

__all__ = ["Child", "Log", "Process", "say_exit"]

#: What runs before a command on Linux: ask for SIGTERM when the parent dies, and become the
#: command. In a process of its own, because `preexec_fn` may deadlock where there are threads.
_TIED_TO_PARENT = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 15)\n"  # PR_SET_PDEATHSIG, SIGTERM
    "os.getppid() == int(sys.argv[1]) or sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)

#: Seconds that a process may take to go after SIGKILL; more, and the kernel is in trouble.
_GONE_WITHIN = 5.0
_TICK = 0.02

_COLOURS = ("green", "yellow", "magenta", "blue", "cyan")


class Process(subprocess.Popen[bytes]):
    """
    A command, in a session and a process group of its own, so that a terminal's Ctrl-C does not reach it.

    On Linux it gets SIGTERM when the thread that made it ends, however that
    ends; elsewhere it outlives an owner that is killed by SIGKILL. *command*
    begins with an absolute path; *output* gets what it writes.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        output: int | IO[Any],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self._has_group = True
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _TIED_TO_PARENT, str(os.getpid()), *command]
        super().__init__(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def stop(self, *, grace: float, hurry: Callable[[], bool] = lambda: False) -> bool:
        """
        End it and its group, and tell whether it went by itself within *grace* seconds.

        *hurry* is asked again and again; once it says yes, *grace* is over.
        """
        self.terminate()
        deadline = time.monotonic() + grace
        while self.poll() is None and time.monotonic() < deadline and not hurry():
            time.sleep(_TICK)
        went = self.poll() is not None
        self.kill_group()
        return went

    def kill_group(self) -> None:
        """Kill it, and what is left of its group: pool children outlive a worker that crashed."""
        # Only once: later, the number may be somebody else's.
        if self._has_group:
            self._has_group = False
            # Nobody may be left; macOS says PermissionError when only zombies are.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self.wait(_GONE_WITHIN)


def say_exit(code: int) -> str:
    """Say in words how a process ended."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


class Log:
    """
    One stream for several processes: each line behind the name of who wrote it.

    Colours are left out where nobody would see them.

    Attributes:
        is_broken:
            Nobody reads it any more.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.is_broken = False
        self._prefixes = {
            name: click.style(f"{name:>{max(map(len, names))}} | ", fg=colour)
            for name, colour in zip(names, _COLOURS, strict=False)
        }
        self._colour = None if "NO_COLOR" not in os.environ else False
        self._lock = threading.Lock()

    def write(self, name: str, text: str) -> None:
        """Write *text*, which may be several lines, in the name of *name*."""
        lines = "".join(f"{self._prefixes[name]}{line}\n" for line in text.splitlines() or [""])
        with self._lock:
            try:
                click.echo(lines, nl=False, color=self._colour)
            except (OSError, ValueError):
                # Children must still be read, or they would stop at a full pipe.
                self.is_broken = True


class Child:
    """A process whose output goes to a `Log`, line by line."""

    def __init__(self, name: str, command: Sequence[str], *, env: Mapping[str, str], log: Log) -> None:
        self.name = name
        self._log = log
        self._process = Process(command, env=env, output=subprocess.PIPE)
        self._reader = threading.Thread(target=self._copy, name=f"celerykit-{name}", daemon=True)
        self._reader.start()

    @property
    def exit_code(self) -> int | None:
        """How it ended, negative for a signal; None while it runs."""
        return self._process.poll()

    def stop(self, *, grace: float, hurry: Callable[[], bool] = lambda: False) -> bool:
        """End it, as `Process.stop` does, after its last line was written."""
        went = self._process.stop(grace=grace, hurry=hurry)
        # Something that left the group may hold the pipe open: not our reason to wait.
        self._reader.join(1.0)
        return went

    def _copy(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                # Celery's banner is half empty lines.
                if text := line.decode(errors="replace").rstrip():
                    self._log.write(self.name, text)
