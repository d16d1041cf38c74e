"""
Apps that need no service.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from celerykit import CeleryKit


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the developer's own broker out of the tests."""
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make_app() -> Any:
    """Make an app whose tasks stay its own: Celery gives those of one app to all that come after."""

    def make(**options: Any) -> Any:
        app: Any = CeleryKit("unit", **{"broker": "memory://", "backend": "cache+memory://", **options})
        app.task = functools.partial(app.task, shared=False)
        return app

    return functools.partial(make, set_as_current=False)


@pytest.fixture
def app(make_app: Any) -> Any:
    return make_app()


@pytest.fixture
def eager(app: Any) -> Any:
    """An app whose tasks run where they are called."""
    app.conf.task_always_eager = True
    return app
