"""
The tables: what the rows of the last run came to.

    python -m tests.faults.table            write docs/faults.md and docs/keys-faults.md
    python -m tests.faults.table --check    say whether they are still true
    python -m tests.faults.table --brief    print the same in a few lines, for the README
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import keys_table

__all__ = ["TABLES", "Table", "markdown", "results"]

ROOT = Path(__file__).parents[2]

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


def identify(row: Row) -> tuple[Any, ...]:
    """Tell a row from every other one."""
    return row["row"], row["broker"]


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


@dataclass(frozen=True)
class Table:
    """
    One of them.

    Attributes:
        title:
            Above its figures.

        name:
            Of the property that its rows are recorded as.
    """

    title: str
    name: str
    page: Path
    kept_in: Path
    identify: Callable[[Row], tuple[Any, ...]]
    results: Callable[[Sequence[Row]], str]
    markdown: Callable[[Sequence[Row]], str]
    brief: Callable[[Sequence[Row]], str]

    @property
    def kept(self) -> list[Row]:
        """The rows of the last run."""
        return list(json.loads(self.kept_in.read_text())) if self.kept_in.exists() else []

    def keep(self, rows: Iterable[Row], *, is_whole: bool) -> None:
        """Keep *rows*: in place of all of an earlier run, or of the same rows of it."""
        kept = {self.identify(row): row for row in (*([] if is_whole else self.kept), *rows)}
        self.kept_in.parent.mkdir(exist_ok=True)
        self.kept_in.write_text(json.dumps(list(kept.values()), indent=1))

    def is_told(self) -> bool:
        """Tell whether its page says what the last run came to."""
        _, written, _ = self._parts()
        return written == self.markdown(self.kept)

    def tell(self) -> None:
        """Write its page."""
        before, _, after = self._parts()
        self.page.write_text(before + _BEGIN + self.markdown(self.kept) + _END + after)

    def _parts(self) -> tuple[str, str, str]:
        before, _, rest = self.page.read_text().partition(_BEGIN)
        written, _, after = rest.partition(_END)
        return before, written, after


def _table(title: str, name: str, page: str, kept_in: str, how: Any) -> Table:
    return Table(
        title,
        name,
        ROOT / "docs" / page,
        ROOT / ".cache" / kept_in,
        how.identify,
        how.results,
        how.markdown,
        how.brief,
    )


TABLES = (
    _table("what became of the messages", "fault", "faults.md", "faults.json", sys.modules[__name__]),
    _table("what became of the keys", "key", "keys-faults.md", "keys-faults.json", keys_table),
)


def main(arguments: Sequence[str]) -> int:
    if not all(table.kept for table in TABLES):
        print("There is no run to tell of: make faults", file=sys.stderr)
        return 2
    if "--brief" in arguments:
        print("\n".join(table.brief(table.kept) for table in TABLES))
        return 0
    if "--check" in arguments:
        untrue = [table.page for table in TABLES if not table.is_told()]
        for page in untrue:
            print(f"{page} tells another story than the last run: python -m tests.faults.table", file=sys.stderr)
        return int(bool(untrue))
    for table in TABLES:
        table.tell()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
