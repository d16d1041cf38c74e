"""
What goes back later.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from kombu.transport.native_delayed_delivery import calculate_routing_key

from celerykit.worker.returns import Returns, undelayed


class Qos:
    def __init__(self) -> None:
        self.value = 1

    def increment_eventually(self) -> None:
        self.value += 1

    def decrement_eventually(self) -> None:
        self.value -= 1


@pytest.fixture
def consumer() -> Any:
    timer = SimpleNamespace(waiting=[])
    timer.call_after = lambda seconds, call: timer.waiting.append((seconds, call))
    transport = SimpleNamespace(driver_type="redis")
    return SimpleNamespace(qos=Qos(), timer=timer, connection=SimpleNamespace(transport=transport), qos_global=False)


def test_a_message_is_held_and_another_may_come_in_its_place(consumer: Any) -> None:
    done: list[str] = []
    returns = Returns(consumer)

    returns.give_back(
        None, reject=lambda requeue: done.append("back"), acknowledge=lambda: done.append("acknowledged"), after=5
    )

    [(seconds, let_go)] = consumer.timer.waiting
    assert (seconds, consumer.qos.value, done) == (5, 2, [])
    let_go()
    assert (consumer.qos.value, done) == (1, ["back"])


def test_the_room_goes_back_to_the_connection_that_made_it(consumer: Any) -> None:
    before = consumer.qos
    Returns(consumer).give_back(None, reject=lambda requeue: None, acknowledge=lambda: None)

    consumer.qos = Qos()
    consumer.timer.waiting[0][1]()

    assert (before.value, consumer.qos.value) == (1, 1)


def test_a_flood_does_not_fill_the_worker(consumer: Any) -> None:
    returns = Returns(consumer)

    for _ in range(500):
        returns.give_back(None, reject=lambda requeue: None, acknowledge=lambda: None)

    assert consumer.qos.value == 101


@pytest.mark.parametrize("key", ["celery", "a.b.1.0", None])
def test_a_delay_is_taken_off_a_routing_key(key: Any) -> None:
    assert undelayed(key) == key
    assert key is None or undelayed(calculate_routing_key(90, key)) == key
