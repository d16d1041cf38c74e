"""
The call that runs: its facts and its context, on every line that is logged meanwhile.

They are bound by Celery's signals around the run, and not by a step: Celery
tells how a run ended after the steps are through, and before ``task_postrun``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, ContextVar, Token, copy_context
from functools import cache
from typing import Any, NamedTuple, cast

from celery import signals
from celery.utils.time import maybe_iso8601

from celerykit import context, events, redact
from celerykit.headers import Headers

__all__ = [
    "SECRETS",
    "at_hand",
    "at_work",
    "connect",
    "facts_of",
    "handling",
    "header_of",
    "note",
    "ready_at",
    "travelling",
]

#: The headers of the message that a worker's parent process is busy with, as a request has them.
at_hand: ContextVar[Mapping[str, Any] | None] = ContextVar("celerykit_at_hand", default=None)

#: What is told of the call that runs here. Its lines have it from here, as anybody may bind anything to them.
at_work: ContextVar[Mapping[str, Any] | None] = ContextVar("celerykit_at_work", default=None)

#: A mark on the request of a running task: what binds its secret values.
SECRETS = "celerykit_secrets"

#: Marks on the request of a running task: what was before it, and our header.
_BEFORE, _HEADER = "celerykit_before", "celerykit_header"

#: What is told of each call.
_FACTS = frozenset(
    (
        *("task", "id", "root_id", "parent_id", "attempt", "queue", "worker", "key", "wait_ms"),
        *("kind", "delay", "next_attempt", "run_ms", "error", "error_fingerprint"),
    )
)

#: The same as structlog has them that are not bound.
_NO_FACTS = dict.fromkeys(_FACTS, ...)


class _Before(NamedTuple):
    """What is put back when a run ends."""

    context: Token[context.Bound | None]
    work: Token[Mapping[str, Any] | None]
    all: Context


def connect() -> None:
    """See to it, once in a process, that the runs of its apps' tasks are told. Costs other apps' tasks nothing."""
    signals.task_prerun.connect(_begin, weak=False, dispatch_uid="celerykit.running")
    signals.task_postrun.connect(_end, weak=False, dispatch_uid="celerykit.running")


def note(**facts: Any) -> None:
    """
    Add facts to what is still logged of the running call: above all to Celery's record of its end.

    A retry, a snooze and a wait tell themselves by ``kind``.
    """
    if context.is_of_run():
        _contextvars().bind_contextvars(**{name: value for name, value in facts.items() if value is not None})


# In a pool's process


def _begin(*, task: Any, **_: Any) -> None:
    app = task.app
    if not hasattr(app, "call_steps"):
        return  # another app's
    request, before = task.request, copy_context()
    header = Headers.of(request.headers)
    setattr(request, _HEADER, header)
    facts = _facts(task, request, header)
    bound = _context_of(app, request, header)
    # A call in place, inside another one's run, has no key because that one has.
    shown = {**_NO_FACTS, **facts, **bound.shown} if request.is_eager else {**facts, **bound.shown}
    _contextvars().bind_contextvars(**shown)
    setattr(request, _BEFORE, _Before(context.bind(bound), at_work.set(facts), before))
    if events.TASK_STARTED.is_wanted:
        events.TASK_STARTED.tell(**facts)


def _end(*, task: Any, **_: Any) -> None:
    request = task.request
    redact.unbind(getattr(request, SECRETS, None))
    before: _Before | None = getattr(request, _BEFORE, None)
    if before is None:
        return
    delattr(request, _BEFORE)
    try:
        _put_back(before.all)
    finally:
        at_work.reset(before.work)
        context.unbind(before.context)


@cache
def _contextvars() -> Any:
    # Here, as it is 50 ms that a program that only declares tasks has no use for.
    import structlog.contextvars

    return structlog.contextvars


def _put_back(before: Context) -> None:
    """Take back what is bound to log lines since: by us, and by the task itself, which may never take it back."""
    prefix, was_bound = _contextvars().STRUCTLOG_KEY_PREFIX, before.get
    for var, value in copy_context().items():
        if var.name.startswith(prefix) and value is not (was := was_bound(var, ...)):
            var.set(was)


def _context_of(app: Any, request: Any, header: Headers) -> context.Bound:
    root_id = request.root_id or request.id
    if request.is_eager and header.context is None:
        # Part of the request, or of the task, that calls it.
        return context.current().within(root_id)
    return context.carried(app.context_class, header.context, root_id=root_id)


def _facts(task: Any, request: Any, header: Headers) -> dict[str, Any]:
    facts = {
        "task": task.name,
        "id": request.id,
        "root_id": request.root_id or request.id,
        "attempt": header.attempt if task.contract is not None else request.retries + 1,
        "worker": request.hostname,
    }
    if (parent_id := request.parent_id) is not None and parent_id != request.id:  # (as a retry has it)
        facts["parent_id"] = parent_id
    if (queue := header.queue or (request.delivery_info or {}).get("routing_key")) is not None:
        facts["queue"] = queue
    if header.key is not None:
        facts["key"] = header.key
    if (ready := ready_at(request, header)) is not None:
        facts["wait_ms"] = round(max(0.0, time.time() - ready) * 1000, 1)
    return facts


def header_of(request: Any) -> Headers:
    """Give our header of the running call, which is read once."""
    read: Headers | None = getattr(request, _HEADER, None)
    return Headers.of(request.headers) if read is None else read


def ready_at(request: Any, header: Headers) -> float | None:
    """Tell since when the running attempt could have started, in seconds since 1970, if its sender said so."""
    times = [header.sent_at, header.due_at]
    if header.ledger:
        last = header.ledger[-1]
        times.append(last.started + last.ran)
    if request.eta:
        times.append(_seconds(request.eta))
    return max(filter(None, times), default=None)


def _seconds(eta: Any) -> float | None:
    try:
        return cast("float", cast("Any", maybe_iso8601(eta)).timestamp())
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None


# Where it does not run


def travelling(root_id: Any) -> Mapping[str, Any]:
    """Give what a message takes along that is sent now; *root_id* is its own."""
    headers = at_hand.get()
    if headers is not None and not context.is_bound():
        # A worker's parent process fails a message that became no request.
        return Headers.of(headers).context or {}
    return context.travelling(root_id)


@contextmanager
def handling(headers: Mapping[str, Any] | None, app: Any) -> Iterator[None]:
    """
    Have what is sent and logged in this block belong to the call of a message that this process only handles.

    Of a call whose process died, Celery sends the errbacks from the worker's parent process, or calls them there.
    """
    headers = headers or {}
    root_id = headers.get("root_id") or headers.get("id")
    at = at_hand.set(headers)
    token = context.bind(context.carried(app.context_class, Headers.of(headers).context, root_id=root_id))
    try:
        yield
    finally:
        context.unbind(token)
        at_hand.reset(at)


def facts_of(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Give what a message's headers tell of its call, for a line that is logged where it does not run."""
    headers = headers or {}
    header, call_id = Headers.of(headers), headers.get("id")
    root_id, parent_id = headers.get("root_id") or call_id, headers.get("parent_id")
    facts = {
        "task": headers.get("task"),
        "id": call_id,
        "root_id": root_id,
        "parent_id": parent_id if parent_id != call_id else None,
        "attempt": header.attempt,
        "queue": header.queue or _routing_key(headers.get("delivery_info")),
        "key": header.key,
        **context.told(header.context, root_id=root_id),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _routing_key(delivery: Any) -> Any:
    # A request has it among its headers, as it came with the message.
    return delivery.get("routing_key") if isinstance(delivery, Mapping) else None
