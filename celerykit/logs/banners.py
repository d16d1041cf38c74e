"""
What Celery's programs print about themselves, told as events where each line of theirs is to be JSON.

They write to the streams that Python started with, before logging is set up or
past it: banners, warnings about root, and what is said when a signal comes.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, cast

import celery
from celery import signals
from celery.apps import beat as stock_beat
from celery.apps import worker as stock_worker

from celerykit import events
from celerykit.masks import MASK, mask_text

__all__ = ["Beat", "Worker"]

#: celery-types knows half of them.
_Worker: Any = stock_worker.Worker
_Beat: Any = stock_beat.Beat

#: Those whose handlers Celery lets say something.
_SPOKEN = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP")


class Worker(_Worker):  # type: ignore[misc]
    """A worker that tells what it otherwise prints."""

    _early: list[warnings.WarningMessage]

    def on_before_init(self, *args: Any, **kwargs: Any) -> None:
        """Keep warnings until they can be told: logging is not set up yet."""
        self._early = []
        if getattr(self.app.log, "is_stock", True):
            super().on_before_init(*args, **kwargs)
            return
        with warnings.catch_warnings(record=True) as early:
            super().on_before_init(*args, **kwargs)
        self._early += early

    def setup_logging(self, colorize: Any = None) -> Any:
        """Set up logging, and tell what was kept."""
        taken_over = super().setup_logging(colorize)
        for warning in self._early:
            warnings.showwarning(
                warning.message, warning.category, warning.filename, warning.lineno, warning.file, warning.line
            )
        return taken_over

    def emit_banner(self) -> None:
        """Tell what the banner says."""
        if not _is_json(self.app):
            super().emit_banner()
            return
        events.WORKER_STARTING.tell(
            version=celery.__version__,
            app=self.app.main,
            broker=_url_of(self.app.connection_for_read()),
            backend=_url_of(self.app.backend),
            pool=_name_of(self.pool_cls),
            concurrency=self.concurrency,
            queues=list(self.app.amqp.queues.consume_from),
            tasks=sum(not name.startswith("celery.") for name in self.app.tasks),
        )

    def on_start(self) -> None:
        """Start, and tell when it ends."""
        super().on_start()
        signals.worker_shutting_down.connect(_tell_end, weak=False, dispatch_uid="celerykit.logs.end")

    def install_platform_tweaks(self, worker: Any) -> None:
        """Install Celery's handlers of signals, which print nothing then."""
        super().install_platform_tweaks(worker)
        if _is_json(self.app):
            _hush()


def _url_of(what: Any) -> str:
    """Give an address without passwords: of several in one, Kombu masks only the first."""
    try:
        return mask_text(str(what.as_uri()))
    except ValueError:
        return MASK


def _name_of(pool: Any) -> str:
    """Name a pool as Celery's command line does; ours, and users' own, are made of one of Celery's."""
    if isinstance(pool, str):
        return pool
    names = [base.__module__ for base in pool.__mro__ if base.__module__.startswith("celery.concurrency.")]
    return str(names[0] if names else pool.__module__).rpartition(".")[2]


def _tell_end(sender: Any = None, sig: str = "", how: str = "", **_: Any) -> None:
    events.WORKER_STOPPING.tell(worker=sender, how=how.lower(), signal=sig)


class _Wordless:
    """A handler of Celery's that prints nothing."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self._handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # Celery's `safe_say` writes to its descriptor, past everything, and to nothing where there is no stream.
        stream, sys.__stdout__ = sys.__stdout__, None  # type: ignore[misc]
        try:
            self._handler(number, frame)
        finally:
            sys.__stdout__ = stream  # type: ignore[misc]
            # It may have put others in its place.
            _hush()


def _hush() -> None:
    for number in (getattr(signal, name) for name in _SPOKEN if hasattr(signal, name)):
        handler = signal.getsignal(number)
        if callable(handler) and not isinstance(handler, _Wordless):
            with suppress(ValueError):  # on another thread than the main one there are no handlers
                signal.signal(number, _Wordless(handler))


class Beat(_Beat):  # type: ignore[misc]
    """A beat that tells what it otherwise prints."""

    _is_told = False
    quiet: bool

    def run(self) -> None:
        """Begin, without a banner where each line is to be JSON."""
        foresee = getattr(self.app.log, "foresee_json", None)
        if foresee is not None and not self.quiet and foresee(self.logfile):
            self.quiet = self._is_told = True
        super().run()

    def setup_logging(self, colorize: Any = None) -> None:
        """Set up logging, and tell what the banner says."""
        super().setup_logging(colorize)
        if self._is_told:
            scheduler = self.scheduler_cls
            events.BEAT_STARTING.tell(
                version=celery.__version__,
                app=self.app.main,
                broker=_url_of(self.app.connection_for_write()),
                scheduler=scheduler if isinstance(scheduler, str) else cast("Any", scheduler).__qualname__,
                entries=len(self.app.conf.beat_schedule),
            )


def _is_json(app: Any) -> bool:
    return bool(getattr(app.log, "is_json", False))
