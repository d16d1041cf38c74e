"""
A worker's numbers over HTTP: ``/metrics`` for Prometheus, and ``/queues`` for what scales workers.

Served by a thread of the parent process, which no work waits for. A port that
is taken keeps no worker from its work: the one before it may still be ending,
and the thread tries again until it is free.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any

import billiard
from celery import signals
from celery.worker import state
from prometheus_client import REGISTRY, CollectorRegistry, MetricsHandler, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector

from celerykit import events
from celerykit.metrics import names, own
from celerykit.metrics.counting import Counting
from celerykit.metrics.files import Files
from celerykit.metrics.names import Metric
from celerykit.queues import Depths, look
from celerykit.worker.leases import all_of

__all__ = ["Server", "numbers_of"]

#: Half of them have no types.
_Files: Any = MultiProcessCollector
_process: Any = billiard.current_process

#: Seconds for which an answer of the broker is good, or that it gave none.
_FRESH = 5.0

#: Seconds that the broker has to tell: Prometheus waits 10 in all.
_ASKING = 3.0

#: Seconds until a port that was taken is tried again.
_AGAIN = 2.0

#: Seconds that somebody who connects has to ask.
_IDLE = 10.0


class Numbers:
    """What this process counts for its worker, from before the pool is forked."""

    def __init__(self, app: Any) -> None:
        own.stop()
        self.files = Files()
        self.counting = Counting(app, self.files)
        self.counting.watch_calls()
        self.counting.watch_runs()
        signals.worker_process_init.connect(self._in_child, weak=False)
        signals.beat_embedded_init.connect(self._in_beat, weak=False)
        self.servers: list[socket.socket] = []
        self._pid = os.getpid()

    def _in_child(self, **_: Any) -> None:
        # A solo pool sends this, too, and runs where it is.
        if os.getpid() == self._pid:
            return
        self.files.write_as(f"child{_process().index}")
        for server in self.servers:
            # Held by a child, the port would be taken for as long as that lives.
            server.close()

    def _in_beat(self, **_: Any) -> None:
        if os.getpid() != self._pid:
            self.files.write_as("beat")


#: One for a process, which may start a worker more than once, in tests say.
_numbers: list[Numbers] = []


def numbers_of(app: Any) -> Numbers:
    """Give the numbers of this process, which are counted from the first call of this on."""
    if not _numbers:
        _numbers.append(Numbers(app))
    _numbers[0].counting.app = app
    return _numbers[0]


class Server:
    """Serves the numbers of a *worker*, from `start` until its process ends."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._kit = worker.app.settings.kit
        self._numbers = numbers_of(worker.app)
        self._queues = _Queues(worker.app)

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="celerykit-metrics", daemon=True).start()

    def _run(self) -> None:
        handler = partial(_Handler, self._registry(), self._queues)
        has_told = False
        while True:
            try:
                server = _HTTPServer(self._kit.metrics_host, self._kit.metrics_port, handler)
            except OSError as error:
                if not has_told:
                    address = _address(self._kit.metrics_host, self._kit.metrics_port)
                    events.METRICS_NOT_SERVED.tell(address=address, error=error, delay=_AGAIN)
                has_told = True
                time.sleep(_AGAIN)
                continue
            self._numbers.servers.append(server.socket)
            events.METRICS_SERVED.tell(address=_address(*server.server_address[:2]))
            server.serve_forever()

    def _registry(self) -> CollectorRegistry:
        registry = CollectorRegistry()
        registry.register(_Files(None, path=str(self._numbers.files.folder)))
        registry.register(_Worker(self._worker))
        registry.register(self._queues)
        if theirs := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            registry.register(_Theirs(_Files(None, path=theirs)))
            ProcessCollector(registry=registry)
        elif _is_one_process(self._worker):
            registry.register(_Theirs(REGISTRY))
        else:
            # In a pool's parent process there is nothing of what tasks count.
            ProcessCollector(registry=registry)
        return registry


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, handler: Any) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: somebody went away while he was answered."""


class _Handler(MetricsHandler):
    """Answers a request."""

    timeout = _IDLE

    def __init__(self, registry: CollectorRegistry, queues: _Queues, *args: Any) -> None:
        self.registry = registry
        self._queues = queues
        super().__init__(*args)

    def do_GET(self) -> None:  # noqa: N802  (the library's name)
        path = self.path.partition("?")[0].rstrip("/")
        if path == "/metrics":
            super().do_GET()
        elif path == "/queues":
            depths = self._queues.look()
            told: Any = {"error": "The broker could not be asked."} if depths is None else depths.facts()
            self._answer(503 if depths is None else 200, json.dumps(told), "application/json")
        else:
            self._answer(404, "There are /metrics and /queues.\n", "text/plain; charset=utf-8")

    def _answer(self, status: int, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Worker:
    """What is read off the worker."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._task = numbers_of(worker.app).counting.task

    def collect(self) -> Iterator[Any]:
        running, held = all_of(state.active_requests), all_of(state.reserved_requests)
        in_flight = _gauge(names.IN_FLIGHT)
        for task, number in Counter(self._task(request.name) for request in running).items():
            in_flight.add_metric([task], number)
        yield in_flight
        yield _gauge(names.PREFETCHED, len(held - running))
        yield _gauge(names.SLOTS, self._worker.pool.num_processes)


class _Queues:
    """What is asked of the broker: once in some seconds, whoever wants to know."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._at = float("-inf")
        self._depths: Depths | None = None
        self._errors = 0

    def look(self) -> Depths | None:
        """Give the latest answer; nothing if there was none."""
        with self._lock:
            if time.monotonic() - self._at > _FRESH:
                self._depths = self._look()
                self._at = time.monotonic()
            return self._depths

    def _look(self) -> Depths | None:
        try:
            return look(self._app, timeout=_ASKING)
        except Exception as error:  # noqa: BLE001  (an edge: a transport may raise anything, and the rest is served)
            self._errors += 1
            events.METRICS_NO_QUEUES.tell(error=error)
            return None

    def collect(self) -> Iterable[Any]:
        depths = self.look()
        yield CounterMetricFamily(names.SCRAPE_ERRORS.family, names.SCRAPE_ERRORS.meaning, value=self._errors)
        if depths is not None:
            yield from _queue_gauges(depths)


def _queue_gauges(depths: Depths) -> Iterable[Any]:
    messages, oldest, consumers = _gauge(names.MESSAGES), _gauge(names.OLDEST), _gauge(names.CONSUMERS)
    for name, depth in depths.queues.items():
        for state_ in ("ready", "unacked", "scheduled"):
            _add(messages, getattr(depth, state_), name, state_)
        _add(oldest, depth.oldest_seconds, name)
        _add(consumers, depth.consumers, name)
    letters = _gauge(names.DEAD_LETTERS)
    _add(letters, depths.dead_letters, depths.dead_letter_queue)
    return messages, oldest, consumers, letters


def _add(family: Any, value: float | None, *labels: str) -> None:
    if value is not None:
        family.add_metric(labels, value)


def _gauge(metric: Metric, value: float | None = None) -> Any:
    labels = metric.labels if value is None else None
    return GaugeMetricFamily(metric.name, metric.meaning, value=value, labels=labels)


class _Theirs:
    """The user's own metrics, whose errors are not ours."""

    def __init__(self, metrics: Any) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Any]:
        try:
            return list(self._metrics.collect())
        except Exception as error:  # noqa: BLE001  (an edge: their collectors may raise anything)
            events.METRICS_INCOMPLETE.tell(error=error)
            return ()


def _is_one_process(worker: Any) -> bool:
    from celery.concurrency.prefork import TaskPool

    return not isinstance(worker.pool, TaskPool)


def _address(host: Any, port: Any) -> str:
    return f"http://[{host}]:{port}/metrics" if ":" in str(host) else f"http://{host}:{port}/metrics"
