"""A store in an SQL database: PostgreSQL, or a SQLite file."""

from __future__ import annotations

import copy
import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

from sqlalchemy import Connection, Executable
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from celerykit.errors import InvalidSettings, StoreUnavailable
from celerykit.stores import Hold, Record, Swap, Swapped
from celerykit.stores.sql_addresses import place, read_url, secrets
from celerykit.stores.sql_connections import Borrowed, Connections, Own
from celerykit.stores.sql_tables import statements

__all__ = ["SqlStore"]

T = TypeVar("T")

#: How often a move is tried that was refused, when what is found there then would not refuse it.
_TRIES = 5

#: How many writes go by, on average, until one sweeps: ten times what they may have left goes then.
_SWEPT_EACH = 100

#: Characters. An index entry of PostgreSQL has room for 2700 bytes, which may be two texts of four bytes each.
_LONGEST = 300

#: The states in which a database gives up, rather than refuses: a time limit, a shutdown, too many connections.
_GIVES_UP = ("08", "57", "53", "SQLITE_BUSY", "SQLITE_CANTOPEN", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_LOCKED")


class SqlStore:
    """
    Everything in three tables, under keys that begin with *prefix*.

    The tables are created when they are first missed. What one statement can
    do, one statement does, as a transaction of its own.

    Args:
        timeout:
            Seconds to wait for a free connection, to connect in, and for each answer. Nothing is tried twice.

        clock:
            Seconds since 1970, for SQLite; PostgreSQL has a clock of its own.
    """

    is_shared = True

    def __init__(self, url: str, *, timeout: float, prefix: str, clock: Callable[[], float] = time.time) -> None:
        address = read_url(url)
        self._dialect = address.get_backend_name()
        self._place = place(address)
        self._secrets = secrets(address)
        self._timeout = timeout
        self._prefix = prefix
        self._clock = clock if self._dialect == "sqlite" else None
        self._do = statements(self._dialect)
        self._own = Own(address, timeout=timeout)
        self._connections: Connections = self._own
        self._has_tables = False

    def on(self, connection: Connection) -> SqlStore:
        """
        Return the same store inside somebody else's transaction.

        What it does is there for others when the caller commits, together with
        the caller's own work, and not at all if the caller does not. Until then
        others who want the same keys wait.

        Args:
            connection:
                SQLAlchemy's, to the same database; of a session, ``session.connection()``.

        Raises:
            InvalidSettings: It is to a database of another kind.
        """
        if connection.dialect.name != self._dialect:
            raise InvalidSettings(
                f"this store is in {self._dialect}, and the connection is to {connection.dialect.name}."
            )
        if not self._has_tables:
            # Not in the caller's transaction, which a missing table would break.
            self._bounded(self._own.create_tables)
            self._has_tables = True
        store = copy.copy(self)
        store._connections = Borrowed(connection)
        return store

    # Counts and marks

    def add(self, key: str, *, ttl: float) -> int:
        """Add one to a count, and return it."""
        count = self._ask(
            lambda connection: self._row(connection, self._do.add, this_key=self._key(key), ttl=float(ttl))
        )
        self._sweep_sometimes()
        return int(count[0])

    def subtract(self, key: str) -> None:
        """Take one off a count, but never below 0."""
        self._ask(lambda connection: self._run(connection, self._do.subtract, this_key=self._key(key)))

    def mark(self, key: str, value: str, *, ttl: float) -> str | None:
        """Set *key* unless it is set, and return what was there."""
        before = self._ask(partial(self._mark, self._key(key), value, float(ttl)))
        self._sweep_sometimes()
        return before

    def get(self, key: str) -> str | None:
        """Return a mark or a count."""
        return self._ask(partial(self._get, self._key(key)))

    def delete(self, key: str) -> None:
        """Forget *key*."""
        self._ask(lambda connection: self._run(connection, self._do.delete, this_key=self._key(key)))

    # Records

    def read(self, key: str) -> Record | None:
        """Return the record under *key*."""
        return self._ask(partial(self._read, self._key(key)))

    def swap(self, *swaps: Swap) -> list[Swapped]:
        """
        Compare and swap.

        Several are one transaction, in the order of their keys, so that two of
        them never wait for each other.
        """
        if not swaps:
            return []
        act = self._swap_each if len(swaps) == 1 else self._swap_all
        swapped = self._ask(partial(act, swaps))
        self._sweep_sometimes(len(swaps))
        return swapped

    def renew(self, holds: Sequence[Hold]) -> list[bool]:
        """Begin leases anew, and tell which records are still there as they were; all in one transaction."""
        return self._ask(partial(self._renew_all, holds)) if holds else []

    def find(self, prefix: str) -> Iterator[tuple[str, Record]]:
        """Walk through the records whose keys begin so."""
        beginning = self._prefix + _storable(prefix)
        ask = partial(self._rows, self._do.find, prefix=beginning)
        while True:
            rows = self._ask(ask)
            for row in rows:
                if not row.key.startswith(beginning):
                    return
                yield row.key.removeprefix(self._prefix), _record(row)
            if not rows:
                return
            ask = partial(self._rows, self._do.find_after, after=rows[-1].key)

    # Slots

    def take(self, key: str, holder: str, *, limit: int, ttl: float) -> float:
        """Take one of *limit* slots, or tell in how many seconds the next one is free."""
        wait = self._ask(partial(self._take, self._key(key), _short(holder), limit, float(ttl)))
        self._sweep_sometimes()
        return wait

    def give(self, key: str, holder: str) -> None:
        """Give a slot back."""
        asked = {"this_key": self._key(key), "this_holder": _short(holder)}
        self._ask(lambda connection: self._run(connection, self._do.give, **asked))

    def sweep(self) -> int:
        """Forget for good what is over, at most a thousand rows of each table, and tell how many it were."""
        return self._ask(lambda connection: sum(self._run(connection, sweep) for sweep in self._do.sweep))

    def close(self) -> None:
        """Let connections go."""
        self._connections.close()

    # What each does on a connection

    def _mark(self, key: str, value: str, ttl: float, connection: Connection) -> str | None:
        for _ in range(_TRIES):
            if self._row(connection, self._do.mark, this_key=key, this_value=value, ttl=ttl):
                return None
            before = self._get(key, connection)
            if before is not None:
                return before
            # It has gone in between.
        raise StoreUnavailable(f"the store at {self._place} is too busy with one key.")

    def _get(self, key: str, connection: Connection) -> str | None:
        row = self._row(connection, self._do.get, this_key=key)
        return None if row is None else row[0]

    def _read(self, key: str, connection: Connection) -> Record | None:
        row = self._row(connection, self._do.read, this_key=key)
        return None if row is None else _record(row)

    def _swap(self, swap: Swap, connection: Connection) -> Swapped:
        for _ in range(_TRIES):
            if self._is_swapped(connection, swap):
                return Swapped(done=True, found=None)
            found = self._read(self._key(swap.key), connection)
            if not swap.fits(found):
                return Swapped(done=False, found=found)
            # What stood there has gone in between.
        raise StoreUnavailable(f"the store at {self._place} is too busy with one key.")

    def _is_swapped(self, connection: Connection, swap: Swap) -> bool:
        key, do = self._key(swap.key), self._do
        if swap.expected is None:
            if swap.new is None:
                return self._read(key, connection) is None
            return self._row(connection, do.write, this_key=key, **_content(swap)) is not None
        if swap.new is None:
            forget = do.forget_lapsed if swap.lapsed else do.forget
            return bool(self._run(connection, forget, this_key=key, expected=swap.expected))
        replace = do.replace_lapsed if swap.lapsed else do.replace
        return bool(self._run(connection, replace, this_key=key, expected=swap.expected, **_content(swap)))

    def _swap_all(self, swaps: Sequence[Swap], connection: Connection) -> list[Swapped]:
        keys = [self._key(swap.key) for swap in swaps]
        swapped: dict[int, Swapped] = {}
        with self._connections.begin(connection):
            for is_new, numbers in _runs(keys, swaps):
                do = self._write_all if is_new else self._swap_each
                swapped.update(zip(numbers, do([swaps[number] for number in numbers], connection), strict=True))
        return [swapped[number] for number in range(len(swaps))]

    def _swap_each(self, swaps: Sequence[Swap], connection: Connection) -> list[Swapped]:
        return [self._swap(swap, connection) for swap in swaps]

    def _write_all(self, swaps: Sequence[Swap], connection: Connection) -> list[Swapped]:
        """Write records where nothing must be, each under another key, by one statement."""
        keys = [self._key(swap.key) for swap in swaps]
        rows = [self._parameters(this_key=key, **_content(swap)) for key, swap in zip(keys, swaps, strict=True)]
        written = set(connection.execute(self._do.write, rows).scalars())
        refused = [key for key in keys if key not in written]
        there = self._rows(self._do.read_many, connection, keys=refused) if refused else []
        found = {row.key: _record(row) for row in there}

        def outcome(key: str, swap: Swap) -> Swapped:
            if key in written:
                return Swapped(done=True, found=None)
            # What stood there may have gone in between.
            return Swapped(done=False, found=found[key]) if key in found else self._swap(swap, connection)

        return list(map(outcome, keys, swaps))

    def _renew_all(self, holds: Sequence[Hold], connection: Connection) -> list[bool]:
        if len(holds) == 1:
            return [self._is_renewed(connection, holds[0])]
        # In the order of their keys, as in `swap`.
        order = sorted(range(len(holds)), key=lambda number: self._key(holds[number].key))
        with self._connections.begin(connection):
            renewed = {number: self._is_renewed(connection, holds[number]) for number in order}
        return [renewed[number] for number in range(len(holds))]

    def _is_renewed(self, connection: Connection, hold: Hold) -> bool:
        times = {"lease": float(hold.lease), "ttl": float(hold.ttl)}
        key = self._key(hold.key)
        return bool(self._run(connection, self._do.renew, this_key=key, expected=hold.version, **times))

    def _take(self, key: str, holder: str, limit: int, ttl: float, connection: Connection) -> float:
        with self._connections.begin(connection, lock=_lock_number(key)):
            if self._row(connection, self._do.take, this_key=key, this_holder=holder, limit=limit, ttl=ttl):
                return 0.0
            row = self._row(connection, self._do.wait, this_key=key, limit=limit)
        # One may have ended between the two statements: it is free now, and that is not the same as taken.
        return max(0.001, row[0]) if row else 0.001

    # How it is asked

    def _key(self, key: str) -> str:
        return self._prefix + _short(key)

    def _parameters(self, **parameters: Any) -> dict[str, Any]:
        if self._clock is None:
            return parameters
        now = self._clock()
        return {**parameters, "now": now, "now_there": now}

    def _run(self, connection: Connection, statement: Executable, **parameters: Any) -> int:
        """Tell how many rows it touched; of an insert, SQLAlchemy would not know."""
        return connection.execute(statement, self._parameters(**parameters)).rowcount

    def _row(self, connection: Connection, statement: Executable, **parameters: Any) -> Any:
        return connection.execute(statement, self._parameters(**parameters)).first()

    def _rows(self, statement: Executable, connection: Connection, **parameters: Any) -> Sequence[Any]:
        return connection.execute(statement, self._parameters(**parameters)).all()

    def _ask(self, act: Callable[[Connection], T]) -> T:
        return self._bounded(partial(self._act, act))

    def _act(self, act: Callable[[Connection], T]) -> T:
        try:
            with self._connections.open() as connection:
                return act(connection)
        except DBAPIError as error:
            if not (self._connections.is_own and _is_missing_table(error)):
                raise
        self._own.create_tables()
        with self._connections.open() as connection:
            return act(connection)

    def _bounded(self, act: Callable[[], T]) -> T:
        try:
            return act()
        except (SQLAlchemyError, OSError) as error:
            told = self._told(error)
        # Out here, so that not even the context of the error repeats what was sent.
        raise told

    def _told(self, error: Exception) -> StoreUnavailable:
        cause = getattr(error, "orig", None) or error
        state = _state(cause)
        is_silent = isinstance(error, (OperationalError, InterfaceError, PoolTimeout, OSError))
        if not is_silent or (state and not state.startswith(_GIVES_UP)):
            reason = f"{type(cause).__name__} {state}".strip()
            return StoreUnavailable(f"the store at {self._place} refused ({reason}).")
        text = str(cause).strip().partition("\n")[0]
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return StoreUnavailable(
            f"the store at {self._place} did not answer within {self._timeout:g} s ({type(cause).__name__}: {text}). "
            "Check that it runs, and CELERYKIT_STORE_URL."
        )

    def _sweep_sometimes(self, writes: int = 1) -> None:
        # By chance, so that processes that live for a few writes only do their part.
        if self._connections.is_own and random.random() * _SWEPT_EACH < writes:  # noqa: S311
            with suppress(StoreUnavailable):
                self.sweep()


def _content(swap: Swap) -> dict[str, Any]:
    assert swap.new is not None
    version, data, ttl, lease = swap.new
    return {
        "this_version": version,
        "this_data": data,
        "ttl": float(ttl),
        "lease": None if lease is None else float(lease),
    }


def _record(row: Any) -> Record:
    return Record(row.version, row.data, row.lease)


def _runs(keys: Sequence[str], swaps: Sequence[Swap]) -> Iterator[tuple[bool, list[int]]]:
    """
    Split the numbers of *swaps*, in the order of their keys, into runs that one statement can do, and others.

    It can where nothing must be yet, and no key comes twice.
    """
    times = Counter(keys)

    def is_new(number: int) -> bool:
        swap = swaps[number]
        return swap.expected is None and swap.new is not None and times[keys[number]] == 1

    # Sorting leaves those with the same key as they were.
    for together, numbers in groupby(sorted(range(len(keys)), key=keys.__getitem__), key=is_new):
        yield together, list(numbers)


def _short(text: str) -> str:
    """Write *text* so that an index can hold it."""
    text = _storable(text)
    if len(text) <= _LONGEST:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text[: _LONGEST - len(digest) - 1]}:{digest}"


def _storable(text: str) -> str:
    """Write *text* without what no database holds: NUL, and halves of characters."""
    if text.isascii() and "\0" not in text:
        return text
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _lock_number(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), signed=True)


def _is_missing_table(error: DBAPIError) -> bool:
    return _state(error.orig) == "42P01" or "no such table" in str(error.orig)


def _state(error: object) -> str:
    """Give the database's name of what is wrong; psycopg, psycopg2 and SQLite keep it in different places."""
    names = (getattr(error, attribute, None) for attribute in ("sqlstate", "pgcode", "sqlite_errorname"))
    return str(next(filter(None, names), ""))
