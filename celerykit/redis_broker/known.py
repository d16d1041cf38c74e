"""
Which Kombu this was made for, and what it uses of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kombu
from kombu.transport import redis as stock

__all__ = ["KNOWN", "NEEDED", "whats_unknown"]

_kombu: Any = kombu

#: Kombu's minor versions that this was tried with.
KNOWN = {(5, 7)}

#: What is used of Kombu beyond its documentation.
NEEDED: Mapping[str, tuple[str, ...]] = {
    "Channel": (
        "_brpop_read",
        "_brpop_sent_at",
        "_brpop_start",
        "_create_client",
        "_deliver_fanout_message",
        "_do_restore_message",
        "_get_message_priority",
        "_get_pool",
        "_in_poll",
        "_next_delivery_tag",
        "_q_for_pri",
        "basic_get",
        "active_queues",
        "from_transport_options",
        "global_keyprefix",
        "keyprefix_queue",
        "pool",
        "priority_steps",
        "sep",
        "typeof",
        "unacked_index_key",
        "unacked_key",
        "visibility_timeout",
    ),
    "QoS": ("ack", "append", "reject", "restore_by_tag", "restore_unacked", "restore_visible", "_delivered"),
    "Transport": ("Channel", "driver_type"),
}


def whats_unknown() -> str:
    """Say what about this Kombu is unknown to us; nothing if it is as we know it."""
    version = tuple(_kombu.VERSION[:2])
    missing = [
        f"{name}.{attribute}"
        for name, attributes in NEEDED.items()
        for attribute in attributes
        if not hasattr(getattr(stock, name, None), attribute)
    ]
    if missing:
        return f"its Redis transport has no {', '.join(missing)}"
    return "" if version in KNOWN else "celerykit was not tried with it"
