"""
The comparison judges rightly; without a service, and without Celery's tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.compat.jobs import split
from tests.compat.outcomes import LOST, Outcome, Run, read
from tests.compat.verdict import NotComparable, check_baseline, judge, read_exceptions


def phase(test: str, outcome: str, when: str = "call") -> dict[str, Any]:
    return {"kind": "outcome", "test": test, "when": when, "outcome": outcome, "message": f"it {outcome}"}


def run_of(**statuses: str) -> Run:
    return Run({test: Outcome(status) for test, status in statuses.items()})


def outcome_of(*facts: dict[str, Any]) -> Outcome:
    run = Run()
    run.add(facts, tests=["t"])
    return run.of("t")


def test_a_failing_teardown_makes_a_test_an_error():
    assert outcome_of(phase("t", "passed"), phase("t", "failed", "teardown")).status == "error"


def test_a_failing_subtest_makes_its_test_fail():
    assert outcome_of(phase("t", "failed"), phase("t", "passed")).status == "failed"


def test_only_the_last_try_counts():
    outcome = outcome_of(phase("t", "rerun"), phase("t", "passed"))

    assert (outcome.status, outcome.reruns) == ("passed", 1)


def test_a_try_that_was_cut_short_is_lost():
    assert outcome_of(phase("t", "rerun")).status == LOST
    assert outcome_of().status == LOST


def test_a_module_that_does_not_import_fails_all_of_its_tests():
    run = Run()
    run.add([phase("a.py", "failed", "collect")], tests=["a.py::one", "a.py::two"])

    assert [outcome.status for outcome in run.outcomes.values()] == ["error", "error"]


def test_a_record_that_ends_in_the_middle_of_a_line_is_read_up_to_there(tmp_path: Path):
    path = tmp_path / "record"
    path.write_text('{"kind": "run", "task": "a", "ours": true}\n{"kind": "ru')

    assert [fact["task"] for fact in read(path)] == ["a"]


def test_what_fails_only_with_celerykit_is_broken():
    stock = run_of(same="passed", worse="passed", gone="passed", bad="failed", better="failed", off="skipped")
    kit = run_of(same="passed", worse="failed", bad="failed", better="passed", off="skipped")

    assert set(judge(stock, kit, {}).broken) == {"worse", "gone"}


def test_a_test_that_passes_with_stock_may_not_be_skipped():
    assert set(judge(run_of(a="passed"), run_of(a="skipped"), {}).broken) == {"a"}


def test_an_exception_excuses_its_test():
    verdict = judge(run_of(a="passed"), run_of(a="failed"), {"a": "on purpose"})

    assert verdict.is_good
    assert verdict.excused == {"a": "on purpose"}


def test_an_exception_that_is_not_needed_is_a_fault():
    verdict = judge(run_of(a="passed"), run_of(a="passed"), {"a": "was so once"})

    assert not verdict.is_good
    assert list(verdict.needless) == ["a"]


@pytest.mark.parametrize("whole", [True, False])
def test_an_exception_without_a_test_is_a_fault_when_all_tests_ran(whole: bool):
    assert judge(run_of(), run_of(), {"b": "a misspelling"}, whole=whole).is_good is not whole


@pytest.mark.parametrize("stock", [run_of(), run_of(a="skipped"), run_of(a="passed", b="error", c="lost")])
def test_there_is_no_comparison_with_a_stock_celery_that_fails(stock: Run):
    with pytest.raises(NotComparable):
        check_baseline(stock)


def test_a_few_flaky_tests_do_not_spoil_the_comparison():
    check_baseline(run_of(flaky="failed", off="skipped", **{f"t{number}": "passed" for number in range(20)}))


@pytest.mark.parametrize(
    "text",
    ['[[exception]]\ntest = "a"', '[[exception]]\nreason = "b"', 2 * '[[exception]]\ntest = "a"\nreason = "b"\n'],
)
def test_an_exception_has_a_test_and_a_reason_once(tmp_path: Path, text: str):
    path = tmp_path / "exceptions.toml"
    path.write_text(text)

    with pytest.raises(ValueError, match=r"exceptions\.toml"):
        read_exceptions(path)


def test_every_test_is_in_one_job_and_jobs_do_not_mix_files():
    tests = [f"{file}.py::test_{number}" for file in "ab" for number in range(30)]
    jobs = split([*tests, "c.py::test_error_propagates_from_chord"], side="kit")

    assert jobs[0].tests == ("c.py::test_error_propagates_from_chord",)
    assert [test for job in jobs[1:] for test in job.tests] == tests
    assert all(len({test.partition("::")[0] for test in job.tests}) == 1 for job in jobs)
