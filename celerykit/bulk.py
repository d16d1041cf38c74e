"""
Many calls at once: all checked first, then sent in a few round trips.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

from celerykit.canvas import Signature
from celerykit.errors import InvalidOptions, InvalidPayload
from celerykit.publishing import FAILURES, UnreachableBroker

if TYPE_CHECKING:
    from celerykit.app import CeleryKit
    from celerykit.result import Result

__all__ = ["Arguments", "PartlySent", "as_signature", "enqueue"]

#: The arguments of one call: by position, or by name.
Arguments: TypeAlias = tuple[Any, ...] | Mapping[str, Any]

#: Messages a round trip. More gain nothing measurable, and leave more uncertain after a failure.
_BATCH = 500


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

    def settle(self) -> None:
        self.sent += self.uncertain
        self.uncertain = []


def as_signature(task: Any, call: Arguments | Signature[Any]) -> Signature[Any]:
    """Make a signature of *task* from the arguments of one call."""
    if isinstance(call, Signature):  # a mapping too, as all of Celery's are
        return call
    if isinstance(call, Mapping):
        return Signature(task, (), dict(call), app=task.app)
    if isinstance(call, tuple | list):
        return Signature(task, tuple(call), {}, app=task.app)
    raise InvalidOptions(
        f"{task.name}: a call must be a tuple of arguments, a mapping of named ones, or a signature; "
        f"got {type(call).__name__}. Nothing was sent."
    )


def enqueue(app: CeleryKit, signatures: Iterable[Signature[Any]]) -> list[Result[Any]]:
    """
    Check all *signatures*, then send them.

    Raises:
        InvalidPayload: One does not fit; nothing was sent.

        PartlySent: The broker failed; says what it had taken.
    """
    calls = [_checked(index, sig) for index, sig in enumerate(signatures)]
    progress = _Progress(total=len(calls))
    with _telling(app, progress), app.producer_or_acquire() as producer:
        for batch in _in_batches(calls):
            _publish(producer, batch, progress)
    return progress.sent


def _checked(index: int, sig: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    contract = getattr(getattr(sig, "type", None), "contract", None)
    if contract is None:
        what = getattr(sig, "task", type(sig).__name__)
        raise InvalidOptions(f"call {index}: {what} is not a call of one typed task. Nothing was sent.")
    try:
        return (sig.type, *sig.type.prepare(sig.args, sig.kwargs, sig.options))
    except InvalidPayload as error:
        raise InvalidPayload(f"call {index}: {error} Nor were the others.", error.task, error.problems) from None


def _publish(producer: Any, batch: list[Any], progress: _Progress) -> None:
    # Where a transport cannot put messages together, each has arrived when its publish returns.
    together = producer.supports_batch_publish
    # What is put aside for a batch is not on its way yet, so there is nothing to try again.
    how = {"producer": producer, **({"retry": False} if together else {})}
    # One more than there are: what is sent when it is full would be sent within somebody's `send_prepared`.
    with producer.batch(max_size=_BATCH + 1):
        for task, args, kwargs, options in batch:
            progress.uncertain.append(task.send_prepared(args, kwargs, {**options, **how}))
            if not together:
                progress.settle()
    progress.settle()


def _in_batches(calls: list[Any]) -> Iterator[list[Any]]:
    rest = iter(calls)
    while batch := list(islice(rest, _BATCH)):
        yield batch


@contextmanager
def _telling(app: CeleryKit, progress: _Progress) -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        raise PartlySent(
            f"the broker at {app.connection_for_write().as_uri()} failed in the middle ({error.__cause__ or error}): "
            f"of {progress.total} calls, {len(progress.sent)} were sent and {len(progress.uncertain)} may have been.",
            sent=progress.sent,
            uncertain=progress.uncertain,
        ) from error
