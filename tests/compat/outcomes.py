"""
What came of each test, out of the records that the pytest processes wrote.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: From best to worst: a test is as good as its worst phase.
_RANKS = ("skipped", "passed", "xpassed", "xfailed", "error", "failed")

#: What the maintainers of a test are content with.
GOOD = frozenset({"passed", "xpassed", "xfailed"})

#: A test of which nothing was heard: its process was ended, or never got so far.
LOST = "lost"


@dataclass(frozen=True)
class Outcome:
    """
    How one test ended.

    Attributes:
        reruns:
            How often it failed before, where its maintainers marked it as flaky.
    """

    status: str
    message: str = ""
    reruns: int = 0

    @property
    def is_good(self) -> bool:
        return self.status in GOOD


@dataclass
class Run:
    """
    One side's outcomes.

    Attributes:
        ours, others:
            How many runs of tasks there were, of celerykit's class and of another.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    ours: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def counts(self) -> Counter[str]:
        return Counter(outcome.status for outcome in self.outcomes.values())

    def of(self, test: str) -> Outcome:
        """Give the outcome of *test*, which may be that there is none."""
        return self.outcomes.get(test, Outcome(LOST, "its process ended before it did"))

    def add(self, records: Iterable[dict[str, Any]], *, tests: Iterable[str]) -> None:
        """Take in what one process, which was to run *tests*, wrote."""
        phases: dict[str, list[dict[str, Any]]] = {test: [] for test in tests}
        for fact in records:
            if fact["kind"] == "run":
                (self.ours if fact["ours"] else self.others)[fact["task"]] += 1
            elif fact["test"] in phases:
                phases[fact["test"]].append(fact)
            else:
                # A module that could not be imported speaks for all of its tests.
                _for_all_of(phases, fact)
        for test, facts in phases.items():
            self.outcomes[test] = _outcome(facts)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Read a record; its last line may have been cut short."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _for_all_of(phases: dict[str, list[dict[str, Any]]], fact: dict[str, Any]) -> None:
    for test, facts in phases.items():
        if test.startswith(f"{fact['test']}::"):
            facts.append(fact)


def _outcome(facts: list[dict[str, Any]]) -> Outcome:
    reruns = sum(fact["outcome"] == "rerun" for fact in facts)
    last = facts[_after_last_rerun(facts) :]
    if not last:
        return Outcome(LOST, "its process ended before it did", reruns)
    worst = max(last, key=lambda fact: _RANKS.index(_status(fact)))
    return Outcome(_status(worst), worst["message"], reruns)


def _after_last_rerun(facts: list[dict[str, Any]]) -> int:
    return max((index + 1 for index, fact in enumerate(facts) if fact["outcome"] == "rerun"), default=0)


def _status(fact: dict[str, Any]) -> str:
    """Name a failure as pytest does: an error is one outside the test itself."""
    if fact["outcome"] == "failed" and fact["when"] != "call":
        return "error"
    return str(fact["outcome"])
