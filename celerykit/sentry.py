"""
Sentry's events, without the secrets of the call they are about.

Its SDK is asked for nothing: where a program has imported it, what it is about
to send of a call that has secrets is scrubbed. Sentry has a list
of names of its own, which stays.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from celery import current_app

from celerykit import redact
from celerykit.redact import Secrets

__all__ = ["cover"]

#: Further in than this, Sentry sends nothing.
_DEEPEST = 30


def cover(secrets: Secrets) -> None:
    """Have what Sentry is told of the running call scrubbed, if anything has imported its SDK."""
    if "sentry_sdk" not in sys.modules:
        return
    import sentry_sdk
    from sentry_sdk.scope import add_global_event_processor, global_event_processors

    if _scrub_event not in global_event_processors:
        add_global_event_processor(_scrub_event)
    if sentry_sdk.get_client().get_integration("celery") is not None:
        # Its integration opens a scope for each run, and adds the arguments after all that is global was asked; and
        # it tells of the run when that is over.
        sentry_sdk.get_isolation_scope().add_event_processor(partial(_scrub_event, secrets=(secrets,)))


def _scrub_event(event: Any, hint: Any, secrets: tuple[Secrets, ...] = ()) -> Any:
    job = (event.get("extra") or {}).get("celery-job")
    if isinstance(job, dict):
        _mask(job)
    secrets = secrets or redact.running()
    return _without(event, secrets, 0) if secrets else event


def _mask(job: dict[str, Any]) -> None:
    """Mask the arguments of a call by its contract: also those that are too short to be looked for."""
    look = getattr(current_app.tasks.get(str(job.get("task_name"))), "look", None)
    args, kwargs = job.get("args"), job.get("kwargs")
    if look is not None and isinstance(args, list | tuple) and isinstance(kwargs, Mapping):
        job["args"], job["kwargs"] = look.masked(args, kwargs)


def _without(value: Any, secrets: tuple[Secrets, ...], deep: int) -> Any:
    if isinstance(value, str):
        for some in secrets:
            value = some.scrub(value)
        return value
    if value is None or isinstance(value, int | float):
        return redact.MASK if any(str(value) in some.values for some in secrets) else value
    if deep > _DEEPEST:
        return redact.MASK
    if isinstance(value, dict):
        return {key: _without(item, secrets, deep + 1) for key, item in value.items()}
    if type(value) in (list, tuple):
        return [_without(item, secrets, deep + 1) for item in value]
    if hasattr(value, "metadata") and hasattr(value, "value"):  # Sentry's own, around what it has shortened
        value.value = _without(value.value, secrets, deep + 1)
        return value
    # Sentry writes it by its repr, which is later.
    shown = redact.shown(value)
    scrubbed = _without(shown, secrets, deep + 1)
    return value if scrubbed == shown else scrubbed
