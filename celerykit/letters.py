"""
The queue of dead letters: how messages get there, and how a person gets them out again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import kombu

from celerykit.dead_letters import HEADER, Letter, Note
from celerykit.errors import EnqueueError
from celerykit.publishing import UnreachableBroker, sending

if TYPE_CHECKING:
    from celerykit.app import CeleryKit

__all__ = ["bury", "letter_of"]

#: What of a message's properties a letter keeps. Not `expiration`, with which it would vanish, nor `priority`, which is
#: for its own queue, nor `user_id`, which RabbitMQ refuses from anybody else.
_KEPT = ("correlation_id", "reply_to", "message_id", "type", "app_id")

#: Of a frame, for what is not headers.
_ROOM = 2048

#: In which processes the queue is known to be there, by app.
_declared: WeakKeyDictionary[CeleryKit, set[int]] = WeakKeyDictionary()


def letter_of(message: Any, note: Note) -> Letter:
    """Make a letter of a message as Kombu received it, whether or not it can be decoded."""
    headers = {name: value for name, value in (message.headers or {}).items() if name != HEADER}
    if not message.errors:
        # Kombu has unpacked the body by now, and would do so again.
        headers.pop("compression", None)
    body = message.body
    return Letter(
        note=note,
        body=body.encode(errors="surrogatepass") if isinstance(body, str) else bytes(body or b""),
        headers=headers,
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        properties={name: value for name, value in message.properties.items() if name in _KEPT and value},
    )


def bury(app: CeleryKit, letter: Letter) -> None:
    """
    Put a letter into the queue of dead letters, to stay there when the broker restarts.

    Safe from any thread.

    Raises:
        EnqueueError: It is not sure that the broker has it.
    """
    what = f"dead letter {letter.id} of {letter.note.task}"
    try:
        with sending(app, what):
            _bury(app, letter)
    except EnqueueError:
        raise
    except Exception as error:  # an edge: whatever it was, the letter may not be there
        raise UnreachableBroker(f"{what} could not be written: {error!r}") from error


def _bury(app: CeleryKit, letter: Letter) -> None:
    name = app.settings.kit.dead_letter_queue
    here = _declared.setdefault(app, set())
    with app.producer_pool.acquire(block=True) as producer:
        # Asked for its channel, it connects.
        connection = cast("Any", producer.channel).connection.client
        if os.getpid() not in here:
            declare(connection, name)
            here.add(os.getpid())
        try:
            publish(producer, letter, queue=name)
        except connection.channel_errors:
            # On RabbitMQ: the queue is gone. It is made again at the next try.
            here.discard(os.getpid())
            raise


def publish(producer: Any, letter: Letter, *, queue: str) -> None:
    """Publish a letter to a queue that exists."""
    producer.publish(
        letter.body,
        exchange="",
        routing_key=queue,
        headers={**letter.headers, HEADER: letter.note.to_header(**_limit(producer.channel, letter.headers))},
        content_type=letter.content_type or "application/data",
        content_encoding=letter.content_encoding or "binary",
        delivery_mode=2,
        # RabbitMQ confirms what it has no queue for, unless it is told to give it back.
        mandatory=True,
        retry=True,
        retry_policy={"max_retries": 1, "interval_start": 0},
        **letter.properties,
    )


def _limit(channel: Any, headers: Mapping[str, Any]) -> dict[str, int]:
    """Keep all headers of an AMQP message within the one frame they must fit."""
    frame = getattr(channel.connection, "frame_max", None)
    if not frame:
        return {}
    room = int(frame) - _ROOM - len(json.dumps(dict(headers), default=str))
    return {"limit": min(16 * 1024, max(room, 1024))}


def declare(connection: Any, name: str) -> None:
    """
    Make the queue of dead letters, unless there is one, however it was made.

    On RabbitMQ: a quorum queue without a limit of deliveries. Each look at a letter counts as one.
    """
    with connection.channel() as channel:
        version = _rabbitmq(channel)
        if version is None:
            _queue(name, {})(channel).declare()
        elif not _exists(connection, name):
            # Version 4 has a limit unless told otherwise. To version 3, -1 is a limit that drops a message at once.
            unlimited = {"x-delivery-limit": -1} if version >= (4,) else {}
            _queue(name, {"x-queue-type": "quorum", **unlimited})(channel).declare()


def _rabbitmq(channel: Any) -> tuple[int, ...] | None:
    """Tell the version of RabbitMQ; None for brokers that do not speak AMQP."""
    server = getattr(channel.connection, "server_properties", None)
    if server is None:
        return None
    version = str(server.get("version", "")).split(".")
    return tuple(int(part) for part in version if part.isdecimal()) or (0,)


def _exists(connection: Any, name: str) -> bool:
    try:
        # On a channel of its own, which the broker closes if not.
        with connection.channel() as channel:
            channel.queue_declare(name, passive=True)
    except connection.channel_errors:
        return False
    return True


def _queue(name: str, arguments: Mapping[str, Any]) -> kombu.Queue:
    return kombu.Queue(
        name, exchange=kombu.Exchange(""), routing_key=name, durable=True, queue_arguments=dict(arguments)
    )
