"""
The app that the integration tests talk to, and that their workers run.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from uuid import UUID

from pydantic import BaseModel, Field

from celerykit import Call, CeleryKit, Next, Task, shared_task

tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="nobody")


def in_tenant(call_next: Next, call: Call) -> Any:
    """A user's own step."""
    token = tenant.set(call.task.rpartition(".")[2])
    try:
        return call_next(call)
    finally:
        tenant.reset(token)


app = CeleryKit("tests.integration.shop", steps=[in_tenant])

Currency = Literal["EUR", "USD"]


class Order(BaseModel):
    order_id: UUID
    amount: Annotated[Decimal, Field(gt=0)]


class Receipt(BaseModel):
    order_id: UUID
    total: Decimal
    currency: Currency = "EUR"


@app.task
def charge(order: Order, *, currency: Currency = "EUR") -> Receipt:
    assert isinstance(order, Order)
    return Receipt(order_id=order.order_id, total=order.amount, currency=currency)


@app.task
def mail(receipt: Receipt, cc: str | None = None) -> str:
    assert isinstance(receipt, Receipt)
    return f"{receipt.total} {receipt.currency} {cc}"


@app.task
def turnover(receipts: list[Receipt]) -> Decimal:
    return sum((receipt.total for receipt in receipts), Decimal())


@app.task
def note(path: Path, text: str) -> None:
    with path.open("a") as notes:
        notes.write(text + "\n")


@app.task
def failing_note(path: Path) -> None:
    raise RuntimeError("no note")


@app.task(bind=True, default_retry_delay=0.05)
def flaky(self: Task[..., Any], order: Order, raw: bytes, succeed_at: int = 2) -> tuple[int, Order, bytes]:
    if self.request.retries < succeed_at:
        raise self.retry(countdown=0.05)
    return self.request.retries, order, raw


@app.task(bind=True)
def described(self: Task[..., Any]) -> dict[str, Any]:
    return {"headers": self.request.headers, "tenant": tenant.get(), "task": self.name}


@app.task
def wrong_result() -> Receipt:
    return "no receipt"  # type: ignore[return-value]


@app.task(bind=True)
def replaced(self: Task[..., Any], order: Order) -> Receipt:
    return self.replace(charge.s(order, currency="USD"))  # type: ignore[return-value]


@app.task
def calls_another(order: Order) -> Decimal:
    """Calls a task, and itself, as functions."""
    receipt = charge(order)
    assert isinstance(receipt, Receipt)
    return receipt.total if order.amount > 1 else calls_another(Order(order_id=order.order_id, amount=order.amount + 1))


@app.task
def sends_nonsense() -> str:
    """Sends a wrong call from within a task."""
    try:
        charge.delay("nonsense")  # type: ignore[arg-type]
    except TypeError as error:
        return type(error).__name__
    return "sent"


@app.task
def not_a_receipt() -> str:
    return "not a receipt"


@app.task
async def loop_of(pause: float = 0) -> tuple[int, int, int]:
    await asyncio.sleep(pause)
    return os.getpid(), threading.get_ident(), id(asyncio.get_running_loop())


@app.task(soft_time_limit=1)
async def never_ends(path: Path) -> None:
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0)
        path.write_text("cleaned up")


@app.task(soft_time_limit=1)
async def never_awaits() -> None:
    while True:
        pass


@app.task(bind=True)
async def async_flaky(self: Task[..., Any]) -> int:
    await asyncio.sleep(0)
    if self.request.retries < 1:
        raise self.retry(countdown=0.05)
    return self.request.retries


@app.task(
    autoretry_for=(ConnectionError,), retry_backoff=False, retry_kwargs={"countdown": 0.05, "max_retries": 2}, bind=True
)
async def retried_by_itself(self: Task[..., Any], number: int) -> int:
    await asyncio.sleep(0)
    if self.request.retries < number:
        raise ConnectionError
    return self.request.retries


@app.task
async def cancels_itself() -> None:
    raise asyncio.CancelledError


@shared_task
def shared(order: Order) -> Decimal:
    return order.amount


class Audited(app.Task):  # type: ignore[name-defined,misc]
    """A task written as a class."""

    name = "tests.integration.shop.audited"

    def run(self, order: Order, times: int = 1) -> Decimal:
        return order.amount * times


audited: Any = app.register_task(Audited())  # type: ignore[no-untyped-call]


@app.task(pydantic=True)
def stock_pydantic(order: Order) -> Receipt:
    return Receipt(order_id=order.order_id, total=order.amount)


@app.task
def on_error(task_id: str) -> str:
    return task_id


@app.task
def untyped(a, b=2):  # type: ignore[no-untyped-def]
    return [a, b]


@app.task
async def doubled(order: Order) -> Decimal:
    return order.amount * 2


@app.task
async def tenant_of() -> str:
    await asyncio.sleep(0)
    return tenant.get()


@app.task
async def tenant_too() -> str:
    return tenant.get()


class Base(app.Task):  # type: ignore[name-defined,misc]
    name = "tests.integration.shop.base"

    async def run(self, n: int) -> int:
        return n


class Derived(Base):
    """Has a contract of its own, is retried by Celery, and awaits what it inherits."""

    name = "tests.integration.shop.derived"
    autoretry_for = (ConnectionError,)
    retry_kwargs: ClassVar = {"countdown": 0.05}
    retry_backoff = False

    async def run(self, order: Order, fail: int = 0) -> int:  # type: ignore[override]
        if self.request.retries < fail:
            raise ConnectionError
        return await super().run(int(order.amount)) + self.request.retries


base: Any = app.register_task(Base())  # type: ignore[no-untyped-call]
derived: Any = app.register_task(Derived())  # type: ignore[no-untyped-call]


@app.task(bind=True)
def reports_progress(self: Task[..., Any]) -> None:
    self.update_state(state="PROGRESS")


@app.task
async def sends_from_a_loop(order: Order) -> str:
    return (await charge.adelay(order)).id


@app.task
def times_out() -> None:
    raise TimeoutError("mine")
