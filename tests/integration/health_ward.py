"""Workers that are looked at as a probe does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celerykit import CeleryKit
from celerykit.pulse import Found, age_of, ail, find
from tests import services
from tests.integration import health_shop as shop
from tests.integration.conftest import ROOT
from tests.services import eventually

__all__ = ["Ward", "health", "ward_of"]


class Ward:
    """
    Workers on one broker, one of each pool, each with a queue of the pool's name.

    Attributes:
        app:
            To send and to ask by. Not the shop's, whose connections are to another test's broker.

        folder:
            Where their signs of life are.
    """

    def __init__(self, app: Any, folder: Path, workers: Mapping[str, services.Worker]) -> None:
        self.app = app
        self.folder = folder
        self.workers = workers

    def look_at(self, pool: str) -> Found:
        [found] = find("worker", f"{pool}@health", folder=self.folder)
        return found

    def silence_of(self, pool: str) -> float:
        sign = self.look_at(pool).sign
        assert sign is not None
        return age_of(sign) + sign.silence

    def tell(self, pool: str, command: str, **arguments: Any) -> None:
        """Give a worker a command, and wait for no answer."""
        self.app.control.broadcast(command, destination=[f"{pool}@health"], arguments=arguments)

    def pings(self, pool: str) -> bool:
        return bool(self.app.control.ping(destination=[f"{pool}@health"], timeout=5, limit=1))

    def send(self, pool: str, task: Any, *args: Any) -> None:
        self.app.send_task(task.name, args, queue=f"health-{pool}")

    def wait_for(
        self, pool: str, ailment: str | None, *, max_age: float = 3.0, ready: bool = False, within: float = 15.0
    ) -> None:
        """Wait until a worker is said to have this, or to be well."""

        def says() -> str | None:
            return ail(self.look_at(pool), max_age=max_age, ready=ready)

        def is_so() -> bool:
            said = says()
            return said is None if ailment is None else said is not None and ailment in said

        eventually(is_so, within=within, what=lambda: f"{ailment}, but {says()} in {self.look_at(pool)}")


@contextmanager
def ward_of(pools: Sequence[str], *, url: str, folder: Path, **env: str) -> Iterator[Ward]:
    """Start a worker of each pool, all at a time, and wait until they are ready."""
    signs = folder / "signs"
    told = {"CELERY_BROKER_URL": url, "CELERYKIT_HEALTH_DIR": str(signs), "CELERYKIT_HEALTH_STALL": "1.5", **env}
    workers: dict[str, services.Worker] = {}
    try:
        for pool in pools:
            command = [sys.executable, "-m", "celery", "-A", shop.__name__, "worker", "-l", "INFO"]
            command += ["-n", f"{pool}@health", "-Q", f"health-{pool}", "-P", pool, "-c", "1"]
            command += ["--without-mingle", "--without-gossip"]
            workers[pool] = services.Worker(command, env={**os.environ, **told}, cwd=ROOT, log=folder / pool)
        for worker in workers.values():
            worker.wait_for_ready(within=30)
        with CeleryKit("ward", broker=url, set_as_current=False) as app:
            yield Ward(app, signs, workers)
    finally:
        for worker in workers.values():
            worker.kill()


def health(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "celerykit", "health", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)
