"""The project that is worked on: its app, as a process of its own sees it, and its environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from dotenv import dotenv_values

from celerykit.dev.servers import is_free
from celerykit.errors import CelerykitError

__all__ = ["App", "AppNotLoaded", "environment", "look_up", "vacant_port"]

#: Seconds for an app to be imported, and for its broker to answer.
_LOOK_UP_WITHIN = 60.0
_TICK = 0.1

_FROM_DOTENV = ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "CELERYKIT_LOG_LEVEL", "CELERYKIT_LOG_FORMAT")


class AppNotLoaded(CelerykitError):
    """There is no app of that name, or its modules cannot be imported."""


@dataclass(frozen=True, slots=True)
class App:
    """
    What an app is configured with.

    Attributes:
        broker_url:
            Of several, none.

        is_configured:
            A broker URL was given, and is not Celery's default.

        shown_url:
            The broker's URL without its password.

        unreachable:
            Why the broker cannot be used; empty when it answered.
    """

    broker_url: str | None
    is_configured: bool
    shown_url: str
    result_backend: str | None
    concurrency: int | None
    unreachable: str


def environment() -> dict[str, str]:
    """
    Return the environment, with what `dev` must know of ``.env`` under it.

    A stock app does not read ``.env``; here it gets its addresses all the same.
    """
    path = Path(os.environ.get("CELERYKIT_ENV_FILE", ".env"))
    values = dotenv_values(path) if path.exists() else {}
    found = {name: value for name in _FROM_DOTENV if (value := values.get(name))}
    return {**found, **os.environ}


def look_up(name: str, *, env: Mapping[str, str], connect: bool, give_up: Callable[[], bool] = lambda: False) -> App:
    """
    Import the app *name*, and all its task modules, in a process of its own.

    Args:
        name:
            As for ``celery -A``.

        env:
            Its environment.

        connect:
            Try the broker too.

        give_up:
            Asked again and again; once it says yes, the app is not waited for.

    Raises:
        AppNotLoaded: With what to do.
    """
    command = [sys.executable, "-m", "celerykit.dev.probe", name, *(["--connect"] if connect else [])]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=dict(env), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            answer, errors = _communicate(process, name, give_up)
        finally:
            process.kill()
    if process.returncode != 0 and not answer:
        raise AppNotLoaded(f"importing {name} ended its process:\n{errors[-2000:].rstrip()}")
    facts = json.loads(answer)
    if "error" in facts:
        raise AppNotLoaded(facts["error"])
    return App(**facts)


def _communicate(process: subprocess.Popen[str], name: str, give_up: Callable[[], bool]) -> tuple[str, str]:
    deadline = time.monotonic() + _LOOK_UP_WITHIN
    while time.monotonic() < deadline and not give_up():
        try:
            return process.communicate(timeout=_TICK)
        except subprocess.TimeoutExpired:
            continue
    raise AppNotLoaded(f"importing {name} took longer than {_LOOK_UP_WITHIN:g} s.")


def vacant_port(url: str | None) -> int | None:
    """
    Return the port of a Redis URL on this machine at which nobody listens.

    A server of ours can listen there, and every process of the project that
    has the same URL finds it.
    """
    parts = urlsplit(url or "")
    if parts.scheme != "redis" or parts.password or parts.hostname not in ("localhost", "127.0.0.1"):
        return None
    port = parts.port or 6379
    return port if is_free(port) else None
