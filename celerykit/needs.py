"""
What tasks need that the app does not have: a store that all processes share.

Without one each process would keep a promise for itself, and break it together
with the others, without a word. So it is said: when a worker starts, and when
the first such call is sent.
"""

from __future__ import annotations

from typing import Any

from celerykit.errors import InvalidSettings
from celerykit.stores import Store

__all__ = ["check_store", "needs_store", "store_for"]

#: The options of a task that mean nothing without a store, and the attributes they are kept as.
_NEEDING = {"once": "once_policy", "remember": "remember", "limits": "limit_rules"}

#: So many names fit a sentence.
_NAMED = 3


def needs_store(task: Any) -> tuple[str, ...]:
    """Name the options for which *task* needs a store that all processes share."""
    return tuple(option for option, kept_as in _NEEDING.items() if getattr(task, kept_as, None))


def check_store(app: Any) -> None:
    """
    Refuse to go on when tasks need a store, and each process would have its own.

    Raises:
        InvalidSettings: It names the tasks, and what to set.
    """
    if not _has_store(app):
        _refuse([task for _, task in sorted(app.tasks.items()) if needs_store(task)])


def store_for(task: Any) -> Store:
    """
    Give the store that a call of *task* is claimed in.

    Raises:
        InvalidSettings: There is none that other processes share.
    """
    if not _has_store(task.app):
        _refuse([task])
    store: Store = task.app.store
    return store


def _has_store(app: Any) -> bool:
    """Tell whether there is one, or this process's memory will do: it was asked for, or nothing leaves it."""
    if app.store.is_shared or app.settings.kit.store_url is not None:
        return True
    return bool(app.conf.task_always_eager) or str(app.conf.broker_write_url or "").startswith("memory:")


def _refuse(tasks: list[Any]) -> None:
    if not tasks:
        return
    named = [f"{task.name} ({', '.join(needs_store(task))})" for task in tasks[:_NAMED]]
    if len(tasks) > _NAMED:
        named.append(f"and {len(tasks) - _NAMED} more")
    problem = (
        f"{', '.join(named)}: this needs a store that all processes share, and neither the broker nor the result "
        "backend can be one. Name one: CELERYKIT_STORE_URL=redis://localhost:6379/0, say."
    )
    raise InvalidSettings(problem, [problem])
