"""
Retries as data: a policy says what follows on which error, and `decide` applies it.

    Retry(on={httpx.TransportError: Backoff(base=1, cap=60), CardDeclined: Dead()}, attempts=5)

Nothing here waits, sends or looks at a clock but the step `retried`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeAlias

from celerykit.call import Call, Later, Next, Outcome
from celerykit.errors import InvalidOptions, InvalidPayload, TaskInterrupted
from celerykit.headers import Headers

__all__ = [
    "DROPPED",
    "Again",
    "Backoff",
    "Dead",
    "Decision",
    "Drop",
    "GiveUp",
    "Remedy",
    "Retry",
    "RetryAfter",
    "Row",
    "Snooze",
    "decide",
    "retried",
    "spoken",
]

#: Seconds, or a timedelta.
Duration: TypeAlias = float | timedelta

#: An attribute of an error that is to leave no dead letter. It travels with the error to the worker's parent process.
DROPPED = "celerykit_dropped"

#: Shorter, and jitter could round it to nothing; longer, and neither `datetime` nor a broker should be trusted with it.
_SHORTEST, _LONGEST = 0.001, 366 * 86400.0

#: How many rows `Retry.describe` shows before it says that it goes on like that.
_SHOWN_ROWS = 10


@dataclass(frozen=True, slots=True, init=False)
class Backoff:
    """
    Try again, waiting longer each time.

    Args:
        base:
            How long to wait after the first attempt.

        factor:
            What each wait is multiplied by for the next; 1 for equal waits.

        cap:
            The longest wait.

        jitter:
            The part of each wait that is left to chance, so that calls which
            failed together do not come back together. With 0.5 a wait of 8 s
            is one of 4 to 8 s, and never nothing.
    """

    base: float = 1.0
    factor: float = 2.0
    cap: float = 600.0
    jitter: float = 0.5

    def __init__(self, base: Duration = 1.0, factor: float = 2.0, cap: Duration = 600.0, jitter: float = 0.5) -> None:
        base, cap = _seconds("Backoff(base=…)", base), _seconds("Backoff(cap=…)", cap)
        if not (_is_number(factor) and factor >= 1):
            raise InvalidOptions(f"Backoff(factor=…) must be a number of at least 1, got {factor!r}.")
        if not (_is_number(jitter) and 0 <= jitter < 1):
            raise InvalidOptions(f"Backoff(jitter=…) must be a part: at least 0, and less than 1, got {jitter!r}.")
        if base > cap:
            raise InvalidOptions(
                f"Backoff(base=…) is {spoken(base)} and its cap {spoken(cap)}: the cap would shorten the first wait. "
                "Give a larger cap."
            )
        _set(self, base=base, factor=float(factor), cap=cap, jitter=float(jitter))

    def longest(self, attempt: int) -> float:
        """Give the seconds to wait after *attempt*, before chance shortens them."""
        try:
            return min(self.cap, self.base * self.factor ** (attempt - 1))
        except OverflowError:
            return self.cap

    def shortest(self, attempt: int) -> float:
        """Give the seconds to wait after *attempt* when chance shortens them most."""
        return self.longest(attempt) * (1 - self.jitter)

    def delay(self, error: BaseException, *, attempt: int, chance: float, now: float) -> float:
        """Give the seconds to wait after *attempt*; *chance* is in [0, 1)."""
        return self.longest(attempt) * (1 - self.jitter * chance)

    def __str__(self) -> str:
        wait = f"after {spoken(self.base)}"
        if self.factor != 1 and self.base < self.cap:
            wait += f", each wait {self.factor:g} times the last, at most {spoken(self.cap)}"
        return f"try again {wait}" + (f"; chance shortens a wait by up to {self.jitter:.0%}" if self.jitter else "")


@dataclass(frozen=True, slots=True, init=False)
class RetryAfter:
    """
    Try again when the other side asks for it.

    Looks for the error's own ``retry_after`` (a number, timedelta or datetime),
    then for the header ``Retry-After`` of its response, as httpx, requests and
    botocore give it.

    Args:
        default:
            What to do when nothing, or nothing sensible, is asked for: seconds,
            or a `Backoff`.

        cap:
            The longest wait that is granted.
    """

    default: Backoff
    cap: float

    def __init__(self, default: Backoff | Duration | None = None, cap: Duration = 3600.0) -> None:
        cap = _seconds("RetryAfter(cap=…)", cap)
        if default is None:
            default = Backoff(base=min(1.0, cap), cap=min(600.0, cap))
        elif not isinstance(default, Backoff):
            wait = _seconds("RetryAfter(default=…)", default)
            default = Backoff(base=wait, factor=1, cap=wait)
        if default.cap > cap:
            raise InvalidOptions(
                f"RetryAfter(default=…) may wait {spoken(default.cap)} and its cap is {spoken(cap)}. "
                "Give a larger cap, or a default with a smaller one."
            )
        _set(self, default=default, cap=cap)

    def delay(self, error: BaseException, *, attempt: int, chance: float, now: float) -> float:
        """Give the seconds to wait after *attempt*; *now* is in seconds since 1970."""
        asked = _asked(error, now)
        if asked is None:
            return self.default.delay(error, attempt=attempt, chance=chance, now=now)
        return max(_SHORTEST, min(asked, self.cap))

    def __str__(self) -> str:
        return f"try again when Retry-After says, at most {spoken(self.cap)}; if it does not, {self.default}"


@dataclass(frozen=True, slots=True)
class Dead:
    """Do not try again: to the dead letters at once."""

    def __str__(self) -> str:
        return "dead letter at once"


@dataclass(frozen=True, slots=True)
class Drop:
    """Do not try again, and keep no dead letter: the call has failed, and that is all."""

    def __str__(self) -> str:
        return "failed, without a dead letter"


#: What follows on an error.
Remedy: TypeAlias = Backoff | RetryAfter | Dead | Drop


class Snooze(Outcome):
    """
    Raised by a task: run me again later, and do not count this as an attempt.

    Args:
        delay:
            Seconds or a timedelta from now; 0 for at once.
    """

    def __init__(self, delay: Duration) -> None:
        seconds = _seconds("Snooze(delay)", delay, shortest=0)
        super().__init__(seconds)
        self.delay = seconds

    def __str__(self) -> str:
        return f"again in {spoken(self.delay)}"


class Row(NamedTuple):
    """
    One line of a delay table: when an attempt starts.

    Attributes:
        error:
            On which error.

        attempt:
            Which attempt is waited for, from 2.

        delay_min, delay_max:
            Seconds after the attempt before it has failed.

        cumulative:
            Seconds of waiting since the first failure, at most.
    """

    error: str
    attempt: int
    delay_min: float
    delay_max: float
    cumulative: float


@dataclass(frozen=True, slots=True, init=False)
class Retry:
    """
    When a task is tried again.

    Args:
        on:
            What follows on which exception. The most specific class wins, as
            if each were its own ``except`` clause, in the best order. Errors
            that are not listed go to the dead letters at once. One class, or
            several in a tuple, stand for a plain `Backoff`.

        attempts:
            How often the task runs at most, the first time included.

        within:
            No attempt starts later than this after the call was first sent, or
            after its countdown or ETA: seconds or a timedelta.

    Raises:
        InvalidOptions: It makes no sense.
    """

    on: Mapping[type[Exception], Remedy]
    attempts: int = 5
    within: float | None = None

    def __init__(
        self,
        on: Mapping[type[Exception], Remedy] | tuple[type[Exception], ...] | type[Exception],
        *,
        attempts: int = 5,
        within: Duration | None = None,
    ) -> None:
        if not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1:
            raise InvalidOptions(
                f"Retry(attempts=…) must be a whole number of at least 1, got {attempts!r}. "
                "It counts all runs, the first one included."
            )
        if within is not None:
            within = _seconds("Retry(within=…)", within)
        _set(self, on=_remedies(on), attempts=attempts, within=within)

    def remedy(self, error: BaseException) -> Remedy:
        """Give what follows on *error*."""
        return next((self.on[kind] for kind in _kinds(error) if kind in self.on), Dead())

    def table(self) -> list[Row]:
        """Give the waits for each error that is tried again, as far as `attempts` and `within` go."""
        return [row for kind, remedy in self.on.items() for row in self._rows(_name(kind), remedy)]

    def _rows(self, error: str, remedy: Remedy) -> Iterator[Row]:
        backoff = remedy.default if isinstance(remedy, RetryAfter) else remedy
        if not isinstance(backoff, Backoff):
            return
        earliest = latest = 0.0
        for attempt in range(1, self.attempts):
            shortest, longest = backoff.shortest(attempt), backoff.longest(attempt)
            earliest, latest = earliest + shortest, latest + longest
            if self.within is not None and earliest > self.within:
                return
            yield Row(error, attempt + 1, shortest, longest, latest)

    def describe(self) -> str:
        """Say it in English, with the delay table."""
        runs = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        lines = [f"at most {runs}" + (f", none later than {spoken(self.within)} after sending" if self.within else "")]
        for kind, remedy in self.on.items():
            lines += [f"on {_name(kind)}: {remedy}", *self._described(_name(kind), remedy)]
        if not {Exception, BaseException} & set(self.on):
            lines.append(f"on any other error: {Dead()}")
        return "\n".join(lines)

    def _described(self, error: str, remedy: Remedy) -> Iterator[str]:
        rows = self._rows(error, remedy)
        for row in islice(rows, _SHOWN_ROWS):
            wait = spoken(row.delay_max)
            if row.delay_min < row.delay_max:
                wait = f"{spoken(row.delay_min)} to {wait}"
            yield f"    attempt {row.attempt:<3} {wait} later, {spoken(row.cumulative)} in all"
        if next(rows, None):
            yield f"    … and so on, to attempt {self.attempts}"


def _kinds(error: BaseException) -> tuple[type, ...]:
    """List what *error* is, the most specific class first."""
    if isinstance(error, TaskInterrupted) and error.__cause__ is not None:
        # It is told apart by what the task raised; `sys.exit()` is not what is meant by on={Exception: …}.
        return (TaskInterrupted, *type(error.__cause__).__mro__)
    return type(error).__mro__


@dataclass(frozen=True, slots=True)
class Again:
    """Run the call again in *delay* seconds, as *attempt*."""

    delay: float
    attempt: int
    kind: Literal["retry", "snooze"] = "retry"


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The call has failed."""

    why: Literal["not retried", "dropped", "attempts used up", "time used up"]


Decision: TypeAlias = Again | GiveUp


def decide(
    policy: Retry | None, error: BaseException, *, attempt: int, elapsed: float, chance: float, now: float
) -> Decision:
    """
    Tell what follows on *error*. The same arguments give the same answer.

    Args:
        attempt:
            Which attempt failed, from 1.

        elapsed:
            Seconds since the call was first sent.

        chance:
            In [0, 1): how much of the jitter is taken.

        now:
            Seconds since 1970: a ``Retry-After`` may be a date.
    """
    if isinstance(error, Snooze):
        return Again(error.delay, attempt, "snooze")
    # It would not fit the next time either.
    remedy = Dead() if policy is None or isinstance(error, InvalidPayload) else policy.remedy(error)
    if isinstance(remedy, Dead | Drop) or policy is None:
        return GiveUp("dropped" if isinstance(remedy, Drop) else "not retried")
    if attempt >= policy.attempts:
        return GiveUp("attempts used up")
    delay = remedy.delay(error, attempt=attempt, chance=chance, now=now)
    if policy.within is not None and elapsed + delay > policy.within:
        return GiveUp("time used up")
    return Again(delay, attempt + 1)


def retried(call_next: Next, call: Call) -> Any:
    """
    Say what follows when the task fails, by its policy ``retry``.

    Raises:
        Later: The call is to run again.
    """
    try:
        return call_next(call)
    except Snooze as snooze:
        raise Later(snooze.delay, attempt=call.attempt, kind="snooze", error=snooze) from snooze
    except Outcome:
        raise
    except Exception as error:
        _settle(error, call)
        raise


def _settle(error: Exception, call: Call) -> None:
    policy: Retry | None = call.policies.get("retry")
    now = time.time()
    # An attacker gains nothing from guessing a delay.
    chance = random.random()  # noqa: S311
    elapsed = max(0.0, now - (_begun(call.headers) or now))
    decision = decide(policy, error, attempt=call.attempt, elapsed=elapsed, chance=chance, now=now)
    if isinstance(decision, Again):
        raise Later(decision.delay, attempt=decision.attempt, kind=decision.kind, error=error) from error
    _mark(error, decision, policy)


def _begun(headers: Headers) -> float | None:
    """Tell when the call could first have run: time that its sender let pass is not the policy's."""
    ready = headers.ledger[0].started - headers.ledger[0].waited if headers.ledger else headers.due_at
    # A replayed message still has its ledger, and was sent anew.
    return max(filter(None, (ready, headers.sent_at)), default=None)


def _mark(error: Exception, decision: GiveUp, policy: Retry | None) -> None:
    # An exception may be an object that is raised more than once, or refuse to have its attributes set.
    facts = vars(error)
    facts.pop(DROPPED, None)
    if decision.why == "dropped":
        facts[DROPPED] = True
    elif policy is not None and decision.why != "not retried":
        used_up = (
            f"{policy.attempts} attempts" if decision.why == "attempts used up" else f"{spoken(policy.within or 0)}"
        )
        note = f"Not tried again: the {used_up} of its retry policy are used up."
        # Python's own place for notes (PEP 678): they are shown below the traceback.
        facts["__notes__"] = [*(old for old in facts.get("__notes__", ()) if old != note), note]


# What the other side asks for


def _asked(error: BaseException, now: float) -> float | None:
    try:
        return next((wait for wish in _wishes(error) if (wait := _wait(wish, now)) is not None), None)
    except Exception:  # noqa: BLE001  (an edge: somebody's object, whose attributes may be properties that raise)
        return None


def _wishes(error: BaseException) -> Iterator[Any]:
    yield getattr(error, "retry_after", None)
    # Not `or`: a response of requests that tells of an error is false.
    response = getattr(error, "response", None)
    for bearer in (error, response):
        yield from _retry_after(getattr(bearer, "headers", None))
    if isinstance(response, Mapping):  # botocore
        yield from _retry_after((response.get("ResponseMetadata") or {}).get("HTTPHeaders"))


def _retry_after(headers: Any) -> Iterator[Any]:
    if headers is not None:
        yield from (value for name, value in headers.items() if str(name).lower() == "retry-after")


def _wait(wish: Any, now: float) -> float | None:
    """Give the seconds that are asked for; None if it makes no sense or is over already."""
    if isinstance(wish, str):
        wish = _read(wish.strip())
    if isinstance(wish, timedelta):
        wish = wish.total_seconds()
    if isinstance(wish, datetime):
        wish = (wish if wish.tzinfo else wish.replace(tzinfo=UTC)).timestamp() - now
    return float(wish) if _is_number(wish) and wish > 0 else None


def _read(text: str) -> float | datetime | None:
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None


# Declaring


def _remedies(on: Any) -> dict[type[Exception], Remedy]:
    if isinstance(on, type):
        on = (on,)
    if isinstance(on, tuple | list | set | frozenset):
        on = dict.fromkeys(on, Backoff())
    if not isinstance(on, Mapping) or not on:
        raise InvalidOptions(
            f"Retry(on=…) must name at least one exception, got {_shown(on)}. Write on={{ConnectionError: Backoff()}}."
        )
    for kind, remedy in on.items():
        _check_kind(kind)
        _check_remedy(kind, remedy)
    return dict(on)


def _check_kind(kind: Any) -> None:
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        raise InvalidOptions(f"Retry(on=…) must name classes of exceptions, got {_shown(kind)}.")
    if issubclass(kind, InvalidPayload | Outcome):
        why = "always becomes a dead letter" if issubclass(kind, InvalidPayload) else "is not an error"
        raise InvalidOptions(f"Retry(on=…) names {kind.__name__}, which {why}. Leave it out.")


def _check_remedy(kind: type, remedy: Any) -> None:
    if isinstance(remedy, Backoff | RetryAfter | Dead | Drop):
        return
    hint = "It must be Backoff(…), RetryAfter(…), Dead() or Drop()."
    if remedy in (Backoff, RetryAfter, Dead, Drop):
        hint = f"Write {remedy.__name__}(), with brackets."
    raise InvalidOptions(f"Retry(on={{{kind.__name__}: …}}): what follows on it is {_shown(remedy)}. {hint}")


def _seconds(what: str, value: Any, *, shortest: float = _SHORTEST) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if not _is_number(seconds):
        raise InvalidOptions(f"{what} must be a finite number of seconds or a timedelta, got {_shown(value)}.")
    if not shortest <= seconds <= _LONGEST:
        least = "0" if not shortest else "a millisecond"
        raise InvalidOptions(f"{what} must be between {least} and a year, got {seconds:g} seconds.")
    return float(seconds)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False


def _shown(value: Any) -> str:
    # Numbers and classes as they are; of anything else the type, as its repr may be long or hold a secret.
    return repr(value) if isinstance(value, int | float | type) else f"a value of type {type(value).__name__}"


def _set(value: Any, **facts: Any) -> None:
    # A frozen dataclass that accepts more in its constructor than it holds.
    for name, fact in facts.items():
        object.__setattr__(value, name, fact)


def _name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def spoken(seconds: float) -> str:
    """Say a length of time in its two largest units: ``1 h 30 min``."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    rest, words = round(seconds), []
    for name, size in _UNITS:
        count, rest = divmod(rest, size)
        if count:
            words.append(f"{count} {name}")
    return " ".join(words[:2])


_UNITS: tuple[tuple[str, int], ...] = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
