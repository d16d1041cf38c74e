"""
What is measured: one task, declared for stock Celery in two ways and for celerykit.

Its function does nothing, so that all that is seen is what stands around it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import cache
from typing import Any, Literal, Self
from uuid import UUID

import celery
from pydantic import BaseModel

from celerykit import CeleryKit

__all__ = ["ORDER", "RECEIPT", "SUBJECT", "TALLY", "URL", "Subject", "argument_for", "declare"]

#: Environment variables that tell a worker which subject it runs, on which server, and the file
#: that gets one byte for each run: counting in there asks nothing of the broker.
SUBJECT, URL, TALLY = "BENCHMARK_SUBJECT", "BENCHMARK_URL", "BENCHMARK_TALLY"

#: Celery's own defaults, given to both, so that they differ in typing only.
_SAME = {"task_acks_late": False, "worker_prefetch_multiplier": 4}

#: Of stock `dict`, stock `pydantic=True`, and celerykit.
Flavour = Literal["dict", "pydantic", "celerykit"]


@dataclass(frozen=True)
class Subject:
    """
    One way to declare the task.

    Attributes:
        results:
            Whether results are stored, or ignored.

        own_defaults:
            Whether celerykit's defaults hold, instead of Celery's.
    """

    flavour: Flavour
    results: bool
    own_defaults: bool = False

    @classmethod
    def read(cls, text: str) -> Self:
        return cls(**json.loads(text))

    def written(self) -> str:
        """Give what `read` reads, for another process."""
        return json.dumps(asdict(self))


class Order(BaseModel):
    order_id: UUID
    customer: str
    amount: Decimal
    quantity: int
    express: bool


class Receipt(BaseModel):
    order_id: UUID
    paid: Decimal


ORDER = Order(
    order_id=UUID("8a6e0804-2bd0-4672-b79d-d97027f9071a"),
    customer="ada@example.com",
    amount=Decimal("19.90"),
    quantity=2,
    express=True,
)

RECEIPT = Receipt(order_id=ORDER.order_id, paid=ORDER.amount)
_PLAIN_RECEIPT = RECEIPT.model_dump(mode="json")


def argument_for(subject: Subject) -> Any:
    """Give what a caller of the task has in hand."""
    return ORDER.model_dump(mode="json") if subject.flavour == "dict" else ORDER


def declare(subject: Subject, *, url: str) -> Any:
    """Make an app on the server at *url*, and declare the task."""
    make: Any = CeleryKit if subject.flavour == "celerykit" else celery.Celery
    app = make("benchmark", broker=url, backend=url)
    if not subject.own_defaults:
        app.conf.update(_SAME)
    options = {"pydantic": True} if subject.flavour == "pydantic" else {}
    return app.task(name="shop.charge", ignore_result=not subject.results, **options)(_function(subject))


def _function(subject: Subject) -> Callable[..., Any]:
    if subject.flavour == "dict":
        return _charge_dict if subject.results else _ship_dict
    return _charge if subject.results else _ship


def _charge(order: Order) -> Receipt:
    _count()
    return RECEIPT


def _ship(order: Order) -> None:
    _count()


def _charge_dict(order):  # type: ignore[no-untyped-def]
    _count()
    return _PLAIN_RECEIPT


def _ship_dict(order):  # type: ignore[no-untyped-def]
    _count()


def _count() -> None:
    os.write(_tally(), b".")


@cache
def _tally() -> int:
    return os.open(os.environ[TALLY], os.O_WRONLY | os.O_APPEND)
