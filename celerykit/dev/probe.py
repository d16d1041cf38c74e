"""
Loads an app and says what it is configured with, as JSON on standard output.

Run in a process of its own, ``python -m celerykit.dev.probe APP``: what an
app's modules do when they are imported must not happen to `celerykit dev`, and
a second look must see the files as they are by then.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import celery
import kombu
from celery.app.utils import find_app

from celerykit.errors import CelerykitError

#: Between us and the modules of the app, of no interest to who wrote them.
_MACHINERY = ("<frozen importlib", *(str(Path(str(of.__file__)).parent) for of in (celery, kombu, importlib)))

#: Seconds that a broker may take to say hello.
_ANSWER_WITHIN = 5.0


def main(name: str, *, connect: bool) -> None:
    """Print what is known about the app *name*, or what is wrong with it."""
    # What the app prints is not the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        app = find_app(name)
        app.loader.import_default_modules()
        app.finalize()
        facts = _facts(app)
        if connect:
            facts["unreachable"] = _why_unreachable(app)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (any module may raise anything)
        facts = {"error": _explain(error, name)}
    json.dump(facts, answer)
    answer.flush()
    # A thread may still wait for the broker.
    os._exit(0)


def _facts(app: Any) -> dict[str, Any]:
    backend = app.conf.result_backend
    return {
        "broker_url": app.conf.broker_url if isinstance(app.conf.broker_url, str) else None,
        "is_configured": bool(app.conf.broker_url),
        "shown_url": app.connection_for_write().as_uri(),
        "result_backend": backend if isinstance(backend, str) or backend is None else str(backend),
        "concurrency": app.conf.worker_concurrency,
        "unreachable": "",
    }


def _why_unreachable(app: Any) -> str:
    """Connect as a client of this app does; nothing comes back when the broker answers."""
    reasons: list[str] = []
    thread = threading.Thread(target=_connect, args=(app, reasons), daemon=True)
    thread.start()
    thread.join(_ANSWER_WITHIN)
    return "no answer" if thread.is_alive() else "".join(reasons)


def _connect(app: Any, reasons: list[str]) -> None:
    try:
        with app.connection_for_write() as connection:
            if connection.transport_cls == "memory":
                reasons.append("memory:// is seen inside one process only")
                return
            # All alternatives once, and no pause between them.
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0, interval_max=0)
    except Exception as error:  # noqa: BLE001  (each transport has its own)
        reasons.append(str(error) or type(error).__name__)


def _explain(error: BaseException, name: str) -> str:
    if isinstance(error, CelerykitError):
        return f"{name}: {error}"
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and f"{name.partition(':')[0]}.".startswith(f"{missing}."):
        return f"there is no module {missing!r} in {Path.cwd()}. {_HOW}"
    where = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_machinery(frame.filename)]
    # What does not exist behind a colon is looked for once more, as a module `shop:app`.
    if not where and (isinstance(error, AttributeError) or missing == name):
        return f"{name!r} holds no Celery app. {_HOW}"
    lines = [*traceback.format_list(where), *traceback.format_exception_only(error)]
    return f"importing {name} failed:\n{''.join(lines).rstrip()}"


_HOW = "-A takes what Celery's takes: a module with an app in it, such as shop, shop.tasks or shop.tasks:app."


def _is_machinery(path: str) -> bool:
    return path == __file__ or path.startswith(_MACHINERY)


if __name__ == "__main__":
    main(sys.argv[1], connect="--connect" in sys.argv)
