"""Tasks that write down when they start, for workers with short leases."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import celery
import redis
from celery.worker.consumer import Consumer as Stock

from celerykit.worker.leases import Leases


def ledger() -> redis.Redis:
    return redis.Redis.from_url(os.environ["LEDGER"], decode_responses=True)


class Consumer(Stock):
    """Celery's, with leases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        lease = timedelta(seconds=float(os.environ.get("LEASE", "2")))
        self.leases = Leases(lease, on_garbage=self._on_garbage, pool=kwargs.get("pool"))
        super().__init__(*args, **kwargs)

    def connection_for_read(self, heartbeat: Any = None) -> Any:
        return self.ensure_connected(self.leases.guard(self.app.connection_for_read(heartbeat=heartbeat)))

    def connect(self) -> Any:
        connection = super().connect()
        self.leases.follow(connection)
        return connection

    def shutdown(self) -> None:
        super().shutdown()
        self.leases.stop()

    def _on_garbage(self, queue: str, item: bytes, error: Exception) -> None:
        # As somebody whose first try fails.
        if ledger().incr(f"garbage tries:{item!r}") == 1:
            raise OSError("the broker is away")
        ledger().rpush("garbage", f"{queue} {item!r} {error}")


app = celery.Celery("leases_shop")
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    broker_connection_retry_on_startup=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_transport_options={"queue_order_strategy": "priority", "visibility_timeout": 8}
    | ({"global_keyprefix": os.environ["PREFIX"]} if "PREFIX" in os.environ else {})
    | ({"master_name": os.environ["MASTER"]} if "MASTER" in os.environ else {}),
)
if "STOCK" not in os.environ:
    app.conf.worker_consumer = f"{__name__}:Consumer"


@app.task
def work(name: str, seconds: float = 0.0) -> None:
    ledger().rpush("starts", name)
    time.sleep(seconds)
    ledger().rpush("ends", name)
