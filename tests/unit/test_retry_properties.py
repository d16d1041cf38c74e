"""
What holds for every retry policy.
"""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from celerykit.errors import InvalidPayload
from celerykit.retry import Again, Backoff, Dead, Drop, GiveUp, Retry, RetryAfter, Snooze, decide

YEAR = 366 * 86400.0

ERRORS: list[type[Exception]] = [Exception, OSError, ConnectionError, ConnectionResetError, LookupError, KeyError]

chances = st.floats(0, 1, exclude_max=True)
attempts = st.integers(1, 10**6)


@st.composite
def backoffs(draw: st.DrawFn, most_jitter: float = 0.999) -> Backoff:
    base = draw(st.floats(0.001, YEAR))
    return Backoff(
        base=base,
        factor=draw(st.floats(1, 1e300)),
        cap=draw(st.floats(base, YEAR)),
        jitter=draw(st.floats(0, most_jitter)),
    )


@st.composite
def retry_afters(draw: st.DrawFn) -> RetryAfter:
    default = draw(backoffs())
    return RetryAfter(default, cap=draw(st.floats(default.cap, YEAR)))


remedies = st.one_of(backoffs(), retry_afters(), st.just(Dead()), st.just(Drop()))
policies = st.builds(
    Retry,
    on=st.dictionaries(st.sampled_from(ERRORS), remedies, min_size=1),
    attempts=st.integers(1, 50),
    within=st.none() | st.floats(0.001, YEAR),
)
wishes = st.one_of(
    st.none(), st.text(), st.integers(), st.floats(), st.timedeltas(), st.datetimes(), st.binary(), st.booleans()
)


def error_of(kind: type[Exception], wish: Any) -> Exception:
    error = kind("down")
    error.retry_after = wish  # type: ignore[attr-defined]
    return error


@given(backoffs(), attempts, chances)
def test_a_wait_is_never_nothing_and_never_over_the_cap(backoff: Backoff, attempt: int, chance: float) -> None:
    delay = backoff.delay(OSError(), attempt=attempt, chance=chance, now=0)

    assert 0 < delay <= backoff.cap
    assert backoff.shortest(attempt) <= delay <= backoff.longest(attempt)


@given(backoffs(most_jitter=0), attempts, attempts)
def test_without_jitter_no_wait_is_shorter_than_the_one_before(backoff: Backoff, one: int, other: int) -> None:
    first, second = sorted((one, other))

    assert backoff.longest(first) == backoff.shortest(first) <= backoff.longest(second)


@given(retry_afters(), wishes, attempts, chances, st.floats(0, 1e10))
def test_whatever_is_asked_for_the_wait_is_one(
    remedy: RetryAfter, wish: Any, attempt: int, chance: float, now: float
) -> None:
    assert 0 < remedy.delay(error_of(OSError, wish), attempt=attempt, chance=chance, now=now) <= remedy.cap


@given(policies, st.sampled_from(ERRORS), wishes, attempts, st.floats(0, 1e10), chances)
def test_the_same_question_has_the_same_answer(
    policy: Retry, kind: type[Exception], wish: Any, attempt: int, elapsed: float, chance: float
) -> None:
    error = error_of(kind, wish)
    before = dict(vars(error))
    one, other = (decide(policy, error, attempt=attempt, elapsed=elapsed, chance=chance, now=1e9) for _ in "12")

    assert one == other
    assert vars(error) == before


@given(policies, st.sampled_from(ERRORS))
def test_the_most_specific_class_wins(policy: Retry, kind: type[Exception]) -> None:
    matching = [listed for listed in policy.on if issubclass(kind, listed)]
    remedy = policy.remedy(kind())

    if matching:
        # In this family each class has one parent, so that the deepest one is the most specific.
        assert remedy == policy.on[max(matching, key=lambda listed: len(listed.__mro__))]
    else:
        assert remedy == Dead()


@given(policies, st.lists(st.sampled_from(ERRORS), min_size=60, max_size=60), chances)
def test_a_call_never_runs_more_often_or_later_than_it_may(
    policy: Retry, errors: list[type[Exception]], chance: float
) -> None:
    now, attempt = 0.0, 1
    for runs, kind in enumerate(errors, start=1):
        assert runs <= policy.attempts
        assert now <= (policy.within or math.inf)
        match decide(policy, kind(), attempt=attempt, elapsed=now, chance=chance, now=now):
            case Again(delay, attempt, "retry"):
                assert attempt == runs + 1
                now += delay
            case GiveUp():
                return
    raise AssertionError("it never ended")


@given(policies, attempts, st.floats(0, 1e10), st.floats(0, YEAR))
def test_snoozes_count_for_nothing_and_bad_payloads_never_run_again(
    policy: Retry, attempt: int, elapsed: float, delay: float
) -> None:
    facts: dict[str, Any] = {"attempt": attempt, "elapsed": elapsed, "chance": 0.5, "now": elapsed}

    assert decide(policy, Snooze(delay), **facts) == Again(delay, attempt, "snooze")
    assert decide(policy, InvalidPayload("no"), **facts) == GiveUp("not retried")


@given(policies)
def test_the_table_shows_what_is_decided(policy: Retry) -> None:
    for row in policy.table():
        [kind] = [kind for kind in policy.on if kind.__name__ == row.error]
        longest = decide(policy, kind(), attempt=row.attempt - 1, elapsed=0, chance=0, now=0)

        assert longest == Again(row.delay_max, row.attempt) or row.delay_max > (policy.within or math.inf)
        assert row.delay_min <= row.delay_max <= row.cumulative
