"""
The last spans of a process that ends.

OpenTelemetry exports spans by the batch, on a thread, and what is left when
Python exits. A pool's process ends by ``os._exit``, so with
``worker_max_tasks_per_child=1`` no span of a task would ever be exported.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from celery import signals

__all__ = ["connect", "flush"]

#: What an exporter may take for the last batch, in seconds: its server may be gone, and the worker is to end.
_LONGEST = 5.0

_PROVIDERS = {"opentelemetry.trace": "get_tracer_provider", "opentelemetry.metrics": "get_meter_provider"}


def connect() -> None:
    """See to it, once in a process, that what its workers have measured is exported before they end."""
    signals.worker_process_shutdown.connect(flush, weak=False, dispatch_uid="celerykit.traces")
    signals.worker_shutdown.connect(flush, weak=False, dispatch_uid="celerykit.traces")


def flush(**_: Any) -> None:
    """Export what is left, if this program uses OpenTelemetry's SDK."""
    if "opentelemetry.sdk" not in sys.modules:
        return
    # Its own time limits do not hold in all versions and exporters.
    thread = threading.Thread(target=_flush_all, name="celerykit-traces", daemon=True)
    thread.start()
    thread.join(_LONGEST)


def _flush_all() -> None:
    for module, get in _PROVIDERS.items():
        if module in sys.modules:
            provider = getattr(sys.modules[module], get)()
            # Where none was set up, there is a stand-in.
            getattr(provider, "force_flush", lambda **_: None)(timeout_millis=int(_LONGEST * 1000))
