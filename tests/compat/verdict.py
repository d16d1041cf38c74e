"""
The comparison itself: two runs and the list of exceptions in, a verdict out.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.compat.outcomes import Outcome, Run

EXCEPTIONS = Path(__file__).with_name("exceptions.toml")

#: The share of tests that must pass with stock Celery; some are flaky, and all but those should.
_ENOUGH = 0.9


class NotComparable(Exception):
    """Stock Celery fails too, so that nothing follows from what celerykit does."""


@dataclass(frozen=True)
class Verdict:
    """
    What the comparison found.

    Attributes:
        broken:
            Tests that pass with stock Celery and not with celerykit, and no
            exception says why.

        excused:
            The same, with the reason the list of exceptions gives.

        needless:
            Exceptions whose tests pass, and so must go.

        unknown:
            Exceptions whose tests do not exist.
    """

    broken: Mapping[str, Outcome]
    excused: Mapping[str, str]
    needless: Collection[str]
    unknown: Collection[str]

    @property
    def is_good(self) -> bool:
        return not (self.broken or self.needless or self.unknown)


def judge(stock: Run, kit: Run, exceptions: Mapping[str, str], *, whole: bool = True) -> Verdict:
    """
    Compare two runs.

    Args:
        exceptions:
            The reason of each test that may fail with celerykit, by name.

        whole:
            All tests ran, so that an exception without a test is a mistake.
    """
    expected = [test for test, outcome in stock.outcomes.items() if outcome.is_good]
    differing = {test: kit.of(test) for test in expected if not kit.of(test).is_good}
    return Verdict(
        broken={test: outcome for test, outcome in differing.items() if test not in exceptions},
        excused={test: exceptions[test] for test in differing if test in exceptions},
        needless=[test for test in expected if test in exceptions and test not in differing],
        unknown=[test for test in exceptions if whole and test not in stock.outcomes],
    )


def check_baseline(stock: Run) -> None:
    """
    Make sure that there is something to compare with.

    Raises:
        NotComparable: Too few tests pass with stock Celery.
    """
    ran = [outcome for outcome in stock.outcomes.values() if outcome.status != "skipped"]
    good = sum(outcome.is_good for outcome in ran)
    if not ran or good < _ENOUGH * len(ran):
        raise NotComparable(f"with stock Celery only {good} of {len(ran)} tests pass; see the logs.")


def read_exceptions(path: Path = EXCEPTIONS) -> dict[str, str]:
    """
    Read the list of exceptions.

    Raises:
        ValueError: An entry lacks its test or its reason, or is there twice.
    """
    reasons: dict[str, str] = {}
    for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("exception", []):
        test, reason = entry.get("test", ""), entry.get("reason", "").strip()
        if not test or not reason:
            raise ValueError(f"{path.name}: an exception needs a test and a reason, got {entry}")
        if test in reasons:
            raise ValueError(f"{path.name}: {test} is listed twice")
        reasons[test] = reason
    return reasons
