"""
Signs of life: what workers and beat leave behind, and what a probe makes of it.

A process writes a small file every few seconds, in which it says when its own
loop turned last, and how long it may be silent. Whoever looks needs nothing but
this module: no app, no broker, no Celery.

::

    worker, beat  ──Pulse.tell──▶  <folder>/<kind>-<name>.<pid>.json  ──find, ail──▶  celerykit health

Imports little, as each probe waits for it: neither pathlib nor dataclasses.
"""

# What pathlib and contextlib would do here is done without them.
# ruff: noqa: PTH103, PTH112, PTH115, PTH118, PTH123, SIM105

from __future__ import annotations

import json
import os
import stat
import time
from typing import Any, NamedTuple

__all__ = ["MAX_AGE", "Found", "Pulse", "Sign", "UnusableFolder", "ail", "age_of", "find", "folder_of"]

#: How old a sign may be, in seconds, unless a probe is told otherwise: written every 2 s, on a machine that is busy.
MAX_AGE = 30.0

#: Seconds after which nobody wants to know of a process that is gone.
_FORGOTTEN = 86400.0

#: Bytes of a file that are read.
_LONGEST = 65536

_VERSION = 1


class UnusableFolder(OSError):
    """The folder of signs is not one that can be trusted."""


class Sign(NamedTuple):
    """
    What a process says of itself.

    Attributes:
        kind:
            ``worker`` or ``beat``.

        name:
            Of the node.

        started:
            What tells its process from others that had or will have its id.

        space:
            Where its id is valid: another container has others.

        boot:
            What tells the machine's uptime from others; `clock` is of it.

        at:
            When this was written, in seconds since 1970.

        clock:
            The same, in seconds that never go back.

        state:
            One word.

        since:
            Seconds that the state has lasted.

        is_ready:
            Whether it does, now, what it is there for.

        silence:
            Seconds since its loop turned last.

        within:
            Seconds of silence that are in order beyond what a probe allows;
            ``None`` when its loop is not to turn.

        due:
            Seconds until the next sign, beyond what a probe allows.

        task:
            What keeps the loop from turning, and may.

        stuck:
            Why it counts as stuck, if it does: ``queue``, ``depth`` and ``idle``.
    """

    kind: str
    name: str
    pid: int
    started: str | None
    space: str | None
    boot: str | None
    at: float
    clock: float
    state: str
    since: float
    is_ready: bool
    silence: float
    within: float | None
    due: float = 0.0
    task: str | None = None
    stuck: dict[str, Any] | None = None

    def dump(self) -> bytes:
        """Write it as JSON."""
        return json.dumps({"v": _VERSION, **self._asdict()}).encode()

    @classmethod
    def load(cls, data: bytes) -> Sign:
        """
        Read what `dump` wrote, by this version or a newer one.

        Raises:
            ValueError: It is something else.
        """
        facts = json.loads(data)
        if not isinstance(facts, dict):
            raise ValueError("it is no JSON object")
        try:
            return cls(
                kind=str(facts["kind"]),
                name=str(facts["name"]),
                pid=int(facts["pid"]),
                started=_text(facts.get("started")),
                space=_text(facts.get("space")),
                boot=_text(facts.get("boot")),
                at=_number(facts["at"]),
                clock=_number(facts["clock"]),
                state=str(facts["state"]),
                since=_number(facts["since"]),
                is_ready=facts["is_ready"] is True,
                silence=_number(facts["silence"]),
                within=None if facts["within"] is None else _number(facts["within"]),
                due=_number(facts.get("due", 0.0)),
                task=_text(facts.get("task")),
                stuck=facts.get("stuck") if isinstance(facts.get("stuck"), dict) else None,
            )
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _number(value: Any) -> float:
    number = float(value)
    # NaN is neither too old nor young enough.
    if not abs(number) < 1e15:
        raise ValueError(f"{number} is no time")
    return number


# Where


def folder_of(told: str | os.PathLike[str] | None) -> tuple[str, bool]:
    """
    Give the folder, and whether it has to be this user's own.

    One that was named is whoever's: a volume is often root's. The one that is
    not lies where everybody may write.
    """
    if told:
        return os.fspath(told), False
    candidates = (os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    # What `tempfile` does first; importing it costs as much as all the rest.
    parent = next((folder for folder in candidates if folder and os.path.isdir(folder)), "/tmp")  # noqa: S108
    return os.path.join(parent, f"celerykit-{os.geteuid()}"), True


def _open_folder(path: str, *, is_own: bool, create: bool = False) -> int:
    if create:
        try:
            os.makedirs(path, mode=0o700)
        except FileExistsError:
            pass
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    if not is_own:
        return os.open(path, flags)
    try:
        opened = os.open(path, flags | os.O_NOFOLLOW)
    except NotADirectoryError:
        raise UnusableFolder(f"{path} is a link or a file, and not a directory. Remove it.") from None
    status = os.fstat(opened)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(opened)
        raise UnusableFolder(f"{path} is not only this user's. Remove it, or set CELERYKIT_HEALTH_DIR to another one.")
    return opened


# Writing


class Pulse:
    """
    The signs of life of this process, under one name.

    Does nothing in a process that was forked off.

    Args:
        folder:
            Where to; ``None`` for the usual place.
    """

    def __init__(self, kind: str, name: str, *, folder: str | os.PathLike[str] | None = None) -> None:
        self.kind = kind
        self.name = name
        self.path, self._is_own = folder_of(folder)
        self._pid = os.getpid()
        self._started = (_process(self._pid) or ("", None))[1]
        self._space, self._boot = _space(), _boot()
        self._file = f"{kind}-{_safe(name)}.{self._pid}.json"
        self._state, self._since = "", 0.0
        self._has_swept = False

    def tell(
        self,
        state: str,
        *,
        is_ready: bool,
        silence: float = 0.0,
        within: float | None = None,
        due: float = 0.0,
        task: str | None = None,
        stuck: dict[str, Any] | None = None,
    ) -> None:
        """
        Leave a sign of life, in place of the last one. For the arguments see `Sign`.

        Raises:
            OSError: It could not be written.
        """
        if os.getpid() != self._pid:
            return
        clock = time.monotonic()
        if state != self._state:
            self._state, self._since = state, clock
        sign = Sign(
            kind=self.kind,
            name=self.name,
            pid=self._pid,
            started=self._started,
            space=self._space,
            boot=self._boot,
            at=time.time(),
            clock=clock,
            state=state,
            since=clock - self._since,
            is_ready=is_ready,
            silence=silence,
            within=within,
            due=due,
            task=task,
            stuck=stuck,
        )
        folder = _open_folder(self.path, is_own=self._is_own, create=True)
        try:
            self._write(folder, sign.dump())
            if not self._has_swept:
                self._has_swept = True
                _sweep(folder, self.kind, self.name, but=self._file)
        finally:
            os.close(folder)

    def end(self) -> None:
        """Take the sign away: this process ends as it should."""
        if os.getpid() != self._pid:
            return
        try:
            folder = _open_folder(self.path, is_own=self._is_own)
        except OSError:
            return
        try:
            _remove(folder, self._file)
        finally:
            os.close(folder)

    def _write(self, folder: int, data: bytes) -> None:
        draft = f".{self._file}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            opened = os.open(draft, flags, 0o600, dir_fd=folder)
        except FileExistsError:
            # A process of this id died while it wrote; or it is a trap.
            os.unlink(draft, dir_fd=folder)
            opened = os.open(draft, flags, 0o600, dir_fd=folder)
        try:
            os.write(opened, data)
        finally:
            os.close(opened)
        os.replace(draft, self._file, src_dir_fd=folder, dst_dir_fd=folder)


def _safe(name: str) -> str:
    """Give *name* as a part of a file's name, apart from all other names'."""
    safe = "".join(
        character if character.isascii() and (character.isalnum() or character in "@._-") else "_" for character in name
    )
    if safe == name and len(name) <= 150:
        return name
    from hashlib import blake2b

    return f"{safe[:150]}-{blake2b(name.encode(errors='replace'), digest_size=6).hexdigest()}"


def _sweep(folder: int, kind: str, name: str, *, but: str) -> None:
    """Remove what processes of this name left that are gone, and what is forgotten."""
    for found in _read(folder, kind):
        if found.sign is None or found.is_gone is not True or found.file == but:
            continue
        if found.sign.name == name or age_of(found.sign) > _FORGOTTEN:
            _remove(folder, found.file)


def _remove(folder: int, file: str) -> None:
    try:
        os.unlink(file, dir_fd=folder)
    except OSError:
        # It is gone, or somebody else's.
        pass


# Reading


class Found(NamedTuple):
    """
    A file that was found.

    Attributes:
        sign:
            ``None`` when it cannot be read.

        is_gone:
            Whether its process is; ``None`` when nobody can tell from here.

        problem:
            Why it cannot be read.
    """

    file: str
    sign: Sign | None
    is_gone: bool | None = None
    problem: str = ""


def find(kind: str, name: str | None = None, *, folder: str | os.PathLike[str] | None = None) -> list[Found]:
    """
    Find the signs of all workers or beats, or of those called *name*, with or without what follows its ``@``.

    A process that is gone counts for a day, and only as long as none of the same name lives.

    Raises:
        OSError: The folder cannot be read, or trusted.
    """
    path, is_own = folder_of(folder)
    opened = _open_folder(path, is_own=is_own)
    try:
        found = list(_read(opened, kind))
    finally:
        os.close(opened)
    living = {one.sign.name for one in found if one.sign is not None and not one.is_gone}
    return [one for one in found if _counts(one, living) and (name is None or _is_called(one, name))]


def _counts(found: Found, living: set[str]) -> bool:
    sign = found.sign
    return sign is None or not found.is_gone or (sign.name not in living and age_of(sign) <= _FORGOTTEN)


def _is_called(found: Found, name: str) -> bool:
    if found.sign is None:
        return _safe(name) in found.file
    return found.sign.name == name or found.sign.name.partition("@")[0] == name


def _read(folder: int, kind: str) -> list[Found]:
    files = (file for file in os.listdir(folder) if file.startswith(f"{kind}-") and file.endswith(".json"))
    owners = {os.geteuid(), os.fstat(folder).st_uid}
    return [found for file in sorted(files) if (found := _read_one(folder, file, owners)) is not None]


def _read_one(folder: int, file: str, owners: set[int]) -> Found | None:
    try:
        # A pipe would be waited for.
        opened = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        return Found(file, None, problem=f"cannot be opened: {error.strerror}")
    try:
        status = os.fstat(opened)
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in owners:
            return Found(file, None, problem="is not a file of this user's")
        sign = Sign.load(os.read(opened, _LONGEST))
    except (OSError, ValueError, RecursionError) as error:
        return Found(file, None, problem=f"cannot be read: {error}")
    finally:
        os.close(opened)
    return Found(file, sign, _is_gone(sign))


def age_of(sign: Sign) -> float:
    """Tell how many seconds ago it was written."""
    if sign.boot is not None and sign.boot == _boot():
        # Clocks of the day jump.
        return max(0.0, time.monotonic() - sign.clock)
    return max(0.0, time.time() - sign.at)


def _is_gone(sign: Sign) -> bool | None:
    if sign.space != _space() or sign.boot != _boot():
        # Of another container or machine.
        return None
    if sign.started is None:
        try:
            os.kill(sign.pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
        return False
    process = _process(sign.pid)
    # What became of a process that nobody has waited for is written, too.
    return process is None or process[1] != sign.started or process[0] in "ZX"


def _process(pid: int) -> tuple[str, str | None] | None:
    """Give a process's state, one letter, and when it was started; ``None`` if there is none, or no /proc."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as opened:
            # The name of its program comes before, in brackets, and may be anything.
            fields = opened.read().rpartition(b")")[2].split()
        return fields[0].decode(), fields[19].decode()
    except (OSError, IndexError, ValueError):
        return None


def _space() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _boot() -> str | None:
    try:
        with open("/proc/sys/kernel/random/boot_id") as opened:
            return opened.read().strip()
    except (OSError, ValueError):
        return None


# Judging


def ail(found: Found, *, max_age: float = MAX_AGE, ready: bool = False) -> str | None:
    """
    Tell what is wrong with a process, and what to do; ``None`` when it is well.

    Args:
        max_age:
            How old its last sign may be, in seconds, and how long its loop may stand still.

        ready:
            Whether it has to do what it is there for, too: not only to live.
    """
    sign = found.sign
    if sign is None:
        return f"{found.file} {found.problem}. Remove it, and restart the process."
    if found.is_gone:
        return f"process {sign.pid} is gone, and did not end as it should: killed, or out of memory. Start it again."
    age = age_of(sign)
    if age > (allowed := sign.due + max_age):
        return (
            f"process {sign.pid} gave its last sign of life {age:.0f} s ago; {allowed:.0f} s are allowed. It is "
            "stopped, starved, or held by code that lets nothing else run. Restart it."
        )
    return _ail_within(sign, age + sign.silence, max_age) or (_ail_unready(sign) if ready else None)


def _ail_within(sign: Sign, silence: float, max_age: float) -> str | None:
    if sign.within is not None and silence > sign.within + max_age:
        if sign.task is not None:
            return f"{sign.task} runs for {silence:.0f} s, beyond its time limit, which nothing enforces. Restart it."
        return (
            f"its loop stands still for {silence:.0f} s while it is {_spoken(sign.state)}. Restart it; "
            f"`py-spy dump --pid {sign.pid}` shows where it is."
        )
    if sign.stuck is not None:
        queue, depth, idle = (sign.stuck.get(name) for name in ("queue", "depth", "idle"))
        return (
            f"it has received nothing for {idle} s, though the queue {queue!r} is not empty ({depth}), and it has "
            "room. Restart it."
        )
    return None


def _ail_unready(sign: Sign) -> str | None:
    if sign.is_ready:
        return None
    line = f"it is {_spoken(sign.state)} for {sign.since:.0f} s, and not ready. {_REMEDIES.get(sign.state, '')}"
    return line.rstrip()


def _spoken(state: str) -> str:
    return state.replace("_", " ")


_REMEDIES = {
    "starting": "Wait.",
    "connecting": "Its broker does not answer; see whether that runs, and is reachable from here.",
    "stopping": "It takes no more work.",
    "without_store": "Its store does not answer; see whether that runs, and is reachable from here.",
}
