"""
The app and its settings.
"""

from __future__ import annotations

import types
from datetime import timedelta
from typing import Any

import pytest

from celerykit import InvalidSettings, shared_task
from celerykit.backends import RedisBackend


def test_nothing_is_read_when_an_app_is_made(make_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app()
    monkeypatch.setenv("CELERY_TASK_DEFAULT_QUEUE", "later")

    assert app.conf.task_default_queue == "later"


def test_the_environment_is_typed(make_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_TASK_ACKS_LATE", "false")
    monkeypatch.setenv("CELERY_INCLUDE", "a.tasks,b.tasks")
    monkeypatch.setenv("CELERYKIT_MAX_ETA", "P2D")
    app = make_app()

    assert app.conf.task_acks_late is False
    assert list(app.conf.include) == ["a.tasks", "b.tasks"]
    assert app.settings.kit.max_eta == timedelta(days=2)


def test_code_is_typed_and_wins(make_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_TASK_TRACK_STARTED", "false")
    app = make_app(worker_prefetch_multiplier="3")
    app.conf.task_track_started = "yes"

    assert app.conf.task_track_started is True
    assert app.conf.worker_prefetch_multiplier == 3


def test_our_defaults_hold_unless_the_profile_is_stock(make_app: Any) -> None:
    assert make_app().conf.task_acks_late is True
    assert make_app(profile="stock").conf.task_acks_late is False
    assert make_app(task_acks_late=False).conf.task_acks_late is False


@pytest.mark.parametrize("where", ["environment", "code", "config"])
def test_a_misspelt_setting_is_an_error_with_the_right_name(
    make_app: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    app = make_app(**({"task_ack_late": True} if where == "code" else {}))
    if where == "environment":
        monkeypatch.setenv("CELERY_TASK_ACK_LATE", "1")
    if where == "config":
        config = types.SimpleNamespace(CELERY_TASK_ACK_LATE=True)
        app.config_from_object(config, namespace="CELERY")

    with pytest.raises(InvalidSettings, match=r"(?i)task_acks_late"):
        app.conf.task_acks_late  # noqa: B018


def test_a_config_object_without_namespace_may_use_old_names(make_app: Any) -> None:
    app = make_app()
    app.config_from_object(types.SimpleNamespace(task_serializer="yaml", CELERY_DEFAULT_QUEUE="old"))

    assert app.conf.task_serializer == "yaml"
    assert app.conf.task_default_queue == "old"
    assert app.conf.task_acks_late is True


def test_the_environment_wins_over_a_config_object(make_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_TASK_DEFAULT_QUEUE", "environment")
    app = make_app()
    app.config_from_object(types.SimpleNamespace(CELERY_TASK_DEFAULT_QUEUE="object"), namespace="CELERY")

    assert app.conf.task_default_queue == "environment"


def test_valkey_urls_are_redis_urls_to_celery(make_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "valkey://127.0.0.1:1/0")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "valkeys://127.0.0.1:1/1")
    app = make_app(broker=None, backend=None)

    assert app.connection_for_write().as_uri().startswith("redis://")
    assert app.connection_for_read().as_uri().startswith("redis://")
    assert isinstance(app.backend, RedisBackend)
    assert app.backend.connparams["ssl_cert_reqs"] is not None


def test_waits_are_bounded_for_producers_only(make_app: Any) -> None:
    app = make_app(broker="redis://127.0.0.1:1/0", publish_deadline=3, broker_transport_options={"socket_timeout": 9})

    write, read = app.connection_for_write(), app.connection_for_read()

    assert write.transport_options.items() >= {"socket_timeout": 9, "socket_connect_timeout": 3.0}.items()
    assert read.transport_options == {"socket_timeout": 9}


def test_a_shared_task_is_typed_in_our_apps_and_works_in_stock_ones(make_app: Any) -> None:
    import celery

    @shared_task(name="unit.shared")
    def shared(n: int) -> int:
        return n

    ours, stock = make_app(), celery.Celery("stock", broker="memory://", set_as_current=False)

    assert ours.tasks["unit.shared"].contract.task == "unit.shared"
    assert stock.tasks["unit.shared"](3) == 3
    assert not hasattr(stock.tasks["unit.shared"], "using")
