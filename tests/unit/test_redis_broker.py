"""What is used of Kombu's Redis transport, and what a worker holds."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import kombu
import pytest
from kombu.transport import redis as stock

from celerykit.redis_broker import KNOWN, Garbage, Hold, guard, known, whats_unknown
from celerykit.redis_broker.channel import Channel
from celerykit.worker.leases import Leases


def test_this_kombu_is_one_that_leases_were_made_for() -> None:
    version = getattr(kombu, "__version__", "?")

    assert not whats_unknown(), (
        f"Kombu {version}: {whats_unknown()}. Workers fall back to Celery's visibility timeout. Compare "
        "kombu/transport/redis.py with that of a version in celerykit.redis_broker.KNOWN, run "
        "tests/faults/test_leases.py, and add the version there."
    )


def test_a_kombu_that_is_not_known_is_left_as_it_is_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(known, "KNOWN", {(4, 0)})
    connection = kombu.Connection("redis://:hush@nowhere.invalid//")

    with caplog.at_level(logging.WARNING):
        assert guard(connection, Hold(lease=30)) is connection

    assert "leases.off" in caplog.text
    assert "visibility_timeout" in caplog.text
    assert "hush" not in caplog.text


def test_a_kombu_that_lost_a_part_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(stock.Channel, "_brpop_read")

    assert "Channel._brpop_read" in whats_unknown()


@pytest.mark.parametrize(
    "url",
    ["redis://u:p@h:7/3", "rediss://h?ssl_cert_reqs=CERT_REQUIRED", "redis+socket:///s?virtual_host=2", "sentinel://h"],
)
def test_a_guarded_connection_is_one_to_the_same_place(url: str) -> None:
    class Mine(kombu.Connection):
        pass

    options = {"master_name": "m", "visibility_timeout": 9}
    connection: Any = Mine(url, transport_options=options, heartbeat=5)
    hold = Hold(lease=30)
    guarded = guard(connection, hold)

    assert isinstance(guarded, Mine)
    assert guarded.info() == connection.info()
    assert guarded.as_uri(include_password=True) == connection.as_uri(include_password=True)
    assert guarded.clone().hold is hold
    assert isinstance(guarded.transport, type(connection.transport))
    assert issubclass(guarded.transport.Channel, connection.transport.Channel)
    assert guarded.transport.Channel is not connection.transport.Channel


def test_a_guarded_connection_switches_to_other_brokers() -> None:
    guarded = guard(kombu.Connection("redis://one;redis://two;memory://"), Hold(lease=30))
    guarded.maybe_switch_next()

    assert guarded.hostname == "two"
    assert guarded.get_transport_cls().Channel.__mro__[1] is Channel
    guarded.maybe_switch_next()
    assert guarded.get_transport_cls() is kombu.Connection("memory://").get_transport_cls()


def test_connections_to_other_brokers_are_left_as_they_are() -> None:
    connection = kombu.Connection("memory://")
    leases = Leases(timedelta(seconds=30))

    assert leases.guard(connection) is connection
    leases.follow(connection)
    leases.stop()


def test_a_hold_lists_what_is_held_oldest_first() -> None:
    hold = Hold(lease=30)
    for tag in "abc":
        hold.take(tag, by="connection")

    assert hold.drop("b")
    assert not hold.drop("b")
    assert hold.tags() == ["a", "c"]


def test_what_came_by_a_lost_connection_goes_back_unless_it_runs() -> None:
    running = {"runs"}
    hold = Hold(lease=30, running=lambda: running)
    for tag in ("first", "runs", "last"):
        hold.take(tag, by="old")
    hold.take("new", by="new")

    hold.leave("new")
    assert hold.tags() == ["first", "runs", "last", "new"], "what ends at this moment is not acknowledged yet"
    hold.leave("new")

    assert hold.tags() == ["runs", "new"]
    assert list(hold.unwanted) == ["last", "first"]
    running.clear()
    hold.leave("new")
    hold.drop("runs")
    hold.leave("new")
    assert list(hold.unwanted) == ["last", "first"], "it was acknowledged"


def test_garbage_that_nobody_takes_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    taken: list[Any] = []

    def fails(*_: Any) -> None:
        raise OSError("away")

    assert Hold(lease=1, on_garbage=lambda *item: taken.append(item)).hand_over("q", b"x", Garbage("no"))
    assert not Hold(lease=1).hand_over("q", b"x", Garbage("no"))
    assert not Hold(lease=1, on_garbage=fails).hand_over("q", b"hush", Garbage("no"))
    assert [item[:2] for item in taken] == [("q", b"x")]
    assert "hush" not in caplog.text


def test_the_versions_that_are_known_are_those_celery_allows() -> None:
    assert (5, 7) in KNOWN
