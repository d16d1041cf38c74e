"""
Messages that no program of ours sends, and any program can.
"""

from __future__ import annotations

import base64
import json
import pickle
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

__all__ = ["BROKEN_ENVELOPES", "MESSAGES", "Message"]

SHOP = "tests.faults.shop"
_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}

#: For a message of which it does not matter who refuses it.
_UNREADABLE = frozenset({"malformed", "undecodable"})


@dataclass(frozen=True, slots=True)
class Message:
    """
    A message, and what must become of it.

    Attributes:
        reasons:
            Those its dead letter may have; none for a message that is odd,
            and runs.
    """

    name: str
    reasons: frozenset[str]
    body: Any = ""
    headers: Mapping[str, Any] | None = None
    properties: Mapping[str, Any] = field(default_factory=dict)

    @property
    def task_id(self) -> str | None:
        """Its id, if it has one that can be one."""
        task_id = (self.headers or {}).get("id")
        return task_id if isinstance(task_id, str) and task_id else None


def _message(
    name: str,
    *reasons: str,
    task: Any = f"{SHOP}.work",
    args: Any = (),
    kwargs: Any = None,
    embed: Any = _EMBED,
    body: Any = None,
    without: str = "",
    properties: Mapping[str, Any] | None = None,
    **headers: Any,
) -> Message:
    """Make a good message, but for what is given."""
    task_id = str(uuid.uuid4())
    good = {"lang": "py", "task": task, "id": task_id, "retries": 0, "timelimit": [None, None], "eta": None}
    good |= {"expires": None, "group": None, "root_id": task_id, "parent_id": None, "origin": "faults"}
    good |= headers
    good.pop(without, None)
    text = json.dumps([args, {} if kwargs is None else kwargs, embed]) if body is None else body
    json_text = {"content_type": "application/json", "content_encoding": "utf-8", "correlation_id": name}
    return Message(name, frozenset(reasons), text, good, {**json_text, **(properties or {})})


def _protocol_1(name: str, body: Mapping[str, Any], *reasons: str) -> Message:
    properties = {"content_type": "application/json", "content_encoding": "utf-8", "correlation_id": name}
    return Message(name, frozenset(reasons), json.dumps(body), None, properties)


_HOUR_AGO = (datetime.now(UTC) - timedelta(hours=1)).isoformat()

MESSAGES = (
    # The body's shape
    _message("empty body", *_UNREADABLE, body=""),
    _message("body is an empty mapping", "malformed", body="{}"),
    _message("body is a number", "malformed", body="7"),
    _message("body has two items", "malformed", body="[[], {}]"),
    _message("body has four items", "malformed", body="[[], {}, {}, {}]"),
    _message("args are text", "malformed", args="args"),
    _message("kwargs are a list", "malformed", kwargs=[1]),
    _message("embed is null", "malformed", embed=None),
    _message("chain is a number", "malformed", embed={**_EMBED, "chain": 7}),
    _message("errbacks are text", "malformed", embed={**_EMBED, "errbacks": "told"}),
    # The headers' shape
    _message("id is a list", "malformed", id=["one"]),
    _message("id is missing", "malformed", without="id"),
    _message("id is empty", "malformed", id=""),
    _message("task is a list", "malformed", task=["work"]),
    _message("timelimit is text", "malformed", timelimit="soon"),
    _message("timelimit is one number", "malformed", timelimit=[1]),
    _message("stamps are a number", "malformed", stamps=7, stamped_headers=7),
    _message("retries are text", "malformed", retries="many"),
    _message("eta is no time", "malformed", eta="tomorrow"),
    _message("eta is in the year 9999", "malformed", eta="9999-01-01T00:00:00+00:00"),
    _message("expires is no time", "malformed", expires="never"),
    _protocol_1("protocol 1 without id", {"task": f"{SHOP}.work", "args": [], "kwargs": {}}, "malformed"),
    _protocol_1("no task message at all", {"hello": "world"}, "malformed"),
    # The encoding
    _message("body is not JSON", "undecodable", body="{]"),
    _message("body is not UTF-8", "undecodable", body=b'[[], {"hold_at": "\xff\xfe"}, {}]'),
    _message("body is nested 100,000 deep", "undecodable", body="[" * 100_000 + "]" * 100_000),
    _message("says gzip, and is not", "undecodable", compression="application/x-gzip"),
    _message("compression is unknown", "undecodable", compression="application/x-stuffit"),
    _message(
        "pickle",
        "undecodable",
        body=pickle.dumps([[], {}, _EMBED]),
        properties={"content_type": "application/x-python-serialize", "content_encoding": "binary"},
    ),
    _message("content type is unknown", "undecodable", properties={"content_type": "application/x-cobol"}),
    Message("plain text", _UNREADABLE, "hello", None, {"content_type": "text/plain", "content_encoding": "utf-8"}),
    # What it asks for
    _message("task is unknown", "unknown_task", task=f"{SHOP}.nonsense"),
    _message("an argument is missing", "invalid_payload", task=f"{SHOP}.poison"),
    _message("an argument too many", "invalid_payload", kwargs={"colour": "red"}),
    _message("an argument of a wrong type", "invalid_payload", kwargs={"seconds": "ten"}),
    _message("an argument with a lone surrogate", "invalid_payload", body='[[], {"hold_at": "\\udc80"}, {}]'),
    _message("an argument is NaN", "failed", "invalid_payload", body='[[], {"seconds": NaN}, {}]'),
    _message("nonsense for a task of Celery's", "failed", task="celery.backend_cleanup", args=[1, 2, 3]),
    _message("expired", "expired", expires=_HOUR_AGO),
    # Odd, and none the worse
    _message("our header is text", celerykit="text"),
    _message("our header is of another time", celerykit={"v": 99, "attempt": "first", "ledger": 7, "due_at": []}),
    _message("encoding is unknown", body=b"[[], {}, {}]", properties={"content_encoding": "klingon"}),
    _message("headers nobody knows", **{"x-anything": 1}),
)


def _envelope(**instead: Any) -> dict[str, Any]:
    """Make what Kombu writes, but for what is given; what is given as None is left out."""
    good = {
        "body": base64.b64encode(json.dumps([[], {}, _EMBED]).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": f"{SHOP}.work", "id": str(uuid.uuid4())},
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "faults"},
            "delivery_mode": 2,
            "delivery_tag": str(uuid.uuid4()),
            "priority": 0,
        },
    }
    return {name: value for name, value in (good | instead).items() if value is not None}


#: What may stand on a Redis list; Kombu writes an object there.
BROKEN_ENVELOPES: Mapping[str, Any] = {
    "not JSON": "not JSON",
    "not UTF-8": b"\xff\xfe\xfd",
    "a list": [1, 2],
    "a number": 7,
    "without properties": _envelope(properties=None),
    "without a body": _envelope(body=None),
    "without a delivery tag": _envelope(properties={"delivery_info": {"exchange": "", "routing_key": ""}}),
    "body is not base64": _envelope(body="%%%"),
    "properties are text": _envelope(properties="text"),
    "headers are a list": _envelope(headers=[1]),
}
