"""
What users write, and what type checkers must make of it: no error here, in any checker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, assert_type
from uuid import UUID

from celery import chain, chord, group
from pydantic import BaseModel

from celerykit import (
    Backoff,
    Call,
    CeleryKit,
    Context,
    Dead,
    DuplicateCall,
    Key,
    KeyConflict,
    Next,
    Once,
    Result,
    Retry,
    RetryAfter,
    Snooze,
    Task,
    remember,
    shared_task,
)

Currency = Literal["EUR", "USD"]


class Order(BaseModel):
    order_id: int


class Receipt(BaseModel):
    total: Decimal


def timed(call_next: Next, call: Call) -> Any:
    return call_next(call)


app = CeleryKit("shop", broker="memory://", steps=[timed])


@app.task
def charge(order: Order, *, currency: Currency = "EUR") -> Receipt:
    return Receipt(total=Decimal(order.order_id))


@app.task(bind=True, acks_late=True, max_retries=None)
def ship(self: Task[..., Any], receipt: Receipt, express: bool = False) -> str:
    return f"{self.request.id} {receipt.total} {express}"


@app.task(queue="mail", strict=True)
def mail(text: str) -> None: ...


@app.task
async def fetch(url: str) -> bytes:
    await asyncio.sleep(0)
    return url.encode()


@app.task(bind=True)
async def fetch_bound(self: Task[..., Any], url: str) -> int:
    return len(url)


@shared_task
def total(receipts: list[Receipt]) -> Decimal:
    return sum((receipt.total for receipt in receipts), Decimal())


@shared_task(name="shop.audit", ignore_result=False)
def audit(receipt: Receipt) -> None: ...


order = Order(order_id=1)

# A call, its result, and the task as a plain function.
assert_type(charge.delay(order), Result[Receipt])
assert_type(charge.delay(order, currency="USD").get(timeout=3), Receipt)
assert_type(charge.apply_async((order,), countdown=5), Result[Receipt])
assert_type(charge(order), Receipt)
assert_type(charge.AsyncResult("id").get(), Receipt)
assert_type(charge.apply((order,)).get(), Receipt)

# A bound task, called without itself.
assert_type(ship.delay(Receipt(total=Decimal(1)), express=True), Result[str])
assert_type(ship(Receipt(total=Decimal(1)), True), str)

# Options, with the task's own parameters still checked.
assert_type(charge.using(countdown=5, queue="slow").delay(order, currency="USD").get(), Receipt)

# An `async def` task: its value when sent, its coroutine when called.
assert_type(fetch.delay("u").get(), bytes)
coroutine: Coroutine[Any, Any, bytes] = fetch("u")
assert_type(fetch_bound.delay("u").get(), int)

# Shared tasks.
assert_type(total.delay([Receipt(total=Decimal(1))]).get(), Decimal)
assert_type(audit.delay(Receipt(total=Decimal(1))).get(), None)


async def in_a_web_request() -> Receipt:
    sent = await charge.adelay(order, currency="USD")
    assert_type(sent, Result[Receipt])
    assert_type(await charge.using(priority=3).adelay(order), Result[Receipt])
    return await sent.aget(timeout=3)


# Chains whose joins are checked.
assert_type(charge.s(order).then(ship, express=True).delay().get(), str)
assert_type(charge.s(order).then(ship).then(mail).delay().get(), None)
assert_type(charge.s(order).then(ship).then(fetch).delay().get(), bytes)

# Stock canvas.
chain(charge.s(order), ship.s()).apply_async()
chord([charge.s(order)], total.s()).apply_async()
group([charge.si(order), charge.s(order).set(queue="slow")]).apply_async()

# Many calls.
assert_type(charge.enqueue_many([(order,), {"order": order}, charge.s(order)]), list[Result[Receipt]])
app.enqueue_many([charge.s(order), mail.s("hello")])


# Policies.
class Declined(Exception): ...


@app.task(
    retry=Retry(
        {OSError: Backoff(base=1, cap=timedelta(minutes=1)), KeyError: RetryAfter(), Declined: Dead()}, attempts=3
    ),
    on_crash="bury",
)
def collect(order: Order) -> Receipt:
    raise Snooze(5)


assert_type(collect.delay(order).get(), Receipt)
assert_type(collect.retry_policy, Retry | None)
CeleryKit("with a policy", retry=Retry(OSError, within=timedelta(hours=1)))


# Keys.
class Payment(BaseModel):
    payment_id: Annotated[UUID, Key()]


@app.task(once=Once(running="join", done="reuse", keep=timedelta(days=1)), on_store_down="run")
def pay(payment: Payment, *, currency: Currency = "EUR") -> Receipt:
    receipt = Receipt(total=Decimal(1))
    remember(receipt, on=None)
    return receipt


def number(order: Order) -> int:
    return order.order_id


@app.task(once=Once(key=number, keep=60))
async def send(order: Order) -> bytes:
    return b""


@shared_task(once=Once(running="raise", done="rerun"), remember=True)
def notify(tenant: Annotated[str, Key], text: str) -> None: ...


def double_click(payment: Payment) -> Receipt | None:
    try:
        result = pay.delay(payment)
    except KeyConflict as conflict:
        assert_type(conflict.first, str)
        return None
    except DuplicateCall as duplicate:
        assert_type(duplicate.key, str)
        return None
    assert_type(result.duplicate, bool | None)
    return result.get()


assert_type(pay.using(key="click-1").delay(Payment(payment_id=UUID(int=1)), currency="USD").get(), Receipt)
assert_type(pay.using(key=UUID(int=1)).s(Payment(payment_id=UUID(int=1))).delay().get(), Receipt)
assert_type(pay.apply_async((Payment(payment_id=UUID(int=1)),), key=7), Result[Receipt])
assert_type(pay.apply((Payment(payment_id=UUID(int=1)),)).duplicate, bool | None)
assert_type(send.using(key="k").delay(order).get(), bytes)
assert_type(notify.delay("a", text="b").get(), None)
assert_type(pay.once_policy, Once | None)

# Dead letters.
[letter.note.reason for letter in app.dead_letters.find(task=collect.name, since=timedelta(hours=2))]
assert_type(
    app.dead_letters.replay(error="Declined", rate="20/s", edit=lambda args, kwargs: (args, kwargs)).replayed, int
)
assert_type(app.dead_letters.purge(reason="expired"), int)


# Context.
class ShopContext(Context):
    tenant: str | None = None


CeleryKit("shop", context=ShopContext)

with ShopContext.bound(ShopContext.of_request({"X-Request-ID": "1"}), tenant="acme") as bound:
    assert_type(bound, ShopContext)
    assert_type(ShopContext.current(), ShopContext)
    assert_type(Context.current().correlation_id, str | None)

assert_type(ShopContext.of_request([(b"x-request-id", b"1")]).tenant, str | None)
