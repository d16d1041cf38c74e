"""Tells when a Python file of the project changed. Needs watchfiles, of the ``dev`` extra."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

__all__ = ["Watch", "is_available"]


def is_available() -> bool:
    """Tell whether watchfiles is installed."""
    return find_spec("watchfiles") is not None


class Watch:
    """
    Looks after a folder, on a thread of its own.

    Args:
        changed:
            Called on that thread, with the files that changed together.

        failed:
            Called on that thread, once, when the folder cannot be watched.
    """

    def __init__(self, folder: Path, *, changed: Callable[[list[Path]], None], failed: Callable[[str], None]) -> None:
        self._folder = folder
        self._changed = changed
        self._failed = failed
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="celerykit-reload", daemon=True)

    def start(self) -> None:
        """Look, from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def _run(self) -> None:
        from watchfiles import PythonFilter, watch

        try:
            for changes in watch(
                self._folder, watch_filter=PythonFilter(), stop_event=self._end, raise_interrupt=False
            ):
                self._changed(sorted({Path(path) for _, path in changes}))
        except Exception as error:  # noqa: BLE001  (an edge: the limit on watches, most of all; work goes on without)
            self._failed(str(error))
