"""
``celerykit check --settings``: what it prints, and how it ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from celery.app.defaults import NAMESPACES, flatten
from click.testing import CliRunner, Result

from celerykit.check import as_json, as_text, rows
from celerykit.cli.check import check
from celerykit.settings import Settings, load

OPTIONS = {name: (option.type, option.default) for name, option in flatten(NAMESPACES)}

SECRET = "hunter2"


def settings(**environ: str) -> Settings:
    """Return what an app would have read from this environment."""
    return load(OPTIONS, environ=environ, env_file=None, container=False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run the command in an empty directory, which may have a module ``shop`` in it."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str, app: Any = None) -> Result:
        if app is not None:
            module = ModuleType("shop")
            monkeypatch.setattr(module, "app", app, raising=False)
            monkeypatch.setitem(sys.modules, "shop", module)
        return CliRunner().invoke(check, ["--settings", *arguments])

    return invoke


# What is shown


def test_only_what_differs_from_celery_is_listed() -> None:
    table = rows(settings(CELERYKIT_PROFILE="stock", CELERY_TASK_ACKS_LATE="true", CELERY_TASK_ALWAYS_EAGER="false"))

    assert [(row.name, row.value, row.source) for row in table] == [
        ("kit.profile", "stock", "environment CELERYKIT_PROFILE"),
        ("task_acks_late", True, "environment CELERY_TASK_ACKS_LATE"),
    ]


def test_all_lists_every_setting() -> None:
    listed = {row.name: row.source for row in rows(settings(), everything=True)}

    assert listed.keys() >= {*OPTIONS, "kit.max_eta"}
    assert listed["task_always_eager"] == "Celery default"


def test_our_defaults_say_why() -> None:
    [row] = [row for row in rows(settings()) if row.name == "worker_prefetch_multiplier"]

    assert row.source == "celerykit default"
    assert row.reason
    assert "worker_prefetch_multiplier: " in as_text([row])


def test_an_opinion_that_the_user_shares_is_the_users() -> None:
    [row] = [row for row in rows(settings(CELERY_TASK_ACKS_LATE="1")) if row.name == "task_acks_late"]

    assert (row.source, row.reason) == ("environment CELERY_TASK_ACKS_LATE", "")


def test_text_is_in_columns_and_cut() -> None:
    table = rows(settings(CELERYKIT_PROFILE="stock", CELERY_TASK_ROUTES=json.dumps({"task": "q" * 99})))

    assert as_text(table).splitlines() == [
        f"kit.profile  {'stock':60}  environment CELERYKIT_PROFILE",
        f'task_routes  {{"task": "{"q" * 49}…  environment CELERY_TASK_ROUTES',
    ]


def test_json_has_values_whole() -> None:
    table = json.loads(as_json(rows(settings(CELERY_TASK_ROUTES='{"a": "b"}'))))

    [row] = [row for row in table if row["name"] == "task_acks_late"]
    assert row["value"] is True
    assert row["variable"] == "CELERY_TASK_ACKS_LATE"


@pytest.mark.parametrize("write", [as_text, as_json])
@pytest.mark.parametrize("everything", [True, False])
def test_no_secret_is_printed(write: Any, everything: bool) -> None:
    table = rows(
        settings(
            CELERY_BROKER_URL=f"redis://:{SECRET}@h;amqp://u:{SECRET}@h",
            CELERY_RESULT_BACKEND=f"db+postgresql://u:{SECRET}@h/d",
            CELERY_REDIS_PASSWORD=SECRET,
            CELERY_SECURITY_KEY_PASSWORD=SECRET,
            CELERY_BROKER_TRANSPORT_OPTIONS=json.dumps({"sentinel_kwargs": {"password": SECRET}}),
        ),
        everything=everything,
    )
    written = write(table)

    assert "redis_password" in written
    assert SECRET not in written


# How it ends


def test_the_app_that_is_named_is_shown(run: Any) -> None:
    result = run("-A", "shop", "--json", app=SimpleNamespace(settings=settings(CELERY_TASK_TIME_LIMIT="30")))

    assert result.exit_code == 0
    assert ("task_time_limit", 30) in [(row["name"], row["value"]) for row in json.loads(result.stdout)]


def test_under_celerys_command_line_the_app_is_celerys() -> None:
    celerys = SimpleNamespace(app=SimpleNamespace(settings=settings(CELERY_TASK_TIME_LIMIT="30")))
    result = CliRunner().invoke(check, ["--settings"], obj=celerys)

    assert result.exit_code == 0
    assert "environment CELERY_TASK_TIME_LIMIT" in result.stdout


def test_without_an_app_the_environment_is_shown(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_TASK_TIME_LIMIT", "30")
    result = run()

    assert result.exit_code == 0
    assert "environment CELERY_TASK_TIME_LIMIT" in result.stdout


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_mistakes_end_it_with_1(run: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setenv("CELERY_TASK_ACK_LATE", "1")
    monkeypatch.setenv("CELERY_BROKER_URL", f"reddis://:{SECRET}@h")
    result = run(*arguments)
    problems = json.loads(result.stdout)["problems"] if arguments else result.stderr.splitlines()

    assert result.exit_code == 1
    assert len(problems) == 2
    assert "Did you mean CELERY_TASK_ACKS_LATE?" in problems[0]
    assert SECRET not in result.output


@pytest.mark.parametrize(
    ("app", "why"),
    [
        ("nowhere", "No module named 'nowhere'"),
        ("shop:nothing", "shop has no 'nothing'"),
        ("shop:app", "it is a object, and not a celerykit.CeleryKit"),
    ],
)
def test_a_wrong_app_ends_it_with_2(run: Any, app: str, why: str) -> None:
    result = run("-A", app, app=object())

    assert result.exit_code == 2
    assert f"-A {app}: " in result.stderr
    assert why in result.stderr


def test_an_app_that_cannot_be_imported_gives_no_secret_away(run: Any, tmp_path: Path) -> None:
    (tmp_path / "broken_shop.py").write_text(f"raise OSError('cannot connect to redis://:{SECRET}@h')\n")
    result = run("-A", "broken_shop")

    assert result.exit_code == 2
    assert "OSError: cannot connect to redis://:***@h" in result.stderr


def test_it_says_what_can_be_checked() -> None:
    result = CliRunner().invoke(check, [])

    assert result.exit_code == 2
    assert "--settings" in result.stderr


def test_its_help_imports_nothing_to_check_with() -> None:
    code = "import sys, celerykit.cli.check; sys.exit('celerykit.check' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
