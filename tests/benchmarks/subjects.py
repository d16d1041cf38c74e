"""
What is measured: one task, declared for stock Celery in two ways, for celerykit, and for what gives calls keys.

Its function does nothing, so that all that is seen is what stands around it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, Self, get_args
from uuid import UUID, uuid4

import celery
from pydantic import BaseModel

from celerykit import CeleryKit, Once

__all__ = [
    "ADD_ONS",
    "ORDER",
    "RECEIPT",
    "SUBJECT",
    "TALLY",
    "URL",
    "AddOn",
    "Subject",
    "argument_for",
    "arguments_for",
    "declare",
    "is_installed",
]

#: Environment variables that tell a worker which subject it runs, on which server, and the file
#: that gets one byte for each run: counting in there asks nothing of the broker.
SUBJECT, URL, TALLY = "BENCHMARK_SUBJECT", "BENCHMARK_URL", "BENCHMARK_TALLY"

#: Celery's own defaults, given to both, so that they differ in typing only.
_SAME = {"task_acks_late": False, "worker_prefetch_multiplier": 4}

#: What gives the calls of stock Celery keys.
AddOn = Literal["celery-once", "celery-singleton"]
ADD_ONS: tuple[AddOn, ...] = get_args(AddOn)

#: Of stock `dict`, stock `pydantic=True`, celerykit, and celerykit with `once=`.
Flavour = Literal["dict", "pydantic", "celerykit", "once"] | AddOn

#: Those whose callers have a model in hand, and not a dict.
_TYPED: tuple[Flavour, ...] = ("pydantic", "celerykit", "once")


@dataclass(frozen=True)
class Subject:
    """
    One way to declare the task.

    Attributes:
        results:
            Whether results are stored, or ignored.

        own_defaults:
            Whether celerykit's defaults hold, instead of Celery's.

        log_format:
            How celerykit writes its log; ``None`` leaves it to itself.
    """

    flavour: Flavour
    results: bool
    own_defaults: bool = False
    log_format: str | None = None

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
    return ORDER if subject.flavour in _TYPED else ORDER.model_dump(mode="json")


def arguments_for(subject: Subject, count: int) -> list[Any]:
    """Give the same for as many calls, each of another order."""
    orders = (ORDER.model_copy(update={"order_id": uuid4()}) for _ in range(count))
    return [order if subject.flavour in _TYPED else order.model_dump(mode="json") for order in orders]


def is_installed(add_on: AddOn) -> bool:
    return find_spec(add_on.replace("-", "_")) is not None


def declare(subject: Subject, *, url: str) -> Any:
    """Make an app on the server at *url*, and declare the task."""
    make: Any = CeleryKit if subject.flavour in ("celerykit", "once") else celery.Celery
    app = make("benchmark", broker=url, backend=url)
    if not subject.own_defaults:
        app.conf.update(_SAME)
    options = _options(subject, app, url)
    # Several apps of one process would share it, and have the first one's.
    return app.task(name="shop.charge", ignore_result=not subject.results, shared=False, **options)(_function(subject))


def _options(subject: Subject, app: Any, url: str) -> dict[str, Any]:
    if subject.flavour == "pydantic":
        return {"pydantic": True}
    if subject.flavour == "once":
        return {"once": Once()}
    if subject.flavour == "celery-once":
        from celery_once import QueueOnce  # type: ignore[import-untyped]

        settings = {"url": url.replace("virtual_host=", "db="), "default_timeout": 3600}
        app.conf.ONCE = {"backend": "celery_once.backends.Redis", "settings": settings}
        return {"base": QueueOnce, "once": {"graceful": True}}
    if subject.flavour == "celery-singleton":
        from celery_singleton import Singleton  # type: ignore[import-untyped]

        app.conf.singleton_backend_url = url.replace("redis+socket", "unix").replace("virtual_host=", "db=")
        return {"base": Singleton, "lock_expiry": 3600}
    return {}


def _function(subject: Subject) -> Callable[..., Any]:
    if subject.flavour in _TYPED:
        return _charge if subject.results else _ship
    return _charge_dict if subject.results else _ship_dict


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
