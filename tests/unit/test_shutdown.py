"""
How a worker ends: what is used of Celery's and billiard's own business, and what may still start.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import billiard
import celery
import pytest
from billiard import pool as processes
from celery.concurrency import asynpool, prefork, solo, thread
from celery.worker import state

from celerykit.worker import shutdown


def test_the_versions_whose_private_parts_are_used_are_known() -> None:
    """On another version: run tests/integration/test_shutdown.py, and compare what is named here with what it has."""
    assert cast("Any", celery).__version__.startswith("5.7."), "Celery's pool may close differently"
    assert cast("Any", billiard).__version__.startswith("4.3."), "billiard's jobs may be sent differently"


def test_what_is_used_of_the_pool_is_there() -> None:
    pool, job = cast("Any", asynpool.AsynPool), cast("Any", processes).ApplyResult

    assert prefork.TaskPool.Pool is pool
    assert all(hasattr(pool, name) for name in ("flush", "_flush_writer"))
    assert all(hasattr(job, name) for name in ("accepted", "discard", "_write_to"))


def test_threads_and_the_main_thread_cannot_be_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not shutdown.can_cut_off(thread.TaskPool(1))
    assert not shutdown.can_cut_off(solo.TaskPool(1))

    pool: Any = shutdown.TaskPool(1)
    # As `on_start` does.
    monkeypatch.setattr(pool, "terminate_job", processes.Pool.terminate_job, raising=False)
    assert shutdown.can_cut_off(pool)


@pytest.mark.parametrize("flag", ["should_stop", "should_terminate"])
def test_nothing_starts_once_the_worker_is_to_end(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    consumer = SimpleNamespace(controller=SimpleNamespace())
    assert shutdown.may_start(consumer)

    monkeypatch.setattr(state, flag, 0)
    assert not shutdown.may_start(consumer)


def test_a_pool_that_a_signal_interrupted_is_not_stopped_there(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []
    monkeypatch.setattr(prefork.TaskPool, "on_stop", lambda self: stopped.append("stopped"))
    pool: Any = shutdown.TaskPool(1)

    pool.is_interrupted = True
    pool.stop()
    assert stopped == []

    pool.terminate()
    assert stopped == ["stopped"]
