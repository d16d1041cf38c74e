"""What `celerykit dev` runs: decided from its options and the app, before anything is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from celerykit.dev.project import App, vacant_port
from celerykit.dev.servers import Server, ServerNotFound, find_binary, is_free
from celerykit.errors import CelerykitError

__all__ = ["CannotRun", "OwnBroker", "Plan", "commands", "own_broker", "wants_flower"]

#: As many pool processes as a laptop bears beside an editor and a browser.
_CONCURRENCY = 4
#: Seconds for a broker to read what it kept.
_BROKER_READY_WITHIN = 30.0


class CannotRun(CelerykitError):
    """Something is missing or in the way; nothing was started."""


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What somebody asked for.

    Attributes:
        pool, concurrency:
            None leaves it to the app's configuration.

        flower:
            None runs it if it is installed.

        folder:
            For what outlives the session: the broker's data, beat's schedule.
    """

    app: str
    pool: str | None = None
    concurrency: int | None = None
    beat: bool = True
    flower: bool | None = None
    flower_port: int = 5555
    reload: bool = True
    folder: Path = Path(".celerykit")


def wants_flower(plan: Plan) -> bool:
    """
    Tell whether Flower shall run.

    Raises:
        CannotRun: It was asked for and is not installed, or its port is taken.
    """
    is_installed = find_spec("flower") is not None
    if plan.flower and not is_installed:
        raise CannotRun("Flower is not installed; pip install 'celerykit[dev]' brings it.")
    wanted = is_installed if plan.flower is None else plan.flower
    if wanted and not is_free(plan.flower_port):
        raise CannotRun(
            f"port {plan.flower_port} on 127.0.0.1, which Flower would use, is taken; "
            f"give another one with --port, or leave Flower out with --no-flower."
        )
    return wanted


@dataclass(frozen=True, slots=True)
class OwnBroker:
    """
    A server to start because the configured broker does not answer.

    Attributes:
        url:
            Where the project finds it.

        settings:
            What the project's processes must be told, as environment variables.
    """

    server: Server
    url: str
    settings: Mapping[str, str]


def own_broker(app: App, *, folder: Path) -> OwnBroker:
    """
    Choose a server, and where it listens: where the app looks for its broker, if that is possible.

    Raises:
        CannotRun: There is no server on this machine.
    """
    try:
        binary = find_binary()
    except ServerNotFound as error:
        raise CannotRun(f"no broker answers at {app.shown_url}, and {error}") from None
    port = vacant_port(app.broker_url)
    server = Server(
        binary,
        folder=folder / "broker",
        port=port or vacant_port(app.result_backend),
        fsync="everysec",
        ready_within=_BROKER_READY_WITHIN,
    )
    settings = {} if port else {"CELERY_BROKER_URL": server.url}
    if app.result_backend is None:
        settings["CELERY_RESULT_BACKEND"] = server.backend_url
    return OwnBroker(server, url=(port and app.broker_url) or server.url, settings=settings)


def commands(plan: Plan, app: App, *, env: Mapping[str, str], flower: bool) -> dict[str, list[str]]:
    """Return Celery's own commands, in the order they are stopped."""
    celery = [sys.executable, "-m", "celery", "-A", plan.app]
    # A stock worker says little without it; ours has a setting, which the option would overrule.
    level = [] if env.get("CELERYKIT_LOG_LEVEL") else ["--loglevel=INFO"]
    # Mingling with other workers takes a second of each reload, and there are none.
    worker = [*celery, "worker", *level, "--without-mingle", "--without-gossip", *_pool(plan, app)]
    # Events cost a third of a worker's time, and nobody but Flower looks at them.
    found = {"worker": [*worker, *(["-E"] if flower else [])]}
    if plan.beat:
        found["beat"] = [*celery, "beat", *level, f"--schedule={plan.folder / 'beat-schedule'}", "--pidfile="]
    if flower:
        found["flower"] = [*celery, "flower", "--address=127.0.0.1", f"--port={plan.flower_port}"]
    return found


def _pool(plan: Plan, app: App) -> list[str]:
    concurrency = plan.concurrency
    if concurrency is None and not app.concurrency:
        concurrency = min(_CONCURRENCY, os.cpu_count() or 1)
    pool = [] if plan.pool is None else [f"--pool={plan.pool}"]
    return pool if concurrency is None else [*pool, f"--concurrency={concurrency}"]
