"""
What each pytest process of the comparison loads: names replaced, outcomes written down.

Told by three variables of the environment:

- ``COMPAT_SIDE``: ``stock`` leaves Celery as it is; ``kit`` does to the tests
  what changing their imports would do.
- ``COMPAT_TESTS``: the file that names the tests to run, one a line.
- ``COMPAT_RECORD``: the file that takes one line of JSON per fact. A line is
  written as soon as it is known: a process that is killed has told what it saw.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import celery
import pytest
from celery.signals import task_prerun

SIDE = os.environ["COMPAT_SIDE"]
TESTS = Path(os.environ["COMPAT_TESTS"])
RECORD = Path(os.environ["COMPAT_RECORD"])

#: The names a user imports from celerykit instead, under Celery's names. ``Task`` is not
#: among them: a base class written for stock Celery must keep working under a celerykit app.
REPLACED = {"Celery": "CeleryKit", "shared_task": "shared_task"}

#: Fixtures whose app every test uses.
_APPS = ("celery_app", "celery_session_app")

#: Seconds, for tests that have no limit of their own; the slowest takes 150.
_TIMEOUT = 300

#: Seconds that every test gets. One takes 21 and has a limit of 20: its maintainers count on the next try.
_SHORTEST_TIMEOUT = 60

#: Instead of five more tries of 300 s each. A timeout fires only once for all
#: tries of a test, so that a second one could hang for ever.
_FLAKY = pytest.mark.flaky(reruns=2, reruns_delay=1, rerun_except=["from pytest-timeout"])


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Substitute before Celery's conftest is imported, and make sure that it worked."""
    if SIDE == "kit":
        _substitute()
    _check_side()
    task_prerun.connect(_note_run, weak=False)


def _substitute() -> None:
    """Let ``from celery import Celery`` give celerykit's, to the tests and to Celery's own fixtures."""
    import celery.contrib.testing.app as testing

    import celerykit

    # A second module in Celery's place: celerykit itself must go on to see the first.
    sys.modules["celery"] = _Facade(celery, {theirs: getattr(celerykit, ours) for theirs, ours in REPLACED.items()})
    vars(testing)["Celery"] = celerykit.CeleryKit


class _Facade(ModuleType):
    """A module that is as another one, but for some names."""

    def __init__(self, module: ModuleType, names: Mapping[str, Any]) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(vars(module), **names)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What is imported later becomes an attribute of its package.
        super().__setattr__(name, value)
        setattr(self._module, name, value)


def _class_of_tasks() -> Any:
    """Give the class every task of this side should be of."""
    if SIDE == "stock":
        return celery.Task
    import celerykit

    return celerykit.Task


def _check_side() -> None:
    """Refuse to compare Celery with itself."""
    from celery.app.base import Celery
    from celery.contrib.testing.app import TestApp, setup_default_app

    app = TestApp()
    # Takes the shared task, and the app, away again.
    with setup_default_app(app):
        task = app.tasks[sys.modules["celery"].shared_task(_probe).name]
    if (type(app) is Celery) is not (SIDE == "stock"):
        raise pytest.UsageError(f"side {SIDE!r}: the tests would get {type(app)}")
    if not isinstance(task, _class_of_tasks()):
        raise pytest.UsageError(f"side {SIDE!r}: a shared task is {type(task).__mro__}")


def _probe() -> None:
    """Be a task."""


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any) -> Generator[None, Any, Any]:
    """Look at each app a fixture makes: with one of the other side its test would be worthless."""
    app = yield
    if fixturedef.argname in _APPS and not issubclass(app.Task, _class_of_tasks()):
        pytest.fail(f"side {SIDE!r}: the fixture {fixturedef.argname} made {app.Task.__mro__}")
    return app


def _note_run(task: Any = None, **_: Any) -> None:
    """Note, in whichever process runs it, a task and whose it is."""
    if not task.name.startswith("celery."):
        _record("run", task=task.name, ours=SIDE == "kit" and isinstance(task, _class_of_tasks()))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that were asked for, and bound them."""
    if config.option.collectonly:
        TESTS.write_text("".join(f"{item.nodeid}\n" for item in items), encoding="utf-8")
        return
    wanted = set(TESTS.read_text(encoding="utf-8").splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
    items[:] = [item for item in items if item.nodeid in wanted]
    for item in items:
        if item.get_closest_marker("flaky"):
            item.add_marker(_FLAKY, append=False)
        item.add_marker(pytest.mark.timeout(max(_own_timeout(item), _SHORTEST_TIMEOUT)), append=False)


def _own_timeout(item: pytest.Item) -> float:
    mark = item.get_closest_marker("timeout")
    return float([*mark.args, *mark.kwargs.values()][0]) if mark else _TIMEOUT


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Write down a module that cannot be imported."""
    if report.outcome != "passed":
        _record("outcome", test=report.nodeid, when="collect", outcome=report.outcome, message=_message(report))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down one phase of one test; the reader makes one outcome of them."""
    if report.outcome == "passed" and report.when != "call":
        return
    outcome: str = report.outcome
    if hasattr(report, "wasxfail"):
        outcome = "xpassed" if report.passed else "xfailed"
    _record("outcome", test=report.nodeid, when=report.when, outcome=outcome, message=_message(report))


def _record(kind: str, **facts: Any) -> None:
    """Add one fact to the record, in one short line, so that the processes of a pool can share the file."""
    with RECORD.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": kind, **facts}) + "\n")


def _message(report: pytest.CollectReport | pytest.TestReport) -> str:
    """Give the last words of a failure."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(getattr(crash, "message", None) or report.longrepr or "").strip()[:2000]
