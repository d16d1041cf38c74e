"""
The same calls on RabbitMQ, with every publish confirmed, quorum queues, and its own delayed delivery.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kombu
import pytest

from celerykit import CeleryKit, EnqueueError
from celerykit.dev.servers import Server
from celerykit.queues import Depth, look
from tests import services
from tests.integration.conftest import ROOT, SHOP

#: `CELERYKIT_PUBLISH_DEADLINE`, and what a call may take at the most on a busy machine, in seconds.
DEADLINE, AT_MOST = 1.5, 3.0

QUORUM = {
    "task_default_queue_type": "quorum",
    "task_default_exchange_type": "topic",
    "task_create_missing_queue_type": "quorum",
    "task_create_missing_queue_exchange_type": "topic",
}
CLASSIC = {
    "task_default_queue_type": "classic",
    "task_default_exchange_type": "direct",
    "task_create_missing_queue_type": "classic",
    "task_create_missing_queue_exchange_type": "direct",
}

#: A process of its own: the shop of this one is at Valkey.
DRIVE = """
from uuid import uuid4
from celery import chain, chord
from tests.integration.shop import *

order = Order(order_id=uuid4(), amount="1.50")
assert charge.delay(order).get(timeout=20).total == order.amount
assert chain(charge.s(order), mail.s("bob")).apply_async().get(timeout=20) == "1.50 EUR bob"
assert chord([charge.s(order)] * 3, turnover.s())().get(timeout=20) == 3 * order.amount
assert flaky.delay(order, b"x").get(timeout=20)[0] == 2
assert [r.get(timeout=20).currency for r in charge.enqueue_many([(order,)] * 20)] == ["EUR"] * 20
assert app.connection_for_write().transport_options["confirm_publish"] is True
print("all done")
"""


@pytest.fixture(scope="module")
def rabbitmq() -> Iterator[Any]:
    with services.rabbitmq() as broker:
        yield broker


@pytest.mark.timeout(150)
def test_typed_calls_run_on_rabbitmq(rabbitmq: Any, broker: Server) -> None:
    env = {"CELERY_BROKER_URL": rabbitmq.url, "CELERY_RESULT_BACKEND": broker.backend_url}

    with services.worker(SHOP, url=rabbitmq.url, env=env, concurrency=2, cwd=ROOT):
        drive = subprocess.run(
            [sys.executable, "-c", DRIVE],
            env=os.environ | env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
        )

    assert drive.stdout == "all done\n", drive.stderr


# What is sent


def ping_at(url: str, queue: str, settings: Mapping[str, Any] = QUORUM) -> Any:
    """Give a task of an app of its own, which sends to *queue*."""
    app = CeleryKit(
        "rabbitmq",
        broker=url,
        publish_deadline=DEADLINE,
        set_as_current=False,
        task_default_queue=queue,
        **settings,  # type: ignore[arg-type]
    )

    @app.task(name="ping", shared=False)
    def ping(n: int = 0) -> None: ...

    return ping


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Celery lets it win over what an app is given.
    monkeypatch.delenv("CELERY_BROKER_URL", raising=False)


def ctl(broker: Any, *command: str) -> None:
    subprocess.run(
        ["/usr/lib/rabbitmq/bin/rabbitmqctl", "--quiet", *command],
        env=broker._environment(),
        check=True,
        capture_output=True,
        timeout=60,
    )


def taken_from(url: str, queue: str) -> list[Any]:
    """Take what is in a queue."""
    with kombu.Connection(url) as connection:
        messages = []
        while (message := kombu.Queue(queue)(connection.default_channel).get(no_ack=True)) is not None:
            messages.append(message)
        return messages


def declare_classic(url: str, queue: str) -> None:
    """Declare what a stock app does, over a connection that no app of this process shares."""
    with kombu.Connection(url) as connection:
        kombu.Queue(queue, kombu.Exchange(queue, "direct"), queue)(connection.default_channel).declare()


def ends_soon(call: Any, *, match: str) -> EnqueueError:
    started = time.monotonic()
    with pytest.raises(EnqueueError, match=match) as error:
        call()
    assert time.monotonic() - started < AT_MOST
    return error.value


def test_a_message_says_its_queue_and_does_not_expire_in_it(rabbitmq: Any) -> None:
    ping_at(rabbitmq.url, "told").apply_async(expires=3600)

    [message] = taken_from(rabbitmq.url, "told")

    assert message.headers["celerykit"]["queue"] == "told"
    assert message.headers["expires"]
    # RabbitMQ would drop it, where a worker keeps it as a dead letter.
    assert "expiration" not in message.properties


def test_a_delayed_message_arrives_before_any_worker_was_there(rabbitmq: Any) -> None:
    ping = ping_at(rabbitmq.url, "delayed")

    ping.apply_async(countdown=1)
    ping.apply_async(countdown=1, queue="delayed_too")

    for queue in ("delayed", "delayed_too"):
        messages: list[Any] = []
        services.eventually(lambda queue=queue, found=messages: found.extend(taken_from(rabbitmq.url, queue)) or found)
        assert messages[0].headers["celerykit"]["queue"] == queue
        assert messages[0].delivery_info["exchange"].startswith("celery_delayed")


def test_a_queue_that_was_deleted_is_declared_again(rabbitmq: Any) -> None:
    ping = ping_at(rabbitmq.url, "deleted")
    ping.delay()
    ctl(rabbitmq, "delete_queue", "deleted")

    ping.delay(2)

    assert [message.payload[0] for message in taken_from(rabbitmq.url, "deleted")] == [[2]]


def test_a_queue_that_was_declared_differently_is_an_error_with_the_way_out(rabbitmq: Any) -> None:
    declare_classic(rabbitmq.url, "classic")
    ping = ping_at(rabbitmq.url, "classic")

    for _ in range(2):
        error = ends_soon(ping.delay, match=r"'classic' was declared differently.*CELERY_TASK_DEFAULT_QUEUE_TYPE")
        assert error.may_have_been_sent is False  # type: ignore[attr-defined]
    ping.apply_async(queue="another")


def test_a_worker_says_so_too_and_ends(rabbitmq: Any, tmp_path: Path) -> None:
    declare_classic(rabbitmq.url, "classic_work")
    settings = {**QUORUM, "task_default_queue": "classic_work"}
    (tmp_path / "changed.py").write_text(
        f"from celerykit import CeleryKit\napp = CeleryKit('changed', **{settings!r})\n"
    )
    worker = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "changed", "worker", "--pool=solo"],
        env=os.environ | {"CELERY_BROKER_URL": rabbitmq.url},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert worker.returncode != 0
    assert "'classic_work' was declared differently before" in worker.stderr + worker.stdout


def test_a_queue_that_is_full_and_refuses_is_an_error(rabbitmq: Any) -> None:
    ping = ping_at(rabbitmq.url, "some")
    full = kombu.Queue(
        "full",
        kombu.Exchange("full", "topic"),
        "full",
        queue_arguments={"x-queue-type": "quorum", "x-max-length": 1, "x-overflow": "reject-publish"},
    )

    def fill() -> None:
        for _ in range(20):
            ping.apply_async(queue=full)
            time.sleep(0.02)

    error = ends_soon(fill, match="negative confirm")
    assert "reject-publish" in str(error)
    ping.delay()


def test_a_refused_login_shows_no_password(rabbitmq: Any) -> None:
    ping = ping_at(rabbitmq.url.replace("guest:guest", "guest:hunter2"), "some")

    error = ends_soon(ping.delay, match="ACCESS_REFUSED.*not sent")

    assert "hunter2" not in str(error)


def test_a_broker_that_blocks_publishers_says_so(rabbitmq: Any) -> None:
    ping = ping_at(rabbitmq.url, "blocked")
    ping.delay()
    ctl(rabbitmq, "set_vm_memory_high_watermark", "0")
    try:
        error = ends_soon(ping.delay, match="low on memory or disk")
        assert error.may_have_been_sent is True  # type: ignore[attr-defined]
        ends_soon(lambda: ping.enqueue_many([(1,)] * 3), match="0 were sent and 1 may have been")
    finally:
        ctl(rabbitmq, "set_vm_memory_high_watermark", "0.4")
    ping.delay()


def test_a_frozen_broker_ends_each_way_of_sending(rabbitmq: Any) -> None:
    ping = ping_at(rabbitmq.url, "frozen")
    ping.delay()
    os.kill(rabbitmq.pid, signal.SIGSTOP)
    try:
        assert ends_soon(ping.delay, match="no answer within").may_have_been_sent is True  # type: ignore[attr-defined]
        # Now there is no connection left, and none to be had.
        assert ends_soon(ping.delay, match="no answer within").may_have_been_sent is False  # type: ignore[attr-defined]
        ends_soon(lambda: ping.enqueue_many([(1,)] * 3), match="0 were sent and 0 may have been")
        ends_soon(lambda: ping.apply_async(countdown=9), match="no answer within")
        ends_soon(lambda: ping.app.send_task("foreign", args=["x" * 5_000_000]), match="no answer within")
    finally:
        os.kill(rabbitmq.pid, signal.SIGCONT)
    ping.delay()


@pytest.mark.timeout(150)
def test_a_broker_killed_in_the_middle_and_started_again_takes_messages_again() -> None:
    with services.rabbitmq() as broker:
        # RabbitMQ 3.10 may confirm nothing for a minute in a quorum queue whose only node was killed.
        ping = ping_at(broker.url, "killed", CLASSIC)
        ping.delay()
        os.kill(broker.pid or 0, signal.SIGSTOP)
        threading.Timer(0.3, broker.kill).start()

        assert ends_soon(ping.delay, match="refused").may_have_been_sent is True  # type: ignore[attr-defined]
        assert ends_soon(ping.delay, match="refused").may_have_been_sent is False  # type: ignore[attr-defined]

        broker.start()
        ping.delay()


RETRYING = """
import os
from celerykit import CeleryKit

app = CeleryKit("retrying", **{settings!r})

@app.task(bind=True)
def again(self, path: str) -> None:
    with open(path, "a") as seen:
        print(self.request.headers["celerykit"]["queue"], file=seen)
    if self.request.retries < 2:
        raise self.retry(countdown=1)
"""


@pytest.mark.timeout(90)
def test_a_retry_with_a_delay_stays_in_its_queue(rabbitmq: Any, tmp_path: Path) -> None:
    """
    Celery sends it to the default queue.
    """
    (tmp_path / "retrying.py").write_text(RETRYING.replace("{settings!r}", repr(QUORUM)))
    seen = tmp_path / "seen"
    with services.worker("retrying", url=rabbitmq.url, pool="solo", options=["-Q", "aside"], cwd=tmp_path):
        app = CeleryKit("retrying", broker=rabbitmq.url, set_as_current=False, **QUORUM)  # type: ignore[arg-type]

        @app.task(name="retrying.again", shared=False)
        def again(path: str) -> None: ...

        again.apply_async((str(seen),), queue="aside", countdown=1)
        services.eventually(lambda: seen.exists() and len(seen.read_text().split()) == 3, within=20)

    assert set(seen.read_text().split()) == {"aside"}


@pytest.mark.timeout(120)
def test_what_only_a_newer_deploy_may_know_keeps_no_worker_from_work(rabbitmq: Any, broker: Server) -> None:
    from tests.integration import retry_shop

    grace = 7.0
    env = {"CELERY_TASK_DEFAULT_QUEUE": "deploys", "CELERY_RESULT_BACKEND": broker.backend_url}
    settings = {"CELERYKIT_UNKNOWN_TASK_GRACE": str(grace), "CELERYKIT_DEAD_LETTER_QUEUE": "deploys.dead"}
    app = CeleryKit("sender", set_as_current=False)
    app.conf.update(
        broker_url=rabbitmq.url,
        result_backend=broker.backend_url,
        task_default_queue="deploys",
    )
    with services.worker(
        "tests.integration.retry_shop", url=rabbitmq.url, env={**env, **settings}, concurrency=1, cwd=ROOT
    ) as node:
        started = time.monotonic()
        unknown = [app.send_task("tests.integration.retry_shop.tomorrow", task_id=f"tomorrow-{n}") for n in range(6)]
        known = app.send_task(retry_shop.doubled.name, (21,))

        assert known.get(timeout=20) == 42
        # Held one after the other, each for its five seconds, they would have been in its way.
        assert time.monotonic() - started < 5
        node.wait_for("task.handed_back")
        services.eventually(lambda: {result.state for result in unknown} == {"FAILURE"}, within=40)
        assert time.monotonic() - started > grace
        assert node.count("task.dead", "unknown_task") == 6


def test_a_queue_s_own_dead_letter_exchange_gets_no_second_letter(rabbitmq: Any, broker: Server) -> None:
    with kombu.Connection(rabbitmq.url) as connection:
        channel = connection.channel()
        own = kombu.Queue("own.dead", kombu.Exchange("own.dlx", "fanout"), durable=True)
        own(channel).declare()
        arguments = {"x-queue-type": "quorum", "x-dead-letter-exchange": "own.dlx"}
        kombu.Queue("own", kombu.Exchange("own", "topic"), "own", queue_arguments=arguments)(channel).declare()
    env = {
        "CELERY_TASK_DEFAULT_QUEUE": "own",
        "CELERY_RESULT_BACKEND": broker.backend_url,
        "CELERYKIT_DEAD_LETTER_QUEUE": "own.letters",
    }
    app = CeleryKit("operator", broker=rabbitmq.url, backend=broker.backend_url, set_as_current=False)
    to_own = kombu.Queue("own", kombu.Exchange(""), routing_key="own", no_declare=True)

    with services.worker("tests.integration.own_queue", url=rabbitmq.url, env=env, concurrency=1, cwd=ROOT) as node:
        failed = app.send_task("tests.integration.retry_shop.broken", (1,), queue=to_own)
        app.send_task("tests.integration.retry_shop.rejects", queue=to_own)
        app.send_task("tests.integration.retry_shop.broken", ({"not": "a number"},), queue=to_own)
        services.eventually(lambda: node.count("task.dead") == 3, what=lambda: node.log)

    assert failed.state == "FAILURE"
    with kombu.Connection(rabbitmq.url) as connection:
        counts = {
            name: connection.channel().queue_declare(name, passive=True).message_count
            for name in ("own", "own.dead", "own.letters")
        }
    assert counts == {"own": 0, "own.dead": 0, "own.letters": 3}


def test_what_is_ready_and_what_is_delayed_is_told_without_making_a_queue(rabbitmq: Any) -> None:
    ping = ping_at(rabbitmq.url, "depths")
    for _ in range(3):
        ping.delay()
    before = look(ping.app, ["depths"]).delayed
    ping.apply_async(countdown=600)

    depths = look(ping.app, ["depths", "nowhere"])

    assert depths.queues["depths"] == Depth(ready=3, consumers=0)
    assert depths.queues["nowhere"] == look(ping.app, ["nowhere"]).queues["nowhere"] == Depth(ready=0, missing=True)
    assert depths.delayed == (before or 0) + 1
