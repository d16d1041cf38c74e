"""
Measure celerykit beside stock Celery, and print tables.

Figures fail nothing: they differ from machine to machine, and ratios wander
by some percent where other jobs run. The exit code says only whether all was
measured.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict
from typing import Any

from tests.benchmarks import report, suites
from tests.benchmarks.lanes import Case, Lane, Place, RunsFirstCalls, Sender, Tells, Worker, place
from tests.benchmarks.subjects import ADD_ONS, Subject, is_installed
from tests.benchmarks.suites import Pace

_FULL = Pace(calls=500, rounds=10, seconds=18.0, fresh=2, enough=300.0)
_QUICK = Pace(calls=500, rounds=4, seconds=2.0, fresh=1, enough=20.0)

_CONTRACT = Case("contract", Subject("celerykit", results=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: shapes, not figures")
    parser.add_argument("--json", action="store_true", help="print JSON, with each single measurement")
    options = parser.parse_args()
    # So that `with` blocks end, and with them what they started.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    with place() as where:
        found = _measured(where, quick=options.quick)
    print(json.dumps(found, indent=2, default=asdict) if options.json else _as_markdown(found))


def _measured(where: Place, *, quick: bool) -> dict[str, Any]:
    facts = report.machine(where.server_version)
    pace, run = (_QUICK, suites.RUN_QUICKLY) if quick else (_FULL, suites.RUN)
    sent = [[_CONTRACT], *suites.groups_of(suites.ONE, suites.MANY, suites.FIRST, suites.AGAIN)]
    groups: list[tuple[type[Lane], list[Case]]] = [
        *((Sender, group) for group in sent),
        *((Worker, group) for group in suites.groups_of(run)),
        *((Tells, group) for group in suites.groups_of(suites.LOGS)),
        *((RunsFirstCalls, group) for group in suites.groups_of(suites.RUN_FIRST)),
    ]
    rounds = suites.measure(where, pace, groups)
    tables = [
        report.send_one_table(suites.ONE, rounds),
        report.run_table(run, rounds),
        report.logs_table(suites.LOGS, rounds),
        report.send_many_table(suites.MANY, rounds),
        *report.keyed_tables(
            (suites.FIRST, suites.AGAIN, suites.RUN_FIRST),
            rounds,
            missing=[add_on for add_on in ADD_ONS if not is_installed(add_on)],
        ),
        report.contract_table([round_[_CONTRACT] for round_ in rounds if _CONTRACT in round_]),
    ]
    single = [[{**asdict(case), **figures} for case, figures in round_.items()] for round_ in rounds]
    return {"machine": facts, "tables": tables, "rounds": single}


def _as_markdown(found: dict[str, Any]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    return "\n".join([f"{facts}\n", *map(str, found["tables"])])


if __name__ == "__main__":
    main()
