"""
An item of a queue, refused unless it is a message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kombu.transport import virtual

__all__ = ["Garbage", "TakenMessage"]

#: celery-types knows less of it.
_StockMessage: Any = virtual.Message


class Garbage(Exception):
    """An item in a queue that is not a message."""


class TakenMessage(_StockMessage):  # type: ignore[misc]
    """A message that knows the queue it was taken from, as its ``queue``."""

    def __init__(self, payload: Any, channel: Any = None, **kwargs: Any) -> None:
        transport = channel.connection
        try:
            _check(payload)
            # Anew for each delivery: a worker that was away for too long must not renew or acknowledge
            # what is another's by now.
            popped = transport.popped
            payload["properties"]["delivery_tag"] = (popped and popped.tag) or channel._next_delivery_tag()
            super().__init__(payload, channel=channel, **kwargs)
        except Exception as error:
            raise Garbage(f"it is not a message: {type(error).__name__}: {error}") from error
        transport.popped = None
        self.queue = popped.queue if popped else None
        self.key = popped.key if popped else None
        self.is_noted = bool(popped and popped.tag)


def _check(payload: Any) -> None:
    """Refuse what Kombu would fall over, now or later."""
    _must_be(Mapping, "envelope", payload)
    properties = _must_be(Mapping, "properties", payload.get("properties"))
    delivery = _must_be(Mapping, "delivery_info", properties.get("delivery_info"))
    _must_be((str, int), "delivery_tag", properties.get("delivery_tag"))
    for name in ("exchange", "routing_key"):
        _must_be(str, name, delivery.get(name))
    _must_be(Mapping, "headers", payload.get("headers") or {})
    _must_be((str, bytes), "body", payload.get("body") or "")


def _must_be(kind: Any, name: str, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is missing" if value is None else f"{name} is of type {type(value).__name__}")
    return value
