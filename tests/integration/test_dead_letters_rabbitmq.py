"""Dead letters on RabbitMQ: held and given back, confirmed and then acknowledged, one operator at a time."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from celerykit.errors import EnqueueError, LettersLocked
from celerykit.letter_queues import declare
from celerykit.letters import DeadLetters, bury
from tests import services
from tests.integration import graveyard
from tests.integration.graveyard import fill, ids, letter, sent, started

pytestmark = pytest.mark.timeout(150)


@pytest.fixture(scope="module")
def rabbitmq() -> Iterator[services.RabbitMQ]:
    with services.rabbitmq() as broker:
        yield broker


@pytest.fixture
def app(rabbitmq: services.RabbitMQ) -> Any:
    app = graveyard.make(rabbitmq.url, "cache+memory://")
    with app.connection_for_write() as connection:
        for queue in ("dead_letters", "work"):
            connection.channel().queue_delete(queue)
    return app


def test_looking_at_letters_a_hundred_times_keeps_them(app: Any):
    """Each look counts as a delivery, and a queue with a limit of them drops what was looked at too often."""
    fill(app, range(3))

    for _ in range(100):
        assert sorted(ids(app)) == [0, 1, 2]


def test_queue_that_an_operator_made_is_taken_as_it_is(app: Any):
    with app.connection_for_write() as connection:
        connection.channel().queue_declare("dead_letters", durable=True, auto_delete=False)

    fill(app, range(3))

    assert ids(app) == [0, 1, 2]


def test_queue_that_is_gone_is_noticed_and_made_again(app: Any):
    """RabbitMQ confirms what it has no queue for."""
    bury(app, letter(1))
    with app.connection_for_write() as connection:
        connection.channel().queue_delete("dead_letters")

    with pytest.raises(EnqueueError):
        bury(app, letter(2))
    bury(app, letter(2))

    assert ids(app) == [2]


@pytest.mark.parametrize("size", [20_000, 100_000, 128_000])
def test_headers_stay_within_a_frame(app: Any, size: int):
    huge = letter(1, headers={"mine": "x" * size}, traceback="y\n" * 20_000, message="z" * 20_000)

    bury(app, huge)

    [found] = app.dead_letters.find()
    assert found.headers == huge.headers
    assert found.note.reason == "failed"


def test_letter_outlives_the_broker(app: Any, rabbitmq: services.RabbitMQ):
    fill(app, range(3))

    rabbitmq.stop()
    rabbitmq.start()

    services.eventually(lambda: app.dead_letters.count() == 3, within=20)


def test_bad_letters_hide_no_good_ones(app: Any):
    fill(app, range(2))
    bury(app, letter(2, headers={"compression": "application/x-gzip"}))
    with app.connection_for_write() as connection:
        connection.Producer().publish(b"\xff", routing_key="dead_letters", content_type="application/json")
    fill(app, range(4, 6))

    assert [found.note.id for found in app.dead_letters.find()] == ["0", "1", "2", None, "4", "5"]
    report = app.dead_letters.replay()

    assert (report.replayed, report.refused) == (4, 2)
    assert sorted(started(app)) == [0, 1, 4, 5]


def test_expired_messages_that_rabbitmq_sends_here_are_letters(app: Any):
    with app.connection_for_write() as connection:
        declare(connection, "dead_letters")
        arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead_letters", "x-message-ttl": 1}
        connection.channel().queue_declare("short", arguments=arguments, auto_delete=False)
        headers = {"task": "graveyard.dig", "id": "1"}
        connection.Producer().publish([[1], {}, {}], routing_key="short", headers=headers)

    services.eventually(lambda: app.dead_letters.count() == 1)
    [found] = app.dead_letters.find()

    assert (found.note.reason, found.note.task) == ("expired", "graveyard.dig")
    assert abs(found.note.died_at - time.time()) < 60


def test_more_letters_than_are_sent_at_a_time(app: Any):
    fill(app, range(1000))

    assert ids(app) == [*range(1000)]
    assert app.dead_letters.count() == 1000
    assert app.dead_letters.count(id=["3", "999"]) == 2
    assert app.dead_letters.replay(id=[str(number) for number in range(0, 1000, 2)]).replayed == 500
    assert app.dead_letters.purge(until=time.time()) == 500
    assert sorted(started(app)) == [*range(0, 1000, 2)]


def test_letters_that_are_held_too_long_are_fetched_anew(app: Any, monkeypatch: pytest.MonkeyPatch):
    """RabbitMQ closes the channel of who keeps one for half an hour."""
    monkeypatch.setattr("celerykit.letter_queues.published.AMQPQueue._LONGEST", 0.05)
    fill(app, range(20))
    report = app.dead_letters.replay(
        id=[str(number) for number in range(10)], on_progress=lambda _: time.sleep(0.02), edit=lambda *_: ([5], {})
    )

    assert (report.replayed, report.refused, report.skipped) == (10, 0, 0)
    assert sorted(started(app)) == [*range(10)]
    assert sorted(ids(app)) == [*range(10, 20)]


def test_second_operator_waits_or_is_told(app: Any, rabbitmq: services.RabbitMQ):
    fill(app, range(200))
    first = graveyard.elsewhere(
        "walk = app.dead_letters.find(); next(walk); print('walking', flush=True); input(); walk.close()",
        url=rabbitmq.url,
    )
    assert first.stdout.readline() == "walking\n"

    with pytest.raises(LettersLocked, match="Somebody else"):
        DeadLetters(app, lock_within=0.3).count()
    second = graveyard.elsewhere("print(app.dead_letters.replay().replayed)", url=rabbitmq.url)
    time.sleep(1.0)
    graveyard.outcome(first, "go on\n")

    assert graveyard.outcome(second) == "200\n"


def test_lock_ends_with_its_owner(app: Any, rabbitmq: services.RabbitMQ):
    fill(app, range(10))
    first = graveyard.elsewhere(
        "walk = app.dead_letters.find(); next(walk); print('walking', flush=True); input()", url=rabbitmq.url
    )
    first.stdout.readline()

    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=20)

    assert sorted(ids(app)) == [*range(10)]


#: Ends between the confirm of the fifth copy and the acknowledgement of its letter.
DIE = """
import os, signal
from celerykit.letter_queues.published import AMQPQueue
remove, left = AMQPQueue.remove, iter(range(4))
def remove_or_die(*args):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return remove(*args)
AMQPQueue.remove = remove_or_die
app.dead_letters.replay()
"""


def test_killed_between_copy_and_acknowledgement_loses_and_doubles_nothing(app: Any, rabbitmq: services.RabbitMQ):
    fill(app, range(20))

    for _ in range(2):
        other = graveyard.elsewhere(DIE, url=rabbitmq.url)
        assert other.wait(timeout=30) == -signal.SIGKILL
        other.communicate()

    assert len(ids(app)) == 12
    assert app.dead_letters.replay().replayed == 12
    messages = [*sent(app)]
    assert len(messages) == 22
    assert len({message.headers["id"] for message in messages}) == 20
    assert len({message.headers["celerykit"]["replayed_by"].partition("/")[0] for message in messages}) == 20


def test_queue_of_origin_is_made_when_it_is_gone(app: Any):
    bury(app, letter(1))

    assert app.dead_letters.replay().replayed == 1
    assert started(app) == [1]


def test_edited_letter_takes_the_place_of_the_old_one(app: Any):
    fill(app, range(3))

    app.dead_letters.edit("1", lambda *_: ([7], {}))

    assert sorted(ids(app)) == [0, 1, 2]
    app.dead_letters.replay(id="1")
    assert [message.payload[0] for message in sent(app)] == [[7]]


def test_oldest_are_evicted_whatever_their_place(app: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(app.settings.kit.__dict__, "dead_letter_max", 3)
    now = time.time()
    for number, age in enumerate([50, 10, 40, 20, 30]):
        bury(app, letter(number, died_at=now - age))

    assert app.dead_letters.evict() == 2
    assert sorted(ids(app)) == [1, 3, 4]
