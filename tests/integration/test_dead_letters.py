"""From a task that fails to its repaired replay, with a real worker, on both brokers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import celery
import kombu
import pytest

from celerykit.dev.servers import Server
from tests import services

pytestmark = pytest.mark.timeout(150)

PROJECT = """
from pathlib import Path
from celery import chord
from celerykit import CeleryKit

app = CeleryKit("mine", set_as_current=False)
here = Path(__file__).parent

@app.task(name="mine.dig", shared=False)
def dig(depth: int) -> int:
    if not (here / "repaired").exists():
        raise OSError(f"broken spade at {depth}")
    with (here / "effects").open("a") as effects:
        effects.write(f"{depth}\\n")
    return depth

@app.task(name="mine.total", shared=False)
def total(depths: list[int]) -> int:
    return sum(depths)
"""


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with services.valkey() as server:
        yield server


@pytest.fixture(scope="module", params=["valkey", "rabbitmq"])
def url(request: pytest.FixtureRequest, valkey: Server) -> Iterator[str]:
    if request.param == "valkey":
        yield valkey.url
    else:
        with services.rabbitmq() as broker:
            yield broker.url


@pytest.fixture
def mine(url: str, valkey: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "mine_project.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}")
    env = {
        "CELERY_BROKER_URL": url,
        "CELERY_RESULT_BACKEND": valkey.backend_url,
        # What a killed worker left behind is not the next test's.
        "CELERY_TASK_DEFAULT_QUEUE": f"work-{uuid4()}",
        "CELERYKIT_DEAD_LETTER_QUEUE": f"dead-{uuid4()}",
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "mine_project", raising=False)
    import mine_project

    with services.worker("mine_project", url=url, env=env, cwd=tmp_path, concurrency=2):
        yield mine_project


def effects(mine: Any) -> list[str]:
    path = mine.here / "effects"
    return sorted(path.read_text().split()) if path.exists() else []


def buried(mine: Any, count: int) -> list[Any]:
    services.eventually(lambda: mine.app.dead_letters.count() >= count, within=20)
    return list(mine.app.dead_letters.find())


def dead(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "celerykit", "dead", "-A", "mine_project", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_failed_calls_are_found_repaired_and_replayed_once(mine: Any):
    results = [mine.dig.delay(depth) for depth in range(5)]
    letters = buried(mine, 5)
    assert {(letter.note.reason, letter.note.error) for letter in letters} == {("failed", "OSError")}
    [cause] = json.loads(dead("top", "--json").stdout)
    assert cause["count"] == 5
    assert mine.dig.AsyncResult(results[0].id).state == "FAILURE"

    (mine.here / "repaired").touch()
    done = dead("replay", "--fingerprint", cause["fingerprint"], "--rate", "50/s")

    assert done.stdout == "5 replayed, 0 refused.\n", done.stderr
    assert sorted(result.get(timeout=20) for result in results) == [*range(5)]
    assert effects(mine) == [str(depth) for depth in range(5)]
    assert mine.app.dead_letters.count() == 0


def test_payload_that_does_not_fit_is_edited(mine: Any):
    (mine.here / "repaired").touch()
    result = send_unchecked(mine, "deep")
    [letter] = buried(mine, 1)
    assert letter.note.reason == "invalid_payload"
    assert dead("replay", "--all").returncode == 1

    done = dead("edit", letter.id, "--set", "depth=9", "--replay")

    assert done.returncode == 0, done.stderr
    assert result.get(timeout=20) == 9


def send_unchecked(mine: Any, depth: Any) -> Any:
    """As a producer would that knows nothing of contracts."""
    stock = celery.Celery(broker=mine.app.conf.broker_url, set_as_current=False)
    name = mine.app.conf.task_default_queue
    queue = kombu.Queue(name, kombu.Exchange(""), routing_key=name, no_declare=True)
    sent = stock.send_task("mine.dig", (depth,), queue=queue)
    return mine.dig.AsyncResult(sent.id)


def test_second_replay_of_one_letter_changes_nothing(mine: Any):
    """Its sender died between the copy and the letter's removal, twice; the worker runs one copy."""
    mine.dig.delay(1)
    [letter] = buried(mine, 1)
    (mine.here / "repaired").touch()

    from celerykit.letters import bury

    mine.app.dead_letters.replay()
    for _ in range(2):
        bury(mine.app, letter)
        mine.app.dead_letters.replay()
    services.eventually(lambda: effects(mine) == ["1"], within=20)
    mine.dig.delay(2).get(timeout=20)

    assert effects(mine) == ["1", "2"]


def test_replayed_letter_that_dies_again_is_another_letter(mine: Any):
    mine.dig.delay(1)
    [first] = buried(mine, 1)

    mine.app.dead_letters.replay()
    services.eventually(lambda: [x.note.replay for x in mine.app.dead_letters.find()] == [1], within=20)

    [second] = mine.app.dead_letters.find()
    assert second.id != first.id
    assert second.note.id == first.note.id


def test_replayed_member_of_a_chord_runs_alone(mine: Any):
    from celery import chord

    chord([mine.dig.s(1)], mine.total.s()).apply_async()
    services.eventually(lambda: mine.app.dead_letters.count(task="mine.dig") == 1, within=20)
    (mine.here / "repaired").touch()

    assert mine.app.dead_letters.replay(task="mine.dig").replayed == 1

    services.eventually(lambda: effects(mine) == ["1"], within=20)
    # Its body lacks the results, and waits for somebody who knows them.
    services.eventually(lambda: mine.app.dead_letters.count(reason="chord_failed") == 1, within=20)
