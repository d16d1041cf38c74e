"""
Rows of the table of keys: one key, many of them, or the ticks of beats; who calls, what befalls them, and the verdict.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import kombu
from celery.exceptions import TaskRevokedError
from celery.exceptions import TimeoutError as NoResult

from celerykit.beat import status
from celerykit.idempotency import Claim
from celerykit.stores import Hold
from tests.faults.scene import ROOT
from tests.services import eventually

if TYPE_CHECKING:
    from tests.faults.keys_scene import KeyScene

__all__ = ["Many", "Outcome", "Row", "Ticks"]

#: Seconds that a caller waits for a result that should be there.
_PATIENCE = 30.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    What came of one key, or of many.

    Attributes:
        runs, effects:
            Of the task's body, however it was called.

        may_run, may_take_effect:
            How often the row allows, in words; with its reason in the test.

        key:
            The state of its claim at the end; ``free`` without one.

        seen:
            What its callers were told.
    """

    row: str
    store: str
    broker: str
    runs: int
    effects: int
    may_run: str
    may_take_effect: str
    key: str
    seen: str
    note: str
    seconds: float


class Row:
    """
    One key, those who call with it, and what comes of that.

    Attributes:
        number:
            Of the order, which is the key.

        task:
            What is called.

        id:
            Of the first call.
    """

    def __init__(self, scene: KeyScene, *, task: str) -> None:
        self.scene = scene
        self.number = uuid.uuid4().hex[:8]
        self.task = getattr(scene.shop, task)
        self.id = ""
        self._more: dict[str, Any] = {}
        self._told: list[Callable[[], str]] = []
        self._started = time.monotonic()

    # What callers do

    def held(self, run: int = True) -> Row:
        """Let all calls be such that wait for the gate when they run; if they run several times, in one of these."""
        self._more = {"held": run}
        return self

    @property
    def kwargs(self) -> dict[str, Any]:
        return {"number": self.number, **self._more}

    def call(self) -> Any:
        """Call the task, as a program would; gives what the caller gets."""
        return self.calls(lambda: self.task.delay(**self.kwargs))

    def calls(self, send: Callable[[], Any]) -> Any:
        """Call in another way; a refusal is what the caller sees."""
        try:
            result = send()
        except Exception as error:
            self.saw(type(error).__name__)
            return error
        self.id = self.id or result.id
        self.gets(result)
        return result

    def gets(self, result: Any) -> None:
        """Let somebody wait for *result* until the row ends."""
        self._told.append(lambda: _told(result))

    def saw(self, word: str) -> None:
        """Note what a caller was told."""
        self._told.append(lambda: word)

    def caller(self, *, dies: str) -> None:
        """Let another process call, and be killed at a point."""
        with self.process(env={"FAULTS_FATE": f"die {dies}"}, stays=False) as process:
            assert process.wait(30) == -signal.SIGKILL, process.communicate()
        self.saw("killed")

    def hears(self, process: subprocess.Popen[str]) -> None:
        """Note what the calls of another process were told."""
        said, _ = process.communicate(timeout=_PATIENCE)
        receipts = [json.loads(line)["result"] for line in said.splitlines()]
        assert process.returncode == 0, said
        for receipt in receipts:
            self.saw(f"={self.task.contract.load_result(receipt)!r}")

    @contextmanager
    def process(self, *, env: Mapping[str, str], **how: Any) -> Iterator[subprocess.Popen[str]]:
        """Start a process that calls."""
        said = json.dumps({"task": self.task.name.rpartition(".")[2], "kwargs": self.kwargs, **how})
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.keys_callers", said],
            env={**os.environ, **self.scene.env, **env},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def message(self) -> Callable[[], None]:
        """Send the call, and catch its message; gives what delivers a copy of it."""
        aside = f"aside-{uuid.uuid4().hex[:8]}"
        self.calls(lambda: self.task.using(queue=aside).delay(**self.kwargs))
        with kombu.Connection(self.scene.broker.url) as connection:
            channel = connection.default_channel
            got: list[Any] = []

            def is_there() -> bool:
                got.append(channel.basic_get(aside, no_ack=True))
                return got[-1] is not None

            eventually(is_there)
            channel.queue_delete(aside)
        return lambda: self._deliver(got[-1])

    def call_with(self, **options: Any) -> Any:
        """Call with Celery's options."""
        return self.calls(lambda: self.task.apply_async((), self.kwargs, **options))

    def _deliver(self, message: Any) -> None:
        # Where what comes after it is sent; as if it had come by the queue at once.
        message.headers["celerykit"]["queue"] = self.scene.broker.queue
        properties = {
            name: message.properties.get(name) for name in ("correlation_id", "reply_to", "delivery_mode", "priority")
        }
        self.scene.broker.publish(
            message.body,
            headers=message.headers,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            **properties,
        )

    # What befalls them

    def dies(self, point: str) -> Row:
        """Kill the process that handles the call, once it comes to this point."""
        self._write("fate", f"die-{point.replace(' ', '-')}")
        return self

    def freezes(self, point: str) -> Row:
        """Stop the process that handles the call, once it comes to this point."""
        self._write("fate", f"freeze-{point.replace(' ', '-')}")
        return self

    def open_gate(self, *, after: float = 0.0) -> None:
        """Let the run go on, after some seconds in which others may come."""
        time.sleep(after)
        self._write("gate")

    def cure(self) -> None:
        self._write("cured")

    def _write(self, what: str, more: str = "") -> None:
        (self.scene.folder / "-".join(filter(None, (what, self.number, more)))).touch()

    def a_minute_later(self) -> None:
        """Let the time pass after which nobody counts on the message of a claim any more."""
        store = self.scene.shop.app.store
        assert store.renew([Hold(self.key, store.read(self.key).version, 0.0, 60.0)]) == [True]

    # What came of it

    def reached(self, event: str, *, times: int = 1, within: float = 20.0) -> int:
        """Wait until *event* is in the ledger, and give the process that wrote it last."""
        return self.scene.reached(event, self.number, times=times, within=within)

    def count(self, event: str) -> int:
        return self.scene.ledger.count(event, self.number)

    @property
    def key(self) -> str:
        """What the claim stands under."""
        return f"once:{self.task.claims.identify((), self.kwargs, id=self.id).key}"

    @property
    def state(self) -> str:
        record = self.scene.shop.app.store.read(self.key)
        return "free" if record is None else Claim.of(record.data).state.value

    def becomes(self, state: str, *, within: float = 20.0) -> None:
        eventually(lambda: self.state == state, within=within, what=lambda: f"{state}, not {self.state}")

    def verdict(
        self,
        row: str,
        *,
        runs: int = 1,
        effects: int = 1,
        key: str = "done",
        seen: str,
        note: str = "",
        within: float = 30.0,
    ) -> None:
        """Wait until all is over, and check that it came to what we promise."""
        told = _in_words(Counter(tell() for tell in self._told))
        # Copies and duplicates, too.
        eventually(lambda: not self.scene.holds(self.number), within=within, what=self.scene.told)
        outcome = Outcome(
            row=row,
            store=self.scene.keep.name,
            broker=self.scene.broker.name,
            runs=self.count("start"),
            effects=self.count("effect"),
            may_run=str(runs),
            may_take_effect=str(effects),
            key=self.state,
            seen=told,
            note=note,
            seconds=round(time.monotonic() - self._started, 1),
        )
        assert (outcome.runs, outcome.effects, outcome.key, told) == (runs, effects, key, seen), self.scene.told()
        self.scene.record("key", asdict(outcome))


class Many:
    """Many keys, each called as often as they are sent."""

    def __init__(self, scene: KeyScene, task: Any, *, count: int) -> None:
        self._scene = scene
        self._task = task
        self._name = uuid.uuid4().hex[:8]
        self._numbers = [f"{self._name}-{number}" for number in range(count)]
        self._effect = re.compile(rf" {self._name}-\d+ \d+ effect$", re.MULTILINE)
        self._started = time.monotonic()

    def send(self) -> None:
        """Call once with each key."""
        self._task.enqueue_many({"number": number} for number in self._numbers)

    def _counts(self, event: str) -> Counter[str]:
        numbers = set(self._numbers)
        counts = self._scene.ledger.counts(event)
        return Counter({number: count for number, count in counts.items() if number in numbers})

    def reach(self, effects: int, *, within: float = 60.0) -> None:
        """Wait until there are so many."""
        eventually(
            lambda: self._effects() >= effects, within=within, what=lambda: f"{effects} effects, but {self._effects()}"
        )

    def _effects(self) -> int:
        # To make entries of them all, again and again, would take the time that the workers need.
        ledger = self._scene.ledger.path
        return len(self._effect.findall(ledger.read_text())) if ledger.exists() else 0

    def verdict(self, row: str, *, most_again: int = 0, key: str = "done", within: float = 60.0) -> None:
        """Wait until all is over, and check that it came to what we promise."""
        eventually(lambda: not self._scene.holds(self._name), within=within, what=self._scene.told)
        runs, effects, count = self._counts("start"), self._counts("effect"), len(self._numbers)
        states = self._states()
        told = f"{count:,} to {count + most_again:,}" if most_again else f"{count:,}"
        outcome = Outcome(
            row=row,
            store=self._scene.keep.name,
            broker=self._scene.broker.name,
            runs=runs.total(),
            effects=effects.total(),
            may_run=told,
            may_take_effect=told,
            key=key,
            seen="-",
            note="",
            seconds=round(time.monotonic() - self._started, 1),
        )
        assert len(effects) == count, f"{count - len(effects)} without effect: {self._scene.told()}"
        assert effects.total() <= runs.total() <= count + most_again, self._scene.told()
        assert states == ({} if key == "free" else {key: count}), states
        self._scene.record("key", asdict(outcome))

    def _states(self) -> Counter[str]:
        """Count the claims of the task, by their states; what is forgotten and still there counts too."""
        found = self._scene.shop.app.store.find(f"once:{self._task.name}:")
        states = Counter({key: Claim.of(record.data).state.value for key, record in found}.values())
        states["forgotten"] = self._scene.keep.count(f"once:{self._task.name}:") - states.total()
        return +states


class Ticks:
    """What beats send, from now on."""

    def __init__(self, scene: KeyScene) -> None:
        self._scene = scene
        self._noted = self._sent()
        self._before = self._ids()
        self._started = time.monotonic()

    def _sent(self) -> int:
        """Give how many ticks the beats believe to have sent."""
        [entry] = [entry for entry in status(self._scene.shop.app).entries if entry.name == "tick"]
        return entry.runs

    def _ids(self) -> Counter[str]:
        return self._scene.ledger.counts("tick")

    def pass_by(self, count: int, *, within: float = 20.0) -> None:
        """Wait until so many more are run."""
        number = len(self._ids()) + count
        eventually(
            lambda: len(self._ids()) >= number, within=within, what=lambda: f"{number} ticks, but {len(self._ids())}"
        )

    def verdict(self, row: str, *, longest: float) -> None:
        """Check that each was run once, when all beats have ended, and that none came later than that."""
        eventually(lambda: not self._scene.holds("tick"))
        new = self._ids() - self._before
        ticks = sorted(entry.at for entry in self._scene.ledger.of("tick") if entry.id in new)
        gap = max(after - before for before, after in pairwise(ticks))
        assert max(new.values()) == 1, new
        assert len(new) == self._sent() - self._noted, (len(new), self._sent(), self._noted)
        assert gap <= longest, gap
        outcome = Outcome(
            row=row,
            store=self._scene.keep.name,
            broker=self._scene.broker.name,
            runs=len(ticks),
            effects=len(ticks),
            may_run="1 a tick",
            may_take_effect="1 a tick",
            key="done",
            seen=f"each tick, at most {longest:g} s late",
            note="",
            seconds=round(time.monotonic() - self._started, 1),
        )
        self._scene.record("key", asdict(outcome))


def _told(result: Any) -> str:
    """Wait for a result as its caller does, and give what that is told."""
    try:
        value = result.get(timeout=_PATIENCE)
    except NoResult:
        return "nothing"
    except TaskRevokedError:
        return "revoked"
    except Exception as error:
        return type(error).__name__
    return f"={value!r}"


def _in_words(told: Counter[str]) -> str:
    results = [count for word, count in told.items() if word.startswith("=")]
    words = [f"{count} equal results" if count > 1 else "1 result" for count in results]
    words += [word if count == 1 else f"{count} {word}" for word, count in sorted(told.items()) if word[:1] != "="]
    return ", ".join(words) or "-"
