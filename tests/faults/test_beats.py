"""
Several real beats on a real Valkey: killed, frozen, stopped, and without their store.

Nobody works off what they send: it is counted in its queue.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import redis

from celerykit import CeleryKit
from celerykit.beat import status
from celerykit.dev.processes import Process
from celerykit.dev.servers import Server
from tests import services
from tests.services import eventually

LEASE = 1.5
EVERY = 0.2

#: From a leader's death to the first tick of the next: its lease, a look, and what a busy machine takes.
TAKEOVER = LEASE + 1.5

APP = f"""
import os, signal
from pathlib import Path
from celerykit import CeleryKit
from celerykit.beat import Scheduler

app = CeleryKit("beats")
app.conf.redbeat_redis_url = os.environ["STORE"]

@app.task(remember=True)
def tick(number: int) -> None:
    with open("ran", "a") as ran:
        print(tick.request.id, file=ran)

app.schedule(tick.s(7), every={EVERY}, name="tick")

class Dying(Scheduler):
    "Dies at the first tick, before or after its message is sent."

    def apply_async(self, *args, **kwargs):
        before, after = Path("die before"), Path("die after")
        if before.exists():
            before.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        result = super().apply_async(*args, **kwargs)
        if after.exists():
            after.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return result
"""


@dataclass(frozen=True)
class Message:
    id: str
    sent_at: float


class Beats:
    """The beats of one app, and what they sent."""

    def __init__(self, server: Server, folder: Path) -> None:
        self._server = server
        self._folder = folder
        self._client = redis.Redis.from_url(server.client_url)
        self.started: list[Process] = []
        self.logs: list[Path] = []
        self.app: Any = CeleryKit("beats", broker=server.url, set_as_current=False)
        (folder / "beats.py").write_text(APP)

    def start(self, scheduler: str = "celerykit.beat:Scheduler", **env: str) -> Process:
        log = self._folder / f"log{len(self.logs)}"
        urls = {"CELERY_BROKER_URL": self._server.url, "STORE": self._server.client_url}
        env = {**urls, "CELERYKIT_LEASE": str(LEASE), **env}
        command = ["-m", "celery", "-A", "beats", "beat", "-l", "INFO", "--pidfile=", "-S", scheduler]
        with log.open("wb") as output:
            beat = Process([sys.executable, *command], env=os.environ | env, cwd=self._folder, output=output)
        self.started.append(beat)
        self.logs.append(log)
        return beat

    @property
    def log(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def leader(self) -> Process:
        """The process that leads."""
        found = status(self.app).leader
        assert found is not None
        return next(beat for beat in self.started if found.node.endswith(f":{beat.pid}"))

    def sent(self) -> list[Message]:
        """All that was sent, the oldest first."""
        messages = [json.loads(item) for item in self._client.lrange("celery", 0, -1)]
        headers = [message["headers"] for message in messages]
        return sorted(
            (Message(header["id"], header["celerykit"]["sent_at"]) for header in headers), key=lambda sent: sent.sent_at
        )

    def wait_for(self, count: int, *, within: float = 20.0) -> None:
        """Wait until so many more are sent."""
        before = len(self.sent())
        eventually(lambda: len(self.sent()) >= before + count, within=within, what=lambda: self.log)

    def wait_for_log(self, text: str, *, times: int = 1, within: float = 20.0) -> None:
        eventually(lambda: self.log.count(text) >= times, within=within, what=lambda: f"{text}: {self.log}")

    def end(self) -> None:
        for beat in self.started:
            beat.kill_group()
        self._client.close()
        self.app.store.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with services.valkey(fsync="everysec") as server:
        yield server


@pytest.fixture
def beats(server: Server, tmp_path: Path) -> Iterator[Beats]:
    with ExitStack() as stack:
        beats = Beats(server, tmp_path)
        stack.callback(beats.end)
        yield beats


def assert_no_tick_twice(sent: list[Message]) -> None:
    assert len({message.id for message in sent}) == len(sent)
    # Due times are counted from the tick before, so two of one tick would come close together.
    short = [b.sent_at - a.sent_at for a, b in pairwise(sent) if b.sent_at - a.sent_at < EVERY * 0.75]
    assert short == []


def longest_gap(sent: list[Message]) -> float:
    return max(b.sent_at - a.sent_at for a, b in pairwise(sent))


def test_killed_and_frozen_leaders_are_replaced_and_send_nothing_twice(beats: Beats) -> None:
    for _ in range(3):
        beats.start()
    beats.wait_for(5)
    beats.wait_for_log("beat.stands_by", times=2)

    killed = beats.leader()
    os.kill(killed.pid, signal.SIGKILL)
    beats.wait_for(5)

    frozen = beats.leader()
    os.kill(frozen.pid, signal.SIGSTOP)
    beats.wait_for(5)
    second = beats.leader()
    os.kill(frozen.pid, signal.SIGCONT)
    beats.wait_for_log("beat.lost")
    beats.wait_for(5)

    assert second is not frozen
    # Frozen again and again, wherever it is; and the other one as well.
    for _ in range(3):
        victim = beats.leader()
        os.kill(victim.pid, signal.SIGSTOP)
        time.sleep(LEASE * 1.2)
        os.kill(victim.pid, signal.SIGCONT)
        beats.wait_for(2)
    assert_no_tick_twice(beats.sent())
    assert longest_gap(beats.sent()) < TAKEOVER


def test_a_leader_that_is_stopped_is_replaced_at_once(beats: Beats) -> None:
    for _ in range(2):
        beats.start(CELERYKIT_LEASE="60")
    beats.wait_for_log("beat.stands_by")
    beats.wait_for(5)

    leader = beats.leader()
    assert leader.stop(grace=10)
    beats.wait_for(5)

    assert_no_tick_twice(beats.sent())
    assert longest_gap(beats.sent()) < 2.0
    assert status(beats.app).leader is not None


def test_a_tick_whose_sender_is_killed_before_it_is_sent_is_not_lost(beats: Beats, tmp_path: Path) -> None:
    (tmp_path / "die before").touch()
    for _ in range(2):
        beats.start("beats:Dying")

    beats.wait_for(4)

    assert sum(beat.poll() is not None for beat in beats.started) == 1
    assert_no_tick_twice(beats.sent())


def test_a_tick_whose_sender_is_killed_when_it_was_sent_has_two_messages_and_one_run(
    beats: Beats, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "die after").touch()
    for _ in range(2):
        beats.start("beats:Dying")
    beats.wait_for(4)
    for beat in beats.started:
        beat.kill_group()
    sent = beats.sent()
    env = {"STORE": server.client_url}

    # Nobody could tell whether it was sent.
    assert sent[0].id == sent[1].id
    assert sent[1].sent_at - sent[0].sent_at < TAKEOVER
    assert_no_tick_twice(sent[1:])
    ran = tmp_path / "ran"
    with services.worker("beats", url=server.url, pool="solo", cwd=tmp_path, env=env) as worker:
        ids = {message.id for message in sent}
        eventually(lambda: ran.exists() and set(ran.read_text().split()) == ids, what=lambda: worker.log)
        worker.stop()
    assert sorted(ran.read_text().split()) == sorted(ids)


def test_without_the_store_nothing_is_sent_until_it_is_back(beats: Beats, server: Server) -> None:
    for _ in range(2):
        beats.start()
    beats.wait_for(3)
    beats.wait_for_log("beat.stands_by")

    server.stop()
    beats.wait_for_log("beat.store_unavailable", times=2)
    time.sleep(LEASE)
    server.start()
    beats.wait_for_log("beat.found_store", times=2)
    beats.wait_for(5)

    assert all(beat.poll() is None for beat in beats.started)
    assert_no_tick_twice(beats.sent())


@pytest.mark.parametrize(
    "scheduler", ["celery.beat:Scheduler", "celery.beat:PersistentScheduler", "redbeat.RedBeatScheduler"]
)
def test_other_schedulers_send_what_the_app_declares(scheduler: str, beats: Beats) -> None:
    if scheduler.startswith("redbeat"):
        pytest.importorskip("redbeat")

    beats.start(scheduler)

    beats.wait_for(3)


def test_a_scheduled_task_of_a_django_app_is_found(tmp_path: Path, server: Server) -> None:
    (tmp_path / "conf.py").write_text("SECRET_KEY = 'x'\nINSTALLED_APPS = ['shop']\n")
    (tmp_path / "proj.py").write_text(
        "from celerykit import CeleryKit\n"
        "app = CeleryKit('proj')\n"
        "app.config_from_object('django.conf:settings', namespace='CELERY')\n"
        "app.autodiscover_tasks()\n"
    )
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").touch()
    (tmp_path / "shop" / "tasks.py").write_text(
        "from celerykit import shared_task\n@shared_task(schedule='0 3 * * *')\ndef settle() -> None: ...\n"
    )
    # As Celery's beat does before it makes its scheduler.
    ask = (
        "from proj import app; app.loader.init_worker(); app.finalize(); from celerykit.beat import Scheduler;"
        "print(sorted(app.conf.beat_schedule), sorted(Scheduler(app).schedule))"
    )

    out = subprocess.run(
        [sys.executable, "-c", ask],
        env=os.environ | {"DJANGO_SETTINGS_MODULE": "conf", "CELERY_BROKER_URL": server.url},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert "['shop.tasks.settle'] ['celery.backend_cleanup', 'shop.tasks.settle']" in out.stdout, out.stderr
