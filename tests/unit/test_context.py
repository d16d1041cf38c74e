"""
What a call takes along: how it is bound, what of it travels, and with what.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from uuid import UUID, uuid4

import asgi_correlation_id
import pytest
import structlog
from celery import chain, chord, group
from celery.app.trace import trace_task_ret
from celery.worker.request import Request
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from pydantic import AliasChoices, BaseModel, Field, SecretStr, field_serializer, field_validator

from celerykit import Backoff, Context, InvalidOptions, Once, Redact, Retry, Snooze, context
from celerykit.dead_letters import Letter, Note, repaired
from celerykit.headers import HEADER, Headers

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


class Place(BaseModel):
    city: str


class ShopContext(Context):
    tenant: str | None = None
    user_id: UUID | None = None
    tags: frozenset[str] = frozenset()
    amount: Decimal | None = None
    place: Place | None = None
    session: Annotated[str | None, Redact()] = None
    anything: Any = None


@pytest.fixture(autouse=True)
def _nothing_bound() -> Iterator[None]:
    structlog.contextvars.clear_contextvars()
    yield
    structlog.contextvars.clear_contextvars()


# Binding


def test_what_is_bound_is_current_in_its_block_and_as_its_type() -> None:
    with ShopContext.bound(tenant="acme", user_id="7b1c2a52-8f3c-4a86-8dcb-0a3f2f9d8f11") as bound:
        assert ShopContext.current() == bound
        assert bound.user_id == UUID("7b1c2a52-8f3c-4a86-8dcb-0a3f2f9d8f11")

    assert ShopContext.current() == ShopContext()


def test_an_inner_block_adds_to_the_outer_one_and_takes_back_only_that() -> None:
    with ShopContext.bound(tenant="acme", amount=1):
        with Context.bound(correlation_id="c-1"), ShopContext.bound(tenant="other"):
            assert ShopContext.current() == ShopContext(tenant="other", amount=Decimal(1), correlation_id="c-1")

        assert ShopContext.current() == ShopContext(tenant="acme", amount=Decimal(1))


def test_none_takes_a_field_out() -> None:
    with ShopContext.bound(tenant="acme"), ShopContext.bound(tenant=None):
        assert context.travelling() == {}
        assert structlog.contextvars.get_contextvars() == {}


def test_a_field_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidOptions, match=r"ShopContext has no field 'tenat'; there are correlation_id"):
        ShopContext.bound(tenat="acme").__enter__()


def test_a_value_that_does_not_fit_is_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidOptions, match=r"ShopContext: user_id: Input should be a valid UUID") as raised:
        ShopContext.bound(user_id="s3cret").__enter__()

    assert "s3cret" not in str(raised.value)


def test_log_lines_carry_what_is_bound_and_the_trace_by_its_id() -> None:
    structlog.contextvars.bind_contextvars(tenant="before")
    with ShopContext.bound(tenant="acme", correlation_id="c-1", traceparent=TRACEPARENT):
        shown = structlog.contextvars.get_contextvars()

    assert shown == {"tenant": "acme", "correlation_id": "c-1", "trace_id": TRACE_ID}
    assert structlog.contextvars.get_contextvars() == {"tenant": "before"}


def test_a_marked_field_travels_and_is_not_shown() -> None:
    with ShopContext.bound(session="s3cret"):
        assert context.travelling() == {"session": "s3cret"}
        assert structlog.contextvars.get_contextvars()["session"] == "***"


def test_what_is_called_a_secret_within_a_field_is_not_shown() -> None:
    class Wide(Context):
        of_user: dict[str, str] | None = None

    with Wide.bound(of_user={"name": "ann", "token": "s3cret"}):
        assert context.travelling() == {"of_user": {"name": "ann", "token": "s3cret"}}
        assert structlog.contextvars.get_contextvars()["of_user"] == {"name": "ann", "token": "***"}


def test_a_block_that_is_left_in_another_context_harms_nobody() -> None:
    """Web frameworks run the two ends of a dependency on two threads."""
    block = ShopContext.bound(tenant="acme")
    entering = threading.Thread(target=block.__enter__)
    entering.start()
    entering.join()

    block.__exit__(None, None, None)

    assert ShopContext.current() == ShopContext()


# What travels


def test_what_json_has_no_type_for_is_written_by_pydantic_when_it_is_bound() -> None:
    with ShopContext.bound(tags={"a"}, amount="1.20", place=Place(city="Bern")):
        assert context.travelling() == {"tags": ["a"], "amount": "1.20", "place": {"city": "Bern"}}


@pytest.mark.parametrize(
    "value",
    [object(), float("nan"), 2**80, "\ud800", {"x" * 300: 1}, lambda: None, b"\xff", [float("inf")]],
    ids=lambda value: type(value).__name__,
)
def test_what_a_broker_cannot_carry_is_left_out_and_told(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    with ShopContext.bound(anything=value, tenant="acme"):
        assert context.travelling() == {"tenant": "acme"}

    assert "context.not_json field=anything" in caplog.text


def test_a_serializer_that_fails_leaves_its_field_out() -> None:
    class Failing(Context):
        tenant: str | None = None
        broken: int | None = None

        @field_serializer("broken")
        def _fail(self, value: int) -> int:
            raise RuntimeError("no")

    with Failing.bound(tenant="acme", broken=1):
        assert context.travelling() == {"tenant": "acme"}


def test_what_is_too_large_is_left_out_the_largest_first(caplog: pytest.LogCaptureFixture) -> None:
    with ShopContext.bound(tenant="x" * 3000, amount=1), Context.bound(correlation_id="c-1"):
        assert context.travelling() == {"amount": "1", "correlation_id": "c-1"}
        assert ShopContext.current().tenant == "x" * 3000

    assert "context.too_large field=tenant" in caplog.text


def test_an_inner_value_that_cannot_travel_does_not_let_the_outer_one_travel() -> None:
    with ShopContext.bound(anything="a"), ShopContext.bound(anything=object()):
        assert context.travelling() == {}


def test_a_correlation_id_that_is_the_root_id_is_not_said_twice() -> None:
    assert context.travelling("r-1") == {}

    token = context.bind(context.carried(Context, None, root_id="r-1"))
    assert context.travelling("r-1") == {}
    assert context.travelling("r-2") == {"correlation_id": "r-1"}
    context.unbind(token)


# What a message brought


def test_what_is_unknown_or_does_not_fit_is_dropped() -> None:
    bound = context.carried(
        ShopContext,
        {"tenant": "acme", "user_id": 7, "newer": 1, "traceparent": "zz", "amount": "1.5"},
        root_id="r-1",
    )

    assert bound.as_a(ShopContext) == ShopContext(tenant="acme", amount=Decimal("1.5"), correlation_id="r-1")
    assert bound.sent == {"tenant": "acme", "amount": "1.5"}
    assert bound.shown == {"tenant": "acme", "amount": "1.5", "correlation_id": "r-1"}


@pytest.mark.parametrize("kind", ["validator", "model"])
def test_a_validator_that_breaks_is_no_reason_to_refuse_a_message(kind: str) -> None:
    class Breaking(Context):
        tenant: str | None = None

        @field_validator("tenant")
        @classmethod
        def _fail(cls, value: str) -> str:
            raise {"validator": RuntimeError, "model": ValueError}[kind]("no")

    bound = context.carried(Breaking, {"tenant": "acme", "correlation_id": "c-1"}, root_id="r-1")

    assert bound.as_a(Breaking).tenant is None


def test_a_hostile_message_fills_no_log_line() -> None:
    bound = context.carried(ShopContext, {"tenant": "x" * 100_000, "correlation_id": "a\nb"}, root_id="r-1")

    assert bound.shown == {"correlation_id": "r-1"}


def test_a_field_with_an_alias_travels_by_its_name() -> None:
    class Aliased(Context):
        tenant: str | None = Field(default=None, validation_alias=AliasChoices("T", "org"), serialization_alias="T")

    with Aliased.bound(tenant="acme"):
        travelling = context.travelling()

    assert travelling == {"tenant": "acme"}
    assert context.carried(Aliased, travelling, root_id="r").as_a(Aliased).tenant == "acme"


# Declaring


def test_a_field_without_a_default_is_refused(make_app: Any) -> None:
    class Needy(Context):
        tenant: str

    with pytest.raises(InvalidOptions, match=r"Needy\.tenant needs a default"):
        make_app(context=Needy)


@pytest.mark.parametrize("name", ["task", "id", "attempt", "error", "trace_id", "event", "timestamp"])
def test_a_field_named_like_a_fact_of_events_is_refused(make_app: Any, name: str) -> None:
    kind = type("Taken", (Context,), {"__annotations__": {name: "str | None"}, name: None})

    with pytest.raises(InvalidOptions, match=f"Taken.{name}: every log line has a '{name}' of its own"):
        make_app(context=kind)


def test_a_field_that_would_travel_as_asterisks_is_refused(make_app: Any) -> None:
    class Secretive(Context):
        token: SecretStr | None = None

    with pytest.raises(InvalidOptions, match=r"Secretive\.token is a SecretStr"):
        make_app(context=Secretive)


@pytest.mark.parametrize("kind", [BaseModel, dict, None, Context()])
def test_what_is_no_context_is_refused(make_app: Any, kind: Any) -> None:
    with pytest.raises(InvalidOptions, match=r"must be a class that inherits from celerykit\.Context"):
        make_app(context=kind)


# Requests


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Request-ID": "r-1", "traceparent": TRACEPARENT},
        {"x-correlation-id": "r-1", "TraceParent": TRACEPARENT},
        [("X-REQUEST-ID", "r-1"), ("x-correlation-id", "c-2"), ("traceparent", TRACEPARENT)],
        [(b"x-request-id", b"r-1"), (b"traceparent", TRACEPARENT.encode())],
    ],
)
def test_the_headers_of_a_request_are_read_in_any_form(headers: Any) -> None:
    assert ShopContext.of_request(headers) == ShopContext(correlation_id="r-1", traceparent=TRACEPARENT)


@pytest.mark.parametrize("value", ["", " ", "x" * 129, "a\nb", "a b", "ü", "\x00", "a\x7f", b"\xff\xfe", 7, None])
def test_a_hostile_request_id_counts_as_absent(value: Any) -> None:
    assert Context.of_request([("X-Request-ID", value)]) == Context()


@pytest.mark.parametrize(
    "value",
    [
        TRACEPARENT.upper(),
        TRACEPARENT[:-1],
        f"{TRACEPARENT}-more",
        f"{TRACEPARENT}\n",
        f"ff{TRACEPARENT[2:]}",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
    ],
)
def test_a_traceparent_that_is_none_counts_as_absent(value: str) -> None:
    found = Context.of_request({"traceparent": value}).traceparent

    assert found is None or value.strip() == found


def test_a_traceparent_of_a_later_version_is_read_as_far_as_it_is_known() -> None:
    assert Context.of_request({"traceparent": f"01{TRACEPARENT[2:]}-more"}).traceparent == f"01{TRACEPARENT[2:]}"


def test_a_request_is_bound_with_more_beside_it() -> None:
    with ShopContext.bound(ShopContext.of_request({"X-Request-ID": "r-1"}), tenant="acme"):
        assert context.travelling() == {"correlation_id": "r-1", "tenant": "acme"}


# What other libraries know


@pytest.fixture
def _asgi_id() -> Iterator[None]:
    token = asgi_correlation_id.correlation_id.set("asgi-1")
    yield
    asgi_correlation_id.correlation_id.reset(token)


@pytest.mark.usefixtures("_asgi_id")
def test_the_id_of_asgi_correlation_id_is_picked_up() -> None:
    assert context.travelling() == {"correlation_id": "asgi-1"}
    assert Context.current().correlation_id == "asgi-1"


@pytest.mark.usefixtures("_asgi_id")
def test_what_is_bound_goes_before_what_is_picked_up() -> None:
    with Context.bound(correlation_id="c-1"):
        assert context.travelling() == {"correlation_id": "c-1"}


@pytest.mark.parametrize("name", ["correlation_id", "request_id"])
def test_the_id_that_is_bound_to_log_lines_is_picked_up(name: str) -> None:
    with structlog.contextvars.bound_contextvars(**{name: uuid4()}):
        assert context.travelling() == {"correlation_id": str(structlog.contextvars.get_contextvars()[name])}


def test_what_cannot_be_an_id_is_not_picked_up() -> None:
    with structlog.contextvars.bound_contextvars(request_id="a\nb" * 1000):
        assert context.travelling() == {}


def test_the_span_that_is_open_is_picked_up() -> None:
    with TracerProvider().get_tracer("unit").start_as_current_span("GET /") as span:
        travelling = context.travelling()

    of = span.get_span_context()
    assert travelling == {
        "correlation_id": f"{of.trace_id:032x}",
        "traceparent": f"00-{of.trace_id:032x}-{of.span_id:016x}-{of.trace_flags:02x}",
    }


def test_the_span_is_picked_up_beside_an_id_that_is_bound() -> None:
    with Context.bound(correlation_id="c-1"), TracerProvider().get_tracer("unit").start_as_current_span("GET /"):
        assert context.travelling().keys() == {"correlation_id", "traceparent"}


def test_a_span_that_is_none_is_not_picked_up() -> None:
    with trace.use_span(trace.INVALID_SPAN):
        assert context.travelling() == {}


# With what it travels


class Ran(NamedTuple):
    task: str
    context: ShopContext


class Shop:
    """An app, and a worker of its queue that runs each message as a pool's process does."""

    def __init__(self, app: Any) -> None:
        self.app = app
        app.conf.task_default_queue = self.queue = f"context-{uuid4().hex}"
        self.ran: list[Ran] = []
        self.headers: list[dict[str, Any]] = []

    def note(self, name: str) -> None:
        self.ran.append(Ran(name, ShopContext.current()))

    def work(self, *, most: int = 30) -> None:
        """Run what is in the queue, and what that sends."""
        with self.app.connection_for_read() as connection:
            channel = connection.default_channel
            while (message := channel.basic_get(self.queue, no_ack=True)) is not None and most:
                most -= 1
                self.headers.append(message.headers)
                request = Request(message, app=self.app, hostname="unit@here")
                kinds = (request.content_type, request.content_encoding)
                trace_task_ret(request.type, request.id, request.request_dict, request.body, *kinds, app=self.app)

    @property
    def tenants(self) -> dict[str, set[str | None]]:
        """By task, those it was run for."""
        found: dict[str, set[str | None]] = {}
        for name, of in self.ran:
            found.setdefault(name, set()).add(of.tenant)
        return found


@pytest.fixture
def shop(make_app: Any) -> Shop:
    return _shop(make_app(context=ShopContext))


def _shop(app: Any) -> Shop:
    shop = Shop(app)

    @app.task(name="add")
    def add(x: int = 0, y: int = 0) -> int:
        shop.note("add")
        return x + y

    @app.task(name="total")
    def total(numbers: list[int]) -> int:
        shop.note("total")
        return sum(numbers)

    @app.task(name="fail")
    def fail(x: int = 0) -> int:
        shop.note("fail")
        raise LookupError

    @app.task(name="told")
    def told(*args: Any) -> None:
        shop.note("told")

    return shop


def _each(shop: Shop, send: Callable[[], Any]) -> dict[str, set[str | None]]:
    with ShopContext.bound(tenant="acme", correlation_id="c-1"):
        send()
    shop.work()
    assert {of.correlation_id for _, of in shop.ran} == {"c-1"}
    return shop.tenants


def test_a_call_runs_in_the_context_it_was_sent_in(shop: Shop) -> None:
    assert _each(shop, lambda: shop.app.tasks["add"].delay(1)) == {"add": {"acme"}}


def test_what_a_task_sends_takes_its_context_along(shop: Shop) -> None:
    @shop.app.task(name="outer")
    def outer() -> None:
        shop.note("outer")
        shop.app.tasks["add"].delay(1)
        shop.app.send_task("add", (2,))

    assert _each(shop, outer.delay) == {"outer": {"acme"}, "add": {"acme"}}


def test_a_task_may_send_for_somebody_else(shop: Shop) -> None:
    @shop.app.task(name="outer")
    def outer() -> None:
        with ShopContext.bound(tenant="other"):
            shop.app.tasks["add"].delay(1)
        shop.note("outer")

    assert _each(shop, outer.delay) == {"outer": {"acme"}, "add": {"other"}}


def test_callbacks_chains_and_groups_take_it_along(shop: Shop) -> None:
    add, total, fail, told = (shop.app.tasks[name] for name in ("add", "total", "fail", "told"))

    def send() -> None:
        chain(add.s(1), add.s(2), group(add.s(3), add.s(4))).delay()
        add.apply_async((1,), link=told.s())
        fail.apply_async((1,), link_error=told.s())
        add.starmap([(1, 2)]).delay()
        add.chunks([(1, 2), (3, 4)], 1).delay()
        shop.app.enqueue_many([add.s(1), total.s([1])])

    assert _each(shop, send) == {name: {"acme"} for name in ("add", "told", "fail", "total")}
    assert len([name for name, _ in shop.ran if name == "told"]) == 2


@pytest.mark.parametrize("join", ["celery.chord_unlock", "the last member"])
def test_a_chord_takes_it_along(make_app: Any, tmp_path: Path, join: str) -> None:
    backend = f"file://{tmp_path}" if join == "celery.chord_unlock" else "cache+memory://"
    shop = _shop(make_app(context=ShopContext, backend=backend))
    add, total = shop.app.tasks["add"], shop.app.tasks["total"]

    assert _each(shop, lambda: chord([add.s(1), add.s(2)])(total.s())) == {"add": {"acme"}, "total": {"acme"}}
    names = {headers["task"] for headers in shop.headers}
    assert ("celery.chord_unlock" in names) == (join == "celery.chord_unlock")


def test_a_failed_chord_tells_its_body_s_errback_in_it(make_app: Any) -> None:
    shop = _shop(make_app(context=ShopContext))
    add, fail, total, told = (shop.app.tasks[name] for name in ("add", "fail", "total", "told"))

    ran = _each(shop, lambda: chord([add.s(1), fail.s(2)])(total.s().on_error(told.si())))

    assert ran == {"add": {"acme"}, "fail": {"acme"}, "told": {"acme"}}


@pytest.mark.parametrize("again", ["policy", "by hand", "snooze", "autoretry"])
def test_every_attempt_has_the_context_of_the_first(shop: Shop, again: str) -> None:
    options: dict[str, Any] = {
        "policy": {"retry": Retry(on={LookupError: Backoff(base=0.01)}, attempts=3)},
        "autoretry": {"autoretry_for": (LookupError,), "max_retries": 2, "retry_backoff": False},
    }.get(again, {})

    @shop.app.task(name="flaky", bind=True, **options)
    def flaky(self: Any) -> None:
        shop.note("flaky")
        if self.request.retries == 2:
            return
        if again == "by hand":
            raise self.retry(countdown=0.01)
        if again == "snooze":
            raise Snooze(timedelta(seconds=0.01))
        raise LookupError

    assert _each(shop, flaky.delay) == {"flaky": {"acme"}}
    assert len(shop.ran) == 3


def test_what_takes_a_task_s_place_has_its_context(shop: Shop) -> None:
    @shop.app.task(name="outer", bind=True)
    def outer(self: Any) -> Any:
        shop.note("outer")
        return self.replace(shop.app.tasks["add"].s(1))

    assert _each(shop, outer.delay) == {"outer": {"acme"}, "add": {"acme"}}


def test_a_foreign_task_and_a_stock_one_are_told(shop: Shop) -> None:
    with ShopContext.bound(tenant="acme"):
        shop.app.send_task("elsewhere.pay", (1,), queue=shop.queue)
        shop.app.tasks["celery.backend_cleanup"].delay()

    with shop.app.connection_for_read() as connection:
        messages = [connection.default_channel.basic_get(shop.queue) for _ in range(2)]
    assert [message.headers[HEADER] for message in messages] == [{"v": 1, "context": {"tenant": "acme"}}] * 2


def test_without_a_context_a_message_is_as_it_was(shop: Shop) -> None:
    shop.app.tasks["add"].delay(1)
    shop.app.send_task("elsewhere.pay", (1,), queue=shop.queue)

    with shop.app.connection_for_read() as connection:
        ours, foreign = (connection.default_channel.basic_get(shop.queue) for _ in range(2))
    assert "context" not in ours.headers[HEADER]
    assert HEADER not in foreign.headers


def test_a_call_that_nobody_named_is_named_by_its_first_id(shop: Shop) -> None:
    @shop.app.task(name="outer")
    def outer() -> None:
        shop.note("outer")
        shop.app.tasks["add"].delay(1)

    sent = outer.delay()
    shop.work()

    assert [of.correlation_id for _, of in shop.ran] == [sent.id, sent.id]
    assert "context" not in shop.headers[1][HEADER]


def test_what_is_given_in_a_header_stays(shop: Shop) -> None:
    given = Headers(context={"tenant": "given"}).added_to({})
    with ShopContext.bound(tenant="acme"):
        shop.app.send_task("elsewhere.pay", (1,), queue=shop.queue, headers=given)

    with shop.app.connection_for_read() as connection:
        message = connection.default_channel.basic_get(shop.queue)
    assert message.headers[HEADER]["context"] == {"tenant": "given"}


def test_what_breaks_in_another_library_breaks_no_publish(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("structlog.contextvars.get_contextvars", fail)
    monkeypatch.setattr("opentelemetry.trace.get_current_span", fail)

    shop.app.tasks["add"].delay(1)


def test_a_duplicate_that_is_sent_again_has_its_own_context(shop: Shop) -> None:
    @shop.app.task(name="pay", once=Once())
    def pay(order: str) -> str:
        shop.note("pay")
        return order

    with ShopContext.bound(tenant="acme", correlation_id="c-1"):
        pay.using(key="k").delay("o-1")
    with ShopContext.bound(tenant="other", correlation_id="c-2"):
        assert pay.using(key="k").delay("o-1").duplicate
    shop.work()

    assert shop.tenants == {"pay": {"acme"}}


# Letters


def _letter(**header: Any) -> Letter:
    headers = {"task": "add", "id": "i-1", "root_id": "i-1", **Headers(**header).added_to({})}
    note = Note(letter="l-1", reason="failed", died_at=0.0, task="add", id="i-1", queue="celery")
    kinds = {"content_type": "application/json", "content_encoding": "utf-8"}
    return Letter(note=note, body=b"[[], {}, {}]", headers=headers, properties={}, **kinds)


def test_a_replay_has_the_context_of_its_call() -> None:
    sent = repaired(_letter(context={"tenant": "acme", "correlation_id": "c-1"}), now=0.0, nonce="n")

    assert Headers.of(sent.headers).context == {"tenant": "acme", "correlation_id": "c-1"}


def test_a_replay_with_a_new_id_keeps_the_name_of_what_it_belongs_to() -> None:
    named = repaired(_letter(context={"correlation_id": "c-1"}), now=0.0, nonce="n", new_id="i-2")
    unnamed = repaired(_letter(), now=0.0, nonce="n", new_id="i-2")

    assert Headers.of(named.headers).context == {"correlation_id": "c-1"}
    assert Headers.of(unnamed.headers).context == {"correlation_id": "i-1"}
