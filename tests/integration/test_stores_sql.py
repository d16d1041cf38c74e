"""The store in PostgreSQL and SQLite: its tables, its caller's transaction, and what it does when they are gone."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import Engine, create_engine, inspect, text
from sqlalchemy.orm import Session

from celerykit.errors import InvalidSettings, StoreUnavailable
from celerykit.stores import New, Swap, open_store
from celerykit.stores import sql as sql_module
from celerykit.stores.sql import SqlStore
from tests import services
from tests.integration.stores_crowd import crowd

TABLES = {"celerykit_counts", "celerykit_records", "celerykit_slots"}


@pytest.fixture(scope="module")
def server() -> Iterator[services.PostgreSQL]:
    with services.postgresql() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: Any, tmp_path: Path) -> str:
    """Where no table of the store is yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store.sqlite"
    url: str = request.getfixturevalue("server").url
    with connected(url) as engine:
        drop_tables(engine)
    return url


@pytest.fixture
def store(url: str) -> Iterator[SqlStore]:
    with opened(url) as store:
        yield store


@contextmanager
def opened(url: str, *, timeout: float = 5.0) -> Iterator[SqlStore]:
    store = open_store(url, timeout=timeout)
    assert isinstance(store, SqlStore)
    yield store
    store.close()


@contextmanager
def connected(url: str) -> Iterator[Engine]:
    """Connect as an application would."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    yield engine
    engine.dispose()


def drop_tables(engine: Engine) -> None:
    with engine.begin() as connection:
        for table in [*TABLES, "payments"]:
            connection.execute(text(f"DROP TABLE IF EXISTS {table}"))


def claim(key: str, version: str = "v", *, ttl: float = 100) -> Swap:
    return Swap(key, None, New(version, "data", ttl=ttl))


# Tables


def test_tables_are_created_when_they_are_first_missed(store: SqlStore, url: str) -> None:
    assert store.get("n") is None

    with connected(url) as engine:
        assert set(inspect(engine).get_table_names()) >= TABLES


def test_tables_that_were_dropped_are_created_again(store: SqlStore, url: str) -> None:
    store.add("n", ttl=60)
    with connected(url) as engine, engine.begin() as connection:
        connection.execute(text("DROP TABLE celerykit_counts"))

    assert store.add("n", ttl=60) == 1


def test_many_processes_may_create_the_tables_at_once(url: str) -> None:
    assert sum(map(len, crowd(url, "claim_many", rounds=1))) == 1


def test_who_may_not_create_tables_is_told(server: services.PostgreSQL) -> None:
    with connected(server.url) as engine, engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS celerykit_counts"))
        connection.execute(text("DROP ROLE IF EXISTS reader"))
        connection.execute(text("CREATE ROLE reader LOGIN"))

    with (
        opened(server.url.replace("postgres@", "reader@")) as store,
        pytest.raises(StoreUnavailable, match=r"refused \(InsufficientPrivilege 42501\)"),
    ):
        store.add("n", ttl=60)


def test_the_documented_tables_are_those_that_are_made(server: services.PostgreSQL) -> None:
    documented = (Path(__file__).parents[2] / "docs" / "stores.md").read_text()
    by_hand = documented.partition("```sql\n")[2].partition("```")[0]
    with connected(server.url) as engine, opened(server.url) as store:
        drop_tables(engine)
        store.get("n")
        made = shape(engine)
        drop_tables(engine)
        with engine.begin() as connection:
            for statement in filter(str.strip, by_hand.split(";")):
                connection.execute(text(statement))

        assert shape(engine) == made
        assert store.add("n", ttl=60) == 1


def shape(engine: Engine) -> list[Any]:
    there = inspect(engine)
    return [
        (
            table,
            [(column["name"], str(column["type"]), column["nullable"]) for column in there.get_columns(table)],
            there.get_pk_constraint(table)["constrained_columns"],
            [(index["name"], index["column_names"]) for index in there.get_indexes(table)],
        )
        for table in sorted(TABLES)
    ]


def test_what_is_over_is_swept_away_with_later_writes(
    store: SqlStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_module, "_SWEPT_EACH", 1)
    store.swap(*(claim(f"k{number}", ttl=0.001) for number in range(50)))
    store.add("n", ttl=0.001)
    store.take("s", "me", limit=1, ttl=0.001)
    time.sleep(0.01)

    store.add("another", ttl=60)

    with connected(url) as engine, engine.connect() as connection:
        left = [connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() for table in sorted(TABLES)]
    assert left == [1, 0, 0]


# In the caller's transaction


def test_what_is_done_in_a_transaction_counts_when_it_is_committed(store: SqlStore, url: str) -> None:
    with connected(url) as engine:
        with engine.connect() as connection:
            connection.execute(text("CREATE TABLE payments (id INTEGER)"))
            connection.commit()
        store.swap(claim("k", "1"))

        with engine.begin() as connection:
            connection.execute(text("INSERT INTO payments VALUES (1)"))
            assert store.on(connection).swap(Swap("k", "1", New("2", "done", ttl=60)))[0].done

        assert getattr(store.read("k"), "version", None) == "2"
        with engine.connect() as connection:
            connection.execute(text("INSERT INTO payments VALUES (2)"))
            inside = store.on(connection)
            assert inside.swap(Swap("k", "2", New("3", "done", ttl=60)))[0].done
            assert getattr(inside.read("k"), "version", None) == "3"
            connection.rollback()

        assert getattr(store.read("k"), "version", None) == "2"
        with engine.connect() as connection:
            assert connection.execute(text("SELECT id FROM payments")).scalars().all() == [1]


def test_a_session_has_a_connection_too(store: SqlStore, url: str) -> None:
    with connected(url) as engine:
        with Session(engine) as session:
            inside = store.on(session.connection())
            inside.swap(claim("a"), claim("b"), claim("a", "2"))
            assert inside.add("n", ttl=60) == 1
            assert inside.mark("m", "x", ttl=60) is None
            assert inside.take("s", "me", limit=1, ttl=60) == 0
            assert inside.take("s", "you", limit=1, ttl=60) > 0
            assert [key for key, _ in inside.find("")] == ["a", "b"]
            session.commit()

        assert [key for key, _ in store.find("")] == ["a", "b"]
        assert (store.get("n"), store.get("m")) == ("1", "x")
        assert store.take("s", "you", limit=1, ttl=60) > 0


def test_a_store_in_a_transaction_leaves_the_connection_open(store: SqlStore, url: str) -> None:
    with connected(url) as engine, engine.connect() as connection:
        store.on(connection).close()

        assert connection.execute(text("SELECT 1")).scalar_one() == 1


def test_a_connection_to_another_kind_of_database_is_refused(store: SqlStore, url: str, server: Any) -> None:
    other = server.url if url.startswith("sqlite") else "sqlite://"
    with connected(other) as engine, engine.connect() as connection, pytest.raises(InvalidSettings, match="connection"):
        store.on(connection)


def test_others_wait_for_a_transaction_but_not_for_ever(server: services.PostgreSQL) -> None:
    with opened(server.url, timeout=0.5) as store, connected(server.url) as engine:
        store.delete("k")
        store.swap(Swap("k", "v", None), claim("k", "1"))
        with engine.begin() as connection:
            assert store.on(connection).swap(Swap("k", "1", New("2", "", ttl=60)))[0].done
            with in_time(0.5), pytest.raises(StoreUnavailable, match=r"within 0\.5 s \(QueryCanceled"):
                store.swap(Swap("k", "1", New("3", "", ttl=60)))

        assert not store.swap(Swap("k", "1", New("3", "", ttl=60)))[0].done
        assert store.swap(Swap("k", "2", None))[0].done


# Gone, frozen, busy


@contextmanager
def in_time(timeout: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < timeout + 1.5


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_server_that_comes_back_is_used_again_at_once(server: services.PostgreSQL, end: str) -> None:
    with opened(server.url, timeout=2) as store:
        store.delete("n")
        with ThreadPoolExecutor(4) as threads:
            # So that several connections will have gone.
            list(threads.map(lambda _: store.add("n", ttl=60), range(20)))
        getattr(server, end)()
        try:
            with in_time(2), pytest.raises(StoreUnavailable, match=f"127.0.0.1:{server.port}, database postgres"):
                store.add("n", ttl=60)
        finally:
            server.start()

        assert store.add("n", ttl=60) == 21


def test_a_connection_that_was_closed_while_nobody_used_it_is_not_noticed(server: services.PostgreSQL) -> None:
    with opened(server.url) as store:
        store.add("n", ttl=60)
        server.stop()
        server.start()

        store.add("n", ttl=60)


def test_a_server_that_never_answers_is_given_up_in_time() -> None:
    with services.frozen() as port, opened(f"postgresql://u:hush@127.0.0.1:{port}/d", timeout=2) as store:
        began = time.monotonic()
        with pytest.raises(StoreUnavailable) as caught:
            store.mark("m", "x", ttl=1)

    assert time.monotonic() - began < 3.5
    assert "hush" not in "".join(traceback.format_exception(caught.value))


def test_a_server_that_freezes_is_given_up_in_time(server: services.PostgreSQL) -> None:
    with opened(server.url, timeout=0.5) as store:
        store.delete("n")
        assert store.add("n", ttl=60) == 1
        frozen = [child for child in psutil.Process(server.pid).children() if "idle" in " ".join(child.cmdline())]
        for session in frozen:
            os.kill(session.pid, signal.SIGSTOP)
        try:
            with in_time(0.5), pytest.raises(StoreUnavailable, match="no answer"):
                store.get("n")
            # Another connection, of a server that is alive.
            assert store.get("n") == "1"
        finally:
            for session in frozen:
                os.kill(session.pid, signal.SIGCONT)


def test_a_server_without_a_free_connection_is_given_up_in_time(server: services.PostgreSQL) -> None:
    with opened(server.url, timeout=0.5) as store, connected(server.url) as engine, engine.begin() as connection:
        store.add("n", ttl=60)
        connection.execute(text("LOCK TABLE celerykit_counts"))

        def ask(_: int) -> str:
            try:
                store.get("n")
            except StoreUnavailable as error:
                return str(error)
            return ""

        with in_time(1.0), ThreadPoolExecutor(30) as threads:
            said = list(threads.map(ask, range(30)))

    assert all("did not answer within 0.5 s" in line for line in said)


def test_a_locked_file_is_given_up_in_time(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with opened(f"sqlite:///{path}", timeout=0.3) as store:
        store.add("n", ttl=60)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with in_time(0.3), pytest.raises(StoreUnavailable, match="locked"):
            store.add("n", ttl=60)
        with in_time(0.3), pytest.raises(StoreUnavailable, match="locked"):
            store.take("s", "me", limit=1, ttl=60)
        assert store.get("n") == "1"
        other.execute("ROLLBACK")
        other.close()

        assert store.add("n", ttl=60) == 2


def test_a_file_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with (
        opened(f"sqlite:///{tmp_path}/nowhere/store.sqlite") as store,
        pytest.raises(StoreUnavailable, match="nowhere"),
    ):
        store.get("n")


# What is told


def test_a_wrong_password_is_not_repeated(server: services.PostgreSQL) -> None:
    with opened(server.guarded_url.format("right")) as store:
        store.add("n", ttl=60)
    with opened(server.guarded_url.format("hush")) as store, pytest.raises(StoreUnavailable) as caught:
        store.add("n", ttl=60)

    told = "".join(traceback.format_exception(caught.value))
    assert "password authentication failed" in told
    assert "hush" not in told


def test_a_refusal_repeats_nothing_of_what_was_asked(store: SqlStore, url: str) -> None:
    secret = "".join(["hu", "sh"])
    store.mark("m", secret, ttl=60)
    with connected(url) as engine, engine.begin() as connection:
        connection.execute(text("ALTER TABLE celerykit_counts RENAME COLUMN value TO another"))

    with pytest.raises(StoreUnavailable) as caught:
        store.mark(secret, secret, ttl=60)

    assert "refused" in str(caught.value)
    assert secret not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    with connected(url) as engine, engine.begin() as connection:
        connection.execute(text("DROP TABLE celerykit_counts"))


def test_text_that_postgresql_cannot_read_is_not_repeated(server: services.PostgreSQL) -> None:
    with opened(server.url) as store:
        store.delete("m")
        store.mark("m", "hush", ttl=60)
        with pytest.raises(StoreUnavailable, match=r"refused \(InvalidTextRepresentation 22P02\)") as caught:
            store.add("m", ttl=60)
        store.delete("m")

    assert "hush" not in "".join(traceback.format_exception(caught.value))
