"""
What is counted and measured: every metric, under its name.

Names and labels are an interface, of dashboards and alerts: they stand here, and
nowhere else. Times are in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["BUCKETS", "METRICS", "Metric"]

#: By name.
METRICS: dict[str, Metric] = {}

#: From a worker that has nothing to do to a backlog of an hour, in seconds.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


@dataclass(frozen=True)
class Metric:
    """
    One metric.

    Attributes:
        name:
            As it is served; that of a counter ends in ``_total``.

        labels:
            Each has few values: see `celerykit.metrics.counting`.

        where:
            ``task`` is counted where calls are sent and run, ``worker`` is read off a worker
            when somebody asks, and ``broker`` is asked of the broker then.
    """

    name: str
    kind: Literal["counter", "histogram", "gauge"]
    labels: tuple[str, ...]
    meaning: str
    where: Literal["task", "worker", "broker"] = field(default="task", kw_only=True)

    def __post_init__(self) -> None:
        METRICS[self.name] = self

    @property
    def family(self) -> str:
        """The name that prometheus-client knows it by."""
        return self.name.removesuffix("_total")


# Where calls are sent

SENT = Metric(
    "celerykit_tasks_sent_total", "counter", ("task", "queue"), "Calls handed to their broker; a retry is none."
)
DUPLICATE = Metric(
    "celerykit_tasks_duplicate_total",
    "counter",
    ("task", "outcome"),
    "Calls whose key was another's, by what followed.",
)

# Where they run

STARTED = Metric("celerykit_tasks_started_total", "counter", ("task", "queue"), "Runs that began.")
FINISHED = Metric(
    "celerykit_tasks_finished_total",
    "counter",
    ("task", "queue", "outcome"),
    "Runs that ended: `succeeded`, `failed`, `retried`, `snoozed`, `waiting`, `ignored`, `rejected`; `lost`, "
    "`timed_out` and `terminated` when the process ended with it.",
)
WAIT = Metric(
    "celerykit_task_wait_seconds",
    "histogram",
    ("task", "queue"),
    "From when a run was sent, was due, or could follow on the one before, to its start. First deliveries only.",
)
RUN = Metric("celerykit_task_run_seconds", "histogram", ("task", "queue"), "How long runs took that came to an end.")

# What did not run, and what is kept

REVOKED = Metric(
    "celerykit_tasks_revoked_total",
    "counter",
    ("task", "queue", "reason"),
    "Calls that never ran: `revoked`, `expired`.",
)
HANDED_BACK = Metric(
    "celerykit_tasks_handed_back_total",
    "counter",
    ("task", "reason"),
    "Messages that went back: a newer deploy may know.",
)
DEAD = Metric(
    "celerykit_tasks_dead_total", "counter", ("task", "queue", "reason"), "Calls buried among the dead letters, by why."
)
CLAIMS = Metric(
    "celerykit_claims_total", "counter", ("outcome",), "What went wrong with keys: `unknown`, `lost`, `not_recorded`, …"
)

# A worker

IN_FLIGHT = Metric("celerykit_tasks_in_flight", "gauge", ("task",), "Calls that this worker runs now.", where="worker")
PREFETCHED = Metric(
    "celerykit_tasks_prefetched", "gauge", (), "Messages that this worker holds, and has not started.", where="worker"
)
SLOTS = Metric("celerykit_worker_slots", "gauge", (), "How many calls this worker can run at a time.", where="worker")

# The broker

MESSAGES = Metric(
    "celerykit_queue_messages",
    "gauge",
    ("queue", "state"),
    "Messages by state: `ready`, `unacked` (held by workers), `scheduled` (held until their time).",
    where="broker",
)
OLDEST = Metric(
    "celerykit_queue_oldest_seconds", "gauge", ("queue",), "Age of the oldest message that is ready.", where="broker"
)
CONSUMERS = Metric(
    "celerykit_queue_consumers", "gauge", ("queue",), "Who consumes, if the broker tells.", where="broker"
)
DEAD_LETTERS = Metric("celerykit_dead_letters", "gauge", ("queue",), "Dead letters that are kept.", where="broker")
SCRAPE_ERRORS = Metric(
    "celerykit_queue_scrape_errors_total", "counter", (), "How often the broker could not be asked.", where="broker"
)
