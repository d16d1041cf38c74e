"""
How a store comes to a connection with an SQL database: one of its own, or its caller's.

Every wait has an end, on the server as well as here: a server that is frozen
does not keep its own time limits.
"""

from __future__ import annotations

import math
import os
import sqlite3
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from functools import cache
from selectors import DefaultSelector
from typing import Any, Protocol

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect
from sqlalchemy.exc import DisconnectionError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from celerykit.stores.sql_tables import METADATA

__all__ = ["Borrowed", "Connections", "Own"]

#: Seconds that a server has to say that a statement took too long, before its connection is given up.
_GRACE = 0.5

#: Seconds a connection is used for. Load balancers drop silent ones, often after 350 s, and tell nobody.
_USED_FOR = 300

#: Whoever creates the tables holds it: PostgreSQL cannot do that twice at once.
_TABLES_LOCK = 0x63656C6572796B69


class Connections(Protocol):
    """
    Where connections come from.

    Attributes:
        is_own:
            Whether nobody else's work is in the same transaction.
    """

    is_own: bool

    def open(self) -> AbstractContextManager[Connection]:
        """Give a connection on which each statement is a transaction, unless `begin` says otherwise."""
        ...

    def begin(self, connection: Connection, *, lock: int | None = None) -> AbstractContextManager[None]:
        """Make what follows one transaction; of those with the same *lock*, one runs at a time."""
        ...

    def close(self) -> None:
        """Let connections go."""
        ...


class Own:
    """
    Connections that nobody else uses, a few for each process.

    Args:
        timeout:
            Seconds to wait for a free connection, to connect in, and for each answer.
    """

    is_own = True

    def __init__(self, url: URL, *, timeout: float) -> None:
        self._is_sqlite = url.get_backend_name() == "sqlite"
        self._url = url
        self._timeout = timeout
        # By process id. A forked process leaves alone what it inherited: to close it would end its parent's session.
        self._engines: dict[int, Engine] = {}

    @contextmanager
    def open(self) -> Iterator[Connection]:
        """Give a connection of this process."""
        pid = os.getpid()
        engine = self._engines.get(pid) or self._engines.setdefault(pid, self._engine())
        with engine.connect() as connection:
            yield connection

    @contextmanager
    def begin(self, connection: Connection, *, lock: int | None = None) -> Iterator[None]:
        """Make what follows one transaction."""
        connection.exec_driver_sql(self._beginning(lock))
        try:
            yield
            connection.exec_driver_sql("COMMIT")
        except BaseException:
            # It may be what has failed.
            with suppress(SQLAlchemyError):
                connection.exec_driver_sql("ROLLBACK")
            raise

    def create_tables(self) -> None:
        """Create what is not there, whoever else does so now."""
        with self.open() as connection:
            if _has_tables(connection):
                return
            with self.begin(connection, lock=_TABLES_LOCK):
                METADATA.create_all(connection)

    def close(self) -> None:
        """Close what this process has opened."""
        engine = self._engines.pop(os.getpid(), None)
        if engine is not None:
            engine.dispose()

    def _beginning(self, lock: int | None) -> str:
        if self._is_sqlite:
            return "BEGIN IMMEDIATE"
        # Two statements in one round trip. Those that follow see what the holder before us wrote.
        begin = "BEGIN ISOLATION LEVEL READ COMMITTED"
        return begin if lock is None else f"{begin}; SELECT pg_advisory_xact_lock({lock})"

    def _engine(self) -> Engine:
        make = _sqlite if self._is_sqlite else _postgresql
        return make(self._url, timeout=self._timeout)


class Borrowed:
    """Somebody else's connection, in whose transaction everything happens; how that ends is not ours to say."""

    is_own = False

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def open(self) -> AbstractContextManager[Connection]:
        """Give the one there is."""
        return nullcontext(self._connection)

    @contextmanager
    def begin(self, connection: Connection, *, lock: int | None = None) -> Iterator[None]:
        """Stay in the transaction there is."""
        # SQLite has one writer at a time anyway.
        if lock is not None and connection.dialect.name == "postgresql":
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({lock})")
        yield

    def close(self) -> None:
        """Leave it open."""


def _has_tables(connection: Connection) -> bool:
    there = inspect(connection)
    return all(there.has_table(table.name) for table in METADATA.sorted_tables)


def _sqlite(url: URL, *, timeout: float) -> Engine:
    engine = create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        poolclass=QueuePool,
        pool_timeout=timeout,
        hide_parameters=True,
        connect_args={"timeout": timeout, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def let_readers_go_on(connection: Any, _: Any) -> None:
        # For good, for all who use the file. When somebody uses it just now, it is left to the next one.
        with suppress(sqlite3.OperationalError), closing(connection.cursor()) as cursor:
            cursor.execute("PRAGMA journal_mode = WAL")

    return engine


def _postgresql(url: URL, *, timeout: float) -> Engine:
    is_psycopg = url.get_driver_name() == "psycopg"
    engine = create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        pool_timeout=timeout,
        pool_recycle=_USED_FOR,
        pool_use_lifo=True,
        pool_pre_ping=not is_psycopg,
        hide_parameters=True,
        use_native_hstore=False,
    )

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, _: Any, args: list[Any], options: dict[str, Any]) -> Any:
        make = _bounded(timeout + _GRACE).connect if is_psycopg else dialect.loaded_dbapi.connect
        if is_psycopg:
            # Poolers share a session among clients, and may know nothing of what was prepared in it.
            options["prepare_threshold"] = None
        return _connect(make, args, options, timeout=timeout)

    if is_psycopg:
        event.listen(engine, "checkout", _refuse_stale)
    return engine


def _connect(make: Callable[..., Any], args: list[Any], options: dict[str, Any], *, timeout: float) -> Any:
    options = {**options, "connect_timeout": math.ceil(timeout)}
    ours = f"-c statement_timeout={math.ceil(timeout * 1000)} -c default_transaction_isolation=read\\ committed"
    try:
        return make(*args, **{**options, "options": f"{options.get('options', '')} {ours}".strip()})
    except Exception as error:
        # PgBouncer refuses what it does not know. Then only this side's limits count.
        if "unsupported startup parameter" not in str(error):
            raise
    return make(*args, **options)


def _refuse_stale(connection: Any, *_: Any) -> None:
    """Find out, without a round trip, that a server has closed a connection while nobody used it."""
    try:
        # The first time for its last words.
        connection.pgconn.consume_input()
        connection.pgconn.consume_input()
    except Exception as error:
        raise DisconnectionError("closed by the server") from error


@cache
def _bounded(seconds: float) -> Any:
    """Make psycopg's class of connections, none of which waits for longer than so many seconds."""
    import psycopg

    class Bounded(psycopg.Connection[Any]):
        def wait(self, gen: Any, *_: Any, **__: Any) -> Any:
            # psycopg's own may wait for ever, and knows of a limit only since 3.3.
            try:
                return _drive(gen, self.pgconn.socket, deadline=time.monotonic() + seconds)
            except TimeoutError:
                self.pgconn.finish()
                raise psycopg.OperationalError("no answer") from None

    return Bounded


def _drive(steps: Generator[int, int, Any], socket: int, *, deadline: float) -> Any:
    """Take one step after the other: each says for which of reading and writing it waits, and is told what is ready."""
    try:
        wanted = next(steps)
        with DefaultSelector() as selector:
            selector.register(socket, wanted)
            while True:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError
                again = steps.send(ready[0][1])
                if again != wanted:
                    wanted = again
                    selector.modify(socket, wanted)
    except StopIteration as end:
        return end.value
