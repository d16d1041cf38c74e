"""
The claims of tasks: made of what a task was declared with, and taken when a call is sent.

What has a place already, in a chain, a chord, a group, behind a link, or by an
id of its own, is always sent: Celery discards what `apply_async` returns there,
and a chord would wait for a member that never runs. Its key is claimed where it
runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NoReturn, cast

from celery import states
from celery._state import get_current_worker_task
from celery.backends.base import DisabledBackend
from celery.exceptions import TaskRevokedError
from celery.utils import uuid
from celery.utils.time import maybe_iso8601
from kombu.utils.json import dumps, loads

from celerykit import events
from celerykit.errors import DuplicateCall, InvalidOptions, InvalidPayload, StoreUnavailable
from celerykit.headers import Headers
from celerykit.idempotency import Claims, Identity, Once, Sending, State, find_claim
from celerykit.idempotency.claim import Answer
from celerykit.idempotency.claims import Ended
from celerykit.idempotency.keys import Keys
from celerykit.idempotency.sending import Asked, send_all
from celerykit.idempotency.step import conflict, duplicate, record_in
from celerykit.needs import store_for
from celerykit.publishing import UnreachableBroker

if TYPE_CHECKING:
    from celerykit.result import Result

__all__ = [
    "Claimed",
    "answered",
    "claim_all",
    "claims_of",
    "identity_of",
    "is_claimed_when_sent",
    "refuse_key",
    "remember",
    "send",
    "take_back",
]

#: Options of a call that has its place.
_PLACED = ("task_id", "chord", "chain", "group_id", "link", "link_error", "reply_to")

#: How long a call is remembered by its id, in seconds: by then no broker delivers it again.
_REMEMBERED = 86400.0


def claims_of(task: Any, *, eagerly: bool = False) -> Claims | None:
    """Give what makes a task's claims; ``None`` when it has none."""
    policy: Once | None = task.once_policy
    if task.contract is None or (policy is None and not task.remember):
        return None
    app = task.app
    return Claims(
        task=str(task.name),
        policy=policy or Once(running="join", done="reuse", keep=_REMEMBERED),
        keys=Keys(task.contract, policy) if policy else None,
        store=(lambda: app.eager_store) if eagerly else (lambda: store_for(task)),
        lease=lambda: app.settings.kit.lease.total_seconds(),
        renewal=app.renewal,
        may_rerun=task.on_crash == "rerun",
        encode=dumps,
        decode=loads,
        most_runs=lambda: app.settings.kit.max_deliveries,
        ended=lambda call_id: None if eagerly else _ended(task, call_id),
    )


def _ended(task: Any, call_id: str) -> Ended | None:
    if isinstance(task.backend, DisabledBackend):
        return None
    try:
        stored = task.backend.get_task_meta(call_id)
    except Exception as error:  # noqa: BLE001  (backends raise what they like)
        events.RESULT_NOT_READ.tell(task=task.name, id=call_id, error=type(error).__name__)
        return None
    state, result, at = stored.get("status"), stored.get("result"), _timestamp(stored.get("date_done"))
    if state == states.SUCCESS:
        return Ended(at, result)
    return Ended(at, error=type(result).__name__) if state in states.EXCEPTION_STATES - {states.RETRY} else None


def _timestamp(date: Any) -> float:
    """Read when a result was stored; backends that do not say stored it now."""
    if isinstance(date, str):
        date = maybe_iso8601(date)
    if not isinstance(date, datetime):
        return time.time()
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def identity_of(task: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, key: Any) -> Identity | None:
    """
    Give the identity of a call that is sent; ``None`` when it has none, or only its own id.

    Raises:
        InvalidOptions: *key* cannot be one, or its task has no use for it.
    """
    claims: Claims | None = task.claims
    if claims is None or claims.keys is None:
        if key is not None:
            raise InvalidOptions(
                f"{task.name}: it was given a key, and is not declared with once=Once(). The message was not sent."
            )
        return None
    try:
        return claims.identify(args, kwargs, id=None, key=key)
    except InvalidPayload:
        return None  # sent all the same, for somebody who does not check


def refuse_key(name: str, options: Mapping[str, Any]) -> None:
    """
    Refuse the key of a call that nobody here can claim.

    Raises:
        InvalidOptions: There is one.
    """
    if options.get("key") is not None:
        raise InvalidOptions(
            f"{name}: it was given a key, and is no typed task that is known here. The message was not sent."
        )


def remember(result: Any, *, on: Any) -> None:
    """
    Record that the running call is done, in a transaction of the task's own.

    What the task does in that transaction and the record of it are one: both
    are there or neither is, whenever the process dies::

        with engine.begin() as db:
            db.execute(insert(charges).values(...))
            remember(receipt, on=db)
        return receipt

    Outside of a run, as when the function is called in a test, nothing happens.

    Args:
        result:
            What the task is going to return.

        on:
            A SQLAlchemy ``Connection`` or ``Session`` to the database where
            the store is.

    Raises:
        DuplicateCall: Another run has taken the key meanwhile. Let it pass: the transaction must be rolled back.

        InvalidOptions: The task has no key, or the store is no SQL database.

        ResultMismatch: *result* is not of the task's return type.
    """
    task: Any = get_current_worker_task()
    if task is not None and getattr(task, "claims", None) is None:
        raise InvalidOptions(
            f"{task.name}: remember() has nothing to record the result under; "
            "declare the task with once=Once() or remember=True."
        )
    record_in(result, on=on)


def is_eager_duplicate(task: Any, header: Headers) -> bool:
    """Tell whether a call that is to run in place has been done already."""
    claims: Claims | None = task.eager_claims
    if claims is None or header.key is None:
        return False
    found = find_claim(claims.store(), header.key)
    return found is not None and found.state is State.DONE and claims.policy.done != "rerun"


def is_claimed_when_sent(task: Any, options: Mapping[str, Any]) -> bool:
    """Tell whether a call's key is claimed before it is sent, and a duplicate not sent at all."""
    if task.claims is None or task.claims.keys is None or task.app.conf.task_always_eager:
        return False
    header = Headers.of(options.get("headers"))
    is_new = header.turn == 0 and header.replay == 0 and header.joined is None and header.attempt == 1
    return header.key is not None and is_new and not any(options.get(option) for option in _PLACED)


@dataclass(frozen=True)
class Claimed:
    """
    A call whose key was looked at.

    Attributes:
        task:
            Whose call it is.

        options:
            To send it with; ``None`` when it is not to be sent.

        result:
            Of a call that is not to be sent.

        is_duplicate:
            Whether it is another one's; ``None`` when the store did not answer.
    """

    task: Any
    options: dict[str, Any] | None
    result: Result[Any] | None = None
    is_duplicate: bool | None = False

    @property
    def id(self) -> str | None:
        """Of a call that is to be sent."""
        return None if self.options is None else str(self.options["task_id"])

    @property
    def is_first(self) -> bool:
        """Tell whether the key is claimed for this call."""
        return self.options is not None and self.is_duplicate is False


def send(task: Any, options: Mapping[str, Any], publish: Callable[[dict[str, Any]], Result[Any]]) -> Result[Any]:
    """
    Claim a call's key, and send it with *publish* if it has to be.

    Raises:
        DuplicateCall: The key is another one's, and the task says that this is an error.

        KeyConflict: It is one of a call with other arguments.
    """
    [claimed] = claim_all([(task, options)])
    if claimed.options is None:
        return cast("Result[Any]", claimed.result)
    try:
        result = publish(claimed.options)
    except Exception as error:
        if not (isinstance(error, UnreachableBroker) and error.may_have_been_sent):
            take_back([claimed])
        raise
    result.duplicate = claimed.is_duplicate
    return result


def claim_all(
    calls: Sequence[tuple[Any, Mapping[str, Any]]], *, before: Mapping[Any, Claimed] | None = None
) -> list[Claimed]:
    """
    Claim the keys of many calls, tasks with their options, in one round trip if they are free.

    If one is refused, those that were claimed *before* are taken back with the others.

    Raises:
        DuplicateCall: One was refused.
    """
    asked = [_asked(task, options) for task, options in calls]
    try:
        sendings: Sequence[Sending | StoreUnavailable] = send_all(asked)
    except StoreUnavailable as error:
        sendings = [error] * len(asked)
    claimed: list[Claimed] = []
    refused: Exception | None = None
    for (task, options), one, sending in zip(calls, asked, sendings, strict=True):
        try:
            claimed.append(_claimed(task, options, one, sending))
        except (DuplicateCall, StoreUnavailable) as error:
            refused = refused or error
    if refused is not None:
        take_back([*claimed, *(before or {}).values()])
        raise refused
    return claimed


def _asked(task: Any, options: Mapping[str, Any]) -> Asked:
    header, now = Headers.of(options.get("headers")), time.time()
    identity = Identity(str(header.key), header.call or "")
    delay = max(0.0, (_due_at(task, options, now) or now) - now)
    return Asked(task.claims, identity, uuid(), delay=delay, until=_seconds_left(task, options, now))


def _due_at(task: Any, options: Mapping[str, Any], now: float) -> float | None:
    countdown, eta = options.get("countdown"), options.get("eta")
    if countdown:
        return float(now + countdown)
    if isinstance(eta, datetime):
        return (eta if eta.tzinfo else eta.replace(tzinfo=task.app.timezone)).timestamp()
    return None


def _seconds_left(task: Any, options: Mapping[str, Any], now: float) -> float | None:
    expires = options.get("expires", task.expires)
    if isinstance(expires, int | float):
        return float(expires)
    if isinstance(expires, datetime):
        return (expires if expires.tzinfo else expires.replace(tzinfo=task.app.timezone)).timestamp() - now
    return None


def _claimed(task: Any, options: Mapping[str, Any], asked: Asked, sending: Sending | StoreUnavailable) -> Claimed:
    if isinstance(sending, StoreUnavailable):
        if task.on_store_down == "fail":
            raise StoreUnavailable(f"{task.name}: {sending} The message was not sent.") from sending
        # Its key is claimed where it runs.
        events.CLAIM_UNKNOWN.tell(task=task.name, key=asked.identity.key, id=asked.id, then="send", error=sending)
        return Claimed(task, {**options, "task_id": asked.id}, is_duplicate=None)
    answer, claim = sending
    if answer is Answer.GO:
        return Claimed(task, {**options, "task_id": asked.id})
    found = cast("Any", claim)
    if answer is Answer.SEND_AGAIN:
        events.CLAIM_SENT_AGAIN.tell(task=task.name, key=asked.identity.key, id=found.id)
        header = Headers.of(options["headers"])
        attempt = (found.resume or {}).get("attempt", header.attempt)
        again = replace(header, replay=found.turn.replay, turn=found.turn.number, attempt=attempt)
        headers = again.added_to(options["headers"])
        return Claimed(task, {**options, "task_id": found.id, "headers": headers}, is_duplicate=True)
    return Claimed(task, None, answered(task, answer, found, asked.identity.key), is_duplicate=True)


def answered(task: Any, answer: Answer, found: Any, key: str) -> Result[Any]:
    """Give the result of a duplicate, or raise what it is told."""
    events.TASK_DUPLICATE.tell(task=task.name, then=answer.name.lower(), key=key, first=found.id)
    if answer is Answer.JOIN:
        result = task.AsyncResult(found.id)
    elif answer is Answer.REUSE:
        result = task.AsyncResult(found.id)
        result.know(states.SUCCESS, task.claims.result_of(found))
    elif answer is Answer.SKIP:
        result = task.AsyncResult(uuid())
        result.know(states.REVOKED, TaskRevokedError(f"its key {key} is that of call {found.id}"))
    else:
        _refuse(task, answer, found, key)
    result.duplicate = True
    return cast("Result[Any]", result)


def _refuse(task: Any, answer: Answer, found: Any, key: str) -> NoReturn:
    told = conflict if answer is Answer.CONFLICT else duplicate
    raise told(str(task.name), key, found, says="The message was not sent.")


def take_back(claimed: Sequence[Claimed]) -> None:
    """Free the keys of calls that were not sent."""
    for one in claimed:
        if one.is_first:
            options = cast("dict[str, Any]", one.options)
            one.task.claims.take_back(Identity(str(Headers.of(options["headers"]).key)), options["task_id"])
