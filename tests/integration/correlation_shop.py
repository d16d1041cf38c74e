"""
A shop behind a web application: what a request starts, and what that starts, with its traces.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asgi_correlation_id import CorrelationIdMiddleware
from celery.signals import worker_process_init
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from celerykit import Backoff, CeleryKit, Context, Retry

log = logging.getLogger(__name__)


class ShopContext(Context):
    tenant: str | None = None


app = CeleryKit("correlation", context=ShopContext, set_as_current=False)
app.conf.task_default_queue = "correlation"


@app.task(name="correlation.charge", retry=Retry(on={ConnectionError: Backoff(base=0.01, cap=0.02)}, attempts=3))
def charge(order: int) -> None:
    attempt = charge.request.retries + 1
    log.info("charging %s for %s", order, ShopContext.current().tenant)
    if attempt < 3:
        raise ConnectionError("the bank is away")
    ship.delay(order)


@app.task(name="correlation.ship")
def ship(order: int) -> None:
    raise LookupError(f"order {order} has no address")


# The web application

web = FastAPI()
web.add_middleware(CorrelationIdMiddleware)


@web.post("/orders/{order}")
def buy(order: int) -> dict[str, Any]:
    with ShopContext.bound(tenant="acme"):
        return {"id": charge.delay(order).id}


# Traces

#: Where spans go, each on a line.
SPANS = "CORRELATION_SHOP_SPANS"


class SpanFile(SpanExporter):
    """Writes spans to a file."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with Path(os.environ[SPANS]).open("a") as file:
            file.writelines(f"{span.to_json(indent=None)}\n" for span in spans)
        return SpanExportResult.SUCCESS


@worker_process_init.connect(weak=False)
def trace_tasks(**_: Any) -> None:
    """Do what OpenTelemetry's docs say."""
    provider = TracerProvider()
    # So long that nothing is exported by itself.
    provider.add_span_processor(BatchSpanProcessor(SpanFile(), schedule_delay_millis=600_000))
    trace.set_tracer_provider(provider)
    CeleryInstrumentor().instrument()
