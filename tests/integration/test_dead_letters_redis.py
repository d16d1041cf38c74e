"""Dead letters in lists of Valkey: atomic moves, many operators, many letters."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from typing import Any

import kombu
import pytest
from kombu.transport import redis as kombu_redis

from celerykit.dead_letters import letter_id
from celerykit.dev.servers import Server
from celerykit.letters import bury
from tests import services
from tests.integration import graveyard
from tests.integration.graveyard import fill, ids, letter, sent, started

celerys_warning = pytest.mark.filterwarnings("ignore:Call to deprecated setex")


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with services.valkey() as server:
        yield server


@pytest.fixture
def app(valkey: Server) -> Any:
    app = graveyard.make(valkey.url, valkey.backend_url)
    with app.connection_for_write() as connection:
        connection.default_channel.client.flushall()
    return app


def client_of(app: Any) -> Any:
    return app.connection_for_write().channel().client


def test_what_is_private_of_kombu_is_as_we_know_it():
    """When this fails, read `celerykit.letter_queues.redis` beside the new Kombu, then add its version."""
    assert kombu.__version__.startswith("5.7."), f"Kombu {kombu.__version__} was not tried with dead letters"
    for name in ("_q_for_pri", "_get_message_priority", "_inplace_augment_message", "prepare_message"):
        assert callable(getattr(kombu_redis.Channel, name))
    assert kombu_redis.Channel.global_keyprefix == ""
    assert kombu_redis.Channel.priority_steps == [0, 3, 6, 9]


def test_replayed_message_is_what_kombu_would_have_written(app: Any):
    bury(app, letter(1))
    app.dead_letters.replay()
    ours = json.loads(client_of(app).lpop("work"))

    app.send_task("graveyard.dig", (1,), queue="work")
    theirs = json.loads(client_of(app).lpop("work"))

    assert ours.keys() == theirs.keys()
    assert ours["properties"].keys() <= theirs["properties"].keys()
    assert ours["properties"]["delivery_info"] == theirs["properties"]["delivery_info"]


@pytest.mark.parametrize("options", [{"global_keyprefix": "shop:"}, {"priority_steps": [0, 5]}, {"sep": ":"}])
def test_keys_are_kombus(app: Any, valkey: Server, options: dict[str, Any]):
    other = graveyard.make(valkey.url.replace("/0", "/3") if "/0" in valkey.url else valkey.url)
    other.conf.broker_transport_options = options
    fill(other, range(3), priority=7)

    assert ids(other) == [0, 1, 2]
    assert other.dead_letters.replay().replayed == 3
    assert [message.headers["id"] for message in sent(other)] == ["0", "1", "2"]
    assert other.dead_letters.count() == 0


def test_priority_goes_with_the_message(app: Any):
    for number, priority in enumerate([9, 0, 4]):
        bury(app, letter(number, priority=priority))

    app.dead_letters.replay()

    assert [message.headers["id"] for message in sent(app)] == ["1", "2", "0"]
    assert [message.properties["priority"] for message in sent(app)] == []


def test_new_letters_do_not_disturb_a_walk(app: Any):
    fill(app, range(5))
    walk = app.dead_letters.find()

    first = next(walk).note.id
    fill(app, range(5, 10))

    assert first == "0"
    assert [int(found.note.id) for found in walk][:4] == [1, 2, 3, 4]
    assert ids(app) == [*range(10)]


def test_walk_finds_its_place_when_others_take_letters_away(app: Any, monkeypatch: pytest.MonkeyPatch):
    """Those behind it, around it, and all that it remembers."""
    monkeypatch.setattr("celerykit.letter_queues.redis.RedisQueue._CHUNK", 1)
    fill(app, range(100))
    walk = app.dead_letters.find()

    seen = [int(next(walk).note.id) for _ in range(30)]
    app.dead_letters.purge(id=[str(number) for number in (*range(5, 30), 35, 50)])
    seen += [int(found.note.id) for found in walk]

    # Those of the chunk that was at hand may have gone since.
    assert [number for number in seen if number != 35] == [number for number in range(100) if number not in (35, 50)]


def test_same_garbage_twice_ends_a_walk(app: Any):
    client_of(app).lpush("dead_letters", *["garbage"] * 50, "more")

    assert {found.body for found in app.dead_letters.find()} == {b"garbage", b"more"}


def test_garbage_among_letters_is_a_letter(app: Any):
    fill(app, range(2))
    client_of(app).lpush("dead_letters", b"\xff\x00 no envelope")
    fill(app, range(2, 4))

    found = [(letter_.note.id, letter_.note.reason) for letter_ in app.dead_letters.find()]

    assert [reason for _, reason in found] == ["failed", "failed", "malformed", "failed", "failed"]
    assert app.dead_letters.replay().replayed == 4
    assert app.dead_letters.purge(reason="malformed") == 1


@pytest.mark.timeout(120)
def test_killed_in_the_middle_of_a_replay_loses_and_doubles_nothing(app: Any, valkey: Server):
    fill(app, range(300))

    for _ in range(3):
        other = graveyard.elsewhere(
            "app.dead_letters.replay(on_progress=lambda report: print(report.total, flush=True))", url=valkey.url
        )
        for line in other.stdout:
            if int(line) >= 50:
                break
        other.send_signal(signal.SIGKILL)
        other.communicate(timeout=20)

    left = len(ids(app))
    assert 0 < left < 200
    assert app.dead_letters.replay().replayed == left
    assert sorted(int(message.headers["id"]) for message in sent(app)) == [*range(300)]


@pytest.mark.timeout(120)
def test_operators_do_not_trip_over_each_other(app: Any, valkey: Server):
    fill(app, range(600))

    others = [
        graveyard.elsewhere(
            "report = app.dead_letters.replay(); print(report.replayed, report.refused)", url=valkey.url
        )
        for _ in range(3)
    ]
    counts = [[int(number) for number in graveyard.outcome(other).split()] for other in others]

    assert sum(replayed for replayed, _ in counts) == 600
    assert sum(refused for _, refused in counts) == 0
    assert sorted(started(app)) == [*range(600)]
    assert ids(app) == []


@celerys_warning
def test_quick_worker_keeps_its_outcome(app: Any, monkeypatch: pytest.MonkeyPatch):
    """It ends between the sending of a call and the forgetting of its former failure."""
    from celerykit.letter_queues.redis import RedisQueue

    send = RedisQueue.send

    def send_and_run(queue: Any, held: Any, message: Any) -> bool:
        was_sent = send(queue, held, message)
        app.backend.store_result("1", 7, "SUCCESS")
        return was_sent

    monkeypatch.setattr(RedisQueue, "send", send_and_run)
    bury(app, letter(1))
    app.backend.store_result("1", ValueError("x"), "FAILURE")

    app.dead_letters.replay()

    assert app.AsyncResult("1").get(timeout=1) == 7


@celerys_warning
def test_who_comes_second_forgets_nothing(app: Any, monkeypatch: pytest.MonkeyPatch):
    from celerykit.letter_queues.redis import RedisQueue

    monkeypatch.setattr(RedisQueue, "send", lambda *_: False)
    bury(app, letter(1))
    app.backend.store_result("1", ValueError("again"), "FAILURE")

    assert app.dead_letters.replay().skipped == 1
    assert app.AsyncResult("1").state == "FAILURE"


MANY = 100_000

STREAM = """
import psutil
def rss(): return psutil.Process().memory_info().rss
print(next(app.dead_letters.find()).note.id)
before = rss()
print(sum(1 for _ in app.dead_letters.find()), rss() - before)
print(app.dead_letters.replay(limit=2000, dry_run=True).replayed, rss() - before)
"""


@pytest.mark.timeout(240)
def test_hundred_thousand_letters_in_little_memory(app: Any, valkey: Server):
    bury(app, letter(0, traceback="x\n" * 500))
    client = client_of(app)
    item = client.lpop("dead_letters").decode()
    with client.pipeline(transaction=False) as pipe:
        for number in range(MANY):
            pipe.lpush("dead_letters", item.replace(letter_id("0", 1, 0), letter_id(str(number), 1, 0)))
            if number % 2000 == 1999:
                pipe.execute()

    began = time.monotonic()
    _, *rows = graveyard.outcome(graveyard.elsewhere(STREAM, url=valkey.url), within=200).splitlines()

    counts, grown = zip(*(map(int, row.split()) for row in rows), strict=True)
    assert counts == (MANY, 2000)
    assert max(grown) < 40e6, f"{max(grown) / 1e6:.0f} MB more, after {time.monotonic() - began:.0f} s"


def test_large_letters_do_not_come_all_at_once(app: Any, valkey: Server):
    fill(app, range(60), headers={"big": "x" * 1_000_000})

    code = "import psutil; b = psutil.Process().memory_info().rss; n = sum(1 for _ in app.dead_letters.find())"
    code += "; print(n, psutil.Process().memory_info().rss - b)"
    count, grown = map(int, graveyard.outcome(graveyard.elsewhere(code, url=valkey.url)).split())

    assert count == 60
    assert grown < 50e6
