"""
Letters as messages: how they are written, and read without being decoded.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import amqp.exceptions
import kombu

from celerykit.dead_letters import HEADER, Letter, Note

__all__ = ["declare", "exists", "letter_in_amqp", "letter_in_list", "letter_of", "publish", "version_of_rabbitmq"]

#: What of a message's properties a letter keeps. Not `expiration`, with which it would vanish, nor `priority`, which is
#: for its own queue, nor `user_id`, which RabbitMQ refuses from anybody else.
_KEPT = ("correlation_id", "reply_to", "message_id", "type", "app_id")

#: Of an AMQP frame, for what is not headers.
_ROOM = 2048


def letter_of(message: Any, note: Note) -> Letter:
    """Make a letter of a message as Kombu received it, whether or not it can be decoded."""
    headers = {name: value for name, value in (message.headers or {}).items() if name != HEADER}
    if not message.errors:
        # Kombu has unpacked the body by now, and would do so again.
        headers.pop("compression", None)
    return Letter(
        note=note,
        body=_bytes(message.body),
        headers=headers,
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        properties=_kept(message.properties),
    )


def publish(producer: Any, letter: Letter, *, queue: str) -> None:
    """Publish a letter to a queue of letters, to stay there when the broker restarts."""
    note = letter.note.to_header(**_limit(producer.channel, letter.headers))
    producer.publish(
        letter.body,
        exchange="",
        routing_key=queue,
        headers={**letter.headers, HEADER: note},
        content_type=letter.content_type or "application/data",
        content_encoding=letter.content_encoding or "binary",
        **_SAFELY,
        **letter.properties,
    )


#: RabbitMQ confirms what it has no queue for, unless it is told to give it back.
_SAFELY: Mapping[str, Any] = {
    "delivery_mode": 2,
    "mandatory": True,
    "retry": True,
    "retry_policy": {"max_retries": 1, "interval_start": 0},
}


def _limit(channel: Any, headers: Mapping[str, Any]) -> dict[str, int]:
    """Keep all headers of an AMQP message within the one frame they must fit."""
    frame = getattr(channel.connection, "frame_max", None)
    if not frame:
        return {}
    room = int(frame) - _ROOM - len(json.dumps(dict(headers), default=str))
    return {"limit": min(16 * 1024, max(room, 1024))}


def declare(connection: Any, name: str) -> None:
    """
    Make the queue of letters, unless there is one, however it was made.

    On RabbitMQ: a quorum queue without a limit of deliveries. Each look at a letter counts as one.
    """
    with connection.channel() as channel:
        version = version_of_rabbitmq(channel)
        if version is None:
            _queue(name, {})(channel).declare()
        elif not exists(connection, name):
            # Version 4 has a limit unless told otherwise. To version 3, -1 is a limit that drops a message at once.
            unlimited = {"x-delivery-limit": -1} if version >= (4,) else {}
            _queue(name, {"x-queue-type": "quorum", **unlimited})(channel).declare()


def version_of_rabbitmq(channel: Any) -> tuple[int, ...] | None:
    """Tell the version of RabbitMQ; None for brokers that do not speak AMQP."""
    server = getattr(channel.connection, "server_properties", None)
    if server is None:
        return None
    version = str(server.get("version", "")).split(".")
    return tuple(int(part) for part in version if part.isdecimal()) or (0,)


def exists(connection: Any, name: str) -> bool:
    """Tell whether RabbitMQ has this queue."""
    try:
        # On a channel of its own, which the broker closes if not.
        with connection.channel() as channel:
            channel.queue_declare(name, passive=True)
    except amqp.exceptions.NotFound:
        return False
    return True


def _queue(name: str, arguments: Mapping[str, Any]) -> kombu.Queue:
    return kombu.Queue(
        name, exchange=kombu.Exchange(""), routing_key=name, durable=True, queue_arguments=dict(arguments)
    )


# Reading


def letter_in_amqp(message: Any) -> Letter:
    """Read a message as py-amqp gives it, before Kombu decodes it."""
    properties = message.properties
    headers = properties.get("application_headers") or {}
    kinds = (properties.get("content_type"), properties.get("content_encoding"))
    return _letter(headers, _bytes(message.body), *kinds, properties)


def letter_in_list(item: bytes) -> Letter:
    """Read what lies in a list. That may be anything."""
    try:
        envelope = json.loads(item)
        headers, properties, body = dict(envelope["headers"]), dict(envelope["properties"]), _bytes(envelope["body"])
        body = base64.b64decode(body) if properties.get("body_encoding") == "base64" else body
    except (ValueError, TypeError, KeyError, RecursionError):
        return Letter(note=Note.made_up({}, item, reason="malformed"), body=item, headers={})
    return _letter(headers, body, envelope.get("content-type"), envelope.get("content-encoding"), properties)


def _letter(
    headers: Mapping[str, Any], body: bytes, content_type: Any, content_encoding: Any, properties: Mapping[str, Any]
) -> Letter:
    return Letter(
        note=Note.of(headers) or Note.made_up(headers, body),
        body=body,
        headers={name: value for name, value in headers.items() if name != HEADER},
        content_type=content_type,
        content_encoding=content_encoding,
        properties=_kept(properties),
    )


def _kept(properties: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (properties or {}).items() if name in _KEPT and value}


def _bytes(body: Any) -> bytes:
    if isinstance(body, bytes | bytearray | memoryview):
        return bytes(body)
    # Not every transport says that a body must be text or bytes.
    text = body if isinstance(body, str) else json.dumps(body)
    return text.encode(errors="surrogatepass")
