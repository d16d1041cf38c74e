"""
Brokers that die, freeze and refuse; result backends that are away; leases that are shorter than what they cover.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from celerykit import EnqueueError
from celerykit.dev.servers import Server
from tests.faults.brokers import frozen
from tests.faults.scene import LEASE, PUBLISH_DEADLINE, Scene
from tests.services import eventually


@contextmanager
def away(server: object, *, seconds: float = 0.0) -> Iterator[None]:
    """Kill a server, and start it again with what it had written."""
    server.kill()  # type: ignore[attr-defined]
    try:
        yield
        time.sleep(seconds)
    finally:
        server.start()  # type: ignore[attr-defined]


@contextmanager
def load(scene: Scene) -> Iterator[list[str]]:
    """Send calls for as long as this lasts; gives the ids of those that may have been sent."""
    may_have_been_sent: list[str] = []
    ends = threading.Event()

    def send() -> None:
        number = 0
        while not ends.wait(0.02):
            number += 1
            task_id = f"{scene.broker.queue}-{number}"
            try:
                scene.send_with({"task_id": task_id}, scene.shop.work, seconds=0.01)
            except EnqueueError as error:
                if error.may_have_been_sent:  # type: ignore[attr-defined]
                    may_have_been_sent.append(task_id)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield may_have_been_sent
    finally:
        ends.set()
        sender.join(30)


@pytest.mark.timeout(240)
def test_a_broker_that_is_killed_under_load_loses_nothing_it_confirmed(scene: Scene) -> None:
    scene.worker()
    with load(scene):
        scene.reached("end", times=30)
        with away(scene.broker, seconds=1):
            pass
        done = scene.ledger.count("end")
        scene.reached("end", times=done + 30, within=60)

    # Two were running, and their ends could not be acknowledged.
    scene.verdict("The broker is killed and comes back, under load", may_repeat=4, within=60)


@pytest.mark.timeout(240)
def test_retries_and_failures_survive_a_broker_that_is_away(scene: Scene) -> None:
    scene.worker()
    shop = scene.shop
    patient = [scene.send(shop.patient) for _ in range(4)]
    held = [scene.send(shop.work, hold_at="start") for _ in range(2)]
    scene.reached("start", times=4)
    failing = [scene.send(shop.failing) for _ in range(4)]

    with away(scene.broker, seconds=10):
        scene.open_gate()
    scene.reached("start", failing[-1], within=60)
    scene.dies(*failing, of="failed", within=60)
    scene.cure()

    for task_id in (*patient, *held):
        scene.reached("effect", task_id, within=60)
    scene.replays(*failing)
    scene.verdict("The broker is away for ten seconds amid retries and failures", may_repeat=2, within=60)


def test_a_dead_letter_that_cannot_be_written_leaves_its_message(scene: Scene) -> None:
    node = scene.worker(concurrency=1)
    task_id = scene.send(scene.shop.failing)
    scene.dies(task_id, of="failed")
    scene.cure()
    scene.replays(task_id)
    (scene.folder / "cured").unlink()
    held = scene.send(scene.shop.failing_later)
    scene.reached("start", held)

    with away(scene.broker, seconds=1):
        scene.open_gate()
        scene.reached("raised", held)
        node.kill()
    scene.successor()

    scene.dies(held, of="failed", within=60)
    scene.verdict("A worker dies with a dead letter that it could not write")


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_dead_letter_that_is_refused_is_written_later(scene: Scene, pool: str) -> None:
    node = scene.worker(pool=pool)
    with scene.broker.refuse_letters():
        failing = scene.send(scene.shop.failing)
        node.wait_for("dead_letter.not_written")
        # It takes one of two places; what comes after it has the other.
        scene.canary()
        time.sleep(LEASE * 2)
        assert scene.ledger.count("start", failing) == 1

    scene.dies(failing, of="failed", within=60)
    scene.cure()
    scene.replays(failing)
    scene.verdict(f"The queue of dead letters takes none for a while ({pool}), then replayed")


def test_a_worker_that_ends_before_its_letter_is_written_leaves_its_message(scene: Scene) -> None:
    node = scene.worker()
    with scene.broker.refuse_letters():
        failing = scene.send(scene.shop.failing)
        node.wait_for("dead_letter.not_written")
        node.stop()
    scene.successor()

    scene.dies(failing, of="failed", within=60)
    scene.cure()
    scene.replays(failing)
    scene.verdict("SIGTERM of a worker with a dead letter that it could not write, then replayed")


def test_publishing_to_a_broker_that_is_frozen_or_away_ends(scene: Scene) -> None:
    scene.worker()
    scene.canary()
    with frozen(scene.broker):
        started = time.monotonic()
        with pytest.raises(EnqueueError):
            scene.shop.work.delay()
        assert time.monotonic() - started < PUBLISH_DEADLINE + 1
    with away(scene.broker):
        started = time.monotonic()
        with pytest.raises(EnqueueError):
            scene.shop.work.delay()
        assert time.monotonic() - started < PUBLISH_DEADLINE + 1

    scene.canary(within=60)
    scene.verdict(f"Publishing to a broker that is frozen, or away: an error within {PUBLISH_DEADLINE + 1:g} s")


# Result backends


def test_a_result_backend_that_is_away_keeps_nobody_from_publishing(scene: Scene, results: Server) -> None:
    scene.worker()
    scene.canary()
    with away(results):
        started = time.monotonic()
        task_id = scene.send(scene.shop.work)
        assert time.monotonic() - started < 1
        scene.reached("effect", task_id)

    scene.ends_as("SUCCESS", task_id, within=40)
    scene.verdict("The result backend is away while a task is sent, runs and ends")


def test_a_result_backend_that_is_away_at_the_end_gets_the_result_when_it_is_back(
    scene: Scene, results: Server
) -> None:
    scene.worker()
    work, failing = scene.send(scene.shop.work, hold_at="half"), scene.send(scene.shop.failing)
    scene.reached("half", work)
    with away(results, seconds=2):
        scene.open_gate()
        scene.reached("effect", work)

    scene.ends_as("SUCCESS", work, within=40)
    scene.dies(failing, of="failed", within=40)
    scene.verdict("The result backend is away when tasks end")


# Leases


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_task_longer_than_the_lease_runs_once(scene: Scene, pool: str) -> None:
    scene.worker(pool=pool, concurrency=1, prefetch=4)
    long = scene.send(scene.shop.work, seconds=LEASE * 3)
    behind = [scene.send(scene.shop.work) for _ in range(3)]

    for task_id in (long, *behind):
        scene.reached("end", task_id, within=30)
    time.sleep(LEASE)
    scene.verdict(f"A task three times as long as the lease ({pool}), others prefetched behind it")
    assert scene.ledger.counts("start").total() == len(scene.sent)


def test_a_countdown_longer_than_the_lease_runs_once(scene: Scene) -> None:
    scene.worker()
    ids = [scene.send_with({"countdown": LEASE * 3}, scene.shop.work) for _ in range(5)]
    scene.canary()
    assert scene.ledger.counts("start").total() == 1

    for task_id in ids:
        scene.reached("end", task_id, within=30)
    scene.verdict("Countdowns three times as long as the lease")
    assert scene.ledger.counts("start").total() == len(scene.sent)


def test_a_countdown_survives_its_worker(scene: Scene) -> None:
    node = scene.worker()
    ids = [scene.send_with({"countdown": 6}, scene.shop.work) for _ in range(5)]
    scene.canary()
    node.kill()
    scene.successor()

    for task_id in ids:
        scene.reached("end", task_id, within=30)
    scene.verdict("SIGKILL of a worker that holds countdowns")
    assert scene.ledger.counts("start").total() == len(scene.sent)


def test_a_broker_that_hangs_for_longer_than_the_lease_repeats_nothing_that_waits(scene: Scene) -> None:
    scene.worker(concurrency=1, prefetch=4)
    ids = [scene.send(scene.shop.work, seconds=1.0) for _ in range(3)]
    scene.reached("start")
    with frozen(scene.broker):
        time.sleep(LEASE * 1.5)

    for task_id in ids:
        scene.reached("end", task_id, within=40)
    eventually(lambda: not scene.broker.held() or scene.broker.name == "RabbitMQ", within=20, what=scene.told)
    scene.verdict("The broker is frozen for longer than the lease while tasks run", may_repeat=2)
