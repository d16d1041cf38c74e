"""
How often a message was started, and whether it may be once more.

Only starts count: a message that was merely held, by a worker that was deployed
anew, did nothing. The first start of a fresh message costs no round trip; it is
counted together with the second.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

from celery.utils.collections import LimitedSet
from celery.worker import state

from celerykit import events
from celerykit.dead_letters import identify, replay_mark
from celerykit.errors import StoreUnavailable
from celerykit.headers import Headers
from celerykit.stores import Store

__all__ = ["MOST_FORGIVEN", "Starts", "Verdict", "buried_key", "letter_of"]

#: How long a count is remembered after the last start, in seconds.
_REMEMBERED = 7 * 86400

#: Starts that were handed back and do not count. Not more: a message must come to an end.
MOST_FORGIVEN = 100

#: Without a shared store: the broker's count of deliveries for each start that is allowed. Most never started.
_DELIVERIES_A_START = 10


class Verdict(Enum):
    """What is to become of a message that could start now."""

    START = auto()
    #: It was started too often.
    BURY = auto()
    #: Another request answers for it.
    TAKEN_OVER = auto()
    #: Its letter is written, or another copy of it ran: it only needs to be acknowledged.
    ACKNOWLEDGE = auto()
    #: Nobody can say now.
    WAIT = auto()


class Starts:
    """
    The judge of redelivered messages.

    Args:
        limit:
            The most starts of one message.

        keep:
            How long a letter is kept, in seconds, and so can be replayed.
    """

    def __init__(self, store: Store, *, limit: int, keep: float) -> None:
        self._store = store
        self._limit = limit
        self._keep = keep
        self._succeeded = LimitedSet(maxlen=state.SUCCESSFUL_MAX, expires=state.SUCCESSFUL_EXPIRES)

    def remember(self, request: Any) -> None:
        """Remember that a message has succeeded here. Its id alone may be another call's, or its next attempt's."""
        self._succeeded.add(_key("succeeded", request))

    def has_succeeded(self, request: Any) -> bool:
        """Tell whether this very message has succeeded here, so that only its acknowledgement was lost."""
        return _key("succeeded", request) in self._succeeded

    def judge(self, request: Any) -> Verdict:
        """Count this start, if it can matter, and say whether it may happen."""
        # A claim knows whether another start of its call is still alive. It does not see those that die before it.
        is_claimed = getattr(request.task, "claims", None) is not None and self._store.is_shared
        is_redelivered = bool(request.delivery_info.get("redelivered"))
        runs_at_most_once = getattr(request.task, "on_crash", "rerun") == "bury" and not is_claimed
        replay = Headers.of(request.request_dict).replay
        if not (is_redelivered or runs_at_most_once or replay):
            return Verdict.START
        try:
            return self._judge(request, is_redelivered=is_redelivered, runs_at_most_once=runs_at_most_once)
        except StoreUnavailable as error:
            events.STARTS_NOT_COUNTED.tell(task=request.name, id=request.id, error=error)
            return Verdict.WAIT if runs_at_most_once else Verdict.START

    def forgive(self, request: Any) -> int:
        """Take back a start that ended by handing the message back, and tell how many were."""
        try:
            return self._store.add(_key("handed_back", request), ttl=_REMEMBERED)
        except StoreUnavailable as error:
            events.STARTS_NOT_FORGIVEN.tell(task=request.name, id=request.id, error=error)
            return 0

    def _judge(self, request: Any, *, is_redelivered: bool, runs_at_most_once: bool) -> Verdict:
        if is_redelivered and self._store.get(buried_key(letter_of(request))) is not None:
            return Verdict.ACKNOWLEDGE
        if self._is_superseded(request):
            return Verdict.ACKNOWLEDGE
        if runs_at_most_once:
            return self._judge_once(request, is_redelivered=is_redelivered)
        return self._judge_again(request) if is_redelivered else Verdict.START

    def _judge_once(self, request: Any, *, is_redelivered: bool) -> Verdict:
        request.starts = self._counted(request)
        is_unknown = is_redelivered and not self._store.is_shared
        return Verdict.BURY if request.starts > 1 or is_unknown else Verdict.START

    def _judge_again(self, request: Any) -> Verdict:
        request.starts = self._counted(request) + 1  # the first, which nobody counted
        return Verdict.BURY if request.starts > self._limit or self._is_delivered_too_often(request) else Verdict.START

    def _counted(self, request: Any) -> int:
        starts = self._store.add(_key("starts", request), ttl=_REMEMBERED)
        return starts - min(int(self._store.get(_key("handed_back", request)) or 0), MOST_FORGIVEN)

    def _is_delivered_too_often(self, request: Any) -> bool:
        if self._store.is_shared:
            return False
        deliveries = request.request_dict.get("x-delivery-count")
        return isinstance(deliveries, int) and deliveries > self._limit * _DELIVERIES_A_START

    def _is_superseded(self, request: Any) -> bool:
        """Tell whether this is a second copy of one replay: its sender died before it could remove the letter."""
        mark = replay_mark(request.message.headers)
        return mark is not None and self._store.mark(mark.key, mark.value, ttl=self._keep) not in (None, mark.value)


def buried_key(letter: str) -> str:
    """Name the mark of a letter that is written."""
    return f"buried:{letter}"


def letter_of(request: Any) -> str:
    """Give the id that the letter of this message has, or would have."""
    return identify(request.message.headers, request.message.body)


def _key(what: str, request: Any) -> str:
    # One message each: a retry is another, and so is what a task was replaced with.
    header = request.request_dict
    nesting, retries = header.get("replaced_task_nesting") or 0, header.get("retries") or 0
    ours = Headers.of(header)
    # People use one id for many calls.
    return f"{what}:{request.id}:{nesting}:{retries}:{ours.replay}:{ours.sent_at or ''}"
