"""
``celerykit check --live``, asking real brokers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import kombu
import pytest
import redis
from kombu.transport.native_delayed_delivery import declare_native_delayed_delivery_exchanges_and_queues

from celerykit import CeleryKit, Once
from celerykit.check import Report, check_app
from celerykit.dev.servers import Server
from tests import services

SECRET = "hunter2"

RABBITMQCTL = Path("/usr/lib/rabbitmq/bin/rabbitmqctl")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)


def checked(
    url: str, backend: str | None = None, declare: Callable[[Any], None] = lambda app: None, **conf: Any
) -> Report:
    app = CeleryKit("checked", broker=url, backend=backend, set_as_current=False)
    app.conf.update(conf)
    app.finalize()
    for name in [name for name in app.tasks if not name.startswith("celery.")]:
        # Shared tasks of other tests.
        del app.tasks[name]
    declare(app)
    return check_app(app, live=True)


def codes(report: Report) -> dict[str, str]:
    return {finding.code: finding.severity for finding in report.findings}


# Valkey


@pytest.fixture(scope="module")
def kept() -> Iterator[Server]:
    """A Valkey that keeps what it takes."""
    with services.valkey(port=0, fsync="always") as server:
        yield server


@pytest.fixture
def admin(kept: Server) -> Iterator[Any]:
    with redis.Redis.from_url(kept.client_url) as client:
        yield client
        client.flushall()
        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("appendfsync", "always")


def test_a_broker_as_it_should_be_has_nothing_to_find(kept: Server) -> None:
    assert codes(checked(kept.url, kept.backend_url)) == {}


def test_a_broker_without_append_only_file_is_refused(broker: Server) -> None:
    # Other tests may have left letters there.
    assert codes(checked(broker.url, broker.backend_url)).items() - {("dead-letters-wait", "info")} == {
        ("redis-no-aof", "error")
    }


def test_a_result_backend_may_forget(kept: Server, broker: Server) -> None:
    assert codes(checked(kept.url, broker.backend_url)) == {}


def test_a_broker_that_evicts_is_refused(kept: Server, admin: Any) -> None:
    admin.config_set("maxmemory", "1gb")
    admin.config_set("maxmemory-policy", "allkeys-lru")
    admin.config_set("appendfsync", "everysec")

    assert codes(checked(kept.url)) == {"redis-evicts": "error", "redis-fsync-everysec": "info"}


def with_keys(app: Any) -> None:
    @app.task(name="shop.charge", once=Once(), shared=False)
    def charge(order: int) -> int: ...


@pytest.mark.parametrize(
    ("policy", "found"), [("volatile-lru", {"redis-evicts": "error"}), ("noeviction", {})], ids=str
)
def test_a_store_that_forgets_keys_is_refused(
    kept: Server, admin: Any, monkeypatch: pytest.MonkeyPatch, policy: str, found: dict[str, str]
) -> None:
    """Also one at the broker's server, in a database of its own."""
    admin.config_set("maxmemory", "1gb")
    admin.config_set("maxmemory-policy", policy)
    monkeypatch.setenv("CELERYKIT_STORE_URL", kept.client_url.replace("/0", "/5"))

    assert codes(checked(kept.url, kept.backend_url, with_keys)) == found


def test_a_store_without_append_only_file_is_told(
    kept: Server, admin: Any, broker: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELERYKIT_STORE_URL", broker.url)

    assert codes(checked(kept.url, kept.backend_url)) == {}
    assert codes(checked(kept.url, kept.backend_url, with_keys)) == {"store-no-aof": "warning"}


def test_a_user_with_few_rights_is_told_what_is_unknown(kept: Server, admin: Any) -> None:
    rights = ["~*", "&*", "+@all", "-config", "-info", "-eval"]
    admin.execute_command("ACL", "SETUSER", "poor", "on", f">{SECRET}", *rights)
    report = checked(kept.url.replace("://", f"://poor:{SECRET}@"))

    assert codes(report) == {"redis-no-scripts": "error", "redis-untold": "info"}
    assert "INFO, CONFIG GET appendfsync" in report.findings[1].what
    assert SECRET not in report.as_text() + report.as_json()


def test_a_wrong_password_is_a_finding_without_it(kept: Server) -> None:
    report = checked(kept.url.replace("://", f"://nobody:{SECRET}@"))

    assert codes(report)["broker-unreachable"] == "error"
    assert SECRET not in report.as_text() + report.as_json()


def test_dead_letters_are_counted(kept: Server, admin: Any) -> None:
    with kombu.Connection(kept.url) as connection, connection.SimpleQueue("dead_letters") as letters:
        letters.put({})
        letters.put({})
    report = checked(kept.url)

    assert codes(report) == {"dead-letters-wait": "info"}
    assert report.findings[0].what == "2 dead letters wait in dead_letters."


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_never_answers_is_not_waited_for_without_end(scheme: str) -> None:
    began = time.monotonic()
    with services.frozen() as port:
        report = checked(f"{scheme}://127.0.0.1:{port}", publish_deadline=1)

    assert codes(report)["broker-unreachable"] == "error"
    assert time.monotonic() - began < 15


def test_a_broker_that_is_not_there_is_a_finding() -> None:
    with services.refused() as port:
        assert codes(checked(f"redis://127.0.0.1:{port}"))["broker-unreachable"] == "error"


def test_the_command_line_asks(broker: Server, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text("from celerykit import CeleryKit\napp = CeleryKit('shop')\n")
    env = os.environ | {"CELERY_BROKER_URL": broker.url}
    command = [sys.executable, "-m", "celerykit", "check", "-A", "shop", "--live", "--json"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=50)
    report = json.loads(done.stdout)

    assert done.returncode == 1, done.stderr
    assert report["live"] is True
    assert "redis-no-aof" in [finding["code"] for finding in report["findings"]]


# RabbitMQ


@pytest.fixture(scope="module")
def rabbitmq() -> Iterator[Any]:
    with services.rabbitmq() as broker:
        yield broker


@pytest.fixture
def queue() -> Any:
    name = f"work-{uuid4()}"
    arguments = {"x-queue-type": "quorum", "x-delivery-limit": 100}
    return kombu.Queue(name, kombu.Exchange(name, "topic"), routing_key=name, queue_arguments=arguments)


@pytest.fixture
def connection(rabbitmq: Any) -> Iterator[Any]:
    with kombu.Connection(rabbitmq.url) as connection:
        yield connection


def rabbitmqctl(rabbitmq: Any, *words: str) -> None:
    if not RABBITMQCTL.exists():
        services.missing("rabbitmqctl", get_it_with="apt-get install rabbitmq-server")
    env = rabbitmq._environment()
    command = [str(RABBITMQCTL), "-n", env["RABBITMQ_NODENAME"], *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=40)
    assert done.returncode == 0, done.stderr


def set_up(connection: Any, *queues: Any) -> None:
    """Do what a worker does when it starts."""
    declare_native_delayed_delivery_exchanges_and_queues(connection, "quorum")
    for queue in queues:
        queue(connection.default_channel).declare()


@pytest.mark.timeout(100)
def test_rabbitmq_as_it_should_be_tells_only_what_it_cannot_tell(rabbitmq: Any, connection: Any, queue: Any) -> None:
    set_up(connection, queue)

    assert codes(checked(rabbitmq.url, task_queues=[queue])) == {
        "store-per-process": "info",
        "rabbitmq-untold": "info",
    }


def test_asking_makes_nothing(rabbitmq: Any, connection: Any, queue: Any) -> None:
    checked(rabbitmq.url, task_queues=[queue])

    for name in (queue.name, "dead_letters"):
        with pytest.raises(connection.channel_errors, match="404"):
            connection.channel().queue_declare(name, passive=True)


def test_asking_moves_no_message(rabbitmq: Any, connection: Any, queue: Any) -> None:
    set_up(connection, queue)
    kombu.Producer(connection).publish({}, routing_key=queue.name)
    checked(rabbitmq.url, task_queues=[queue])
    services.eventually(lambda: queue(connection.channel()).queue_declare(passive=True).message_count == 1)
    message = queue(connection.channel()).get()

    assert not message.delivery_info["redelivered"]
    message.ack()


def test_countdowns_that_would_get_lost_are_found(rabbitmq: Any, connection: Any, queue: Any) -> None:
    set_up(connection)
    channel = connection.default_channel
    channel.queue_delete("celery_delayed_7")

    [missing] = [finding for finding in checked(rabbitmq.url, task_queues=[queue]).findings if finding.subjects]

    assert (missing.code, missing.subjects) == ("delays-missing", ("queue celery_delayed_7",))

    set_up(connection)
    # All is there, but for what leads from one level to the next.
    channel.exchange_unbind("celery_delayed_8", "celery_delayed_9", "*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.*.0.#")
    try:
        assert codes(checked(rabbitmq.url, task_queues=[queue]))["delays-broken"] == "error"
    finally:
        set_up(connection)


def test_a_queue_that_is_otherwise_at_the_broker_is_found(rabbitmq: Any, connection: Any, queue: Any) -> None:
    set_up(connection)
    kombu.Queue(queue.name)(connection.channel()).queue_declare()
    report = checked(rabbitmq.url, task_queues=[queue])
    [differs] = [finding for finding in report.findings if finding.code == "queue-differs"]

    assert "inequivalent arg 'x-queue-type'" in differs.what
    assert codes(report)["queue-differs"] == "error"


@pytest.mark.timeout(100)
@pytest.mark.parametrize("exists", [True, False])
def test_missing_rights_are_found(rabbitmq: Any, connection: Any, queue: Any, exists: bool) -> None:
    set_up(connection, queue)
    user, letters = f"poor-{uuid4()}", f"dead-{uuid4()}"
    rabbitmqctl(rabbitmq, "add_user", user, SECRET)
    rabbitmqctl(rabbitmq, "set_permissions", "-p", "/", user, "^work|^celery", "^work|^celery", "^celery")
    if exists:
        connection.channel().queue_declare(letters, durable=True, auto_delete=False)
        assert codes(checked(rabbitmq.url, task_queues=[queue], dead_letter_queue=letters)) == {
            "dead-letters-not-quorum": "warning",
            "store-per-process": "info",
            "rabbitmq-untold": "info",
        }
    url = rabbitmq.url.replace("guest:guest", f"{user}:{SECRET}")
    report = checked(url, task_queues=[queue], dead_letter_queue=letters)

    assert codes(report) == {
        "queue-no-rights": "error",
        "dead-letters-no-rights": "error",
        "dead-letters-no-write": "error",
        "store-per-process": "info",
        "rabbitmq-untold": "info",
    }
    assert any(f"no right to declare or consume from the queue {letters}" in f.what for f in report.findings)
    assert any(f"no right to consume from the queue {queue.name}" in f.what for f in report.findings)
    assert SECRET not in report.as_text() + report.as_json()
