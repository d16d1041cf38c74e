"""
One id from a web request to the last retry's sub-task, its dead letter and its replay; and one trace.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer

from celerykit.dev.servers import Server
from celerykit.headers import Headers
from tests import services
from tests.integration.conftest import ROOT

SHOP = "tests.integration.correlation_shop"

REQUEST_ID = "1d4f5c0e9b7a4c52a3c55f0b2c9b7a11"


@dataclass
class Told:
    """What came of one request, in all that was written of it."""

    response: Any
    sent: list[dict[str, Any]]
    letter: Any
    lines: list[dict[str, Any]]
    of_replay: list[dict[str, Any]]
    spans: list[dict[str, Any]]

    @property
    def request_id(self) -> str:
        return str(self.response.headers["x-request-id"])


class Facts(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.all: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append({"event": str(record.msg).split()[0], **getattr(record, "data", {})})


@pytest.fixture(scope="module")
def told(broker: Server, environment: dict[str, str], tmp_path_factory: Any) -> Iterator[Told]:
    from tests.integration import correlation_shop as shop

    app: Any = shop.app
    app.conf.update(broker_url=broker.url, result_backend=broker.backend_url)
    spans: Path = tmp_path_factory.mktemp("spans") / "spans"
    in_worker = {**environment, shop.SPANS: str(spans), "CELERYKIT_LOG_FORMAT": "json"}
    # A process for each run, which ends by `os._exit`. There are as many as runs: Celery may take five seconds to start
    # one in place of another.
    options = ["-Q", "correlation", "--max-tasks-per-child=1"]
    with (
        services.worker(SHOP, url=broker.url, env=in_worker, cwd=ROOT, options=options, concurrency=5) as node,
        traced() as (tracer, in_web),
        heard() as sent,
    ):
        with pytest.MonkeyPatch.context() as patch, tracer.start_as_current_span("POST /orders"):
            # asgi-correlation-id looks for Sentry, which looks for eventlet, which warns from then on.
            patch.setitem(sys.modules, "sentry_sdk", None)
            response = asyncio.run(post(shop.web, "/orders/7"))
        node.wait_for('"task.dead"', within=30)
        [letter] = app.dead_letters.find(task="correlation.ship")
        before = lines_in(node)
        app.dead_letters.replay(task="correlation.ship")
        services.eventually(lambda: node.log.count('"task.dead"') == 2, within=30, what=lambda: node.log)
        app.dead_letters.purge(task="correlation.ship")
        node.stop()
        yield Told(
            response=response,
            sent=sent,
            letter=letter,
            lines=before,
            of_replay=lines_in(node)[len(before) :],
            spans=[
                *(json.loads(span.to_json()) for span in in_web.get_finished_spans()),
                *(json.loads(line) for line in spans.read_text().splitlines()),
            ],
        )


async def post(web: Any, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(web), base_url="http://shop") as client:
        return await client.post(path, headers={"X-Request-ID": REQUEST_ID})


@contextmanager
def traced() -> Iterator[tuple[Tracer, InMemorySpanExporter]]:
    """Trace what this process sends, as a web application does."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    CeleryInstrumentor().instrument(tracer_provider=provider)
    try:
        yield provider.get_tracer("web"), exporter
    finally:
        CeleryInstrumentor().uninstrument()


@contextmanager
def heard() -> Iterator[list[dict[str, Any]]]:
    """Hear what this process tells of the calls it sends."""
    handler, log = Facts(), logging.getLogger("celerykit.task")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield handler.all
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def lines_in(node: services.Worker) -> list[dict[str, Any]]:
    """Read the worker's lines that are about a call."""
    lines = [json.loads(line) for line in node.log.splitlines() if line.startswith("{")]
    return [line for line in lines if "id" in line]


def test_the_request_s_answer_and_what_it_sent_name_its_id(told: Told) -> None:
    assert told.request_id == REQUEST_ID
    assert [(sent["event"], sent["correlation_id"]) for sent in told.sent[:1]] == [("task.sent", told.request_id)]


def test_every_line_of_every_attempt_and_of_the_sub_task_names_it(told: Told) -> None:
    assert {line.get("correlation_id") for line in told.lines} == {told.request_id}

    seen = [(line["event"], line["task"].rpartition(".")[2], line.get("attempt")) for line in told.lines]
    for attempt in (1, 2, 3):
        assert ("task.received", "charge", attempt) in seen
        assert ("task.started", "charge", attempt) in seen
        assert ("charging 7 for acme", "charge", attempt) in seen
    assert ("task.retry_scheduled", "charge", 1) in seen
    assert ("task.retry_scheduled", "charge", 2) in seen
    assert ("task.succeeded", "charge", 3) in seen
    assert ("task.sent", "ship", 1) in seen
    assert ("task.failed", "ship", 1) in seen
    assert ("task.dead", "ship", 1) in seen


def test_the_calls_form_one_tree(told: Told) -> None:
    by_task = {line["task"].rpartition(".")[2]: line for line in told.lines if line["event"] == "task.started"}

    assert by_task["charge"]["root_id"] == by_task["ship"]["root_id"] == told.response.json()["id"]
    assert by_task["ship"]["parent_id"] == by_task["charge"]["id"]


def test_a_failure_and_its_letter_have_one_fingerprint(told: Told) -> None:
    prints = {line["error_fingerprint"] for line in told.lines if line["event"] in ("task.failed", "task.dead")}

    assert prints == {told.letter.note.fingerprint}


def test_the_dead_letter_keeps_it_and_its_replay_goes_on_with_it(told: Told) -> None:
    context = Headers.of(told.letter.headers).context
    assert context is not None
    assert (context["correlation_id"], context["tenant"]) == (told.request_id, "acme")

    seen = {(line["event"], line["correlation_id"]) for line in told.of_replay}
    assert {("task.started", told.request_id), ("task.dead", told.request_id)} <= seen
    assert {correlation_id for _, correlation_id in seen} == {told.request_id}


def test_the_request_its_retries_and_the_sub_task_are_one_trace(told: Told) -> None:
    by_id = {span["context"]["span_id"]: span for span in told.spans}
    [trace_id] = {span["context"]["trace_id"] for span in told.spans}

    [last] = [span for span in told.spans if span["name"] == "run/correlation.ship" and _is_first(span, by_id)]
    way = []
    span = last
    while span is not None:
        way.append(span["name"])
        span = by_id.get(span["parent_id"])

    sent_and_run = ["run/correlation.charge", "apply_async/correlation.charge"]
    assert way == ["run/correlation.ship", "apply_async/correlation.ship", *(3 * sent_and_run), "POST /orders"]
    assert {line.get("trace_id") for line in told.lines} == {trace_id.removeprefix("0x")}


def _is_first(span: dict[str, Any], by_id: dict[str, Any]) -> bool:
    # A replay goes on from the same message, and so from the same span.
    runs = [one for one in by_id.values() if one["name"] == span["name"]]
    return bool(span["start_time"] == min(one["start_time"] for one in runs))
