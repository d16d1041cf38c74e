"""
What Celery's settings really hold.

Celery's option table gives each setting a type that nothing in Celery ever
applies to it, so it has aged: a few of its types are wrong, and most strings
may be classes. Here each setting gets a `Kind`: how to read it from text, and
what to say when it cannot be read. Objects that only Python code can build
(queues, routers, schedules, classes) pass as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainValidator, WrapValidator

from celerykit.settings.urls import URLS

__all__ = ["CODE_ONLY", "UNLISTED", "Kind", "OptionTable", "field_type", "kind_of"]

#: Celery's table as data: name -> (type, default).
OptionTable = Mapping[str, tuple[Any, Any]]

_PLAIN = (str, bytes, int, float, list, tuple, set, frozenset, dict)


@dataclass(frozen=True, slots=True)
class Kind:
    """
    How one sort of setting is read.

    Attributes:
        type:
            What pydantic makes of it.

        expected:
            What a user should write, to stand after "must be".

        may_show:
            Whether a wrong value can be repeated: nobody keeps a password in a boolean.
    """

    type: Any
    expected: str
    may_show: bool = False


def _objects_pass(value: Any, read: Callable[[Any], Any]) -> Any:
    return read(value) if isinstance(value, _PLAIN) else value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None


def _table(value: Any) -> Any:
    value = _json(value) if isinstance(value, str) else value
    if isinstance(value, _PLAIN) and not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _queues(value: Any) -> Any:
    # Celery takes a list of Queue objects too, which text cannot write.
    return value if isinstance(value, (list, tuple)) else _table(value)


def _names(value: Any) -> Any:
    if isinstance(value, str):
        value = _json(value) if value.lstrip().startswith("[") else _split(value)
    if not isinstance(value, Collection) or isinstance(value, (str, bytes, Mapping)):
        raise ValueError("not a list")
    return value


def _tuple(value: Any) -> Any:
    return tuple(_names(value))


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _rules(value: Any) -> Any:
    # Text that is no JSON is a dotted path to a router: Celery imports it.
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        return _json(value)
    return value


def _concurrency(value: Any) -> Any:
    return "auto" if isinstance(value, str) and value.strip().lower() == "auto" else value


_FLAG = Kind(Annotated[bool, WrapValidator(_objects_pass)], "true or false", may_show=True)
_WHOLE = Kind(Annotated[int, WrapValidator(_objects_pass)], "a whole number", may_show=True)
_NUMBER = Kind(Annotated[int | float, WrapValidator(_objects_pass)], "a number", may_show=True)
# A number from code stays one: `task_default_rate_limit = 10`, `broker_vhost = 0`.
_TEXT = Kind(Annotated[str | bool | int | float, WrapValidator(_objects_pass)], "text")
_URLS = Kind(Annotated[str | list[Any] | tuple[Any, ...], WrapValidator(_objects_pass)], "a URL")
_BYTES = Kind(Annotated[bytes, WrapValidator(_objects_pass)], "text")
_TABLE = Kind(Annotated[Any, PlainValidator(_table)], 'a JSON object, such as {"name": "value"}')
_NAMES = Kind(Annotated[Any, PlainValidator(_names)], "names separated by commas, or a JSON array")
_RULES = Kind(Annotated[Any, PlainValidator(_rules)], "JSON, or the dotted path of an object")
_SECONDS = Kind(
    Annotated[int | float | timedelta, WrapValidator(_objects_pass)],
    "seconds, or an ISO 8601 duration such as P1D",
    may_show=True,
)

_BY_TYPE: Mapping[Any, Kind] = {
    "bool": _FLAG,
    "int": _WHOLE,
    int: _WHOLE,
    "float": _NUMBER,
    "string": _TEXT,
    "str": _TEXT,
    "bytes": _BYTES,
    "dict": _TABLE,
    "list": _NAMES,
    "tuple": Kind(Annotated[Any, PlainValidator(_tuple)], _NAMES.expected),
    "any": _RULES,
}

#: Where Celery's table is wrong, and how its code uses the setting.
_CORRECTED: Mapping[str, Kind] = {
    # "string", but from code a list of them, to fail over to.
    **dict.fromkeys(URLS, _URLS),
    # "int", though the default is 3.0 and the heartbeat is divided by it.
    "broker_heartbeat_checkrate": _NUMBER,
    # "bool", but what it usually holds are the options of ssl.
    "broker_use_ssl": Kind(
        Annotated[bool | Annotated[Any, PlainValidator(_table)], WrapValidator(_objects_pass)],
        "true, false, or a JSON object of ssl options",
    ),
    # "string", but unpacked with ** into the authenticator.
    "cassandra_auth_kwargs": _TABLE,
    # "string", but handed to the driver as it is, which wants a number.
    "cassandra_port": _WHOLE,
    # "any": a callable, or the dotted path of one.
    "database_engine_callback": _TEXT,
    # "float", but all three go through `prepare_expires`, which takes a timedelta; one is the default.
    "result_expires": _SECONDS,
    "result_chord_expires": _SECONDS,
    "result_failure_expires": _SECONDS,
    # "string", though the default is 2: a number, or a name Kombu translates.
    "task_default_delivery_mode": Kind(
        Annotated[int | Literal["transient", "persistent"], WrapValidator(_objects_pass)],
        "1, 2, transient or persistent",
        may_show=True,
    ),
    # "string", but sent in the message's properties, where AMQP wants a number.
    "task_default_priority": _WHOLE,
    "task_queues": Kind(Annotated[Any, PlainValidator(_queues)], 'a JSON object, such as {"queue": {}}'),
    # "any", so that "auto" survives.
    "worker_concurrency": Kind(
        Annotated[int | Literal["auto"], BeforeValidator(_concurrency), WrapValidator(_objects_pass)],
        "a whole number, or auto",
        may_show=True,
    ),
    # Celery's command line offers these two and no more.
    "worker_pool_start_method": Kind(Literal["fork", "spawn"], "fork or spawn", may_show=True),
}

#: Settings that Celery's code asks for and its table lacks.
UNLISTED: OptionTable = {
    "dynamodb_endpoint_url": ("string", None),
    "firestore_project": ("string", None),
    "gcs_threadpool_maxsize": ("int", 10),
    "redis_backend_credential_provider": ("string", None),
    "redis_backend_health_check_interval": ("float", None),
    "redis_client_name": ("string", None),
    "result_backend_thread_safe": ("bool", False),
}

#: Never read from text: ``CELERY_BEAT_SCHEDULE`` is the *file name* of ``celery beat --schedule``.
CODE_ONLY = frozenset({"beat_schedule"})

#: None means something for these, though it is not their default: no heartbeat, no limit, for ever.
_MAY_BE_NONE = frozenset(
    {
        "broker_connection_max_retries",
        "broker_heartbeat",
        "broker_pool_limit",
        "control_queue_expires",
        "control_queue_ttl",
        "event_queue_expires",
        "event_queue_ttl",
        "redis_socket_timeout",
        "result_expires",
        "worker_concurrency",
    }
)


def kind_of(name: str, options: OptionTable) -> Kind:
    """Return how the setting *name* is read."""
    return _CORRECTED.get(name) or _BY_TYPE.get(options[name][0], _TEXT)


def field_type(name: str, options: OptionTable) -> Any:
    """Return the type of the setting *name*, for a pydantic model."""
    may_be_none = options[name][1] is None or name in _MAY_BE_NONE
    return Annotated[kind_of(name, options).type, WrapValidator(_nothing_is_none if may_be_none else _none_passes)]


def _none_passes(value: Any, read: Callable[[Any], Any]) -> Any:
    # Text cannot write None; from code, it is between the user and Celery.
    return None if value is None else read(value)


def _nothing_is_none(value: Any, read: Callable[[Any], Any]) -> Any:
    if isinstance(value, str) and value.strip() in ("", "null", "none", "None"):
        return None
    return _none_passes(value, read)
