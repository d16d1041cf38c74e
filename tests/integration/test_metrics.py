"""
Numbers of real workers, as Prometheus and KEDA get them; and how full queues are.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from celerykit import CeleryKit
from celerykit.dev.servers import Server
from celerykit.queues import look
from tests import services
from tests.integration.conftest import ROOT

SHOP = "tests.integration.metrics_shop"


class Scene(NamedTuple):
    node: services.Worker
    shop: Any
    server: Server
    env: dict[str, str]
    #: Where the worker serves.
    url: str

    def get(self, path: str) -> str:
        with urlopen(self.url + path, timeout=10) as answer:
            return str(answer.read().decode())

    def scraped(self) -> dict[tuple[str, ...], float]:
        """Give each number by its name and labels."""
        return {
            (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
            for family in text_string_to_metric_families(self.get("/metrics"))
            for sample in family.samples
        }

    def number(self, name: str, *labels: str) -> float:
        """Give one number, 0 if there is none, by the values of its labels in the labels' order."""
        return self.scraped().get((f"celerykit_{name}", *(label.replace("shop.", f"{SHOP}.") for label in labels)), 0)


@contextmanager
def serving(server: Server, *, pool: str, env: dict[str, str], options: list[str]) -> Iterator[Scene]:
    env = {
        "CELERY_BROKER_URL": server.url,
        "CELERY_RESULT_BACKEND": server.backend_url,
        "CELERYKIT_LOG_FORMAT": "text",
        "CELERYKIT_METRICS_HOST": "127.0.0.1",
        **env,
    }
    with services.worker(SHOP, url=server.url, pool=pool, env=env, concurrency=2, cwd=ROOT, options=options) as node:
        from tests.integration import metrics_shop

        metrics_shop.app.conf.update(broker_url=server.url, result_backend=server.backend_url)
        yield Scene(node, metrics_shop, server, env, "")


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """A prefork worker whose children live for two runs, and whose port was taken when it started."""
    options = ["--max-tasks-per-child=2", "--queues=celery,aside"]
    with services.valkey() as server, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with serving(server, pool="prefork", env={"CELERYKIT_METRICS_PORT": str(port)}, options=options) as scene:
            scene.node.wait_for("metrics.not_served")
            taken.close()
            scene.node.wait_for("metrics.served")
            yield scene._replace(url=f"http://127.0.0.1:{port}")


def test_each_run_is_counted_over_generations_of_children_and_through_a_kill(scene: Scene) -> None:
    shop = scene.shop
    for number in range(10):
        shop.add.delay(number)
    shop.orders.delay(9)
    shop.flaky.delay()
    shop.fails.delay()
    shop.dies.delay()
    shop.overruns.delay()
    shop.app.send_task("made.up", task_id="made-up")

    def finished(task: str, outcome: str) -> float:
        return scene.number("tasks_finished_total", outcome, "celery", f"shop.{task}")

    def have_ended() -> bool:
        ends = {"orders": "succeeded", "flaky": "succeeded", "fails": "failed", "dies": "lost", "overruns": "timed_out"}
        return finished("add", "succeeded") >= 20 and all(finished(*end) >= 1 for end in ends.items())

    services.eventually(have_ended, within=25, what=lambda: f"{scene.get('/metrics')}\n{scene.node.log}")

    assert scene.number("tasks_started_total", "celery", "shop.add") == 20
    assert finished("add", "succeeded") == 20
    assert scene.number("task_run_seconds_count", "celery", "shop.add") == 20
    assert scene.number("task_wait_seconds_count", "celery", "shop.add") == 20
    assert scene.number("task_wait_seconds_bucket", "+Inf", "celery", "shop.add") == 20
    assert [finished("flaky", outcome) for outcome in ("retried", "snoozed", "succeeded")] == [1, 1, 1]
    assert finished("fails", "failed") == 1
    assert finished("dies", "lost") == 1
    assert finished("overruns", "timed_out") == 1
    # What the children sent, alone and together; what this process sent is its own to count.
    assert scene.number("tasks_sent_total", "celery", "shop.add") == 10
    services.eventually(lambda: scene.number("tasks_dead_total", "celery", "process_died", "shop.dies") == 1)
    assert scene.number("tasks_dead_total", "celery", "failed", "shop.fails") == 1
    assert scene.number("tasks_handed_back_total", "unknown_task", "unknown") >= 1
    assert scene.number("worker_slots") == 2


def test_the_shops_own_metrics_are_not_served_as_zeros(scene: Scene) -> None:
    assert "shop_charged" not in scene.get("/metrics")
    assert "process_resident_memory_bytes" in scene.get("/metrics")


def test_somebody_who_asks_for_something_else_is_told(scene: Scene) -> None:
    with pytest.raises(HTTPError, match="404"):
        scene.get("/")


def test_a_silent_connection_keeps_nobody_from_asking(scene: Scene) -> None:
    host, port = scene.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))):
        assert scene.number("worker_slots") == 2


def test_queues_are_told_to_people_programs_and_prometheus(scene: Scene, tmp_path: Path) -> None:
    shop, end = scene.shop, tmp_path / "end"
    # Of "idle" nobody takes anything.
    for priority in (0, 0, 3, 9):
        shop.add.apply_async((1,), queue="idle", priority=priority)
    shop.waits_for.apply_async((end,), queue="aside")
    shop.add.apply_async((1,), queue="aside", countdown=600)

    def ask(*names: str) -> Any:
        command = [sys.executable, "-m", "celerykit", "queues", "-A", SHOP, "--json", *names]
        told = subprocess.run(
            command, env=os.environ | scene.env, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        )
        return json.loads(told.stdout)

    try:
        services.eventually(lambda: look(shop.app, ["aside"]).queues["aside"].total == 2)
        services.eventually(lambda: scene.number("tasks_in_flight", "shop.waits_for") == 1)
        told = ask("idle", "aside", "nowhere")
        assert {name: queue["total"] for name, queue in told["queues"].items()} == {"idle": 4, "aside": 2, "nowhere": 0}
        assert told["queues"]["idle"]["ready"] == 4
        assert 0 < told["queues"]["idle"]["oldest_seconds"] < 30
        aside = told["queues"]["aside"]
        assert (aside["ready"], aside["unacked"], aside["scheduled"], aside["oldest_seconds"]) == (0, 1, 1, 0)

        # The worker knows of the queues that it consumes from.
        services.eventually(lambda: json.loads(scene.get("/queues"))["queues"]["aside"]["total"] == 2)
        assert scene.number("queue_messages", "aside", "unacked") == 1
        assert scene.number("queue_messages", "aside", "scheduled") == 1
        letters = shop.app.dead_letters.count()
        services.eventually(lambda: scene.number("dead_letters", "dead_letters") == letters)
        assert ask()["dead_letters"]["count"] == letters
        assert scene.number("queue_scrape_errors_total") == 0
    finally:
        end.touch()


def test_what_stock_workers_have_taken_is_counted_and_prefixes_are_kept_apart(scene: Scene) -> None:
    from redis import Redis

    options = {"global_keyprefix": "mine."}
    app = CeleryKit("prefixed", broker=scene.server.url, broker_transport_options=options, set_as_current=False)

    @app.task(name="prefixed.ping", shared=False)
    def ping() -> None: ...

    ping.delay()
    with Redis.from_url(scene.server.client_url) as client:
        message = client.lindex("mine.celery", -1).decode()  # type: ignore[union-attr]
        for number in range(3):
            client.hset("mine.unacked", str(number), f'[{message}, "celery", "celery"]')
        client.hset("mine.unacked", mapping={"garbage": "what is this", "more": ', "\\x", "celery"]'})

    assert look(app).queues["celery"].unacked == 3
    assert look(app).queues["celery"].ready == 1


def test_a_sentinel_may_say_where_the_queues_are() -> None:
    with services.valkey(port=0) as server, services.sentinel(server) as url:
        app = CeleryKit(
            "watched",
            broker=url.partition("?")[0],
            broker_transport_options={"master_name": "shop"},
            set_as_current=False,
        )

        @app.task(name="watched.ping", shared=False)
        def ping() -> None: ...

        for priority in (0, 9):
            ping.apply_async(priority=priority)

        assert look(app).queues["celery"].ready == 2


def test_the_numbers_go_with_the_worker(scene: Scene) -> None:
    """The last one: it ends the worker."""
    import tempfile

    folders = set(Path(tempfile.gettempdir()).glob("celerykit-metrics-*"))
    assert scene.node.stop()

    gone = [folder for folder in folders if not folder.exists()]
    assert len(gone) == 1


def test_in_one_process_the_shops_own_metrics_are_served_too(scene: Scene) -> None:
    """Once the other worker has ended."""
    options = ["--queues=threads"]
    with serving(scene.server, pool="threads", env={"CELERYKIT_METRICS_PORT": "0"}, options=options) as started:
        found = re.search(r"address=(http://127.0.0.1:\d+)", started.node.wait_for("metrics.served"))
        assert found
        threads = started._replace(url=found[1])
        for number in range(10):
            threads.shop.add.apply_async((number,), queue="threads")
        threads.shop.orders.apply_async((3,), queue="threads")

        services.eventually(lambda: threads.number("tasks_finished_total", "succeeded", "threads", "shop.add") == 10)
        services.eventually(lambda: threads.number("tasks_sent_total", "celery", "shop.add") == 4)
        assert threads.scraped()["shop_charged_total",] == 10
        assert threads.number("tasks_started_total", "threads", "shop.add") == 10
