"""
An effect and its record in one transaction: both are there, or neither is.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from celerykit import InvalidOptions
from celerykit.idempotency import Turn
from celerykit.stores import open_store
from tests import services
from tests.integration.conftest import ROOT

SHOP = "tests.integration.remember_shop"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("remember")
    with pytest.MonkeyPatch.context() as patch, services.valkey() as server:
        if request.param == "sqlite":
            url = engine_url = f"sqlite:///{folder}/shop.db"
        else:
            node = request.getfixturevalue("postgresql")
            url, engine_url = node.url, node.url.replace("postgresql://", "postgresql+psycopg://")
        env = {
            "CELERY_BROKER_URL": server.url,
            "CELERY_RESULT_BACKEND": server.backend_url,
            "CELERYKIT_STORE_URL": url,
            "CELERYKIT_LEASE": "2",
            "SHOP_DATABASE": engine_url,
            "SHOP_FOLDER": str(folder),
        }
        for name, value in env.items():
            patch.setenv(name, value)
        sys.modules.pop(SHOP, None)
        shop = importlib.import_module(SHOP)
        shop.payments.metadata.create_all(shop.engine)
        with services.worker(SHOP, url=server.url, concurrency=2, env=env, cwd=ROOT):
            yield shop
        shop.app.close()
        shop.engine.dispose()


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Any]:
    with services.postgresql() as node:
        yield node


def paid(shop: Any, amount: int) -> int:
    with shop.engine.connect() as db:
        found = sa.select(sa.func.count()).where(shop.payments.c.amount == amount)
        return int(db.execute(found).scalar_one())


@pytest.mark.parametrize(("amount", "dies"), [(1, ""), (2, "inside"), (3, "behind")])
def test_a_process_that_dies_pays_once(shop: Any, amount: int, dies: str) -> None:
    first = shop.pay.delay(amount, dies=dies)
    second = shop.pay.delay(amount, dies=dies)

    assert first.get(timeout=30) == second.get(timeout=30) == amount * 10
    assert paid(shop, amount) == 1
    assert second.duplicate


def test_a_transaction_that_is_rolled_back_leaves_the_key_free(shop: Any) -> None:
    with pytest.raises(ValueError, match="7"):
        shop.pay_and_fail.delay(7).get(timeout=20)

    assert paid(shop, 7) == 0
    assert not shop.pay_and_fail.delay(7).duplicate


def test_a_task_without_a_key_has_nothing_to_be_remembered_by(shop: Any) -> None:
    with pytest.raises(InvalidOptions, match=r"pay_without_a_key: remember\(\) has nothing to record the result under"):
        shop.pay_without_a_key.delay(8).get(timeout=20)

    assert paid(shop, 8) == 0


def test_outside_of_a_run_nothing_is_remembered(shop: Any, tmp_path: Path) -> None:
    assert shop.pay(11) == 110
    assert not shop.pay.delay(11).duplicate


def test_a_call_that_runs_in_place_is_remembered_in_its_process(shop: Any) -> None:
    assert shop.pay.apply((12,)).get() == shop.pay.apply((12,)).get() == 120
    assert paid(shop, 12) == 1


def test_a_store_that_is_no_database_cannot_be_part_of_a_transaction(shop: Any) -> None:
    with services.valkey() as server:
        store = open_store(server.url, timeout=2)
        claims = dataclasses.replace(shop.pay.claims, store=lambda: store)
        running = claims.start(claims.identify((1,), {}, id="a"), "a", Turn(), token="t", joined=None, was_sent=False)

        with shop.engine.begin() as db, pytest.raises(InvalidOptions, match="CELERYKIT_STORE_URL"):
            claims.remember(running.run, 10, on=db)
