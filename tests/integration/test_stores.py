"""The store in a real Valkey, which goes away and comes back."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from celerykit.dev.servers import Server
from celerykit.errors import StoreUnavailable
from celerykit.stores import Hold, New, Store, Swap, open_store
from tests import services


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with services.valkey() as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with redis.Redis.from_url(server.client_url, decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture
def store(server: Server, client: Any) -> Iterator[Store]:
    store = open_store(server.url, timeout=2)
    yield store
    store.close()


def test_a_count_goes_up_and_down_but_never_below_nothing(store: Store, client: Any) -> None:
    assert [store.add("n", ttl=10), store.add("n", ttl=20)] == [1, 2]
    assert 19_000 < client.pttl("celerykit:n") <= 20_000
    store.subtract("n")
    assert store.get("n") == "1"
    assert 19_000 < client.pttl("celerykit:n") <= 20_000
    store.subtract("n")
    store.subtract("n")
    assert client.keys() == []


def test_who_marks_first_has_it_until_it_is_forgotten_or_deleted(store: Store) -> None:
    assert store.mark("m", "a", ttl=0.2) is None
    assert store.mark("m", "b", ttl=60) == "a"
    services.eventually(lambda: store.get("m") is None, within=2)
    assert store.mark("m", "ü", ttl=60) is None
    assert store.get("m") == "ü"
    store.delete("m")
    store.delete("m")
    assert store.mark("m", "c", ttl=60) is None


def test_keys_stay_under_their_prefix(server: Server, client: Any) -> None:
    store = open_store(server.url, timeout=2, prefix="shop:kit:")
    store.add("n", ttl=1)
    store.mark("m", "x", ttl=1)

    store.swap(Swap("k", None, New("v", "data", ttl=1)))
    store.take("s", "me", limit=1, ttl=1)

    keys = ["shop:kit:m", "shop:kit:n", "shop:kit:record:k", "shop:kit:slots:s"]
    assert sorted(client.keys()) == keys
    assert [key for key, _ in store.find("")] == ["k"]


def test_each_call_is_one_round_trip(store: Store, client: Any) -> None:
    store.get("warm-up")
    before = client.info("stats")["total_reads_processed"]

    store.add("n", ttl=1)
    store.subtract("n")
    store.mark("m", "x", ttl=1)
    store.get("m")
    store.delete("m")
    store.read("k")
    store.swap(*(Swap(f"k{number}", None, New("v", "data", ttl=1)) for number in range(3)))
    store.renew([Hold(f"k{number}", "v", lease=1, ttl=1) for number in range(3)])
    store.take("s", "me", limit=1, ttl=1)
    store.give("s", "me")

    # The second look is a read itself.
    assert client.info("stats")["total_reads_processed"] - before == 10 + 1


def test_threads_and_forked_processes_share_a_count(store: Store) -> None:
    store.add("n", ttl=60)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: store.add("n", ttl=60), range(100)))
    child = multiprocessing.get_context("fork").Process(target=store.add, args=("n",), kwargs={"ttl": 60})
    child.start()
    child.join(10)

    assert child.exitcode == 0
    assert store.get("n") == "102"
    assert store.add("n", ttl=60) == 103


def test_a_server_that_comes_back_is_used_again_at_once() -> None:
    with services.valkey() as server:
        store = open_store(server.url, timeout=2)
        store.add("n", ttl=60)
        server.kill()
        with pytest.raises(StoreUnavailable):
            store.add("n", ttl=60)
        server.start()

        assert store.add("n", ttl=60) == 1


def test_a_store_that_never_answers_is_given_up_in_time() -> None:
    with services.frozen() as port:
        store = open_store(f"redis://:hush@127.0.0.1:{port}/0", timeout=0.3)
        began = time.monotonic()
        with pytest.raises(StoreUnavailable) as caught:
            store.mark("m", "x", ttl=1)

    assert time.monotonic() - began < 1.0
    assert "hush" not in str(caught.value)


def test_a_store_that_refuses_says_so_and_not_what_it_was_asked(store: Store, client: Any) -> None:
    client.rpush("celerykit:n", "a list")

    with pytest.raises(StoreUnavailable, match=r"refused \(WRONGTYPE\)"):
        store.add("n", ttl=1)


def test_a_refusal_among_many_swaps_tells_nothing_of_them(store: Store, client: Any) -> None:
    client.rpush("celerykit:record:k", "a list")

    with pytest.raises(StoreUnavailable, match=r"refused \(WRONGTYPE\)\.$") as caught:
        store.swap(*(Swap(key, None, New("v", "hush", ttl=1)) for key in ("a", "k", "b")))

    assert caught.value.__cause__ is None


def test_a_wrong_password_is_not_repeated(server: Server, client: Any) -> None:
    client.acl_setuser("kit", enabled=True, passwords=["+right"], keys="*", commands=["+@all"])
    url = server.url.replace("redis+socket://", "redis+socket://kit:{}@")

    assert open_store(url.format("right"), timeout=2).add("n", ttl=1) == 1
    with pytest.raises(StoreUnavailable) as caught:
        open_store(url.format("hush"), timeout=2).add("n", ttl=1)

    assert "hush" not in str(caught.value)


def test_who_is_master_is_asked_of_sentinel() -> None:
    with services.valkey(port=0) as server, services.sentinel(server) as url:
        store = open_store(url, timeout=2)

        assert [store.add("n", ttl=60), store.add("n", ttl=60)] == [1, 2]
        store.close()
        assert store.get("n") == "2"


def test_the_new_master_is_used_after_a_failover() -> None:
    with (
        services.valkey(port=0) as first,
        services.valkey(port=0) as second,
        redis.Redis.from_url(second.client_url) as replica,
    ):
        replica.replicaof("127.0.0.1", first.port)
        services.eventually(lambda: replica.info("replication")["master_link_status"] == "up")
        with services.sentinel(first) as url, redis.Redis.from_url(sentinel_url(url)) as sentinel:
            store = open_store(url, timeout=1)
            store.swap(Swap("k", None, New("1", "data", ttl=600)))
            services.eventually(lambda: sentinel.sentinel_slaves("shop") != [], within=15)
            services.eventually(lambda: bool(replica.exists("celerykit:record:k")))
            first.kill()
            with pytest.raises(StoreUnavailable):
                store.read("k")

            services.eventually(lambda: is_read(store, "k"), within=20)
            assert store.swap(Swap("k", "1", New("2", "data", ttl=600)))[0].done


def is_read(store: Store, key: str) -> bool:
    try:
        return store.read(key) is not None
    except StoreUnavailable:
        return False


def sentinel_url(url: str) -> str:
    return url.replace("sentinel:", "redis:").partition("?")[0]


def test_sentinels_that_know_no_master_are_given_up_in_time() -> None:
    with (
        services.valkey(port=0) as server,
        services.sentinel(server, name="another") as url,
        services.refused() as port,
    ):
        lost = url.replace("sentinel://", f"sentinel://127.0.0.1:{port};sentinel://:hush@").replace("=another", "=shop")
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="shop") as caught:
            open_store(lost, timeout=2).get("k")

    assert time.monotonic() - began < 3
    assert "hush" not in str(caught.value)
