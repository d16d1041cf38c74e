"""
Tasks that fail, for the tests of retries and of what is buried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import celery
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery.exceptions import Reject

from celerykit import Backoff, CeleryKit, Dead, Drop, Retry, Snooze, Task

QUICK = Backoff(base=0.05, factor=1, jitter=0)

app = CeleryKit("tests.integration.retry_shop", retry=Retry({ConnectionError: QUICK}, attempts=2))


def note(path: Path, text: str) -> int:
    """Write a line, and tell which it is."""
    with path.open("a") as notes:
        notes.write(text + "\n")
    return path.read_text().count("\n")


class Declined(ConnectionError):
    """More specific than what is retried."""


@app.task(retry=Retry({ConnectionError: QUICK, Declined: Dead(), KeyError: Drop()}, attempts=3))
def charge(path: Path, succeed_at: int, error: str = "ConnectionError") -> int:
    run = note(path, "charge")
    if run < succeed_at:
        raise {"ConnectionError": ConnectionError, "Declined": Declined, "KeyError": KeyError}[error]("not now")
    return run


@app.task
def by_the_app_s_policy(path: Path) -> int:
    note(path, "run")
    raise ConnectionError


@app.task(retry=None)
def without_a_policy(path: Path) -> int:
    note(path, "run")
    raise ConnectionError


@app.task(bind=True)
def snoozing(self: Task[..., Any], path: Path, times: int) -> dict[str, Any]:
    if note(path, "run") <= times:
        raise Snooze(0.05)
    return {"header": self.request.headers["celerykit"], "retries": self.request.retries}


@app.task(bind=True, retry=Retry(KeyError, attempts=2))
def by_hand(self: Task[..., Any], path: Path) -> int:
    """Retries itself, as with Celery; the policy's count holds for that, too."""
    note(path, "run")
    raise self.retry(countdown=0.05, exc=ValueError("by hand"))


@app.task(bind=True, retry=Retry(ConnectionError, attempts=1))
def by_hand_more_often(self: Task[..., Any], path: Path) -> int:
    if note(path, "run") < 4:
        raise self.retry(countdown=0.05, max_retries=5)
    return self.request.retries


@app.task(bind=True, retry=Retry({ConnectionError: QUICK}, attempts=3))
def described(self: Task[..., Any], path: Path, secret: str) -> dict[str, Any]:
    """Gives what a run can see of how it was sent."""
    if note(path, "run") < 2:
        raise ConnectionError
    request = self.request
    return {
        "argsrepr": request.argsrepr,
        "timelimit": request.timelimit,
        "priority": request.delivery_info["priority"],
        "custom": request.headers.get("tenant"),
        "header": request.headers["celerykit"],
    }


@app.task
def doubled(number: int) -> int:
    return 2 * number


@app.task(bind=True, retry=Retry({ConnectionError: QUICK}, attempts=3))
def replaced(self: Task[..., Any], path: Path) -> int:
    if note(path, "run") < 2:
        raise ConnectionError
    return self.replace(doubled.s(21))  # type: ignore[return-value]


@app.task
def rejects() -> None:
    raise Reject("no", requeue=False)


@app.task
def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task(retry=None)
def broken(number: int) -> int:
    raise RuntimeError(f"number {number}")


@app.task
def on_error(task_id: str) -> str:
    return task_id


@app.task(bind=True)
def asks_for_nonsense(self: Task[..., Any], path: Path) -> int:
    note(path, "run")
    raise self.retry(countdown="nonsense")  # type: ignore[arg-type]


@app.task(acks_late=False)
def early(path: Path) -> int:
    note(path, "run")
    raise Reject("not here", requeue=True)


@app.task
def raises_a_childs_limit(path: Path) -> int:
    """As `get()` of another task's result does."""
    note(path, "run")
    raise TimeLimitExceeded(1)


@app.task
def raises_a_childs_loss(path: Path) -> int:
    note(path, "run")
    raise WorkerLostError("another's process")


@app.task(bind=True, retry=Retry({ConnectionError: QUICK}, attempts=3))
def with_headers_of_its_own(self: Task[..., Any], path: Path) -> int:
    note(path, "run")
    raise self.retry(countdown=0.01, headers={"tenant": "acme"})


class Plain(celery.Task):  # type: ignore[type-arg]
    """A task of Celery's own class."""

    name = "tests.integration.retry_shop.plain"

    def run(self) -> int:
        raise RuntimeError("plain")


plain: Any = app.register_task(Plain())  # type: ignore[no-untyped-call]
