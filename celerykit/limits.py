"""
Limits on how often a task runs, and on how many of it run at once, in all workers together.

    limits=(Concurrent(5, by="order.tenant"), Rate("100/m"))

A call over a limit is put off: it uses up no attempt, and holds no process of a worker. Slots are counted by our own
store: the library ``limits`` brings storages with connections of their own, and none in an SQL database.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Protocol, TypeAlias

from pydantic_core import PydanticSerializationError, to_jsonable_python

from celerykit import events
from celerykit.call import Call, Later, Next
from celerykit.contract import Contract
from celerykit.errors import InvalidOptions, LimitReached, StoreUnavailable
from celerykit.marks import types_of_field

__all__ = ["Concurrent", "Keeper", "Limits", "Rate", "Slots", "check_limits", "limited", "pause"]

#: What a limit is counted by: a parameter or a field in it, a function of the arguments, or nothing.
By: TypeAlias = str | Callable[..., Any] | None

_RATE = re.compile(r"([0-9]{1,9})/([0-9]{0,9})([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

#: Each slot that is taken is an entry in the store.
_MOST = 100_000

_LONGEST_PERIOD = 366 * 86400

#: Seconds that a call is put off, at least; and at most, since some brokers do not let a message wait for hours.
_SHORTEST, _LONGEST = 0.05, 600.0

#: When one of the slots that are given back will be free nobody knows: a call looks again, at first after this.
_FIRST_LOOK = 0.5

#: The longer a call has waited, the longer it may wait for another part of that; but no longer than this, in seconds.
_PATIENCE, _MOST_PATIENCE = 0.25, 30.0

#: A name in a key of the store is cut to this.
_LONGEST_NAME = 120


@dataclass(frozen=True, slots=True, init=False)
class Rate:
    """
    Start no more than so many calls in any span of time: ``Rate("100/m")``, ``Rate("5/s", by="tenant")``.

    Args:
        rate:
            ``<number>/<span>``; a span is ``s``, ``m``, ``h`` or ``d``, or
            several: ``"100/15m"``.

        by:
            What is counted apart: the name of a parameter, a field in it
            (``"order.tenant"``), or a function that gets the typed arguments
            as the task would. Without it, all calls of the task together.

    Raises:
        InvalidOptions: It makes no sense.
    """

    rate: str
    by: By = None
    limit: int = field(default=0, repr=False, compare=False)
    #: Seconds.
    per: float = field(default=0.0, repr=False, compare=False)

    def __init__(self, rate: str, *, by: By = None) -> None:
        found = _RATE.fullmatch(rate) if isinstance(rate, str) else None
        if found is None:
            raise InvalidOptions(
                f"Rate(…) must be a text such as '100/m', '5/s', '1000/h', '10/d' or '100/15m', got {_shown(rate)}."
            )
        limit, per = int(found[1]), int(found[2] or 1) * _UNITS[found[3]]
        if not 1 <= per <= _LONGEST_PERIOD:
            raise InvalidOptions(f"Rate({rate!r}): its span must be between a second and a year.")
        _check_limit(f"Rate({rate!r})", limit)
        _check_by("Rate", by)
        _set(self, rate=rate, by=by, limit=limit, per=float(per))

    def __str__(self) -> str:
        return f"Rate({self.rate!r}{_by(self.by)})"


@dataclass(frozen=True, slots=True, init=False)
class Concurrent:
    """
    Run no more than so many calls at once: ``Concurrent(5)``, ``Concurrent(1, by="order.tenant")``.

    Args:
        limit:
            How many.

        by:
            As for `Rate`.

    Raises:
        InvalidOptions: It makes no sense.
    """

    limit: int
    by: By = None

    def __init__(self, limit: int, *, by: By = None) -> None:
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise InvalidOptions(f"Concurrent(…) must be a whole number, got {_shown(limit)}.")
        _check_limit(f"Concurrent({limit})", limit)
        _check_by("Concurrent", by)
        _set(self, limit=limit, by=by)

    def __str__(self) -> str:
        return f"Concurrent({self.limit}{_by(self.by)})"


Rule: TypeAlias = Rate | Concurrent


class Slots(Protocol):
    """What limits need of a store."""

    def take(self, key: str, holder: str, *, limit: int, ttl: float) -> float:
        """Take a slot for *ttl* seconds, and return 0; or else, in how many seconds one is free."""
        ...

    def give(self, key: str, holder: str) -> None:
        """Give a slot back."""
        ...


class Keeper(Protocol):
    """What calls a function from time to time, several times in a lease."""

    def keep(self, name: str, renew: Callable[[], None]) -> None:
        """Begin to."""
        ...

    def drop(self, name: str) -> None:
        """End it, if it has begun."""
        ...


@dataclass(frozen=True)
class Limits:
    """
    The limits of one task.

    Args:
        contract:
            The task's, to which ``by`` must fit.

        store:
            Gives the store when a call needs it.

        lease:
            Gives the seconds after which the slots of a process that died are free.

        renewal:
            Keeps the slots of running calls.

    Raises:
        InvalidOptions: A rule is none, or its ``by`` is nothing that the task is called with.
    """

    contract: Contract
    rules: Sequence[Rule]
    store: Callable[[], Slots]
    lease: Callable[[], float]
    renewal: Keeper

    def __post_init__(self) -> None:
        check_limits(self.contract, self.rules)
        _set(self, rules=_rules(self.contract.task, self.rules))

    def take(self, call: Call) -> list[Slot]:
        """
        Take a slot of each limit, or none.

        Raises:
            Later: A limit is reached.

            StoreUnavailable: Nobody knows.
        """
        taken: list[Slot] = []
        try:
            for slot in self._slots(call):
                # Before, since a store that fails may have lent it.
                taken.append(slot)
                wait = slot.take()
                if wait > 0:
                    taken.pop()
                    raise _later(slot.rule, wait, call)
        except BaseException:
            for slot in reversed(taken):
                slot.give()
            raise
        return taken

    @contextmanager
    def keeping(self, slots: Iterable[Slot]) -> Iterator[None]:
        """Keep the slots of what runs while the block does, and give them back then."""
        kept = [slot for slot in slots if isinstance(slot.rule, Concurrent)]
        try:
            for slot in kept:
                self.renewal.keep(slot.name, slot.renew)
            yield
        finally:
            for slot in kept:
                self.renewal.drop(slot.name)
                slot.give()

    def _slots(self, call: Call) -> list[Slot]:
        store, lease, holder = self.store(), self.lease(), f"{call.id[:_LONGEST_NAME]}:{secrets.token_hex(8)}"
        slots = [
            Slot(store, self._key(place, rule, call), holder, rule, rule.per if isinstance(rule, Rate) else lease)
            for place, rule in enumerate(self.rules)
        ]
        # What is given back first: less is taken in vain.
        return sorted(slots, key=lambda slot: isinstance(slot.rule, Rate))

    def _key(self, place: int, rule: Rule, call: Call) -> str:
        kind = type(rule).__name__.lower()
        return f"slots:{_bounded(call.task)}:{kind}{place}:{_digest(rule, call)}"


def check_limits(contract: Contract, rules: Any) -> None:
    """
    Refuse rules that make no sense for a task, when it is declared.

    Raises:
        InvalidOptions: A rule is none, or its ``by`` is nothing that the task is called with.
    """
    for rule in _rules(contract.task, rules):
        if isinstance(rule.by, str):
            _check_path(contract, rule, rule.by.split("."))


class Slot:
    """
    One slot of one limit, for one run.

    Attributes:
        name:
            Its own, among all in a process.
    """

    def __init__(self, store: Slots, key: str, holder: str, rule: Rule, ttl: float) -> None:
        self.rule = rule
        self.name = f"{key} {holder}"
        self._store, self._key, self._holder, self._ttl = store, key, holder, ttl
        # A renewal that is under way when the slot is given back would take it again.
        self._lock = threading.Lock()
        self._is_over = False

    def take(self) -> float:
        """Take it, and return 0; or else, in how many seconds one is free."""
        return self._store.take(self._key, self._holder, limit=self.rule.limit, ttl=self._ttl)

    def renew(self) -> None:
        """Let its time begin anew, unless it was given back."""
        with self._lock:
            if not self._is_over and self.take() > 0:
                events.LIMIT_LOST.tell(slot=self.name)

    def give(self) -> None:
        """Give it back. Never fails: what came of the call stays what it is."""
        try:
            with self._lock:
                self._is_over = True
                self._store.give(self._key, self._holder)
        except Exception as error:  # noqa: BLE001  (an edge: the store's errors, and a time limit that strikes here)
            events.LIMIT_NOT_GIVEN_BACK.tell(slot=self.name, delay=self._ttl, error=error)


def limited(call_next: Next, call: Call) -> Any:
    """
    Let a call run that is within the limits of its task, and put off all others.

    Stands inside of `validated`: limits are counted by typed arguments. And outside of `retried`: being put off is no
    error of the task's; a retry, which is a run of its own, is counted again.

    Raises:
        Later: A limit is reached, or the store is away.
    """
    limits: Limits | None = call.policies.get("limits")
    if limits is None or not limits.rules:
        return call_next(call)
    with limits.keeping(_taken(limits, call)):
        return call_next(call)


def _taken(limits: Limits, call: Call) -> list[Slot]:
    try:
        return limits.take(call)
    except StoreUnavailable as error:
        then = call.policies.get("on_store_down", "retry")
        events.LIMIT_UNKNOWN.tell(task=call.task, id=call.id, then=then, error=error)
        if then == "fail":
            raise
        if then == "run":
            return []
        raise Later(_look(_waited(call), _chance()), attempt=call.attempt, kind="snooze", error=error) from error


# How long


def _later(rule: Rule, wait: float, call: Call) -> Later:
    delay = pause(rule, wait, waited=_waited(call), chance=_chance())
    error = LimitReached(f"{call.task}: its limit {rule} is reached; the call waits.")
    return Later(delay, attempt=call.attempt, kind="snooze", error=error)


def pause(rule: Rule, wait: float, *, waited: float, chance: float) -> float:
    """
    Give the seconds after which a call that is over a limit looks again.

    Args:
        wait:
            Seconds until the store knows of a free slot.

        waited:
            Seconds for which the call was put off so far. Those that wait for
            long look more seldom, so that many together do not ask too often.

        chance:
            In [0, 1): so that they do not come back together.
    """
    if isinstance(rule, Rate):
        spread = max(rule.per / rule.limit, waited * _PATIENCE)
        seconds = min(wait, _LONGEST) + chance * min(spread, _MOST_PATIENCE)
    else:
        seconds = min(wait, _look(waited, chance))
    return max(_SHORTEST, seconds)


def _look(waited: float, chance: float) -> float:
    return min(max(_FIRST_LOOK, waited * _PATIENCE), _MOST_PATIENCE) * (1 - chance / 2)


def _waited(call: Call) -> float:
    """Tell since when the call was put off, again and again."""
    rows = takewhile(lambda row: row.outcome == "snooze", reversed(call.headers.ledger))
    now = time.time()
    return max(0.0, now - min((row.started for row in rows), default=now))


def _chance() -> float:
    # An attacker gains nothing from guessing a delay.
    return random.random()  # noqa: S311


# By what


def _digest(rule: Rule, call: Call) -> str:
    """Give what slots are counted by. A digest: the value may be long, or not for others to see."""
    if rule.by is None:
        return "all"
    if callable(rule.by):
        value = rule.by(**call.contract.parameters.named_by(rule.by, call.args, call.kwargs))
    else:
        value = _value(rule.by.split("."), call)
    try:
        written = json.dumps(to_jsonable_python(value), sort_keys=True)
    except (PydanticSerializationError, TypeError, ValueError):
        raise InvalidOptions(
            f"{call.task}: what {rule} is counted by is {_shown(value)}; it must be a text, a number, a UUID, a date, "
            "or several of them in a tuple."
        ) from None
    return hashlib.sha256(written.encode()).hexdigest()[:32]


def _value(path: Sequence[str], call: Call) -> Any:
    parameters = call.contract.parameters
    value: Any = {**parameters.defaults, **parameters.bind(call.args, call.kwargs)}
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
    return value


def _bounded(task: str) -> str:
    if len(task) <= _LONGEST_NAME:
        return task
    return f"{task[: _LONGEST_NAME - 9]}-{hashlib.sha256(task.encode()).hexdigest()[:8]}"


# Declaring


def _rules(task: str, given: Any) -> tuple[Rule, ...]:
    rules = (given,) if isinstance(given, Rate | Concurrent) else given
    if isinstance(rules, list | tuple) and all(isinstance(rule, Rate | Concurrent) for rule in rules):
        return tuple(rules)
    raise InvalidOptions(
        f"{task}: limits must be Rate(…) and Concurrent(…) in a tuple, such as limits=(Rate('100/m'),); "
        f"got {_shown(given)}."
    )


def _check_limit(what: str, limit: int) -> None:
    if limit < 1:
        raise InvalidOptions(f"{what} would let nothing run; it must be at least 1.")
    if limit > _MOST:
        raise InvalidOptions(
            f"{what}: more than {_MOST} are too many for the store to count. Of a rate, shorten the span."
        )


def _check_by(rule: str, by: Any) -> None:
    if isinstance(by, str):
        if not all(name.isidentifier() for name in by.split(".")):
            raise InvalidOptions(
                f"{rule}(by=…) must be the name of a parameter, or of a field in it such as 'order.tenant', got {by!r}."
            )
    elif by is not None and (not callable(by) or inspect.iscoroutinefunction(by)):
        raise InvalidOptions(
            f"{rule}(by=…) must be the name of a parameter, a plain function of the task's arguments, or None; "
            f"got {_shown(by)}."
        )


def _check_path(contract: Contract, rule: Rule, path: Sequence[str]) -> None:
    known = contract.parameters.names
    if path[0] not in known:
        near = difflib.get_close_matches(path[0], known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InvalidOptions(
            f"{contract.task}: {rule}: there is no parameter {path[0]!r}{hint}. A field is named with its parameter, "
            "as in 'order.tenant'."
        )
    types = [contract.types.get(path[0], Any)]
    for place, name in enumerate(path[1:], start=1):
        types = [inner for one in types for inner in types_of_field(one, name)]
        if not types:
            where = ".".join(path[:place])
            raise InvalidOptions(f"{contract.task}: {rule}: {where!r} has no field {name!r}.")


def _by(by: By) -> str:
    if by is None:
        return ""
    return f", by={by!r}" if isinstance(by, str) else f", by={getattr(by, '__qualname__', type(by).__name__)}"


def _shown(value: Any) -> str:
    # Of anything but numbers, classes and short texts the type: its repr may be long or hold a secret.
    if isinstance(value, int | float | type) or (isinstance(value, str) and len(value) <= 20):
        return repr(value)
    return f"a value of type {type(value).__name__}"


def _set(value: Any, **facts: Any) -> None:
    # A frozen dataclass that accepts more than it holds.
    for name, fact in facts.items():
        object.__setattr__(value, name, fact)
