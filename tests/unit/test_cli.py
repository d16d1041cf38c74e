"""The command line, as far as it goes without a broker."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from celerykit.cli.commands import LazyGroup, celerykit
from celerykit.cli.plugin import kit

_HEAVY = {"pydantic", "pydantic_settings", "celery", "kombu", "redis", "structlog", "jinja2"}


def imported_by(code: str) -> set[str]:
    """Run *code* in a new interpreter, and say which packages it has imported at its end."""
    report = "; import sys; print('\\n' + ' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, timeout=30, check=True)
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


def celery(*words: str) -> subprocess.CompletedProcess[str]:
    if not any(point.name == "kit" for point in importlib.metadata.entry_points(group="celery.commands")):
        pytest.skip("celerykit is not installed: pip install -e .")
    return subprocess.run([sys.executable, "-m", "celery", *words], capture_output=True, text=True, timeout=30)


def test_help_imports_nothing_heavy():
    code = "from celerykit.cli.commands import celerykit; celerykit(['--help'], standalone_mode=False)"

    assert not imported_by(code) & _HEAVY


def test_celery_plugin_imports_nothing_heavy():
    """Celery imports it on every call; and Celery itself is there already."""
    assert not imported_by("import celerykit.cli.plugin") & _HEAVY


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in (celerykit, kit) for name in sorted(group.lazy)]
)
def test_listed_command_is_there_and_has_help(group: LazyGroup, name: str):
    command = group.get_command(click.Context(group), name)

    assert command is not None
    assert command.name == name
    assert command.get_short_help_str()


def test_help_lists_each_command_with_its_line():
    shown = CliRunner().invoke(celerykit, ["--help"]).output

    for name, (_, what) in celerykit.lazy.items():
        assert f"{name}  " in shown
        assert what.split()[0] in shown


def test_misspelt_command_is_guessed():
    done = CliRunner().invoke(celerykit, ["chekc"])

    assert done.exit_code == 2
    assert "Did you mean 'check'?" in done.output


def test_unknown_command_is_refused():
    done = CliRunner().invoke(celerykit, ["xyzzy"])

    assert done.exit_code == 2
    assert "No such command 'xyzzy'" in done.output


def test_dev_asks_for_the_app(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CELERY_APP", raising=False)
    done = CliRunner().invoke(celerykit, ["dev"])

    assert done.exit_code == 2
    assert "celerykit dev -A shop" in done.output


def test_celery_lists_our_commands():
    assert "kit  " in celery("--help").stdout


def test_kit_asks_for_the_app():
    """Without -A it would get Celery's default app, which is nobody's."""
    done = celery("kit", "check")

    assert done.returncode == 2
    assert "celery -A shop kit" in done.stderr


def test_kit_shows_help_without_an_app():
    done = celery("kit", "check", "--help")

    assert done.returncode == 0
    assert "Usage:" in done.stdout
