"""
The worker's side of Kombu's Redis transport.
"""

from __future__ import annotations

from celerykit.redis_broker.channel import (
    KNOWN,
    NEEDED,
    Connection,
    Garbage,
    Hold,
    Keeper,
    OnGarbage,
    guard,
    whats_unknown,
)

__all__ = ["Connection", "Garbage", "Hold", "KNOWN", "Keeper", "NEEDED", "OnGarbage", "guard", "whats_unknown"]
