"""
From what was found to values: each read as what it is, every mistake collected.

A mistake is one sentence: which setting, where it stands, what was expected.
It repeats a wrong value only where no secret can stand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from celerykit.masks import is_secret
from celerykit.settings.kit import Kit
from celerykit.settings.options import OptionTable, field_type, kind_of
from celerykit.settings.sources import Layer
from celerykit.settings.urls import BROKER_URLS, URLS, UnknownScheme, check_backend, check_broker, settle

__all__ = ["Found", "check_urls", "read_celery", "read_kit", "settle_urls"]

#: The place where each setting was found first.
Found = Mapping[str, Layer]

Model = TypeVar("Model", bound=BaseModel)

_CONFIG = ConfigDict(arbitrary_types_allowed=True, hide_input_in_errors=True)

_REMEDY = "Correct it, or remove it."


def read_celery(found: Found, options: OptionTable) -> tuple[dict[str, Any], list[str]]:
    """
    Return Celery's settings, and what is wrong with them.

    Only settings that were found become fields: a model of all two hundred
    takes 7 ms to build, one of these half a millisecond.
    """
    fields: dict[str, Any] = {name: (field_type(name, options), ...) for name in found if name in options}
    model = create_model("CelerySettings", __config__=_CONFIG, **fields)
    read, wrong = _validate(model, {name: found[name].values[name] for name in fields})
    problems = [_wrong_celery(name, found[name], options) for name in wrong]
    return _others(found, options) | dict(read or ()), problems


def _others(found: Found, options: OptionTable) -> dict[str, Any]:
    # Code may set what a package reads from `app.conf`; text under an unknown name is nobody's.
    return {
        name: layer.values[name]
        for name, layer in found.items()
        if not layer.is_text and name not in options and not name.startswith("kit.")
    }


def _wrong_celery(name: str, layer: Layer, options: OptionTable) -> str:
    kind = kind_of(name, options)
    got = f", not {str(layer.values[name])[:40]!r}" if kind.may_show and not is_secret(name) else ""
    return f"{layer.spelled(name)} ({layer.place}) must be {kind.expected}{got}. {_REMEDY}"


def read_kit(found: Found) -> tuple[Kit, list[str]]:
    """Return our settings, and what is wrong with them; the defaults if something is."""
    names = {name.removeprefix("kit."): name for name in found if name.startswith("kit.")}
    values = {short: found[name].values[name] for short, name in names.items() if short in Kit.model_fields}
    kit, wrong = _validate(Kit, values)
    return kit or Kit(), [_wrong_kit(names[short], found[names[short]], why) for short, why in wrong.items()]


def _wrong_kit(name: str, layer: Layer, why: str) -> str:
    return f"{layer.spelled(name)} ({layer.place}): {why[:1].lower()}{why[1:]}. {_REMEDY}"


def _validate(model: type[Model], values: Mapping[str, Any]) -> tuple[Model | None, dict[str, str]]:
    # The error is not raised on, nor kept as a cause: it holds every input.
    try:
        return model.model_validate(values), {}
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        # A union writes one error for each of its members; the first says enough.
        return None, {str(detail["loc"][0]): detail["msg"] for detail in reversed(details)}


def check_urls(found: Found, *, transports: Collection[str], backends: Collection[str]) -> list[str]:
    """Return what is wrong with the URLs of the brokers and the result backend."""
    problems = []
    for name in sorted(URLS & found.keys()):
        try:
            _check_url(name, found, transports=transports, backends=backends)
        except UnknownScheme as error:
            problems.append(f"{found[name].spelled(name)} ({found[name].place}): {error}")
    return problems


def _check_url(name: str, found: Found, *, transports: Collection[str], backends: Collection[str]) -> None:
    url = settle(found[name].values[name])
    if name not in BROKER_URLS:
        check_backend(url, backends=backends, transports=transports)
    elif not _has(found, "broker_transport"):
        # With `broker_transport` a broker's URL may be a bare host.
        check_broker(url, transports=transports)


def settle_urls(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return *values* with their URLs as Celery understands them."""
    tls = dict.fromkeys(BROKER_URLS, "broker_use_ssl") | {"result_backend": "redis_backend_use_ssl"}
    urls = {name: settle(values[name], has_tls_options=bool(values.get(tls[name]))) for name in URLS & values.keys()}
    return {**values, **urls}


def _has(found: Found, name: str) -> bool:
    return name in found and bool(found[name].values[name])
