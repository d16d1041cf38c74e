"""
Publishing ends, in seconds, whatever the broker and the result backend do.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import kombu.exceptions
import pytest
from celery import chain, chord, group
from celery.signals import before_task_publish

from celerykit import CeleryKit, EnqueueError
from celerykit.bulk import PartlySent
from tests import services

#: `CELERYKIT_PUBLISH_DEADLINE` in these tests, and what a call may take at the most on a busy machine, in seconds.
DEADLINE, AT_MOST = 1.0, 2.0


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Celery lets it win over what an app is given.
    monkeypatch.delenv("CELERY_BROKER_URL", raising=False)
    monkeypatch.delenv("CELERY_RESULT_BACKEND", raising=False)


def app_at(broker: str, *, backend: str | None = None, **settings: Any) -> CeleryKit:
    return CeleryKit(
        "unreachable", broker=broker, backend=backend, publish_deadline=DEADLINE, set_as_current=False, **settings
    )


def task_of(app: CeleryKit) -> Any:
    @app.task(name="ping", ignore_result=False, shared=False)
    def ping(n: int = 0) -> int:
        return n

    return ping


@contextmanager
def ends_soon() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < AT_MOST


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process where it stands."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def dribbling(port: int, *, seconds: float) -> Iterator[int]:
    """Give a port that leads to *port*, and lets one byte through every so many seconds on the way back."""
    listener = socket.create_server(("127.0.0.1", 0))

    def lead() -> None:
        while True:
            try:
                here = listener.accept()[0]
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=pump, args=(here, there, 65536, 0), daemon=True).start()
            threading.Thread(target=pump, args=(there, here, 1, seconds), daemon=True).start()

    def pump(source: socket.socket, sink: socket.socket, size: int, pause: float) -> None:
        try:
            while data := source.recv(size):
                time.sleep(pause)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            # Left to the collector it would be a warning, and so an error.
            source.close()

    threading.Thread(target=lead, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_refuses_is_an_error_that_says_so(scheme: str) -> None:
    with services.refused() as port:
        ping = task_of(app_at(f"{scheme}://guest:hunter2@127.0.0.1:{port}//"))
        with ends_soon(), pytest.raises(EnqueueError, match=r"ping: the broker at .* was not sent") as error:
            ping.delay()

    assert isinstance(error.value, kombu.exceptions.OperationalError)
    assert error.value.may_have_been_sent is False  # type: ignore[attr-defined]
    assert "CELERY_BROKER_URL" in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_never_answers_does_not_hang_the_caller(scheme: str) -> None:
    with services.frozen() as port:
        ping = task_of(app_at(f"{scheme}://guest@127.0.0.1:{port}//"))
        with ends_soon(), pytest.raises(EnqueueError, match=r"no answer within 1 s.*was not sent"):
            ping.delay()
        with ends_soon(), pytest.raises(EnqueueError):
            ping.s().apply_async()


def test_an_async_caller_is_not_blocked_by_a_broker_that_never_answers() -> None:
    async def call(ping: Any) -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        with pytest.raises(EnqueueError):
            await ping.adelay()
        ticking.cancel()
        return ticks

    with services.frozen() as port, ends_soon():
        assert asyncio.run(call(task_of(app_at(f"redis://127.0.0.1:{port}/0")))) > 10


def test_many_calls_say_that_none_was_sent() -> None:
    with services.refused() as port:
        ping = task_of(app_at(f"redis://127.0.0.1:{port}/0"))
        with ends_soon(), pytest.raises(PartlySent, match="of 3 calls, 0 were sent") as error:
            ping.enqueue_many([(1,), (2,), (3,)])

    assert (error.value.sent, len(error.value.uncertain)) == ([], 0)


def test_many_calls_say_which_were_sent_when_the_broker_dies_midway() -> None:
    with services.valkey() as server:
        ping = task_of(app_at(server.url))
        sent = 0

        def kill_after_600(**_: Any) -> None:
            nonlocal sent
            sent += 1
            if sent == 600:
                server.kill()

        before_task_publish.connect(kill_after_600, sender="ping")
        try:
            with ends_soon(), pytest.raises(PartlySent, match="of 1200 calls, 500 were sent") as error:
                ping.enqueue_many([(n,) for n in range(1200)])
        finally:
            before_task_publish.disconnect(kill_after_600, sender="ping")

    assert len(error.value.sent) == 500
    # The connection was found closed before anything of the second batch was written.
    assert error.value.uncertain == []


@pytest.mark.parametrize("behaviour", [services.refused, services.frozen])
def test_a_dead_result_backend_does_not_stop_publishing(behaviour: Any) -> None:
    with services.valkey() as server, behaviour() as port:
        ping = task_of(app_at(server.url, backend=f"redis://127.0.0.1:{port}/0"))
        with ends_soon():
            ping.delay(1)
            ping.enqueue_many([(1,), (2,)])


def test_a_valkey_that_freezes_between_two_publishes_does_not_hang_the_caller() -> None:
    with services.valkey() as server:
        ping = task_of(app_at(server.url, backend=server.backend_url))
        ping.delay()
        assert server.pid
        with stopped(server.pid), ends_soon(), pytest.raises(EnqueueError):
            ping.delay()
        ping.delay()


def test_a_broker_that_answers_byte_by_byte_does_not_prolong_the_wait() -> None:
    with services.valkey(port=0) as server, dribbling(urlsplit(server.url).port or 0, seconds=0.02) as port:
        ping = task_of(app_at(f"redis://127.0.0.1:{port}/0"))
        with ends_soon(), pytest.raises(EnqueueError, match="was not sent"):
            ping.delay()


def test_what_was_written_before_the_broker_died_may_have_been_sent() -> None:
    with services.valkey(port=0) as server:
        ping = task_of(app_at(server.url))
        ping.delay()
        assert server.pid
        os.kill(server.pid, signal.SIGSTOP)
        threading.Timer(0.3, server.kill).start()
        with ends_soon(), pytest.raises(EnqueueError, match="may or may not have been sent") as error:
            ping.delay()
        assert error.value.may_have_been_sent is True  # type: ignore[attr-defined]
        with ends_soon(), pytest.raises(EnqueueError, match="was not sent"):
            ping.delay()

        server.start()
        ping.delay()


def test_no_retry_policy_outlasts_the_deadline() -> None:
    never = {"max_retries": None, "interval_start": 30, "interval_step": 30, "interval_max": 600}
    with services.refused() as port:
        app = app_at(f"redis://127.0.0.1:{port}/0", task_publish_retry_policy=never)
        ping = task_of(app)
        with ends_soon(), pytest.raises(EnqueueError):
            ping.delay()
        with ends_soon(), pytest.raises(EnqueueError):
            ping.apply_async(retry=False)
        with ends_soon(), pytest.raises(EnqueueError):
            app.send_task("foreign", retry_policy=never)


@pytest.mark.parametrize("behaviour", [services.refused, services.frozen])
def test_a_broker_that_is_silent_leaves_time_for_the_next_one(behaviour: Any) -> None:
    # Kombu cannot go on to a Unix socket.
    with services.valkey(port=0) as server, behaviour() as port:
        ping = task_of(app_at(f"redis://127.0.0.1:{port}/0;{server.url}"))
        with ends_soon():
            ping.delay()


def test_canvas_ends_as_one_call_does() -> None:
    with services.valkey() as server:
        ping = task_of(app_at(server.url, backend=server.backend_url))
        ping.delay()
        calls = [
            chain(ping.si(), ping.si()).apply_async,
            group(ping.si(), ping.si()).apply_async,
            lambda: ping.enqueue_many([(1,)] * 3),
        ]
        assert server.pid
        with stopped(server.pid):
            for call in calls:
                with ends_soon(), pytest.raises(EnqueueError):
                    call()
        for call in calls:
            call()


@pytest.mark.parametrize("behaviour", [services.refused, services.frozen])
def test_a_group_needs_no_result_backend_to_be_sent_and_a_chord_says_that_it_does(behaviour: Any) -> None:
    with services.valkey() as server, behaviour() as port:
        ping = task_of(app_at(server.url, backend=f"redis://127.0.0.1:{port}/0"))
        with ends_soon():
            group(ping.si(), ping.si()).apply_async()
            chain(ping.si(), ping.si()).apply_async()
        with ends_soon(), pytest.raises(EnqueueError, match="a chord: the result backend"):
            chord([ping.si(), ping.si()], ping.si()).apply_async()


def test_waiting_for_a_free_connection_counts() -> None:
    with services.valkey() as server:
        app = app_at(server.url, broker_pool_limit=1)
        ping = task_of(app)
        for pool in (app.producer_pool, app.pool):
            with pool.acquire(block=True):
                with ends_soon(), pytest.raises(EnqueueError, match="1 connections to it were in use"):
                    ping.delay()
                with ends_soon(), pytest.raises(EnqueueError):
                    group(ping.si(), ping.si()).apply_async()
            ping.delay()


def test_a_producer_of_one_s_own_works_again_after_the_broker_froze() -> None:
    with services.valkey() as server:
        app = app_at(server.url)
        ping = task_of(app)
        with app.connection_for_write() as connection:
            producer = app.amqp.Producer(connection, auto_declare=False)
            ping.apply_async(producer=producer, retry=False)
            assert server.pid
            with stopped(server.pid), ends_soon(), pytest.raises(EnqueueError):
                ping.apply_async(producer=producer, retry=False)
            ping.apply_async(producer=producer, retry=False)


@pytest.mark.timeout(120)
def test_a_rabbitmq_that_freezes_between_two_publishes_does_not_hang_the_caller() -> None:
    with services.rabbitmq() as broker:
        ping = task_of(app_at(broker.url))
        ping.delay()
        assert broker.pid
        with stopped(broker.pid), ends_soon(), pytest.raises(EnqueueError):
            ping.delay()
        ping.delay()
