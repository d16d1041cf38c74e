"""
Retry policies: how they are declared, what they decide, and the step that says so.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import botocore.exceptions
import httpx
import pytest
import requests
import time_machine

from celerykit.call import Call, Later, Stopped
from celerykit.contract import Contract
from celerykit.errors import InvalidOptions, InvalidPayload, TaskInterrupted
from celerykit.headers import Attempt, Headers
from celerykit.retry import (
    DROPPED,
    Again,
    Backoff,
    Dead,
    Decision,
    Drop,
    GiveUp,
    Retry,
    RetryAfter,
    Row,
    Snooze,
    decide,
    retried,
    spoken,
)

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)

PLAIN = Backoff(base=1, factor=2, cap=10, jitter=0)


def decided(
    policy: Retry | None, error: BaseException, *, attempt: int = 1, elapsed: float = 0.0, chance: float = 0.0
) -> Decision:
    return decide(policy, error, attempt=attempt, elapsed=elapsed, chance=chance, now=NOW.timestamp())


def waits(remedy: Any, *, asked: Any = None, error: BaseException | None = None) -> float:
    """Return how long is waited for a server that asked for this in its header."""
    error = error or failed(asked)
    decision = decided(Retry({type(error): remedy}), error)
    assert isinstance(decision, Again)
    return decision.delay


class Unavailable(Exception):
    """An error as HTTP clients have it."""

    response: Any = None


def failed(retry_after: Any, name: str = "Retry-After") -> Unavailable:
    error = Unavailable()
    error.response = SimpleNamespace(headers={} if retry_after is None else {"Content-Length": "0", name: retry_after})
    return error


# Declaring


def test_a_policy_is_a_value() -> None:
    policy = Retry(on={OSError: PLAIN, KeyError: Drop()}, attempts=3, within=timedelta(hours=1))

    assert policy.within == 3600
    assert policy == copy.copy(policy) == pickle.loads(pickle.dumps(policy))
    assert policy != Retry(on={OSError: PLAIN, KeyError: Dead()}, attempts=3, within=3600)


@pytest.mark.parametrize("on", [OSError, (OSError,), {OSError: Backoff()}])
def test_classes_alone_stand_for_a_plain_backoff(on: Any) -> None:
    assert Retry(on).on == {OSError: Backoff()}


def test_times_are_seconds_or_timedeltas() -> None:
    assert Backoff(base=timedelta(minutes=1), cap=timedelta(hours=2)) == Backoff(base=60, cap=7200)
    assert RetryAfter(timedelta(seconds=5), cap=timedelta(minutes=1)) == RetryAfter(5, cap=60)
    assert Snooze(timedelta(minutes=1)).delay == 60.0


@pytest.mark.parametrize(
    ("declare", "says"),
    [
        (lambda: Retry({}), "at least one exception"),
        (lambda: Retry(()), "at least one exception"),
        (lambda: Retry(3), "at least one exception, got 3"),
        (lambda: Retry(OSError()), "got a value of type OSError"),
        (lambda: Retry({"OSError": Dead()}), "classes of exceptions, got a value of type str"),
        (lambda: Retry(KeyboardInterrupt), "classes of exceptions, got <class 'KeyboardInterrupt'>"),
        (lambda: Retry((OSError, int)), "classes of exceptions, got <class 'int'>"),
        (lambda: Retry(InvalidPayload), "names InvalidPayload, which always becomes a dead letter"),
        (lambda: Retry(Snooze), "names Snooze, which is not an error"),
        (lambda: Retry({OSError: Dead}), "Write Dead(), with brackets"),
        (lambda: Retry({OSError: 5}), "It must be Backoff(…), RetryAfter(…), Dead() or Drop()"),
        (lambda: Retry(OSError, attempts=0), "attempts=…) must be a whole number of at least 1, got 0"),
        (lambda: Retry(OSError, attempts=2.5), "got 2.5"),
        (lambda: Retry(OSError, attempts=True), "got True"),
        (lambda: Retry(OSError, within=-1), "within=…) must be between a millisecond and a year"),
        (lambda: Backoff(base=0), "base=…) must be between a millisecond and a year, got 0 seconds"),
        (lambda: Backoff(base="1"), "base=…) must be a finite number of seconds or a timedelta, got a value of type"),
        (lambda: Backoff(base=float("nan")), "finite number"),
        (lambda: Backoff(cap=float("inf")), "finite number"),
        (lambda: Backoff(cap=10**400), "finite number"),
        (lambda: Backoff(base=3600), "is 1 h and its cap 10 min"),
        (lambda: Backoff(factor=0.5), "factor=…) must be a number of at least 1, got 0.5"),
        (lambda: Backoff(jitter=1), "jitter=…) must be a part"),
        (lambda: Backoff(jitter=-0.1), "jitter=…) must be a part"),
        (lambda: RetryAfter(default=7200), "may wait 2 h and its cap is 1 h"),
        (lambda: RetryAfter(cap=0), "cap=…) must be between"),
        (lambda: Snooze(-1), "between 0 and a year"),
        (lambda: Snooze(None), "finite number of seconds or a timedelta, got a value of type NoneType"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_declared(declare: Callable[[], object], says: str) -> None:
    with pytest.raises(InvalidOptions) as refused:
        declare()

    assert says in str(refused.value)


# Deciding


def test_waits_grow_to_the_cap() -> None:
    policy = Retry({OSError: PLAIN}, attempts=9)

    assert [decided(policy, OSError(), attempt=n) for n in (1, 2, 3, 4, 5, 6)] == [
        Again(1, 2),
        Again(2, 3),
        Again(4, 4),
        Again(8, 5),
        Again(10, 6),
        Again(10, 7),
    ]


def test_factors_are_not_rounded() -> None:
    assert waits(Backoff(base=0.25, factor=1.5, jitter=0), error=OSError()) == 0.25
    assert Backoff(base=0.25, factor=1.5).longest(3) == 0.5625


def test_chance_shortens_a_wait_by_no_more_than_the_jitter() -> None:
    policy = Retry({OSError: Backoff(base=8, jitter=0.25)})

    assert decided(policy, OSError(), chance=0) == Again(8, 2)
    assert decided(policy, OSError(), chance=0.5) == Again(7, 2)


def test_the_most_specific_class_wins_in_whatever_order() -> None:
    policy = Retry({Exception: Drop(), OSError: PLAIN, ConnectionError: Dead()})

    assert decided(policy, ConnectionResetError()) == GiveUp("not retried")
    assert decided(policy, FileNotFoundError()) == Again(1, 2)
    assert decided(policy, KeyError()) == GiveUp("dropped")


def test_with_two_parents_the_first_one_counts() -> None:
    class Both(KeyError, OSError): ...

    assert decided(Retry({OSError: PLAIN, KeyError: Drop()}), Both()) == GiveUp("dropped")


def test_an_error_nobody_listed_is_dead() -> None:
    assert decided(Retry(OSError), KeyError()) == GiveUp("not retried")
    assert decided(None, OSError()) == GiveUp("not retried")


def interrupted(by: BaseException) -> TaskInterrupted:
    error = TaskInterrupted(f"shop.fetch raised {by!r}")
    error.__cause__ = by
    return error


def test_an_interrupted_task_is_judged_by_what_it_raised() -> None:
    policy = Retry({Exception: PLAIN, MemoryError: Drop()})

    assert decided(policy, interrupted(MemoryError())) == GiveUp("dropped")
    assert decided(policy, interrupted(SystemExit(1))) == GiveUp("not retried")
    assert decided(Retry({TaskInterrupted: PLAIN}), interrupted(SystemExit(1))) == Again(1, 2)


def test_attempts_are_used_up() -> None:
    policy = Retry({OSError: PLAIN}, attempts=3)

    assert decided(policy, OSError(), attempt=2) == Again(2, 3)
    assert decided(policy, OSError(), attempt=3) == GiveUp("attempts used up")
    assert decided(Retry(OSError, attempts=1), OSError()) == GiveUp("attempts used up")


def test_no_attempt_starts_after_the_time_is_up() -> None:
    policy = Retry({OSError: Backoff(base=10, jitter=0)}, within=timedelta(minutes=1))

    assert decided(policy, OSError(), elapsed=50) == Again(10, 2)
    assert decided(policy, OSError(), elapsed=50.1) == GiveUp("time used up")


def test_an_invalid_payload_is_never_retried() -> None:
    assert decided(Retry(Exception), InvalidPayload("no")) == GiveUp("not retried")
    assert decided(Retry({Exception: Drop()}), InvalidPayload("no")) == GiveUp("not retried")


@pytest.mark.parametrize("policy", [None, Retry(OSError, attempts=1, within=1)])
def test_a_snooze_is_no_attempt_and_has_no_end(policy: Retry | None) -> None:
    assert decided(policy, Snooze(5), attempt=7, elapsed=1e6) == Again(5, 7, "snooze")


# Retry-After


@pytest.mark.parametrize("name", ["Retry-After", "retry-after", "RETRY-AFTER"])
def test_the_header_is_seconds_or_a_date(name: str) -> None:
    date = format_datetime(NOW + timedelta(seconds=90), usegmt=True)

    assert waits(RetryAfter(), error=failed("120", name)) == 120
    assert waits(RetryAfter(), error=failed(date, name)) == 90


@pytest.mark.parametrize(
    "asked",
    ["", "soon", "0", "-5", "nan", "inf", "Thu, 01 Jan 1970 00:00:00 GMT", "Xyz, 99 Foo", b"120", [3], None, True],
)
def test_what_makes_no_sense_is_not_waited_for(asked: Any) -> None:
    assert waits(RetryAfter(default=Backoff(base=4, jitter=0)), asked=asked) == 4


@pytest.mark.parametrize("asked", [True, 0, float("nan"), -1, timedelta(seconds=-1), NOW - timedelta(days=1), object()])
def test_nor_is_it_when_the_error_says_it_itself(asked: Any) -> None:
    error = failed(None)
    error.retry_after = asked  # type: ignore[attr-defined]

    assert waits(RetryAfter(default=Backoff(base=4, jitter=0)), error=error) == 4


@pytest.mark.parametrize("asked", ["100000", "9" * 300, "Fri, 31 Dec 9999 23:59:59 GMT", timedelta.max])
def test_what_is_too_long_is_cut(asked: Any) -> None:
    assert waits(RetryAfter(cap=timedelta(minutes=30), default=5), asked=asked) == 1800


@pytest.mark.parametrize(
    "asked", [30, 30.0, "30", timedelta(seconds=30), NOW + timedelta(seconds=30), NOW.replace(tzinfo=None, second=30)]
)
def test_an_error_may_say_it_itself(asked: Any) -> None:
    error = failed("120")
    error.retry_after = asked  # type: ignore[attr-defined]

    assert waits(RetryAfter(), error=error) == 30


def test_an_error_whose_properties_raise_is_not_waited_for() -> None:
    class Broken(Exception):
        @property
        def response(self) -> Any:
            raise RuntimeError("no response")

    assert waits(RetryAfter(default=Backoff(base=3, jitter=0)), error=Broken()) == 3


def test_a_default_in_seconds_is_the_same_each_time() -> None:
    policy = Retry({OSError: RetryAfter(default=3)})

    assert [decided(policy, OSError(), attempt=n) for n in (1, 2)] == [Again(3, 2), Again(3, 3)]


def test_it_reads_a_response_of_httpx() -> None:
    response = httpx.Response(503, headers={"Retry-After": "7"}, request=httpx.Request("GET", "http://h"))

    with pytest.raises(httpx.HTTPStatusError) as caught:
        response.raise_for_status()

    assert waits(RetryAfter(), error=caught.value) == 7
    assert waits(RetryAfter(default=2), error=httpx.ConnectError("no")) == 2


def test_it_reads_a_response_of_requests() -> None:
    """Whose responses are false when they tell of an error."""
    response = requests.Response()
    response.status_code = 503
    response.headers["Retry-After"] = "7"

    with pytest.raises(requests.HTTPError) as caught:
        response.raise_for_status()

    assert waits(RetryAfter(), error=caught.value) == 7
    assert waits(RetryAfter(default=2), error=requests.ConnectionError()) == 2


def test_it_reads_a_response_of_botocore() -> None:
    told = {"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPHeaders": {"retry-after": "7"}}}

    assert waits(RetryAfter(), error=botocore.exceptions.ClientError(told, "PutObject")) == 7
    assert waits(RetryAfter(default=2), error=botocore.exceptions.ClientError({"Error": {}}, "PutObject")) == 2


# Printing


def test_the_table_lists_each_wait() -> None:
    policy = Retry({OSError: Backoff(base=1, cap=60), KeyError: RetryAfter(default=3), ValueError: Dead()}, attempts=3)

    assert policy.table() == [
        Row("OSError", 2, 0.5, 1.0, 1.0),
        Row("OSError", 3, 1.0, 2.0, 3.0),
        Row("KeyError", 2, 1.5, 3.0, 3.0),
        Row("KeyError", 3, 1.5, 3.0, 6.0),
    ]


def test_the_table_ends_where_the_time_does() -> None:
    assert [row.attempt for row in Retry({OSError: PLAIN}, attempts=9, within=7).table()] == [2, 3, 4]


def test_a_policy_describes_itself() -> None:
    policy = Retry(
        {Unavailable: Backoff(base=1, cap=60), TimeoutError: RetryAfter(cap=60, default=9), OSError: Drop()},
        attempts=3,
        within=timedelta(minutes=90),
    )

    assert policy.describe().splitlines() == [
        "at most 3 attempts, none later than 1 h 30 min after sending",
        f"on {__name__}.Unavailable: try again after 1 s, each wait 2 times the last, at most 1 min; "
        "chance shortens a wait by up to 50%",
        "    attempt 2   0.5 s to 1 s later, 1 s in all",
        "    attempt 3   1 s to 2 s later, 3 s in all",
        "on TimeoutError: try again when Retry-After says, at most 1 min; if it does not, try again after 9 s; "
        "chance shortens a wait by up to 50%",
        "    attempt 2   4.5 s to 9 s later, 9 s in all",
        "    attempt 3   4.5 s to 9 s later, 18 s in all",
        "on OSError: failed, without a dead letter",
        "on any other error: dead letter at once",
    ]


def test_a_long_table_is_cut() -> None:
    assert Retry({Exception: PLAIN}, attempts=10**9).describe().splitlines()[-2:] == [
        "    attempt 11  10 s later, 1 min 15 s in all",
        "    … and so on, to attempt 1000000000",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.25, "0.25 s"), (59, "59 s"), (60, "1 min"), (90, "1 min 30 s"), (3661, "1 h 1 min"), (86400, "1 d")],
)
def test_times_are_said_in_two_units(seconds: float, said: str) -> None:
    assert spoken(seconds) == said


# The step


def fetch() -> None: ...


CONTRACT = Contract("shop.fetch", fetch)


def call(policy: Retry | None = None, *, attempt: int = 1, headers: Headers | None = None) -> Call:
    return Call(
        task="shop.fetch",
        id="1",
        attempt=attempt,
        headers=headers or Headers(),
        contract=CONTRACT,
        args=(),
        kwargs={},
        policies={"retry": policy},
    )


def raising(error: BaseException) -> Callable[[Call], Any]:
    def run(call: Call) -> Any:
        raise error

    return run


def test_a_value_passes() -> None:
    assert retried(lambda call: call.attempt, call(Retry(OSError), attempt=2)) == 2


def test_a_retry_is_our_word_and_has_its_cause() -> None:
    error = OSError("down")

    with pytest.raises(Later) as later:
        retried(raising(error), call(Retry({OSError: PLAIN}), attempt=3))

    assert (later.value.delay, later.value.attempt, later.value.kind) == (4.0, 4, "retry")
    assert later.value.error is later.value.__cause__ is error


@pytest.mark.parametrize("policy", [None, Retry(OSError, attempts=1)])
def test_a_snooze_is_our_word_too(policy: Retry | None) -> None:
    snooze = Snooze(30)

    with pytest.raises(Later) as later:
        retried(raising(snooze), call(policy, attempt=3))

    assert (later.value.delay, later.value.attempt, later.value.kind) == (30.0, 3, "snooze")
    assert later.value.error is snooze
    assert str(snooze) == "again in 30 s"


@pytest.mark.parametrize(
    "word", [Stopped(RuntimeError()), Later(1, attempt=2, kind="retry"), KeyboardInterrupt(), SystemExit()]
)
def test_what_is_no_error_passes(word: BaseException) -> None:
    with pytest.raises(type(word)) as passed:
        retried(raising(word), call(Retry(Exception)))

    assert passed.value is word


def test_a_final_error_is_itself_and_says_why() -> None:
    error = OSError("down")

    with pytest.raises(OSError, match="down") as final:
        retried(raising(error), call(Retry(OSError, attempts=4), attempt=4))

    assert final.value is error
    assert error.__notes__ == ["Not tried again: the 4 attempts of its retry policy are used up."]
    assert not hasattr(error, DROPPED)


def test_an_error_without_a_policy_is_left_alone() -> None:
    error = OSError("down")

    with pytest.raises(OSError, match="down"):
        retried(raising(error), call())

    assert vars(error) == {}


def test_a_dropped_error_is_marked_for_the_parent_process() -> None:
    error = KeyError("gone")

    with pytest.raises(KeyError):
        retried(raising(error), call(Retry({KeyError: Drop()})))

    assert getattr(pickle.loads(pickle.dumps(error)), DROPPED) is True


def test_an_error_that_is_raised_again_elsewhere_loses_its_mark() -> None:
    """Libraries raise one object many times; dropped here must not mean dropped there."""
    error = KeyError("gone")

    for policy in (Retry({KeyError: Drop()}), None):
        with pytest.raises(KeyError):
            retried(raising(error), call(policy))

    assert not hasattr(error, DROPPED)


@pytest.mark.parametrize(
    ("headers", "is_late"),
    [
        (Headers(), False),
        (Headers(sent_at=NOW.timestamp() - 30), False),
        (Headers(sent_at=NOW.timestamp() - 90), True),
        (Headers(sent_at=NOW.timestamp() + 90), False),
        # Sent long ago, with a countdown that has just passed.
        (Headers(sent_at=NOW.timestamp() - 9000, due_at=NOW.timestamp() - 1), False),
        # Died long ago, and was replayed just now.
        (Headers(sent_at=NOW.timestamp() - 1, ledger=(Attempt(1000.0, 1.0, 1.0, "retry", "", "w"),)), False),
        # This attempt was due a moment ago, the first one long before.
        (
            Headers(
                sent_at=NOW.timestamp() - 9000,
                due_at=NOW.timestamp() - 1,
                ledger=(Attempt(NOW.timestamp() - 80, 10.0, 1.0, "retry", "", "w"),),
            ),
            True,
        ),
    ],
)
def test_time_counts_from_when_the_call_could_first_run(headers: Headers, is_late: bool) -> None:
    policy = Retry({OSError: PLAIN}, within=60)
    expected: type[Exception] = OSError if is_late else Later

    with time_machine.travel(NOW, tick=False), pytest.raises(expected):
        retried(raising(OSError("down")), call(policy, headers=headers))
