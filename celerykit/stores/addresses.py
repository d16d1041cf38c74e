"""Where a Redis or Valkey is: URLs as Kombu and Celery write them, which is not quite how the client would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from celerykit.errors import InvalidSettings

__all__ = ["Address", "Sentinels", "read_address"]

#: What Kombu and Celery write in URLs, in the words of the client.
_CERT_REQS = {"CERT_REQUIRED": "required", "CERT_OPTIONAL": "optional", "CERT_NONE": "none"}
_TLS = frozenset({"ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"})

_SENTINEL_PORT = 26379


@dataclass(frozen=True)
class Sentinels:
    """
    Who knows where the master is.

    Attributes:
        options:
            For the connections to them, which may have a password and TLS of their own.
    """

    master_name: str
    hosts: Sequence[tuple[str, int]]
    options: Mapping[str, Any]
    min_others: int


@dataclass(frozen=True)
class Address:
    """
    Where a server is, and how to log in.

    Attributes:
        options:
            Of the client.

        place:
            The same for people, without what is secret.
    """

    options: Mapping[str, Any]
    place: str
    sentinels: Sentinels | None = None


def read_address(url: str, *, tls: Mapping[str, Any], options: Mapping[str, Any]) -> Address:
    """
    Read a URL that `celerykit.settings.settle` has settled.

    Args:
        tls:
            As in ``broker_use_ssl``.

        options:
            As in ``broker_transport_options``; what matters here is ``master_name``,
            ``sentinel_kwargs`` and ``min_other_sentinels``.

    Raises:
        InvalidSettings: It cannot be read.
    """
    try:
        if url.startswith("sentinel://"):
            return _managed(_sentinel_urls(url), tls=tls, options=options)
        return _direct(urlsplit(url), tls=tls)
    except InvalidSettings:
        raise
    except ValueError:
        # It may quote a part of the URL: a password with a `/` in it looks like a port.
        raise InvalidSettings(
            "CELERYKIT_STORE_URL: the address cannot be read. In a user or password, write `@ : / ? # [ ]` and `%` "
            "as `%40` and so on."
        ) from None


def _direct(parts: SplitResult, *, tls: Mapping[str, Any]) -> Address:
    options = {**_server(parts), **_login(parts)}
    if parts.scheme == "rediss" or tls:
        options |= _tls(parts, tls)
    address = options.get("unix_socket_path") or f"{options['host']}:{options['port']}"
    return Address(options, f"{address}, database {options['db']}")


def _managed(urls: Sequence[SplitResult], *, tls: Mapping[str, Any], options: Mapping[str, Any]) -> Address:
    query = {name: value for parts in urls for name, value in parse_qsl(parts.query)}
    name = query.get("master_name") or options.get("master_name")
    if not name:
        raise InvalidSettings(
            "CELERYKIT_STORE_URL: sentinel:// needs the name of the master: ?master_name=… at the end, or master_name "
            "in broker_transport_options (result_backend_transport_options if it is the result backend)."
        )
    # Each URL may say it; Kombu reads it from one, and Celery from another.
    login = next((found for found in map(_login, urls) if any(found.values())), _login(urls[0]))
    database = next((number for parts in urls if (number := _database(unquote(parts.path)))), 0)
    client = {**login, "db": database, **(_tls(urls[0], tls) if tls else {})}
    sentinels = Sentinels(
        master_name=str(name),
        hosts=[(parts.hostname or "localhost", parts.port or _SENTINEL_PORT) for parts in urls],
        options=options.get("sentinel_kwargs") or {},
        min_others=int(options.get("min_other_sentinels") or 0),
    )
    asked = ", ".join(f"{host}:{port}" for host, port in sentinels.hosts)
    return Address(client, f"{name} (by the Sentinel at {asked}), database {database}", sentinels)


def _sentinel_urls(url: str) -> list[SplitResult]:
    # Those after the first may go without the scheme.
    parts = [part.strip() for part in url.split(";")]
    return [urlsplit(part if "://" in part else f"sentinel://{part}") for part in parts if part]


def _server(parts: SplitResult) -> dict[str, Any]:
    query = dict(parse_qsl(parts.query))
    if parts.scheme == "redis+socket":
        return {"unix_socket_path": unquote(parts.path), "db": _database(query.get("virtual_host", ""))}
    return {"host": parts.hostname or "localhost", "port": parts.port or 6379, "db": _database(unquote(parts.path))}


def _database(name: str) -> int:
    return int(name.strip("/") or 0)


def _login(parts: SplitResult) -> dict[str, Any]:
    query = dict(parse_qsl(parts.query))
    return {
        "username": unquote(parts.username or "") or query.get("username"),
        "password": unquote(parts.password or "") or query.get("password"),
    }


def _tls(parts: SplitResult, tls: Mapping[str, Any]) -> dict[str, Any]:
    query = {name: value for name, value in parse_qsl(parts.query) if name in _TLS}
    options = {"ssl": True, **tls, **query}
    asked = options.get("ssl_cert_reqs") or "required"
    return {**options, "ssl_cert_reqs": _CERT_REQS.get(asked, asked)}
