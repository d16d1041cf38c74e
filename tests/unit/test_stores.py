"""The store in memory, and what a store's URL says."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import pytest

from celerykit.errors import InvalidSettings, StoreUnavailable
from celerykit.stores import Hold, New, Swap, default_url, open_store, sql, sql_addresses, sql_connections
from celerykit.stores.memory import MemoryStore
from celerykit.stores.redis import RedisStore
from celerykit.stores.sql import SqlStore
from tests import services


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> MemoryStore:
    return MemoryStore(clock=clock)


# Counts and marks


def test_a_count_goes_up_and_down_but_never_below_nothing(store: MemoryStore) -> None:
    assert [store.add("n", ttl=1), store.add("n", ttl=1)] == [1, 2]
    for _ in range(3):
        store.subtract("n")

    assert store.get("n") is None
    assert store.add("n", ttl=1) == 1


def test_a_count_is_forgotten_after_its_last_addition(store: MemoryStore, clock: Clock) -> None:
    store.add("n", ttl=10)
    clock.now = 9
    store.add("n", ttl=10)
    clock.now = 18.9
    store.subtract("n")
    assert store.get("n") == "1"

    clock.now = 19

    assert store.get("n") is None
    assert store.add("n", ttl=10) == 1


def test_who_marks_first_has_it_until_it_is_forgotten_or_deleted(store: MemoryStore, clock: Clock) -> None:
    assert store.mark("m", "a", ttl=5) is None
    assert store.mark("m", "b", ttl=5) == "a"
    clock.now = 5
    assert store.mark("m", "c", ttl=5) is None
    store.delete("m")
    store.delete("m")
    assert store.mark("m", "d", ttl=5) is None
    assert store.get("m") == "d"


def test_memory_holds_only_so_much(clock: Clock) -> None:
    store = MemoryStore(clock=clock, most=100)
    for number in range(1000):
        store.mark(f"m{number}", "x", ttl=60)

    kept = [number for number in range(1000) if store.get(f"m{number}")]

    assert kept[-1] == 999
    assert 50 <= len(kept) <= 100
    assert kept == sorted(kept, reverse=False) == list(range(kept[0], 1000))


def test_what_has_expired_makes_room_first(clock: Clock) -> None:
    store = MemoryStore(clock=clock, most=100)
    store.mark("old, still good", "x", ttl=1000)
    for number in range(99):
        store.mark(f"m{number}", "x", ttl=1)
    clock.now = 2
    for number in range(50):
        store.mark(f"n{number}", "x", ttl=1000)

    assert store.get("old, still good") == "x"


def test_threads_lose_no_count() -> None:
    store = MemoryStore()
    threads = [threading.Thread(target=lambda: [store.add("n", ttl=60) for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert store.get("n") == "4000"


def test_a_forked_process_has_a_memory_of_its_own(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add("n", ttl=60)
    monkeypatch.setattr(os, "getpid", lambda: -1)

    assert store.add("n", ttl=60) == 1


# Records and slots (what they do is in tests/integration/test_stores_conformance.py and test_stores_model.py)


def claim(key: str, *, ttl: float = 10) -> Swap:
    return Swap(key, None, New("v", "data", ttl=ttl))


def test_a_record_never_goes_before_its_time_to_make_room(clock: Clock) -> None:
    store = MemoryStore(clock=clock, most=10)
    store.swap(*(claim(f"k{number}", ttl=10 + number) for number in range(10)))

    with pytest.raises(StoreUnavailable, match="10 keys"):
        store.swap(claim("one too many"))

    assert store.renew([Hold("k0", "v", lease=1, ttl=10)]) == [True]
    clock.now = 10
    store.swap(claim("there is room again"))
    assert len(list(store.find(""))) == 10


def test_a_slot_never_goes_before_its_time_to_make_room(clock: Clock) -> None:
    store = MemoryStore(clock=clock, most=10)
    for number in range(10):
        store.take(f"s{number}", "me", limit=1, ttl=10 + number)

    with pytest.raises(StoreUnavailable, match="10 keys"):
        store.take("one too many", "me", limit=1, ttl=10)

    assert store.take("s0", "me", limit=1, ttl=10) == 0
    clock.now = 11
    assert store.take("there is room again", "me", limit=1, ttl=10) == 0


def test_threads_never_hold_more_slots_than_there_are() -> None:
    store = MemoryStore()
    taken: list[int] = []

    def race(number: int) -> None:
        taken.extend(number for _ in range(50) if store.take("s", f"{number} {_}", limit=7, ttl=60) == 0)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(taken) == 7


# URLs


@pytest.mark.parametrize(
    ("broker", "backend", "picked"),
    [
        ("redis://a/1", "redis://b/2", "redis://a/1"),
        ("valkey://a", None, "valkey://a"),
        ("amqp://a", "rediss://b/2", "rediss://b/2"),
        ("redis+socket:///s?virtual_host=3", None, "redis+socket:///s?virtual_host=3"),
        ("redis://a;redis://b", None, "redis://a"),
        ("amqp://a", "db+sqlite://", "memory://"),
        ("sentinel://a;sentinel://b", None, "sentinel://a;sentinel://b"),
        ("memory://", None, "memory://"),
        ("amqp://a", "db+postgresql://u@h/d", "db+postgresql://u@h/d"),
        ("amqp://a", "db+sqlite:///results.sqlite", "db+sqlite:///results.sqlite"),
        ("amqp://a", "db+sqlite:///:memory:", "memory://"),
        ("amqp://a", "db+sqlite:///", "memory://"),
        ("amqp://a", "db+mysql://h/d", "memory://"),
        ("amqp://a", "db+postgresql+pg8000://h/d", "memory://"),
        ("sqla+postgresql+psycopg2://h/d", None, "sqla+postgresql+psycopg2://h/d"),
        ("sqla+sqlite:///b.sqlite", "redis://r", "redis://r"),
        ("sqla+postgresql://u:p;w@h/d", "rpc://", "sqla+postgresql://u:p;w@h/d"),
    ],
)
def test_the_store_is_where_a_redis_is_or_else_a_database(broker: str, backend: str | None, picked: str) -> None:
    assert default_url(broker, backend) == picked


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://", {"host": "localhost", "port": 6379, "db": 0}),
        ("valkey://u:p%40w@h:7/5", {"host": "h", "port": 7, "db": 5, "username": "u", "password": "p@w"}),
        ("redis+socket:///a/b%20c?virtual_host=2", {"unix_socket_path": "/a/b c", "db": 2}),
        ("valkey+socket://:pw@/a", {"unix_socket_path": "/a", "db": 0, "password": "pw"}),
        ("rediss://h", {"ssl": True, "ssl_cert_reqs": "required"}),
        (
            "valkeys://h?ssl_cert_reqs=CERT_NONE&ssl_ca_certs=%2Fca",
            {"ssl": True, "ssl_cert_reqs": "none", "ssl_ca_certs": "/ca"},
        ),
        ("redis://h/0?socket_timeout=99", {"host": "h", "db": 0}),
    ],
)
def test_urls_are_read_as_kombu_writes_them(url: str, said: dict[str, Any]) -> None:
    store = open_store(url, timeout=1)

    assert isinstance(store, RedisStore)
    assert said.items() <= store._address.options.items()


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("sentinel://a:1;sentinel://b/3", {"master_name": "shop"}, ([("a", 1), ("b", 26379)], "shop", 3, None)),
        ("sentinel://:pw@a/2;sentinel://b?master_name=mine", {}, ([("a", 26379), ("b", 26379)], "mine", 2, "pw")),
        ("sentinel://a;b:2/1", {"master_name": "shop"}, ([("a", 26379), ("b", 2)], "shop", 1, None)),
    ],
)
def test_sentinels_are_written_as_for_kombu(url: str, options: dict[str, Any], said: tuple[Any, ...]) -> None:
    store = open_store(url, timeout=1, options=options)

    assert isinstance(store, RedisStore)
    sentinels = store._address.sentinels
    assert sentinels is not None
    client = store._address.options
    assert (sentinels.hosts, sentinels.master_name, client["db"], client["password"]) == said


def test_sentinels_may_have_a_password_and_tls_of_their_own() -> None:
    options = {"master_name": "m", "sentinel_kwargs": {"password": "s"}, "min_other_sentinels": 1}
    store = open_store("sentinel://:pw@a", timeout=1, options=options, tls={"ssl_ca_certs": "/ca"})

    assert isinstance(store, RedisStore)
    assert store._address.sentinels is not None
    assert store._address.sentinels.options == {"password": "s"}
    assert store._address.sentinels.min_others == 1
    assert store._address.options["ssl_ca_certs"] == "/ca"
    assert store._address.options["password"] == "pw"


def test_certificates_may_come_from_the_brokers_settings() -> None:
    store = open_store("rediss://h", timeout=1, tls={"ssl_ca_certs": "/ca"})

    assert isinstance(store, RedisStore)
    assert store._address.options["ssl_ca_certs"] == "/ca"
    assert store._address.options["ssl_cert_reqs"] == "required"


@pytest.mark.parametrize(
    "url",
    [
        "sentinel://:hush@a:26379",
        "sentinel://:hush@a:hush?master_name=m",
        "amqp://u:hush@h",
        "hush",
        "",
        "redis://:hush/hush@h:6379/0",
        "redis://:hush@h/hush",
        "postgresql://u:hush/hush@h:hush/d",
        "postgresql+asyncpg://u:hush@h/d",
        "postgresql+nothing://u:hush@h/d",
        "db+mysql://u:hush@h/d",
        "sqlite://",
        "db+sqlite:///:memory:",
        "sqlite:///file:hush?mode=memory&uri=true",
    ],
)
def test_a_url_that_is_no_stores_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        open_store(url, timeout=1)

    assert "CELERYKIT_STORE_URL" in str(caught.value)
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_store_that_refuses_says_where_it_should_be_and_no_password() -> None:
    with services.refused() as port, pytest.raises(StoreUnavailable) as caught:
        open_store(f"redis://user:hush@127.0.0.1:{port}/3", timeout=1).get("k")

    assert f"127.0.0.1:{port}, database 3" in str(caught.value)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "driver", "place"),
    [
        ("postgresql://u:pw@h/shop", "postgresql+psycopg", "h:5432, database shop"),
        ("postgres://h:7/shop", "postgresql+psycopg", "h:7, database shop"),
        ("db+postgresql+psycopg://h/shop", "postgresql+psycopg", "h:5432, database shop"),
        ("sqla+postgresql://h/shop", "postgresql+psycopg", "h:5432, database shop"),
        ("postgresql:///shop?host=/run/pg", "postgresql+psycopg", "/run/pg:5432, database shop"),
        ("db+sqlite:///a/b.sqlite", "sqlite", "a/b.sqlite"),
        ("SQLite:////a.sqlite", "sqlite", "/a.sqlite"),
    ],
)
def test_databases_are_written_as_for_sqlalchemy_celery_or_kombu(url: str, driver: str, place: str) -> None:
    store = open_store(url, timeout=1)

    assert isinstance(store, SqlStore)
    assert store.is_shared
    assert store._own._url.drivername == driver
    assert store._place == place


def test_psycopg2_is_used_where_psycopg_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_addresses, "find_spec", lambda name: name == "psycopg2" or None)
    monkeypatch.setitem(sys.modules, "psycopg2", None)

    with pytest.raises(InvalidSettings, match=r"postgresql\+psycopg2 is not installed: pip install 'celerykit\[sql\]'"):
        open_store("postgresql://h/d", timeout=1)


def test_without_sqlalchemy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sql", "sql_addresses", "sql_connections", "sql_tables"):
        monkeypatch.delitem(sys.modules, f"celerykit.stores.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)

    with pytest.raises(InvalidSettings, match=r"pip install 'celerykit\[sql\]'"):
        open_store("sqlite:///a.sqlite", timeout=1)


def test_a_pooler_that_refuses_time_limits_is_asked_without() -> None:
    asked: list[dict[str, Any]] = []

    def connect(**options: Any) -> str:
        asked.append(options)
        if "statement_timeout" in options.get("options", ""):
            raise RuntimeError("FATAL: unsupported startup parameter in options: statement_timeout")
        return "connected"

    assert sql_connections._connect(connect, [], {"host": "h", "options": "-c a=b"}, timeout=2) == "connected"
    assert [options["options"].startswith("-c a=b") for options in asked] == [True, True]
    assert asked[1] == {"host": "h", "options": "-c a=b", "connect_timeout": 2}


def test_keys_that_look_alike_are_locked_apart() -> None:
    assert sql._lock_number("a") != sql._lock_number("b")
    assert all(-(2**63) <= sql._lock_number(str(number)) < 2**63 for number in range(1000))
