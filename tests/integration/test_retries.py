"""
Policies, on a real worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord
from celery.exceptions import MaxRetriesExceededError

from celerykit.dev.servers import Server
from tests import services
from tests.integration.conftest import ROOT

SHOP = "tests.integration.retry_shop"


@pytest.fixture(scope="module")
def shop(broker: Server, environment: dict[str, str]) -> Iterator[Any]:
    from tests.integration import retry_shop

    retry_shop.app.conf.update(broker_url=broker.url, result_backend=broker.backend_url, task_default_queue="retries")
    environment = {**environment, "CELERY_TASK_DEFAULT_QUEUE": "retries"}
    with services.worker(SHOP, url=broker.url, env=environment, concurrency=2, cwd=ROOT):
        yield retry_shop


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return tmp_path / "notes"


def runs(notes: Path) -> int:
    return notes.read_text().count("\n")


def letter_of(shop: Any, task_id: str) -> Any:
    [letter] = shop.app.dead_letters.find(id=task_id)
    return letter


def test_a_task_is_tried_again_until_it_succeeds(shop: Any, notes: Path) -> None:
    assert shop.charge.delay(notes, 3).get(timeout=10) == 3


def test_when_its_attempts_are_used_up_it_is_dead(shop: Any, notes: Path) -> None:
    result = shop.charge.delay(notes, 9)

    with pytest.raises(ConnectionError):
        result.get(timeout=10)

    assert runs(notes) == 3
    services.eventually(lambda: any(shop.app.dead_letters.find(id=result.id)))
    note = letter_of(shop, result.id).note
    assert (note.reason, note.attempts, note.error, note.queue) == ("failed", 3, "ConnectionError", "retries")
    assert [(row.outcome, row.error) for row in note.ledger] == [("retry", note.fingerprint)] * 2
    assert all(row.waited >= 0 and row.ran >= 0 and row.started for row in note.ledger)


@pytest.mark.parametrize("error", ["Declined", "KeyError"])
def test_the_most_specific_class_says_what_follows(shop: Any, notes: Path, error: str) -> None:
    result = shop.charge.delay(notes, 9, error)

    with pytest.raises(LookupError if error == "KeyError" else ConnectionError):
        result.get(timeout=10)

    assert runs(notes) == 1
    if error == "KeyError":  # dropped: there will be no letter
        shop.doubled.delay(1).get(timeout=10)
        assert list(shop.app.dead_letters.find(id=result.id)) == []
    else:
        services.eventually(lambda: any(shop.app.dead_letters.find(id=result.id)))


def test_the_app_s_policy_is_that_of_tasks_that_have_none(shop: Any, notes: Path) -> None:
    shop.by_the_app_s_policy.delay(notes).get(timeout=10, propagate=False)

    assert runs(notes) == 2


def test_a_task_can_refuse_the_app_s_policy(shop: Any, notes: Path) -> None:
    shop.without_a_policy.delay(notes).get(timeout=10, propagate=False)

    assert runs(notes) == 1


def test_a_snooze_is_no_attempt(shop: Any, notes: Path) -> None:
    seen = shop.snoozing.delay(notes, 6).get(timeout=10)

    assert "attempt" not in seen["header"]
    assert [row[3] for row in seen["header"]["ledger"]] == ["snooze"] * 6
    assert seen["retries"] == 6


def test_celery_s_own_retry_counts_as_an_attempt(shop: Any, notes: Path) -> None:
    with pytest.raises(ValueError, match="by hand"):
        shop.by_hand.delay(notes).get(timeout=10)

    assert runs(notes) == 2


def test_max_retries_keeps_celery_s_meaning(shop: Any, notes: Path) -> None:
    assert shop.by_hand_more_often.delay(notes).get(timeout=10) == 3


def test_what_was_said_of_a_call_holds_for_its_retries(shop: Any, notes: Path) -> None:
    seen = shop.described.apply_async(
        (notes, "4111"), argsrepr="('…', '***')", time_limit=30, priority=3, headers={"tenant": "acme"}
    ).get(timeout=10)

    assert seen["argsrepr"] == "('…', '***')"
    assert seen["timelimit"] == [30, None]
    assert (seen["priority"], seen["custom"]) == (3, "acme")
    assert seen["header"]["attempt"] == 2
    assert "4111" not in str(seen)


def test_chains_and_chords_go_on_after_a_retry(shop: Any, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"

    assert chain(shop.charge.s(a, 2), shop.doubled.s()).apply_async().get(timeout=10) == 4
    assert chord([shop.charge.s(b, 2), shop.doubled.s(5)], shop.total.s()).apply_async().get(timeout=10) == 12


def test_a_task_that_was_tried_again_can_be_replaced(shop: Any, notes: Path) -> None:
    assert shop.replaced.delay(notes).get(timeout=10) == 42


def test_a_dead_member_takes_its_chord_s_body_along(shop: Any) -> None:
    body = shop.total.s()
    result = chord([shop.doubled.s(1), shop.broken.s(2)], body).apply_async()

    with pytest.raises(Exception, match="number 2"):
        result.get(timeout=10)

    member, kept = sorted(find_both(shop, result.id), key=lambda letter: letter.note.reason, reverse=True)
    assert (member.note.reason, member.note.task) == ("failed", shop.broken.name)
    assert (kept.note.reason, kept.note.id) == ("chord_failed", result.id)
    assert member.note.chord == kept.note.chord is not None


def find_both(shop: Any, body_id: str) -> list[Any]:
    found: list[Any] = []

    def are_there() -> bool:
        bodies = list(shop.app.dead_letters.find(id=body_id))
        found[:] = [
            letter
            for letter in shop.app.dead_letters.find()
            if bodies and letter.note.chord == bodies[0].note.chord is not None
        ]
        return len(found) == 2

    services.eventually(are_there, what=lambda: f"member and body of {body_id}")
    return found


def test_a_rejected_message_is_kept(shop: Any) -> None:
    result = shop.rejects.delay()

    services.eventually(lambda: any(shop.app.dead_letters.find(id=result.id)))

    assert letter_of(shop, result.id).note.reason == "rejected"
    assert result.state == "FAILURE"


def test_max_retries_exceeded_is_celery_s_error(shop: Any) -> None:
    assert issubclass(shop.by_hand.MaxRetriesExceededError, MaxRetriesExceededError)


def test_a_retry_that_can_never_be_sent_ends_the_call(shop: Any, notes: Path) -> None:
    result = shop.asks_for_nonsense.delay(notes)

    with pytest.raises(Exception, match="nonsense"):
        result.get(timeout=10)

    assert runs(notes) == 1
    services.eventually(lambda: any(shop.app.dead_letters.find(id=result.id)))


# What a review found


@pytest.mark.parametrize("name", ["early", "raises_a_childs_limit", "raises_a_childs_loss", "plain"])
def test_no_end_of_a_task_escapes(shop: Any, notes: Path, name: str) -> None:
    """Handed back after an early ack; errors that another task's process died of; a task of Celery's own class."""
    task = getattr(shop, name)
    result = task.apply_async(() if name == "plain" else (str(notes),))

    services.eventually(lambda: any(shop.app.dead_letters.find(id=result.id)))

    assert result.state == "FAILURE"
    assert name == "plain" or runs(notes) == 1
    assert shop.doubled.delay(21).get(timeout=10) == 42


def test_headers_of_its_own_do_not_keep_a_retry_from_counting(shop: Any, notes: Path) -> None:
    result = shop.with_headers_of_its_own.delay(notes)

    services.eventually(lambda: any(shop.app.dead_letters.find(id=result.id)))

    assert runs(notes) == 3


def test_a_message_whose_stamps_make_no_sense_takes_no_place_in_the_pool(shop: Any) -> None:
    for _ in range(3):
        shop.doubled.apply_async((1,), headers={"stamped_headers": [["a"]], "stamps": {}})

    assert shop.doubled.delay(21).get(timeout=10) == 42
    assert shop.doubled.delay(21).get(timeout=10) == 42


def test_one_id_can_be_used_for_many_calls(shop: Any, notes: Path) -> None:
    for _ in range(2):
        shop.doubled.apply_async((1,), task_id="the same").get(timeout=10)
    result = shop.charge.apply_async((notes, 3), task_id="the same")

    services.eventually(lambda: notes.exists() and runs(notes) == 3)
    services.eventually(lambda: result.state == "SUCCESS")
