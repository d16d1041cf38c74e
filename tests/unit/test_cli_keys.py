"""`celerykit keys`, on an app whose store is this process's memory."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
from click.testing import CliRunner, Result

from celerykit import Key, Once
from celerykit.cli.commands import celerykit
from celerykit.cli.keys import keys
from celerykit.errors import StoreUnavailable
from celerykit.idempotency.claim import Turn
from celerykit.idempotency.sending import Asked

SECRET = "4111-1111"


@pytest.fixture
def shop(make_app: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("CELERY_APP", raising=False)
    app = make_app()

    @app.task(name="shop.charge", once=Once())
    def charge(order: Annotated[int, Key()], *, card: str = "") -> dict[str, str]:
        return {"card": card}

    @app.task(name="shop.ship", remember=True)
    def ship(order: int) -> None: ...

    return app


@pytest.fixture
def run(shop: Any) -> Any:
    def run_(*words: str, **how: Any) -> Result:
        return CliRunner().invoke(keys, list(words), obj=SimpleNamespace(app=shop), **how)

    return run_


@pytest.fixture(autouse=True)
def held(shop: Any) -> dict[str, str]:
    """Three keys: of a call that is queued, of one that runs, and of one that is done."""
    return {state: claimed(shop, number, state) for number, state in enumerate(("claimed", "running", "done"))}


def claimed(shop: Any, order: int, state: str) -> str:
    claims = shop.tasks["shop.charge"].claims
    identity = claims.identify((order,), {"card": SECRET}, id=None)
    claims.send(Asked(claims, identity, f"call-{order}"))
    if state != "claimed":
        started = claims.start(identity, f"call-{order}", Turn(), token="", joined=None, was_sent=True)
        if state == "done":
            claims.finish(started.run, {"card": SECRET})
    return str(identity.key)


def left(shop: Any) -> set[str]:
    return {name.removeprefix("once:") for name, _ in shop.store.find("once:")}


# list


def test_list_is_a_table_without_results(run: Any, held: dict[str, str]):
    head, *lines = run("list").stdout.splitlines()

    assert head.split() == ["KEY", "STATE", "CALL", "SINCE", "LEASE"]
    rows = {line.split()[1]: line.split() for line in lines}
    for number, (state, key) in enumerate(held.items()):
        short, _, call, *_ = rows[state]
        assert key.startswith(short)
        assert call == f"call-{number}"
    assert rows["running"][-2:] == ["30", "s"]
    assert SECRET not in run("list").output


def test_list_for_machines_is_lines_without_results(run: Any, held: dict[str, str]):
    shown = run("list", "--json").stdout

    rows = {row["key"]: row for row in map(json.loads, shown.splitlines())}
    assert {key: row["state"] for key, row in rows.items()} == {key: state for state, key in held.items()}
    assert rows[held["done"]]["result_bytes"] == len(json.dumps({"card": SECRET}))
    assert SECRET not in shown


@pytest.mark.parametrize(
    ("words", "states"),
    [
        (["--state", "running"], ["running"]),
        (["--task", "shop.charge"], ["claimed", "running", "done"]),
        (["--task", "shop.c*", "--state", "done"], ["done"]),
        (["--task", "shop"], []),
    ],
)
def test_keys_are_chosen(run: Any, words: list[str], states: list[str]):
    assert [json.loads(line)["state"] for line in run("list", "--json", *words).stdout.splitlines()] == states


def test_list_says_when_there_are_more(run: Any):
    assert "There are more than 2: --limit" in run("list", "--limit", "2").stderr
    assert "more than" not in run("list", "--limit", "3").output


def test_no_keys_are_said_to_be_none(run: Any):
    assert run("list", "--task", "x").stdout == "No keys.\n"


def test_keys_of_this_process_alone_are_said_to_be_that(run: Any):
    assert "set CELERYKIT_STORE_URL" in run("list").stderr


def test_store_that_does_not_answer_is_a_line(run: Any, shop: Any, monkeypatch: pytest.MonkeyPatch):
    def find(prefix: str) -> Any:
        raise StoreUnavailable("the store at there:1 did not answer.")

    monkeypatch.setattr(shop.store, "find", find)
    done = run("list")

    assert done.exit_code == 1
    assert done.stderr.endswith("Error: the store at there:1 did not answer.\n")


# show


def test_show_tells_all_but_the_result(run: Any, held: dict[str, str]):
    shown = run("show", held["done"]).stdout

    assert f"key        {held['done']}\n" in shown
    assert "call       call-2\n" in shown
    assert "keep       1 d\n" in shown
    assert "result     21 bytes of JSON; --result shows it\n" in shown
    assert "\n\nIf it is let go, it is forgotten, and runs again" in shown
    assert SECRET not in shown


def test_show_tells_the_result_when_asked(run: Any, held: dict[str, str]):
    assert f'result     {{"card": "{SECRET}"}}\n' in run("show", held["done"], "--result").stdout
    assert json.loads(run("show", held["done"], "--result", "--json").stdout)["result"] == {"card": SECRET}
    assert SECRET not in run("show", held["done"], "--json").stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--task", "shop.charge", "--args", "[1]"],
        ["--task", "charge", "--kwargs", '{"order": "1"}'],
        ["--task", "shop.charge", "--id", "call-1"],
    ],
)
def test_key_is_named_by_its_call(run: Any, held: dict[str, str], words: list[str]):
    assert json.loads(run("show", "--json", *words).stdout)["key"] == held["running"]


def test_key_of_a_call_that_holds_none_is_not_there(run: Any):
    done = run("show", "--task", "shop.charge", "--args", "[9]")

    assert done.exit_code == 1
    assert "nobody holds it" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Which key?"),
        (["x", "--task", "shop.charge"], "Which key?"),
        (["x", "--id", "call-1"], "Which key?"),
        (["--task", "shop.charge", "--args", "[1]", "--id", "call-1"], "Say either --id"),
        (["--task", "shop.charge", "--args", "[1"], "it is no JSON"),
        (["--task", "shop.charge", "--args", "{}"], "it must be such as"),
        (["--task", "shop.charge", "--args", '["one"]'], "argument 'order'"),
        (["--task", "shop.ship", "--args", "[1]"], "by their ids"),
        (["--task", "shop.chrage"], "Did you mean shop.charge?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_question_that_makes_no_sense_is_a_usage_error(run: Any, words: list[str], says: str):
    done = run("show", *words)

    assert done.exit_code == 2
    assert says in " ".join(done.stderr.split())
    assert "was not sent" not in done.stderr


def test_show_tells_what_a_call_failed_of(run: Any, shop: Any, held: dict[str, str]):
    claims = shop.tasks["shop.charge"].claims
    started = claims.start(claims.identify((0,), {}, id=None), "call-0", Turn(), token="", joined=None, was_sent=True)
    claims.fail(started.run, ValueError(SECRET))

    shown = run("show", held["claimed"]).stdout
    assert "state      failed\n" in shown
    assert "error      ValueError\n" in shown
    assert SECRET not in shown


def test_show_tells_when_the_next_turn_is(run: Any, shop: Any):
    claims = shop.tasks["shop.charge"].claims
    identity = claims.identify((7,), {}, id=None)
    started = claims.start(identity, "call-7", Turn(), token="", joined=None, was_sent=False)
    claims.put_off(started.run, delay=60, resume={"at": 2_000_000_000.0, "attempt": 2, "kind": "retry"})

    shown = run("show", identity.key).stdout
    assert "turn       1\n" in shown
    assert "retry, attempt 2\n" in shown


# release


def test_release_asks_and_says_what_it_means(run: Any, shop: Any, held: dict[str, str]):
    done = run("release", held["done"], input="y\n")

    assert done.exit_code == 0
    assert f"{held['done']}: done, call call-2: it is forgotten, and" in done.stderr
    assert "Let 1 key go?" in done.stderr
    assert done.stdout == "1 let go.\n"
    assert left(shop) == {held["claimed"], held["running"]}


def test_release_that_is_not_wanted_lets_nothing_go(run: Any, shop: Any, held: dict[str, str]):
    done = run("release", held["done"], held["claimed"], input="n\n")

    assert done.exit_code == 1
    assert "Let 2 keys go?" in done.stderr
    assert left(shop) == set(held.values())


def test_release_of_what_is_being_run_is_refused(run: Any, shop: Any, held: dict[str, str]):
    done = run("release", held["running"], held["done"], "--yes")

    assert done.exit_code == 1
    assert "call-1 is being run" in done.stdout
    assert "another call may run beside it" in done.stdout
    assert "--force" in done.stdout
    assert done.stdout.endswith("1 let go, 1 refused.\n")
    assert left(shop) == {held["claimed"], held["running"]}


def test_nobody_is_asked_about_what_is_refused(run: Any, held: dict[str, str]):
    done = run("release", held["running"], "shop.charge:none")

    assert done.exit_code == 1
    assert "go?" not in done.stderr
    assert done.stdout.endswith("0 let go, 2 refused.\n")


def test_release_by_force(run: Any, shop: Any, held: dict[str, str]):
    done = run("release", held["running"], "--force", input="y\n")

    assert done.exit_code == 0
    assert "its run goes on" in done.stderr
    assert left(shop) == {held["claimed"], held["done"]}


def test_release_for_machines(run: Any, held: dict[str, str]):
    done = run("release", held["done"], "shop.charge:none", "--yes", "--json")

    report = json.loads(done.stdout)
    assert done.exit_code == 1
    assert report["released"] == [held["done"]]
    assert [refusal["key"] for refusal in report["refused"]] == ["shop.charge:none"]


def test_keys_need_an_app():
    done = CliRunner().invoke(celerykit, ["keys", "list"])

    assert done.exit_code == 2
    assert "Which app?" in done.output
