"""
The store: the little state that outlives a process.

Counts, marks, records and slots stand apart: one key may be used for each. All
have a time to live. Clients are imported when a store of their kind is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from celerykit.errors import InvalidSettings
from celerykit.settings import settle

__all__ = ["Hold", "New", "Record", "Store", "Swap", "Swapped", "default_url", "open_store"]

_REDIS = frozenset({"redis", "rediss", "redis+socket", "sentinel"})

#: As SQLAlchemy writes it, as Celery does for results, and as Kombu does for a broker.
_SQL = re.compile(r"(db\+|sqla\+)?(postgres(ql)?(\+psycopg2?)?|sqlite(\+pysqlite)?)://", re.IGNORECASE)
_IN_MEMORY = re.compile(r"sqlite(\+pysqlite)?:///?([?:].*)?$", re.IGNORECASE)


class Record(NamedTuple):
    """
    What stands under a key that is swapped.

    Attributes:
        version:
            What a swap compares.

        data:
            What the store does not look at.

        lease:
            Seconds left, by the store's own clock: 0 or less when it has
            lapsed; ``None`` without one.
    """

    version: str
    data: str
    lease: float | None


class New(NamedTuple):
    """
    What a swap writes.

    Attributes:
        ttl:
            Seconds until it is forgotten.

        lease:
            Seconds, or ``None`` for none.
    """

    version: str
    data: str
    ttl: float
    lease: float | None = None


class Swap(NamedTuple):
    """
    One compare-and-swap.

    Attributes:
        expected:
            The version that must stand there; ``None`` when nothing must.

        new:
            ``None`` to forget what is there.

        lapsed:
            Whether its lease must also have run out, or there be none.
    """

    key: str
    expected: str | None
    new: New | None
    lapsed: bool = False

    def fits(self, found: Record | None) -> bool:
        """Tell whether it may be done where *found* stands."""
        if found is None or self.expected is None:
            return found is None and self.expected is None
        has_lapsed = found.lease is None or found.lease <= 0
        return found.version == self.expected and (has_lapsed or not self.lapsed)


class Swapped(NamedTuple):
    """
    What came of a swap.

    Attributes:
        found:
            What stood there instead; ``None`` when nothing did, or it is done.
    """

    done: bool
    found: Record | None


class Hold(NamedTuple):
    """What is renewed: *lease* and *ttl* in seconds from now, if *version* still stands there."""

    key: str
    version: str
    lease: float
    ttl: float


class Store(Protocol):
    """
    Counts, marks, records and slots.

    Every call is safe from any thread and after a fork. To Redis and Valkey it is one round trip; PostgreSQL
    takes two or three where it moves many records, takes a slot, or has to say what it found instead.

    Each raises `StoreUnavailable` when the store does not answer in time, or
    refuses. Whether it did what was asked is then unknown.

    Attributes:
        is_shared:
            Whether other processes see what this one writes.
    """

    is_shared: bool

    def add(self, key: str, *, ttl: float) -> int:
        """Add one to a count, and return it. It is forgotten *ttl* seconds after the last addition."""
        ...

    def subtract(self, key: str) -> None:
        """Take one off a count, but never below 0; when it is forgotten stays as it was."""
        ...

    def mark(self, key: str, value: str, *, ttl: float) -> str | None:
        """
        Set *key* unless it is set.

        Returns:
            What was there; None when the mark is now ours.
        """
        ...

    def get(self, key: str) -> str | None:
        """Return a mark or a count, as text."""
        ...

    def delete(self, key: str) -> None:
        """Forget *key*, if it is there."""
        ...

    def read(self, key: str) -> Record | None:
        """Return the record under *key*."""
        ...

    def swap(self, *swaps: Swap) -> list[Swapped]:
        """Compare and swap: each atomic by itself, one after the other, all sent together."""
        ...

    def renew(self, holds: Sequence[Hold]) -> list[bool]:
        """Begin leases anew, and tell which records are still there as they were."""
        ...

    def take(self, key: str, holder: str, *, limit: int, ttl: float) -> float:
        """
        Take one of *limit* slots under *key*, for *ttl* seconds.

        Again by the same holder, its time begins anew.

        Returns:
            0 when it is taken, else in how many seconds the next one is free.
        """
        ...

    def give(self, key: str, holder: str) -> None:
        """Give a slot back, if the holder has one."""
        ...

    def find(self, prefix: str) -> Iterator[tuple[str, Record]]:
        """
        Walk through the records whose keys begin so, a few at a time.

        What changes meanwhile may be missed, and one record may come twice.
        """
        ...

    def close(self) -> None:
        """Let connections go. The next call opens them again."""
        ...


def open_store(
    url: str,
    *,
    timeout: float,
    prefix: str = "celerykit:",
    tls: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Store:
    """
    Return the store at *url*; nothing is connected yet.

    Args:
        url:
            ``redis://``, ``rediss://``, ``redis+socket:///path?virtual_host=0``,
            the same with ``valkey``, ``sentinel://``, ``postgresql://``,
            ``sqlite:///path``, or ``memory://``. As Celery and Kombu write
            them, too: ``db+postgresql://``, ``sqla+sqlite:///path``.

        timeout:
            Seconds to connect in, and to wait for an answer.

        prefix:
            Before every key.

        tls:
            As in ``broker_use_ssl``, for certificates that the URL does not name.

        options:
            As in ``broker_transport_options``, for what the URL of a Sentinel does not say.

    Raises:
        InvalidSettings: There is no such store. The message does not repeat the URL.
    """
    url = settle(_used(url), has_tls_options=bool(tls))
    scheme = _scheme(url)
    if scheme == "memory":
        from celerykit.stores.memory import MemoryStore

        return MemoryStore()
    if scheme in _REDIS:
        from celerykit.stores.redis import RedisStore

        return RedisStore(url, timeout=timeout, prefix=prefix, tls=tls or {}, options=options or {})
    if _SQL.match(url):
        return _open_sql(url, timeout=timeout, prefix=prefix)
    raise InvalidSettings(
        "CELERYKIT_STORE_URL: a store is at redis://, rediss://, redis+socket:// (or the same with valkey), "
        "sentinel://, postgresql://, sqlite:///path, or memory://."
    )


def default_url(broker: str, backend: str | None) -> str:
    """
    Pick the store's URL.

    The broker or the result backend, whichever is Redis, Valkey or a Sentinel;
    else whichever is PostgreSQL or a SQLite file; else memory.
    """
    urls = [_used(url) for url in (broker, backend) if url]
    redis = (url for url in urls if _scheme(settle(url)) in _REDIS)
    sql = (url for url in urls if _SQL.match(url) and not _IN_MEMORY.search(url))
    return next(redis, None) or next(sql, "memory://")


def _open_sql(url: str, *, timeout: float, prefix: str) -> Store:
    try:
        from celerykit.stores.sql import SqlStore
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("sqlalchemy"):
            raise
        raise InvalidSettings(
            "CELERYKIT_STORE_URL: a store in an SQL database needs SQLAlchemy: pip install 'celerykit[sql]'."
        ) from error
    return SqlStore(url, timeout=timeout, prefix=prefix)


def _used(url: str) -> str:
    """Return the first of several URLs: a store that moves forgets what it knew. Sentinels are asked in turn."""
    url = url.strip()
    is_one = _scheme(url) == "sentinel" or _SQL.match(url)
    return url if is_one else url.split(";")[0].strip()


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower() if "://" in url else ""
