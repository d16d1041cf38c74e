"""
Signs of life where processes are frozen and killed, and brokers go away.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from celerykit.dev.processes import Process
from celerykit.dev.servers import Server
from celerykit.pulse import Found, ail, find
from tests import services
from tests.integration import health_shop as shop
from tests.integration.health_ward import Ward, health, ward_of
from tests.services import eventually

#: Until a worker has found its broker again: Kombu waits for longer and longer between two tries.
BACK = 60.0


@pytest.fixture(params=["valkey", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> Iterator[Any]:
    # Not the one that all share: it is killed here, and with the queues of all it takes a minute to be back.
    start: Any = services.rabbitmq if request.param == "rabbitmq" else services.valkey
    with start() as server:
        yield server


@pytest.fixture
def ward(broker: Any, tmp_path: Path) -> Iterator[Ward]:
    with ward_of(["prefork", "gevent"], url=broker.url, folder=tmp_path, CELERYKIT_STORE_URL="memory://") as ward:
        yield ward


def test_without_its_broker_a_worker_lives_and_is_not_ready(ward: Ward, broker: Any) -> None:
    for pool in ward.workers:
        ward.wait_for(pool, None, ready=True)

    broker.kill()

    # Kombu's waits hold gevent up as a whole, and so what it has to say.
    ward.wait_for("prefork", "it is connecting", ready=True)
    assert health("worker", "prefork", "--dir", str(ward.folder)).returncode == 0
    assert health("worker", "prefork", "--ready", "--dir", str(ward.folder)).returncode == 1
    broker.start()
    ward.wait_for("prefork", None, ready=True, within=BACK)


def test_a_worker_that_starts_before_its_broker_is_there_lives(tmp_path: Path) -> None:
    with services.refused() as port:
        ward_folder = tmp_path / "signs"
        env = {"CELERY_BROKER_URL": f"redis://127.0.0.1:{port}/0", "CELERYKIT_HEALTH_DIR": str(ward_folder)}
        command = [sys.executable, "-m", "celery", "-A", shop.__name__, "worker", "-n", "early@health"]
        worker = services.Worker(command, env={**os.environ, **env}, cwd=None, log=tmp_path / "log")
        try:
            eventually(lambda: ward_folder.exists() and says("connecting", ward_folder), within=30)
            assert [ail(one) for one in find("worker", folder=ward_folder)] == [None]
        finally:
            worker.kill()


def says(state: str, folder: Path) -> bool:
    return any(one.sign is not None and one.sign.state == state for one in find("worker", folder=folder))


def test_one_that_is_stuck_is_told_from_one_that_has_no_room_or_was_told_to_take_none(ward: Ward) -> None:
    # gevent has one place, and a queue that is not empty; prefork was told not to take any more.
    for _ in range(10):
        ward.send("gevent", shop.nap, 1.0)
    ward.app.control.cancel_consumer("health-prefork", destination=["prefork@health"], reply=True, timeout=5)
    ward.send("prefork", shop.nap, 0.0)
    ward.workers["gevent"].wait_for("health_shop.nap")

    with pytest.raises(AssertionError, match="not within"):
        ward.wait_for("gevent", "received nothing", within=6)
    with pytest.raises(AssertionError, match="not within"):
        ward.wait_for("prefork", "received nothing", within=3)

    ward.app.control.add_consumer("health-prefork", destination=["prefork@health"], reply=True, timeout=5)
    ward.workers["prefork"].wait_for("health_shop.nap")
    ward.tell("prefork", "go_deaf")
    eventually(lambda: "go_deaf" in ward.workers["prefork"].log)
    ward.send("prefork", shop.nap, 0.0)
    ward.wait_for("prefork", "received nothing")


def test_a_worker_that_is_frozen_has_died_until_it_goes_on_and_one_that_was_killed_is_gone(ward: Ward) -> None:
    worker = ward.workers["prefork"]

    os.kill(worker.pid, signal.SIGSTOP)
    ward.wait_for("prefork", "gave its last sign of life")
    # Its loop turns every two seconds, and what it says is up to two seconds old.
    assert ail(ward.look_at("gevent"), max_age=6) is None
    os.kill(worker.pid, signal.SIGCONT)
    ward.wait_for("prefork", None)

    worker.kill()
    ward.wait_for("prefork", "is gone")
    assert health("worker", "--dir", str(ward.folder)).returncode == 1
    assert health("worker", "gevent", "--dir", str(ward.folder)).returncode == 0


def test_a_worker_that_is_cut_off_leaves_nothing(ward: Ward) -> None:
    for pool, worker in ward.workers.items():
        ward.send(pool, shop.nap, 8.0)
        worker.wait_for("health_shop.nap")
        os.kill(worker.pid, signal.SIGQUIT)
    for worker in ward.workers.values():
        worker.process.wait(30)

    assert find("worker", folder=ward.folder) == []


def _has_run(worker: services.Worker, times: int) -> bool:
    return worker.count("health_shop.nap", "succe") == times


def test_a_worker_that_cannot_write_works_on_and_says_so_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        services.valkey() as server,
        ward_of(["solo"], url=server.url, folder=tmp_path, CELERYKIT_HEALTH_DIR=str(tmp_path / "file")) as ward,
    ):
        worker = ward.workers["solo"]
        worker.wait_for("health.not_written")
        for number in range(1, 4):
            ward.send("solo", shop.nap, 1.0)
            eventually(partial(_has_run, worker, number))

        assert worker.count("health.not_written") == 1


# Beats


class Beats:
    def __init__(self, folder: Path, url: str) -> None:
        self.signs = folder / "signs"
        self._env = {"CELERY_BROKER_URL": url, "CELERYKIT_HEALTH_DIR": str(self.signs), "CELERYKIT_LEASE": "1.5"}
        self._folder = folder
        self.started: list[Process] = []

    def start(self, **env: str) -> Process:
        command = [sys.executable, "-m", "celery", "-A", shop.__name__, "beat", "--pidfile="]
        command += ["-s", str(self._folder / "schedule")]
        with (self._folder / "log").open("ab") as log:
            beat = Process(command, env={**os.environ, **self._env, **env}, output=log)
        self.started.append(beat)
        return beat

    def look(self) -> list[Found]:
        return find("beat", folder=self.signs) if self.signs.exists() else []

    def states(self) -> list[str]:
        return sorted(one.sign.state for one in self.look() if one.sign is not None)

    def ails(self, *, ready: bool = False) -> dict[int, str | None]:
        return {one.sign.pid: ail(one, max_age=1, ready=ready) for one in self.look() if one.sign is not None}

    def wait(self, is_so: Callable[[], bool]) -> None:
        eventually(is_so, within=30, what=lambda: f"{self.look()}\n{(self._folder / 'log').read_text()}")


@pytest.fixture
def server() -> Iterator[Server]:
    with services.valkey() as server:
        yield server


@pytest.fixture
def beats(server: Server, tmp_path: Path) -> Iterator[Beats]:
    beats = Beats(tmp_path, server.url)
    try:
        yield beats
    finally:
        for beat in beats.started:
            beat.kill_group()


def test_a_beat_is_ready_whether_it_leads_or_stands_by(beats: Beats, server: Server) -> None:
    for _ in range(2):
        beats.start()
    beats.wait(lambda: beats.states() == ["leading", "standing_by"])
    assert list(beats.ails(ready=True).values()) == [None, None]

    server.kill()
    beats.wait(lambda: beats.states() == ["without_store"] * 2)
    assert list(beats.ails().values()) == [None, None]
    assert all("its store does not answer" in str(line).lower() for line in beats.ails(ready=True).values())

    server.start()
    beats.wait(lambda: beats.states() == ["leading", "standing_by"])


def test_a_beat_that_is_frozen_has_died_and_one_that_ends_leaves_nothing(beats: Beats) -> None:
    frozen, other = beats.start(), beats.start()
    beats.wait(lambda: beats.states() == ["leading", "standing_by"])

    os.kill(frozen.pid, signal.SIGSTOP)
    beats.wait(lambda: beats.ails()[frozen.pid] is not None)
    assert beats.ails()[other.pid] is None
    os.kill(frozen.pid, signal.SIGCONT)
    beats.wait(lambda: list(beats.ails(ready=True).values()) == [None, None])

    for beat in (frozen, other):
        assert beat.stop(grace=20)
    assert beats.look() == []


def test_a_beat_without_a_store_is_alone(beats: Beats) -> None:
    beat = beats.start(CELERYKIT_STORE_URL="memory://")

    beats.wait(lambda: beats.states() == ["alone"])

    asked = subprocess.run(
        [sys.executable, "-m", "celerykit", "health", "beat", "health", "--ready", "--dir", str(beats.signs)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert asked.returncode == 0, asked
    assert beat.stop(grace=20)
    assert beats.look() == []
