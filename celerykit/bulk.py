"""
Many calls at once: all checked first, then sent in a few round trips.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from celery.utils import uuid

from celerykit import claiming, events
from celerykit.canvas import Signature
from celerykit.deadline import leaving
from celerykit.errors import InvalidOptions, InvalidPayload
from celerykit.publishing import FAILURES, UnreachableBroker, sending, telling_of

if TYPE_CHECKING:
    from celerykit.app import CeleryKit
    from celerykit.result import Result

__all__ = ["Arguments", "PartlySent", "Unsent", "enqueue", "of_signatures", "of_task"]

T = TypeVar("T")

#: The arguments of one call: by position, or by name.
Arguments: TypeAlias = tuple[Any, ...] | Mapping[str, Any]

#: Messages a round trip. More gain nothing measurable, and leave more uncertain after a failure.
_BATCH = 500

#: The options that choose a queue for one call.
_ROUTING = ("queue", "exchange", "routing_key", "exchange_type")


class PartlySent(UnreachableBroker):
    """
    The broker failed in the middle of many calls.

    Attributes:
        sent:
            The results of the calls it had taken.

        uncertain:
            The results of those it may have taken. Calls in neither list
            were not sent.
    """

    def __init__(
        self, message: str, *, sent: Sequence[Result[Any]] = (), uncertain: Sequence[Result[Any]] = ()
    ) -> None:
        super().__init__(message, may_have_been_sent=bool(uncertain))
        self.sent = list(sent)
        self.uncertain = list(uncertain)


@dataclass
class _Progress:
    total: int
    sent: list[Result[Any]] = field(default_factory=list)
    uncertain: list[Result[Any]] = field(default_factory=list)


class Unsent(NamedTuple):
    """One call: of a typed task, not checked yet."""

    task: Any
    args: Any
    kwargs: Any
    options: Mapping[str, Any]


def of_task(task: Any, calls: Iterable[Arguments | Signature[Any]]) -> Iterator[Unsent]:
    """Read the calls of one task, each from its arguments or from a signature."""
    for index, call in enumerate(calls):
        if isinstance(call, Signature):  # a mapping too, as all of Celery's are
            yield _of_signature(index, call)
        elif isinstance(call, Mapping):
            yield Unsent(task, (), call, {})
        elif isinstance(call, tuple | list):
            yield Unsent(task, call, {}, {})
        else:
            raise InvalidOptions(
                f"{task.name}: call {index} must be a tuple of arguments, a mapping of named ones, or a signature; "
                f"got {type(call).__name__}. Nothing was sent."
            )


def of_signatures(calls: Iterable[Any]) -> Iterator[Unsent]:
    """Read the calls of any typed tasks, each from a signature."""
    return (_of_signature(index, call) for index, call in enumerate(calls))


def _of_signature(index: int, sig: Any) -> Unsent:
    task = getattr(sig, "type", None)
    if getattr(task, "contract", None) is None:
        what = getattr(sig, "task", type(sig).__name__)
        raise InvalidOptions(f"call {index}: {what} is not a call of one typed task. Nothing was sent.")
    return Unsent(task, sig.args, sig.kwargs, sig.options)


def enqueue(app: CeleryKit, unsent: Iterable[Unsent]) -> list[Result[Any]]:
    """
    Check all calls, then send them.

    Each round trip has ``CELERYKIT_PUBLISH_DEADLINE``: on Redis that is a
    batch, on RabbitMQ one message. So many calls may take as long as they
    need, as long as the broker keeps taking them.

    Raises:
        InvalidPayload: One does not fit; nothing was sent.

        PartlySent: The broker failed; says what it had taken.
    """
    calls = [_checked(index, call) for index, call in enumerate(unsent)]
    progress = _Progress(total=len(calls))
    how = _How(app)
    with _claiming(calls, progress) as (to_send, duplicates):
        with _telling(app, progress), app.producer_or_acquire() as producer:
            for batch in _in_batches(to_send):
                _publish(app, producer, batch, progress, how)
        for index, result in duplicates.items():  # in ascending order
            progress.sent.insert(index, result)
    return progress.sent


@contextmanager
def _claiming(calls: list[Unsent], progress: _Progress) -> Iterator[tuple[list[Unsent], dict[int, Result[Any]]]]:
    """
    Claim the keys of those calls that have one, and take back the claims of what was not sent in the block.

    Gives what is to be sent, and by their places the results of what is not.
    """
    places = [place for place, call in enumerate(calls) if claiming.is_claimed_when_sent(call.task, call.options)]
    claimed: dict[int, claiming.Claimed] = {}
    for some in _in_batches(places):
        told = claiming.claim_all([(calls[place].task, calls[place].options) for place in some], before=claimed)
        claimed |= zip(some, told, strict=True)
    to_send = [
        call if place not in claimed else call._replace(options=claimed[place].options or {})
        for place, call in enumerate(calls)
        if place not in claimed or claimed[place].options is not None
    ]
    is_duplicate = {one.id: one.is_duplicate for one in claimed.values()}
    try:
        yield to_send, {place: one.result for place, one in claimed.items() if one.result is not None}
    except BaseException:
        gone = {result.id for result in (*progress.sent, *progress.uncertain)}
        claiming.take_back([one for one in claimed.values() if one.id not in gone])
        raise
    for result in progress.sent:
        # Another one of them may have joined it, and has its id.
        result.duplicate = result.duplicate or is_duplicate.get(result.id, False)


def _checked(index: int, call: Unsent) -> Unsent:
    try:
        return Unsent(call.task, *call.task.prepare(call.args, call.kwargs, call.options))
    except InvalidPayload as error:
        raise InvalidPayload(f"call {index}: {error} Nor were the others.", error.task, error.problems) from None


class _How:
    """
    What need not be done anew for each of many messages: to look whether its queue is there.
    """

    def __init__(self, app: CeleryKit) -> None:
        # Routes may send the calls of one task to several queues.
        self._may_differ = bool(app.conf.task_routes)
        self._declared: set[str] = set()

    def options(self, call: Unsent) -> dict[str, Any]:
        if self._may_differ or not call.options.keys().isdisjoint(_ROUTING):
            return {}
        if call.task.name in self._declared:
            return {"declare": []}
        self._declared.add(call.task.name)
        return {}


def _publish(app: CeleryKit, producer: Any, batch: list[Unsent], progress: _Progress, how: _How) -> None:
    before = len(progress.sent)
    queues: list[str | None] = []
    try:
        with telling_of() as queues:
            if producer.supports_batch_publish:
                _publish_together(app, producer, batch, progress, how)
                return
            for call in batch:
                _publish_one(producer, call, progress, how)
    finally:
        _tell_sent(batch, progress.sent[before:], queues)


def _tell_sent(batch: Sequence[Unsent], results: Sequence[Result[Any]], queues: Sequence[str | None]) -> None:
    if not events.TASK_SENT_MANY.is_wanted:
        return
    ids: dict[tuple[str, str | None], list[str]] = {}
    for call, result, queue in zip(batch, results, queues, strict=False):  # more than were sent
        ids.setdefault((str(call.task.name), queue), []).append(result.id)
    for (task, queue), together in ids.items():
        events.TASK_SENT_MANY.tell(task=task, queue=queue, count=len(together), first=together[0])


def _publish_one(producer: Any, call: Unsent, progress: _Progress, how: _How) -> None:
    options = {"task_id": uuid(), **how.options(call), **call.options, "producer": producer}
    try:
        progress.sent.append(call.task.publish_prepared(call.args, call.kwargs, options))
    except UnreachableBroker as error:
        if error.may_have_been_sent:
            progress.uncertain = [call.task.AsyncResult(options["task_id"])]
        raise


def _publish_together(app: CeleryKit, producer: Any, batch: list[Unsent], progress: _Progress, how: _How) -> None:
    # One more than there are: what is sent when it is full would be sent within somebody's `send_prepared`.
    with producer.batch(max_size=_BATCH + 1) as together:
        # What is put aside is not on its way yet, so there is nothing to try again.
        aside = [
            call.task.publish_prepared(
                call.args, call.kwargs, {**how.options(call), **call.options, "producer": producer, "retry": False}
            )
            for call in batch
        ]
        try:
            with sending(app, f"{len(batch)} calls"), leaving():
                together.flush()
        except UnreachableBroker as error:
            progress.uncertain = aside if error.may_have_been_sent else []
            raise
    progress.sent += aside


def _in_batches(calls: list[T]) -> Iterator[list[T]]:
    rest = iter(calls)
    while batch := list(islice(rest, _BATCH)):
        yield batch


@contextmanager
def _telling(app: CeleryKit, progress: _Progress) -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        raise PartlySent(
            f"the broker at {app.connection_for_write().as_uri()} failed in the middle "
            f"({getattr(error, 'reason', '') or error}): "
            f"of {progress.total} calls, {len(progress.sent)} were sent and {len(progress.uncertain)} may have been.",
            sent=progress.sent,
            uncertain=progress.uncertain,
        ) from error
