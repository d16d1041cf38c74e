"""What beats say in the log: one function for each event, by its name."""

from __future__ import annotations

import logging
from datetime import datetime

from celerykit.errors import StoreUnavailable

__all__ = [
    "doubtful",
    "found_store",
    "leads",
    "lost",
    "missed",
    "not_sent",
    "not_shared",
    "stands_by",
    "store_unavailable",
    "unlike",
]

log = logging.getLogger("celerykit.beat")


def leads(*, entries: int) -> None:
    """Say that this beat sends from now on."""
    log.info("beat.leads entries=%d", entries)


def stands_by(*, leader: str, since: datetime) -> None:
    """Say that another beat sends."""
    log.info("beat.stands_by leader=%s since=%s", leader, since.isoformat(timespec="seconds"))


def unlike(*, leader: str) -> None:
    """Say that the leader has other entries, or other schedules, than this beat."""
    log.warning(
        "beat.unlike leader=%s: its schedule is not this beat's. As long as it leads, its own counts. If it is no "
        "older version of this app, give the app another name.",
        leader,
    )


def lost(*, after: float, lease: float) -> None:
    """Say that this beat was away too long."""
    log.warning("beat.lost after=%.1f lease=%g: this beat or the store was away; another may lead now", after, lease)


def missed(*, entry: str, due: datetime, late: float, then: str) -> None:
    """Say that nobody sent a tick when it was due."""
    log.warning("beat.missed entry=%s due=%s late=%.1f then=%s", entry, due.isoformat(), late, then)


def not_sent(*, entry: str, id: str, error: BaseException, again_in: float) -> None:  # noqa: A002  (Celery's word)
    """Say that a broker did not take a tick; it will be tried again."""
    log.warning("beat.not_sent entry=%s id=%s again_in=%g: %s", entry, id, again_in, error)


def doubtful(*, entry: str, id: str) -> None:  # noqa: A002  (Celery's word)
    """Say that a tick was sent, and that another beat may have sent it, too."""
    log.warning("beat.doubtful entry=%s id=%s: another beat took it over, and may have sent it as well", entry, id)


def store_unavailable(error: StoreUnavailable) -> None:
    """Say that nothing is sent until the store is back."""
    log.warning("beat.store_unavailable: %s Nothing is sent until it is back.", error)


def found_store(*, after: float) -> None:
    """Say that the store is back."""
    log.info("beat.found_store after=%.1f", after)


def not_shared() -> None:
    """Say that this beat can only be the only one."""
    log.warning(
        "beat.not_shared: there is no store that beats share, so this is Celery's own scheduler. Run one beat only, or "
        "set CELERYKIT_STORE_URL."
    )
