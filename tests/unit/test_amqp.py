"""
What `app.amqp` makes of a call: where it goes, and what the message says of that.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import kombu
import kombu.pools
import pytest

from celerykit import Once
from celerykit.amqp import DELIVERY_LIMIT, Queues
from celerykit.bulk import PartlySent
from celerykit.headers import HEADER, Headers


@pytest.fixture
def ping(app: Any) -> Any:
    @app.task(name="ping", shared=False)
    def ping(n: int = 0) -> None: ...

    return ping


def sent_to(app: Any, queue: str) -> Any:
    """Take the newest message of a queue in memory."""
    with app.connection_for_read() as connection:
        messages = []
        while (message := kombu.Queue(queue)(connection.default_channel).get(no_ack=True)) is not None:
            messages.append(message)
    return messages[-1]


def test_a_message_says_which_queue_it_was_sent_to(app: Any, ping: Any) -> None:
    ping.delay()
    ping.apply_async(queue="aside")

    assert Headers.of(sent_to(app, "celery").headers).queue == "celery"
    assert Headers.of(sent_to(app, "aside").headers).queue == "aside"


def test_a_route_is_a_queue_too(make_app: Any) -> None:
    app = make_app(task_routes={"ping": "routed"})

    @app.task(name="ping", shared=False)
    def ping() -> None: ...

    ping.delay()

    assert Headers.of(sent_to(app, "routed").headers).queue == "routed"


def test_what_is_addressed_to_an_exchange_names_no_queue(app: Any) -> None:
    routed = app.amqp.router.route({"exchange": "elsewhere", "routing_key": "key"}, "ping")

    assert "celerykit_queue" not in routed


def test_a_retry_goes_where_the_call_was_sent_first(app: Any) -> None:
    """
    Celery addresses it as its message came, which behind a delay is not where it was sent.
    """
    came = {"exchange": "celery_delayed_delivery", "routing_key": "0.0.1.aside", "redelivered": False}
    headers = {HEADER: {"v": 1, "queue": "aside"}}

    routed = app.amqp.router.route({**came, "headers": headers, "retries": 1}, "ping")

    assert routed["queue"].name == "aside"
    assert not routed.keys() & {"exchange", "routing_key"}
    assert app.amqp.router.route({**came, "queue": "other", "headers": headers}, "ping")["queue"].name == "other"


def test_a_foreign_task_is_sent_without_our_header(app: Any) -> None:
    app.send_task("foreign", queue="foreign")

    assert HEADER not in sent_to(app, "foreign").headers


def test_the_expiry_stays_a_header_and_no_order_to_the_broker(app: Any, ping: Any) -> None:
    ping.apply_async(expires=60)
    message = sent_to(app, "celery")
    assert message.headers["expires"]
    assert "expiration" not in message.properties

    ping.apply_async(expiration=60)
    assert sent_to(app, "celery").properties["expiration"] == "60000"


def test_naps_between_two_tries_are_short_against_the_deadline(make_app: Any) -> None:
    app = make_app(publish_deadline=2)
    sent: dict[str, Any] = {}

    class Producer(app.amqp.Producer):  # type: ignore[misc, name-defined]
        def publish(self, body: Any, **options: Any) -> None:
            sent.update(options)

    with app.connection_for_write() as connection:
        policy = {"interval_start": 30, "interval_max": 90, "max_retries": None}
        app.send_task("foreign", producer=Producer(connection), retry_policy=policy)

    assert sent["retry_policy"]["interval_start"] == sent["retry_policy"]["interval_max"] == 0.2
    assert sent["retry_policy"]["max_retries"] is None


@pytest.mark.parametrize("with_limit", [True, False])
def test_only_quorum_queues_that_are_our_choice_get_our_limit(with_limit: bool) -> None:
    queues: Any = Queues(create_missing_queue_type="quorum", create_missing=True)
    queues.with_limit = with_limit

    expected = {"x-delivery-limit": DELIVERY_LIMIT} if with_limit else {}
    assert queues["new"].queue_arguments == {"x-queue-type": "quorum", **expected}


def test_queues_of_the_user_stay_as_they_are(make_app: Any) -> None:
    mine = kombu.Queue("mine", kombu.Exchange("mine", "topic"), "mine", queue_arguments={"x-queue-type": "quorum"})

    app = make_app(task_queues=[mine])

    assert app.amqp.queues["mine"].queue_arguments == {"x-queue-type": "quorum"}


def test_a_quorum_queue_the_user_asked_for_may_exist_without_a_limit(make_app: Any) -> None:
    app = make_app(task_default_queue_type="quorum")

    assert app.amqp.queues["celery"].queue_arguments == {"x-queue-type": "quorum"}


def test_the_stock_profile_has_stock_connections(make_app: Any) -> None:
    app = make_app(profile="stock")

    assert type(app.connection_for_write()) is kombu.Connection
    assert type(app.producer_pool) is kombu.pools.ProducerPool
    assert app.amqp.Producer is kombu.Producer


# What is told of it


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Any:
    """Give the names and facts of what was told of sent calls."""
    caplog.set_level(logging.INFO, "celerykit.task")
    return lambda: [
        (record.msg.event.name, record.data) for record in caplog.records if record.name == "celerykit.task"
    ]


def test_a_call_that_is_sent_is_told(app: Any, told: Any) -> None:
    @app.task(name="pay", once=Once(key=lambda order: order), shared=False)
    def pay(order: str) -> None: ...

    due = datetime.now(UTC) + timedelta(hours=1)
    first = pay.apply_async(("o1",), eta=due, root_id="the-root", parent_id="a-parent")
    app.send_task("foreign", queue="aside", task_id="an-id")

    [(_, of_ours), (_, of_another)] = told()
    assert of_ours.pop("key")
    assert of_ours == {
        "task": "pay",
        "id": first.id,
        "root_id": "the-root",
        "parent_id": "a-parent",
        "correlation_id": "the-root",
        "attempt": 1,
        "queue": "celery",
        "eta": due.isoformat(),
    }
    assert (of_another["task"], of_another["id"], of_another["queue"]) == ("foreign", "an-id", "aside")


def test_a_retry_and_a_wait_are_not_told_as_sent(app: Any, told: Any) -> None:
    app.send_task("ping", retries=1)
    app.send_task("ping", headers=Headers(waits=1).added_to({}))

    assert told() == []


def test_what_was_not_sent_is_not_told(app: Any, told: Any) -> None:
    class Producer(app.amqp.Producer):  # type: ignore[misc, name-defined]
        def publish(self, body: Any, **options: Any) -> None:
            raise kombu.exceptions.OperationalError("gone")

    with app.connection_for_write() as connection, pytest.raises(kombu.exceptions.OperationalError):
        app.send_task("foreign", producer=Producer(connection))

    assert told() == []


def test_many_calls_are_told_as_one_for_each_task(app: Any, ping: Any, told: Any) -> None:
    @app.task(name="pong", shared=False)
    def pong() -> None: ...

    results = app.enqueue_many([ping.s(1), pong.s(), ping.s(2)])

    assert told() == [
        ("task.sent_many", {"task": "ping", "queue": "celery", "count": 2, "first": results[0].id}),
        ("task.sent_many", {"task": "pong", "queue": "celery", "count": 1, "first": results[1].id}),
    ]


def test_of_many_calls_those_that_were_sent_are_told(
    app: Any, ping: Any, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = app.amqp.Producer.publish

    def fail_at_the_third(self: Any, body: Any, **options: Any) -> Any:
        if list(body[0]) == [3]:
            raise kombu.exceptions.OperationalError("gone")
        return publish(self, body, **options)

    monkeypatch.setattr(app.amqp.Producer, "publish", fail_at_the_third)

    with pytest.raises(PartlySent):
        ping.enqueue_many([(1,), (2,), (3,), (4,)])

    [(_, facts)] = told()
    assert facts["count"] == 2
    ping.delay()
    assert told()[1][0] == "task.sent"
