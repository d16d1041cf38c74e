"""
How a message ends, and what becomes of it then.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from billiard.einfo import ExceptionInfo
from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from celery.exceptions import Ignore, Reject, Retry
from celery.worker import state

from celerykit.errors import InvalidPayload, TaskInterrupted
from celerykit.idempotency import Once, Turn
from celerykit.retry import DROPPED
from celerykit.worker.ending import Ending
from celerykit.worker.request import Request
from celerykit.worker.starts import MOST_FORGIVEN

#: Told by the pool, not by the task.
_OF_THE_POOL = (WorkerLostError, SystemExit, TimeLimitExceeded)


class Undertaker:
    """Notes what it is asked for, and buries at once."""

    def __init__(self) -> None:
        self.buried: list[Ending] = []
        self.handed_back: list[float] = []
        self.forgiven: list[Any] = []
        self.starts = SimpleNamespace(forgive=self.forgive, remember=lambda request: None)
        self.returns = SimpleNamespace(give_back=self.give_back)

    def bury(self, request: Any, ending: Ending, *, then: Any) -> None:
        self.buried.append(ending)
        then()

    def forgive(self, request: Any) -> int:
        self.forgiven.append(request)
        return len(self.forgiven)

    def give_back(self, message: Any, *, reject: Any, acknowledge: Any, after: float = 1.0) -> None:
        self.handed_back.append(after)


@pytest.fixture
def undertaker() -> Undertaker:
    return Undertaker()


@pytest.fixture
def task_id() -> str:
    """Not another test's: its result may still be in memory."""
    return str(uuid4())


@pytest.fixture
def make(app: Any, undertaker: Undertaker, task_id: str) -> Any:
    def make(*, headers: dict[str, Any] | None = None, **options: Any) -> Any:
        app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)

        def run() -> int:
            return 1

        app.tasks.pop("t", None)
        task = app.task(name="t", **options)(run)

        fates: list[str] = []
        message = SimpleNamespace(
            headers={"id": task_id, "task": "t", **(headers or {})},
            body=b"[[], {}, {}]",
            payload=[[], {}, {}],
            content_type="application/json",
            content_encoding="utf-8",
            delivery_info={},
            properties={},
            undertaker=undertaker,
        )
        made: Any = Request(
            message,
            app=app,
            task=task,
            on_ack=lambda *args: fates.append("acknowledged"),
            on_reject=lambda log, errors, requeue: fates.append("given back" if requeue else "rejected"),
        )
        made.fates = fates
        return made

    return make


def fails(request: Any, error: BaseException) -> None:
    try:
        raise error
    except type(error):
        # The pool says so of what the child could still report, and has stored.
        request.on_failure(ExceptionInfo(), return_ok=not isinstance(error, _OF_THE_POOL))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("boom"), "failed"),
        (InvalidPayload("no", "t"), "invalid_payload"),
        (InvalidPayload("no", "another"), "failed"),
        (SoftTimeLimitExceeded(), "time_limit"),
        (TaskInterrupted("exit"), "interrupted"),
        (MemoryError(), "interrupted"),
        (Reject("no", requeue=False), "rejected"),
    ],
)
def test_what_failed_is_buried_and_then_acknowledged(make: Any, undertaker: Any, error: Any, reason: str) -> None:
    request = make()

    fails(request, error)

    assert [ending.reason for ending in undertaker.buried] == [reason]
    assert request.fates == ["acknowledged"]


@pytest.mark.parametrize("error", [Retry(), Ignore()])
def test_a_retry_is_not_dead(make: Any, undertaker: Any, error: Any) -> None:
    request = make()

    fails(request, error)

    assert (undertaker.buried, request.fates) == ([], ["acknowledged"])


def test_what_is_dropped_leaves_no_letter(make: Any, undertaker: Any) -> None:
    request, error = make(), ValueError("boom")
    setattr(error, DROPPED, True)

    fails(request, error)

    assert (undertaker.buried, request.fates) == ([], ["acknowledged"])


def test_a_message_whose_process_died_goes_back(make: Any, undertaker: Any) -> None:
    request = make()

    fails(request, WorkerLostError("killed"))

    assert (undertaker.buried, request.fates) == ([], ["given back"])


def test_the_third_time_it_is_buried_as_a_failure(make: Any, undertaker: Any, app: Any, task_id: str) -> None:
    request = make()
    request.starts = 3

    fails(request, WorkerLostError("killed"))

    assert [(one.reason, one.error) for one in undertaker.buried] == [("process_died", "Undeliverable")]
    assert request.fates == ["acknowledged"]
    assert app.AsyncResult(task_id).state == "FAILURE"


def test_on_crash_bury_buries_at_once(make: Any, undertaker: Any) -> None:
    request = make(on_crash="bury")

    fails(request, WorkerLostError("killed"))

    assert [one.reason for one in undertaker.buried] == ["process_died"]
    assert request.fates == ["acknowledged"]


@pytest.mark.parametrize(("given_back", "is_buried"), [(0, False), (MOST_FORGIVEN, True)])
def test_what_its_claim_calls_done_goes_back_for_its_result_but_not_for_ever(
    make: Any, undertaker: Any, task_id: str, given_back: int, is_buried: bool
) -> None:
    request = make(on_crash="bury", once=Once())
    claims = request.task.claims
    running = claims.start(claims.identify((), {}, id=task_id), task_id, Turn(), token="t", joined=None, was_sent=False)
    claims.finish(running.run, 1)
    undertaker.forgiven += [None] * given_back

    fails(request, WorkerLostError("killed"))

    assert bool(undertaker.buried) is is_buried
    assert bool(undertaker.handed_back) is not is_buried


def test_a_success_that_was_stored_is_no_death(make: Any, undertaker: Any, app: Any, task_id: str) -> None:
    request = make()
    app.backend.store_result(task_id, 1, "SUCCESS")

    fails(request, WorkerLostError("killed"))

    assert (undertaker.buried, request.fates) == ([], ["acknowledged"])


def test_an_exit_of_the_child_is_a_death_of_its_process(make: Any, undertaker: Any) -> None:
    request = make(on_crash="bury")

    fails(request, SystemExit(1))

    assert [one.error for one in undertaker.buried] == ["WorkerLostError"]


def test_a_time_limit_is_told_once(make: Any, undertaker: Any, app: Any, task_id: str) -> None:
    request = make()
    request.time_start = 1.0

    fails(request, TimeLimitExceeded(1))

    assert (undertaker.buried, request.fates) == ([], [])  # billiard calls `on_timeout` right after
    request.on_timeout(soft=False, timeout=1)
    assert [one.reason for one in undertaker.buried] == ["time_limit"]
    assert request.fates == ["acknowledged"]
    assert app.AsyncResult(task_id).state == "FAILURE"


def test_what_asks_to_go_back_goes_back_later_and_its_start_does_not_count(make: Any, undertaker: Any) -> None:
    request = make()

    fails(request, Reject("the retry could not be sent", requeue=True))

    assert (undertaker.handed_back, undertaker.forgiven, request.fates) == ([1.0], [request], [])


def test_what_expired_is_buried_and_its_id_is_free_for_a_replay(
    make: Any, undertaker: Any, app: Any, task_id: str
) -> None:
    request = make(headers={"expires": "2020-01-01T00:00:00+00:00"})

    assert request.revoked()

    assert [one.reason for one in undertaker.buried] == ["expired"]
    assert request.fates == ["acknowledged"]
    assert task_id not in state.revoked
    assert app.AsyncResult(task_id).state == "REVOKED"


def test_what_is_revoked_is_not_dead(make: Any, undertaker: Any, task_id: str) -> None:
    request = make()
    state.revoked.add(task_id)
    try:
        assert request.revoked()
    finally:
        state.revoked.discard(task_id)

    assert (undertaker.buried, request.fates) == ([], ["acknowledged"])


def test_without_late_acks_a_failure_is_buried_all_the_same(make: Any, undertaker: Any) -> None:
    request = make(acks_late=False)

    fails(request, ValueError("boom"))

    assert [one.reason for one in undertaker.buried] == ["failed"]


def test_a_cancelled_start_does_not_count_unless_one_is_all_there_may_be(make: Any, undertaker: Any) -> None:
    pool: Any = SimpleNamespace(terminate_job=lambda *args: None)
    for on_crash in ("rerun", "bury"):
        request = make(on_crash=on_crash)
        request.time_start = 1.0
        request.cancel(pool, emit_retry=False)

    assert [one.task.on_crash for one in undertaker.forgiven] == ["rerun"]


def test_a_run_answers_for_a_later_delivery_of_its_message(make: Any, undertaker: Any) -> None:
    running, again = make(), make()
    assert running.is_same(again)

    running.take_over(again)
    running.acknowledge()

    assert (running.fates, again.fates) == ([], ["acknowledged"])
