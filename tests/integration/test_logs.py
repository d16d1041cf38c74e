"""Every line that real workers and a real beat write, read by a machine."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from celerykit.context import Context
from celerykit.dev.processes import Process
from celerykit.dev.servers import Server
from tests import services
from tests.integration import logs_shop

ROOT = Path(__file__).parents[2]
SHOP = "tests.integration.logs_shop"
WITHIN = 20

Line = dict[str, Any]


class Story:
    """What a worker wrote from its first line to its last, while the shop was at work."""

    def __init__(self, text: str, ids: dict[str, str], *, struck: str) -> None:
        # Every line has to be JSON.
        self.lines: list[Line] = [json.loads(line) for line in text.splitlines()]
        self.ids = ids
        self.struck = struck

    def of(self, task: str) -> list[Line]:
        return [line for line in self.lines if line.get("id") == self.ids[task]]

    def one(self, event: str, task: str | None = None) -> Line:
        lines = self.lines if task is None else self.of(task)
        [line] = [line for line in lines if line["event"] == event]
        return line


def start(*options: str, folder: Path, **env: str) -> services.Worker:
    """Start one of Celery's commands; what it writes is in its log."""
    command = [sys.executable, "-m", "celery", "-A", SHOP, *options]
    return services.Worker(command, env={**os.environ, **env}, cwd=ROOT, log=folder / "output")


def work(server: Server, *options: str, folder: Path, files: str = "output") -> Story:
    """Let a worker do some work; *files* are where it writes."""
    urls = {"CELERY_BROKER_URL": server.url, "CELERY_RESULT_BACKEND": server.backend_url}
    node = start("worker", "--concurrency=1", "--without-mingle", *options, folder=folder, **urls)

    def written() -> str:
        return "".join(path.read_text() for path in sorted(folder.glob(files)))

    try:
        services.eventually(lambda: '"worker.ready"' in written(), within=30, what=lambda: node.log)
        with Context.bound(correlation_id="req-1"):
            tasks = (logs_shop.speak, logs_shop.flaky, logs_shop.fail, logs_shop.log_on)
            sent = {task.name: task.delay() for task in tasks}
        for result in sent.values():
            result.get(timeout=WITHIN, propagate=False)
        services.eventually(lambda: written().count('"task.dead"') == 2, within=WITHIN, what=written)
        assert node.stop(), node.log
    finally:
        node.kill()
    results = {name.rpartition(".")[2]: result for name, result in sent.items()}
    return Story(written(), {name: result.id for name, result in results.items()}, struck=results["log_on"].result)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with services.valkey() as server:
        logs_shop.app.conf.update(broker_url=server.url, result_backend=server.backend_url)
        yield server


@pytest.fixture(scope="module", params=["prefork", "threads"])
def story(request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Story:
    return work(server, f"--pool={request.param}", folder=tmp_path_factory.mktemp(request.param))


# Of a call


def test_a_call_is_told_from_its_receipt_to_its_success(story: Story) -> None:
    told = story.of("speak")

    assert [line["event"] for line in told if line["event"].startswith("task.")] == [
        "task.received",
        "task.started",
        "task.succeeded",
    ]
    assert {line["correlation_id"] for line in told} == {"req-1"}
    started, succeeded = story.one("task.started", "speak"), story.one("task.succeeded", "speak")
    assert started["task"] == f"{SHOP}.speak"
    assert started["wait_ms"] >= 0
    assert succeeded["run_ms"] > 0
    assert (succeeded["attempt"], succeeded["queue"], succeeded["outcome"]) == (1, "celery", "succeeded")
    assert "A-1" not in json.dumps(succeeded)


def test_a_retry_is_told_with_what_follows(story: Story) -> None:
    line = story.one("task.retry_scheduled", "flaky")

    assert (line["attempt"], line["next_attempt"]) == (1, 2)
    assert line["delay"] > 0
    assert line["run_ms"] > 0
    assert line["error"].startswith("ConnectionError")
    assert line["error_fingerprint"] == story.one("task.failed", "flaky")["error_fingerprint"]


def test_a_failure_is_told_with_its_traceback(story: Story) -> None:
    line = story.one("task.failed", "fail")

    assert (line["level"], line["error"], line["outcome"]) == ("error", "ValueError: bad news", "failed")
    assert line["traceback"].endswith("ValueError: bad news")
    assert line["run_ms"] > 0
    assert story.one("task.dead", "fail")["correlation_id"] == "req-1"


# What a task says


@pytest.mark.parametrize(
    ("event", "facts"),
    [
        ("paid", {"order": "A-1", "password": "***", "logger": "shop", "level": "info"}),
        ("by a logger of tasks: A-1", {"logger": "shop.tasks"}),
        ("by a library", {"status": 503, "logger": "library", "level": "warning"}),
        ("python.warning", {"text": "careful", "category": "UserWarning"}),
        ("with a traceback", {"error": "KeyError: 'caught'"}),
        ("%d arguments do not fit (with arguments that do not fit: TypeError)", {"level": "error"}),
    ],
)
def test_what_a_task_says_is_told_with_its_call(story: Story, event: str, facts: dict[str, Any]) -> None:
    line = story.one(event, "speak")

    assert {name: line.get(name) for name in facts} == facts
    assert (line["task"], line["correlation_id"], line["attempt"]) == (f"{SHOP}.speak", "req-1", 1)


def test_what_a_task_prints_is_told_with_its_call(story: Story) -> None:
    printed = [line["text"] for line in story.of("speak") if line["event"] == "process.printed"]

    assert printed[:3] == ["printed A-1", "to stderr, in", "two lines"]
    assert printed[-1] == "KeyError: 'caught'"


def test_a_soft_time_limit_that_strikes_while_a_task_logs_is_not_lost(story: Story) -> None:
    is_limited = any(line["event"] == "task.over_time" for line in story.of("log_on"))

    assert story.struck == ("struck" if is_limited else "went on")


def test_an_exception_in_a_thread_is_told(story: Story) -> None:
    line = story.one("process.thread_failed")

    assert (line["thread"], line["error"]) == ("helper", "ZeroDivisionError: division by zero")


def test_a_worker_is_told_from_its_start_to_its_end(story: Story) -> None:
    events = [line["event"] for line in story.lines]

    assert events.index("worker.starting") < events.index("worker.ready") < events.index("worker.stopping")
    assert story.one("worker.stopping")["how"] == "warm"
    assert {line["worker"] for line in story.lines if "worker" in line} == {story.one("worker.ready")["worker"]}
    starting = story.one("worker.starting")
    assert (starting["concurrency"], starting["queues"]) == (1, ["celery"])
    assert all({"timestamp", "level", "event", "logger"} <= line.keys() for line in story.lines)


# Files, and beat


def test_files_are_named_and_written_as_celery_says(server: Server, tmp_path: Path) -> None:
    story = work(server, "-n", "w7@%h", f"--logfile={tmp_path}/%n%I.log", folder=tmp_path, files="*.log")

    assert sorted(path.name for path in tmp_path.glob("*.log")) == ["w7-1.log", "w7.log"]
    assert (tmp_path / "output").read_text() == ""
    parents, childs = ((tmp_path / name).read_text() for name in ("w7.log", "w7-1.log"))
    assert '"task.received"' in parents
    assert '"task.succeeded"' not in parents
    assert '"paid"' in childs
    assert story.one("task.succeeded", "speak")["run_ms"] > 0


def test_beat_is_told_as_a_worker_is(server: Server, tmp_path: Path) -> None:
    beat = start("beat", "-s", f"{tmp_path}/schedule", folder=tmp_path, CELERY_BROKER_URL=server.url)
    try:
        services.eventually(lambda: '"beat.sent"' in beat.log, within=30, what=lambda: beat.log)
    finally:
        beat.stop(grace=10)

    lines = [json.loads(line) for line in beat.log.splitlines()]
    events = [line["event"] for line in lines]
    assert events.index("beat.starting") < events.index("beat.leads") < events.index("beat.sent")
    sent = next(line for line in lines if line["event"] == "task.sent")
    assert sent["task"] == f"{SHOP}.tick"
    assert sent["correlation_id"] == sent["id"]


def test_a_worker_that_nobody_reads_goes_on_working(server: Server) -> None:
    """Its log is a pipe, which is full after some hundred lines."""
    reading, writing = os.pipe()
    env = {"CELERY_BROKER_URL": server.url, "CELERY_RESULT_BACKEND": server.backend_url}
    command = [sys.executable, "-m", "celery", "-A", SHOP, "worker", "--concurrency=1", "--without-mingle"]
    worker = Process(command, env={**os.environ, **env}, cwd=ROOT, output=writing)
    os.close(writing)
    try:
        results = [logs_shop.speak.delay() for _ in range(60)]
        for result in results:
            result.get(timeout=40)

        with os.fdopen(reading, "rb") as reader:
            found = b""
            while found.count(b'"task.succeeded"') < 60:
                found += reader.read1(1 << 16)
            worker.terminate()
            found += reader.read()
    finally:
        worker.kill_group()

    lines = [json.loads(line) for line in found.splitlines()]
    assert len(found) > 1 << 16
    assert lines[-1]["event"]
    assert not [line for line in lines if line["event"] == "log.dropped"]


def test_celerys_own_way_is_one_setting_away(server: Server, tmp_path: Path) -> None:
    env = {"CELERY_BROKER_URL": server.url, "CELERYKIT_LOG_FORMAT": "celery"}
    node = start("worker", "--pool=solo", "-l", "INFO", "--without-mingle", folder=tmp_path, **env)
    try:
        node.wait_for(" ready.", within=30)
    finally:
        node.stop()

    assert "[config]" in node.log
    assert ": INFO/MainProcess] celery@" in node.log
    assert "{" not in node.log
