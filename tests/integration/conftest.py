"""
One Valkey and one prefork worker for all tests of a process that want the shop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

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
def environment(broker: Server) -> Iterator[dict[str, str]]:
    """Point this process, and the workers it starts, to the broker."""
    ours = {"CELERY_BROKER_URL": broker.url, "CELERY_RESULT_BACKEND": broker.backend_url}
    with mock.patch.dict(os.environ, ours):
        yield ours


@pytest.fixture(scope="session")
def idle_shop(environment: dict[str, str]) -> ModuleType:
    """The shop, with nobody working in it."""
    from tests.integration import shop

    return shop


@pytest.fixture(scope="session")
def node(idle_shop: ModuleType, broker: Server) -> Iterator[services.Worker]:
    with services.worker(SHOP, url=broker.url, concurrency=2, cwd=ROOT) as node:
        yield node


@pytest.fixture(scope="session")
def shop(idle_shop: ModuleType, node: services.Worker) -> ModuleType:
    """The shop, with a prefork worker."""
    return idle_shop
