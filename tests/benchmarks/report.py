"""Tables of what was measured: medians, and how far the middle half of all rounds lies apart."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median, quantiles

from tests.benchmarks.lanes import Figures
from tests.benchmarks.suites import Round, Row

__all__ = [
    "Table",
    "contract_table",
    "keyed_tables",
    "logs_table",
    "machine",
    "run_table",
    "send_many_table",
    "send_one_table",
]

_PACKAGES = ("celery", "kombu", "redis", "pydantic")


@dataclass(frozen=True)
class Table:
    """A title, a note, and text in cells."""

    title: str
    note: str
    columns: Sequence[str]
    cells: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.cells]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{self.note}\n\n{body}\n"


def send_one_table(rows: Sequence[Row], rounds: Sequence[Round]) -> Table:
    return Table(
        title="Sending one call",
        note="A model of five fields, or the same as a dict. Target: celerykit's CPU at most 1.15 x stock's. It also "
        "ends its waits for the broker (CELERYKIT_PUBLISH_DEADLINE), and subscribes to a result when somebody waits "
        "for it; stock does when it sends.",
        columns=["variant", "CPU us", "wall us", "Redis commands", "CPU / stock", "target"],
        cells=[_per_call(row, _with(row, rounds)) for row in rows],
    )


def run_table(rows: Sequence[Row], rounds: Sequence[Round]) -> Table:
    return Table(
        title="Running one call",
        note="All processes of a worker; prefork has two children. All have Celery's defaults (early acks, prefetch "
        "4), so that only typing differs, but for the line that says otherwise (late acks, prefetch 1). Target: "
        "celerykit's CPU at most 1.10 x stock's.",
        columns=["variant", "CPU us", "wall us", "Redis commands", "CPU / stock", "target"],
        cells=[_per_call(row, _with(row, rounds)) for row in rows],
    )


def logs_table(rows: Sequence[Row], rounds: Sequence[Round]) -> Table:
    return Table(
        title="Logging one call",
        note="As above, with prefork, but at level INFO, to a pipe that is read. celerykit tells one event more a call "
        "(`task.started`), and each with its ids. Target: with JSON, CPU at most 1.10 x stock's with text; it has all "
        "that celerykit does beside. The last line has celerykit without its logs.",
        columns=["variant", "CPU us", "wall us", "Redis commands", "CPU / stock", "target"],
        cells=[_per_call(row, _with(row, rounds)) for row in rows],
    )


def send_many_table(rows: Sequence[Row], rounds: Sequence[Round]) -> Table:
    return Table(
        title="Sending many calls",
        note="500 at once, beside stock's loop over `delay`. Target: at least 5 x the loop's rate.",
        columns=["variant", "messages/s", "CPU us", "Redis commands", "rate / loop", "CPU: times less", "target"],
        cells=[_per_second(row, _with(row, rounds)) for row in rows],
    )


def keyed_tables(tables: Sequence[Sequence[Row]], rounds: Sequence[Round], *, missing: Sequence[str]) -> list[Table]:
    left_out = f" Not installed here, and so not measured: {', '.join(missing)}." if missing else ""
    notes = {
        "Sending the first call with a key": "Results are ignored; the key is all arguments, and free. Commands inside "
        f"scripts count, too: celerykit asks its store once, as the others do theirs.{left_out}",
        "Sending a call whose key is taken": "Of stock, and of celerykit without keys, it is one more message; of the "
        "others nothing is sent.",
        "Running a call with a key": "A prefork worker with two children, Celery's defaults, results stored. celerykit "
        "takes the key before the function, whoever has sent the call, and keeps its result after it; the others let a "
        "lock go.",
    }
    return [
        Table(
            title=title,
            note=note,
            columns=["variant", "CPU us", "wall us", "Redis commands", "CPU / stock", "wall / stock"],
            cells=[_keyed(row, _with(row, rounds)) for row in rows],
        )
        for (title, note), rows in zip(notes.items(), tables, strict=True)
    ]


def contract_table(found: Sequence[Figures]) -> Table:
    return Table(
        title="The contract alone",
        note="The same model; the best of five.",
        columns=["what", "CPU us"],
        cells=[[f"`{what}`", f"{median(figures[what] for figures in found):.1f}"] for what in found[0]],
    )


def machine(server: str) -> dict[str, str]:
    """Say on what this ran."""
    return {
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "server": server,
        **{package: version(package) for package in _PACKAGES},
    }


def _with(row: Row, rounds: Sequence[Round]) -> list[Round]:
    return [round_ for round_ in rounds if row.case in round_]


def _per_call(row: Row, rounds: Sequence[Round]) -> list[str]:
    ratios = _ratios(row, rounds, "cpu")
    figures = [f"{_median(row, rounds, 'cpu'):.0f}", f"{_median(row, rounds, 'wall'):.0f}"]
    commands = f"{_median(row, rounds, 'commands'):.1f}"
    return [row.name, *figures, commands, _spread(row, ratios), _at_most(row.target, ratios)]


def _keyed(row: Row, rounds: Sequence[Round]) -> list[str]:
    *cells, _ = _per_call(row, rounds)
    return [*cells, _spread(row, _ratios(row, rounds, "wall"))]


def _per_second(row: Row, rounds: Sequence[Round]) -> list[str]:
    rates = [1 / ratio for ratio in _ratios(row, rounds, "wall")]
    less = [1 / ratio for ratio in _ratios(row, rounds, "cpu")]
    figures = [f"{1e6 / _median(row, rounds, 'wall'):,.0f}", f"{_median(row, rounds, 'cpu'):.0f}"]
    commands = f"{_median(row, rounds, 'commands'):.1f}"
    return [row.name, *figures, commands, _spread(row, rates), _spread(row, less), _at_least(row.target, rates)]


def _median(row: Row, rounds: Sequence[Round], figure: str) -> float:
    return median(round_[row.case][figure] for round_ in rounds)


def _ratios(row: Row, rounds: Sequence[Round], figure: str) -> list[float]:
    return [round_[row.case][figure] / round_[row.stock][figure] for round_ in rounds]


def _spread(row: Row, ratios: Sequence[float]) -> str:
    if row.case == row.stock:
        return "1"
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _at_most(target: float | None, ratios: Sequence[float]) -> str:
    return "" if target is None else f"{target:.2f}: {'met' if median(ratios) <= target else 'missed'}"


def _at_least(target: float | None, ratios: Sequence[float]) -> str:
    return "" if target is None else f"{target:.0f}: {'met' if median(ratios) >= target else 'missed'}"
