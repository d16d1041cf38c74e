"""
Keys: whoever calls, however often, and whoever dies, a key takes effect once; or the table says when it does not.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from typing import Any

import celery
import pytest
from celery import chain, chord, group

from tests.faults.brokers import frozen
from tests.faults.keys_scene import KeyScene
from tests.faults.scene import LEASE
from tests.faults.test_brokers import away

#: Rows for which it matters that RabbitMQ delivers in its own way.
also_behind_rabbitmq = pytest.mark.parametrize(
    "stage", ["Valkey", "PostgreSQL", "Valkey behind RabbitMQ"], indirect=True
)

# Two calls


def test_a_double_click_is_one_run(quiet: KeyScene) -> None:
    row = quiet.row().held()
    row.call()
    row.reached("start")

    assert row.call().duplicate is True
    row.open_gate()

    row.becomes("done")
    assert row.call().duplicate is True
    row.verdict("Called again while it runs, and when it is done", seen="3 equal results")


@pytest.mark.timeout(120)
def test_two_hundred_calls_at_once_are_one_run(quiet: KeyScene) -> None:
    row = quiet.row()
    with ExitStack() as stack:
        processes = [stack.enter_context(row.process(env={}, times=25, after=row.number)) for _ in range(8)]
        row.reached("ready", times=8, within=60)
        row.open_gate()
        for process in processes:
            row.hears(process)

    row.verdict("200 calls at once from 8 processes", seen="200 equal results")


# Who calls is killed


def test_a_caller_that_is_killed_before_it_claims_has_done_nothing(quiet: KeyScene) -> None:
    row = quiet.row()
    row.caller(dies="before claimed")

    assert row.call().duplicate is False
    row.verdict("SIGKILL of a caller before it claims", seen="1 result, killed")


def test_a_claim_whose_caller_was_killed_before_it_published_is_sent_by_the_next(quiet: KeyScene) -> None:
    row = quiet.row()
    row.caller(dies="after claimed")
    assert row.call().duplicate is True

    row.a_minute_later()
    assert row.call().duplicate is True

    row.verdict(
        "SIGKILL of a caller after it claimed, before it published",
        seen="2 equal results, killed",
        note="a call a minute later sends it",
    )


def test_a_caller_that_is_killed_after_it_published_has_called(quiet: KeyScene) -> None:
    row = quiet.row()
    row.caller(dies="published")

    assert row.call().duplicate is True
    row.verdict("SIGKILL of a caller after it published", seen="1 result, killed")


@pytest.mark.parametrize("stage", ["Valkey"], indirect=True)
def test_a_call_that_could_not_be_sent_leaves_its_key_free(stage: KeyScene) -> None:
    row = stage.row()
    with away(stage.broker):
        row.call()
        assert row.state == "free"

    stage.worker()
    row.call()
    row.verdict("The broker is away when it is sent, and then back", seen="1 result, UnreachableBroker")


@pytest.mark.parametrize("stage", ["Valkey"], indirect=True)
def test_a_call_that_may_have_been_sent_keeps_its_key(stage: KeyScene) -> None:
    row = stage.row()
    stage.shop.total.delay([]).forget()
    with frozen(stage.broker):
        row.call()
        assert row.state == "claimed"

    stage.worker()
    assert row.call().duplicate is True
    row.verdict("The broker is frozen when it is sent, and takes the message later", seen="1 result, UnreachableBroker")


# Who runs it is killed

#: Where, in words; how many runs and effects there are then.
MOMENTS = {
    "before running": ("before it takes the claim", 1, 1),
    "after running": ("when it has the claim, before the body", 1, 1),
    "start": ("in the body, before the effect", 2, 1),
    # The effect was there, and nobody could say so any more.
    "effect": ("in the body, after the effect", 2, 2),
    "before done": ("after the body, before that is recorded", 2, 2),
    "after done": ("when it is recorded, before the result is stored", 1, 1),
    "stored": ("when the result is stored, before the acknowledgement", 1, 1),
}


def test_tasks_whose_processes_are_killed(quiet: KeyScene, subtests: pytest.Subtests) -> None:
    rows = {moment: quiet.row().dies(moment) for moment in MOMENTS}
    for row in rows.values():
        row.call()
    for row in rows.values():
        row.reached("die")
        assert row.call().duplicate is True

    for moment, row in rows.items():
        words, runs, effects = MOMENTS[moment]
        with subtests.test(moment):
            row.verdict(f"SIGKILL of the task's process {words}", runs=runs, effects=effects, seen="2 equal results")


#: The same for a task that must not run twice; then, how many calls were told what.
ENDS = {
    "after running": (0, 0),
    "start": (1, 0),
    "effect": (1, 1),
    "before done": (1, 1),
}


def test_tasks_that_must_not_run_twice_and_whose_processes_are_killed(
    quiet: KeyScene, subtests: pytest.Subtests
) -> None:
    rows = {moment: quiet.row("pay_at_most_once").dies(moment) for moment in ENDS}
    for row in rows.values():
        row.call()
    for row in rows.values():
        row.reached("die")
        assert row.call().duplicate is True

    for moment, row in rows.items():
        runs, effects = ENDS[moment]
        with subtests.test(moment):
            row.becomes("failed")
            row.verdict(
                f'SIGKILL of the task\'s process {MOMENTS[moment][0]}, on_crash="bury"',
                runs=runs,
                effects=effects,
                key="failed",
                seen="2 WorkerLostError",
                note="a dead letter",
            )


def test_a_task_that_must_not_run_twice_and_is_done_is_not_dead(quiet: KeyScene) -> None:
    row = quiet.row("pay_at_most_once").dies("after done")
    row.call()
    row.reached("die")

    assert row.call().duplicate is True
    row.verdict(f'SIGKILL of the task\'s process {MOMENTS["after done"][0]}, on_crash="bury"', seen="2 equal results")
    assert not [letter for letter in quiet.letters if letter.note.id == row.id]


def test_calls_without_keys_are_remembered_by_their_ids(quiet: KeyScene, subtests: pytest.Subtests) -> None:
    rows = {moment: quiet.row("mail").dies(moment) for moment in ("after done", "stored")}
    for row in rows.values():
        row.call()
        row.reached("die")

    for moment, row in rows.items():
        with subtests.test(moment):
            words = f"SIGKILL of the task's process {MOMENTS[moment][0]}, remember=True and no key"
            row.verdict(words, seen="1 result")


@pytest.mark.timeout(240)
@also_behind_rabbitmq
def test_a_worker_that_is_killed(stage: KeyScene, subtests: pytest.Subtests) -> None:
    node = stage.worker(concurrency=len(MOMENTS))
    rows = {moment: stage.row().freezes(moment) for moment in MOMENTS}
    for row in rows.values():
        row.call()
        row.reached("freeze")
    in_line = stage.row()
    in_line.call()
    time.sleep(0.3)

    node.kill()
    stage.worker(concurrency=4)

    for moment, row in rows.items():
        words, runs, effects = MOMENTS[moment]
        with subtests.test(moment):
            row.call()
            row.verdict(f"SIGKILL of the worker {words}", runs=runs, effects=effects, seen="2 equal results")
    with subtests.test("in line"):
        in_line.verdict("SIGKILL of the worker while it waits there in line", seen="1 result")


# Leases


def test_a_worker_that_stands_still_for_longer_than_its_lease(stage: KeyScene) -> None:
    row = stage.row().held()
    first = stage.worker(concurrency=1)
    row.call()
    row.reached("start")

    os.killpg(first.pid, signal.SIGSTOP)
    row.open_gate()
    stage.worker(concurrency=1)
    row.becomes("done")
    os.killpg(first.pid, signal.SIGCONT)

    first.wait_for("claim.lost", within=20)
    # Nobody can hold back what another process does outside.
    row.verdict(
        "A worker stands still for longer than its lease, another one takes over, and it goes on",
        runs=2,
        effects=2,
        seen="1 result",
    )


def test_a_worker_that_stands_still_with_a_task_that_must_not_run_twice(stage: KeyScene) -> None:
    row = stage.row("pay_at_most_once").held()
    first = stage.worker(concurrency=1)
    row.call()
    row.reached("start")

    os.killpg(first.pid, signal.SIGSTOP)
    row.open_gate()
    stage.worker(concurrency=1)
    stage.dies(row.id, of="process_died")
    os.killpg(first.pid, signal.SIGCONT)

    # It was only thought to be gone, and what it did is done; the letter stays for a person to see.
    row.becomes("done")
    row.verdict(
        'A worker stands still for longer than its lease, another one comes, and it goes on, on_crash="bury"',
        seen="1 result",
        note="a dead letter",
    )


def test_a_process_that_stands_still_for_longer_than_its_lease(quiet: KeyScene) -> None:
    row = quiet.row().freezes("start")
    row.call()
    process = row.reached("freeze")

    try:
        time.sleep(LEASE * 1.2)
        # Nothing is heard of the call, so it is sent once more, under its own id.
        assert row.call().duplicate is True
        row.becomes("done")
    finally:
        os.kill(process, signal.SIGCONT)

    row.reached("effect", times=2)
    row.verdict(
        "The task's process stands still for longer than the lease, it is called again, and goes on",
        runs=2,
        effects=2,
        seen="2 equal results",
    )


# Deliveries


def test_a_message_that_is_delivered_twice_while_it_runs(quiet: KeyScene) -> None:
    row = quiet.row().held()
    deliver = row.message()
    deliver()
    row.reached("start")

    deliver()
    row.open_gate(after=1)

    row.verdict("The same message twice, the second while the first runs", seen="1 result")


def test_a_message_that_is_delivered_twice_and_must_not_run_twice(quiet: KeyScene) -> None:
    row = quiet.row("pay_at_most_once").held()
    deliver = row.message()
    deliver()
    row.reached("start")

    deliver()
    row.open_gate(after=1)

    row.verdict('The same message twice, the second while the first runs, on_crash="bury"', seen="1 result")
    assert not [letter for letter in quiet.letters if letter.note.id == row.id]


def test_a_message_that_is_delivered_again_when_it_is_done(quiet: KeyScene) -> None:
    row = quiet.row()
    deliver = row.message()
    deliver()
    row.becomes("done")

    deliver()

    row.verdict("The same message again when it is done", seen="1 result")


# Again


@pytest.mark.parametrize(("task", "words"), [("pay_the_third_time", "fails"), ("pay_when_awake", "snoozes")])
def test_a_call_that_is_put_off_keeps_its_key(quiet: KeyScene, task: str, words: str) -> None:
    row = quiet.row(task)
    row.call()
    row.reached("start")

    assert row.call().duplicate is True
    row.verdict(f"It {words} twice, and is called again meanwhile", runs=3, seen="2 equal results")


#: When its process is killed, in words; where, and which of its runs is held.
AROUND_A_RETRY = {
    "before its {} is sent": ("after waiting", 3),
    "when its {} is sent, which so is sent twice": ("published", 3),
    "when its {} is sent, and comes again while that runs": ("published", 2),
}


@pytest.mark.parametrize(("task", "words"), [("pay_the_third_time", "retry"), ("pay_when_awake", "snooze")])
def test_processes_that_are_killed_around_a_retry(
    quiet: KeyScene, subtests: pytest.Subtests, task: str, words: str
) -> None:
    rows = {when: quiet.row(task).held(run).dies(moment) for when, (moment, run) in AROUND_A_RETRY.items()}
    for row in rows.values():
        row.call()
    for row, (_, run) in zip(rows.values(), AROUND_A_RETRY.values(), strict=True):
        row.reached("start", times=run)
    time.sleep(LEASE)

    for when, row in rows.items():
        row.open_gate()
        with subtests.test(when):
            assert row.call().duplicate is True
            row.verdict(f"SIGKILL of the task's process {when.format(words)}", runs=3, seen="2 equal results")


@also_behind_rabbitmq
def test_a_retry_that_cannot_be_sent(stage: KeyScene) -> None:
    node = stage.worker()
    row = stage.row("pay_the_third_time").held(1)
    row.call()
    row.reached("start")

    with away(stage.broker):
        row.open_gate()
        node.wait_for("could not be sent", within=20)

    row.verdict("The broker is away when its retry is sent", runs=3, seen="1 result", within=60)


# Who else calls


def test_calls_by_name_have_keys(quiet: KeyScene) -> None:
    row = quiet.row().held()
    for _ in range(2):
        row.calls(lambda: quiet.shop.app.send_task(row.task.name, kwargs=row.kwargs))

    row.open_gate(after=1)
    row.verdict("send_task, twice", seen="2 equal results")


def test_calls_of_a_stock_app_have_keys(quiet: KeyScene) -> None:
    row = quiet.row().held()
    with celery.Celery(set_as_current=False, broker=quiet.broker.url, backend=quiet.state_server.backend_url) as stock:
        for _ in range(2):
            sent: Any = stock.send_task(row.task.name, kwargs=row.kwargs, queue=quiet.broker.queue)
            row.gets(row.task.AsyncResult(sent.id))
        row.call()

        row.open_gate(after=1)
        row.verdict("A stock app, twice, and our own", seen="3 equal results")


def test_many_calls_at_once_have_keys(quiet: KeyScene) -> None:
    row = quiet.row()
    for result in row.task.enqueue_many([row.kwargs] * 3):
        row.gets(result)

    row.verdict("enqueue_many with the same call three times", seen="3 equal results")


# Canvas


@pytest.mark.parametrize(("task", "words"), [("pay", ""), ("pay_at_most_once", ', on_crash="bury"')])
def test_a_chord_with_the_same_call_twice_completes(quiet: KeyScene, task: str, words: str) -> None:
    row = quiet.row(task).held()
    body = chord([row.task.s(**row.kwargs), row.task.s(**row.kwargs)], quiet.shop.total.s()).apply_async()
    for member in body.parent.results:
        row.gets(member)

    row.open_gate(after=1)
    assert body.get(timeout=30) == 1
    row.verdict(f"A chord with the same call twice: its body gets both{words}", seen="2 equal results")


def test_a_chord_whose_member_is_killed_when_it_is_counted(stage: KeyScene) -> None:
    node = stage.worker()
    row, other = stage.row().freezes("stored"), stage.row().held()
    body = chord([row.task.s(**row.kwargs), other.task.s(**other.kwargs)], stage.shop.total.s()).apply_async()
    row.gets(body.parent.results[0])
    row.reached("freeze")
    other.reached("start")

    node.kill()
    stage.worker()
    row.call()
    other.open_gate()

    assert body.get(timeout=30) == 2
    row.verdict(
        "SIGKILL of the worker when a chord has counted the result: its body gets it once", seen="2 equal results"
    )


def test_a_chain_with_the_same_call_twice_goes_on(quiet: KeyScene) -> None:
    row = quiet.row()
    last = chain(row.task.si(**row.kwargs), row.task.si(**row.kwargs), row.task.si(**row.kwargs)).apply_async()
    for result in (last.parent.parent, last.parent, last):
        row.gets(result)

    row.verdict("A chain with the same call three times goes on to its end", seen="3 equal results")


def test_a_group_with_the_same_call_twice_completes(quiet: KeyScene) -> None:
    row = quiet.row().held()
    for result in group([row.task.s(**row.kwargs), row.task.s(**row.kwargs)]).apply_async().results:
        row.gets(result)

    row.open_gate(after=1)
    row.verdict("A group with the same call twice", seen="2 equal results")


def test_what_a_call_leads_to_is_done_once(quiet: KeyScene) -> None:
    row = quiet.row().dies("stored")
    follower = f"after-{row.number}"
    row.call_with(link=quiet.shop.follow.si(number=follower))

    row.reached("die")
    row.verdict("SIGKILL of the task's process when it has sent its callback, which is sent again", seen="1 result")
    assert quiet.ledger.count("followed", follower) == 1


# Failures


def test_a_key_whose_call_has_failed_is_free(quiet: KeyScene) -> None:
    row = quiet.row("pay_if_cured").held()
    row.call()
    row.reached("start")
    row.call()
    row.open_gate()
    row.becomes("failed")

    row.cure()
    assert row.call().duplicate is False
    row.verdict("It fails, with two calls; then a third one", runs=2, seen="1 result, 2 RuntimeError")


def test_a_dead_letter_whose_key_is_done_is_not_run(quiet: KeyScene) -> None:
    row = quiet.row("pay_if_cured")
    failed = row.call()
    quiet.dies(failed.id, of="failed")
    row.cure()
    row.call()
    row.becomes("done")

    [refusal] = quiet.shop.app.dead_letters.replay(id=failed.id).refusals
    assert refusal.why.startswith("superseded")
    row.verdict(
        "A dead letter is replayed whose key was done by another call since",
        runs=2,
        seen="1 result, RuntimeError",
        note="refused: superseded",
    )


def test_a_dead_letter_whose_key_is_done_is_not_run_by_force_either(quiet: KeyScene) -> None:
    row = quiet.row("pay_if_cured")
    failed = row.call()
    quiet.dies(failed.id, of="failed")
    row.cure()
    row.call()
    row.becomes("done")

    quiet.shop.app.dead_letters.replay(id=failed.id, force=True)

    quiet.ends_as("SUCCESS", failed.id)
    row.verdict(
        "A dead letter is replayed by force whose key was done by another call since",
        runs=2,
        seen="2 equal results",
    )


def test_a_dead_letter_is_replayed_with_its_key(quiet: KeyScene) -> None:
    row = quiet.row("pay_if_cured")
    failed = row.call()
    quiet.dies(failed.id, of="failed")
    row.cure()

    quiet.shop.app.dead_letters.replay(id=failed.id)
    quiet.ends_as("SUCCESS", failed.id)

    assert row.call().duplicate is True
    row.verdict("A dead letter is replayed, and then it is called again", runs=2, seen="2 equal results")


def test_a_call_that_is_revoked_frees_its_key(quiet: KeyScene) -> None:
    row = quiet.row()
    revoked = row.call_with(countdown=2)
    quiet.shop.app.control.revoke(revoked.id)
    quiet.ends_as("REVOKED", revoked.id)
    row.becomes("free")

    assert row.call().duplicate is False
    row.verdict("It is revoked, and then called again", seen="1 result, revoked")


def test_a_call_that_expires_frees_its_key(quiet: KeyScene) -> None:
    row = quiet.row()
    expired = row.call_with(countdown=2, expires=1)
    assert row.call().duplicate is True
    quiet.ends_as("REVOKED", expired.id)
    row.becomes("failed")

    assert row.call().duplicate is False
    row.verdict("It expires, with two calls; then a third one", seen="1 result, 2 revoked")


# Beats

#: From the end of one leader to the first tick of the next: its lease, that of a tick it had claimed, a look, and what
#: a busy machine takes.
TAKEN_OVER = 2 * LEASE + 3

BEATS = {
    "": "between two ticks",
    "die after tick": "when it has claimed a tick, before that is sent",
    "die published": "when it has sent a tick, before that is noted",
}


@pytest.mark.parametrize("fate", BEATS)
def test_of_two_beats_one_is_killed(quiet: KeyScene, fate: str) -> None:
    ticks = quiet.ticks()
    with ExitStack() as stack:
        first = stack.enter_context(quiet.beat(fate=fate))
        first.wait_for("beat.leads", within=20)
        second = stack.enter_context(quiet.beat())
        if not fate:
            second.wait_for("beat.stands_by", within=20)
            first.kill()
        assert first.process.wait(20) == -signal.SIGKILL
        second.wait_for("beat.leads", within=20)
        ticks.pass_by(3)
        assert second.stop()

    ticks.verdict(f"SIGKILL of one of two beats, {BEATS[fate]}", longest=TAKEN_OVER)


def test_of_two_beats_one_stands_still_with_a_tick(quiet: KeyScene) -> None:
    ticks = quiet.ticks()
    with ExitStack() as stack:
        first = stack.enter_context(quiet.beat(fate="freeze after tick"))
        first.wait_for("beat.leads", within=20)
        second = stack.enter_context(quiet.beat())
        second.wait_for("beat.leads", within=20)
        ticks.pass_by(3)
        first.process.send_signal(signal.SIGCONT)
        first.wait_for("beat.stands_by", within=20)
        ticks.pass_by(2)
        assert first.stop()
        assert second.stop()

    ticks.verdict("One of two beats stands still when it has claimed a tick, and goes on", longest=TAKEN_OVER)


# The store is away


@pytest.mark.timeout(120)
def test_a_store_that_is_away_when_it_is_sent_and_started(stage: KeyScene, subtests: pytest.Subtests) -> None:
    stage.worker()
    retried, run, failed, refused = (
        stage.row(task) for task in ("pay", "pay_all_the_same", "pay_or_fail", "pay_or_fail")
    )
    for row in (retried, run, failed):
        assert row.state == "free"
    with away(stage.keep):
        assert retried.call().duplicate is None
        assert run.call().duplicate is None
        # With an id of its own it is not claimed by its caller, but where it runs.
        failed.call_with(task_id=f"id-{failed.number}")
        refused.call()
        run.reached("effect")
        stage.ends_as("FAILURE", f"id-{failed.number}")
        assert not retried.count("start")

    with subtests.test("retry"):
        assert retried.call() is not None
        retried.verdict("The store is away when it is sent and started, and then back", seen="2 equal results")
    with subtests.test("run"):
        run.verdict('The store is away when it is sent and started, on_store_down="run"', key="free", seen="1 result")
    with subtests.test("fail"):
        words = 'The store is away when it is {}, on_store_down="fail"'
        refused.verdict(words.format("sent"), runs=0, effects=0, key="free", seen="StoreUnavailable")
        failed.verdict(words.format("started"), runs=0, effects=0, key="free", seen="StoreUnavailable")


@pytest.mark.timeout(120)
def test_a_store_that_goes_away_after_the_effect_and_comes_back(stage: KeyScene) -> None:
    stage.worker()
    row = stage.row().held()
    row.call()
    row.reached("start")
    with away(stage.keep, seconds=1):
        row.open_gate()
        row.reached("effect")

    row.becomes("done")
    assert row.call().duplicate is True
    row.verdict("The store goes away while it runs, and is back within two seconds of its end", seen="2 equal results")


@pytest.mark.timeout(120)
def test_a_store_that_goes_away_after_the_effect_and_stays_away(stage: KeyScene) -> None:
    node = stage.worker()
    row = stage.row().held()
    first = row.call()
    row.reached("start")
    with away(stage.keep):
        row.open_gate()
        stage.ends_as("SUCCESS", first.id)
        assert "claim.not_recorded" in node.log
        row.call()
        assert row.count("start") == 1

    row.becomes("done")
    row.verdict("The store goes away while it runs, and is back long after its end", seen="2 equal results")


# Many


@pytest.mark.timeout(400)
def test_ten_thousand_keys_under_eight_kills(stage: KeyScene) -> None:
    many = stage.many("stamp", 10_000)
    many.send()
    for kill in range(1, 9):
        node = stage.worker(concurrency=2)
        many.reach(kill * 1_100)
        node.kill()
    stage.worker(concurrency=2)

    # Two run at a time, and a kill may find both between their effect and its record.
    many.verdict("10,000 keys under eight SIGKILLs of a worker", most_again=16)


def test_keys_do_not_leak(quiet: KeyScene) -> None:
    many = quiet.many("pay_and_forget", 50)
    many.send()
    many.send()
    many.reach(50)

    time.sleep(2.5)
    quiet.sweep()

    many.verdict("Two seconds after keys were done that are kept for two", key="free")
