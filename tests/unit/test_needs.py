"""What needs a store that all processes share says so where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from celerykit import Once, Rate
from celerykit.errors import InvalidSettings
from celerykit.needs import check_store, needs_store, store_for

RABBITMQ = "amqp://guest:hunter2@localhost//"


@pytest.fixture
def make_shop(make_app: Any) -> Any:
    """Make an app with one task of each kind, whose broker can be no store."""

    def make(**options: Any) -> Any:
        app = make_app(**{"broker": RABBITMQ, **options})

        @app.task(name="shop.charge", once=Once())
        def charge(order: int) -> None: ...

        @app.task(name="shop.ship", remember=True, limits=(Rate("1/s"),))
        def ship(order: int) -> None: ...

        @app.task(name="shop.plain")
        def plain(order: int) -> None: ...

        return app

    return make


def test_tasks_that_need_a_store_are_named_with_the_fix(make_shop: Any):
    with pytest.raises(InvalidSettings) as error:
        check_store(make_shop())

    [problem] = error.value.problems
    assert problem.startswith("shop.charge (once), shop.ship (remember, limits): ")
    assert "CELERYKIT_STORE_URL=redis://" in problem
    assert "hunter2" not in problem


def test_of_many_tasks_a_few_are_named(make_shop: Any):
    app = make_shop()
    for number in range(5):

        @app.task(name=f"shop.task{number}", remember=True)
        def task() -> None: ...

    with pytest.raises(
        InvalidSettings, match=r"shop\.ship \(remember, limits\), shop\.task0 \(remember\), and 4 more: "
    ):
        check_store(app)


def test_call_that_needs_a_store_is_refused(make_shop: Any):
    app = make_shop()

    with pytest.raises(InvalidSettings, match=r"shop\.charge \(once\): this needs a store"):
        store_for(app.tasks["shop.charge"])


def test_tasks_that_need_none_want_none(make_app: Any):
    app = make_app(broker=RABBITMQ)

    @app.task(name="shop.plain")
    def plain(order: int) -> None: ...

    check_store(app)
    assert needs_store(app.tasks["shop.plain"]) == ()


@pytest.mark.parametrize(
    "how",
    [
        {"broker": "redis://localhost:1/0"},
        {"backend": "redis://localhost:1/0"},
        {"broker": "memory://"},
        {"task_always_eager": True},
    ],
    ids=str,
)
def test_store_that_will_do(make_shop: Any, how: dict[str, Any]):
    app = make_shop(**how)

    check_store(app)
    assert store_for(app.tasks["shop.charge"]) is app.store


def test_memory_will_do_when_it_is_asked_for(make_shop: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CELERYKIT_STORE_URL", "memory://")

    check_store(make_shop())
