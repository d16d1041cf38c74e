"""
Signs of life of real workers: of those that are well, and of those that only answer pings.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest

from celerykit.dev.servers import Server
from celerykit.pulse import ail, find
from tests.integration import health_shop as shop
from tests.integration.health_ward import Ward, health, ward_of
from tests.services import eventually

POOLS = ("prefork", "threads", "solo")


@pytest.fixture(scope="module")
def well(broker: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    with ward_of(POOLS, url=broker.url, folder=tmp_path_factory.mktemp("health")) as ward:
        yield ward


@pytest.fixture(scope="module")
def ill(well: Ward) -> Ward:
    """The same workers, each with an illness of its own; they take their time to show, so all begin at once."""
    well.tell("prefork", "stand_still", seconds=3.4)
    well.tell("threads", "go_deaf")
    well.send("solo", shop.short_nap, 5.5)
    eventually(lambda: "go_deaf" in well.workers["threads"].log)
    for _ in range(3):
        well.send("threads", shop.nap, 0)
    return well


def test_workers_that_are_well_are_ready_whatever_their_pool(well: Ward) -> None:
    for pool in POOLS:
        well.wait_for(pool, None, ready=True)

    asked = health("worker", "--ready", "--json", "--dir", str(well.folder))

    facts = json.loads(asked.stdout)
    assert asked.returncode == 0, asked
    assert {process["name"]: process["pid"] for process in facts["processes"]} == {
        f"{pool}@health": worker.pid for pool, worker in well.workers.items()
    }


def test_a_loop_that_stands_still_is_seen_though_its_process_lives(ill: Ward) -> None:
    ill.wait_for("prefork", "its loop stands still")

    assert health("worker", "prefork", "--max-age", "3", "--dir", str(ill.folder)).returncode == 1


def test_a_task_that_holds_up_the_loop_of_a_solo_worker_may_do_so_as_long_as_its_time_limit(ill: Ward) -> None:
    eventually(lambda: ill.silence_of("solo") > 3.0)
    assert ail(ill.look_at("solo"), max_age=3, ready=True) is None

    ill.wait_for("solo", "beyond its time limit")


def test_a_worker_that_gets_nothing_is_stuck_though_it_answers_pings(ill: Ward) -> None:
    ill.wait_for("threads", "though the queue 'health-threads' is not empty (3)")

    assert ill.pings("threads")
    assert health("worker", "threads", "--ready", "--dir", str(ill.folder)).returncode == 1
    # Once, not each time it looks.
    assert ill.workers["threads"].log.count("worker.stuck") == 1


def test_a_worker_that_ends_lives_is_not_ready_and_leaves_nothing(ill: Ward) -> None:
    ill.wait_for("prefork", None, ready=True)
    ill.send("prefork", shop.nap, 2.5)
    worker = ill.workers["prefork"]
    worker.wait_for("health_shop.nap")

    os.kill(worker.pid, signal.SIGTERM)

    ill.wait_for("prefork", "it is stopping", ready=True)
    assert ail(ill.look_at("prefork"), max_age=3) is None
    worker.process.wait(20)
    assert find("worker", "prefork@health", folder=ill.folder) == []
