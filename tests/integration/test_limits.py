"""
Limits, on real workers: never more than is allowed, nobody is forgotten, and who waits is in nobody's way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import redis

from celerykit.dev.servers import Server
from tests import services
from tests.integration.conftest import ROOT

LEASE = 4.0

Start = Callable[..., AbstractContextManager[services.Worker]]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with services.valkey() as server:
        yield server


@pytest.fixture
def notes(server: Server) -> Iterator[Any]:
    with redis.Redis.from_url(server.client_url, decode_responses=True) as notes:
        yield notes


@pytest.fixture(scope="module")
def shop(server: Server) -> Any:
    from tests.integration import limits_shop

    limits_shop.app.conf.update(broker_url=server.url, result_backend=server.backend_url)
    return limits_shop


@pytest.fixture
def start(server: Server) -> Start:
    def start(pool: str = "prefork", *, concurrency: int = 4, options: Any = ()) -> Any:
        env = {
            "CELERY_RESULT_BACKEND": server.backend_url,
            "CELERYKIT_LEASE": str(LEASE),
            "LEDGER": server.client_url,
        }
        app = "tests.integration.limits_shop"
        return services.worker(
            app, url=server.url, pool=pool, concurrency=concurrency, env=env, cwd=ROOT, options=options
        )

    return start


def starts(notes: Any, name: str) -> list[float]:
    return [float(at) for at in notes.lrange(f"starts {name}", 0, -1)]


def slots(notes: Any, task: str) -> list[str]:
    return [key for key in notes.scan_iter("*") if f"{task}:concurrent" in key]


@pytest.mark.parametrize(
    ("pool", "task"), [("prefork", "in_pairs"), ("prefork", "in_pairs_too"), ("threads", "in_pairs")]
)
def test_never_more_run_at_once_than_is_allowed(pool: str, task: str, shop: Any, start: Start, notes: Any) -> None:
    name = f"{task} on {pool}"
    with start(pool) as worker:
        for _ in range(8):
            getattr(shop, task).delay(name, 0.3)
        services.eventually(
            lambda: len(starts(notes, name)) == 8 and notes.get(f"running {name}") == "0",
            within=20,
            what=lambda: worker.log,
        )
        services.eventually(lambda: not slots(notes, task), what=lambda: worker.log)

    assert max(map(int, notes.lrange(f"at once {name}", 0, -1))) == 2


def test_never_more_start_in_a_second_than_is_allowed(shop: Any, start: Start, notes: Any) -> None:
    with start():
        sent = time.time()
        results = [shop.paced.delay() for _ in range(15)]

        attempts = [result.get(timeout=20) for result in results]

    first, *_, last = sorted(starts(notes, "paced"))
    assert attempts == [1] * 15
    assert first - sent < 2
    # Whoever is late only makes it longer.
    assert last - sent >= 2


def test_a_call_that_waits_holds_no_process(shop: Any, start: Start, notes: Any) -> None:
    notes.set("hold acme", 1)
    with start(concurrency=2) as worker:
        for _ in range(6):
            shop.alone.delay("acme")
        services.eventually(lambda: notes.get("running acme") == "1")

        shop.alone.delay("globex")
        services.eventually(lambda: starts(notes, "globex") != [], within=5)
        assert [shop.free.delay().get(timeout=5) for _ in range(3)] == ["free"] * 3

        assert len(starts(notes, "acme")) == 1
        notes.delete("hold acme")
        services.eventually(lambda: len(starts(notes, "acme")) == 6, within=20, what=lambda: worker.log)
    assert set(notes.lrange("at once acme", 0, -1)) == {"1"}


def test_the_slot_of_a_worker_that_was_killed_is_free_after_its_lease(shop: Any, start: Start, notes: Any) -> None:
    notes.set("hold doomed", 1)
    with start(options=["-Q", "other"]) as other, start() as first:
        shop.alone.delay("doomed")
        services.eventually(lambda: starts(notes, "doomed") != [])
        time.sleep(LEASE * 1.5)  # time for renewals
        first.kill()
        killed = time.time()
        notes.delete("hold doomed")
        shop.alone.using(queue="other").delay("doomed")
        services.eventually(lambda: len(starts(notes, "doomed")) == 2, within=LEASE + 6, what=lambda: other.log)
        services.eventually(lambda: not slots(notes, "alone"), what=lambda: other.log)

    # It was renewed a third of its lease before, or later.
    assert starts(notes, "doomed")[1] - killed > LEASE / 2
