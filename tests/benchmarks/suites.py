"""
What is compared with what, and in which order it is measured.

Cases take turns (A B C, C B A, A B C, ...), a few hundred calls at a time, and
a ratio is taken between two that were measured in the same round.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from tests.benchmarks.lanes import Case, Figures, Lane, Place
from tests.benchmarks.subjects import ADD_ONS, Flavour, Subject, is_installed

__all__ = [
    "AGAIN",
    "FIRST",
    "LOGS",
    "MANY",
    "ONE",
    "RUN",
    "RUN_FIRST",
    "RUN_QUICKLY",
    "Pace",
    "Round",
    "Row",
    "groups_of",
    "measure",
]


@dataclass(frozen=True)
class Row:
    """
    One line of a table: a case, and the one it is compared with.

    Attributes:
        target:
            Our aim for the ratio to *stock*.
    """

    name: str
    case: Case
    stock: Case
    target: float | None = None


#: Each case of a group, measured once.
Round = dict[Case, Figures]


@dataclass(frozen=True)
class Pace:
    """
    How much to measure.

    Attributes:
        calls:
            In one measurement.

        rounds:
            At most, with the same processes.

        seconds:
            After which no further round is begun with them; there is always one.

        fresh:
            How often all of that is done, at most, each time with fresh processes.

        enough:
            Seconds after which nothing is begun that was measured before.
    """

    calls: int
    rounds: int
    seconds: float
    fresh: int
    enough: float


_NAMES: dict[Flavour, str] = {
    "dict": "stock",
    "pydantic": "stock, `pydantic=True`",
    "celerykit": "celerykit",
    "once": "celerykit, `once=Once()`",
    "celery-once": "celery-once, `QueueOnce`",
    "celery-singleton": "celery-singleton, `Singleton`",
}

_PLAIN: tuple[Flavour, ...] = ("dict", "pydantic", "celerykit")

#: Without keys and with: what is there of it.
_KEYED: list[Flavour] = ["dict", "celerykit", "once", *filter(is_installed, ADD_ONS)]


def _row(how: str, flavour: Flavour, *, results: bool, target: float | None = None, against: str | None = None) -> Row:
    return Row(
        name=f"{_NAMES[flavour]}, `{how}`, {'stored' if results else 'ignored'}",
        case=Case(how, Subject(flavour, results)),
        stock=Case(against or how, Subject("dict", results)),
        target=target if flavour == "celerykit" else None,
    )


def _own_defaults(how: str) -> Row:
    return Row(
        name=f"celerykit with its own defaults, `{how}`, stored",
        case=Case(how, Subject("celerykit", results=True, own_defaults=True)),
        stock=Case(how, Subject("dict", results=True)),
    )


def _keyed(how: str, *, results: bool) -> list[Row]:
    return [
        Row(_NAMES[flavour], case=Case(how, Subject(flavour, results)), stock=Case(how, Subject("dict", results)))
        for flavour in _KEYED
    ]


ONE = [_row("delay", flavour, results=results, target=1.15) for results in (False, True) for flavour in _PLAIN]

MANY = [
    row
    for results in (False, True)
    for row in (
        _row("delay", "dict", results=results),
        _row("group", "dict", results=results, against="delay"),
        _row("enqueue_many", "celerykit", results=results, against="delay", target=5.0),
    )
]

RUN = [
    *(_row("prefork", flavour, results=results, target=1.10) for results in (False, True) for flavour in _PLAIN),
    _own_defaults("prefork"),
    *(_row("solo", flavour, results=False, target=1.10) for flavour in ("dict", "celerykit")),
]

FIRST, AGAIN, RUN_FIRST = _keyed("first", results=False), _keyed("again", results=False), _keyed("keys", results=True)

#: Of a task that does nothing, every call of which is told.
_TOLD = Case("logs", Subject("dict", results=False))

LOGS = [
    Row("stock, text", case=_TOLD, stock=_TOLD),
    *(
        Row(f"celerykit, {name}", Case("logs", Subject("celerykit", False, log_format=kind)), _TOLD, target=target)
        for name, kind, target in (
            ("JSON", "json", 1.10),
            ("text", "text", None),
            ("Celery's own text", "celery", None),
        )
    ),
]

RUN_QUICKLY = [row for row in RUN if row.case.how == "prefork" and row.case.subject.flavour != "pydantic"]


def groups_of(*tables: Sequence[Row]) -> list[list[Case]]:
    """Give the cases that *tables* need: in one group what is compared with the same."""
    groups: dict[Case, dict[Case, None]] = {}
    for row in (row for rows in tables for row in rows):
        groups.setdefault(row.stock, {row.stock: None})[row.case] = None
    return [list(group) for group in groups.values()]


def measure(where: Place, pace: Pace, groups: Sequence[tuple[type[Lane], Sequence[Case]]]) -> list[Round]:
    """Measure all *groups*, once at least."""
    deadline = time.monotonic() + pace.enough
    rounds: list[Round] = []
    for turn in range(pace.fresh):
        for kind, group in groups:
            if turn == 0 or time.monotonic() < deadline:
                print(f"measuring {group[0].how} and what compares with it", file=sys.stderr, flush=True)
                rounds += _take_turns(kind, where, group, pace, deadline=deadline)
    return rounds


def _take_turns(kind: type[Lane], where: Place, group: Sequence[Case], pace: Pace, *, deadline: float) -> list[Round]:
    """Measure the cases of *group* again and again, each in a fresh process of *kind*."""
    with ExitStack() as stack:
        lanes = [stack.enter_context(kind(where, case, database=number)) for number, case in enumerate(group)]
        for lane in lanes:
            lane.warm_up()
        deadline = min(deadline, time.monotonic() + pace.seconds)
        rounds: list[Round] = []
        while not rounds or (len(rounds) < pace.rounds and time.monotonic() < deadline):
            in_order = lanes if len(rounds) % 2 == 0 else lanes[::-1]
            rounds.append({lane.case: lane.measure(pace.calls) for lane in in_order})
        return rounds
