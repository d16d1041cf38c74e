"""
Leases on a real Valkey: nothing runs twice while its worker lives, and all comes back soon after it died.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import celery
import kombu
import pytest
import redis

from celerykit.dev.processes import Process
from celerykit.dev.servers import Server, free_port
from celerykit.redis_broker import Hold, guard
from tests import services

ROOT = Path(__file__).parents[2]
LEASE = 2.0

#: Until what a dead worker held is back: its lease, the pause between two looks, and a start.
RECOVERY = LEASE + 5.0

Start = Callable[..., AbstractContextManager[services.Worker]]


@pytest.fixture
def server() -> Iterator[Server]:
    with services.valkey(fsync="everysec") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with redis.Redis.from_url(server.client_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def start(server: Server) -> Start:
    def start(pool: str = "solo", *, env: dict[str, str] | None = None, options: Any = (), **more: Any) -> Any:
        env = {"LEDGER": server.client_url, "LEASE": str(LEASE), **(env or {})}
        app = "tests.faults.leases_shop"
        return services.worker(app, url=server.url, pool=pool, cwd=ROOT, env=env, options=options, **more)

    return start


@pytest.fixture
def send(server: Server) -> Callable[..., Any]:
    def send(*args: Any, prefix: str = "", **options: Any) -> Any:
        app = celery.Celery(broker=server.url, set_as_current=False)
        app.conf.broker_transport_options = {"global_keyprefix": prefix}
        with app:
            return app.send_task("tests.faults.leases_shop.work", args, **options)

    return send


def ended(client: Any, count: int) -> Callable[[], bool]:
    return lambda: client.llen("ends") >= count


def is_clean(client: Any) -> bool:
    return not client.exists("celerykit.unacked", "celerykit.unacked_index", "unacked", "unacked_index", "celery")


# While the worker lives


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_what_takes_longer_than_a_lease_runs_once(pool: str, start: Start, send: Any, client: Any) -> None:
    """A long task, what was prefetched behind it, and a countdown; with a second worker ready to take them over."""
    send("long", 6)
    with start(pool) as first:
        services.eventually(lambda: client.llen("starts") == 1)
        for number in range(3):
            send(f"prefetched {number}")
        send("later", countdown=6)
        services.eventually(lambda: client.llen("celery") == 0 or pool == "solo")
        with start("solo"):
            services.eventually(ended(client, 5), within=20, what=lambda: str(client.lrange("ends", 0, -1)) + first.log)
            time.sleep(LEASE)

            assert sorted(client.lrange("starts", 0, -1)) == [
                "later",
                "long",
                "prefetched 0",
                "prefetched 1",
                "prefetched 2",
            ]
            services.eventually(lambda: is_clean(client), within=5, what=lambda: str(client.keys()))


# When it dies


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_killed_workers_messages_come_back_in_their_order(pool: str, start: Start, send: Any, client: Any) -> None:
    with start("solo", options=["-Q", "other"]) as other, start(pool) as first:
        send("long", 60)
        services.eventually(lambda: client.llen("starts") == 1)
        for number in range(3):
            send(f"prefetched {number}")
        if pool != "solo":
            services.eventually(lambda: client.hlen("celerykit.unacked") == 4)
        # Behind them in line.
        send("behind")
        time.sleep(LEASE)  # time for renewals, which must keep the order
        first.kill()
        services.eventually(
            lambda: client.llen("celery") == 5, within=RECOVERY, what=lambda: f"{client.keys()} {other.log}"
        )

        waiting = [json.loads(item) for item in reversed(client.lrange("celery", 0, -1))]
        assert [message["headers"]["argsrepr"].split("'")[1] for message in waiting] == [
            "long",
            "prefetched 0",
            "prefetched 1",
            "prefetched 2",
            "behind",
        ]
        assert waiting[0]["properties"]["delivery_info"]["redelivered"] is True
        other.wait_for("leases.restored")
        assert not client.exists("celerykit.unacked")


def test_a_message_that_was_taken_and_never_read_comes_back(
    start: Start, send: Any, server: Server, client: Any
) -> None:
    """As when a worker is killed between the server's answer and its reading it."""
    send("a")
    victim = guard(kombu.Connection(server.url), Hold(lease=LEASE))
    kombu.Consumer(victim.default_channel, [kombu.Queue("celery")], on_message=print).consume()

    victim.transport.cycle.on_poll_start()  # asks

    services.eventually(lambda: client.hlen("celerykit.unacked") == 1)
    assert client.llen("celery") == 0
    with start():
        services.eventually(ended(client, 1), within=RECOVERY + 5)
        assert client.lrange("starts", 0, -1) == ["a"]


def test_a_worker_that_starts_long_after_takes_them_all_the_same(start: Start, send: Any, client: Any) -> None:
    with start("solo") as first:
        send("long", 60)
        services.eventually(lambda: client.llen("starts") == 1)
        first.kill()
    time.sleep(2 * LEASE)
    client.delete("starts")
    with start("solo"):
        services.eventually(lambda: client.llen("starts") == 1, within=2 * LEASE + 3)


def test_a_worker_whose_event_loop_is_blocked_still_restores_anothers(start: Start, send: Any, client: Any) -> None:
    with start("solo") as busy:
        send("blocks", 20)
        services.eventually(lambda: client.llen("starts") == 1)
        with start("solo") as first:
            send("long", 60)
            services.eventually(lambda: client.llen("starts") == 2)
            first.kill()
        services.eventually(lambda: client.llen("celery") == 1, within=RECOVERY, what=lambda: busy.log)


def test_restored_messages_keep_their_priority(start: Start, send: Any, client: Any) -> None:
    with start("solo", options=["-Q", "other"]), start("prefork") as first:
        send("running", 60)
        services.eventually(lambda: client.llen("starts") == 1)
        send("low", priority=9)
        send("high", priority=0)
        services.eventually(lambda: client.hlen("celerykit.unacked") == 3)
        first.kill()
        services.eventually(lambda: client.llen("celery") == 2, within=RECOVERY)

        assert client.llen("celery\x06\x169") == 1


def test_a_message_goes_back_to_the_one_queue_it_came_from(start: Start, server: Server, client: Any) -> None:
    """Even if its exchange knows other queues, or the worker that restores it does not know the exchange."""
    exchange = kombu.Exchange("news", type="topic")
    with start("solo", options=["-Q", "other"]), start("solo") as first, kombu.Connection(server.url) as connection:
        channel = connection.default_channel
        for name in ("celery", "archive"):
            kombu.Queue(name, exchange, routing_key="news.#", channel=channel).declare()
        with celery.Celery(broker=server.url, set_as_current=False) as app:
            name = "tests.faults.leases_shop.work"
            sender = connection.Producer()
            app.send_task(name, ("long", 60), exchange=exchange, routing_key="news.today", producer=sender)
        services.eventually(lambda: client.llen("starts") == 1)
        first.kill()
        services.eventually(lambda: client.llen("celery") == 1, within=RECOVERY)

        assert client.llen("archive") == 1


def test_keys_may_have_a_prefix(start: Start, send: Any, client: Any) -> None:
    env = {"PREFIX": "{shop}:"}
    with start("solo", env=env, options=["-Q", "other"]), start("prefork", env=env) as first:
        send("long", 60, prefix="{shop}:")
        services.eventually(lambda: client.llen("starts") == 1)
        assert client.hlen("{shop}:celerykit.unacked") == 1
        time.sleep(LEASE + 1)
        assert client.llen("{shop}:celery") == 0
        first.kill()
        services.eventually(lambda: client.llen("{shop}:celery") == 1, within=RECOVERY)

        assert client.llen("celery") == 0
        assert all(key.startswith("{shop}:") for key in client.scan_iter() if "unacked" in key)


# Stock workers on the same broker


def test_what_stock_workers_left_comes_back_after_celerys_own_timeout(start: Start, send: Any, client: Any) -> None:
    with start("solo", env={"STOCK": "1"}) as stock:
        send("long", 60)
        services.eventually(lambda: client.llen("starts") == 1)
        assert client.hlen("unacked") == 1
        stock.kill()
    killed = time.monotonic()
    with start("solo", options=["-Q", "other"]):
        time.sleep(LEASE * 1.5)
        assert client.hlen("unacked") == 1
        services.eventually(lambda: client.llen("celery") == 1, within=12)

        assert time.monotonic() - killed > 6  # eight seconds after it was taken
        assert not client.exists("unacked")


# Shutdown


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_warm_shutdown_ends_what_runs_and_gives_back_the_rest_in_order(
    pool: str, start: Start, send: Any, client: Any
) -> None:
    with start(pool) as first:
        send("long", 5)
        services.eventually(lambda: client.llen("starts") == 1)
        for number in range(3):
            send(f"later {number}", countdown=60)
        services.eventually(lambda: client.hlen("celerykit.unacked") == 4)
        os.kill(first.pid, signal.SIGTERM)
        time.sleep(LEASE + 1)
        assert client.llen("celery") == 0 or client.llen("starts") == 1
        first.stop()

    assert client.lrange("ends", 0, -1) == ["long"]
    waiting = [json.loads(item)["headers"]["argsrepr"] for item in reversed(client.lrange("celery", 0, -1))]
    assert waiting == ["('later 0',)", "('later 1',)", "('later 2',)"]
    assert not client.exists("celerykit.unacked")


# A broker that goes away


@pytest.mark.parametrize("pool", ["prefork", "threads"])
@pytest.mark.parametrize("outage", [0.5, 2 * LEASE])
def test_a_task_that_runs_while_the_broker_is_away_runs_once(
    pool: str, outage: float, start: Start, send: Any, server: Server, tmp_path: Path
) -> None:
    with services.valkey() as notes, redis.Redis.from_url(notes.client_url, decode_responses=True) as ledger:
        env = {"LEDGER": notes.client_url}
        with start(pool, env=env) as first, start("solo", env=env, options=["-Q", "other"]):
            send("long", 10 + outage)
            services.eventually(lambda: ledger.llen("starts") == 1)
            send("prefetched")
            send("later", countdown=8)
            time.sleep(1.5)  # until all of it is on the disk
            server.kill()
            time.sleep(outage)
            server.start()
            services.eventually(ended(ledger, 3), within=40, what=lambda: f"{ledger.lrange('ends', 0, -1)} {first.log}")
            time.sleep(LEASE * 2)

            assert sorted(ledger.lrange("starts", 0, -1)) == ["later", "long", "prefetched"]
            with redis.Redis.from_url(server.client_url) as client:
                services.eventually(lambda: is_clean(client), within=5, what=lambda: f"{client.keys()} {first.log}")


def test_a_worker_that_was_stopped_for_too_long_says_so(start: Start, send: Any, client: Any) -> None:
    with start("solo") as first:
        time.sleep(LEASE)
        os.kill(first.pid, signal.SIGSTOP)
        time.sleep(LEASE + 1)
        os.kill(first.pid, signal.SIGCONT)
        first.wait_for("leases.lapsed")


# Items that are no messages


def envelope(**changes: Any) -> dict[str, Any]:
    properties = {
        "delivery_tag": "tag",
        "delivery_info": {"exchange": "", "routing_key": "celery"},
        "body_encoding": "base64",
    }
    return {"body": "W10=", "headers": {}, "properties": properties, **changes}


def without(name: str) -> dict[str, Any]:
    properties = envelope()["properties"]
    del properties[name]
    return envelope(properties=properties)


def test_a_sentinel_may_say_where_the_server_is(start: Start, tmp_path: Path) -> None:
    with services.valkey(port=0) as master, sentinel_of(master, tmp_path) as url:
        ledger = redis.Redis.from_url(master.client_url, decode_responses=True)
        env = {"LEDGER": master.client_url, "MASTER": "shop", "CELERY_BROKER_URL": url}
        with start("solo", env=env, options=["-Q", "other"]), start("prefork", env=env) as first:
            app = celery.Celery(broker=url, set_as_current=False)
            app.conf.broker_transport_options = {"master_name": "shop"}
            with app:
                app.send_task("tests.faults.leases_shop.work", ("long", 60))
            services.eventually(lambda: ledger.llen("starts") == 1)
            time.sleep(LEASE + 1)
            assert ledger.llen("celery") == 0
            first.kill()
            services.eventually(lambda: ledger.llen("celery") == 1, within=RECOVERY)
        ledger.close()


@contextmanager
def sentinel_of(master: Server, folder: Path) -> Iterator[str]:
    port = free_port()
    config = folder / "sentinel.conf"
    config.write_text(f"port {port}\nbind 127.0.0.1\ndir {folder}\nsentinel monitor shop 127.0.0.1 {master.port} 1\n")
    with (folder / "sentinel.log").open("wb") as log:
        process = Process([str(master.binary), str(config), "--sentinel"], output=log)
    try:
        with redis.Redis(port=port) as client:
            services.eventually(lambda: is_up(client))
        yield f"sentinel://127.0.0.1:{port}"
    finally:
        process.kill_group()


def is_up(client: Any) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_items_that_are_no_messages_are_handed_over_and_the_next_one_runs(
    pool: str, start: Start, send: Any, client: Any
) -> None:
    """Those that could not be handed over go back, and are tried again."""
    items = [
        b"no json",
        b"",
        b"\xff\xfe",
        b"[" * 50_000,
        *(
            json.dumps(item).encode()
            for item in (
                7,
                None,
                [],
                "text",
                {},
                {"__type__": "uuid", "__value__": 1},
                envelope(properties=None),
                envelope(properties=[]),
                without("delivery_tag"),
                without("delivery_info"),
                envelope(body="W10"),
                envelope(body=7),
                envelope(headers=[1]),
                envelope(properties={**envelope()["properties"], "delivery_tag": ["a"]}),
                envelope(properties={**envelope()["properties"], "delivery_info": "celery"}),
                envelope(properties={**envelope()["properties"], "body_encoding": "rot13"}),
            )
        ),
    ]
    with start(pool) as node:
        for item in items:
            client.lpush("celery", item)
            send("canary")
        services.eventually(ended(client, len(items)), within=15, what=lambda: node.log[-5000:])
        services.eventually(
            lambda: client.llen("garbage") == len(items),
            within=10,
            what=lambda: str([row[:200] for row in client.lrange("garbage", 0, -1)]),
        )

        assert {row.split(" ", 2)[0] for row in client.lrange("garbage", 0, -1)} == {"celery"}
        for item in items:
            assert client.get(f"garbage tries:{item!r}") == "2"
        services.eventually(lambda: is_clean(client), what=lambda: str(client.keys()))
