"""
A shop that says what it should not, for a worker at RabbitMQ.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel

from celerykit import Backoff, CeleryKit, Context, Redact, Retry


class ShopContext(Context):
    tenant: str | None = None


app = CeleryKit("told", context=ShopContext)


class Card(BaseModel):
    holder: str
    number: Annotated[str, Redact()]


class Declined(Exception):
    """The bank says no."""


@app.task(name="told.verify", retry=Retry({Declined: Backoff(base=0.05, cap=0.1)}, attempts=3))
def verify(card: Card, password: str) -> None:
    print(f"asking about {card.number} with {password}")
    if verify.request.retries < 2:
        raise Declined(f"no line to the bank of {card.number}")
    ship.delay(card)


@app.task(name="told.ship")
def ship(card: Card) -> None:
    raise LookupError(f"nobody knows {card!r}")
