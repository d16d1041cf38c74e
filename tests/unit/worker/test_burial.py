"""
A message is acknowledged when its letter is written, and not before.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from celerykit import letters
from celerykit.dead_letters import Letter
from celerykit.errors import EnqueueError
from celerykit.worker import burial
from celerykit.worker.burial import Undertaker
from celerykit.worker.ending import Ending
from celerykit.worker.returns import Returns
from celerykit.worker.starts import Starts, buried_key

FAILED = Ending("failed", error="ValueError", message="boom", traceback="Traceback …")


class Cemetery:
    """Stands for the queue of dead letters, which may not be there at first."""

    def __init__(self) -> None:
        self.letters: list[Letter] = []
        self.failures = 0

    def bury(self, app: Any, letter: Letter) -> None:
        if self.failures:
            self.failures -= 1
            raise EnqueueError("the broker is away")
        self.letters.append(letter)


@pytest.fixture
def cemetery(monkeypatch: pytest.MonkeyPatch) -> Cemetery:
    cemetery = Cemetery()
    monkeypatch.setattr(letters, "bury", cemetery.bury)
    monkeypatch.setattr(burial, "_SHORTEST_PAUSE", 0.01)
    return cemetery


@pytest.fixture
def undertaker(app: Any) -> Undertaker:
    starts = Starts(app.store, limit=3, keep=60)
    undertaker = Undertaker(app, worker="w1", starts=starts, returns=Returns(consumer=None))
    undertaker._evicts_at = float("inf")
    return undertaker


def message(**headers: Any) -> Any:
    return SimpleNamespace(
        headers={"task": "t", "id": "1", **headers},
        body=b"[[], {}, {}]",
        errors=[],
        properties={"priority": 3, "correlation_id": "1"},
        delivery_info={"exchange": "", "routing_key": "celery"},
        content_type="application/json",
        content_encoding="utf-8",
    )


def test_the_letter_is_the_message_and_a_note(undertaker: Undertaker, cemetery: Cemetery) -> None:
    ours = {"v": 1, "attempt": 3, "queue": "slow", "sent_at": 5.0, "replay": 1}
    undertaker.bury_message(message(celerykit=ours, group="g"), FAILED, then=lambda: None, chord=None)

    [letter] = cemetery.letters
    note = letter.note
    assert (letter.body, letter.headers["celerykit"]) == (b"[[], {}, {}]", ours)
    assert (note.task, note.id, note.reason, note.error, note.message) == ("t", "1", "failed", "ValueError", "boom")
    assert (note.attempts, note.queue, note.sent_at, note.replay, note.chord) == (3, "slow", 5.0, 1, "g")
    assert (note.worker, note.priority, note.routing_key) == ("w1", 3, "celery")


def test_it_is_acknowledged_after_that(undertaker: Undertaker, cemetery: Cemetery) -> None:
    seen: list[int] = []

    undertaker.bury_message(message(), FAILED, then=lambda: seen.append(len(cemetery.letters)), chord=None)

    assert seen == [1]


def test_the_store_knows_what_is_buried(undertaker: Undertaker, cemetery: Cemetery, app: Any) -> None:
    undertaker.bury_message(message(), FAILED, then=lambda: None, chord=None)

    assert app.store.get(buried_key(cemetery.letters[0].id)) == "failed"


def test_a_letter_that_cannot_be_written_is_tried_again_and_nothing_acknowledged_until_then(
    undertaker: Undertaker, cemetery: Cemetery
) -> None:
    done = threading.Event()
    cemetery.failures = 3

    undertaker.bury_message(message(), FAILED, then=done.set, chord=None)

    assert not done.is_set()
    assert done.wait(5)
    assert len(cemetery.letters) == 1


def test_a_message_that_comes_again_meanwhile_is_what_is_acknowledged(
    undertaker: Undertaker, cemetery: Cemetery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(burial, "_SHORTEST_PAUSE", 0.2)
    first, second = threading.Event(), threading.Event()
    cemetery.failures = 1
    undertaker.bury_message(message(), FAILED, then=first.set, chord=None)

    again: Any = SimpleNamespace(message=message(), acknowledge=second.set)

    assert undertaker.is_waiting(again)
    assert second.wait(5)
    assert not first.is_set()
    assert not undertaker.is_waiting(again)


def test_what_is_buried_is_told_once_it_is(
    undertaker: Undertaker, cemetery: Cemetery, caplog: pytest.LogCaptureFixture
) -> None:
    ours = {"v": 1, "attempt": 3, "queue": "slow", "context": {"correlation_id": "a-request"}}
    cemetery.failures = 1

    done = threading.Event()
    undertaker.bury_message(message(celerykit=ours, root_id="root"), FAILED, then=done.set, chord=None)
    assert done.wait(5)

    [not_written, dead] = caplog.records
    assert str(not_written.msg).startswith("dead_letter.not_written task=t id=1 reason=failed")
    assert dead.name == "celerykit.task"
    assert dead.data == {  # type: ignore[attr-defined]
        "task": "t",
        "id": "1",
        "root_id": "root",
        "attempt": 3,
        "queue": "slow",
        "reason": "failed",
        "error": "ValueError",
        "error_fingerprint": cemetery.letters[0].note.fingerprint,
        "letter": cemetery.letters[0].id,
        "correlation_id": "a-request",
    }
    assert "boom" not in caplog.text


def test_what_is_not_even_a_message_is_kept_as_it_is(undertaker: Undertaker, cemetery: Cemetery) -> None:
    undertaker.bury_item("celery", b"\x80 nonsense", ValueError("no JSON"))

    [letter] = cemetery.letters
    assert (letter.body, letter.note.queue, letter.note.reason) == (b"\x80 nonsense", "celery", "malformed")


def test_an_item_that_cannot_be_kept_is_said_to_go_back(undertaker: Undertaker, cemetery: Cemetery) -> None:
    cemetery.failures = 1

    with pytest.raises(EnqueueError):
        undertaker.bury_item("celery", b"nonsense", ValueError())
