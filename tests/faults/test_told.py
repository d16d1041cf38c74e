"""
What is told of calls at RabbitMQ, by a worker with threads: each line, one id in all of them, and no secret anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests import services
from tests.faults import told_shop
from tests.faults.told_shop import Card, ShopContext

ROOT = Path(__file__).parents[2]

NUMBER, PASSWORD = "4242-4242-1111-9999", "hunter2-of-ada"
CARD = Card(holder="Ada", number=NUMBER)


class Told(NamedTuple):
    log: str
    #: By queue: messages as the management plug-in shows them.
    held: dict[str, list[dict[str, Any]]]

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.splitlines()]


@pytest.fixture(scope="module")
def told() -> Iterator[Told]:
    app: Any = told_shop.app
    with services.rabbitmq(with_management=True) as broker:
        app.conf.update(broker_url=broker.url)
        env = {"CELERYKIT_LOG_FORMAT": "json", "CELERYKIT_STORE_URL": "memory://"}
        with services.worker(
            "tests.faults.told_shop", url=broker.url, pool="threads", concurrency=2, env=env, cwd=ROOT
        ) as node:
            with ShopContext.bound(correlation_id="req-8f2", tenant="acme"):
                told_shop.verify.delay(CARD, password=PASSWORD)
                told_shop.verify.using(queue="parked").delay(CARD, password=PASSWORD)
                told_shop.ship.using(countdown=600).delay(CARD)
            services.eventually(lambda: node.log.count('"task.dead"') == 1, within=30, what=lambda: node.log)
            held = {name: messages(broker, name) for name in ("parked", "dead_letters")}
            node.stop()
            yield Told(node.log, held)


def messages(broker: services.RabbitMQ, queue: str) -> list[dict[str, Any]]:
    """Look at messages as an operator does."""
    asked = {"count": 10, "ackmode": "ack_requeue_true", "encoding": "auto"}
    answer = httpx.post(f"{broker.management_url}/api/queues/%2F/{queue}/get", json=asked, timeout=10)
    answer.raise_for_status()
    found: list[dict[str, Any]] = answer.json()
    return found


def test_every_line_is_an_event(told: Told) -> None:
    assert {"timestamp", "level", "event", "logger"} <= set.intersection(*(set(line) for line in told.lines))


def test_every_line_of_a_call_has_the_id_of_its_request(told: Told) -> None:
    of_calls = [line for line in told.lines if "id" in line]

    assert {line.get("correlation_id") for line in of_calls} == {"req-8f2"}
    seen = {(line["event"], line["task"], line["attempt"]) for line in of_calls}
    for attempt in (1, 2, 3):
        assert {("task.received", "told.verify", attempt), ("task.started", "told.verify", attempt)} <= seen
    assert {("task.retry_scheduled", "told.verify", attempt) for attempt in (1, 2)} <= seen
    assert {
        ("task.succeeded", "told.verify", 3),
        ("task.failed", "told.ship", 1),
        ("task.dead", "told.ship", 1),
    } <= seen
    assert {line.get("queue") for line in of_calls} == {"celery"}


def test_no_line_has_a_secret(told: Told) -> None:
    assert "asking about *** with ***" in told.log
    for secret in (NUMBER, PASSWORD):
        assert secret not in told.log


@pytest.mark.parametrize("queue", ["parked", "dead_letters"])
def test_the_management_of_rabbitmq_shows_secrets_in_bodies_only(told: Told, queue: str) -> None:
    [message] = told.held[queue]

    assert NUMBER in message.pop("payload")
    assert "Card(holder='Ada', number=***)" in json.dumps(message)
    for secret in (NUMBER, PASSWORD):
        assert secret not in json.dumps(message)
