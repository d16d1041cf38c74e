"""
One Valkey and one prefork worker for all tests of a process that want the shop.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from celerykit.dev.servers import Server
from tests import services

ROOT = Path(__file__).parents[2]
SHOP = "tests.integration.shop"


@pytest.fixture(scope="session")
def broker() -> Iterator[Server]:
    with services.valkey() as server:
        yield server


@pytest.fixture(scope="session")
def environment(broker: Server) -> dict[str, str]:
    """What points a process to the broker. Not this process: it would win over the URLs of all other tests."""
    return {"CELERY_BROKER_URL": broker.url, "CELERY_RESULT_BACKEND": broker.backend_url}


@pytest.fixture(scope="session")
def idle_shop(broker: Server) -> ModuleType:
    """The shop, with nobody working in it."""
    from tests.integration import shop

    shop.app.conf.update(broker_url=broker.url, result_backend=broker.backend_url)
    return shop


@pytest.fixture(scope="session")
def node(environment: dict[str, str], broker: Server) -> Iterator[services.Worker]:
    with services.worker(SHOP, url=broker.url, env=environment, concurrency=2, cwd=ROOT) as node:
        yield node


@pytest.fixture(scope="session")
def shop(idle_shop: ModuleType, node: services.Worker) -> ModuleType:
    """The shop, with a prefork worker."""
    return idle_shop
