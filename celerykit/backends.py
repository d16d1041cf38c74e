"""
Celery's Redis result backends, without a round trip at each publish, and patient with what a task has achieved.

Stock, a caller subscribes to a result before its task is sent, whether or not
anybody will wait for it; with the backend down, publishing then blocks for
seconds. Waiting subscribes as well, and looks at what is stored already, so
nothing is missed by leaving the first subscription out.

A chord needs the backend, to count its members: with the backend down, sending
one is an error, in as much time as publishing may take.

And stock, with the backend down, a task that has finished either loses its
result, or, told to try for ever (``result_backend_always_retry``), everybody
does, who only asks for a state, too. Here it is the finished task that tries on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any, cast

import celery.backends.redis
import redis
from celery._state import get_current_worker_task

from celerykit.connections import ending_client
from celerykit.deadline import DeadlinePassed, within
from celerykit.looks import plain
from celerykit.publishing import UnreachableBroker
from celerykit.settings import settle
from celerykit.task import FINISHED

__all__ = ["RedisBackend", "SentinelBackend"]


def _has_finished() -> bool:
    return hasattr(getattr(get_current_worker_task(), "request", None), FINISHED)


class _Patient:
    """Tries on for ever where a task has run, and its outcome would be lost; elsewhere as it is told."""

    _is_told_to = False

    @property
    def always_retry(self) -> bool:
        """Tell Celery whether to try an operation again that failed."""
        return self._is_told_to or _has_finished()

    @always_retry.setter
    def always_retry(self, value: bool) -> None:
        self._is_told_to = value


class _Discreet:
    """Stores what is secret among a call's arguments masked; they are stored with ``result_extended``."""

    #: `looks.told` asks.
    takes_told = True

    def encode_result(self, result: Any, state: str) -> Any:
        """Write what came of a task for the serializer, which may know dicts, but none of another class."""
        stock: Any = super()
        return stock.encode_result(plain(result), state)

    def store_result(
        self, task_id: Any, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        """Store what came of a task."""
        app = cast("Any", self).app
        if request is not None and app.conf.result_extended:
            request = _shown(app, request)
        stock: Any = super()
        return stock.store_result(task_id, result, state, traceback, request=request, **kwargs)


def _shown(app: Any, request: Any) -> Any:
    look = getattr(app.tasks.get(getattr(request, "task", None)), "look", None)
    args, kwargs = getattr(request, "args", None), getattr(request, "kwargs", None)
    if look is None or not isinstance(args, list | tuple) or not isinstance(kwargs, Mapping):
        return request
    shown = copy(request)
    shown.args, shown.kwargs = look.masked(args, kwargs)
    return shown


# Celery's stubs do not know it.
_StockConsumer: Any = cast("Any", celery.backends.redis).ResultConsumer


class ResultConsumer(_StockConsumer):  # type: ignore[misc]
    """
    Subscribes to results when somebody waits for one.

    Stock, a group that is sent subscribes to each member's result.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: A dict for its order, and because taking from it is one step.
        self._wanted: dict[str, bool] = {}

    def consume_from(self, task_id: str) -> None:
        """Remember what to subscribe to."""
        self._wanted[task_id] = True

    def cancel_for(self, task_id: str) -> None:
        """Forget a result, or end the subscription to it."""
        if not self._wanted.pop(task_id, False):
            super().cancel_for(task_id)

    def on_wait_for_pending(self, result: Any, **kwargs: Any) -> None:
        """Subscribe, and only then look at what is stored already."""
        self._subscribe()
        super().on_wait_for_pending(result, **kwargs)

    def drain_events(self, timeout: float | None = None) -> None:
        """Wait for results."""
        self._subscribe()
        super().drain_events(timeout)

    def _subscribe(self) -> None:
        while self._wanted:
            for task_id in tuple(self._wanted):
                super().consume_from(task_id)
                self._wanted.pop(task_id, None)


class RedisBackend(_Patient, _Discreet, celery.backends.redis.RedisBackend):
    """Subscribes to a result when somebody waits for it; takes Valkey's URLs too."""

    ResultConsumer = ResultConsumer

    def __init__(self, *args: Any, app: Any, url: str | None = None, **kwargs: Any) -> None:
        settled = settle(url, has_tls_options=bool(app.conf.redis_backend_use_ssl))
        init: Any = super().__init__
        init(*args, app=app, url=settled, **kwargs)

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Do nothing; see the module."""

    def _create_client(self, **params: Any) -> Any:
        stock: Any = super()
        return stock._create_client(
            **params | {"connection_class": ending_client(params.get("connection_class", redis.Connection))}
        )

    def apply_chord(self, *args: Any, **kwargs: Any) -> Any:
        """Note what a chord's members are, within the time of a publish."""
        with self._within_a_publish():
            return super().apply_chord(*args, **kwargs)

    def set_chord_size(self, *args: Any, **kwargs: Any) -> None:
        """Note how many members a chord has, within the time of a publish."""
        stock: Any = super()
        with self._within_a_publish():
            stock.set_chord_size(*args, **kwargs)

    @contextmanager
    def _within_a_publish(self) -> Iterator[None]:
        kit = cast("Any", self).app.settings.kit
        if kit.profile == "stock" or _has_finished():
            yield
            return
        try:
            with within(kit.publish_deadline.total_seconds()):
                yield
        except DeadlinePassed as error:
            raise UnreachableBroker(
                f"a chord: the result backend, where its members are counted, did not answer ({error}). Members may "
                "have been sent; the body will not run. Check that it runs, and CELERY_RESULT_BACKEND.",
                reason=str(error),
            ) from error


class SentinelBackend(_Patient, _Discreet, celery.backends.redis.SentinelBackend):
    """Subscribes to a result when somebody waits for it."""

    ResultConsumer = ResultConsumer

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Do nothing; see the module."""
