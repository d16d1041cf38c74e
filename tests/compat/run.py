"""
Run Celery's own integration tests on stock Celery and on celerykit, and compare.

    python -m tests.compat.run [--only TEXT] [--json] [--at-once N]

Ends with 0 when every test that passes with stock Celery passes with celerykit
too, or is listed in ``exceptions.toml`` with its reason.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path

from celerykit.dev.servers import ServerFailed, ServerNotFound
from tests.compat import jobs, suite
from tests.compat.outcomes import Outcome, Run
from tests.compat.verdict import NotComparable, Verdict, check_baseline, judge, read_exceptions

STOCK, KIT = "stock", "kit"
_TITLES = {STOCK: "celery.Celery", KIT: "celerykit.CeleryKit"}

#: Celery's tests mostly wait: ten processes do not fill two cores.
_AT_ONCE = 10

#: Seconds; a day.
_KEEP_LOGS = 86400.0

_CANNOT_RUN = 2


@dataclass(frozen=True)
class Comparison:
    """
    Both runs, and what they say.

    Attributes:
        settled:
            Tests that failed with celerykit once, and passed when run again.
    """

    stock: Run
    kit: Run
    verdict: Verdict
    settled: Sequence[str]
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, say what was found, and give the exit code."""
    options = _parser().parse_args(arguments)
    # A job that is ended must end what it started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = _folder_for_logs()
    try:
        comparison = compare(folder, only=options.only, at_once=options.at_once)
    except (suite.NoSuite, jobs.CannotCollect, NotComparable, ServerFailed, ServerNotFound, ValueError) as error:
        _say(f"compat: {error}")
        return _CANNOT_RUN
    except KeyboardInterrupt:
        _say("compat: interrupted")
        return _CANNOT_RUN
    print(json.dumps(_facts(comparison), indent=2) if options.json else _report(comparison, folder))
    if not comparison.verdict.is_good:
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _folder_for_logs() -> Path:
    """Make a folder for one run, and remove those nobody will read any more."""
    suite.CACHE.mkdir(parents=True, exist_ok=True)
    for old in suite.CACHE.glob("run-*"):
        if time.time() - old.stat().st_mtime > _KEEP_LOGS:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix="run-", dir=suite.CACHE))


def compare(folder: Path, *, only: str, at_once: int) -> Comparison:
    """
    Run both sides, what failed with celerykit alone once more, and judge.

    Raises:
        ValueError: No test has *only* in its name, or the list of exceptions is wrong.

        NotComparable: Too few tests pass with stock Celery.
    """
    started = time.monotonic()
    exceptions = read_exceptions()
    tests = suite.fetch()
    names = [name for name in _collect(tests, folder) if only in name]
    if not names:
        raise ValueError(f"no test of Celery's has {only!r} in its name.")
    _say(f"{len(names)} tests of Celery {version('celery')}, each on both sides; the logs are in {folder}")
    runs = jobs.run(_pairs(names), suite=tests, folder=folder, at_once=at_once)
    stock, kit = runs[STOCK], runs[KIT]
    check_baseline(stock)
    first = judge(stock, kit, exceptions, whole=not only)
    _again(first.broken, kit, suite=tests, folder=folder, at_once=at_once)
    return Comparison(
        stock=stock,
        kit=kit,
        verdict=judge(stock, kit, exceptions, whole=not only),
        settled=[test for test in first.broken if kit.of(test).is_good],
        seconds=time.monotonic() - started,
    )


def _collect(tests: Path, folder: Path) -> list[str]:
    """Name Celery's tests; celerykit must not make one of them go away."""
    stock, kit = (jobs.collect(side, suite=tests, folder=folder) for side in (STOCK, KIT))
    if missing := set(stock) - set(kit):
        raise jobs.CannotCollect(f"with celerykit these tests are not there: {sorted(missing)}")
    return stock


def _pairs(names: Sequence[str]) -> list[jobs.Job]:
    """Put both sides of the same tests next to each other, so that they run under the same load."""
    return list(chain.from_iterable(zip(jobs.split(names, side=STOCK), jobs.split(names, side=KIT), strict=True)))


def _again(broken: Collection[str], kit: Run, *, suite: Path, folder: Path, at_once: int) -> None:
    """Run what failed with celerykit alone a second time, in fresh processes; it may have been chance."""
    if not broken:
        return
    _say(f"{len(broken)} failed with celerykit only; running them once more")
    retries = folder / "again"
    retries.mkdir()
    second = jobs.run(jobs.split(sorted(broken), side=KIT), suite=suite, folder=retries, at_once=at_once)[KIT]
    kit.outcomes.update({test: outcome for test, outcome in second.outcomes.items() if outcome.is_good})


# What is said


def _report(comparison: Comparison, folder: Path) -> str:
    lines = [*_table(comparison), "", *_coverage(comparison), *_differences(comparison)]
    if not comparison.verdict.is_good:
        lines += ["", f"The logs are in {folder}."]
    counts = comparison.kit.counts
    passed = sum(outcome.is_good for outcome in comparison.kit.outcomes.values())
    failed = len(comparison.verdict.broken)
    lines += ["", f"compat: {passed} passed, {failed} failed, {counts['skipped']} skipped"]
    return "\n".join(lines)


def _table(comparison: Comparison) -> list[str]:
    columns = ("passed", "xfailed", "xpassed", "failed", "error", "lost", "skipped")
    rows = [f"{'':<20}" + "".join(f"{column:>9}" for column in columns)]
    for side, run in ((STOCK, comparison.stock), (KIT, comparison.kit)):
        rows.append(f"{_TITLES[side]:<20}" + "".join(f"{run.counts[column]:>9}" for column in columns))
    return rows


def _coverage(comparison: Comparison) -> list[str]:
    kit = comparison.kit
    others = ", ".join(sorted(kit.others)) or "none"
    return [
        f"Took {comparison.seconds:.0f} s; one after the other, the stock side would take "
        f"{comparison.stock.seconds:.0f} s and ours {kit.seconds:.0f} s.",
        f"Workers ran {len(kit.ours)} tasks of celerykit's, {kit.ours.total()} times. Not celerykit's: {others}.",
        *(f"Left out: {path} ({reason})." for path, reason in suite.LEFT_OUT.items()),
    ]


def _differences(comparison: Comparison) -> list[str]:
    verdict, kit = comparison.verdict, comparison.kit
    broken = verdict.broken.items()
    stock_bad = [test for test, outcome in comparison.stock.outcomes.items() if _is_bad(outcome)]
    sections = {
        "Pass with stock Celery, and not with celerykit": [
            f"{test}\n      {outcome.status}: {_first_line(outcome.message)}" for test, outcome in broken
        ],
        "Excused in exceptions.toml": [f"{test}\n      {reason}" for test, reason in verdict.excused.items()],
        "Listed in exceptions.toml, and pass: take them out": verdict.needless,
        "Listed in exceptions.toml, and there is no such test": verdict.unknown,
        "Failed once with celerykit, and passed when run again": comparison.settled,
        "Fail with stock Celery too, or only there; they do not count": [
            f"{test} (with celerykit: {kit.of(test).status})" for test in stock_bad
        ],
    }
    lines: list[str] = []
    for title, entries in sections.items():
        if entries:
            lines += ["", f"{title}: {len(entries)}", *(f"    {entry}" for entry in entries)]
    return lines


def _facts(comparison: Comparison) -> dict[str, object]:
    verdict = comparison.verdict
    return {
        "celery": version("celery"),
        "good": verdict.is_good,
        "seconds": round(comparison.seconds, 1),
        "sides": {
            side: {
                "counts": dict(run.counts),
                "seconds": round(run.seconds, 1),
                "runs_of_our_tasks": run.ours.total(),
                "runs_of_other_tasks": run.others.total(),
            }
            for side, run in ((STOCK, comparison.stock), (KIT, comparison.kit))
        },
        "broken": {test: {"status": it.status, "message": it.message} for test, it in verdict.broken.items()},
        "excused": dict(verdict.excused),
        "needless": list(verdict.needless),
        "unknown": list(verdict.unknown),
        "settled": list(comparison.settled),
        "stock_fails": {t: o.status for t, o in comparison.stock.outcomes.items() if _is_bad(o)},
    }


def _is_bad(outcome: Outcome) -> bool:
    return not outcome.is_good and outcome.status != "skipped"


def _first_line(message: str) -> str:
    return next(iter(message.splitlines()), "")[:200]


def _say(text: str) -> None:
    """Tell what is going on, beside the report."""
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.compat.run", description=__doc__.splitlines()[1])
    parser.add_argument("--only", default="", metavar="TEXT", help="only tests with TEXT in their names")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--at-once", type=int, default=_AT_ONCE, metavar="N", help="pytest processes at a time")
    return parser


if __name__ == "__main__":
    sys.exit(main())
