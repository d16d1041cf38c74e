"""
The table: what the rows of the last run came to.

    python -m tests.faults.table            write docs/faults.md
    python -m tests.faults.table --check    say whether it is still true
    python -m tests.faults.table --brief    print the same in a few lines, for the README
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["keep", "markdown", "results"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "faults.md"
KEPT = ROOT / ".cache" / "faults.json"

_BEGIN, _END = "<!-- rows: make faults -->\n", "<!-- end of rows -->\n"

#: How the rows begin that stand for the others in the README.
BRIEF = (
    "SIGKILL of a task's process, before its effect",
    "SIGKILL of a worker (prefork)",
    "Eight SIGKILLs",
    "The broker is killed",
    "Hard time limit",
    "Poison: the task kills its process (segfault)",
    "Retries used up",
    "A task three times as long as the lease (prefork)",
    "Bad messages of",
)

Row = Mapping[str, Any]


def keep(rows: Iterable[Row], *, is_whole: bool) -> None:
    """Keep *rows*: in place of all of an earlier run, or of the same rows of it."""
    kept = {(row["row"], row["broker"]): row for row in (*([] if is_whole else _kept()), *rows)}
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps(list(kept.values()), indent=1))


def _kept() -> list[Row]:
    return list(json.loads(KEPT.read_text())) if KEPT.exists() else []


def results(rows: Sequence[Row]) -> str:
    """Give the figures of one run."""
    lines = [f"{'row':72} {'broker':9} {'sent':>5} {'lost':>4} {'stuck':>5} {'twice':>5} {'s':>6}  dead"]
    for row in sorted(rows, key=lambda row: (row["row"], row["broker"])):
        dead = ", ".join(f"{count} {reason}" for reason, count in row["dead"].items())
        lines.append(
            f"{row['row'][:72]:72} {row['broker']:9} {row['sent']:5} {row['lost']:4} {row['stuck']:5} "
            f"{row['repeated']:5} {row['seconds']:6}  {dead}"
        )
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """
    Give the promise: one line a row, the same for the same code.

    Figures that differ from run to run (how many kills hit a task between its
    effect and its end) are given as what is allowed.
    """
    lines = ["| What happens | Brokers | Lost | Stuck | Effects repeated | Kept dead |", "|---|---|---|---|---|---|"]
    named: dict[str, list[Row]] = {}
    for row in rows:
        named.setdefault(row["row"], []).append(row)
    for name in sorted(named):
        lines.append(_line(name, named[name]))
    return "\n".join(lines) + "\n"


def _line(name: str, rows: Sequence[Row]) -> str:
    brokers = ", ".join(sorted((row["broker"] for row in rows), reverse=True))
    worst = {fact: max(row[fact] for row in rows) for fact in ("lost", "stuck", "may_repeat")}
    repeated = f"at most {worst['may_repeat']}" if worst["may_repeat"] else "0"
    dead = ", ".join(f"`{reason}`" for reason in sorted({reason for row in rows for reason in row["dead"]})) or "-"
    notes = next((row["note"] for row in rows if row["note"]), "")
    what = f"{name} ({notes})" if notes else name
    return f"| {what} | {brokers} | {worst['lost']} | {worst['stuck']} | {repeated} | {dead} |"


def brief(rows: Sequence[Row]) -> str:
    """Give the sum of it, and the rows that a README has room for."""
    kinds, sent = len({row["row"] for row in rows}), sum(row["sent"] for row in rows)
    few = [row for row in rows if row["row"].startswith(BRIEF) and "threads" not in row["row"]]
    return f"{kinds} kinds of faults, {sent} messages, Valkey and RabbitMQ.\n\n{markdown(few)}"


def main(arguments: Sequence[str]) -> int:
    if not KEPT.exists():
        print("There is no run to tell of: make faults", file=sys.stderr)
        return 2
    if "--brief" in arguments:
        print(brief(_kept()))
        return 0
    rows = markdown(_kept())
    before, _, rest = PAGE.read_text().partition(_BEGIN)
    written, _, after = rest.partition(_END)
    if "--check" in arguments:
        if written == rows:
            return 0
        print(f"{PAGE} tells another story than the last run: python -m tests.faults.table", file=sys.stderr)
        return 1
    PAGE.write_text(before + _BEGIN + rows + _END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
