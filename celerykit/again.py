"""
Sends a running call again: a retry by its policy, one by hand, and what was only put off.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn, cast

from celery import current_task
from celery.exceptions import Ignore, Reject, Retry
from celery.utils.serialization import get_pickleable_exception

from celerykit import redact, running
from celerykit.call import Later
from celerykit.dead_letters import error_fingerprint
from celerykit.errors import DuplicateCall, InvalidPayload
from celerykit.events import describe
from celerykit.headers import Attempt, Headers
from celerykit.idempotency import Waiting
from celerykit.publishing import FAILURES
from celerykit.retry import DROPPED

__all__ = [
    "ENTERED",
    "TOKEN",
    "descriptions",
    "headers_of_next",
    "not_sent",
    "note_again",
    "note_failed",
    "raise_dropped",
    "send",
]

#: A mark on the request of a running task: when it began, in seconds since 1970.
ENTERED = "celerykit_entered"

#: Where a worker's parent process writes the token of a run, among what its child is told of the request.
TOKEN = "celerykit_token"  # noqa: S105  (no secret)

#: An eager call that is put off runs again at once, within itself.
_MOST_EAGER_SNOOZES = 10


def send(task: Any, request: Any, header: Headers, later: Later) -> NoReturn:
    """
    Send the running call of *task* again, and tell Celery so.

    It is the core of Celery's ``Task.retry``, whose count of retries is not
    ours: a snooze is none.

    Raises:
        Retry: It was sent; Celery's word for it.

        Reject: The broker did not take it; the message goes back to its queue.
    """
    if request.is_eager and later.kind == "snooze" and len(header.ledger) >= _MOST_EAGER_SNOOZES:
        # Nothing that it waits for can happen meanwhile.
        raise cast("Any", later.error or later)
    if request.is_eager and isinstance(later, Waiting):
        raise DuplicateCall(
            f"{task.name}: call {later.joined} has the same key and has not ended; run in place, it never would.",
            str(header.key),
            str(later.joined),
        )
    signature = task.signature_from_request(
        request,
        countdown=later.delay,
        retries=request.retries + (not isinstance(later, Waiting)),
        headers=_headers_of(request, header, later),
        queue=header.queue,
        **descriptions(request),
    )
    told: Any = Retry
    if not request.is_eager:
        try:
            signature.apply_async()
        except Exception as error:  # noqa: BLE001  (which of them it is, is looked at)
            raise not_sent(error) from later.error
    if isinstance(later, Waiting) and later.joined in (None, request.id):
        # Its state is another run's to tell.
        raise Ignore
    note_again(signature.options["headers"], kind=later.kind, delay=later.delay, error=later.error)
    raise told(exc=later.error, when=later.delay, is_eager=request.is_eager, sig=signature) from None


def note_again(
    headers_of_next: Mapping[str, Any], *, kind: str, delay: float, error: BaseException | None = None
) -> None:
    """Add to Celery's record of a retry what it does not know."""
    following = Headers.of(headers_of_next)
    fingerprint = following.ledger[-1].error if following.ledger and kind == "retry" else ""
    running.note(
        kind=kind,
        delay=round(delay, 3),
        next_attempt=following.attempt,
        error=redact.scrub(describe(error)) if error is not None and kind == "retry" else None,
        error_fingerprint=fingerprint or None,
        run_ms=_run_ms(),
    )


def note_failed(error: BaseException) -> None:
    """Add to Celery's record of a failure what it does not know."""
    is_invalid = isinstance(error, InvalidPayload) and error.task == getattr(current_task, "name", None)
    running.note(error_fingerprint=_fingerprint(error), run_ms=None if is_invalid else _run_ms())


def _run_ms() -> float | None:
    started: float | None = getattr(getattr(current_task, "request", None), ENTERED, None)
    return None if started is None else round((time.time() - started) * 1000, 1)


def not_sent(error: Any) -> Exception:
    """Say what becomes of a message whose retry could not be sent: it goes back, if it is the broker's fault."""
    if isinstance(error, FAILURES):
        return Reject(f"the retry could not be sent: {error}", requeue=True)
    # It would be the same the next time.
    return error if isinstance(error, Exception) else RuntimeError(f"the retry could not be sent: {error}")


def _headers_of(request: Any, header: Headers, later: Later) -> dict[str, Any]:
    if not isinstance(later, Waiting):
        return headers_of_next(request, header, later.attempt, outcome=later.kind, error=later.error)
    # Nothing ran: it is the same turn, and no row in the ledger.
    sent_at = header.sent_at or time.time()
    return replace(header, joined=later.joined, waits=header.waits + 1, sent_at=sent_at).added_to(_kept(request))


def headers_of_next(
    request: Any, header: Headers, attempt: int, *, outcome: str, error: BaseException | None
) -> dict[str, Any]:
    """Give the headers of the next message, with a row for this run in the ledger."""
    row = _row(request, header, outcome, error)
    following = replace(
        header, attempt=attempt, due_at=None, ledger=(*header.ledger, row), turn=header.turn + 1, joined=None, waits=0
    )
    return following.added_to(_kept(request))


def _kept(request: Any) -> dict[str, Any]:
    # Where a broker marks a message as redelivered among its headers, what is sent again is a new one.
    # And the token of a run is its own.
    return {name: value for name, value in (request.headers or {}).items() if name not in ("redelivered", TOKEN)}


def _row(request: Any, header: Headers, outcome: str, error: BaseException | None) -> Attempt:
    started, now = getattr(request, ENTERED), time.time()
    return Attempt(
        started=started,
        waited=max(0.0, started - (running.ready_at(request, header) or started)),
        ran=now - started,
        outcome=outcome,
        error="" if error is None or outcome == "snooze" else _fingerprint(error),
        worker=str(request.hostname or ""),
    )


def _fingerprint(error: BaseException) -> str:
    return error_fingerprint(type(error).__name__, "".join(traceback.format_exception(error)))


def descriptions(request: Any, *, args: Any = None, kwargs: Any = None) -> dict[str, Any]:
    """
    Give how the arguments of a running call are written for people: as its sender did, who may have had reasons.

    Args:
        args, kwargs:
            Those it goes on with, if they are others; they are described anew.
    """
    written = {"argsrepr": args, "kwargsrepr": kwargs}
    return {
        name: shown for name, others in written.items() if others is None and (shown := getattr(request, name, None))
    }


def raise_dropped(error: Exception) -> NoReturn:
    """Raise an error that leaves no letter, as one that can tell so to another process."""
    portable: Any = get_pickleable_exception(error)
    if portable is error:
        raise error
    vars(portable)[DROPPED] = True
    raise portable from error
