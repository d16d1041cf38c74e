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
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from celerykit.contract import Contract
from celerykit.errors import InvalidPayload
from celerykit.headers import Headers

__all__ = ["Call", "Next", "Step", "compose", "validated"]


@dataclass(frozen=True, slots=True)
class Call:
    """
    One invocation of a task in a worker. Holds no Celery object.

    Attributes:
        attempt:
            Counts from 1.

        args, kwargs:
            JSON values outside of `validated`, typed ones inside.
    """

    task: str
    id: str
    attempt: int
    headers: Headers
    contract: Contract
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


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
