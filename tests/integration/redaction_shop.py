"""
Tasks whose calls hold secrets, and which give away what they can.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Any

import structlog
from pydantic import BaseModel, Field

from celerykit import Backoff, CeleryKit, Redact, Retry, Task

#: Where it is set, a process tells Sentry all that it can, which is written into this file.
SENTRY_FILE = "REDACTION_SENTRY_FILE"


def planted(where: str) -> str:
    """Make a secret, whose beginning and end are in no other text, and between them what is written in many ways."""
    return f"planted'{where}\"/ä %s\n at the very zzend"


app = CeleryKit("tests.integration.redaction_shop", set_as_current=False)
app.conf.update(
    task_default_queue="redaction",
    result_extended=True,
    worker_send_task_events=True,
    task_send_sent_event=True,
    task_track_started=True,
)

log = logging.getLogger(__name__)


if SENTRY_FILE in os.environ:
    from tests.integration import redaction_sentry

    redaction_sentry.start(os.environ[SENTRY_FILE])


class Card(BaseModel):
    number: Annotated[str, Redact()] = Field(alias="no")
    holder: str = ""


class Order(BaseModel):
    order_id: str
    cards: list[Card]
    notes: list[Annotated[str, Redact()]] = []
    pin: Annotated[int, Redact()] = 0


class Receipt(BaseModel):
    order_id: str
    code: Annotated[str, Redact()]


class Strict(BaseModel):
    amount: int


def _told(order: Order, phrase: str, api_key: str) -> None:
    print("printed", order.cards[0].number, api_key)
    print("printed", repr(phrase), file=sys.stderr)
    log.warning("a line %s %s", order, {"api_key": api_key})
    log.warning(f"an f-string {phrase} {order.pin}")
    log.info("fields", extra={"data": {"order": order, "phrase": phrase}})
    structlog.stdlib.get_logger(__name__).info("structured", order=order, card=order.cards[0].number, any=[phrase])
    if SENTRY_FILE in os.environ:
        redaction_sentry.add("order", repr(order))


@app.task
def succeed(order: Order, phrase: Annotated[str, Redact()], *, api_key: str, headers: dict[str, Any]) -> Receipt:
    _told(order, phrase, api_key)
    return Receipt(order_id=order.order_id, code=planted("result"))


class Declined(Exception):
    def __init__(self, order: Order, text: str) -> None:
        super().__init__(order, text)
        self.order = order


@app.task
def fail(order: Order, phrase: Annotated[str, Redact()], *, api_key: str) -> None:
    _told(order, phrase, api_key)
    kept = f"{phrase}!"
    try:
        try:
            Strict.model_validate({"amount": phrase, "key": [api_key]})
        except ValueError as error:
            error.add_note(f"of {order.pin}")
            raise Declined(order, kept) from error
    except Declined as error:
        raise ExceptionGroup(f"{phrase} and", [error, OSError(2, "no file", f"/{api_key}")]) from None


@app.task(bind=True, retry=Retry({KeyError: Backoff(base=0.05, jitter=0)}, attempts=2))
def again(self: Task[..., Any], phrase: Annotated[str, Redact()], password: str) -> None:
    raise KeyError(phrase, {"why": password})


@app.task(bind=True, retry=None)
def by_hand(self: Task[..., Any], phrase: Annotated[str, Redact()]) -> str:
    if self.request.retries:
        return "done"
    raise self.retry(exc=RuntimeError(f"because of {phrase}"), countdown=0.05)


@app.task(soft_time_limit=20)
def outer(phrase: Annotated[str, Redact()]) -> None:
    inner.delay(phrase, note="sub")


@app.task
def inner(phrase: Annotated[str, Redact()], note: str) -> str:
    raise RuntimeError(f"{note}: {phrase}")


@app.task(bind=True)
def spread(self: Task[..., Any], phrase: Annotated[str, Redact()]) -> str:
    self.send_event("task-progress", note=f"progress with {phrase}")
    # Where nobody runs it: for its own run, what it was given under this name is no secret.
    quiet.using(shadow=f"shadow of {phrase}", queue="redaction-unread").delay(f"handed on {phrase}")
    return f"charged {phrase}"


@app.task
def quiet(text: str) -> None: ...


@app.task(retry=None)
def never(order: Order, phrase: Annotated[str, Redact()]) -> None:
    raise AssertionError("its arguments do not fit")
