"""
What we use of Celery that is its own business, and in which versions it was seen to be there.

When this fails on a new Celery: read what changed in celery/worker/request.py and consumer.py, run `make faults`, and
add the version here.
"""

from __future__ import annotations

import inspect

import celery
from celery.worker import consumer, request, state

SEEN = ("5.7.0",)


def test_the_version_is_one_that_was_tried() -> None:
    assert celery.__version__ in SEEN, __doc__


def test_a_request_has_what_ours_overrides_or_asks() -> None:
    used = {
        "_announce_revoked": ["self", "reason", "terminated", "signum", "expired"],
        "_success_was_stored": ["self"],
        "_worker_lost_info": ["self", "exc"],
        "on_failure": ["self", "exc_info", "send_failed_event", "return_ok"],
        "on_timeout": ["self", "soft", "timeout"],
        "cancel": ["self", "pool", "signal", "emit_retry"],
        "acknowledge": ["self"],
        "reject": ["self", "requeue"],
    }
    found = {name: list(inspect.signature(getattr(request.Request, name)).parameters) for name in used}

    assert found == used, __doc__


def test_celery_rebuilds_only_what_ours_leaves_alone() -> None:
    source = inspect.getsource(request.create_request_cls)

    assert [line.split("(")[0].strip() for line in source.splitlines() if line.strip().startswith("def ")][1:] == [
        "def execute_using_pool",
        "def on_success",
    ], __doc__


def test_a_consumer_calls_what_ours_overrides() -> None:
    handler = inspect.getsource(consumer.Consumer.create_task_handler)

    for name in ("on_unknown_message", "on_unknown_task", "on_invalid_task", "on_decode_error"):
        assert f"self.{name}" in handler, __doc__
    assert {"successful_requests", "active_requests", "reserved_requests", "requests", "revoked"} <= vars(state).keys()
