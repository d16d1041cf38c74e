"""
The same calls on RabbitMQ, with every publish confirmed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from celerykit.dev.servers import Server
from tests import services
from tests.integration.conftest import ROOT, SHOP

#: A process of its own: the shop of this one is at Valkey.
DRIVE = """
from uuid import uuid4
from celery import chain, chord
from tests.integration.shop import *

order = Order(order_id=uuid4(), amount="1.50")
assert charge.delay(order).get(timeout=20).total == order.amount
assert chain(charge.s(order), mail.s("bob")).apply_async().get(timeout=20) == "1.50 EUR bob"
assert chord([charge.s(order)] * 3, turnover.s())().get(timeout=20) == 3 * order.amount
assert flaky.delay(order, b"x").get(timeout=20)[0] == 2
assert [r.get(timeout=20).currency for r in charge.enqueue_many([(order,)] * 20)] == ["EUR"] * 20
assert app.connection_for_write().transport_options["confirm_publish"] is True
print("all done")
"""


@pytest.fixture(scope="module")
def rabbitmq() -> Iterator[Any]:
    with services.rabbitmq() as broker:
        yield broker


@pytest.mark.timeout(150)
def test_typed_calls_run_on_rabbitmq(rabbitmq: Any, broker: Server) -> None:
    env = {"CELERY_BROKER_URL": rabbitmq.url, "CELERY_RESULT_BACKEND": broker.backend_url}

    with services.worker(SHOP, url=rabbitmq.url, env=env, concurrency=2, cwd=ROOT):
        drive = subprocess.run(
            [sys.executable, "-c", DRIVE],
            env=os.environ | env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
        )

    assert drive.stdout == "all done\n", drive.stderr
