"""
A scene: a broker, the shop, its workers, and a verdict at the end.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from celerykit.dev.servers import Server
from tests import services
from tests.faults.brokers import Broker
from tests.faults.ledger import Ledger
from tests.services import eventually

__all__ = ["Scene", "Verdict"]

ROOT = Path(__file__).parents[2]
SHOP = "tests.faults.shop"

#: `CELERYKIT_LEASE` and `CELERYKIT_PUBLISH_DEADLINE` of all scenes, in seconds.
LEASE, PUBLISH_DEADLINE = 2.0, 2.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    What became of the messages of one row.

    Attributes:
        lost:
            Sent, and now neither done, waiting, nor a dead letter.

        stuck:
            Left in the broker although a worker was there to take them.

        repeated:
            Effects that happened more often than once.

        may_repeat:
            How many of these the row allows, with its reason in the test.

        dead:
            How many dead letters there were, by reason.
    """

    row: str
    broker: str
    sent: int
    lost: int
    stuck: int
    repeated: int
    may_repeat: int
    dead: dict[str, int]
    note: str
    seconds: float


class Scene:
    """
    Everything one row needs.

    Attributes:
        env:
            What tells worker and test apart from the rest of the world.
            Changed before the first use of `shop`.
    """

    def __init__(
        self, broker: Broker, *, state: Server, folder: Path, patch: pytest.MonkeyPatch, record: Callable[..., None]
    ) -> None:
        self.broker = broker
        self.state_server = state
        self.folder = folder
        self.ledger = Ledger(folder / "ledger")
        self.sent: list[str] = []
        self.published = 0  # messages that were not sent by the shop
        self.env = {
            "CELERY_BROKER_URL": broker.url,
            "CELERY_RESULT_BACKEND": state.backend_url,
            "CELERY_TASK_DEFAULT_QUEUE": broker.queue,
            "CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT": "2",
            "CELERYKIT_STORE_URL": state.url,
            "CELERYKIT_DEAD_LETTER_QUEUE": broker.dead,
            "CELERYKIT_LEASE": f"{LEASE:g}",
            "CELERYKIT_PUBLISH_DEADLINE": f"{PUBLISH_DEADLINE:g}",
            "CELERYKIT_MAX_DELIVERIES": "3",
            "CELERYKIT_UNKNOWN_TASK_GRACE": "0",
            "FAULTS_FOLDER": str(folder),
        }
        self._patch = patch
        self._record = record
        self._started = time.monotonic()
        self._nodes = ExitStack()
        self._node: services.Worker | None = None
        self._options: dict[str, Any] = {}
        self._reasons: dict[str, str] = {}  # of all letters ever seen, by letter
        self.logs: list[services.Worker] = []

    # Who plays

    @cached_property
    def shop(self) -> Any:
        """The shop, as a program that sends has it."""
        for name, value in self.env.items():
            self._patch.setenv(name, value)
        sys.modules.pop(SHOP, None)
        return importlib.import_module(SHOP)

    @property
    def letters(self) -> list[Any]:
        letters = list(self.shop.app.dead_letters.find())
        self._reasons.update((letter.note.letter, letter.note.reason) for letter in letters)
        return letters

    def worker(
        self,
        *,
        pool: str = "prefork",
        concurrency: int = 2,
        prefetch: int | None = None,
        deploy: str = "old",
        **env: str,
    ) -> services.Worker:
        """Start Celery's own worker."""
        self._options = {"pool": pool, "concurrency": concurrency, "prefetch": prefetch, "deploy": deploy, **env}
        prefetched = {} if prefetch is None else {"CELERY_WORKER_PREFETCH_MULTIPLIER": str(prefetch)}
        node = self._nodes.enter_context(
            services.worker(
                SHOP,
                url=self.broker.url,
                pool=pool,
                concurrency=concurrency,
                env={**self.env, **prefetched, "FAULTS_DEPLOY": deploy, **env},
                cwd=ROOT,
                options=["-n", f"faults-{len(self.logs)}@%h"],
            )
        )
        self.logs.append(node)
        self._node = node
        return node

    def successor(self) -> services.Worker:
        """Start another one, as a supervisor would after the last one ended."""
        return self.worker(**self._options)

    # What they are told

    def send(self, task: Any, *args: Any, **kwargs: Any) -> str:
        return self.send_with({}, task, *args, **kwargs)

    def send_with(self, options: dict[str, Any], task: Any, *args: Any, **kwargs: Any) -> str:
        """Send a call with Celery's options, and remember that it was sent."""
        result = task.apply_async(args, kwargs, **options)
        self.sent.append(result.id)
        return str(result.id)

    def publish(self, body: Any, **properties: Any) -> None:
        """Put a message on the queue as anybody could, past all checks."""
        self.published += 1
        self.broker.publish(body, **properties)

    def open_gate(self) -> None:
        (self.folder / "gate").touch()

    def cure(self) -> None:
        (self.folder / "cured").touch()

    def command(self, *arguments: str) -> str:
        """Run our command line as an operator would."""
        command = [sys.executable, "-m", "celerykit", *arguments, "-A", SHOP]
        env = {**os.environ, **self.env}
        run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    # What they do

    def reached(self, event: str, task_id: str | None = None, *, times: int = 1, within: float = 20.0) -> int:
        """Wait until *event* is in the ledger, and give the process that wrote it last."""
        eventually(
            lambda: self.ledger.count(event, task_id) >= times,
            within=within,
            what=lambda: f"{times} times {event} of {task_id or 'any'}: {self.told()}",
        )
        return self.ledger.of(event, task_id)[-1].pid

    def state(self, task_id: str) -> str:
        return str(self.shop.app.AsyncResult(task_id).state)

    def ends_as(self, state: str, task_id: str, *, within: float = 20.0) -> None:
        eventually(
            lambda: self.state(task_id) == state, within=within, what=lambda: f"{state}, but {self.state(task_id)}"
        )

    def dies(self, *ids: str, of: str, within: float = 30.0) -> list[Any]:
        """Wait until messages with these ids are dead letters, and check their reason and their results."""
        found: dict[str, Any] = {}

        def are_found() -> bool:
            found.update((letter.note.id, letter) for letter in self.letters)
            return set(ids) <= found.keys()

        eventually(are_found, within=within, what=lambda: f"dead letters of {ids}: {self.told()}")
        assert {found[task_id].note.reason for task_id in ids} == {of}
        for task_id in ids:
            self.ends_as("REVOKED" if of == "expired" else "FAILURE", task_id)
        return [found[task_id] for task_id in ids]

    def replays(self, *ids: str, times: int = 1, **options: Any) -> None:
        """Send dead letters again, and check that each took effect once, and is dead no more."""
        report = self.shop.app.dead_letters.replay(**options)
        assert (report.replayed, report.refused) == (len(ids), 0), report
        for task_id in ids:
            self.reached("effect", task_id, times=times)
        eventually(lambda: not self.letters, within=10, what=lambda: f"no letters, but {self.told()}")

    def canary(self, *, within: float = 30.0) -> None:
        """Check that the worker there is still works."""
        task_id = self.send(self.shop.work)
        self.reached("end", task_id, within=within)

    # What came of it

    def settled(self, *, within: float = 40.0) -> None:
        """Wait until all that was sent is done or dead, and the broker is empty."""
        eventually(lambda: not self._open() and not self._held(), within=within, what=lambda: f"rest: {self.told()}")

    def verdict(self, row: str, *, may_repeat: int = 0, note: str = "", within: float = 40.0) -> Verdict:
        """Let the scene come to its end, and check that it is what we promise."""
        with contextlib.suppress(AssertionError):
            self.settled(within=within)
        self.canary()
        self._leave()
        stuck = self._held()
        if stuck:
            # Handed back at the very end, and so not stuck: whoever comes next takes it.
            self.successor()
            with contextlib.suppress(AssertionError):
                self.settled(within=10.0)
            self._leave()
            stuck = self._held()
        verdict = self._judge(row, stuck=sum(stuck.values()), may_repeat=may_repeat, note=note)
        assert not stuck, self.told()
        assert not verdict.lost, self.told()
        assert verdict.repeated <= may_repeat, self.told()
        self._record("fault", asdict(verdict))
        return verdict

    def _judge(self, row: str, *, stuck: int, **told: Any) -> Verdict:
        effects = self.ledger.counts("effect")
        letters = Counter(letter.note.id for letter in self.letters if letter.note.id)
        assert not letters or max(letters.values()) == 1, f"two letters of one message: {letters}"
        return Verdict(
            row=row,
            broker=self.broker.name,
            sent=len(self.sent) + self.published,
            lost=len(self._open()) if not stuck else max(0, len(self._open()) - stuck),
            stuck=stuck,
            repeated=sum(count - 1 for count in effects.values()),
            dead=dict(sorted(Counter(self._reasons.values()).items())),
            seconds=round(time.monotonic() - self._started, 1),
            **told,
        )

    def _open(self) -> set[str]:
        """Give the ids of what is neither done nor dead."""
        rest = set(self.sent) - self.ledger.counts("effect").keys()
        return rest - {letter.note.id for letter in self.letters} if rest else rest

    def _held(self) -> dict[str, int]:
        return self.broker.held()

    def _leave(self) -> None:
        assert self._node is not None
        assert self._node.stop(grace=20.0), f"the worker does not end:\n{self._node.log[-3000:]}"
        # RabbitMQ takes back what the worker held when it has noticed that the connection is gone.
        time.sleep(0.3)

    def told(self) -> str:
        """Say all there is to say, for an assertion that failed."""
        try:
            return "".join(f"\n  {name}: {value}" for name, value in self._facts().items())
        except Exception as error:  # the broker may be away
            return f"{len(self.sent)} sent, and the broker says {error!r}"

    def _facts(self) -> dict[str, Any]:
        effects = self.ledger.counts("effect")
        twice = {task_id: count for task_id, count in effects.items() if count > 1}
        return {
            "sent": len(self.sent),
            "effects": len(effects),
            "neither done nor dead": sorted(self._open())[:5],
            "twice": twice,
            "broker": self._held(),
            "dead": [(letter.note.id, letter.note.reason) for letter in self.letters][:10],
        }

    def close(self) -> None:
        for node in self.logs:
            print(f"--- worker {node.pid}\n{node.log[-6000:]}")
        self._nodes.close()
        if "shop" in vars(self):
            self.shop.app.close()
