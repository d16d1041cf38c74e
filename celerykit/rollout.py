"""
Rolling deploys: a message that nobody here understands may be meant for workers that are only just coming up.

It is handed back again and again, for ``CELERYKIT_UNKNOWN_TASK_GRACE``.
"""

from __future__ import annotations

import time
from datetime import timedelta

from celerykit.errors import StoreUnavailable
from celerykit.stores import Store

__all__ = ["pause_for_newer"]

#: Seconds to hold a message each time: a part of the time it is known for, so that a broker's count of deliveries
#: stays small.
_SHORTEST, _LONGEST, _PART = 5.0, 300.0, 4


def pause_for_newer(store: Store, call_id: str, *, grace: timedelta) -> float | None:
    """
    Tell how long to hold a message before it is handed back; None when its time is up.

    The first call for an id begins its time, in all workers that share the store.
    """
    seconds, now = grace.total_seconds(), time.time()
    if not seconds:
        return None
    try:
        first = store.mark(f"refused:{call_id}", str(now), ttl=2 * seconds + _LONGEST)
    except StoreUnavailable:
        return _SHORTEST  # nobody knows, so it is not lost yet
    known_for = now - float(first or now)
    if known_for >= seconds:
        return None
    return min(max(known_for / _PART, _SHORTEST), _LONGEST, max(seconds - known_for, 0.1))
