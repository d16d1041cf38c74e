"""
Brokers that the rows may break, and a table of what came of them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from celerykit.dev.servers import Server
from tests import services
from tests.faults import table
from tests.faults.brokers import Rabbit, Valkey
from tests.faults.scene import Scene


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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table, and keep it for `python -m tests.faults.table`."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    rows = [
        value
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "fault" and getattr(report, "when", "") == "call"
    ]
    if rows:
        options = terminalreporter.config
        is_whole = not options.option.keyword and all(Path(argument).is_dir() for argument in options.args)
        table.keep(rows, is_whole=is_whole)
        terminalreporter.section("what became of the messages")
        terminalreporter.write_line(table.results(rows))
