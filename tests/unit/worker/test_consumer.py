"""
What is said of a message that cannot be received.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from kombu.exceptions import DecodeError
from kombu.message import Message

from celerykit import running
from celerykit.worker.consumer import Consumer, _told_by


def test_what_is_said_of_a_body_that_cannot_be_read_has_none_of_it() -> None:
    body = b'[["hush"], {"password": "\xff"}, {}]'
    headers = {"task": "t", "id": "1"}
    message: Any = Message(body, content_type="application/json", content_encoding="utf-8", headers=headers)
    consumer: Any = SimpleNamespace()

    with pytest.raises(DecodeError, match="its body cannot be read: DecodeError: 'utf-8' codec can't decode") as told:
        Consumer._check(consumer, message)

    assert "hush" not in f"{told.value!r}"


@pytest.mark.parametrize("headers", [{"task": "t", "id": "1"}, ["no", "headers"], None])
def test_what_is_told_of_a_message_of_somebody_else_names_its_queue(headers: Any) -> None:
    message = SimpleNamespace(headers=headers, delivery_info={"routing_key": "slow", "exchange": ""})

    told = running.facts_of(_told_by(message))

    assert told.get("queue") == ("slow" if isinstance(headers, dict) else None)
