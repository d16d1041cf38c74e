"""
When a task is sent by itself: intervals and cron text, read strictly, and the schedules an app declares.

They become entries of Celery's own ``beat_schedule``, so any scheduler sends
them: ours, Celery's, RedBeat's or django-celery-beat's.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

import celery
from celery.schedules import BaseSchedule, crontab
from celery.schedules import schedule as interval

from celerykit.errors import InvalidOptions, InvalidPayload

if TYPE_CHECKING:
    from celerykit.contract import Contract

__all__ = ["Entry", "Every", "Missed", "When", "check_call", "declare", "declare_task", "install", "missed_of", "read"]

#: Seconds, or a ``timedelta``.
Every = timedelta | float

#: An interval, cron text, or one of Celery's schedules.
When = Every | str | BaseSchedule

#: What follows on runs for which no beat was there: one run, as Celery has it, or none.
Missed = Literal["once", "skip"]


class Entry(TypedDict):
    """What stands under a name in ``beat_schedule``."""

    task: str
    schedule: BaseSchedule
    args: Any
    kwargs: Any
    options: dict[str, Any]


# One schedule


def read(
    when: When | None = None,
    *,
    every: Every | BaseSchedule | None = None,
    cron: str | BaseSchedule | None = None,
    missed: Missed = "once",
    what: str = "schedule",
) -> BaseSchedule:
    """
    Read one of *when*, *every* and *cron*.

    What it gives may stand wherever Celery takes a schedule.

    Args:
        when:
            Text is cron text, a number is seconds.

        missed:
            ``skip`` not to make up for runs that no beat was there to send.
            Only `celerykit.beat.Scheduler` knows it.

        what:
            What it is the schedule of, for errors.

    Raises:
        InvalidOptions: It is not a schedule. The message says how to write it.
    """
    given = [value for value in (when, every, cron) if value is not None]
    if len(given) != 1:
        raise InvalidOptions(f"{what}: give either every=timedelta(...) or cron='*/5 * * * *', and not both.")
    if missed not in ("once", "skip"):
        raise InvalidOptions(f"{what}: missed must be 'once' or 'skip', got {missed!r}.")
    if isinstance(every, str) or isinstance(cron, int | float | timedelta):
        raise InvalidOptions(f"{what}: every is seconds or a timedelta, and cron is text such as '*/5 * * * *'.")
    return _marked(_read(given[0], what), missed)


def missed_of(schedule: BaseSchedule) -> Missed:
    """Tell what follows on runs that no beat was there to send."""
    return "skip" if getattr(schedule, "missed", "once") == "skip" else "once"


def _marked(schedule: BaseSchedule, missed: Missed) -> BaseSchedule:
    if missed == missed_of(schedule) or missed == "once":
        return schedule
    # One that a user made may be that of other entries, too.
    return _copied(schedule, missed)


def _copied(schedule: BaseSchedule, missed: Missed) -> BaseSchedule:
    copied: Any = copy.copy(schedule)
    # On the schedule and not in the entry, whose keys other schedulers do not expect. Celery's copies lose it.
    copied.missed = missed
    return cast("BaseSchedule", copied)


def _read(given: object, what: str) -> BaseSchedule:
    if isinstance(given, BaseSchedule):
        return given
    if isinstance(given, str):
        return _read_cron(given, what)
    if isinstance(given, timedelta):
        return _read_seconds(given.total_seconds(), given, what)
    if isinstance(given, int | float) and not isinstance(given, bool):
        return _read_seconds(given, given, what)
    raise InvalidOptions(
        f"{what}: a schedule is a timedelta, seconds, cron text or a schedule of Celery's; got {type(given).__name__}."
    )


def _read_seconds(seconds: float, given: Every, what: str) -> BaseSchedule:
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidOptions(f"{what}: an interval must be longer than nothing, and end; got {given}.")
    try:
        return interval(given if isinstance(given, timedelta) else timedelta(seconds=given))
    except OverflowError:
        raise InvalidOptions(f"{what}: an interval of {given} seconds is longer than a timedelta can be.") from None


# Cron text


@dataclass(frozen=True, slots=True)
class _Field:
    """One of the five, by what may stand there."""

    name: str
    low: int
    high: int
    words: tuple[str, ...] = ()

    @property
    def all(self) -> frozenset[int]:
        return frozenset(range(self.low, self.high + 1))


_MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
_DAYS = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")

_MINUTE = _Field("minute", 0, 59)
_HOUR = _Field("hour", 0, 23)
_DAY = _Field("day of the month", 1, 31)
_MONTH = _Field("month", 1, 12, _MONTHS)
_WEEKDAY = _Field("day of the week", 0, 6, _DAYS)
_FIELDS = (_MINUTE, _HOUR, _DAY, _MONTH, _WEEKDAY)

#: Sunday's other number, as cron has it and Celery has not.
_SUNDAY = "7"

_PART = re.compile(r"(?:\*|(?P<first>\w+)(?:-(?P<last>\w+))?)(?:/(?P<step>\w+))?", re.ASCII)


class _Wrong(Exception):
    """Says what is wrong with cron text."""


def _read_cron(text: str, what: str) -> BaseSchedule:
    """
    Read five fields.

    Celery's own reader takes "mon" for a minute, "1-5-7" for "1-5" and "*/90" for "0".
    """
    try:
        minute, hour, day, month, weekday = _read_fields(text)
        return crontab(minute=minute, hour=hour, day_of_month=day, month_of_year=month, day_of_week=weekday)
    except (_Wrong, ValueError) as error:  # (a ValueError: a day that its months do not have)
        raise InvalidOptions(f"{what}: cron text {text!r}: {error}") from None


def _read_fields(text: str) -> list[str]:
    fields = text.split()
    if len(fields) != len(_FIELDS):
        names = ", ".join(field.name for field in _FIELDS)
        raise _Wrong(f"there must be five fields ({names}), and there are {len(fields)}.")
    values = [_values(field, written) for field, written in zip(_FIELDS, fields, strict=True)]
    if values[_FIELDS.index(_DAY)] != _DAY.all and values[_FIELDS.index(_WEEKDAY)] != _WEEKDAY.all:
        raise _Wrong(
            "with a day of the month and a day of the week, cron runs on either and Celery only on both. Declare two "
            "schedules, or write celery.schedules.crontab(...) for both."
        )
    return [_written(field, text, found) for field, text, found in zip(_FIELDS, fields, values, strict=True)]


def _written(field: _Field, text: str, values: frozenset[int]) -> str:
    """Leave *text* as it is, where Celery reads it as we do."""
    if text == "*" or (re.fullmatch(r"[\d*/,-]+", text) and not (field is _WEEKDAY and _SUNDAY in text)):
        return text
    return ",".join(map(str, sorted(values)))


def _values(field: _Field, text: str) -> frozenset[int]:
    return frozenset(value for part in text.split(",") for value in _values_of(field, part))


def _values_of(field: _Field, part: str) -> Iterator[int]:
    found = _PART.fullmatch(part)
    if found is None:
        raise _Wrong(f"the {field.name} {part!r} is none of *, 5, 1-5, */5 and 1-5/2, nor several with commas.")
    first, last, step = found["first"], found["last"], found["step"]
    if first is not None and last is None:
        if step is not None:
            raise _Wrong(f"the {field.name} {part!r} has a step but no end; write {first}-{field.high}/{step}.")
        return iter([_number(field, first)])
    return iter(_stepped(field, part, _range(field, first, last), step))


def _range(field: _Field, first: str | None, last: str | None) -> list[int]:
    if first is None or last is None:
        return sorted(field.all)
    begin, end = _number(field, first), _number(field, last)
    # Past the end it goes on from the beginning, as with Celery: 22-2, fri-mon.
    length = (end - begin) % len(field.all) + 1
    return [field.low + (begin - field.low + n) % len(field.all) for n in range(length)]


def _stepped(field: _Field, part: str, values: list[int], step: str | None) -> list[int]:
    if step is None:
        return values
    if not step.isdecimal() or not 0 < int(step) < len(values):
        raise _Wrong(
            f"the {field.name} {part!r} must have a step from 1 to {len(values) - 1}, as it starts anew with each "
            "round; for longer intervals use every=timedelta(...)."
        )
    return values[:: int(step)]


def _number(field: _Field, text: str) -> int:
    if field is _WEEKDAY and text == _SUNDAY:
        return 0
    if text.isdecimal():
        if int(text) in field.all:
            return int(text)
    else:
        # Three letters are enough.
        names = [n for n, word in enumerate(field.words, field.low) if text.lower() in (word, word[:3])]
        if names:
            return names[0]
    words = f", or {field.words[0][:3]} to {field.words[-1][:3]}" if field.words else ""
    raise _Wrong(f"the {field.name} must be {field.low} to {field.high}{words}; got {text!r}.")


# The schedules of an app


def check_call(contract: Contract, *, what: str) -> None:
    """
    Refuse to schedule a task by its decorator if it cannot be called without arguments.

    Raises:
        InvalidOptions: It cannot.
    """
    try:
        contract.dump((), {})
    except InvalidPayload as error:
        raise InvalidOptions(
            f"{what}: a task with schedule= is sent without arguments. {error} "
            "Use app.schedule(task.s(...), every=... or cron=...)."
        ) from None


def declare_task(app: Any, task: type[celery.Task[Any, Any]]) -> None:
    """
    Note the schedule in a task's own class, if there is one, under the task's name.

    May be done again for the same task.

    Raises:
        InvalidOptions: It is none, the task needs arguments, or the name is taken.
    """
    when, name = vars(task).get("schedule"), str(task.name)
    if when is None:
        return
    contract: Contract | None = getattr(task, "contract", None)
    if contract is not None:
        check_call(contract, what=name)
    entry = Entry(task=name, schedule=read(when, what=name), args=(), kwargs={}, options={})
    if app.schedules.get(name) != entry:
        _note(app, name, entry)


def declare(
    app: Any,
    sig: Any,
    *,
    every: Every | BaseSchedule | None = None,
    cron: str | BaseSchedule | None = None,
    name: str | None = None,
    missed: Missed = "once",
    options: Mapping[str, Any] | None = None,
) -> str:
    """
    Note that the call in *sig* is to be sent by itself, under *name* or that of its task.

    Returns:
        The name.

    Raises:
        InvalidOptions: The schedule is none, the signature is not that of one
            task, or the name is taken.

        InvalidPayload: The signature lacks arguments.
    """
    task = getattr(sig, "task", None)
    if not isinstance(sig, celery.Signature) or not task or sig.get("subtask_type"):
        raise InvalidOptions(
            f"{name or 'schedule'}: a schedule takes the signature of one task, task.s(...). "
            "For a chain or a group, write a task that sends it."
        )
    name = name or str(task)
    args, kwargs = sig.args, sig.kwargs
    contract: Contract | None = getattr(getattr(sig, "_type", None), "contract", None)
    if contract is not None:
        args, kwargs = contract.dump(args, kwargs)
    entry = Entry(
        task=str(task),
        schedule=read(every=every, cron=cron, missed=missed, what=name),
        args=tuple(args),
        kwargs=dict(kwargs),
        options={**sig.options, **(options or {})},
    )
    _note(app, name, entry)
    return name


def _note(app: Any, name: str, entry: Entry) -> None:
    if name in app.schedules:
        raise _taken(name, "by another schedule")
    # A schedule knows its app, and one task may belong to several.
    entry["schedule"] = _copied(entry["schedule"], missed_of(entry["schedule"]))
    app.schedules[name] = entry
    if app.finalized:
        install(app)


def install(app: Any, **_signal: Any) -> None:
    """
    Put the declared schedules into ``beat_schedule``. May be done again.

    Not when they are declared: the configuration is not read yet, and may
    still be set as a whole. A receiver of Celery's ``on_after_finalize``.

    Raises:
        InvalidOptions: ``beat_schedule`` has other entries by these names.
    """
    if not app.schedules:
        return
    there = app.conf.beat_schedule or {}
    for name, entry in app.schedules.items():
        if there.get(name, entry) != entry:
            raise _taken(name, "in beat_schedule")
    if any(name not in there for name in app.schedules):
        # A new mapping: Celery's default is one for all apps.
        app.conf.beat_schedule = {**there, **app.schedules}


def _taken(name: str, where: str) -> InvalidOptions:
    return InvalidOptions(f"{name}: this name is taken {where}; give one of them another: app.schedule(..., name=...).")
