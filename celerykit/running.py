"""
The call that runs: its facts and its context, on every line that is logged meanwhile.

They are bound by Celery's signals around the run, and not by a step: Celery
tells how a run ended after the steps are through, and before ``task_postrun``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from typing import Any, NamedTuple, cast

from celery import signals
from celery.utils.time import maybe_iso8601

from celerykit import context, events
from celerykit.headers import Headers

__all__ = ["at_hand", "connect", "facts_of", "handling", "note", "ready_at", "travelling"]

#: The headers of the message that a worker's parent process is busy with.
at_hand: ContextVar[Mapping[str, Any] | None] = ContextVar("celerykit_at_hand", default=None)

#: A mark on the request of a running task: what was before it.
_BEFORE = "celerykit_before"

#: What is told of each call.
_FACTS = frozenset(
    (
        *("task", "id", "root_id", "parent_id", "attempt", "queue", "worker", "key", "wait_ms"),
        *("kind", "delay", "next_attempt", "error_fingerprint"),
    )
)

_UNBOUND: Any = object()


class _Before(NamedTuple):
    """What is put back when a run ends."""

    context: Token[context.Bound | None]
    is_running: Token[bool]
    shown: Mapping[str, Any]


_is_running: ContextVar[bool] = ContextVar("celerykit_running", default=False)


def connect() -> None:
    """See to it, once in a process, that the runs of its apps' tasks are told. Costs other apps' tasks nothing."""
    signals.task_prerun.connect(_begin, weak=False, dispatch_uid="celerykit.running")
    signals.task_postrun.connect(_end, weak=False, dispatch_uid="celerykit.running")


def note(**facts: Any) -> None:
    """
    Add facts to what is still logged of the running call: above all to Celery's record of its end.

    A retry, a snooze and a wait tell themselves by ``kind``.
    """
    if _is_running.get():
        _bind(**{name: value for name, value in facts.items() if value is not None})


# In a pool's process


def _begin(*, task: Any, **_: Any) -> None:
    if not hasattr(task.app, "call_steps"):
        return  # another app's
    from structlog.contextvars import get_contextvars, unbind_contextvars

    request = task.request
    header = Headers.of(request.headers)
    facts = _facts(task, request, header)
    bound = _context_of(task.app, request, header)
    before = get_contextvars()
    setattr(request, _BEFORE, _Before(context.bind(bound), _is_running.set(True), before))
    # A call in place, inside another one's run, has no key because that one has.
    unbind_contextvars(*(before.keys() & _FACTS - facts.keys()))
    _bind(**facts, **bound.shown)
    events.TASK_STARTED.tell(**facts)


def _end(*, task: Any, **_: Any) -> None:
    before: _Before | None = getattr(task.request, _BEFORE, None)
    if before is None:
        return
    delattr(task.request, _BEFORE)
    context.unbind(before.context)
    with suppress(ValueError):  # (see `context.unbind`)
        _is_running.reset(before.is_running)
    _put_back(before.shown)


def _put_back(before: Mapping[str, Any]) -> None:
    """Leave of what is shown what was there before: also of what the task has bound, and never took back."""
    from structlog.contextvars import get_contextvars, unbind_contextvars

    now = get_contextvars()
    unbind_contextvars(*(now.keys() - before.keys()))
    _bind(**{name: value for name, value in before.items() if now.get(name, _UNBOUND) is not value})


def _bind(**facts: Any) -> None:
    from structlog.contextvars import bind_contextvars

    bind_contextvars(**facts)


def _context_of(app: Any, request: Any, header: Headers) -> context.Bound:
    root_id = request.root_id or request.id
    if request.is_eager and header.context is None:
        # Part of the request, or of the task, that calls it.
        return context.current().within(root_id)
    return context.carried(app.context_class, header.context, root_id=root_id)


def _facts(task: Any, request: Any, header: Headers) -> dict[str, Any]:
    now = time.time()
    ready = ready_at(request, header)
    facts = {
        "task": task.name,
        "id": request.id,
        "root_id": request.root_id or request.id,
        "parent_id": request.parent_id,
        "attempt": header.attempt if task.contract is not None else request.retries + 1,
        "queue": header.queue or (request.delivery_info or {}).get("routing_key"),
        "worker": request.hostname,
        "key": header.key,
        "wait_ms": None if ready is None else round(max(0.0, now - ready) * 1000, 1),
    }
    return {name: value for name, value in facts.items() if value is not None}


def ready_at(request: Any, header: Headers) -> float | None:
    """Tell since when the running attempt could have started, in seconds since 1970, if its sender said so."""
    times = [time for time in (header.sent_at, header.due_at) if time is not None]
    if header.ledger:
        last = header.ledger[-1]
        times.append(last.started + last.ran)
    if request.eta:
        times.append(cast("Any", maybe_iso8601(request.eta)).timestamp())
    return max(times, default=None)


# Where it does not run


def travelling(root_id: Any) -> Mapping[str, Any]:
    """Give what a message takes along that is sent now; *root_id* is its own."""
    headers = at_hand.get()
    if headers is not None and not _is_running.get():
        # A worker's parent process sends for a call that has ended: an errback, or a chord's body.
        return Headers.of(headers).context or {}
    return context.travelling(root_id)


@contextmanager
def handling(headers: Mapping[str, Any] | None) -> Iterator[None]:
    """Have what is sent and logged in this block belong to the call of a message that this process only handles."""
    token = at_hand.set(headers)
    try:
        yield
    finally:
        at_hand.reset(token)


def facts_of(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Give what a message's headers tell of its call, for a line that is logged where it does not run."""
    headers = headers or {}
    header = Headers.of(headers)
    root_id = headers.get("root_id") or headers.get("id")
    facts = {
        "task": headers.get("task"),
        "id": headers.get("id"),
        "root_id": root_id,
        "parent_id": headers.get("parent_id"),
        "attempt": header.attempt,
        "queue": header.queue,
        "key": header.key,
        "correlation_id": context.carried(context.Context, header.context, root_id=root_id).shown.get("correlation_id"),
    }
    return {name: value for name, value in facts.items() if value is not None}
