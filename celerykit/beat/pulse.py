"""Signs of life of a beat: one when it ticks, that says when the next is due."""

from __future__ import annotations

import socket
import time
from typing import Any

import celery.beat

from celerykit import events
from celerykit.pulse import Pulse

__all__ = ["LONGEST_SLEEP", "Lone", "Vitals"]

#: Seconds that a beat sleeps at most, so that one that does not wake is found out.
LONGEST_SLEEP = 10.0

#: Seconds between two signs of a beat that ticks all the time.
_PAUSE = 2.0


class Vitals:
    """
    The signs of life of one beat.

    Args:
        name:
            What its app's beats have in common.

        longest:
            How long a tick may take, in seconds.
    """

    def __init__(self, app: Any, *, name: str, longest: float) -> None:
        self._pulse = Pulse("beat", f"{name}@{socket.gethostname()}", folder=app.settings.kit.health_dir)
        self._longest = longest
        self._told: tuple[str, float] | None = None
        self._has_warned = False

    def tick(self, state: str, *, pause: float) -> None:
        """
        Tell of a tick.

        Args:
            pause:
                Seconds until the next one.
        """
        now = time.monotonic()
        if pause <= _PAUSE and self._told is not None and self._told[0] == state and now - self._told[1] < _PAUSE:
            return
        self._told = (state, now)
        try:
            due = max(pause, _PAUSE) + self._longest
            self._pulse.tell(state, is_ready=state != "without_store", due=due)
        except OSError as error:
            if not self._has_warned:
                hint = "Set CELERYKIT_HEALTH_DIR to a directory that this user may write to."
                events.HEALTH_NOT_WRITTEN.tell(error=error, hint=hint)
            self._has_warned = True
        else:
            self._has_warned = False

    def end(self) -> None:
        """Take back what was told: this beat ends as it should."""
        self._pulse.end()


class Lone(celery.beat.PersistentScheduler):
    """Celery's own scheduler, with signs of life: for one beat that shares nothing."""

    def __init__(self, app: Any, *args: Any, **kwargs: Any) -> None:
        longest = app.settings.kit.publish_deadline.total_seconds()
        self._vitals = Vitals(app, name=str(app.main or "celery"), longest=longest)
        super().__init__(app, *args, **kwargs)

    def tick(self, *stock: Any, **stock_options: Any) -> float:
        """Send what is due, as Celery does, and tell."""
        pause = min(super().tick(*stock, **stock_options), LONGEST_SLEEP)
        self._vitals.tick("alone", pause=pause)
        return pause

    def close(self) -> None:
        """Write the schedule down, as Celery does."""
        self._vitals.end()
        super().close()
