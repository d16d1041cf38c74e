from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from uuid import UUID

import celery
import celery.app.log
import click
import pytest
import structlog
from billiard.einfo import ExceptionInfo
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import signals
from celery.app import trace
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.log import get_logger, get_task_logger
from pydantic import BaseModel, Field

from celerykit import CeleryKit, Redact, events, logs, redact, running
from celerykit.errors import InvalidOptions, InvalidPayload
from celerykit.logs import pipe
from celerykit.logs.handlers import File, Stream
from celerykit.logs.lifting import LIFTED
from celerykit.logs.lines import MOST_BYTES
from celerykit.logs.printed import Printed

ID, OTHER = "7d4f2ec1-1df5-4f2f-9d8a-1f3b3c0f5a11", "0e5a3b5f-7a9d-45dc-b3f4-8f31d2f7e8a2"


def record(message: Any, *args: Any, name: str = "shop", level: int = logging.INFO, **more: Any) -> logging.LogRecord:
    """Make a record as `logging` does."""
    exc_info = more.pop("exc_info", None)
    return logging.getLogger(name).makeRecord(name, level, "shop.py", 1, message, args, exc_info, extra=more or None)


def told(record: logging.LogRecord, **options: Any) -> dict[str, Any]:
    """Read what is written of a record."""
    line = logs.Formatter("json", **options).format(record)
    assert "\n" not in line
    assert len(line.splitlines()) == 1
    assert len(line.encode()) <= MOST_BYTES
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def traced(message: str, *, level: int = logging.INFO, exc_info: Any = None, **data: Any) -> logging.LogRecord:
    """Make a record as Celery does where it runs a task."""
    data = {"id": ID, "name": "shop.charge", **data}
    return record(message, data, name="celery.app.trace", level=level, exc_info=exc_info, data=data)


@pytest.fixture
def bound() -> Iterator[Callable[..., Any]]:
    """Bind what is bound for a running call."""
    before = structlog.contextvars.get_contextvars()
    yield lambda **facts: structlog.contextvars.bind_contextvars(**facts)
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**before)


def raised(error: BaseException) -> Any:
    try:
        raise error
    except BaseException:
        return sys.exc_info()


# A line


def test_a_line_says_when_how_bad_what_and_who():
    line = told(record("hello %s", "world"))

    assert list(line) == ["timestamp", "level", "event", "logger"]
    assert datetime.fromisoformat(line["timestamp"]) - datetime.now(UTC) < timedelta(seconds=5)
    assert line["timestamp"].endswith("Z")
    assert (line["level"], line["event"], line["logger"]) == ("info", "hello world", "shop")


def test_an_event_of_ours_has_its_facts(caplog):
    with caplog.at_level(logging.INFO):
        events.TASK_SENT.tell(task="shop.charge", id=ID, queue="celery")

    line = told(caplog.records[0])

    assert line["event"] == "task.sent"
    assert (line["task"], line["id"], line["queue"]) == ("shop.charge", ID, "celery")


def test_an_error_among_the_facts_is_a_text_and_a_fingerprint(caplog):
    with caplog.at_level(logging.INFO):
        events.CLAIM_LOST.tell(error=raised(ConnectionError("redis://me:hunter2@host is gone"))[1])

    line = told(caplog.records[0])

    assert line["error"].startswith("ConnectionError: ")
    assert "hunter2" not in line["error"]
    assert len(line["error_fingerprint"]) == 12


def test_an_exception_is_told_with_its_traceback_in_one_line():
    line = told(record("went wrong", exc_info=raised(ValueError("bad\nnews")), level=logging.ERROR))

    assert line["error"] == "ValueError: bad\nnews"
    assert line["traceback"].startswith("Traceback (most recent call last)")
    assert len(line["error_fingerprint"]) == 12


def test_what_is_given_as_extra_is_told():
    line = told(record("paid", amount=Decimal("19.90"), at=timedelta(seconds=2), order=UUID(ID)))

    assert (line["amount"], line["at"], line["order"]) == ("19.90", 2.0, ID)


def test_extra_does_not_take_the_place_of_what_a_line_is():
    line = told(record("paid", level_=1, timestamp="never", event="another"))

    assert line["event"] == "paid"
    assert line["event_"] == "another"
    assert line["timestamp_"] == "never"


def test_a_line_has_the_call_that_runs(bound):
    bound(task="shop.charge", id=ID, root_id=OTHER, attempt=2, worker="w1@host", tenant="acme")

    line = told(record("hello"))

    assert (line["task"], line["id"], line["attempt"], line["tenant"]) == ("shop.charge", ID, 2, "acme")


def test_a_line_about_another_call_has_nothing_of_the_running_one_but_its_root(bound, caplog):
    bound(
        task="shop.charge", id=OTHER, root_id=OTHER, correlation_id="c", attempt=2, queue="slow", key="k", wait_ms=1.0
    )
    with caplog.at_level(logging.INFO):
        events.TASK_SENT.tell(task="shop.mail", id=ID)

    line = told(caplog.records[0])

    assert (line["task"], line["id"], line["root_id"], line["correlation_id"]) == ("shop.mail", ID, OTHER, "c")
    assert {"attempt", "queue", "key", "wait_ms"}.isdisjoint(line)


def test_what_somebody_calls_as_a_fact_of_the_call_is_called_stands_beside_it(bound):
    bound(task="shop.charge", id=ID, attempt=2, queue="slow", tenant="acme")
    theirs: dict[str, Any] = {"id": 77, "queue": "mine", "outcome": "succeeded", "tenant": "other", "reason": "none"}

    lines = [
        told(record("paid", **theirs)),
        told(record("paid", data=theirs)),
        told(record({"event": "paid", **theirs}, _logger=1)),
    ]

    for line in lines:
        assert (line["task"], line["id"], line["attempt"], line["queue"]) == ("shop.charge", ID, 2, "slow")
        assert (line["id_"], line["queue_"], line["outcome_"], line["tenant"]) == (77, "mine", "succeeded", "other")
        assert ("outcome" in line, line["reason"]) == (False, "none")


def test_what_somebody_binds_as_a_fact_of_the_call_is_called_stands_beside_it(bound):
    token = running.at_work.set({"task": "shop.charge", "id": ID, "attempt": 2})
    secret = redact.bind(["4242"])
    try:
        bound(task="shop.charge", id=77, attempt=2, key="4242", correlation_id="c")
        lines = [
            told(record("paid")),
            told(record(events.Said(events.TASK_SENT, {"id": OTHER}))),
            told(traced(trace.LOG_SUCCESS, runtime=0.5, return_value="")),
        ]
    finally:
        redact.unbind(secret)
        running.at_work.reset(token)

    assert (lines[0]["task"], lines[0]["id"], lines[0]["attempt"]) == ("shop.charge", ID, 2)
    assert [line["id"] for line in lines] == [ID, OTHER, ID]
    for line in lines:
        assert (line["id_"], line["key_"], line["correlation_id"]) == (77, redact.MASK, "c")
        assert {"key", "task_", "attempt_"}.isdisjoint(line)


def test_where_no_call_runs_somebodys_fields_have_their_names():
    assert told(record("paid", id=77))["id"] == 77


def test_what_structlog_has_merged_already_is_told_once(bound):
    bound(task="shop.charge", id=ID, attempt=2)

    line = told(record({"event": "paid", "task": "shop.charge", "id": ID, "attempt": 2}, _logger=1))

    assert {"task_", "id_", "attempt_"}.isdisjoint(line)
    assert (line["task"], line["id"], line["attempt"]) == ("shop.charge", ID, 2)


def test_what_is_told_of_a_process_has_nothing_of_the_call_that_runs(bound, caplog):
    bound(task="shop.charge", id=ID, root_id=ID, correlation_id="c", attempt=2)
    with caplog.at_level(logging.INFO):
        events.WORKER_STOPPING.tell(worker="w1@host", how="warm", signal="SIGTERM")
        events.PROCESS_PRINTED.tell(text="hello")

    stopping, printed = map(told, caplog.records)

    assert list(stopping) == ["timestamp", "level", "event", "worker", "how", "signal", "logger"]
    assert printed["id"] == ID


def test_a_line_in_the_parent_has_the_call_whose_message_is_at_hand():
    token = running.at_hand.set({"task": "shop.charge", "id": ID, "root_id": OTHER})
    line = told(record(trace.LOG_RECEIVED, name="celery.worker.strategy", data={"name": "shop.charge", "id": ID}))
    running.at_hand.reset(token)

    assert (line["event"], line["root_id"], line["correlation_id"]) == ("task.received", OTHER, OTHER)


def test_structlog_events_are_lines_like_others():
    message = {"event": "paid", "amount": 3, "level": "info"}

    line = told(record(message, _logger=object(), _name="info"))

    assert (line["event"], line["amount"], line["level"]) == ("paid", 3, "info")


def test_structlog_exceptions_are_told():
    error = raised(ValueError("bad"))[1]

    line = told(record({"event": "oh", "exc_info": error}, _logger=object(), _name="error"))

    assert line["error"] == "ValueError: bad"


def test_text_has_what_a_person_wants(bound):
    bound(task="shop.charge", id=ID, root_id=ID, correlation_id=ID, attempt=1, worker="w1@host", queue="celery")
    formatter = logs.Formatter("text")

    line = formatter.format(traced(trace.LOG_SUCCESS, runtime=0.0123, return_value="None"))

    assert line[24:] == f"info     task.succeeded  task=shop.charge id={ID} run_ms=12.3"


def test_text_has_the_traceback_below():
    text = logs.Formatter("text", colours=True).format(record("oh", exc_info=raised(ValueError("bad"))))

    assert "\x1b[1moh" in text
    assert text.splitlines()[1] == "Traceback (most recent call last):"


def test_a_span_of_opentelemetry_is_told():
    otel = pytest.importorskip("opentelemetry.trace")
    context = otel.SpanContext(0xABC, 0xDEF, is_remote=False)

    with otel.use_span(otel.NonRecordingSpan(context)):
        line = told(record("hello"))

    assert (line["trace_id"], line["span_id"]) == (f"{0xABC:032x}", f"{0xDEF:016x}")


# Whatever it is given


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@dataclass
class Card:
    number: Annotated[str, Redact()]
    owner: str


class Order(BaseModel):
    id: int
    card: Annotated[str, Redact()] = Field(default="4242")


def _circle() -> Any:
    circle: list[Any] = []
    circle.append({"again": circle})
    return circle


def _deep() -> Any:
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    return deep


@pytest.mark.parametrize(
    "value",
    [
        Broken(),
        {Broken(): Broken()},
        {1: 2, (1, 2): {3}},
        float("nan"),
        [float("inf")],
        "half a character: \ud800",
        "\u2028 ends lines, and \x85, \x0b, \r\n too",
        b"\xff\x00",
        10**5000,
        "x" * 1_000_000,
        ["y" * 1000] * 1000,
        {f"key{number}": "z" * 100 for number in range(10_000)},
        object(),
        Broken,
        lambda: None,
        _circle(),
        _deep(),
        ValueError(Broken()),
        SimpleNamespace(a=Broken()),
        datetime.max,
        timedelta.max,
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_can_be_logged(value):
    assert told(record("with %s", "it", value=value))["event"] == "with it"
    assert told(record("with %s", value))["level"] == "info"
    assert told(record({"event": "oh", "value": value}, _logger=1, _name="x"))["event"] == "oh"
    assert told(record(value))["level"] == "info"
    assert logs.Formatter("text").format(record("with", value=value))


def test_arguments_that_do_not_fit_are_told_as_such():
    line = told(record("%d and %d", "one"))

    assert line["event"] == "%d and %d (with arguments that do not fit: TypeError)"


def test_a_record_that_cannot_be_written_is_told_as_such():
    broken = record("hello")
    broken.levelname = None  # type: ignore[assignment]

    assert told(broken)["event"] == "log.unreadable"


def test_a_long_traceback_keeps_its_ends():
    line = told(record("oh", exc_info=raised(ValueError("x" * 100_000 + "the end"))))

    assert line["traceback"].startswith("Traceback")
    assert line["traceback"].endswith("the end")


# A soft time limit, which may strike anywhere


class Late:
    """What it strikes in."""

    def __repr__(self) -> str:
        raise SoftTimeLimitExceeded


class LateError(Exception):
    def __str__(self) -> str:
        raise SoftTimeLimitExceeded


LATE_RECORDS = {
    "an argument": lambda: record("with %s", Late()),
    "a message": lambda: record(Late()),
    "a value": lambda: record("oh", value={"deep": [Late()]}),
    "an error": lambda: record("oh", error=LateError()),
    "an exception": lambda: record("oh", exc_info=raised(LateError())),
    "an error of ours": lambda: record(events.Said(events.CLAIM_LOST, {"error": LateError()})),
    "an error of celery's": lambda: failure(LateError(), trace.log_policy_unexpected),
}


@pytest.mark.parametrize("kind", ["json", "text"])
@pytest.mark.parametrize("what", LATE_RECORDS)
def test_a_soft_time_limit_passes_through_a_line(what, kind):
    late = LATE_RECORDS[what]()

    with pytest.raises(SoftTimeLimitExceeded):
        logs.Formatter(kind).format(late)


def test_a_soft_time_limit_leaves_no_class_without_its_marks(monkeypatch):
    class Pin(BaseModel):
        digits: Annotated[str, Redact()]

    def names_of(*_: Any) -> Any:
        raise SoftTimeLimitExceeded

    with monkeypatch.context() as patch:
        patch.setattr(redact, "names_of", names_of)
        with pytest.raises(SoftTimeLimitExceeded):
            told(record("paid", code=Pin(digits="4242")))

    assert told(record("paid", code=Pin(digits="4242")))["code"] == {"digits": redact.MASK}


@pytest.mark.parametrize("kind", ["pipe", "stream", "file"])
def test_a_soft_time_limit_passes_through_a_handler(kind, channel, tmp_path):
    path = tmp_path / "log"
    with path.open("w") as stream:
        made = {"pipe": lambda: pipe.PipeHandler(channel[1]), "stream": lambda: Stream(stream)}
        handler = made.get(kind, lambda: File(path))()
        handler.setFormatter(logs.Formatter())
        with pytest.raises(SoftTimeLimitExceeded):
            handler.handle(record(Late()))
        handler.handle(record("and goes on"))
        handler.close()

    assert b"and goes on" in (read_now(channel[0]) if kind == "pipe" else path.read_bytes())


# Secrets


def test_what_is_secret_by_name_or_mark_is_masked():
    line = told(
        record("paid", password="hunter2", card=Card("4242", "ada"), order=Order(id=7), nested={"api_key": "k-1"})
    )

    assert line["password"] == redact.MASK
    assert line["card"] == {"number": redact.MASK, "owner": "ada"}
    assert line["order"] == {"id": 7, "card": redact.MASK}
    assert line["nested"] == {"api_key": redact.MASK}


def test_secret_values_of_the_running_call_are_taken_out_of_everything(bound):
    token = redact.bind(["4242 4242"])
    try:
        bound(tenant="of 4242 4242")
        error = raised(ValueError("no such card: 4242 4242"))
        lines = [
            told(record("paid with %s", "4242 4242", exc_info=error, more=["4242 4242"])),
            told(record("4242 4242", name="celery.redirected", level=logging.WARNING)),
            told(record(events.Said(events.CLAIM_LOST, {"error": error[1]}), data={})),
            told(traced(trace.LOG_RETRY, exc="Retry in 1s: ValueError('4242 4242')")),
        ]
        text = logs.Formatter("text").format(record("paid with 4242 4242", exc_info=error))
    finally:
        redact.unbind(token)

    assert not [line for line in lines if "4242" in json.dumps(line)]
    assert "4242" not in text


def test_ids_and_names_of_the_running_call_are_whole_whatever_is_secret(bound):
    known = {"task": "shop.pay", "id": "a123-4", "root_id": "a123-4", "correlation_id": "a123-4", "queue": "shop"}
    bound(**known, tenant="shop 123")
    token = redact.bind(["123", "shop", "started"])
    try:
        lines = [
            told(record("paid with %s", "123", id="of 123")),
            told(traced(trace.LOG_SUCCESS, id="a123-4", name="shop.pay", runtime=0.123, return_value="")),
            told(record(events.Said(events.TASK_STARTED, {"id": "a123-4", "task": "shop.pay"}))),
        ]
        chain = logs.redacted(None, "", {"event": "of 123", **known})
    finally:
        redact.unbind(token)

    for line in lines:
        assert {name: line[name] for name in known} == known
        assert line["tenant"] == f"{redact.MASK} {redact.MASK}"
    assert (lines[0]["event"], lines[0]["id_"]) == (f"paid with {redact.MASK}", f"of {redact.MASK}")
    assert lines[1]["run_ms"] == 123.0
    assert lines[2]["event"] == "task.started"
    assert chain == {"event": f"of {redact.MASK}", **known}


# Celery's records


def failure(error: Exception, policy: Any, *, internal: bool = False) -> logging.LogRecord:
    try:
        raise error
    except Exception:
        einfo = ExceptionInfo(internal=internal)
    einfo.exception = error
    return traced(
        policy.format.strip(),
        level=policy.severity,
        exc_info=einfo.exc_info if policy.traceback else None,
        hostname="w1@host",
        exc=repr(error),
        traceback=einfo.traceback,
        args="('secret',)",
        kwargs="{}",
        description=policy.description,
        internal=internal,
    )


@pytest.mark.parametrize(
    ("record_", "event", "facts"),
    [
        (
            record(trace.LOG_RECEIVED, name="celery.worker.strategy", data={"id": ID, "name": "a", "args": "(1,)"}),
            "task.received",
            {"task": "a", "id": ID},
        ),
        (traced(trace.LOG_SUCCESS, runtime=0.5, return_value="'s'"), "task.succeeded", {"run_ms": 500.0, "id": ID}),
        (
            traced(trace.LOG_RETRY, exc="Retry in 3s: ConnectionError('gone')"),
            "task.retry_scheduled",
            {"error": "ConnectionError('gone')", "outcome": "retry_scheduled"},
        ),
        (failure(ValueError("bad"), trace.log_policy_unexpected), "task.failed", {"error": "ValueError: bad"}),
        (failure(ValueError("bad"), trace.log_policy_expected), "task.failed", {"error": "ValueError('bad')"}),
        (failure(ValueError("bad"), trace.log_policy_internal, internal=True), "task.failed", {"internal": True}),
        (
            failure(InvalidPayload("bad", "shop.charge"), trace.log_policy_unexpected),
            "task.invalid",
            {"outcome": "invalid"},
        ),
        (
            failure(InvalidPayload("bad", "shop.another"), trace.log_policy_unexpected),
            "task.failed",
            {"outcome": "failed"},
        ),
        (failure(ValueError("x"), trace.log_policy_ignore), "task.ignored", {"task": "shop.charge"}),
        (failure(ValueError("x"), trace.log_policy_reject), "task.rejected", {"reason": "ValueError('x')"}),
        (
            record("Discarding revoked task: %s[%s]", "a", ID, name="celery.worker.request"),
            "task.revoked",
            {"task": "a", "id": ID},
        ),
        (
            record("Soft time limit (%ss) exceeded for %s[%s]", 3, "a", ID, name="celery.worker.request"),
            "task.over_time",
            {"limit": "soft", "seconds": 3, "task": "a", "id": ID},
        ),
        (
            record("Hard time limit (%ss) exceeded for %s[%s]", 3, "a", ID, name="celery.worker.request"),
            "task.over_time",
            {"limit": "hard"},
        ),
        (record("%s ready.", "w1@host", name="celery.apps.worker"), "worker.ready", {"worker": "w1@host"}),
        (
            record("Connected to %s", "redis://", name="celery.worker.consumer.connection"),
            "broker.connected",
            {"url": "redis://"},
        ),
        (
            record("Scheduler: Sending due task %s (%s)", "every", "a", name="celery.beat"),
            "beat.sent",
            {"entry": "every", "task": "a"},
        ),
        (record("hi", name="celery.redirected"), "process.printed", {"text": "hi"}),
        (
            record("%s", "shop.py:3: UserWarning: careful: very\n  careful()\n", name="py.warnings"),
            "python.warning",
            {"text": "careful: very", "category": "UserWarning", "file": "shop.py", "line": 3},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_celerys_records_are_events(record_, event, facts):
    line = told(record_)

    assert line["event"] == event
    assert {name: line.get(name) for name in facts} == facts
    assert "secret" not in json.dumps(line)


def test_what_failed_has_a_traceback_and_the_fingerprint_of_its_letter():
    from celerykit.dead_letters import error_fingerprint

    failed = failure(ValueError("bad"), trace.log_policy_unexpected)

    line = told(failed)

    assert line["traceback"].splitlines()[-1] == "ValueError: bad"
    assert line["error_fingerprint"] == error_fingerprint("ValueError", failed.data["traceback"])  # type: ignore[attr-defined]


def test_what_failed_with_an_error_that_cannot_be_written_has_failed_all_the_same():
    class Declined(Exception):
        def __str__(self) -> str:
            return self.order.id  # type: ignore[attr-defined,no-any-return]

    line = told(failure(Declined(), trace.log_policy_unexpected))

    assert (line["event"], line["error"], line["outcome"]) == ("task.failed", "Declined", "failed")


def test_the_kind_of_a_retry_is_what_was_noted(bound):
    bound(id=ID, kind="snooze", delay=5.0, next_attempt=1, run_ms=12.3)

    line = told(traced(trace.LOG_RETRY, exc="Retry in 5s"))

    assert (line["event"], line["delay"], line["run_ms"]) == ("task.snoozed", 5.0, 12.3)
    assert "kind" not in line
    assert "run_ms" not in told(record("in a hook"))


def test_what_broke_a_run_off_is_told_of_its_call():
    lost = record("Task handler raised error: %r", WorkerLostError("signal 9"), name="celery.worker.request")
    overran = record("Task handler raised error: %r", TimeLimitExceeded(3), name="celery.worker.request")
    died = record("Process %r pid:%r exited with %r", "ForkPoolWorker-2", 17, "signal 9", name="multiprocessing")

    assert (told(lost)["event"], told(lost)["reason"]) == ("task.cut_off", "lost")
    assert told(lost)["error"] == "WorkerLostError: signal 9"
    assert told(overran)["reason"] == "timed_out"
    assert (told(died)["event"], told(died)["pid"], told(died)["status"]) == ("worker.process_died", 17, "signal 9")


@pytest.mark.parametrize("name", [name for name, _ in LIFTED()])
def test_a_record_that_only_looks_like_celerys_is_told_as_it_is(name):
    message = next(message for logger, message in LIFTED() if logger == name)

    assert told(record(message, name=name))["logger"] == name


def test_texts_of_celery_are_those_of_the_version_that_was_read():
    """When this fails: compare the texts in `celerykit.logs.lifting` with the new Celery's, then name it here."""
    assert celery.__version__.startswith("5.7.")
    sources = {}
    for logger, message in LIFTED():
        module = import_module({"multiprocessing": "billiard.pool"}.get(logger, logger))
        sources[logger] = Path(module.__file__).read_text()
        is_constant = message in vars(trace).values() or message in vars(module).values()
        assert is_constant or repr(message) in sources[logger] or f'"{message}"' in sources[logger], (logger, message)


# A pipe that is slow


@pytest.fixture
def channel() -> Iterator[tuple[Any, Any]]:
    reading, writing = os.pipe()
    reader, writer = os.fdopen(reading, "rb", buffering=0), os.fdopen(writing, "w")
    yield reader, writer
    for end in (reader, writer):
        if not end.closed:
            end.close()


def logger_on(stream: Any, **options: Any) -> tuple[logging.Logger, pipe.PipeHandler]:
    logger = logging.Logger("slow")
    handler = pipe.PipeHandler(stream, **options)
    logger.addHandler(handler)
    return logger, handler


def read_now(reader: Any) -> bytes:
    """Read what is there."""
    found = b""
    while select.select([reader], [], [], 0)[0]:
        more = reader.read(1 << 20)
        if not more:
            break
        found += more
    return found


def read_until(reader: Any, is_so: Callable[[bytes], bool], *, within: float = 5.0) -> bytes:
    deadline = time.monotonic() + within
    found = b""
    while not is_so(found):
        assert time.monotonic() < deadline, found[-300:]
        select.select([reader], [], [], 0.05)
        found += read_now(reader)
    return found


def test_pipes_and_sockets_are_not_waited_for_and_files_are_written_as_ever(channel, tmp_path):
    one, other = socket.socketpair()
    with one, other, (tmp_path / "log").open("w") as file:
        assert type(pipe.handler_for(channel[1])) is pipe.PipeHandler
        assert type(pipe.handler_for(one.makefile("w"))) is pipe.PipeHandler
        assert not isinstance(pipe.handler_for(file), pipe.PipeHandler)
        assert not isinstance(pipe.handler_for(None), pipe.PipeHandler)


def test_a_line_is_in_the_pipe_when_it_is_told(channel):
    reader, writer = channel
    logger, handler = logger_on(writer)

    logger.warning("hello")

    assert read_now(reader) == b"hello\n"
    handler.close()


def test_a_full_pipe_is_not_waited_for_and_nothing_is_lost(channel):
    reader, writer = channel
    logger, handler = logger_on(writer)
    lines = [f"{number} {'x' * 200}" for number in range(2000)] + [f"long {'y' * 10_000}"]

    began = time.monotonic()
    for line in lines:
        logger.warning(line)
    took = time.monotonic() - began

    assert took < 2.0
    found = read_until(reader, lambda found: found.endswith(b"yy\n"))
    assert found.decode().splitlines() == lines
    handler.close()


def test_beyond_its_bound_lines_are_dropped_and_counted(channel, caplog):
    reader, writer = channel
    logger, handler = logger_on(writer, backlog=100_000)
    line = "x" * 999

    for _ in range(300):
        logger.warning(line)
    dropped = handler.dropped

    assert dropped > 100
    with caplog.at_level(logging.WARNING):
        found = read_until(reader, lambda found: found.count(b"\n") == 300 - dropped)
        deadline = time.monotonic() + 5
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
    assert set(found.split(b"\n")) == {line.encode(), b""}
    [said] = caplog.records
    assert (said.msg.event, said.msg.facts) == (events.LOG_DROPPED, {"count": dropped})
    handler.close()


def test_lines_of_two_processes_do_not_mix(channel):
    """Up to PIPE_BUF the system sees to it; a longer one waits until all of it has room."""
    reader, writer = channel
    script = (
        "import logging, sys; from celerykit.logs.pipe import PipeHandler\n"
        "logger = logging.Logger('x'); handler = PipeHandler(sys.stderr); logger.addHandler(handler)\n"
        "for number in range(100): logger.warning(sys.argv[1] * (9000 if number % 2 else 50))\n"
        "while handler._waiting: handler.flush()\n"
    )

    children = [subprocess.Popen([sys.executable, "-c", script, letter], stderr=writer) for letter in "ab"]
    writer.close()
    found = b""
    while more := reader.read(1000):
        found += more
        time.sleep(0.00001)
    assert [child.wait(10) for child in children] == [0, 0]

    lines = found.decode().splitlines()
    assert {(line[0], len(line), len(set(line))) for line in lines} == {
        (letter, size, 1) for letter in "ab" for size in (50, 9000)
    }
    assert len(lines) == 200


def test_a_reader_that_is_gone_ends_nothing(channel):
    reader, writer = channel
    logger, handler = logger_on(writer)
    reader.close()

    for _ in range(3):
        logger.warning("nobody reads")

    handler.close()


def test_a_closed_stream_ends_nothing(channel):
    logger, handler = logger_on(channel[1])
    channel[1].close()

    logger.warning("nobody reads")

    handler.close()


def test_a_process_that_ends_waits_for_its_reader_but_not_for_ever(channel, monkeypatch):
    monkeypatch.setattr(pipe, "_FLUSH_WITHIN", 0.2)
    logger, handler = logger_on(channel[1])
    for _ in range(200):
        logger.warning("x" * 999)

    began = time.monotonic()
    handler.close()

    assert 0.1 < time.monotonic() - began < 2.0


def test_a_child_leaves_to_its_parent_what_waits_and_writes_its_own(channel):
    reader, writer = channel
    logger, handler = logger_on(writer)
    for number in range(100):
        logger.warning(f"parent {number} {'x' * 990}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about forks where there are threads: that is what it is about
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        logger.warning("child")
        handler.flush()
        os._exit(0)
    found = read_until(reader, lambda found: b"child" in found and b"parent 99" in found)

    assert os.waitpid(child, 0)[1] == 0
    lines = [line.split(b" ", 2)[:2] for line in found.splitlines()]
    assert [line for line in lines if line[0] == b"parent"] == [[b"parent", b"%d" % number] for number in range(100)]
    assert len([line for line in lines if line[0] == b"child"]) == 1
    handler.close()


def test_a_pipe_that_cannot_be_opened_anew_is_not_waited_for_either(channel, monkeypatch):
    reader, writer = channel
    monkeypatch.setattr(pipe, "_Pipe", pipe._Shared)
    logger, handler = logger_on(writer)
    for can_be_asked in (True, False):
        logger.warning("first")
        assert isinstance(handler._sink, pipe._Shared)
        handler._sink._can_be_asked = can_be_asked and handler._sink._can_be_asked
        for number in range(200):
            logger.warning(f"{number} {'x' * 990}")
        found = read_until(reader, lambda found: b"\n199 " in found and found.endswith(b"x\n"))
        assert len(found.splitlines()) == 201
    handler.close()


# What is printed


def test_prints_are_told_line_by_line(caplog):
    printed = Printed(logging.getLogger("celery.redirected"), logging.WARNING)

    with caplog.at_level(logging.WARNING):
        print("one", "line", file=printed)
        print("two\nlines\n", file=printed)
        print("no end", end="", file=printed)
        assert [record.getMessage() for record in caplog.records] == ["one line", "two", "lines"]
        printed.flush()

    assert caplog.records[-1].getMessage() == "no end"


def test_prints_of_threads_do_not_mix(caplog):
    printed = Printed(logging.getLogger("celery.redirected"), logging.WARNING)
    printed.write("half of ")
    thread = threading.Thread(target=print, args=("another",), kwargs={"file": printed})

    with caplog.at_level(logging.WARNING):
        thread.start()
        thread.join()
        printed.write("it\n")

    assert [record.getMessage() for record in caplog.records] == ["another", "half of it"]


# Where it is set up


@pytest.fixture
def bare(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """A process in which nobody has set up logging, and which is afterwards as it was."""
    monkeypatch.setattr(celery.app.log.Logging, "_setup", False)
    loggers = [get_logger(name) for name in ("celery", "celery.task", "celery.redirected")]
    loggers += [logging.getLogger(), logging.getLogger("multiprocessing")]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    hooks, environ = (sys.excepthook, threading.excepthook, sys.stdout, sys.stderr), dict(os.environ)
    shown, filters = warnings.showwarning, warnings.filters[:]
    structlogs = structlog.get_config()
    for logger in loggers:
        logger.handlers = []
    structlog.reset_defaults()
    yield monkeypatch
    structlog.reset_defaults()
    if structlogs != structlog.get_config():
        structlog.configure(**structlogs)
    logging.captureWarnings(False)
    warnings.showwarning, warnings.filters[:] = shown, filters
    sys.excepthook, threading.excepthook, sys.stdout, sys.stderr = hooks
    os.environ.clear()
    os.environ.update(environ)
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def shop() -> CeleryKit:
    root = logging.getLogger()
    # pytest adds its own when a test begins.
    root.handlers = [handler for handler in root.handlers if not type(handler).__module__.startswith("_pytest")]
    return CeleryKit("shop", broker="memory://", set_as_current=False)


def handlers_of(name: str) -> list[logging.Handler]:
    """Give those that write."""
    handlers = logging.getLogger(name).handlers
    return [handler for handler in handlers if not isinstance(handler, logging.NullHandler)]


def formatter_of(logger: logging.Logger) -> Any:
    [handler] = handlers_of(logger.name)
    return handler.formatter


def test_lines_are_json_where_nobody_looks(bare):
    app = shop()

    app.log.setup()

    assert formatter_of(logging.getLogger()).kind == "json"
    assert handlers_of("celery.task") == handlers_of("root")
    assert app.log.is_json


def test_lines_are_text_on_a_terminal(bare):
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as terminal:
        bare.setattr(sys, "__stderr__", terminal)
        app = shop()
        app.log.setup()
        assert formatter_of(logging.getLogger()).kind == "text"
        assert not app.log.is_json
    os.close(leader)


@pytest.mark.parametrize("kind", ["json", "text"])
def test_a_format_that_was_asked_for_is_taken_whatever_there_is(bare, kind):
    bare.setenv("CELERYKIT_LOG_FORMAT", kind)
    logging.getLogger().addHandler(logging.StreamHandler(sys.stdout))
    app = shop()

    app.log.setup()

    assert formatter_of(logging.getLogger()).kind == kind


@pytest.mark.parametrize(
    "settings",
    [
        {"CELERYKIT_LOG_FORMAT": "celery"},
        {"CELERYKIT_PROFILE": "stock"},
        {"CELERY_WORKER_LOG_FORMAT": "%(message)s"},
    ],
    ids=str,
)
def test_celerys_own_way_is_left_to_who_wants_it(bare, settings):
    for name, value in settings.items():
        bare.setenv(name, value)
    app = shop()

    app.log.setup()

    assert isinstance(formatter_of(logging.getLogger()), celery.app.log.ColorFormatter)
    assert isinstance(formatter_of(get_logger("celery.task")), celery.app.log.TaskFormatter)
    assert logging.getLogger().level == logging.WARNING
    assert not structlog.is_configured()


def test_a_program_with_logging_of_its_own_is_joined(bare):
    root = logging.getLogger()
    host = logging.StreamHandler(sys.stdout)
    host.setFormatter(logging.Formatter("host: %(message)s"))
    root.addHandler(host)
    root.setLevel(logging.ERROR)
    app = shop()

    app.log.setup()

    assert root.handlers == [host]
    assert root.level == logging.ERROR
    assert handlers_of("celery.task") == []
    assert get_task_logger("shop").isEnabledFor(logging.ERROR)
    assert get_logger("celery.task").propagate
    assert app.log.is_joined
    assert not app.log.is_json
    assert sys.excepthook is sys.__excepthook__


def test_a_joined_program_hears_structlog_as_text_with_context(bare, bound):
    root = logging.getLogger()
    heard = _Heard()
    root.addHandler(heard)
    root.setLevel(logging.INFO)
    shop().log.setup()
    bound(tenant="acme")

    structlog.get_logger("shop").info("paid", amount=3, password="hunter2")

    [line] = [record.getMessage() for record in heard.records]
    assert line.startswith("paid amount=3 password=***")
    assert "tenant=acme" in line


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def test_what_logging_adds_by_itself_is_not_somebodys_logging(bare):
    app = shop()
    logging.basicConfig()

    app.log.setup()

    assert formatter_of(logging.getLogger()).kind == "json"


@pytest.mark.parametrize(("hijack", "is_joined"), [("true", False), ("false", True)])
def test_an_explicit_hijack_setting_is_honoured(bare, hijack, is_joined):
    bare.setenv("CELERY_WORKER_HIJACK_ROOT_LOGGER", hijack)
    logging.getLogger().addHandler(_Heard())
    app = shop()

    app.log.setup()

    assert app.log.is_joined is is_joined


def test_a_file_that_was_asked_for_is_written_beside_what_a_program_has(bare, tmp_path):
    heard = _Heard()
    logging.getLogger().addHandler(heard)
    app = shop()

    app.log.setup("INFO", str(tmp_path / "%n.log"), hostname="w1@host")
    logging.getLogger("shop").warning("hello")

    assert json.loads((tmp_path / "w1.log").read_text())["event"] == "hello"
    assert len(heard.records) == 1
    logging.getLogger().handlers[-1].close()


def test_a_file_that_was_rotated_away_is_opened_anew(bare, tmp_path):
    app = shop()
    path = tmp_path / "log"
    app.log.setup("INFO", str(path))
    log = logging.getLogger("shop")

    log.info("one")
    path.rename(tmp_path / "log.1")
    log.info("two \ud800")

    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["two \ud800"]
    logging.getLogger().handlers[-1].close()


def test_receivers_of_celerys_signal_have_the_last_word(bare):
    def receive(**_: Any) -> None: ...

    signals.setup_logging.connect(receive)
    try:
        app = shop()
        app.log.setup()
    finally:
        signals.setup_logging.disconnect(receive)

    assert logging.getLogger().handlers == []
    assert not structlog.is_configured()
    assert not app.log.is_json


def test_receivers_that_add_to_loggers_find_them_as_ever(bare):
    found = []

    def receive(logger: logging.Logger, **_: Any) -> None:
        found.append((logger.name, len(handlers_of(logger.name))))

    signals.after_setup_logger.connect(receive)
    signals.after_setup_task_logger.connect(receive)
    try:
        shop().log.setup()
    finally:
        signals.after_setup_logger.disconnect(receive)
        signals.after_setup_task_logger.disconnect(receive)

    assert found == [("root", 1), ("celery.task", 1)]


def test_structlog_that_was_configured_is_left_alone(bare):
    structlog.configure(processors=[structlog.processors.KeyValueRenderer()])

    shop().log.setup()

    assert [type(processor) for processor in structlog.get_config()["processors"]] == [
        structlog.processors.KeyValueRenderer
    ]


def test_structlog_events_come_out_like_others(bare, channel):
    reader, writer = channel
    bare.setattr(sys, "__stderr__", writer)
    shop().log.setup()

    structlog.get_logger("shop").info("paid by %s", "ada", amount=3)
    try:
        raise ValueError("bad")
    except ValueError:
        structlog.get_logger("shop").exception("oh")

    first, second = [json.loads(line) for line in read_now(reader).splitlines()]
    assert (first["event"], first["amount"], first["logger"]) == ("paid by ada", 3, "shop")
    assert (second["event"], second["error"]) == ("oh", "ValueError: bad")
    logging.getLogger().handlers[-1].close()


# Levels


def command(app: CeleryKit, *arguments: str) -> int:
    """Set up logging as from Celery's command line, and say at which level."""

    @click.command()
    @click.option("-l", "--loglevel", default="WARNING")
    def worker(loglevel: str) -> None:
        app.log.setup(loglevel)

    worker.main(list(arguments), standalone_mode=False)
    return logging.getLogger().level


def test_a_worker_tells_info_unless_it_is_told_otherwise(bare):
    assert command(shop()) == logging.INFO


def test_the_setting_wins_over_the_default(bare):
    bare.setenv("CELERYKIT_LOG_LEVEL", "ERROR")

    assert command(shop()) == logging.ERROR


@pytest.mark.parametrize("level", ["WARNING", "DEBUG"])
def test_the_command_line_wins_over_the_setting(bare, level):
    bare.setenv("CELERYKIT_LOG_LEVEL", "ERROR")

    assert command(shop(), "-l", level) == getattr(logging, level)


def test_a_level_given_in_code_is_taken(bare):
    shop().log.setup("ERROR")

    assert logging.getLogger().level == logging.ERROR


def test_a_joined_program_takes_a_level_that_was_asked_for(bare):
    logging.getLogger().addHandler(_Heard())

    assert command(shop(), "-l", "DEBUG") == logging.DEBUG


# Exceptions that nobody catches


def test_an_exception_that_ends_a_thread_is_told(bare, channel):
    reader, writer = channel
    bare.setattr(sys, "__stderr__", writer)
    bare.setattr(threading, "excepthook", threading.__excepthook__)
    shop().log.setup()

    thread = threading.Thread(target=lambda: 1 / 0, name="t1")
    thread.start()
    thread.join()

    [line] = [json.loads(line) for line in read_now(reader).splitlines()]
    assert (line["event"], line["thread"]) == ("process.thread_failed", "t1")
    assert line["error"] == "ZeroDivisionError: division by zero"
    logging.getLogger().handlers[-1].close()


def test_loggers_that_were_disabled_before_are_heard(bare):
    """`logging.config` does that to each logger that there is, unless it is told not to."""
    names = ("celery", "celery.app.trace", "multiprocessing", "shop.own")
    for name in names:
        bare.setattr(logging.getLogger(name), "disabled", True)

    shop().log.setup()

    assert [name for name in names if logging.getLogger(name).disabled] == ["shop.own"]


def test_loggers_that_were_disabled_before_stay_so_where_all_is_celerys(bare):
    bare.setattr(logging.getLogger("celery.app.trace"), "disabled", True)
    bare.setenv("CELERYKIT_LOG_FORMAT", "celery")

    shop().log.setup()

    assert logging.getLogger("celery.app.trace").disabled


def test_without_standard_error_a_file_has_to_be_named(bare, tmp_path):
    bare.setattr(sys, "__stderr__", None)

    with pytest.raises(InvalidOptions, match="--logfile"):
        shop().log.setup()
    bare.setattr(celery.app.log.Logging, "_setup", False)
    shop().log.setup(logfile=str(tmp_path / "log"))


# Our part, in a program's own chain


def test_celerys_records_are_events_in_a_programs_own_structlog_chain():
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[logs.lifted],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            logs.redacted,
            structlog.processors.JSONRenderer(),
        ],
        pass_foreign_args=True,
    )

    lines = [
        json.loads(formatter.format(one))
        for one in (
            traced(trace.LOG_SUCCESS, runtime=0.5, return_value="'s'"),
            record("%s ready.", "w1@host", name="celery.apps.worker"),
            record(events.Said(events.TASK_SENT, {"id": ID}), name="celerykit.task"),
            record("another %s", "one"),
        )
    ]

    assert lines == [
        {"event": "task.succeeded", "task": "shop.charge", "id": ID, "run_ms": 500.0, "outcome": "succeeded"},
        {"event": "worker.ready", "worker": "w1@host"},
        {"event": "task.sent", "id": ID},
        {"event": "another one"},
    ]


def test_a_programs_own_dictconfig_can_name_the_formatter(bare, capsys):
    import logging.config

    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": {"()": "celerykit.logs.Formatter"}},
            "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stdout"}},
            "root": {"handlers": ["out"], "level": "INFO"},
        }
    )

    logging.getLogger("shop").info("hello")

    assert json.loads(capsys.readouterr().out)["event"] == "hello"
