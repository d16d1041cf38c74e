"""
The running call's facts and context are on each line that is logged of it, and on no other one.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import celery
import pytest
import structlog
from celery.app.trace import trace_task_ret
from celery.utils.nodenames import gethostname
from celery.worker.request import Request
from structlog.contextvars import get_contextvars

from celerykit import Backoff, Context, Retry, Snooze, events, running
from celerykit.errors import Undeliverable
from celerykit.headers import HEADER, Attempt, Headers
from celerykit.worker.request import Request as OurRequest


class ShopContext(Context):
    tenant: str | None = None


@pytest.fixture(autouse=True)
def _nothing_bound() -> Iterator[None]:
    structlog.contextvars.clear_contextvars()
    yield
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def app(make_app: Any) -> Any:
    return make_app(context=ShopContext)


class Lines(logging.Handler):
    """What is logged, with what is bound at that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, Any]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append((record.getMessage(), get_contextvars()))

    def of(self, text: str) -> dict[str, Any]:
        [found] = [bound for message, bound in self.all if text in message]
        return found


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, root = Lines(), logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler
    root.removeHandler(handler)
    root.setLevel(before)


log = logging.getLogger("shop")


def run(app: Any, queue: str = "celery") -> Any:
    """Run the next message of a queue, as a pool's process does, and give it."""
    with app.connection_for_read() as connection:
        message = connection.default_channel.basic_get(queue, no_ack=True)
        request = Request(message, app=app, hostname="unit@here")
        kinds = (request.content_type, request.content_encoding)
        trace_task_ret(request.type, request.id, request.request_dict, request.body, *kinds, app=app)
    return message


@pytest.fixture
def queue(app: Any, request: pytest.FixtureRequest) -> str:
    app.conf.task_default_queue = f"running-{request.node.name}"
    return str(app.conf.task_default_queue)


# In a worker


def test_every_line_of_a_run_carries_the_call_celery_s_last_one_too(app: Any, queue: str, lines: Lines) -> None:
    @app.task(name="pay")
    def pay(n: int) -> int:
        log.info("paying")
        return n

    with ShopContext.bound(tenant="acme", correlation_id="c-1"):
        sent = pay.apply_async((1,), root_id="the-root", parent_id="a-parent")
    run(app, queue)

    expected = {
        "task": "pay",
        "id": sent.id,
        "root_id": "the-root",
        "parent_id": "a-parent",
        "attempt": 1,
        "queue": queue,
        "worker": gethostname(),
        "tenant": "acme",
        "correlation_id": "c-1",
    }
    for text in ("task.started", "paying", "succeeded in"):
        found = lines.of(text)
        assert found.pop("wait_ms") >= 0
        assert found == expected
    assert get_contextvars() == {}


def test_what_a_task_leaves_bound_is_gone_with_it(app: Any, queue: str) -> None:
    @app.task(name="pay")
    def pay(n: int) -> None:
        structlog.contextvars.bind_contextvars(order=n, region="task")
        ShopContext.bound(tenant="left").__enter__()
        structlog.contextvars.unbind_contextvars("kept")

    structlog.contextvars.bind_contextvars(region="process", kept="yes")
    pay.delay(1)
    run(app, queue)

    assert get_contextvars() == {"region": "process", "kept": "yes"}
    assert ShopContext.current() == ShopContext()


def test_the_start_is_told_with_its_facts(app: Any, queue: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "celerykit.task")

    @app.task(name="pay")
    def pay(n: int) -> None: ...

    pay.delay(1)
    run(app, queue)

    [started] = [record for record in caplog.records if record.msg is not None and "task.started" in str(record.msg)]
    assert {"task", "id", "root_id", "attempt", "queue", "worker", "wait_ms"} == set(started.data)  # type: ignore[attr-defined]


def test_a_counter_hears_of_a_start_that_is_not_logged(app: Any, queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(events, "_observers", [lambda event, facts: heard.append(f"{event.name} {facts['task']}")])

    @app.task(name="pay")
    def pay(n: int) -> None: ...

    pay.delay(1)
    run(app, queue)

    assert "task.started pay" in heard


@pytest.mark.parametrize("how", ["retry", "by hand", "autoretry", "snooze"])
def test_celery_s_record_of_a_retry_carries_what_it_does_not_know(app: Any, queue: str, lines: Lines, how: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "retry": {"retry": Retry(on={LookupError: Backoff(base=3, jitter=0)}, attempts=3)},
        "autoretry": {"autoretry_for": (LookupError,), "retry_backoff": False, "default_retry_delay": 3},
    }

    @app.task(name="pay", bind=True, **options.get(how, {}))
    def pay(self: Any, n: int) -> None:
        if how == "by hand":
            raise self.retry(countdown=3, exc=LookupError())
        if how == "snooze":
            raise Snooze(timedelta(seconds=3))
        raise LookupError

    pay.delay(1)
    run(app, queue)

    noted = lines.of("retry: Retry in")
    assert noted["kind"] == ("snooze" if how == "snooze" else "retry")
    assert noted["delay"] == pytest.approx(3, abs=0.1)
    assert noted["next_attempt"] == (1 if how == "snooze" else 2)
    assert ("error_fingerprint" in noted) == (how != "snooze")
    assert get_contextvars() == {}


def test_celery_s_record_of_a_failure_carries_its_fingerprint(app: Any, queue: str, lines: Lines) -> None:
    @app.task(name="pay")
    def pay(n: int) -> None:
        raise LookupError("gone")

    pay.delay(1)
    run(app, queue)

    assert len(lines.of("raised unexpected")["error_fingerprint"]) == 12


def test_what_is_noted_outside_of_a_run_is_on_no_line() -> None:
    running.note(kind="retry")

    assert get_contextvars() == {}


def test_a_retry_that_was_only_made_and_not_raised_is_not_noted(app: Any, queue: str, lines: Lines) -> None:
    @app.task(name="pay", bind=True)
    def pay(self: Any, n: int) -> None:
        self.retry(countdown=3, throw=False)

    pay.delay(1)
    run(app, queue)

    assert "kind" not in lines.of("succeeded in")


def test_a_stock_task_of_ours_has_its_facts_and_its_retries_as_attempts(app: Any, queue: str, lines: Lines) -> None:
    with ShopContext.bound(tenant="acme"):
        app.tasks["celery.backend_cleanup"].apply_async(queue=queue, retries=2)
    run(app, queue)

    found = lines.of("succeeded in")
    assert (found["task"], found["attempt"], found["tenant"]) == ("celery.backend_cleanup", 3, "acme")


def test_another_app_s_task_is_left_alone(lines: Lines) -> None:
    stock = celery.Celery("stock", broker="memory://", backend="cache+memory://", set_as_current=False)

    @stock.task(name="stock.pay", shared=False)
    def pay() -> dict[str, Any]:
        return get_contextvars()

    with ShopContext.bound(tenant="acme"):
        assert pay.apply().get() == {"tenant": "acme"}
    assert not [message for message, _ in lines.all if "task.started" in message]


def test_threads_of_a_pool_do_not_see_each_other_s_calls(app: Any, queue: str) -> None:
    together = threading.Barrier(3)
    seen: set[tuple[str, Any]] = set()

    @app.task(name="pay")
    def pay(tenant: str) -> None:
        together.wait(10)
        seen.add((tenant, ShopContext.current().tenant))
        assert get_contextvars()["tenant"] == tenant

    for tenant in "abc":
        with ShopContext.bound(tenant=tenant):
            pay.delay(tenant)
    with ThreadPoolExecutor(3) as pool:
        for ran in [pool.submit(run, app, queue) for _ in range(3)]:
            ran.result(20)

    assert seen == {("a", "a"), ("b", "b"), ("c", "c")}


def test_a_coroutine_and_what_it_starts_see_their_call(app: Any, queue: str) -> None:
    seen: list[Any] = []

    @app.task(name="pay")
    async def pay(n: int) -> None:
        async def within() -> None:
            seen.append((ShopContext.current().tenant, get_contextvars()["task"]))

        await asyncio.gather(within(), asyncio.to_thread(lambda: asyncio.run(within())))

    for tenant in "ab":
        with ShopContext.bound(tenant=tenant):
            pay.delay(1)
        run(app, queue)

    assert seen == [("a", "pay")] * 2 + [("b", "pay")] * 2


# Waiting


@pytest.mark.parametrize(
    ("header", "eta", "waited"),
    [
        (Headers(), None, None),
        (Headers(sent_at=-10), None, 10_000),
        (Headers(sent_at=-10, due_at=-4), None, 4_000),
        (Headers(sent_at=-10), -3, 3_000),
        (Headers(sent_at=-10, due_at=+5), None, 0),
        (Headers(sent_at=-10, ledger=(Attempt(-6, 0, 2, "retry", "", ""),)), None, 4_000),
    ],
)
def test_a_call_waits_since_it_was_sent_or_due(
    app: Any, header: Headers, eta: float | None, waited: float | None
) -> None:
    now = time.time()

    def at(seconds: float | None) -> Any:
        return None if seconds is None else now + seconds

    moved = Headers(
        sent_at=at(header.sent_at),
        due_at=at(header.due_at),
        ledger=tuple(row._replace(started=now + row.started) for row in header.ledger),
    )
    iso = None if eta is None else time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(now + eta))

    class Asked:
        id, root_id, parent_id, hostname, retries = "i", None, None, "here", 0
        delivery_info = None
        eta = iso

    facts = running._facts(app.tasks["celery.backend_cleanup"], Asked, moved)

    assert facts.get("wait_ms") == (None if waited is None else pytest.approx(waited, abs=1_100 if eta else 100))


# In place


def test_a_call_in_place_leaves_the_request_s_lines_as_they_were(app: Any, lines: Lines) -> None:
    @app.task(name="pay")
    def pay(n: int) -> None:
        structlog.contextvars.bind_contextvars(order=n)
        log.info("paying")

    with structlog.contextvars.bound_contextvars(request_id="r-1", task="of the request", user="u-1"):
        before = get_contextvars()
        pay.apply((1,))
        assert get_contextvars() == before

    found = lines.of("paying")
    assert (found["task"], found["user"], found["correlation_id"]) == ("pay", "u-1", "r-1")


def test_a_call_in_place_within_another_one_has_its_own_facts_and_the_same_context(
    app: Any, queue: str, lines: Lines
) -> None:
    @app.task(name="inner")
    def inner() -> None:
        log.info("inside")

    @app.task(name="outer", once=None)
    def outer() -> None:
        inner.apply()
        inner()
        log.info("outside")

    with ShopContext.bound(tenant="acme", correlation_id="c-1"):
        sent = outer.apply_async(root_id="the-root", parent_id="a-parent")
    run(app, queue)

    in_place, called = [bound for message, bound in lines.all if message == "inside"]
    assert (in_place["task"], in_place["parent_id"]) == ("inner", sent.id)
    assert (in_place["tenant"], in_place["correlation_id"]) == ("acme", "c-1")
    assert "queue" not in in_place
    assert "wait_ms" not in in_place
    assert called == lines.of("outside")
    assert called["task"] == "outer"


def test_a_call_in_place_that_fails_leaves_nothing_bound(app: Any) -> None:
    @app.task(name="pay")
    def pay() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        pay.apply(throw=True)

    assert get_contextvars() == {}


def test_a_call_in_place_inside_a_loop_sees_its_context(app: Any) -> None:
    app.conf.task_always_eager = True

    @app.task(name="pay")
    async def pay() -> str | None:
        return ShopContext.current().tenant

    async def request() -> Any:
        with ShopContext.bound(tenant="acme"):
            return (await pay.adelay()).get()

    assert asyncio.run(request()) == "acme"


# In the parent


def test_what_the_parent_sends_for_a_call_takes_along_what_that_had(app: Any, queue: str) -> None:
    headers = Headers(context={"tenant": "acme", "correlation_id": "c-1"}).added_to({"id": "i-1"})

    with running.handling(headers, app):
        assert ShopContext.current().tenant == "acme"
        app.send_task("elsewhere", queue=queue)
    app.send_task("elsewhere", queue=queue)

    with app.connection_for_read() as connection:
        first, second = (connection.default_channel.basic_get(queue) for _ in range(2))
    assert first.headers[HEADER]["context"] == {"tenant": "acme", "correlation_id": "c-1"}
    assert HEADER not in second.headers


@pytest.mark.parametrize("task", ["told", "another's"])
def test_who_is_told_of_a_process_that_died_is_told_in_the_call_s_context(app: Any, queue: str, task: str) -> None:
    """An errback that takes the request, Celery calls in the worker's parent process; others it sends."""
    seen: list[Any] = []

    @app.task(name="pay", store_errors_even_if_ignored=True)
    def pay() -> None: ...

    @app.task(name="told")
    def told(request: Any, error: Any, traceback: Any) -> None:
        seen.append(ShopContext.current().tenant)

    with ShopContext.bound(tenant="acme", correlation_id="c-1"):
        pay.apply_async(link_error=app.signature(task, queue=queue))
    with app.connection_for_read() as connection:
        channel = connection.default_channel
        message = channel.basic_get(queue, no_ack=True)
        message.undertaker = SimpleNamespace(bury=lambda request, ending, then: then())
        OurRequest(message, app=app, hostname="unit@here", on_ack=lambda *_: None).kill(Undeliverable("it died"))
        sent = channel.basic_get(queue, no_ack=True)

    if task == "told":
        assert (seen, sent) == (["acme"], None)
    else:
        assert sent.headers[HEADER]["context"] == {"tenant": "acme", "correlation_id": "c-1"}


def test_a_message_tells_its_facts_where_it_does_not_run() -> None:
    ours = Headers(attempt=2, queue="slow", key="k", context={"correlation_id": "c-1"})
    headers = ours.added_to({"task": "pay", "id": "i-1", "root_id": "r-1", "parent_id": None})

    assert running.facts_of(headers) == {
        "task": "pay",
        "id": "i-1",
        "root_id": "r-1",
        "attempt": 2,
        "queue": "slow",
        "key": "k",
        "correlation_id": "c-1",
    }
    assert running.facts_of({"task": "pay", "id": "i-1"})["correlation_id"] == "i-1"
    assert running.facts_of(None) == {"attempt": 1}


def test_a_call_that_is_sent_again_is_not_its_own_parent_where_it_does_not_run(
    app: Any, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Celery names the call that runs, which is the same, for a retry, a snooze and `replace`."""
    caplog.set_level(logging.INFO, "celerykit.task")

    @app.task(name="other")
    def other() -> None: ...

    @app.task(name="pay", bind=True)
    def pay(self: Any) -> None:
        self.replace(other.s())

    sent = pay.delay()
    run(app, queue)
    message = run(app, queue)

    assert (message.headers["parent_id"], message.headers["id"]) == (sent.id, sent.id)
    assert "parent_id" not in running.facts_of(message.headers)
    told = [record.data for record in caplog.records if str(record.msg).startswith("task.sent task=other")]  # type: ignore[attr-defined]
    assert [("parent_id" in facts, facts["id"]) for facts in told] == [(False, sent.id)]


def test_what_is_no_context_is_not_told_where_a_call_does_not_run() -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = Headers(context={"correlation_id": "two words", "traceparent": traceparent, "tenant": "acme"})
    told = running.facts_of(headers.added_to({"id": "i-1"}))

    assert (told["correlation_id"], told["trace_id"]) == ("i-1", "0af7651916cd43dd8448eb211c80319c")
    assert "tenant" not in told
    headers = Headers(context={"correlation_id": 7, "traceparent": "00-nothing"})
    assert running.facts_of(headers.added_to({"id": "i-1"}))["correlation_id"] == "i-1"
    assert "trace_id" not in running.facts_of(headers.added_to({"id": "i-1"}))


def test_who_only_declares_tasks_does_not_import_structlog() -> None:
    code = "import sys, celerykit.app; celerykit.app.CeleryKit('x'); sys.exit('structlog' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
