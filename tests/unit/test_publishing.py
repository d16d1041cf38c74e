"""
The deadline of a publish, and what is said when it has passed.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from time import monotonic

import pytest
from amqp.exceptions import PreconditionFailed
from kombu.transport import TRANSPORT_ALIASES

from celerykit import connections, deadline
from celerykit.deadline import DeadlinePassed, DeadlineSocket
from celerykit.publishing import explain_precondition, transport_options


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_the_deadline_further_out_is_the_one_that_counts() -> None:
    with deadline.within(0.2) as outer, deadline.within(60) as inner:
        assert inner.until == outer.until
    with deadline.within(60) as outer, deadline.within(0.2) as inner:
        assert inner.until < outer.until


def test_without_a_deadline_a_wait_is_as_long_as_it_was() -> None:
    assert deadline.left(None) is None
    assert deadline.left(7.0) == 7.0


def test_a_wait_is_cut_to_what_is_left() -> None:
    with deadline.within(0.5):
        assert 0 < (deadline.left(None) or 0) <= 0.5
        assert deadline.left(0.1) == 0.1


def test_what_passed_is_no_wait_at_all() -> None:
    with deadline.within(-1), pytest.raises(DeadlinePassed):
        deadline.left(None)


def test_a_part_of_it_may_pass_and_leave_the_rest() -> None:
    def wait_for_it() -> None:
        while True:
            deadline.left(None)

    with deadline.within(0.1):
        with pytest.raises(TimeoutError), deadline.share_of(2):
            wait_for_it()
        assert deadline.left(None)
        with pytest.raises(DeadlinePassed), deadline.share_of(1):
            wait_for_it()


def test_a_socket_keeps_to_the_deadline_and_else_to_its_timeout(pair: tuple[socket.socket, socket.socket]) -> None:
    ours = DeadlineSocket(pair[0])
    ours.settimeout(0.05)

    with deadline.within(0.02), pytest.raises(DeadlinePassed):
        ours.recv(1)
    with deadline.within(60), pytest.raises(TimeoutError):
        ours.recv(1)
    with pytest.raises(TimeoutError):
        ours.recv(1)
    assert ours.gettimeout() == 0.05


def test_bytes_one_by_one_do_not_prolong_it(pair: tuple[socket.socket, socket.socket]) -> None:
    ours = DeadlineSocket(pair[0])
    started = monotonic()

    def read_for_ever() -> None:
        while True:
            pair[1].sendall(b"x")
            ours.recv(1)

    with deadline.within(0.1), pytest.raises(DeadlinePassed):
        read_for_ever()

    assert monotonic() - started < 1


def test_only_the_message_itself_marks_it_as_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    ours = DeadlineSocket(pair[0])

    with deadline.within(60) as outer, deadline.within(60) as publish:
        ours.sendall(b"preparation")
        assert not publish.sent
        with deadline.leaving():
            with deadline.leaving(False):
                ours.sendall(b"connect anew")
            assert not publish.sent
            ours.sendall(b"message")
        assert publish.sent
        assert outer.sent


def test_kombu_does_not_nap_beyond_the_deadline() -> None:
    error = ConnectionRefusedError("refused")
    deadline.stop_in_time(error, 3600)
    with deadline.within(1):
        deadline.stop_in_time(error, 0.1)
        with pytest.raises(DeadlinePassed, match="refused"):
            deadline.stop_in_time(error, 2)


@pytest.mark.parametrize("scheme", ["redis", "rediss", "sentinel", "amqp", "amqps", "pyamqp"])
def test_connections_know_how_to_end_waits_of_redis_and_rabbitmq(scheme: str) -> None:
    assert connections.keeps_to_deadline(connections.Connection(f"{scheme}://localhost"))


def test_other_transports_stay_as_they_are() -> None:
    connection = connections.Connection("memory://")

    assert not connections.keeps_to_deadline(connection)
    assert f"{connection.get_transport_cls().__module__}:Transport" == TRANSPORT_ALIASES["memory"]


def test_a_transport_that_is_not_known_still_stops_trying_in_time() -> None:
    assert transport_options("sqs://", wait=1) == {"errback": deadline.stop_in_time}


def test_what_was_declared_differently_is_named() -> None:
    error = PreconditionFailed("PRECONDITION_FAILED - inequivalent arg 'type' for exchange 'mail' in vhost '/': …")

    assert explain_precondition(error).startswith("The exchange 'mail' was declared differently")
    assert explain_precondition(PreconditionFailed("who knows")).startswith("It was declared differently")
