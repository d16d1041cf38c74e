"""
What is counted when: Celery's signals, and our own events.

A label has few values, whatever messages say: a task is one that the app knows,
or ``unknown``; the first names of queues are kept, and the rest are ``other``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

from celery import signals

from celerykit import events, running
from celerykit.headers import Headers
from celerykit.metrics import names
from celerykit.metrics.names import Metric

__all__ = ["OTHER", "UNKNOWN", "Counting", "Numbers"]

#: A task that the app does not know.
UNKNOWN = "unknown"

#: What comes after so many different names that somebody must be making them up.
OTHER = "other"

_MOST = 100

#: Celery's states, as outcomes.
_OUTCOMES = {
    "SUCCESS": "succeeded",
    "FAILURE": "failed",
    "RETRY": "retried",
    "IGNORED": "ignored",
    "REJECTED": "rejected",
}


class Numbers(Protocol):
    """Where numbers are kept."""

    def count(self, metric: Metric, *labels: str, by: float = 1.0) -> None:
        """Add to a counter."""

    def measure(self, metric: Metric, seconds: float, *labels: str) -> None:
        """Put a time into a histogram."""


class Counting:
    """
    Counts in this process what becomes of the calls of an app.

    Nothing here raises for what a message says.
    """

    def __init__(self, app: Any, numbers: Numbers) -> None:
        self.app = app
        self._numbers = numbers
        self._seen: dict[str, set[str]] = {"task": set(), "queue": set()}

    def watch_calls(self) -> None:
        """Count the calls that this process sends, and what it finds out about keys."""
        events.observe(self._on_event)

    def watch_runs(self) -> None:
        """Count the runs in this process, and in those that are forked from it."""
        for signal, receiver in (
            (signals.task_prerun, self._on_start),
            (signals.task_postrun, self._on_end),
            (signals.task_revoked, self._on_revoked),
        ):
            signal.connect(receiver, weak=False)

    # Events

    def _on_event(self, event: events.Event, facts: Mapping[str, Any]) -> None:
        count = _COUNTED.get(event.name)
        try:
            if count is not None:
                count(self, facts)
            elif event.name.startswith("claim."):
                self._numbers.count(names.CLAIMS, event.name.partition(".")[2])
        except Exception:  # noqa: BLE001  (an edge: who sends or buries a call must not fail for a number)
            return

    def _sent(self, facts: Mapping[str, Any]) -> None:
        self._numbers.count(names.SENT, self._sent_task(facts.get("task")), self.queue(facts.get("queue")))

    def _sent_many(self, facts: Mapping[str, Any]) -> None:
        labels = self._sent_task(facts.get("task")), self.queue(facts.get("queue"))
        self._numbers.count(names.SENT, *labels, by=facts.get("count", 1))

    def _duplicate(self, facts: Mapping[str, Any]) -> None:
        self._numbers.count(names.DUPLICATE, self._sent_task(facts.get("task")), str(facts.get("then", OTHER)))

    def _dead(self, facts: Mapping[str, Any]) -> None:
        labels = self.task(facts.get("task")), self.queue(facts.get("queue")), str(facts.get("reason", OTHER))
        self._numbers.count(names.DEAD, *labels)

    def _cut_off(self, facts: Mapping[str, Any]) -> None:
        # Only the worker's parent process knows.
        labels = self.task(facts.get("task")), self.queue(facts.get("queue")), str(facts.get("reason"))
        self._numbers.count(names.FINISHED, *labels)

    def _handed_back(self, facts: Mapping[str, Any]) -> None:
        self._numbers.count(names.HANDED_BACK, self.task(facts.get("task")), str(facts.get("reason", OTHER)))

    # Signals

    def _on_start(self, task: Any = None, **_: Any) -> None:
        request = task.request
        if request.is_eager:
            return
        queue = self._queue_of(request)
        # Kept at the request, which is this run's.
        request.celerykit_began = time.perf_counter()
        self._numbers.count(names.STARTED, task.name, queue)
        if (waited := _waited(request)) is not None:
            self._numbers.measure(names.WAIT, waited, task.name, queue)

    def _on_end(self, task: Any = None, state: Any = None, retval: Any = None, **_: Any) -> None:
        request = task.request
        began = getattr(request, "celerykit_began", None)
        if began is None:
            return
        queue = self._queue_of(request)
        self._numbers.measure(names.RUN, time.perf_counter() - began, task.name, queue)
        outcome = _OUTCOMES.get(state, "failed") if state != "RETRY" else _kind(request, retval)
        self._numbers.count(names.FINISHED, task.name, queue, outcome)

    def _on_revoked(
        self, sender: Any = None, request: Any = None, terminated: bool = False, expired: bool = False, **_: Any
    ) -> None:
        task, queue = self.task(getattr(sender, "name", None)), self._queue_of(request)
        if terminated:
            self._numbers.count(names.FINISHED, task, queue, "terminated")
        else:
            self._numbers.count(names.REVOKED, task, queue, "expired" if expired else "revoked")

    # Labels

    def task(self, name: Any) -> str:
        """Give a task's label."""
        return name if isinstance(name, str) and name in self.app._tasks else UNKNOWN

    def queue(self, name: Any) -> str:
        """Give a queue's label."""
        return self._one_of_few("queue", name)

    def _sent_task(self, name: Any) -> str:
        # Who sends a task by its name need not have it.
        return name if name in self.app._tasks else self._one_of_few("task", name)

    def _one_of_few(self, label: str, name: Any) -> str:
        seen = self._seen[label]
        if not isinstance(name, str) or not name:
            return UNKNOWN
        if name not in seen:
            if len(seen) >= _MOST:
                return OTHER
            seen.add(name)
        return name

    def _queue_of(self, request: Any) -> str:
        info = request.delivery_info or {}
        return self.queue(_header_of(request).queue or info.get("routing_key"))


_COUNTED = {
    events.TASK_SENT.name: Counting._sent,
    events.TASK_SENT_MANY.name: Counting._sent_many,
    events.TASK_DUPLICATE.name: Counting._duplicate,
    events.TASK_DEAD.name: Counting._dead,
    events.TASK_CUT_OFF.name: Counting._cut_off,
    events.TASK_HANDED_BACK.name: Counting._handed_back,
}


def _header_of(request: Any) -> Headers:
    """Give our header of a request, of a child's or of the parent's."""
    of_parent = getattr(request, "request_dict", None)
    return running.header_of(request) if of_parent is None else Headers.of(of_parent)


def _waited(request: Any) -> float | None:
    """Give the seconds since a run could have started; nothing for one that had been delivered before."""
    if (request.delivery_info or {}).get("redelivered"):
        return None
    since = running.ready_at(request, _header_of(request))
    return None if since is None else max(0.0, time.time() - since)


def _kind(request: Any, retry: Any) -> str:
    """Tell a retry from what was only put off, by the message that was sent."""
    options = getattr(getattr(retry, "sig", None), "options", None) or {}
    following = Headers.of(options.get("headers"))
    if following.waits > _header_of(request).waits:
        return "waiting"
    return "snoozed" if following.ledger and following.ledger[-1].outcome == "snooze" else "retried"
