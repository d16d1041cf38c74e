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
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tests.benchmarks import report, suites
from tests.benchmarks.lanes import Case, Figures, Lane, Place, Sender, Worker, place
from tests.benchmarks.subjects import Subject
from tests.benchmarks.suites import Pace, Round, Row

_FULL = Pace(calls=500, rounds=10, seconds=18.0, fresh=2)
_QUICK = Pace(calls=500, rounds=3, seconds=1.0, fresh=1)


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
    contract = _contract(where, pace)
    sent = _rounds(Sender, where, pace, suites.ONE, suites.MANY)
    ran = _rounds(Worker, where, pace, run)
    tables = [
        report.send_one_table(suites.ONE, sent),
        report.run_table(run, ran),
        report.send_many_table(suites.MANY, sent),
        report.contract_table(contract),
    ]
    rounds = [[{**asdict(case), **figures} for case, figures in round_.items()] for round_ in (*sent, *ran)]
    return {"machine": facts, "tables": tables, "rounds": rounds, "contract": contract}


def _rounds(kind: type[Lane], where: Place, pace: Pace, *tables: Sequence[Row]) -> list[Round]:
    rounds = []
    for turn in range(pace.fresh):
        for group in suites.groups_of(*tables):
            print(f"measuring {group[0].how} and what compares with it, {turn + 1} of {pace.fresh}", file=sys.stderr)
            rounds += suites.take_turns(kind, where, group, pace)
    return rounds


def _contract(where: Place, pace: Pace) -> list[Figures]:
    case = Case("contract", Subject("celerykit", results=True))
    rounds = [suites.take_turns(Sender, where, [case], pace)[-1] for _ in range(pace.fresh)]
    return [round_[case] for round_ in rounds]


def _as_markdown(found: dict[str, Any]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    return "\n".join([f"{facts}\n", *map(str, found["tables"])])


if __name__ == "__main__":
    main()
