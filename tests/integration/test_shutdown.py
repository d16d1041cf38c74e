"""
A worker that is told to end does so in time, and what it did not finish is back in its queue at once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from celerykit import CeleryKit
from celerykit.errors import TaskInterrupted
from tests import services
from tests.integration.conftest import ROOT

SHOP = "tests.integration.shutdown_shop"

#: Seconds that running tasks have after a signal.
PATIENCE = 1.0

#: Seconds that ending takes besides: a process of the pool waits for one before it exits, and the broker may.
ENDING = 4.0

POOLS = ("prefork", "threads", "solo")


on_each_broker = pytest.mark.parametrize("broker", ["valkey", "rabbitmq"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def broker(request: Any) -> Iterator[str]:
    with getattr(services, getattr(request, "param", "valkey"))() as server:
        yield server.url


@pytest.fixture
def shop(broker: str, tmp_path: Path, request: Any) -> Iterator[Shop]:
    # Of this test only: what one leaves is not to run in the next.
    queue = f"shutdown-{abs(hash(request.node.name))}"
    with services.valkey() as results:
        yield Shop(url=broker, backend=results.backend_url, queue=queue, ledger=tmp_path / "ledger")


class Shop:
    """Sends work to one worker, ends that, and looks what became of it."""

    def __init__(self, *, url: str, backend: str, queue: str, ledger: Path) -> None:
        self.url, self.backend, self.queue, self.ledger = url, backend, queue, ledger
        self.app = CeleryKit("sender", broker=url, backend=backend, set_as_current=False)
        ledger.touch()

    def worker(self, pool: str, **env: str) -> Any:
        settings = {
            "CELERY_RESULT_BACKEND": self.backend,
            "CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT": str(PATIENCE),
            "CELERYKIT_SHUTDOWN_GRACE": str(PATIENCE),
            "CELERY_WORKER_PREFETCH_MULTIPLIER": "8",
            **env,
        }
        return services.worker(SHOP, url=self.url, pool=pool, env=settings, cwd=ROOT, options=["-Q", self.queue])

    def send(self, name: str, seconds: float = 0.0, *, task: str = "work", **options: Any) -> Any:
        args = (str(self.ledger), name, seconds)
        return self.app.send_task(f"{SHOP}.{task}", args, queue=self.queue, **options)

    @property
    def lines(self) -> list[str]:
        return self.ledger.read_text().splitlines()

    def has(self, line: str) -> None:
        services.eventually(lambda: line in self.lines, what=lambda: f"{line!r} in {self.lines}")

    @property
    def held(self) -> list[str]:
        """What a worker held until its time had come: on RabbitMQ the broker does that."""
        return [] if self.url.startswith("amqp") else ["later"]

    def waiting(self) -> list[str]:
        """Take out of the queue whatever another worker could take now."""
        app: Any = self.app
        names = []
        with app.connection_for_read() as connection:
            queue = app.amqp.queues[self.queue](connection.default_channel)
            while message := queue.get():
                names.append(message.payload[0][1])
                message.ack()
        return sorted(names)


def ends(node: services.Worker, *signals: int) -> float:
    """Send signals, a little apart, and tell how long it took the worker to end, with all its processes."""
    pool = [psutil.Process(pid) for pid in node.children]
    began = time.monotonic()
    for number in signals:
        os.kill(node.pid, number)
        time.sleep(0.2)
    services.eventually(lambda: node.process.poll() is not None, within=30, what=lambda: node.log)
    took = time.monotonic() - began
    assert node.process.returncode == 0, node.log
    services.eventually(lambda: not any(process.is_running() for process in pool))
    return took


@on_each_broker
@pytest.mark.parametrize("pool", POOLS)
def test_sigterm_lets_a_task_end_that_does_so_in_time(shop: Shop, pool: str) -> None:
    with shop.worker(pool) as node:
        shop.send("later", countdown=3600)
        running = shop.send("running", 0.7)
        shop.has("start running")
        shop.send("waiting")

        took = ends(node, signal.SIGTERM)

    assert took < 0.7 + ENDING
    assert running.get(timeout=2) == "running"
    # A thread that is free may still take what was waiting for it.
    ended = [line.removeprefix("end ") for line in shop.lines if line.startswith("end")]
    assert sorted([*ended, *shop.waiting()]) == [*shop.held, "running", "waiting"]
    assert len(shop.lines) == 2 * len(ended)


@on_each_broker
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGQUIT], [signal.SIGQUIT, signal.SIGQUIT]], ids=repr)
def test_a_task_that_takes_too_long_is_given_back_with_what_waits(shop: Shop, pool: str, signals: list[int]) -> None:
    with shop.worker(pool) as node:
        shop.send("later", countdown=3600)
        running = shop.send("running", 60)
        shop.has("start running")
        shop.send("waiting")

        took = ends(node, *signals)

    assert took < PATIENCE + ENDING
    assert shop.lines == ["start running"]
    assert shop.waiting() == [*shop.held, "running", "waiting"]
    assert running.state in ("PENDING", "STARTED")


@pytest.mark.parametrize("pool", POOLS)
def test_sigquit_waits_no_longer_than_the_task_takes(shop: Shop, pool: str) -> None:
    with shop.worker(pool, CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT="20") as node:
        running = shop.send("running", 0.5)
        shop.has("start running")

        took = ends(node, signal.SIGQUIT)

    assert took < 0.5 + ENDING
    assert shop.lines == ["start running", "end running"]
    assert running.get(timeout=2) == "running"
    assert shop.waiting() == []


@pytest.mark.parametrize("size", [10, 500_000], ids=["small", "larger than a pipe"])
def test_what_a_process_was_sent_is_run_and_not_given_back_too(shop: Shop, size: int) -> None:
    """Stock Celery does both, and then stands still for 30 s; for ever, if only half was sent."""
    name = "x" * size
    with shop.worker("prefork") as node:
        [child] = node.children
        shop.send("first")
        shop.has("end first")
        time.sleep(0.3)  # until the parent knows
        os.kill(child, signal.SIGSTOP)
        shop.send(name)
        services.eventually(lambda: node.log.count("received") == 2)
        time.sleep(0.3)  # until it is in the pipe
        os.kill(node.pid, signal.SIGTERM)
        time.sleep(0.3)  # until the pool is closed
        os.kill(child, signal.SIGCONT)

        took = ends(node)

    assert took < ENDING
    assert shop.lines[2:] == [f"start {name}", f"end {name}"]
    assert shop.waiting() == []


def test_a_signal_in_the_midst_of_many_short_tasks_loses_none_and_runs_none_twice(shop: Shop) -> None:
    """Stock Celery ends its pool on top of whatever the signal interrupted, and may wait for that without end."""
    names = [f"{number:03}" for number in range(200)]
    with shop.worker("prefork") as node:
        for name in names:
            shop.send(name)
        shop.has("end 050")

        took = ends(node, signal.SIGQUIT)

    done = [line.removeprefix("end ") for line in shop.lines if line.startswith("end")]
    assert took < PATIENCE + ENDING
    assert sorted(done + shop.waiting()) == names


@pytest.mark.parametrize("pool", POOLS)
def test_what_was_acknowledged_early_is_buried_when_it_is_cut_off(shop: Shop, pool: str) -> None:
    """Stock Celery says that it will be retried, and nobody does it."""
    with shop.worker(pool) as node:
        running = shop.send("running", 60, task="early")
        shop.has("start running")

        ends(node, signal.SIGQUIT, signal.SIGQUIT)

    with pytest.raises(TaskInterrupted):
        running.get(timeout=2)
    [letter] = [letter for letter in shop.app.dead_letters.find() if letter.note.id == running.id]
    assert letter.note.reason == "interrupted"
    assert shop.waiting() == []
