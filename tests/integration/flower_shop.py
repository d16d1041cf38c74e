"""
A shop with something to hide, for who looks at it through Flower.
"""

from __future__ import annotations

import os
import signal
import time
from decimal import Decimal
from typing import Annotated
from uuid import UUID

from pydantic import BaseModel, SecretStr

from celerykit import Backoff, CeleryKit, Redact, Retry, Snooze

app = CeleryKit("tests.integration.flower_shop", set_as_current=False)


class Order(BaseModel):
    order_id: UUID
    amount: Decimal
    card: Annotated[str, Redact()]


class Receipt(BaseModel):
    order_id: UUID
    token: Annotated[str, Redact()]


@app.task(name="shop.charge")
def charge(order: Order, pin: SecretStr) -> Receipt:
    return Receipt(order_id=order.order_id, token=f"token of {order.card}")


@app.task(name="shop.refuse")
def refuse(order: Order, pin: SecretStr) -> Receipt:
    raise ValueError(f"card {order.card} with {pin.get_secret_value()} is refused")


@app.task(name="shop.crash", on_crash="bury")
def crash(order: Order) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="shop.overrun", time_limit=0.5)
def overrun(order: Order) -> None:
    time.sleep(30)


@app.task(name="shop.wait")
def wait(order: Order) -> None:
    raise Snooze(3600)


@app.task(name="shop.again", retry=Retry({OSError: Backoff(base=3600, cap=3600)}))
def again(order: Order, pin: SecretStr) -> None:
    raise OSError(f"no connection for {order.card} with {pin.get_secret_value()}")


@app.task(bind=True, name="shop.in_the_end", retry=Retry({OSError: Backoff(base=0.05, jitter=0)}))
def in_the_end(self: object, order: Order) -> Decimal:
    if self.request.retries == 0:  # type: ignore[attr-defined]
        raise OSError(f"no connection for {order.card}")
    return order.amount
