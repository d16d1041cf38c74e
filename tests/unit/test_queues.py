"""
How full queues are, by brokers that need no service.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from kombu import Queue
from kombu.common import Broadcast

from celerykit import EnqueueError
from celerykit.cli.commands import celerykit
from celerykit.queues import Depth, Depths, look, queue_names, rabbitmq

# Which


@pytest.mark.filterwarnings(r"ignore:\s*The 'queue' task attribute")  # people use it all the same
@pytest.mark.parametrize(
    "routes",
    [
        {"unit.*": {"queue": "aside"}, "other": "slow"},
        [("unit.*", {"queue": "aside"}), ("other", {"queue": "slow"})],
        [{"unit.*": {"queue": Queue("aside")}}, {"other": {"queue": "slow"}}, "somebodys.router"],
        ([("unit.*", {"queue": "aside"}), ("other", "slow")],),
    ],
)
def test_queues_are_those_that_are_defined_routed_to_and_declared(make_app: Any, routes: Any) -> None:
    app = make_app(task_routes=routes)

    @app.task(queue="own")
    def ping() -> None: ...

    assert queue_names(app) == ["celery", "aside", "slow", "own"]


def test_a_broadcast_is_no_queue_of_work(make_app: Any) -> None:
    assert queue_names(make_app(task_queues=[Queue("work"), Broadcast("news")])) == ["work"]


# A broker that Kombu can ask, and one that it cannot


def test_what_is_ready_is_told_and_a_queue_that_is_not_there_is_not_made(make_app: Any) -> None:
    app = make_app(task_default_queue="told")

    @app.task(name="unit.ping")
    def ping() -> None: ...

    ping.delay()
    ping.delay()

    for _ in range(2):
        depths = look(app, ["told", "nowhere"])
        assert depths.queues["told"] == Depth(ready=2)
        assert depths.queues["nowhere"] == Depth(ready=0, missing=True)
        assert depths.dead_letters == 0


def test_where_looking_would_make_a_queue_nothing_is_told(make_app: Any, tmp_path: Path) -> None:
    database = tmp_path / "queues.sqlite"
    app = make_app(broker=f"sqla+sqlite:///{database}")

    depths = look(app)

    assert depths.queues == {"celery": Depth()}
    assert depths.facts()["queues"]["celery"]["total"] is None
    assert not database.exists()


def test_a_broker_that_is_not_there_is_an_error_without_its_password(make_app: Any) -> None:
    app = make_app(broker="redis://:hunter2@127.0.0.1:1/0")

    with pytest.raises(EnqueueError, match="could not be looked at") as error:
        look(app, timeout=1.0)

    assert "hunter2" not in str(error.value)


def test_a_total_is_of_what_is_told() -> None:
    assert Depth(ready=1, unacked=2, scheduled=3).total == 6
    assert Depth(ready=1).total == 1
    assert Depth(consumers=1).total is None


# RabbitMQ's management plug-in


class Management(BaseHTTPRequestHandler):
    asked: list[str]
    answers: dict[str, Any]

    def do_GET(self) -> None:
        self.asked.append(f"{self.headers['Authorization']} {self.path}")
        answer = self.answers.get(self.path.partition("?")[0])
        body = json.dumps(answer).encode()
        self.send_response(200 if answer is not None else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def management(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    handler = type("Handler", (Management,), {"asked": [], "answers": {}})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(rabbitmq, "PORT", server.server_port)
        monkeypatch.setattr(rabbitmq, "_silent", {})
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield handler
        server.shutdown()
        thread.join()


CONNECTION = SimpleNamespace(hostname="127.0.0.1", ssl=False, userid="me", password="pass", virtual_host="shop")


def test_what_the_management_plugin_tells_is_told(management: Any) -> None:
    management.answers["/api/queues/shop/celery"] = {"messages_unacknowledged": 2, "head_message_timestamp": None}

    told = rabbitmq._told(CONNECTION, ["celery", "new"])

    assert told == {"celery": {"unacked": 2, "oldest_seconds": None}, "new": {}}
    assert [line.split()[:2] for line in management.asked] == [["Basic", "bWU6cGFzcw=="]] * 2


def test_a_plugin_that_does_not_answer_is_left_alone_for_a_while(management: Any, monkeypatch: Any) -> None:
    port = rabbitmq.PORT
    monkeypatch.setattr(rabbitmq, "PORT", 1)
    assert rabbitmq._told(CONNECTION, ["celery"]) == {}

    monkeypatch.setattr(rabbitmq, "PORT", port)
    assert rabbitmq._told(CONNECTION, ["celery"]) == {}
    assert management.asked == []


# For people and programs


DEPTHS = Depths(
    {"celery": Depth(ready=5, unacked=2, scheduled=1, oldest_seconds=7.4), "aside": Depth(ready=0, missing=True)},
    "dead_letters",
    3,
    delayed=4,
)


@pytest.fixture
def run(app: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def told(*arguments: str) -> str:
        result = CliRunner().invoke(celerykit, ["queues", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    monkeypatch.setattr("celerykit.cli.queues.found_app", lambda ctx, named: app)
    monkeypatch.setattr("celerykit.queues.look", lambda app, names, timeout: DEPTHS)
    return told


def test_people_get_a_table(run: Any) -> None:
    lines = [line.split() for line in run().splitlines()]

    assert lines[0] == ["QUEUE", "READY", "UNACKED", "SCHEDULED", "TOTAL", "OLDEST", "CONSUMERS"]
    assert lines[1] == ["celery", "5", "2", "1", "8", "7", "s", "-"]
    assert lines[2] == ["aside", "0", "-", "-", "0", "-", "-", "(there", "is", "none", "yet)"]
    assert "Dead letters: 3 in dead_letters." in run()
    assert "4 on their way" in run()


def test_programs_get_json_with_the_total_that_keda_reads(run: Any) -> None:
    told = json.loads(run("--json"))

    assert told["queues"]["celery"]["total"] == 8
    assert told["queues"]["aside"]["unacked"] is None
    assert told["dead_letters"] == {"queue": "dead_letters", "count": 3}
