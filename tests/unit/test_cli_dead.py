"""`celerykit dead`, on an app whose broker is this process's memory."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from click.testing import CliRunner, Result

from celerykit.cli.commands import celerykit
from celerykit.cli.dead import dead
from celerykit.cli.plugin import kit
from celerykit.dead_letters import Letter, Note, letter_id, payload_of
from celerykit.letters import bury

SECRET = "4111-1111"


@pytest.fixture
def shop(make_app: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    # Kombu's memory is one for all apps of a process.
    monkeypatch.setenv("CELERYKIT_DEAD_LETTER_QUEUE", f"dead-{uuid4()}")
    monkeypatch.delenv("CELERY_APP", raising=False)
    app = make_app()

    @app.task(name="shop.charge")
    def charge(order: dict[str, int], *, currency: str = "EUR") -> None:
        pass

    return app


@pytest.fixture
def run(shop: Any) -> Any:
    def run_(*words: str, **how: Any) -> Result:
        return CliRunner().invoke(dead, list(words), obj=SimpleNamespace(app=shop), **how)

    return run_


@pytest.fixture(autouse=True)
def letters(shop: Any) -> list[str]:
    """Three letters; the last one does not fit."""
    for number, order in enumerate([{"amount": 5}, {"amount": 6}, {"card": SECRET}]):
        note = Note(
            letter=letter_id(str(number), 1, 0),
            reason="failed" if number else "expired",
            died_at=time.time() - 3600 * (3 - number),
            task="shop.charge",
            id=str(number),
            error="CardDeclined",
            message="declined\nfor some reason",
            traceback="Traceback: here",
            fingerprint="f00",
            queue=f"work-{uuid4()}",
        )
        bury(
            shop,
            Letter(
                note=note,
                body=json.dumps([[order], {}, {}]).encode(),
                headers={"task": "shop.charge", "id": str(number), "argsrepr": f"({SECRET},)"},
                content_type="application/json",
                content_encoding="utf-8",
            ),
        )
    return [letter_id(str(number), 1, 0)[:13] for number in range(3)]


def left(shop: Any) -> list[str]:
    return [letter.note.id for letter in shop.dead_letters.find()]


def test_list_is_a_table_without_arguments(run: Any, letters: list[str]):
    shown = run("list").output

    assert [line[:13].strip() for line in shown.splitlines()] == ["LETTER", *letters]
    assert "CardDeclined: declined\n" in shown
    assert SECRET not in shown


def test_list_for_machines_is_lines_without_arguments(run: Any):
    shown = run("list", "--json", "--limit", "2").output

    assert [json.loads(line)["id"] for line in shown.splitlines()] == ["0", "1"]
    assert SECRET not in shown


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--reason", "expired"], ["0"]),
        (["--reason", "expired", "--reason", "failed"], ["0", "1", "2"]),
        (["--since", "2.5h"], ["1", "2"]),
        (["--until", "90m"], ["0", "1"]),
        (["--since", "2099-01-01"], []),
        (["--task", "shop.*", "--error", "Card*", "--id", "1"], ["1"]),
        (["--fingerprint", "f01"], []),
    ],
)
def test_letters_are_chosen(run: Any, words: list[str], found: list[str]):
    assert [json.loads(line)["id"] for line in run("list", "--json", *words).output.splitlines()] == found


def test_no_letters_are_said_to_be_none(run: Any):
    assert run("list", "--task", "x").output == run("top", "--task", "x").output == "No dead letters.\n"


@pytest.mark.parametrize("since", ["soon", "5", "-1h"])
def test_time_that_is_none_is_a_usage_error(run: Any, since: str):
    done = run("list", "--since", since)

    assert done.exit_code == 2
    assert "such as 2h" in done.output


def test_show_shows_the_letter_whole(run: Any, letters: list[str]):
    shown = run("show", letters[2]).output

    assert SECRET in shown
    assert "Traceback: here" in shown
    assert json.loads(run("show", "2", "--json").output)["body"][0] == [{"card": SECRET}]


def test_letter_that_is_not_there(run: Any):
    done = run("show", "nobody")

    assert done.exit_code == 1
    assert "There is no dead letter nobody" in done.output


def test_top_is_a_line_for_each_cause(run: Any):
    assert [row["count"] for row in json.loads(run("top", "--json").output)] == [2, 1]
    assert [line.split()[0] for line in run("top").output.splitlines()] == ["LETTERS", "2", "1"]
    assert SECRET not in run("top").output


def test_replay_says_what_was_refused_and_why(run: Any, shop: Any, letters: list[str]):
    done = run("replay", "--all")

    assert done.exit_code == 1
    assert f"{letters[2]}  shop.charge: argument 'order.card'" in done.output
    assert done.output.endswith("2 replayed, 1 refused.\n")
    assert left(shop) == ["2"]


def test_replay_of_what_fits_ends_well(run: Any, shop: Any, letters: list[str]):
    done = run("replay", letters[0], "--rate", "100/s", "--json")

    assert done.exit_code == 0
    assert json.loads(done.output) == {"replayed": 1, "skipped": 0, "refused": 0, "refusals": []}
    assert left(shop) == ["1", "2"]


def test_dry_run_only_tells(run: Any, shop: Any):
    done = run("replay", "--task", "shop.*", "--dry-run")

    assert "2 would be replayed, 1 refused." in done.output
    assert left(shop) == ["0", "1", "2"]


@pytest.mark.parametrize("command", ["replay", "purge"])
def test_nobody_means_all_by_saying_nothing(run: Any, shop: Any, command: str):
    done = run(command)

    assert done.exit_code == 2
    assert "--all" in done.output
    assert left(shop) == ["0", "1", "2"]


@pytest.mark.parametrize("rate", ["fast", "0/s", "5/d"])
def test_rate_that_is_none_is_a_usage_error(run: Any, rate: str):
    assert run("replay", "--all", "--rate", rate).exit_code == 2


def test_edit_sets_what_is_named(run: Any, shop: Any, letters: list[str]):
    done = run("edit", letters[1], "--set", "order.amount=7", "--set", "currency=USD", "--set", "0.tip=1")

    assert done.exit_code == 0, done.output
    assert payload_of(shop.dead_letters.get("1"))[:2] == ([{"amount": 7, "tip": 1}], {"currency": "USD"})


def test_edit_from_a_file_and_replay(run: Any, shop: Any, letters: list[str]):
    new = json.dumps({"args": [{"amount": 1}], "kwargs": {}})

    done = run("edit", letters[2], "--from-file", "-", "--replay", input=new)

    assert done.output.endswith("1 replayed, 0 refused.\n")
    assert left(shop) == ["0", "1"]


def test_edit_in_an_editor(run: Any, shop: Any, letters: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDITOR", "sed -i s/6/66/")

    run("edit", letters[1])

    assert payload_of(shop.dead_letters.get("1")).args == [{"amount": 66}]


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (["--set", "order.amount=much"], 1),
        (["--set", "order.nobody.x=1"], 2),
        (["--set", "7=1"], 2),
        (["--set", "amount"], 2),
        (["--from-file", "-"], 2),
    ],
)
def test_edit_that_is_wrong_changes_nothing(run: Any, shop: Any, letters: list[str], how: list[str], code: int):
    done = run("edit", letters[1], *how, input="[]")

    assert done.exit_code == code
    assert payload_of(shop.dead_letters.get("1")).args == [{"amount": 6}]


def test_purge_asks_first(run: Any, shop: Any):
    assert run("purge", "--all", input="n\n").exit_code == 1
    assert left(shop) == ["0", "1", "2"]

    assert "Throw away 1 dead letter for good?" in run("purge", "--id", "1", input="y\n").output
    assert left(shop) == ["0", "2"]
    assert json.loads(run("purge", "--all", "--yes", "--json").output) == {"purged": 2}


def test_export_writes_arguments(run: Any, tmp_path: Any):
    lines = run("export", "--id", "2").output.splitlines()

    assert [json.loads(line)["body"][0] for line in lines] == [[{"card": SECRET}]]
    run("export", "-o", str(tmp_path / "out"))
    assert len((tmp_path / "out").read_text().splitlines()) == 3


@pytest.mark.parametrize("group", [celerykit, kit])
def test_both_command_lines_have_it(group: Any, shop: Any):
    done = CliRunner().invoke(group, ["dead", "list", "--help"])

    assert done.exit_code == 0
    assert "--fingerprint" in done.output


def test_app_is_asked_for():
    done = CliRunner().invoke(dead, ["list"])

    assert done.exit_code == 2
    assert "-A" in done.output
