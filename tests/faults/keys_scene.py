"""
A scene for calls with keys, and the stores that it may break.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import psycopg
import pytest
import redis

from celerykit.dev.servers import Server
from tests import services
from tests.faults.brokers import Broker, Valkey
from tests.faults.keys_rows import Many, Row, Ticks
from tests.faults.scene import ROOT, Scene

__all__ = ["Keep", "KeyScene", "PostgreSQLKeep", "ValkeyKeep"]

SHOP = "tests.faults.keys_shop"


class Keep(Protocol):
    """
    A store that the rows may break.

    Attributes:
        name:
            As in the table.
    """

    name: str
    url: str

    def count(self, key: str) -> int:
        """Say how many records there are with this in their keys, forgotten or not."""

    def start(self) -> None: ...
    def kill(self) -> None: ...


class ValkeyKeep:
    """A Valkey server."""

    name = "Valkey"

    def __init__(self, server: Server) -> None:
        self._server = server
        self.url = server.url
        self.start, self.kill = server.start, server.kill

    def count(self, key: str) -> int:
        with redis.Redis.from_url(self._server.client_url, socket_timeout=5.0) as client:
            return sum(1 for _ in client.scan_iter(f"*{key}*", count=1000))


class PostgreSQLKeep:
    """A PostgreSQL server."""

    name = "PostgreSQL"

    def __init__(self, server: services.PostgreSQL) -> None:
        self.url = server.url
        self.start, self.kill = server.start, server.kill

    def count(self, key: str) -> int:
        with psycopg.connect(self.url, connect_timeout=5) as connection:
            found = connection.execute("SELECT count(*) FROM celerykit_records WHERE key LIKE %s", [f"%{key}%"])
            return int(found.fetchall()[0][0])


class KeyScene(Scene):
    """
    A scene whose calls have keys, and whose store is nothing else.

    Attributes:
        keep:
            The store.

        record:
            Takes what came of a row: pytest's, of the test that runs.
    """

    def __init__(self, broker: Broker, *, keep: Keep, state: Server, folder: Path) -> None:
        super().__init__(broker, state=state, folder=folder, patch=pytest.MonkeyPatch(), record=lambda *_: None)
        self.keep = keep
        self.env["CELERYKIT_STORE_URL"] = keep.url
        self.record: Callable[..., None] = lambda *_: None
        self._workers = ExitStack()

    @contextmanager
    def beat(self, *, fate: str = "") -> Iterator[services.Worker]:
        """Run Celery's own beat, which may be fated to die, or to freeze, at a point."""
        command = [sys.executable, "-m", "celery", "-A", SHOP, "beat", "--loglevel=INFO", "--pidfile="]
        env = {**os.environ, **self.env, "FAULTS_FATE": fate, "PYTHONUNBUFFERED": "1"}
        node = services.Worker(command, env=env, cwd=ROOT, log=self.folder / f"beat-{uuid.uuid4().hex[:8]}")
        try:
            yield node
        finally:
            node.kill()

    def row(self, task: str = "pay") -> Row:
        """Begin a row: a new key of this task."""
        return Row(self, task=task)

    def many(self, task: str, count: int) -> Many:
        """Begin a row with many keys of this task."""
        return Many(self, getattr(self.shop, task), count=count)

    def ticks(self) -> Ticks:
        """Begin a row about what beats send."""
        return Ticks(self)

    def sweep(self) -> None:
        """Do what a store of SQL does by itself now and then; others forget by themselves."""
        getattr(self.shop.app.store, "sweep", lambda: None)()

    @cached_property
    def shop(self) -> Any:
        """The shop, as a program that sends has it; what it read in the environment is gone again."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.env.items():
                patch.setenv(name, value)
            sys.modules.pop(SHOP, None)
            shop = importlib.import_module(SHOP)
            shop.app.finalize()
            assert shop.app.settings
        return shop

    def worker(self, *, concurrency: int = 4, **env: str) -> services.Worker:  # type: ignore[override]
        """Start Celery's own worker."""
        node = self._workers.enter_context(
            services.worker(
                SHOP,
                url=self.broker.url,
                concurrency=concurrency,
                env={**self.env, **env},
                cwd=ROOT,
                options=["-n", f"faults-{len(self.logs)}@%h"],
            )
        )
        self.logs.append(node)
        return node

    def holds(self, number: str) -> bool:
        """Tell whether the broker has messages of this number; others may be on their way."""
        if not isinstance(self.broker, Valkey):
            return bool(self.broker.held())
        with redis.Redis.from_url(self.broker.server.client_url, socket_timeout=5.0) as client:
            reads: dict[bytes, Any] = {b"list": lambda name: client.lrange(name, 0, -1), b"hash": client.hvals}
            read = [reads.get(client.type(name), lambda _: [])(name) for name in self.broker.held()]
        return any(number.encode() in text for texts in read for text in texts)

    def told(self) -> str:
        """Say all there is to say, for an assertion that failed."""
        with contextlib.suppress(Exception):  # the broker may be away
            print("the broker holds", self._held())
        return "\n".join(str(entry) for entry in self.ledger.entries[-20:]) + "".join(
            f"\n--- worker {node.pid}\n{node.log[-4000:]}" for node in self.logs
        )

    def close(self) -> None:
        self._workers.close()
        if "shop" in vars(self):
            self.shop.app.close()
