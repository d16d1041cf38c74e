"""
A small shop: everything an app needs, and nine tasks.

Run its worker with Celery's own command::

    celery -A shop worker
"""

from __future__ import annotations

import os
import time
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID, uuid4

from pydantic import BaseModel, Field

from celerykit import Backoff, CeleryKit, Context, Key, Once, Redact, Retry, Task


class ShopContext(Context):
    """What each call takes along, beside whose request it was."""

    tenant: str | None = None


# The broker and everything else come from the environment: CELERY_BROKER_URL, CELERY_RESULT_BACKEND, ...
app = CeleryKit("shop", context=ShopContext)

Currency = Literal["EUR", "USD"]


class Order(BaseModel):
    order_id: Annotated[UUID, Key()]
    amount: Annotated[Decimal, Field(gt=0)]


class Receipt(BaseModel):
    order_id: UUID
    charged: Decimal
    currency: Currency


@app.task
def charge(order: Order, *, currency: Currency = "EUR") -> Receipt:
    """Charge an order; what comes in and goes out are models."""
    return Receipt(order_id=order.order_id, charged=order.amount, currency=currency)


class Payment(BaseModel):
    order_id: UUID
    number: UUID


@app.task(once=Once())
def pay(order: Order, *, seconds: float = 0.3) -> Payment:
    """Take the money, once for each order: its id is the key."""
    time.sleep(seconds)
    return Payment(order_id=order.order_id, number=uuid4())


@app.task
def email_receipt(receipt: Receipt, *, cc: str | None = None) -> str:
    """Send a receipt, and say to whom."""
    return f"receipt for {receipt.charged} {receipt.currency} sent" + (f", copy to {cc}" if cc else "")


@app.task
def turnover(receipts: list[Receipt]) -> Decimal:
    """Add receipts up: the body of a chord, behind a group of charges."""
    return sum((receipt.charged for receipt in receipts), Decimal())


@app.task
async def exchange_rate(base: Currency, quote: Currency) -> Decimal:
    """Look a rate up; an `async def` task runs in the same stock worker."""
    return Decimal("1.08") if (base, quote) == ("EUR", "USD") else Decimal("0.93")


@app.task
def pack(order: Order, *, seconds: float = 1.0) -> int:
    """Pack an order, which takes a while, and say which process did."""
    time.sleep(seconds)
    return os.getpid()


class CourierBusy(Exception):
    """Nobody is free now; somebody will be."""


@app.task(bind=True, retry=Retry({CourierBusy: Backoff(base=0.2, factor=3, cap=60)}, attempts=5))
def book_courier(self: Task[..., Any], order: Order) -> str:
    """Book a courier; here the first two calls find nobody."""
    if self.request.retries < 2:
        raise CourierBusy("nobody is free")
    return f"booked at attempt {self.request.retries + 1}"


class NoSuchCountry(LookupError):
    """Nothing that a retry would change."""


@app.task
def ship(order: Order, country: str) -> str:
    """Ship an order."""
    if country not in ("DE", "FR", "PT"):
        raise NoSuchCountry(country)
    return f"on its way to {country}"


class Card(BaseModel):
    holder: str
    number: Annotated[str, Redact()]


class CardDeclined(Exception):
    """The bank says no."""


@app.task(retry=Retry({CardDeclined: Backoff(base=0.2)}, attempts=2))
def verify(card: Card) -> bool:
    """Ask a bank that declines everything, and quotes the number of the card."""
    print(f"asking the bank about {card.number}")
    raise CardDeclined(f"card {card.number} of {card.holder} is not known")
