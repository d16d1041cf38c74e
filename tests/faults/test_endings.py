"""
Tasks that end badly by themselves: time limits, poison, errors, and what cannot be stored.
"""

from __future__ import annotations

import time

import pytest

from tests.faults.scene import Scene
from tests.services import eventually

# Time limits


def test_a_task_over_its_hard_time_limit_is_kept_dead_and_can_be_replayed(scene: Scene) -> None:
    scene.worker()
    task_id = scene.send_with({"link_error": scene.shop.told.s()}, scene.shop.over_hard_limit)

    scene.dies(task_id, of="time_limit")
    scene.reached("errback", task_id)
    scene.cure()
    scene.replays(task_id, task="tests.faults.shop.over_hard_limit")

    scene.verdict("Hard time limit, then replayed")
    assert scene.ledger.count("task_failure", task_id) == 1
    assert scene.ledger.count("errback", task_id) == 1


def test_a_task_over_its_soft_time_limit_is_kept_dead_and_can_be_replayed(scene: Scene) -> None:
    scene.worker()
    task_id = scene.send(scene.shop.over_soft_limit)

    scene.dies(task_id, of="time_limit")
    scene.cure()
    scene.replays(task_id, reason="time_limit")

    scene.verdict("Soft time limit, not caught, then replayed")
    assert scene.ledger.count("task_failure", task_id) == 1


# Poison


@pytest.mark.parametrize("how", ["exit", "segfault", "out of memory"])
def test_a_task_that_kills_its_process_is_kept_dead_after_three_starts(scene: Scene, how: str) -> None:
    scene.worker()
    task_id = scene.send_with({"link_error": scene.shop.told.s()}, scene.shop.poison, how)

    [letter] = scene.dies(task_id, of="process_died")
    assert letter.note.attempts == 1
    assert scene.ledger.count("start", task_id) == 3
    scene.reached("errback", task_id)
    scene.cure()
    scene.replays(task_id, reason="process_died")

    scene.verdict(f"Poison: the task kills its process ({how}) each time, then replayed")
    assert scene.ledger.count("errback", task_id) == 1
    assert scene.ledger.count("task_failure", task_id) == 1


@pytest.mark.timeout(240)
def test_a_task_that_kills_the_whole_worker_is_kept_dead_after_three_starts(scene: Scene) -> None:
    node = scene.worker()
    task_id = scene.send(scene.shop.poison, "worker")
    for starts in range(1, 4):
        scene.reached("start", task_id, times=starts)
        node.process.wait(10)
        node = scene.successor()

    scene.dies(task_id, of="process_died")
    assert scene.ledger.count("start", task_id) == 3
    scene.cure()
    scene.replays(task_id)

    scene.verdict("Poison: the whole worker dies with the task each time, then replayed")


@pytest.mark.timeout(240)
def test_what_waits_behind_poison_is_no_poison(scene: Scene) -> None:
    node = scene.worker(concurrency=1, prefetch=4)
    poison = scene.send(scene.shop.poison, "worker")
    others = [scene.send(scene.shop.work) for _ in range(3)]
    for starts in range(1, 4):
        scene.reached("start", poison, times=starts)
        node.process.wait(10)
        node = scene.successor()

    scene.dies(poison, of="process_died")
    for task_id in others:
        scene.reached("end", task_id)
    scene.verdict("Poison: the whole worker dies each time, with others prefetched behind it")
    assert [letter.note.id for letter in scene.letters] == [poison]


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_what_would_end_the_process_is_a_failure_of_the_task(scene: Scene, pool: str) -> None:
    scene.worker(pool=pool, concurrency=1)
    deaths = [scene.send(scene.shop.poison, how) for how in ("SystemExit", "KeyboardInterrupt", "MemoryError")]

    scene.dies(*deaths, of="interrupted")
    assert scene.ledger.counts("start").total() == 3
    scene.canary()
    scene.cure()
    scene.replays(*deaths)

    scene.verdict(f"SystemExit, KeyboardInterrupt and MemoryError in a task ({pool}), then replayed")


# Errors


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_failure_is_kept_dead_and_replayed_to_one_effect(scene: Scene, pool: str) -> None:
    scene.worker(pool=pool)
    task_id = scene.send_with({"link_error": scene.shop.told.s()}, scene.shop.failing)

    [letter] = scene.dies(task_id, of="failed")
    assert letter.note.error == "RuntimeError"
    scene.reached("errback", task_id)
    scene.cure()
    scene.replays(task_id, task="tests.faults.shop.failing")

    scene.verdict(f"An exception ({pool}), then replayed")
    assert scene.ledger.count("errback", task_id) == 1
    assert scene.ledger.count("task_failure", task_id) == 1


def test_a_failure_is_found_by_the_command_line(scene: Scene) -> None:
    scene.worker()
    task_id = scene.send(scene.shop.failing)
    scene.dies(task_id, of="failed")

    listed = scene.command("dead", "list", "--json")

    assert task_id in listed
    scene.cure()
    scene.command("dead", "replay", "--reason", "failed")
    scene.reached("effect", task_id)
    scene.verdict("An exception, found and replayed by the command line")


def test_retries_that_are_used_up_are_kept_dead_and_replayed_to_one_effect(scene: Scene) -> None:
    scene.worker()
    task_id = scene.send(scene.shop.flaky)

    [letter] = scene.dies(task_id, of="failed")
    assert letter.note.attempts == 3
    assert scene.ledger.count("start", task_id) == 3
    scene.cure()
    scene.replays(task_id)
    scene.ends_as("SUCCESS", task_id)

    scene.verdict("Retries used up, then replayed")


def test_what_the_policy_says_is_dead_or_dropped_is(scene: Scene) -> None:
    scene.worker()
    dead, dropped = scene.send(scene.shop.flaky, "Declined"), scene.send(scene.shop.flaky, "Unimportant")

    scene.dies(dead, of="failed")
    scene.ends_as("FAILURE", dropped)
    scene.canary()

    assert scene.ledger.counts("start")[dead] == 1
    scene.sent.remove(dropped)
    scene.verdict("A policy that says Dead() for one error and Drop() for another")
    assert [letter.note.id for letter in scene.letters] == [dead]


def test_waiting_is_no_attempt(scene: Scene) -> None:
    scene.worker()
    task_id = scene.send(scene.shop.sleepy, 0.3)

    scene.reached("start", task_id, times=4)
    scene.cure()

    scene.reached("effect", task_id)
    scene.verdict("A task that snoozes more often than it has attempts")
    assert not scene.letters


def test_a_rejected_message_is_kept_dead(scene: Scene) -> None:
    scene.worker()
    task_id = scene.send(scene.shop.rejecting)

    eventually(lambda: [letter.note.reason for letter in scene.letters] == ["rejected"], what=scene.told)
    scene.cure()
    scene.replays(task_id)

    scene.verdict("Reject(requeue=False), then replayed")


# What cannot be stored or pickled

RESULTS = ("object", "a lambda", "recursive", "a lock")
ERRORS = (
    "of a local class",
    "with a lock in it",
    "without words",
    "of 20 MB",
    "that cannot be built again",
    "with surrogates",
    "with an odd name",
)


def test_results_that_cannot_be_stored_are_failures_that_are_kept(scene: Scene) -> None:
    scene.worker()
    ids = [scene.send(scene.shop.odd_result, kind) for kind in RESULTS]

    scene.dies(*ids, of="failed")

    scene.verdict("Results that cannot be stored: " + ", ".join(RESULTS))
    assert scene.ledger.counts("start").total() == len(scene.sent)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_errors_that_cannot_be_pickled_are_failures_that_are_kept(scene: Scene, pool: str) -> None:
    scene.worker(pool=pool)
    ids = [scene.send(scene.shop.odd_error, kind) for kind in ERRORS]

    scene.dies(*ids, of="failed")
    scene.cure()
    scene.replays(*ids)

    scene.verdict(f"Errors that cannot be stored or pickled ({pool}): " + ", ".join(ERRORS))


# Revoked, expired


def test_what_is_revoked_is_not_dead_and_what_is_expired_is(scene: Scene) -> None:
    node = scene.worker(concurrency=1, prefetch=4)
    blocker = scene.send(scene.shop.work, hold_at="start")
    scene.reached("start", blocker)
    revoked = scene.send(scene.shop.work)
    expired = scene.send_with({"expires": 1}, scene.shop.work)
    scene.shop.app.control.revoke(revoked)
    node.wait_for("flagged as revoked")
    time.sleep(1.1)
    scene.open_gate()

    scene.dies(expired, of="expired")
    scene.ends_as("REVOKED", revoked)
    scene.sent.remove(revoked)
    scene.replays(expired)

    scene.verdict("Revoked (no dead letter), and expired, then replayed")
    assert scene.ledger.count("start", revoked) == 0


# Chords


@pytest.mark.parametrize("death", ["an error", "its process"])
def test_a_chord_with_a_dead_member_is_kept_dead_as_a_whole(scene: Scene, death: str) -> None:
    from celery import chord

    scene.worker()
    shop = scene.shop
    member = shop.failing.s() if death == "an error" else shop.poison.s("exit")
    body = chord([shop.work.s(), member], shop.total.s()).apply_async()
    member_id = next(result.id for result in body.parent.results if result.id != body.parent.results[0].id)
    scene.sent += [body.id, *(result.id for result in body.parent.results)]

    scene.ends_as("FAILURE", body.id, within=40)
    eventually(lambda: len(scene.letters) == 2, within=20, what=scene.told)
    letters = {letter.note.id: letter.note for letter in scene.letters}

    assert letters[body.id].reason == "chord_failed"
    assert letters[member_id].reason == ("failed" if death == "an error" else "process_died")
    assert letters[member_id].chord
    scene.cure()
    scene.shop.app.dead_letters.replay(task=member.task)
    scene.reached("effect", member_id)
    scene.verdict(f"A chord whose member is dead of {death}: both are kept, the member is replayed")
    assert scene.ledger.count("effect", body.id) == 0


# Deploys


def test_a_task_that_only_a_newer_worker_knows_waits_for_it(scene: Scene) -> None:
    scene.env["CELERYKIT_UNKNOWN_TASK_GRACE"] = "60"
    old = scene.worker()
    sent = scene.shop.app.send_task("tests.faults.shop.novelty")
    scene.sent.append(sent.id)
    scene.canary()
    time.sleep(3)
    assert not scene.letters

    scene.worker(deploy="new")
    old.stop()

    scene.reached("effect", sent.id)
    scene.verdict("A task that only a newer worker knows, sent during a rolling deploy")
    assert not scene.letters


def test_a_task_that_nobody_knows_is_kept_dead_after_the_grace_and_replayed_to_who_does(scene: Scene) -> None:
    scene.env["CELERYKIT_UNKNOWN_TASK_GRACE"] = "3"
    node = scene.worker()
    started = time.monotonic()
    sent = scene.shop.app.send_task("tests.faults.shop.novelty")
    scene.sent.append(sent.id)

    scene.dies(sent.id, of="unknown_task")
    assert time.monotonic() - started > 3
    node.stop()
    scene.worker(deploy="new")
    scene.replays(sent.id, force=True)

    scene.verdict("A task that nobody knows, replayed once a worker does")
