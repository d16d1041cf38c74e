"""
Queues of RabbitMQ: by AMQP what is ready, and by its management plug-in the rest, where that can be reached.
"""

from __future__ import annotations

import base64
import json
import ssl
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import quote

from amqp.exceptions import AccessRefused, NotFound, ResourceLocked
from kombu.transport.native_delayed_delivery import MAX_LEVEL, level_name

from celerykit.deadline import left, share_of
from celerykit.queues.depth import Depth

__all__ = ["RabbitMQQueues"]

#: Where the plug-in listens unless somebody moved it.
PORT, TLS_PORT = 15672, 15671

#: Seconds that it may take for an answer, and after which it is tried again when it had none.
_PATIENCE, _PAUSE = 1.0, 60.0

_WANTED = "messages_unacknowledged,head_message_timestamp"

#: Until when a plug-in is not asked, by its host.
_silent: dict[str, float] = {}


class RabbitMQQueues:
    """The queues behind a connection."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def depths(self, names: Sequence[str]) -> dict[str, Depth]:
        """Look at the queues of these names."""
        declared = {name: self._declared(name) for name in names}
        told = _told(self._connection, [name for name, depth in declared.items() if not depth.missing])
        return {name: replace(depth, **told.get(name, {})) for name, depth in declared.items()}

    def delayed(self) -> int | None:
        """Count what is in the queues of delayed delivery, whichever queue it is for."""
        with self._connection.channel() as channel:
            try:
                return sum(
                    int(channel.queue_declare(level_name(level), passive=True).message_count)
                    for level in range(MAX_LEVEL, -1, -1)
                )
            except (NotFound, AccessRefused):
                return None

    def _declared(self, name: str) -> Depth:
        try:
            # On a channel of its own, which RabbitMQ closes if it says no.
            with self._connection.channel() as channel:
                answer = channel.queue_declare(name, passive=True)
        except NotFound:
            return Depth(ready=0, missing=True)
        except (AccessRefused, ResourceLocked):
            return Depth()
        return Depth(ready=int(answer.message_count), consumers=int(answer.consumer_count))


def _told(connection: Any, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Ask the plug-in, as the user we are anyway; give nothing where it does not answer."""
    host = str(connection.hostname or "localhost")
    if time.monotonic() < _silent.get(host, 0.0):
        return {}
    told: dict[str, dict[str, Any]] = {}
    try:
        # What AMQP tells is the better half, and must not be lost for the other.
        with share_of(2), closing(_management(connection, host)) as management:
            for name in names:
                left(None)
                told[name] = _asked(management, connection, name)
    except (OSError, HTTPException, ValueError):
        _silent[host] = time.monotonic() + _PAUSE
    return told


def _management(connection: Any, host: str) -> HTTPConnection:
    patience = left(_PATIENCE)
    if not connection.ssl:
        return HTTPConnection(host, PORT, timeout=patience)
    authority = connection.ssl.get("ca_certs") if isinstance(connection.ssl, dict) else None
    return HTTPSConnection(host, TLS_PORT, timeout=patience, context=ssl.create_default_context(cafile=authority))


def _asked(management: HTTPConnection, connection: Any, name: str) -> dict[str, Any]:
    password = connection.password() if callable(connection.password) else connection.password
    login = base64.b64encode(f"{connection.userid or 'guest'}:{password or 'guest'}".encode()).decode()
    vhost = connection.virtual_host or "/"
    path = f"/api/queues/{quote(vhost, safe='')}/{quote(name, safe='')}?columns={_WANTED}"
    management.request("GET", path, headers={"Authorization": f"Basic {login}"})
    response = management.getresponse()
    answer = response.read()
    if response.status == 404:
        return {}
    if response.status != 200:
        # A user may have no right to look.
        raise HTTPException(response.status)
    told = json.loads(answer)
    if not isinstance(told, dict) or "messages_unacknowledged" not in told:
        # A queue of which there are no numbers yet.
        return {}
    first = told.get("head_message_timestamp")
    age = max(0.0, time.time() - first) if isinstance(first, int | float) else None
    # What is ready is known better: these numbers may be seconds old.
    return {"unacked": int(told["messages_unacknowledged"]), "oldest_seconds": age}
