"""
What is wrong with a message.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from celerykit.worker.shape import Malformed, check_body, check_eta, check_headers

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_what_celery_sends_is_right() -> None:
    check_headers({"task": "t", "id": "1", "retries": 0, "timelimit": [None, 5], "stamps": {}, "stamped_headers": None})
    check_body([[1], {"a": 2}, {"callbacks": None, "errbacks": None, "chain": [{}], "chord": None}])


def test_protocol_1_is_right_too() -> None:
    check_headers({})
    check_body({"task": "t", "id": "1", "args": [1], "kwargs": {}})


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": None},
        {"id": ["a", "list"]},
        {"task": ["t"]},
        {"timelimit": 3},
        {"timelimit": [1, 2, 3]},
        {"timelimit": ["soon", None]},
        {"retries": "many"},
        {"retries": -1},
        {"eta": 5},
        {"stamps": ["x"]},
        {"root_id": {}},
        {"stamped_headers": "x"},
    ],
)
def test_a_wrong_header_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(Malformed, match=f"'{next(iter(wrong))}' must be"):
        check_headers({"task": "t", "id": "1", **wrong})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "names no task"),
        (7, "must be a list"),
        ([[], {}], "must be a list"),
        ([{}, {}, {}], "arguments must be a list"),
        ([[], [], {}], "must be a mapping"),
        ([[], {1: 2}, {}], "must be a mapping"),
        ([[], {}, None], "third part"),
        ([[], {}, {"chord": "x"}], "'chord' must be"),
        ([[], {}, {"errbacks": [1]}], "'errbacks' must be"),
        ({"task": "t"}, "has no id"),
    ],
)
def test_a_wrong_body_is_told_without_its_values(body: Any, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        check_body(body)


def test_an_eta_beyond_the_limit_is_refused() -> None:
    check_eta(NOW + timedelta(days=30), now=NOW, limit=timedelta(days=30))
    check_eta(None, now=NOW, limit=timedelta(days=30))
    with pytest.raises(Malformed, match="30 days ahead"):
        check_eta(datetime(9999, 1, 1), now=NOW, limit=timedelta(days=30))
