"""
Numbers of a worker whose children are killed again and again, and whose broker stands still.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from celerykit import CeleryKit
from celerykit.dev.servers import Server
from tests import services

APP = """
import os, time
from celerykit import CeleryKit

app = CeleryKit("counted", max_deliveries=100)

@app.task
def work(number: int) -> None:
    with open("began", "a") as began:
        print(number, file=began)
    time.sleep(0.01)
    with open("ended", "a") as ended:
        print(number, file=ended)
"""

NUMBER, KILLS = 300, 15


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "counted.py").write_text(APP)
    for name in ("began", "ended"):
        (tmp_path / name).touch()
    env = {"CELERYKIT_METRICS_PORT": "0", "CELERYKIT_METRICS_HOST": "127.0.0.1", "CELERYKIT_LEASE": "3"}
    options = ["--max-tasks-per-child=7"]
    with (
        services.valkey() as server,
        services.worker("counted", url=server.url, env=env, concurrency=3, cwd=tmp_path, options=options) as node,
    ):
        yield server, node


def scraped(node: services.Worker) -> dict[str, float]:
    found = re.search(r"http://127.0.0.1:\d+/metrics", node.wait_for("metrics.served"))
    assert found
    with urlopen(found[0], timeout=10) as answer:
        text = answer.read().decode()
    return {
        sample.name + sample.labels.get("outcome", sample.labels.get("state", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def sender(server: Server) -> Any:
    app = CeleryKit("counted", broker=server.url, set_as_current=False)

    @app.task(name="counted.work", shared=False)
    def work(number: int) -> None: ...

    return work


def test_no_run_is_lost_or_counted_twice_while_children_are_killed(node: Any, tmp_path: Path) -> None:
    server, worker = node
    work = sender(server)
    work.enqueue_many([(number,) for number in range(NUMBER)])
    chance = random.Random(7)
    before = 0.0
    for _ in range(KILLS):
        time.sleep(chance.uniform(0.05, 0.3))
        if children := worker.children:
            try:
                os.kill(chance.choice(children), signal.SIGKILL)
            except ProcessLookupError:
                continue
        # They are readable at every moment, and never go back.
        started = scraped(worker).get("celerykit_tasks_started_total", 0.0)
        assert started >= before
        before = started

    def lines(name: str) -> list[str]:
        return (tmp_path / name).read_text().split()

    services.eventually(lambda: len(set(lines("ended"))) == NUMBER, within=90, what=lambda: worker.log[-3000:])
    services.eventually(lambda: not scraped(worker).get("celerykit_tasks_in_flight"), within=20)
    numbers = scraped(worker)

    started, succeeded = numbers["celerykit_tasks_started_total"], numbers["celerykit_tasks_finished_totalsucceeded"]
    # A kill may come between the count and the line.
    assert len(lines("began")) <= started <= len(lines("began")) + KILLS
    assert len(lines("ended")) - KILLS <= succeeded <= len(lines("ended"))
    assert numbers["celerykit_task_run_seconds_count"] - succeeded in (0, 1)
    lost = numbers.get("celerykit_tasks_finished_totallost", 0)
    assert started - succeeded <= lost <= KILLS


def test_a_frozen_broker_leaves_out_the_queues_and_keeps_nothing_from_being_served(node: Any) -> None:
    server, worker = node
    assert "celerykit_queue_messagesready" in scraped(worker)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        services.eventually(lambda: scraped(worker)["celerykit_queue_scrape_errors_total"] >= 1, within=20)
        numbers = scraped(worker)
        assert numbers["celerykit_worker_slots"] == 3
        assert "celerykit_queue_messagesready" not in numbers
    finally:
        os.kill(server.pid, signal.SIGCONT)
    services.eventually(lambda: "celerykit_queue_messagesready" in scraped(worker), within=20)
