"""
One call of a task as its steps see it, and how steps are put around it.

A step is a function. It may look at the call, change it for those further in,
refuse it by raising, or answer it itself::

    def timed(call_next: Next, call: Call) -> Any:
        started = monotonic()
        try:
            return call_next(call)
        finally:
            observe(call.task, monotonic() - started)

One that catches ``Exception`` lets `Outcome` pass: so ends a call that is put off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from celerykit.contract import Contract
from celerykit.errors import InvalidPayload
from celerykit.headers import Headers

__all__ = ["Call", "Later", "Next", "Outcome", "Step", "Stopped", "compose", "validated"]


@dataclass(frozen=True, slots=True)
class Call:
    """
    One invocation of a task in a worker. Holds no Celery object.

    Attributes:
        attempt:
            Counts from 1.

        args, kwargs:
            JSON values outside of `validated`, typed ones inside.

        policies:
            What the task was declared with: ``retry``, ``on_crash``, ``once``, …

        token:
            Drawn for this run: a redelivery has the same id and attempt.

        in_chord:
            Whether a chord waits for it.
    """

    task: str
    id: str
    attempt: int
    headers: Headers
    contract: Contract
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    policies: Mapping[str, Any] = field(default_factory=dict)
    token: str = ""
    in_chord: bool = False


class Outcome(Exception):
    """
    How a call ends that gives neither a value nor an error.

    Raised inwards, and for steps to let pass: a step that catches ``Exception`` raises these again.
    """


class Later(Outcome):
    """
    The call is to run again.

    Attributes:
        delay:
            Seconds from now.

        attempt:
            Which attempt that will be; a snooze does not count as one.

        kind:
            ``retry`` after an error, ``snooze`` when the task asked for it,
            ``wait`` when another call comes first.

        error:
            Why.
    """

    def __init__(
        self,
        delay: float,
        *,
        attempt: int,
        kind: Literal["retry", "snooze", "wait"],
        error: BaseException | None = None,
    ) -> None:
        super().__init__(delay, attempt, kind)
        self.delay = delay
        self.attempt = attempt
        self.kind = kind
        self.error = error


class Stopped(Outcome):
    """
    The function ended the call by one of Celery's own exceptions: ``Retry``, ``Ignore`` or ``Reject``.

    Attributes:
        by:
            Which.

        how:
            What it did: it was sent again already, its id goes on with another
            task, it goes back to its queue, it is refused, or nothing is said
            of it.

        delay:
            Seconds until it runs again, if it does.
    """

    def __init__(
        self,
        by: BaseException,
        *,
        how: Literal["retried", "replaced", "handed back", "rejected", "ignored"] = "ignored",
        delay: float = 0.0,
    ) -> None:
        super().__init__(by)
        self.by = by
        self.how = how
        self.delay = delay


#: What a step calls to go on: the next step, or in the end the task's function.
Next: TypeAlias = Callable[[Call], Any]

Step: TypeAlias = Callable[[Next, Call], Any]


def compose(steps: Sequence[Step], run: Next) -> Next:
    """Nest *steps* around *run*; the first one is outermost."""
    for step in reversed(steps):
        run = functools.partial(step, run)
    return run


def validated(call_next: Next, call: Call) -> Any:
    """
    Read the arguments into their types before, and write the result as JSON after.

    A payload that does not fit is refused here, and the function does not run.
    """
    try:
        args, kwargs = call.contract.load(call.args, call.kwargs)
    except InvalidPayload as error:
        raise _with_versions(error, call) from None
    return call.contract.dump_result(call_next(replace(call, args=args, kwargs=kwargs)))


def _with_versions(error: InvalidPayload, call: Call) -> InvalidPayload:
    sent, here = call.headers.contract, call.contract.fingerprint
    if sent == here:
        return error
    who = f"was sent with contract {sent}" if sent else "was sent by somebody who did not check it"
    return InvalidPayload(f"{error} It {who}; this worker has {here}.", error.task, error.problems)
