"""
The pytest processes: each with some of Celery's tests, one side, and a Valkey of its own.

They run a few at a time, because Celery's tests wait more than they work, and
apart from each other, because a worker that hangs would take every later test
of its process with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from celerykit.dev.processes import Process
from celerykit.dev.servers import Server, find_binary
from tests.compat.outcomes import Run, read
from tests.compat.suite import LEFT_OUT

ROOT = Path(__file__).resolve().parents[2]

#: Tests of one file that share a process. Fewer would pay for more workers' starts.
_TESTS_A_JOB = 12

#: Tests that take one to three minutes each: in processes of their own, and
#: first, or everything would wait for the one that came last.
_LONG = (
    "test_disabling_flag_allow_error_cb_on_chord_header",
    "test_fixture_teardown_releases_backend_connections",
    "test_enabling_flag_allow_error_cb_on_chord_header",
    "test_flag_allow_error_cb_on_chord_header_on_upgraded_chord",
    "test_error_propagates_from_chord",
)

#: Seconds for one process, whose usual time is half a minute to three.
_LIMIT = 600.0

#: Seconds to import Celery's tests.
_COLLECT_LIMIT = 120.0

_TICK = 0.1


class CannotCollect(Exception):
    """Celery's tests cannot be imported here."""


@dataclass(frozen=True)
class Job:
    """Some tests, all of one file, on one side."""

    side: str
    number: int
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.side}-{self.number:02}-{Path(_file_of(self.tests[0])).stem}"


class Running:
    """A job under way."""

    def __init__(self, job: Job, *, suite: Path, folder: Path) -> None:
        self.job = job
        self._record = folder / f"{job.name}.jsonl"
        self._server = Server(find_binary(wheel_first=True), folder=folder / f"{job.name}.valkey", port=0)
        self._server.start()
        self._started = time.monotonic()
        tests = folder / f"{job.name}.tests"
        tests.write_text("".join(f"{test}\n" for test in job.tests), encoding="utf-8")
        with (folder / f"{job.name}.log").open("wb") as log:
            self._pytest = Process(
                _command(_file_of(job.tests[0])),
                env=_environment(job.side, tests, self._record, port=self._server.port),
                cwd=suite,
                output=log,
            )

    @property
    def is_over(self) -> bool:
        """It ended, or took too long."""
        return self._pytest.poll() is not None or time.monotonic() - self._started > _LIMIT

    def finish(self, run: Run) -> None:
        """End it, with all it started, and add what it found."""
        self.end()
        run.add(read(self._record), tests=self.job.tests)
        run.seconds += time.monotonic() - self._started

    def end(self) -> None:
        """End pytest's whole group, workers included, and then the server."""
        self._pytest.kill_group()
        self._server.close()


def collect(side: str, *, suite: Path, folder: Path) -> list[str]:
    """
    Name all of Celery's integration tests that *side* can import.

    Raises:
        CannotCollect: A module does not import, or the plugin refused the side.
    """
    tests, record = folder / f"{side}.tests", folder / f"{side}.jsonl"
    command = [*_command("t/integration"), "--collect-only", *(f"--ignore={path}" for path in LEFT_OUT)]
    environment = _environment(side, tests, record, port=None)
    try:
        done = subprocess.run(
            command, cwd=suite, env=environment, capture_output=True, text=True, timeout=_COLLECT_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        raise CannotCollect(f"side {side!r}: pytest did not collect within {_COLLECT_LIMIT:g} s.") from None
    if done.returncode != 0:
        said = (done.stdout + done.stderr)[-4000:]
        raise CannotCollect(f"side {side!r}: pytest could not collect Celery's tests:\n{said}")
    return tests.read_text(encoding="utf-8").splitlines()


def split(tests: Iterable[str], *, side: str) -> list[Job]:
    """Give the tests to jobs: long ones alone and first, others with their neighbours."""
    tests = list(tests)
    long = sorted(filter(_is_long, tests), key=_rank)
    chunks: list[tuple[str, ...]] = [(test,) for test in long]
    for _, group in groupby([test for test in tests if not _is_long(test)], key=_file_of):
        neighbours = tuple(group)
        chunks += [neighbours[at : at + _TESTS_A_JOB] for at in range(0, len(neighbours), _TESTS_A_JOB)]
    return [Job(side, number, chunk) for number, chunk in enumerate(chunks)]


def run(jobs: Sequence[Job], *, suite: Path, folder: Path, at_once: int) -> dict[str, Run]:
    """Run the jobs, *at_once* at a time and in their order, and give each side's outcomes."""
    runs: dict[str, Run] = {job.side: Run() for job in jobs}
    waiting = list(reversed(jobs))
    running: list[Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(Running(waiting.pop(), suite=suite, folder=folder))
            for over in [process for process in running if process.is_over]:
                over.finish(runs[over.job.side])
                running.remove(over)
            time.sleep(_TICK)
    finally:
        for process in running:
            process.end()
    return runs


def _command(path: str) -> list[str]:
    # Celery's fixtures by themselves: pytest-celery, which loads them too, brings Docker and debuggers.
    plugins = ["no:cacheprovider", "no:celery", "no:docker_tools", "celery.contrib.pytest", "tests.compat.plugin"]
    return [sys.executable, "-m", "pytest", "-q", *(f"-p{plugin}" for plugin in plugins), path]


def _environment(side: str, tests: Path, record: Path, *, port: int | None) -> dict[str, str]:
    """Give the variables of Celery's own CI, with our server, and none that would configure Celery."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY", "PYTEST_"))}
    url = f"redis://127.0.0.1:{port}/0"
    return inherited | {
        "COMPAT_SIDE": side,
        "COMPAT_TESTS": str(tests),
        "COMPAT_RECORD": str(record),
        "TEST_BROKER": url,
        "TEST_BACKEND": url,
        "REDIS_HOST": "127.0.0.1",
        "REDIS_PORT": str(port),
        "WORKER_LOGLEVEL": "INFO",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        # Some tests start `celery` by its name.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def _file_of(test: str) -> str:
    return test.partition("::")[0]


def _rank(test: str) -> int:
    """Place a long test by how long it takes."""
    return next(rank for rank, name in enumerate(_LONG) if name in test)


def _is_long(test: str) -> bool:
    return any(name in test for name in _LONG)
