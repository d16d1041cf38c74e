"""
Broker and result backend URLs: Valkey's schemes, TLS, and misspelt ones.

An error here names a scheme and never the rest of the URL.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

__all__ = ["BROKER_URLS", "URLS", "UnknownScheme", "check_backend", "check_broker", "settle"]

BROKER_URLS = frozenset({"broker_url", "broker_read_url", "broker_write_url"})
URLS = BROKER_URLS | {"result_backend"}

#: Valkey speaks Redis' protocol, and neither Kombu nor Celery knows its name. For a Unix socket
#: only ``redis+socket`` will do for both: Celery takes ``socket://`` for a Python module.
_VALKEY = {"valkey": "redis", "valkeys": "rediss", "valkey+socket": "redis+socket"}


class UnknownScheme(ValueError):
    """A URL whose scheme is missing or unknown."""


def settle(value: Any, *, has_tls_options: bool = False) -> Any:
    """
    Return *value*, one URL or several, as Celery understands it.

    ``valkey://`` becomes ``redis://``. A ``rediss://`` that does not say so
    gets ``ssl_cert_reqs=CERT_REQUIRED``, without which Celery's backend raises
    at its first use, unless *has_tls_options*: then they say it. What is
    settled already stays as it is.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(settle(url, has_tls_options=has_tls_options) for url in value)
    if not isinstance(value, str):
        return value
    urls = (_settle_one(url, has_tls_options=has_tls_options) for url in _split(value))
    return "".join(urls)


def _split(value: str) -> list[str]:
    # Only before a URL of its own: a password or a path may hold a semicolon too.
    return re.split(r"(?<=;)(?=\s*[A-Za-z][\w+.:]*://)", value)


def _settle_one(url: str, *, has_tls_options: bool) -> str:
    scheme, separator, rest = url.partition("://")
    known = _VALKEY.get(scheme.strip().lower())
    if not separator:
        return url
    if known is not None:
        url = f"{known}://{rest}"
    if url.strip().startswith("rediss://") and "ssl_cert_reqs=" not in url and not has_tls_options:
        return _require_certificate(url)
    return url


def _require_certificate(url: str) -> str:
    end = ";" if url.endswith(";") else ""
    url = url.removesuffix(";")
    return f"{url}{'&' if '?' in url else '?'}ssl_cert_reqs=CERT_REQUIRED{end}"


def check_broker(value: Any, *, transports: Collection[str]) -> None:
    """
    Refuse a broker URL without a scheme, or with one that no transport has.

    Raises:
        UnknownScheme: With what is wrong, without the URL.
    """
    urls = value if isinstance(value, (list, tuple)) else [value]
    for url in urls:
        if isinstance(url, str) and url:
            _check_broker_url(url, transports=transports)


def _check_broker_url(url: str, *, transports: Collection[str]) -> None:
    # A part without a scheme belongs to the one before it: `sentinel://a:26379;b:26379`.
    for part in _split(url):
        _check_scheme(part.strip(), known=transports, what="transport")


def check_backend(value: Any, *, backends: Collection[str], transports: Collection[str]) -> None:
    """
    Refuse a result backend that is misspelt.

    A name that resembles none is left to Celery: packages such as
    django-celery-results bring their own.

    Raises:
        UnknownScheme: With what is wrong, without the URL.
    """
    if not isinstance(value, str) or not value or not backends:
        return
    scheme = value.partition("://")[0].partition("+")[0]
    if scheme in transports and scheme not in backends:
        raise UnknownScheme(f"{scheme} is a broker and keeps no results; use redis://, db+… or rpc://")
    if _is_path(scheme) or scheme in backends or _nearest(scheme, backends) is None:
        return
    _check_scheme(value if "://" in value else f"{value}://", known=backends, what="result backend")


def _check_scheme(url: str, *, known: Collection[str], what: str) -> None:
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise UnknownScheme(f"a URL begins with a scheme, such as redis:// or amqp://{_hint(scheme, known)}")
    # `sqla+postgresql`: the transport, and what it shall speak.
    scheme = scheme.partition("+")[0]
    if not known or _is_path(scheme) or scheme in known or scheme.lower() in known:
        return
    # An @ before the scheme: that is no scheme, and may be a password.
    name = "" if "@" in scheme else f" {scheme}://"
    raise UnknownScheme(f"Celery has no {what}{name}{_hint(scheme, known)}")


def _is_path(scheme: str) -> bool:
    # `my.module:Transport` is a class, for Celery to import.
    return ":" in scheme or "." in scheme


def _nearest(scheme: str, known: Collection[str]) -> str | None:
    return next(iter(get_close_matches(scheme.lower(), known, n=1, cutoff=0.75)), None)


def _hint(scheme: str, known: Collection[str]) -> str:
    nearest = _nearest(scheme, known)
    return f"; did you mean {nearest}://?" if nearest else ""
