"""
Tasks, plain and `async def`, run the same in every pool of Celery's worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import celery
import pytest
from celery.exceptions import SoftTimeLimitExceeded

from celerykit import InvalidPayload
from tests import services
from tests.integration.conftest import ROOT, SHOP

WITHIN = 10


@pytest.fixture(scope="module", params=["prefork", "threads", "solo"])
def pooled(request: Any, environment: dict[str, str], idle_shop: Any) -> Iterator[Any]:
    """The shop, with a worker of one pool, at a broker of its own."""
    queue = f"pool-{request.param}"
    with services.worker(
        SHOP,
        url=environment["CELERY_BROKER_URL"],
        pool=request.param,
        env=environment,
        concurrency=2,
        cwd=ROOT,
        options=["-Q", queue, "-n", f"{queue}@%h"],
    ):
        yield _Queue(idle_shop, queue)


class _Queue:
    """Sends the shop's tasks to one queue."""

    def __init__(self, shop: Any, name: str) -> None:
        self.shop, self.name = shop, name

    def __call__(self, task: Any, *args: Any, **kwargs: Any) -> Any:
        return task.using(queue=self.name).delay(*args, **kwargs)


def test_a_typed_call_runs_in_every_pool(pooled: Any) -> None:
    shop = pooled.shop
    order = shop.Order(order_id=uuid4(), amount="1.50")

    assert pooled(shop.charge, order).get(timeout=WITHIN).total == Decimal("1.50")
    assert pooled(shop.flaky, order, b"x").get(timeout=WITHIN)[0] == 2


def test_async_tasks_of_one_thread_share_one_loop(pooled: Any) -> None:
    homes = [pooled(pooled.shop.loop_of, 0.01).get(timeout=WITHIN) for _ in range(6)]

    loops: dict[tuple[int, int], set[int]] = {}
    for pid, thread, loop in homes:
        loops.setdefault((pid, thread), set()).add(loop)
    assert all(len(of_one_thread) == 1 for of_one_thread in loops.values())


def test_an_async_task_sees_its_request_and_can_retry(pooled: Any) -> None:
    assert pooled(pooled.shop.async_flaky).get(timeout=WITHIN) == 1


def test_celery_s_autoretry_works_and_leaves_invalid_payloads_alone(pooled: Any) -> None:
    task = pooled.shop.retried_by_itself

    assert pooled(task, 2).get(timeout=WITHIN) == 2
    # As stock Celery sends it, past the checks of the caller.
    sent = celery.Celery.send_task(pooled.shop.app, task.name, ("many",), queue=pooled.name)
    with pytest.raises(InvalidPayload):
        sent.get(timeout=WITHIN)


def test_a_coroutine_that_is_cancelled_from_within_is_a_failure(pooled: Any) -> None:
    sent = pooled(pooled.shop.cancels_itself)
    services.eventually(sent.failed, within=WITHIN)

    with pytest.raises(RuntimeError, match="cancelled from within"):
        sent.get(timeout=WITHIN)
    assert pooled(pooled.shop.loop_of).get(timeout=WITHIN)


# Celery has soft time limits in the prefork pool only.


def test_the_soft_time_limit_cancels_a_coroutine_and_lets_it_clean_up(shop: Any, tmp_path: Path) -> None:
    sent = shop.never_ends.delay(tmp_path / "end")
    services.eventually(sent.failed, within=WITHIN)

    with pytest.raises(SoftTimeLimitExceeded):
        sent.get(timeout=WITHIN)
    assert (tmp_path / "end").read_text() == "cleaned up"


def test_the_soft_time_limit_interrupts_a_coroutine_that_never_awaits(shop: Any) -> None:
    sent = shop.never_awaits.delay()
    services.eventually(sent.failed, within=WITHIN)

    with pytest.raises(SoftTimeLimitExceeded):
        sent.get(timeout=WITHIN)
    assert shop.loop_of.delay().get(timeout=WITHIN)


def test_each_call_has_the_context_of_its_own_steps(pooled: Any) -> None:
    """A loop that is kept does not keep the context of its first call."""
    shop = pooled.shop

    assert [pooled(task).get(timeout=WITHIN) for task in (shop.tenant_of, shop.tenant_too, shop.tenant_of)] == [
        "tenant_of",
        "tenant_too",
        "tenant_of",
    ]


def test_an_async_class_inherits_awaits_and_is_retried(pooled: Any) -> None:
    order = pooled.shop.Order(order_id=uuid4(), amount=40)

    assert pooled(pooled.shop.derived, order, fail=2).get(timeout=WITHIN) == 42
    assert pooled(pooled.shop.base, 3).get(timeout=WITHIN) == 3
