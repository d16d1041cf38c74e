"""
What is counted under which names, and where the numbers are kept.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import promql_parser as promql
import pytest
import yaml
from celery import signals
from celery.app.task import Context
from prometheus_client.multiprocess import MultiProcessCollector

from celerykit import events, metrics
from celerykit.errors import InvalidSettings
from celerykit.metrics import METRICS, names, own
from celerykit.metrics.counting import Counting
from celerykit.metrics.files import Files

ROOT = Path(__file__).parents[2]

WATCHED = (signals.task_prerun, signals.task_postrun, signals.task_revoked)


class Sender:
    """A task, as far as signals know it."""

    def __init__(self, name: str, request: Any = None) -> None:
        self.name = name
        self.request = request


class Recorder:
    """Numbers as they were given."""

    def __init__(self) -> None:
        self.counted: dict[tuple[str, ...], float] = {}
        self.measured: dict[tuple[str, ...], float] = {}

    def count(self, metric: Any, *labels: str, by: float = 1.0) -> None:
        assert len(labels) == len(metric.labels)
        self.counted[(metric.name, *labels)] = self.counted.get((metric.name, *labels), 0) + by

    def measure(self, metric: Any, seconds: float, *labels: str) -> None:
        assert len(labels) == len(metric.labels)
        self.measured[(metric.name, *labels)] = seconds


@pytest.fixture
def numbers(app: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """What an app with the task ``unit.ping`` is counted as."""

    @app.task(name="unit.ping")
    def ping() -> None: ...

    monkeypatch.setattr(events, "_observers", [])
    before = [list(signal.receivers) for signal in WATCHED]
    app.finalize()
    recorder = Recorder()
    counting = Counting(app, recorder)
    counting.watch_calls()
    counting.watch_runs()
    yield recorder
    for signal, receivers in zip(WATCHED, before, strict=True):
        signal.receivers[:] = receivers


def request(*, eta: str | None = None, redelivered: bool = False, **ours: Any) -> Any:
    info = {"routing_key": "somewhere", "redelivered": redelivered}
    return Context({"id": "1", "eta": eta, "headers": {"celerykit": ours}, "delivery_info": info})


def run(request: Any, *, state: str | None = "SUCCESS", retval: Any = None) -> None:
    """Send the signals that a run has."""
    task = Sender("unit.ping", request)
    signals.task_prerun.send(sender=task, task_id="1", task=task, args=(), kwargs={})
    signals.task_postrun.send(sender=task, task_id="1", task=task, args=(), kwargs={}, retval=retval, state=state)


# Runs


@pytest.mark.parametrize(
    ("state", "outcome"),
    [
        ("SUCCESS", "succeeded"),
        ("FAILURE", "failed"),
        ("IGNORED", "ignored"),
        ("REJECTED", "rejected"),
        ("RETRY", "retried"),
        # It raised what is no `Exception`.
        (None, "failed"),
    ],
)
def test_a_run_is_counted_by_how_it_ended(numbers: Recorder, state: str | None, outcome: str) -> None:
    run(request(queue="q"), state=state)

    assert numbers.counted == {
        ("celerykit_tasks_started_total", "unit.ping", "q"): 1,
        ("celerykit_tasks_finished_total", "unit.ping", "q", outcome): 1,
    }
    assert numbers.measured[("celerykit_task_run_seconds", "unit.ping", "q")] < 1


@pytest.mark.parametrize(
    ("following", "outcome"),
    [
        ({"ledger": [[0, 0, 0, "snooze", "", ""], [0, 0, 0, "retry", "", ""]]}, "retried"),
        ({"ledger": [[0, 0, 0, "retry", "", ""], [0, 0, 0, "snooze", "", ""]]}, "snoozed"),
        ({"ledger": [[0, 0, 0, "retry", "", ""]], "waits": 2}, "waiting"),
    ],
)
def test_what_was_only_put_off_is_no_retry(numbers: Recorder, following: Any, outcome: str) -> None:
    retry = SimpleNamespace(sig=SimpleNamespace(options={"headers": {"celerykit": following}}))

    run(request(waits=1), state="RETRY", retval=retry)

    assert ("celerykit_tasks_finished_total", "unit.ping", "somewhere", outcome) in numbers.counted


@pytest.mark.parametrize(
    ("ours", "options", "waited"),
    [
        ({"sent_at": -5}, {}, 5),
        # It was sent long ago, and this attempt was due a moment ago.
        ({"sent_at": -500, "due_at": -2}, {}, 2),
        ({"sent_at": -500}, {"eta": -3}, 3),
        ({"sent_at": 5}, {}, 0),
        ({}, {}, None),
        ({"sent_at": "yesterday"}, {}, None),
        ({"sent_at": -5}, {"eta": "whenever"}, 5),
        # The attempt before ran most of that time, and this one was to follow at once.
        ({"sent_at": -500, "ledger": -2}, {}, 2),
        # Most of that time somebody was running it.
        ({"sent_at": -500}, {"redelivered": True}, None),
    ],
)
def test_a_call_waits_from_when_it_was_sent_or_due(
    numbers: Recorder, ours: Mapping[str, Any], options: Mapping[str, Any], waited: float | None
) -> None:
    now = time.time()
    given = {name: value + now if isinstance(value, int) else value for name, value in ours.items()}
    if ended := given.get("ledger"):
        given["ledger"] = [[ended - 400, 0, 400, "retry", "", ""]]
    eta = options.get("eta")
    if isinstance(eta, int):
        options = {"eta": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now + eta)) + "+00:00"}

    run(request(**options, **given))

    found = numbers.measured.get(("celerykit_task_wait_seconds", "unit.ping", "somewhere"))
    assert found == (None if waited is None else pytest.approx(waited, abs=1.5))


def test_a_call_that_runs_in_place_is_not_counted(numbers: Recorder) -> None:
    run(Context({"id": "1", "is_eager": True}))

    assert not numbers.counted


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"expired": True}, ("celerykit_tasks_revoked_total", "unit.ping", "q", "expired")),
        ({}, ("celerykit_tasks_revoked_total", "unit.ping", "q", "revoked")),
        ({"terminated": True}, ("celerykit_tasks_finished_total", "unit.ping", "q", "terminated")),
    ],
)
def test_a_revoked_call_is_counted_by_whether_it_ran(numbers: Recorder, how: Any, expected: Any) -> None:
    signals.task_revoked.send(sender=Sender("unit.ping"), request=request(queue="q"), **how)

    assert numbers.counted == {expected: 1}


# Events


def test_events_are_counted(numbers: Recorder) -> None:
    events.TASK_SENT.tell(task="unit.ping", id="1", queue="q")
    events.TASK_SENT_MANY.tell(task="unit.ping", queue="q", count=3, first="2")
    events.TASK_DUPLICATE.tell(task="unit.ping", id="1", key="k", then="join")
    events.TASK_DEAD.tell(task="unit.ping", id="1", queue="q", reason="expired")
    events.TASK_HANDED_BACK.tell(task="unit.tomorrow", id="1", reason="unknown_task")
    events.TASK_CUT_OFF.tell(task="unit.ping", id="1", queue="q", reason="lost")
    events.CLAIM_LOST.tell(key="k", id="1", now="done")

    assert numbers.counted == {
        ("celerykit_tasks_sent_total", "unit.ping", "q"): 4,
        ("celerykit_tasks_duplicate_total", "unit.ping", "join"): 1,
        ("celerykit_tasks_dead_total", "unit.ping", "q", "expired"): 1,
        ("celerykit_tasks_handed_back_total", "unknown", "unknown_task"): 1,
        ("celerykit_tasks_finished_total", "unit.ping", "q", "lost"): 1,
        ("celerykit_claims_total", "lost"): 1,
    }


def test_a_message_makes_no_labels(numbers: Recorder) -> None:
    for number in range(500):
        events.TASK_DEAD.tell(task=f"made.up.{number}", id="1", queue=f"made-up-{number}", reason="unknown_task")
    events.TASK_DEAD.tell(id="1", reason="malformed")

    assert {task for _, task, _, _ in numbers.counted} == {"unknown"}
    queues = {queue for _, _, queue, _ in numbers.counted}
    assert len(queues) == 102
    assert {"other", "unknown"} < queues


def test_who_sends_tasks_by_name_sees_their_names_within_reason(numbers: Recorder) -> None:
    for number in range(500):
        events.TASK_SENT.tell(task=f"billing.{number}", id="1", queue="q")

    assert len(numbers.counted) == 101
    assert numbers.counted["celerykit_tasks_sent_total", "other", "q"] == 400


# Files


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Files]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = Files()
    yield files
    files.close()
    assert not files.folder.exists()


def samples(files: Files) -> dict[tuple[str, tuple[str, ...]], float]:
    make: Any = MultiProcessCollector
    collected = make(None, path=str(files.folder)).collect()
    return {
        (sample.name, tuple(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in collected
        for sample in family.samples
    }


def test_a_new_process_goes_on_where_the_one_before_it_ended(files: Files) -> None:
    for _ in range(3):
        for place in ("child0", "child1"):
            files.write_as(place)
            files.count(names.STARTED, "shop.charge", "celery")
            files.measure(names.RUN, 0.2, "shop.charge", "celery")
    files.write_as("main")
    files.count(names.STARTED, "shop.charge", "celery")

    found = samples(files)

    assert found["celerykit_tasks_started_total", ("celery", "shop.charge")] == 7
    assert found["celerykit_task_run_seconds_count", ("celery", "shop.charge")] == 6
    assert found["celerykit_task_run_seconds_sum", ("celery", "shop.charge")] == pytest.approx(1.2)
    assert found["celerykit_task_run_seconds_bucket", ("0.1", "celery", "shop.charge")] == 0
    assert found["celerykit_task_run_seconds_bucket", ("0.25", "celery", "shop.charge")] == 6
    # Six, whatever number of processes there was.
    assert len(list(files.folder.glob("*.db"))) == 6


def test_a_file_that_grows_has_no_holes_that_a_full_disk_could_not_fill(files: Files) -> None:
    for number in range(300):
        files.measure(names.RUN, 0.2, f"shop.task{number}", "celery")

    grown = (files.folder / "histogram_main.db").stat()
    assert grown.st_size > 512 * 1024
    assert grown.st_blocks * 512 >= grown.st_size
    assert samples(files)["celerykit_task_run_seconds_count", ("celery", "shop.task299")] == 1


def test_on_a_full_disk_what_is_counted_already_goes_on_and_nothing_ends(files: Files) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400 * 1024, hard))
    try:
        for _ in range(2):
            for number in range(100):
                files.count(names.STARTED, f"shop.task{number}", "celery")
                files.measure(names.RUN, 0.2, f"shop.task{number}", "celery")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    found = samples(files)
    assert found["celerykit_tasks_started_total", ("celery", "shop.task99")] == 2
    assert found["celerykit_task_run_seconds_count", ("celery", "shop.task0")] == 2
    assert ("celerykit_task_run_seconds_count", ("celery", "shop.task99")) not in found


def test_what_a_killed_worker_left_is_removed_and_what_a_living_one_has_is_not(files: Files) -> None:
    left = files.folder.parent / "celerykit-metrics-left"
    left.mkdir()
    (left / "lock").touch()
    for lock in (left / "lock", files.folder / "lock"):
        os.utime(lock, (0, 0))

    Files().close()

    assert not left.exists()
    assert files.folder.exists()


def test_the_versions_whose_private_parts_are_used_are_known() -> None:
    """On another version: run tests/integration/test_metrics.py, and compare `MmapedDict` with what `files` does."""
    from importlib.metadata import version

    assert version("prometheus-client").startswith("0.26."), "numbers may be kept differently"
    assert version("billiard").startswith("4.3."), "a child may have no index"


# A website


@pytest.fixture
def enabled(app: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(events, "_observers", [])
    monkeypatch.setattr(own, "_here", [])
    monkeypatch.setattr(own, "_is_worker", False)
    yield lambda: metrics.enable(app)
    own.stop()


def sent(task: str) -> float | None:
    return prometheus_client.REGISTRY.get_sample_value("celerykit_tasks_sent_total", {"task": task, "queue": "celery"})


def test_a_website_counts_what_it_sends_among_its_own_metrics(app: Any, enabled: Any) -> None:
    @app.task(name="unit.ping")
    def ping(n: int = 0) -> None: ...

    ping.delay()
    enabled()
    enabled()
    ping.delay()
    ping.enqueue_many([(1,), (2,)])

    assert sent("unit.ping") == 3


def test_in_a_worker_that_serves_nothing_is_counted_twice(app: Any, enabled: Any) -> None:
    @app.task(name="unit.ping")
    def ping() -> None: ...

    enabled()
    own.stop()
    enabled()
    ping.delay()

    assert sent("unit.ping") is None


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)

    with pytest.raises(InvalidSettings, match=r"CELERYKIT_METRICS_PORT needs .*pip install 'celerykit\[metrics\]'"):
        metrics.check_extra("CELERYKIT_METRICS_PORT")


def test_without_a_port_a_worker_has_no_such_step(app: Any) -> None:
    from celerykit.worker.metrics_step import MetricsStep

    assert "celerykit.worker.metrics_step:MetricsStep" in app.steps["worker"]
    assert not MetricsStep(None).include_if(SimpleNamespace(app=app))


# What is served

SERVED = """
import json, sys, time
from types import SimpleNamespace
from urllib.request import urlopen
from urllib.error import HTTPError
from celerykit import CeleryKit, events
from celerykit.worker.serving import Server

app = CeleryKit("unit", broker="redis://:hunter2@127.0.0.1:1/0", metrics_port=0, metrics_host="::1")
told = {}
events.observe(lambda event, facts: told.setdefault(event.name, facts))
Server(SimpleNamespace(app=app, pool=SimpleNamespace(num_processes=3))).start()
deadline = time.monotonic() + 10
while "metrics.served" not in told and time.monotonic() < deadline:
    time.sleep(0.01)
url = told["metrics.served"]["address"]
found = [urlopen(url, timeout=10).read().decode() for _ in range(2)][1]
try:
    urlopen(url.replace("/metrics", "/queues"), timeout=10)
except HTTPError as error:
    print(error.code, error.read().decode())
print("\\n".join(line for line in found.splitlines() if line.startswith("celerykit_")))
"""


def test_a_broker_that_is_away_leaves_out_the_queues_and_nothing_else() -> None:
    """In a process of its own, which counts from then on."""
    ended = subprocess.run([sys.executable, "-c", SERVED], capture_output=True, text=True, timeout=30)

    assert "metrics.no_queues error='UnreachableBroker" in ended.stderr
    assert "hunter2" not in ended.stderr
    assert ended.stdout.splitlines() == [
        '503 {"error": "The broker could not be asked."}',
        "celerykit_tasks_prefetched 0.0",
        "celerykit_worker_slots 3.0",
        # Asked once, within some seconds.
        "celerykit_queue_scrape_errors_total 1.0",
    ]


# Dashboard, alerts and docs

#: What Prometheus adds, and what it keeps in histograms.
FOREIGN_LABELS = {"job", "instance"}


def series() -> dict[str, set[str]]:
    """Give the labels of everything that can be asked for."""
    found: dict[str, set[str]] = {}
    for metric in METRICS.values():
        labels = set(metric.labels) | FOREIGN_LABELS
        if metric.kind == "histogram":
            found |= {f"{metric.name}_sum": labels, f"{metric.name}_count": labels}
            found[f"{metric.name}_bucket"] = labels | {"le"}
        else:
            found[metric.name] = labels
    return found


def of_dashboard() -> Iterator[str]:
    dashboard = json.loads((ROOT / "templates/grafana/celerykit.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"].replace("$__rate_interval", "5m")


def rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load((ROOT / "templates/prometheus/celerykit.rules.yaml").read_text())["groups"]
    return list(group["rules"])


def labels_asked_for(expression: Any) -> tuple[dict[str, set[str]], set[str]]:
    """Give what is selected, with the labels it is selected by; and the labels that results are grouped by."""
    selected: dict[str, set[str]] = {}
    grouped: set[str] = set()

    def visit(node: Any) -> None:
        selector = getattr(node, "vector_selector", node)
        if isinstance(selector, promql.VectorSelector):
            matchers = {matcher.name for matcher in selector.matchers.matchers}
            selected.setdefault(selector.name, set()).update(matchers)
        modifier = getattr(node, "modifier", None)
        for part in (modifier, getattr(modifier, "matching", None)):
            grouped.update(getattr(part, "labels", None) or ())

    promql.walk(expression, visit)
    return selected, grouped


@pytest.mark.parametrize("expression", [*of_dashboard(), *(rule["expr"] for rule in rules())])
def test_dashboard_and_alerts_ask_for_what_there_is(expression: str) -> None:
    selected, grouped = labels_asked_for(promql.parse(expression))
    known = series()

    assert selected
    assert selected.keys() <= known.keys()
    for name, matchers in selected.items():
        assert matchers <= known[name]
    assert grouped <= set.union(*(known[name] for name in selected))


def test_what_is_looked_for_in_expressions_is_found() -> None:
    text = 'sum by (job) (rate(a{b="c"}[5m])) / on (queue) d offset 5m'

    assert labels_asked_for(promql.parse(text)) == ({"a": {"b"}, "d": set()}, {"job", "queue"})


def test_each_alert_says_what_is_wrong_and_what_to_do() -> None:
    for rule in rules():
        assert re.fullmatch(r"Celerykit[A-Z]\w+", rule["alert"])
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}
        labels = {label for text in rule["annotations"].values() for label in re.findall(r"\$labels\.(\w+)", text)}
        assert labels <= labels_asked_for(promql.parse(rule["expr"]))[1]


def test_variables_of_the_dashboard_are_labels_that_there_are() -> None:
    dashboard = json.loads((ROOT / "templates/grafana/celerykit.json").read_text())
    queries = [variable["query"]["query"] for variable in dashboard["templating"]["list"][1:]]

    for query in queries:
        name, label = re.fullmatch(r"label_values\((\w+)(?:\{[^}]*\})?, (\w+)\)", query).groups()  # type: ignore[union-attr]
        assert label in series()[name]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_page_lists_all_metrics() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels)} | {metric.meaning} |"
        for metric in METRICS.values()
    ]

    assert "\n".join(rows) in page


assert os.environ.get("PROMETHEUS_MULTIPROC_DIR") is None, "the tests' own metrics would be kept in files"
