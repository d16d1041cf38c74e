"""
The second table: what became of keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["brief", "identify", "markdown", "results"]

#: How the rows begin that stand for the others in a few lines.
BRIEF = (
    "200 calls at once",
    "10,000 keys",
    "SIGKILL of a caller after it claimed",
    "SIGKILL of the worker in the body, before",
    "SIGKILL of the worker after the body",
    "SIGKILL of the worker when it is recorded",
    "A worker stands still",
    "The same message twice, the second",
    "The store goes away while it runs, and is back long",
)

Row = Mapping[str, Any]


def identify(row: Row) -> tuple[Any, ...]:
    """Tell a row from every other one."""
    return row["row"], row["store"], row["broker"]


def results(rows: Sequence[Row]) -> str:
    """Give the figures of one run."""
    lines = [f"{'row':88} {'store':10} {'broker':8} {'runs':>5} {'effects':>7} {'key':10} {'s':>5}  callers see"]
    lines += [
        f"{row['row'][:88]:88} {row['store']:10} {row['broker']:8} {row['runs']:5} {row['effects']:7} "
        f"{row['key']:10} {row['seconds']:5}  {row['seen']}"
        for row in sorted(rows, key=identify)
    ]
    return "\n".join(lines)


def markdown(rows: Iterable[Row]) -> str:
    """Give the promise: one line a row, the same for the same code."""
    lines = [
        "| What happens | Stores | Brokers | Runs | Effects | Key | Callers see |",
        "|---|---|---|---|---|---|---|",
    ]
    named: dict[str, list[Row]] = {}
    for row in rows:
        named.setdefault(row["row"], []).append(row)
    return "\n".join(lines + [_line(name, named[name]) for name in sorted(named)]) + "\n"


def _line(name: str, rows: Sequence[Row]) -> str:
    # What was promised is what was found, or the test would have failed.
    runs, effects, key, seen = (rows[0][fact] for fact in ("may_run", "may_take_effect", "key", "seen"))
    stores, brokers = (", ".join(sorted({row[fact] for row in rows}, reverse=True)) for fact in ("store", "broker"))
    what = f"{name} ({rows[0]['note']})" if rows[0]["note"] else name
    return f"| {what} | {stores} | {brokers} | {runs} | {effects} | {key} | {seen} |"


def brief(rows: Sequence[Row]) -> str:
    """Give the sum of it, and the rows that there is room for."""
    kinds = len({row["row"] for row in rows})
    few = [row for row in rows if row["row"].startswith(BRIEF) and "bury" not in row["row"]]
    return f"{kinds} ways for a key to be called or to crash, stores in Valkey and PostgreSQL.\n\n{markdown(few)}"
