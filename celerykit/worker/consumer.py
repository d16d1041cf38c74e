"""
Receives messages: what is no task's message is buried, and what would have ended the worker does not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

from celery import signals
from celery.app.task import Context
from celery.exceptions import InvalidTaskError, NotRegistered
from celery.utils.imports import symbol_by_name
from celery.utils.time import maybe_iso8601
from celery.worker import consumer as stock
from celery.worker import state
from kombu.exceptions import ContentDisallowed, DecodeError

from celerykit import events, running
from celerykit.dead_letters import Reason
from celerykit.errors import Undeliverable
from celerykit.needs import check_store
from celerykit.rollout import pause_for_newer
from celerykit.worker import claims, shape, shutdown
from celerykit.worker.burial import Undertaker
from celerykit.worker.ending import ending_of, info_of
from celerykit.worker.leases import Leases, all_of
from celerykit.worker.pulse import TURN, Vitals
from celerykit.worker.request import Request
from celerykit.worker.returns import Returns
from celerykit.worker.starts import Starts, Verdict

__all__ = ["Consumer"]

#: Kombu says by it that a message could not be acknowledged.
log = logging.getLogger(__name__)

#: What a message can raise, too, though Kombu counts some of it among the errors of a connection.
_A_MESSAGES_OWN = (LookupError, ValueError, TypeError, AttributeError, InvalidTaskError)


#: celery-types knows half of it.
_Stock: Any = stock.Consumer


class Consumer(_Stock):  # type: ignore[misc]
    """A consumer that no message can stop."""

    def __init__(self, on_task_request: Callable[[Any], Any], *args: Any, **kwargs: Any) -> None:
        app: Any = kwargs["app"]
        check_store(app)
        kit = app.settings.kit
        self._hand_over = on_task_request
        self.undertaker = Undertaker(
            app,
            worker=kwargs.get("hostname") or "",
            starts=Starts(app.store, limit=kit.max_deliveries, keep=kit.dead_letter_keep.total_seconds()),
            returns=Returns(self),
        )
        lease, pool = app.settings.kit.lease, kwargs.get("pool")
        self.leases = Leases(lease, on_garbage=self.undertaker.bury_item, pool=pool)
        super().__init__(self._admit, *args, **kwargs)
        self.vitals = Vitals(self)

    # Signs of life

    def start(self) -> None:
        """Consume until the worker ends, and tell that it does."""
        self.vitals.start()
        super().start()

    def on_ready(self) -> None:
        """Take note that it consumes. Celery calls this whenever it has connected."""
        super().on_ready()
        self.vitals.consume()

    def on_connection_error_before_connected(self, exc: BaseException) -> None:
        """Take note that there is no connection."""
        self.vitals.lose()
        super().on_connection_error_before_connected(exc)

    def on_connection_error_after_connected(self, exc: BaseException) -> None:
        """Take note that the connection is lost."""
        self.vitals.lose()
        super().on_connection_error_after_connected(exc)

    def register_with_event_loop(self, hub: Any) -> None:
        """Let the event loop take note that it turns."""
        super().register_with_event_loop(hub)
        hub.call_repeatedly(TURN, self.vitals.turn)

    def perform_pending_operations(self) -> None:
        """Take note that the loop turns: where there is no event loop, it calls this each time."""
        self.vitals.turn()
        super().perform_pending_operations()

    # Connecting

    def connection_for_read(self, heartbeat: Any = None) -> Any:
        """Connect to consume; on Redis and Valkey, by a connection whose messages are leased."""
        return self.ensure_connected(self.leases.guard(self.app.connection_for_read(heartbeat=heartbeat)))

    def connect(self) -> Any:
        """Connect, and keep what comes by this connection."""
        connection = super().connect()
        self.leases.follow(connection)
        return connection

    def shutdown(self) -> None:
        """Let the connection go, and then its leases. Celery calls this when the pool has stopped."""
        super().shutdown()
        self.leases.stop()
        self.vitals.stop()

    def cancel_active_requests(self) -> None:
        """Cut off what runs; it goes back."""
        shutdown.cancel_active_requests(self)

    def update_strategies(self) -> None:
        """See to it that every task's requests are ours, also of tasks that are of Celery's class or have their own."""
        for task in self.app.tasks.values():
            theirs = symbol_by_name(task.Request)
            if not issubclass(theirs, Request):
                task.Request = type(theirs.__name__, (Request, theirs), {})
        super().update_strategies()

    # Letting start

    def _admit(self, request: Any) -> None:
        """Let a request start that may. Celery calls this when there is nothing left to wait for."""
        if not shutdown.may_start(self):
            return
        # Asked when it has a place in the pool: what only stood in line was not started.
        request.may_start = self._may_start
        stands_still = self.vitals.begin(request)
        try:
            self._hand_over(request)
        except self._broken as error:
            if not isinstance(error, _A_MESSAGES_OWN):
                raise
            request.kill(error)
        except Exception as error:  # noqa: BLE001  (an edge: this may be called by a timer, which drops what raises)
            request.kill(error)
        finally:
            if stands_still:
                self.vitals.end()

    def _may_start(self, request: Any) -> bool:
        verdict = self._judge(request)
        if verdict is Verdict.START:
            claims.begin(request)
        else:
            self._refuse(request, verdict)
        return verdict is Verdict.START

    def _judge(self, request: Any) -> Verdict:
        if not request.delivery_info.get("redelivered"):
            return self.undertaker.starts.judge(request)
        # A broker that went away gives again what this worker still runs, or has just run.
        if self._is_taken_over(request):
            return Verdict.TAKEN_OVER
        if self.undertaker.starts.has_succeeded(request):
            return Verdict.ACKNOWLEDGE
        if self.undertaker.is_waiting(request):
            return Verdict.TAKEN_OVER
        return self.undertaker.starts.judge(request)

    def _is_taken_over(self, request: Any) -> bool:
        """Tell whether this very message is being run; that run will then answer for this delivery."""
        running = (one for one in all_of(state.active_requests) if one is not request and one.is_same(request))
        for one in running:
            one.take_over(request)
            return True
        return False

    def _refuse(self, request: Any, verdict: Verdict) -> None:
        if verdict is Verdict.BURY:
            if request._success_was_stored():
                state.task_ready(request)
                request.acknowledge()
                return
            request.kill(Undeliverable(f"it was started {request.starts - 1} times without coming to an end"))
            return
        if verdict is Verdict.TAKEN_OVER:
            state.reserved_requests.discard(request)
            known: Any = state.requests
            if known.get(request.id) is request:
                del known[request.id]
            return
        state.task_ready(request)
        if verdict is Verdict.ACKNOWLEDGE:
            request.acknowledge()
        else:
            self.undertaker.returns.give_back(request.message, reject=request.reject, acknowledge=request.acknowledge)

    # Receiving

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """Put a guard around what Celery does with a message."""
        receive = super().create_task_handler(*args, **kwargs)

        def on_message(message: Any) -> None:
            message.undertaker = self.undertaker
            self.vitals.receive(message)
            token = running.at_hand.set(_told_by(message))
            try:
                self._check(message)
                receive(message)
            except self._broken as error:
                if not isinstance(error, _A_MESSAGES_OWN):
                    raise
                self.on_invalid_task(None, message, error)
            except DecodeError as error:
                self.on_decode_error(message, error)
            except Exception as error:  # noqa: BLE001  (an edge: no message may end the worker)
                self.on_invalid_task(None, message, error)
            finally:
                running.at_hand.reset(token)

        return on_message

    @property
    def _broken(self) -> tuple[type[BaseException], ...]:
        return tuple(self.connection_errors)

    def _check(self, message: Any) -> None:
        shape.check_headers(message.headers)
        try:
            body = message.payload
        except Exception as error:  # (decoders raise what they like)
            # Not its repr: that of a `UnicodeDecodeError` has all of the body in it.
            raise DecodeError(f"its body cannot be read: {events.describe(error)}") from error
        shape.check_body(body)
        if eta := (message.headers.get("eta") or (isinstance(body, Mapping) and body.get("eta"))):
            limit = self.app.settings.kit.max_eta
            shape.check_eta(maybe_iso8601(eta), now=datetime.now(UTC), limit=limit)

    def on_decode_error(self, message: Any, exc: BaseException) -> None:
        """Bury a message whose body cannot be read."""
        message.undertaker = self.undertaker
        self._bury(message, "undecodable", exc)

    def on_unknown_message(self, body: Any, message: Any) -> None:
        """Bury a message that is no task's."""
        self._bury(message, "malformed", shape.Malformed("it names no task"))
        signals.task_rejected.send(sender=self, message=message, exc=None)

    def on_invalid_task(self, body: Any, message: Any, exc: BaseException) -> None:
        """Bury a message that is not what a task's message looks like."""
        self._bury(message, "undecodable" if isinstance(exc, ContentDisallowed) else "malformed", exc)
        signals.task_rejected.send(sender=self, message=message, exc=exc)

    def on_unknown_task(self, body: Any, message: Any, exc: BaseException) -> None:
        """Bury a message for a task that nobody here knows, once a newer deploy has had time to take it."""
        headers = message.headers if "task" in message.headers else message.payload
        name, task_id = headers["task"], headers["id"]
        pause = pause_for_newer(self.app.store, task_id, grace=self.app.settings.kit.unknown_task_grace)
        if pause is not None:
            events.TASK_HANDED_BACK.tell(task=name, id=task_id, reason="unknown_task", delay=pause)
            reject = partial(message.reject_log_error, log, self._broken)
            self.undertaker.returns.give_back(
                message, reject=reject, acknowledge=self._acknowledging(message), after=pause
            )
            return
        self._bury(message, "unknown_task", NotRegistered(name))
        signals.task_unknown.send(sender=self, message=message, exc=exc, name=name, id=task_id)

    # Burying

    def _bury(self, message: Any, reason: Reason, error: BaseException) -> None:
        if message.acknowledged:
            return
        try:
            embed = _embed_of(message)
            ending = ending_of(error, reason=reason)
            claims.end_message(self.app, message.headers, ending.error or reason)
            self.undertaker.bury_message(message, ending, then=self._acknowledging(message), chord=embed.get("chord"))
        except Exception as failure:  # noqa: BLE001  (an edge: what can be read of such a message is anybody's guess)
            # Neither acknowledged nor lost: it goes back when the worker ends.
            events.DEAD_LETTER_NOT_WRITTEN.tell(reason=reason, error=failure, then="redelivered", exc_info=True)
        else:
            self._fail(message, embed, error)

    def _acknowledging(self, message: Any) -> Callable[[], Any]:
        return partial(self.call_soon_ack, message.ack_log_error, log, self._broken)

    def _fail(self, message: Any, embed: Mapping[str, Any], error: BaseException) -> None:
        """Tell who waits for the result, if the message says who that is."""
        headers = message.headers or {}
        task_id = headers.get("id")
        if not isinstance(task_id, str):
            return
        answer_to = {name: message.properties.get(name) for name in ("correlation_id", "reply_to")}
        context = Context({**headers, **embed, **answer_to})
        try:
            self.app.backend.mark_as_failure(task_id, error, info_of(error).traceback, request=context)
            if dispatcher := self.event_dispatcher:
                dispatcher.send("task-failed", uuid=task_id, exception=repr(error))
        except Exception as failure:  # noqa: BLE001  (an edge: a backend that is down, or headers that make no sense)
            name = headers.get("task")
            events.RESULT_NOT_STORED.tell(task=name if isinstance(name, str) else None, id=task_id, error=failure)


def _embed_of(message: Any) -> Mapping[str, Any]:
    """Give the options in a message's body, if they can be read."""
    try:
        embed = message.payload[2]
    except Exception:  # noqa: BLE001  (decoders raise what they like)
        return {}
    return embed if isinstance(embed, Mapping) else {}


def _told_by(message: Any) -> Mapping[str, Any] | None:
    """Give what a message tells of its call, as a request has it later."""
    headers = message.headers
    return {**headers, "delivery_info": message.delivery_info} if isinstance(headers, Mapping) else None
