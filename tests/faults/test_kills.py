"""
Processes that are killed: one of the pool, or the whole worker.
"""

from __future__ import annotations

import os
import signal

import pytest

from tests.faults.scene import Scene
from tests.services import eventually

MOMENTS = {
    "start": "before its effect",
    "half": "during its effect",
    "effect": "after its effect",
    "stored": "after its result is stored",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_task_whose_process_is_killed_runs_again(scene: Scene, moment: str) -> None:
    scene.worker()
    task_id = scene.send(scene.shop.work, hold_at=moment)
    child = scene.reached("end" if moment == "stored" else moment, task_id)
    if moment == "stored":
        scene.ends_as("SUCCESS", task_id)

    scene.open_gate()
    os.kill(child, signal.SIGKILL)
    scene.ends_as("SUCCESS", task_id)

    # The effect was there, and nobody could say so any more.
    may_repeat = int(moment in ("effect", "stored"))
    scene.verdict(f"SIGKILL of a task's process, {MOMENTS[moment]}", may_repeat=may_repeat)
    assert not scene.letters


@pytest.mark.parametrize("moment", ["start", "effect"])
def test_a_task_that_must_not_run_twice_is_kept_dead_when_its_process_is_killed(scene: Scene, moment: str) -> None:
    scene.worker()
    task_id = scene.send(scene.shop.work_once, hold_at=moment)
    child = scene.reached(moment, task_id)

    os.kill(child, signal.SIGKILL)

    scene.dies(task_id, of="process_died")
    scene.verdict(f'SIGKILL of the process of a task with on_crash="bury", {MOMENTS[moment]}')
    assert scene.ledger.count("start", task_id) == 1


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_killed_workers_tasks_come_back(scene: Scene, pool: str) -> None:
    node = scene.worker(pool=pool, prefetch=4)
    ids = [scene.send(scene.shop.work, hold_at="start") for _ in range(12)]
    scene.reached("start", times=2)

    node.kill()
    scene.open_gate()
    scene.successor()

    for task_id in ids:
        scene.reached("end", task_id)
    scene.verdict(f"SIGKILL of a worker ({pool}) with two tasks running and others prefetched")


def test_a_killed_worker_leaves_dead_what_must_not_run_twice(scene: Scene) -> None:
    node = scene.worker(prefetch=4)
    ids = [scene.send(scene.shop.work_once, hold_at="start") for _ in range(6)]
    scene.reached("start", times=2)
    running = {entry.id for entry in scene.ledger.of("start")}

    node.kill()
    scene.open_gate()
    scene.successor()

    scene.dies(*running, of="process_died")
    for task_id in set(ids) - running:
        scene.reached("end", task_id)
    scene.verdict('SIGKILL of a worker with two tasks with on_crash="bury" running and others prefetched')
    assert all(count == 1 for count in scene.ledger.counts("start").values())


@pytest.mark.timeout(300)
def test_eight_kills_under_load(scene: Scene) -> None:
    work = scene.shop.work
    results = work.enqueue_many({"seconds": 0.005} for _ in range(1000))
    scene.sent += [result.id for result in results]
    for kill in range(1, 9):
        node = scene.worker(prefetch=4)
        eventually(lambda kill=kill: scene.ledger.count("effect") >= kill * 100, within=60)
        node.kill()
    scene.successor()

    # Two run at a time, and a kill may find both between their effect and its acknowledgement.
    scene.verdict("Eight SIGKILLs of a worker under a load of 1,000 tasks", may_repeat=16, within=60)


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_terminated_worker_ends_what_runs_and_leaves_the_rest(scene: Scene, pool: str) -> None:
    node = scene.worker(pool=pool, concurrency=1, prefetch=4)
    ids = [scene.send(scene.shop.work, hold_at="start") for _ in range(4)]
    scene.reached("start")

    node.process.terminate()
    scene.open_gate()
    assert node.process.wait(15) == 0
    scene.successor()

    for task_id in ids:
        scene.reached("end", task_id)
    scene.verdict(f"SIGTERM of a worker ({pool}) with one task running and others waiting")
    assert scene.ledger.counts("start").total() == len(scene.sent)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_told_to_quit_hands_back_what_runs(scene: Scene, pool: str) -> None:
    node = scene.worker(pool=pool, concurrency=1, prefetch=4)
    ids = [scene.send(scene.shop.work, hold_at="start") for _ in range(4)]
    scene.reached("start")

    node.process.send_signal(signal.SIGQUIT)
    # It waits CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT for the task, which does not end.
    node.process.wait(20)
    node.kill()
    assert scene.state(ids[0]) not in ("RETRY", "FAILURE")
    scene.open_gate()
    scene.successor()

    for task_id in ids:
        scene.reached("end", task_id)
    scene.verdict(f"SIGQUIT of a worker ({pool}) with one task running longer than its grace, others waiting")


@pytest.mark.timeout(300)
def test_twenty_restarts_during_a_countdown_bury_nothing(scene: Scene) -> None:
    scene.shop  # noqa: B018  (first, so that the countdown is not spent on imports)
    task_id = scene.send_with({"countdown": 60}, scene.shop.work)
    for _ in range(20):
        node = scene.worker(concurrency=1)
        node.stop(grace=20)
    scene.successor()

    scene.reached("end", task_id, within=80)
    scene.verdict("Twenty warm restarts during a countdown")
    assert scene.ledger.count("start", task_id) == 1
    assert not scene.letters
