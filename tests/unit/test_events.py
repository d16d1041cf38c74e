"""
What is told: under which names, with which facts, in which form; and the page that lists it.
"""

from __future__ import annotations

import ast
import logging
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

import celerykit
from celerykit import events
from celerykit.events import EVENTS, FACTS, Event, describe
from tests import event_tables

PACKAGE = Path(celerykit.__file__).parent


@pytest.fixture
def told() -> Iterator[list[tuple[str, Mapping[str, Any]]]]:
    """What an observer hears."""
    heard: list[tuple[str, Mapping[str, Any]]] = []

    def observer(event: Event, facts: Mapping[str, Any]) -> None:
        heard.append((event.name, facts))

    events.observe(observer)
    events.observe(observer)
    yield heard
    events._observers.remove(observer)


# Telling


def test_an_event_is_a_record_of_its_subjects_logger(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    events.TASK_SENT.tell(task="shop.charge", id="1", attempt=2)

    [record] = caplog.records
    assert (record.name, record.levelname) == ("celerykit.task", "INFO")
    assert record.getMessage() == "task.sent task=shop.charge id=1 attempt=2"
    assert record.data == {"task": "shop.charge", "id": "1", "attempt": 2}  # type: ignore[attr-defined]
    assert (record.msg.event, record.pathname) == (events.TASK_SENT, __file__)  # type: ignore[attr-defined]


def test_what_is_not_known_is_left_out(told: list[Any]) -> None:
    events.TASK_SENT.tell(task="shop.charge", id=None, attempt=0)

    assert told == [("task.sent", {"task": "shop.charge", "attempt": 0})]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("two words", "'two words'"),
        ("", "''"),
        ("a\nline", r"'a\nline'"),
        (900.0, "900"),
        (0.1 + 0.2, "0.3"),
        (7, "7"),
        (ValueError("no"), "'ValueError: no'"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_fact_is_one_word_of_the_text(value: Any, text: str, caplog: pytest.LogCaptureFixture) -> None:
    events.CLAIM_LOST.tell(now=value)

    assert caplog.messages == [f"claim.lost now={text}"]


def test_an_error_shows_no_password_of_a_url() -> None:
    error = ConnectionError("cannot reach redis://app:hush@queue:6379/0")

    assert describe(error) == "ConnectionError: cannot reach redis://app:***@queue:6379/0"


class Unwritable(Exception):
    def __str__(self) -> str:
        raise self.args[0]


def test_an_error_that_cannot_be_written_is_told_by_its_name() -> None:
    assert describe(Unwritable(KeyError("order"))) == "Unwritable"
    with pytest.raises(SoftTimeLimitExceeded):
        describe(Unwritable(SoftTimeLimitExceeded()))


def test_an_event_is_heard_though_logging_was_configured_after_us() -> None:
    """`logging.config` disables each logger that there is, unless it is told not to."""
    program = """
        import logging.config
        from celerykit import events

        logging.config.dictConfig({
            "version": 1,
            "handlers": {"out": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}},
            "root": {"handlers": ["out"], "level": "INFO"},
        })
        print(events.TASK_SENT.is_wanted)
        events.TASK_DEAD.tell(task="shop.charge")
    """

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=30, check=True
    )

    assert done.stdout.splitlines() == ["True", "task.dead task=shop.charge"]


def test_an_error_may_bring_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise KeyError("gone")
    except KeyError as error:
        events.LEASES_NOT_RENEWED.tell(error=error, exc_info=True)

    [record] = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is KeyError
    assert record.data.keys() == {"error"}  # type: ignore[attr-defined]


def test_observers_hear_what_is_not_logged(told: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)

    events.TASK_SENT.tell(id="1")

    assert told == [("task.sent", {"id": "1"})]
    assert not caplog.records


def test_an_event_is_wanted_by_a_log_or_an_observer(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert not events.TASK_SENT.is_wanted
    assert events.CLAIM_LOST.is_wanted

    request.getfixturevalue("told")

    assert events.TASK_SENT.is_wanted


# Names


def test_names_are_a_subject_and_what_happened() -> None:
    assert [name for name in EVENTS if not re.fullmatch(r"[a-z_]+\.[a-z_]+", name)] == []


def test_each_event_is_a_constant_of_its_name() -> None:
    constants = {name: value for name, value in vars(events).items() if isinstance(value, Event)}

    assert {event.name.replace(".", "_").upper(): event for event in EVENTS.values()} == constants


def test_each_event_has_a_sentence() -> None:
    assert [event.name for event in EVENTS.values() if not re.fullmatch(r"[A-Z].*\.", event.meaning)] == []


def calls_of_tell() -> Iterator[tuple[str, ast.Call]]:
    """Find where the package tells events."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "tell"):
                continue
            if not ast.unparse(node.func.value).startswith("self."):  # another one's method of this name
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


def test_what_is_told_are_known_events_with_known_facts() -> None:
    wrong = []
    for where, call in calls_of_tell():
        assert isinstance(call.func, ast.Attribute)
        constant, facts = ast.unparse(call.func.value).removeprefix("events."), {word.arg for word in call.keywords}
        if where.startswith("running.py"):
            facts.discard(None)  # those of the call that begins to run
        if call.args or not isinstance(getattr(events, constant, None), Event) or facts - {"exc_info", *FACTS}:
            wrong.append(f"{where}: {ast.unparse(call)}")

    assert wrong == []


def test_nothing_is_said_in_free_words() -> None:
    """Names of events are what people look for, and count."""
    said = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\blog(ger)?\.(debug|info|warning|error|exception|critical)\(", line)
    ]

    assert said == []


# The page


def test_the_page_lists_all_events_and_facts() -> None:
    """Written by ``python -m tests.event_tables``."""
    page = event_tables.PAGE.read_text(encoding="utf-8")

    assert event_tables.filled_in(page) == page
