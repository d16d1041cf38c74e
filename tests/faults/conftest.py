"""
Brokers and stores that the rows may break, and tables of what came of them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from celerykit.dev.servers import Server
from tests import services
from tests.faults.brokers import Rabbit, Valkey
from tests.faults.keys_scene import Keep, KeyScene, PostgreSQLKeep, ValkeyKeep
from tests.faults.scene import Scene
from tests.faults.table import TABLES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.get_closest_marker("timeout"):
            # Real processes, real leases: the time limit of the other tests is too short for some.
            item.add_marker(pytest.mark.timeout(180))


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[services.RabbitMQ]:
    with services.rabbitmq() as node:
        yield node


@pytest.fixture
def state() -> Iterator[Server]:
    """A Valkey that forgets nothing."""
    with services.valkey(fsync="always") as server:
        yield server


@pytest.fixture(params=["valkey", "rabbitmq"])
def scene(
    request: pytest.FixtureRequest,
    state: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Any,
) -> Iterator[Scene]:
    """A scene at each of the two brokers; on Valkey, counts and results are kept by the broker itself."""
    queue = f"faults-{uuid.uuid4().hex[:8]}"
    dead = f"dead-{queue}"
    if request.param == "valkey":
        broker: Any = Valkey(state, queue=queue, dead=dead)
    else:
        broker = Rabbit(request.getfixturevalue("rabbitmq"), queue=queue, dead=dead)
    scene = Scene(broker, state=state, folder=tmp_path, patch=monkeypatch, record=record_property)
    try:
        yield scene
    finally:
        scene.close()


@pytest.fixture
def results(scene: Scene) -> Iterator[Server]:
    """A result backend that is nothing else, so that it can go and come back."""
    with services.valkey(fsync="always") as server:
        scene.env["CELERY_RESULT_BACKEND"] = server.backend_url
        yield server


#: The stores that keys are claimed in.
STORES = ("Valkey", "PostgreSQL")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[services.PostgreSQL]:
    with services.postgresql() as server:
        yield server


@contextmanager
def _kept_in(name: str, request: pytest.FixtureRequest) -> Iterator[Keep]:
    """Give a store that is nothing else, and forgets nothing when it is killed."""
    if name == "PostgreSQL":
        yield PostgreSQLKeep(request.getfixturevalue("postgresql"))
        return
    with _valkey() as server:
        yield ValkeyKeep(server)


def _valkey() -> AbstractContextManager[Server]:
    """Run a Valkey that forgets nothing when it is killed; a machine's crash, for which others sync, is no row."""
    return services.valkey(fsync="everysec")


@pytest.fixture(scope="session", params=STORES)
def _standing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyScene]:
    with _valkey() as state, _kept_in(request.param, request) as keep:
        broker = Valkey(state, queue="keys", dead="dead-keys")
        scene = KeyScene(broker, keep=keep, state=state, folder=tmp_path_factory.mktemp("keys"))
        try:
            scene.worker(concurrency=8)
            yield scene
        finally:
            scene.close()


@pytest.fixture
def quiet(_standing: KeyScene, record_property: Any) -> KeyScene:
    """A scene with a worker that no test kills, once for each store: each row has a key of its own."""
    _standing.record = record_property
    return _standing


@pytest.fixture(params=STORES)
def stage(request: pytest.FixtureRequest, tmp_path: Path, record_property: Any) -> Iterator[KeyScene]:
    """A scene for calls with keys that a test may break as it likes: with a store, or with a store and a broker."""
    store, _, broker_name = request.param.partition(" behind ")
    queue = f"keys-{uuid.uuid4().hex[:8]}"
    with _valkey() as state, _kept_in(store, request) as keep:
        if broker_name == "RabbitMQ":
            broker: Any = Rabbit(request.getfixturevalue("rabbitmq"), queue=queue, dead=f"dead-{queue}")
        else:
            broker = Valkey(state, queue=queue, dead=f"dead-{queue}")
        scene = KeyScene(broker, keep=keep, state=state, folder=tmp_path)
        scene.record = record_property
        try:
            yield scene
        finally:
            scene.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the tables, and keep them for `python -m tests.faults.table`."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    options = terminalreporter.config
    is_whole = not options.option.keyword and all(Path(argument).is_dir() for argument in options.args)
    for table in TABLES:
        # What a test recorded is told by it, and by each of its subtests.
        rows = list({table.identify(row): row for row in _rows_in(reports, table.name)}.values())
        if rows:
            table.keep(rows, is_whole=is_whole)
            terminalreporter.section(table.title)
            terminalreporter.write_line(table.results(rows))


def _rows_in(reports: Any, kind: str) -> Iterator[Any]:
    for report in reports:
        if getattr(report, "when", "") == "call":
            yield from (value for name, value in getattr(report, "user_properties", ()) if name == kind)
