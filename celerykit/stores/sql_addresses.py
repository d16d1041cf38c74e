"""Where an SQL database is: URLs as SQLAlchemy writes them, and as Celery and Kombu do."""

from __future__ import annotations

import re
import sqlite3
from importlib.util import find_spec

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from celerykit.errors import InvalidSettings

__all__ = ["place", "read_url", "secrets"]

#: `INSERT … RETURNING`.
_OLDEST_SQLITE = (3, 35)


def read_url(text: str) -> URL:
    """
    Read a URL of PostgreSQL or of a SQLite file.

    Raises:
        InvalidSettings: It cannot be read, a package is missing, or nothing would last there.
    """
    try:
        url = make_url(re.sub(r"^(db|sqla)\+", "", text))
    except (ArgumentError, ValueError):
        raise InvalidSettings(
            "CELERYKIT_STORE_URL: the address cannot be read. In a user or password, write `@ : / ? # [ ]` and `%` "
            "as `%40` and so on."
        ) from None
    url = url.set(drivername=_driver(url.drivername))
    _check_driver(url)
    if url.get_backend_name() == "sqlite":
        _check_sqlite(url)
    return url


def place(url: URL) -> str:
    """Say where it is, without what is secret."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    # With libpq's own default, and its own files and variables, nobody here knows.
    return f"{url.host or url.query.get('host', 'the default host')}:{url.port or 5432}, database {url.database}"


def secrets(url: URL) -> list[str]:
    """List what an error's text must not repeat."""
    query = (url.query.get(name) for name in ("password", "sslpassword"))
    return [str(secret) for secret in (url.password, *query) if secret]


def _driver(name: str) -> str:
    backend, plus, driver = name.lower().partition("+")
    if backend not in ("postgres", "postgresql"):
        return name.lower()
    if plus:
        return f"postgresql+{driver}"
    return "postgresql+psycopg" if find_spec("psycopg") or not find_spec("psycopg2") else "postgresql+psycopg2"


def _check_driver(url: URL) -> None:
    try:
        url.get_dialect().import_dbapi()
    except ImportError as error:
        raise InvalidSettings(
            f"CELERYKIT_STORE_URL: {url.drivername} is not installed: pip install 'celerykit[sql]'."
        ) from error


def _check_sqlite(url: URL) -> None:
    database = url.database or ""
    if database in ("", ":memory:") or ":memory:" in database or url.query.get("mode") == "memory":
        raise InvalidSettings(
            "CELERYKIT_STORE_URL: SQLite in memory is gone with its connection; write sqlite:///a/file, or memory://."
        )
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise InvalidSettings(
            f"CELERYKIT_STORE_URL: SQLite must be 3.35 or newer, and Python came with {sqlite3.sqlite_version}."
        )
