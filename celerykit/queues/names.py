"""
Which queues an app has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kombu import Queue
from kombu.common import Broadcast

if TYPE_CHECKING:
    from celerykit.app import CeleryKit

__all__ = ["queue_names"]


def queue_names(app: CeleryKit) -> list[str]:
    """
    Name the queues that are defined, that routes lead to, and that tasks are declared with.

    In a worker, also those that it consumes from. A route may be a function, and where that leads nobody knows.
    """
    defined: Any = app.amqp.queues
    found = [queue.name for queue in defined.values() if not isinstance(queue, Broadcast)]
    found += [name for name in _in_routes(app.conf.task_routes) if name not in defined]
    declared = (getattr(task, "queue", None) for task in app.tasks.values())
    return list(dict.fromkeys([*found, *filter(None, map(_named, declared))]))


def _in_routes(routes: Any) -> Iterator[str]:
    for route in _each(routes):
        name = _named(route.get("queue")) if isinstance(route, Mapping) else _named(route)
        if name:
            yield name


def _each(routes: Any) -> Iterator[Any]:
    """Give where routes lead: a table, pairs, or a list of those."""
    if isinstance(routes, Mapping):
        yield from routes.values()
        return
    for route in routes if isinstance(routes, Iterable) and not isinstance(routes, str) else ():
        if isinstance(route, Mapping):
            yield from route.values()
        elif isinstance(route, (list, tuple)):
            # A pair, or a list of pairs.
            yield from [route[1]] if len(route) == 2 and isinstance(route[0], str) else [pair[1] for pair in route]


def _named(queue: Any) -> str | None:
    if isinstance(queue, Queue):
        return str(queue.name)
    return queue if isinstance(queue, str) and queue else None
