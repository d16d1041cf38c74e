"""
One message on its way through the pool.

Celery rebuilds this class for each task and replaces `execute_using_pool` and
`on_success`; what is overridden here is left alone. The one rule: where a
message is dead, it is buried before it is acknowledged, so `acknowledge` and
`reject` are the gate, and everything before only says how the message ended.

Of `Request`, `_announce_revoked`, `_success_was_stored`, `_worker_lost_info`
and `_context` are Celery's own business; a test names the versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC
from typing import TYPE_CHECKING, Any, cast

from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.exceptions import Ignore, Reject, Retry
from celery.utils.saferepr import saferepr
from celery.utils.serialization import get_pickled_exception
from celery.utils.time import maybe_iso8601
from celery.worker import request as stock
from celery.worker import state
from kombu.utils.encoding import safe_repr

from celerykit import events, running
from celerykit.errors import InvalidPayload, TaskInterrupted, Undeliverable
from celerykit.headers import Headers
from celerykit.looks import DEEPEST, LONGEST, Look
from celerykit.redact import Secrets
from celerykit.retry import DROPPED
from celerykit.task import HANDED_BACK
from celerykit.worker import claims
from celerykit.worker.ending import Ending, ending_of, error_in, info_of
from celerykit.worker.starts import MOST_FORGIVEN, letter_of

if TYPE_CHECKING:
    from celerykit.worker.burial import Undertaker

__all__ = ["Request"]


#: celery-types knows half of it.
_Stock: Any = stock.Request


def _place(request: Any) -> tuple[int, int]:
    """Tell apart what was sent again, under the same id and for the same attempt."""
    header = Headers.of(request.request_dict)
    return header.turn, header.waits


def _described(payload: Any, look: Look, sent: Mapping[str, Any]) -> dict[str, str]:
    try:
        args, kwargs, _ = payload
        made: tuple[str, ...] = look.arguments(args, kwargs)
        given = (_given(sent.get("argsrepr"), args), _given(sent.get("kwargsrepr"), kwargs))
        if any(given):
            secrets = Secrets(look.secrets(args, kwargs))
            made = tuple(secrets.scrub(text) if text else shown for text, shown in zip(given, made, strict=True))
        return dict(zip(("argsrepr", "kwargsrepr"), made, strict=True))
    except Exception:  # noqa: BLE001  (an edge: what is no payload is found out next, and a payload may be anything)
        return {"argsrepr": "(...)", "kwargsrepr": "{...}"}


def _given(described: Any, value: Any) -> str:
    """Give how a sender chose to describe arguments, who may have hidden more; nothing when it is Celery's way."""
    if not isinstance(described, str) or described == saferepr(value, LONGEST, DEEPEST):
        return ""
    return described


class Request(_Stock):  # type: ignore[misc]
    """
    A message that is never acknowledged before it ran or was buried.

    Attributes:
        starts:
            How often the message was started, this time included, as far as is known.
    """

    starts = 1
    may_start: Any = None

    _ending: Ending | None = None
    _error: Any = None
    _is_buried = False
    _was_success_stored: Any = None

    def __init__(self, message: Any, *, headers: Any = None, body: Any = None, decoded: bool = False, **more: Any):
        headers = message.headers if headers is None else headers
        look = getattr(more.get("task"), "look", None)
        if look is not None and Headers.of(headers).contract is None:
            # Nobody who knows what is secret in it has described it.
            described = _described(body if decoded else message.payload, look, {} if decoded else headers)
            headers = {**headers, **described}
            if not decoded:  # as whoever buries the message, or sends it on, writes it
                message.headers.update(described)
        super().__init__(message, headers=headers, body=body, decoded=decoded, **more)

    def info(self, safe: bool = False) -> dict[str, Any]:
        """Describe it for ``celery inspect`` and Flower; arguments are shown as they may be told."""
        look = getattr(self.task, "look", None)
        if look is None or safe:
            return cast("dict[str, Any]", super().info(safe=safe))
        args, kwargs = look.masked(self.args, self.kwargs)
        return {**super().info(safe=True), "args": args, "kwargs": kwargs}

    @property
    def undertaker(self) -> Undertaker | None:
        """Who buries it; ``None`` in a worker whose consumer is not ours."""
        return getattr(self.message, "undertaker", None)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        """Find out how the message ended, and let Celery do what it does then."""
        if self.undertaker is None:
            super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
            return
        with running.handling(self.request_dict, self.app):
            self._end(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)

    def _end(self, exc_info: Any, **how: bool) -> None:
        if self._already_cancelled and isinstance(error_in(exc_info), Terminated | WorkerLostError):
            # It was cut off, and what was to be done about it is done.
            return
        # What came back from a run was raised by the task, though a child that it waited for may have raised it first.
        is_raised = bool(how.get("return_ok"))
        if not is_raised:
            self._tell_cut_off(error_in(exc_info))
        if isinstance(error_in(exc_info), WorkerLostError) and not is_raised and self._is_given_back_as_done():
            return
        exc_info = self._as_failure(exc_info, is_raised=is_raised)
        self._error = error = cast("Any", error_in(exc_info))
        if isinstance(error, TimeLimitExceeded) and self.time_start and not is_raised:
            # Celery would tell of it twice: `on_timeout` comes right after this, and does.
            self._ending = ending_of(error)
            return
        if isinstance(error, Reject) and cast("Any", error).requeue:
            if self._is_handed_back(error):
                return
            exc_info = self._not_handed_back(error)
            self._error = error = error_in(exc_info)
        self._ending = self._ending_of(error, exc_info)
        try:
            super().on_failure(exc_info, **how)
        finally:
            # Acknowledged when it started, or something on the way to the gate failed: a result backend, a hook.
            if self._ending is not None:
                self.acknowledge()

    def send_event(self, kind: str, /, **fields: Any) -> None:
        """Send an event; of a failure that no child came to tell, Celery would name billiard's wrapping."""
        if kind == "task-failed" and self._error is not None:
            fields["exception"] = safe_repr(get_pickled_exception(self._error))
        super().send_event(kind, **fields)

    def _tell_cut_off(self, error: Any) -> None:
        is_its_end = isinstance(error, TimeLimitExceeded | WorkerLostError) and not self._already_revoked
        if is_its_end and self.time_start:
            reason = "timed_out" if isinstance(error, TimeLimitExceeded) else "lost"
            queue = Headers.of(self.request_dict).queue or self.delivery_info.get("routing_key")
            events.TASK_CUT_OFF.tell(task=self.name, id=self.id, queue=queue, reason=reason)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Bury what overran its hard time limit."""
        with running.handling(self.request_dict, self.app):
            try:
                super().on_timeout(soft, timeout)
            finally:
                if not soft and self._ending is not None:
                    self.acknowledge()

    def acknowledge(self) -> None:
        """Acknowledge, once nothing of the message can be lost any more."""
        if self._ending is not None and self.undertaker is not None and not self._is_buried:
            self._is_buried = True
            claims.end(self, self._ending.error or self._ending.reason)
            self.undertaker.bury(self, self._ending, then=super().acknowledge)
        elif not self._is_buried:
            if self.undertaker is not None and self.id in state.successful_requests:
                self.undertaker.starts.remember(self)
            super().acknowledge()

    def reject(self, requeue: bool = False) -> None:
        """Give the message back, or acknowledge what is buried: rejected, it would go to its queue's own exchange."""
        if self._ending is not None and self.undertaker is not None:
            self.acknowledge()
        else:
            if requeue:
                claims.give_up(self)
            super().reject(requeue=requeue)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Stop a run whose message goes back."""
        if self.undertaker is None:
            super().cancel(pool, signal, emit_retry=emit_retry)
            return
        self.on_cut_off()
        # Nobody retries what was acknowledged early, whatever Celery says of it.
        super().cancel(pool, signal, emit_retry=False)
        claims.hand_back(self)

    def on_cut_off(self) -> None:
        """Do not count a start whose message goes back; bury what has started and must not start again."""
        if self.undertaker is None or not self.time_start:
            return
        if self.task.acks_late and getattr(self.task, "on_crash", "rerun") != "bury":
            self.undertaker.starts.forgive(self)
        else:
            self._bury_what_was_cut_off(TaskInterrupted("its worker was told to end, and did not wait any longer"))

    def _bury_what_was_cut_off(self, error: BaseException) -> None:
        self.kill(error)
        if state.should_terminate is not None:
            # Celery stores no failures from then on.
            self.task.backend.mark_as_failure(self.id, error, request=self._context, store_result=self.store_errors)

    def is_same(self, other: Request) -> bool:
        """Tell whether *other* is another delivery of this message."""
        return bool(self.id == other.id and letter_of(self) == letter_of(other)) and _place(self) == _place(other)

    def take_over(self, other: Request) -> None:
        """Answer for another delivery of this message: the one this request came with is void."""
        if self.acknowledged:
            other.acknowledge()
            return
        self._message, self._on_ack, self._on_reject = other.message, other.on_ack, other.on_reject
        state.requests[self.id] = self

    def kill(self, error: BaseException) -> None:
        """End a message that is not to start, as a failure."""
        self.on_failure(info_of(error))

    def revoked(self) -> bool:
        """Tell whether it is not to start. Asked when it has a place in the pool, which an error would keep."""
        try:
            return bool(super().revoked()) or not (self.may_start is None or self.may_start(self))
        except Exception as error:  # noqa: BLE001  (an edge: stamps may be anything)
            self.kill(error)
            return True

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """Note that it starts."""
        try:
            super().on_accepted(pid, time_accepted)
        except NotImplementedError:
            # Revoked with ``terminate`` while it stood in line of a pool that cannot: it has not begun.
            self._announce_revoked("terminated", True, None, False)
            raise

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        if expired and self.undertaker is not None:
            self._ending = Ending("expired", message=f"It was to start before {self.expires}.")
            # Before its result says so: who calls again at once has the key.
            claims.end(self, "expired")
        else:
            claims.release(self)
        try:
            super()._announce_revoked(reason, terminated, signum, expired)
        except Exception as error:  # noqa: BLE001  (an edge: a result backend that is down must not stop the worker)
            events.RESULT_NOT_STORED.tell(task=self.name, id=self.id, error=error)
            self._already_revoked = True
            self.acknowledge()
        if expired:
            # Left there, it would keep a replay from starting.
            cast("Any", state.revoked).discard(self.id)

    def _success_was_stored(self) -> Any:
        # Asked by us and then by Celery: one look at the result backend.
        if self._was_success_stored is None:
            stored = super()._success_was_stored()
            self._was_success_stored = stored if stored and self._is_of_this_call(stored) else False
        return self._was_success_stored

    def _is_of_this_call(self, stored: Any) -> bool:
        """Tell whether a result is no older than the call: people use one id for many calls."""
        sent_at, done = Headers.of(self.request_dict).sent_at, stored.get("date_done")
        if sent_at is None or not done:
            return True
        done = cast("Any", maybe_iso8601)(done)
        return bool((done if done.tzinfo else done.replace(tzinfo=UTC)).timestamp() >= sent_at)

    def _as_failure(self, exc_info: Any, *, is_raised: bool) -> Any:
        """Make a failure of what would end the parent process, or what ended the child."""
        error = error_in(exc_info)
        if isinstance(error, MemoryError):
            return info_of(TaskInterrupted(f"the task ran out of memory: {error!r}"))
        has_exited = isinstance(error, SystemExit | KeyboardInterrupt)
        if has_exited and not (self._already_cancelled or self._already_revoked):
            exc_info = self._worker_lost_info(error)
            error = error_in(exc_info)
        if isinstance(error, WorkerLostError) and is_raised:
            # Its process lives; and told as it is, Celery would take it for lost.
            return info_of(TaskInterrupted(f"the task raised {error!r}"))
        if isinstance(error, WorkerLostError) and self._is_poison():
            # As another error, or Celery would give the message back once more.
            return info_of(Undeliverable(f"it was started {self.starts} times, and its process died: {error}"))
        return exc_info

    def _is_poison(self) -> bool:
        """Tell whether a message whose process just died is not to be tried again."""
        return (
            self._goes_back_after_a_crash()
            and not self._success_was_stored()
            and self.starts >= self.app.settings.kit.max_deliveries
        )

    def _goes_back_after_a_crash(self) -> bool:
        return bool(self.task.acks_late and self.task.reject_on_worker_lost and not self.task.retry_on_worker_lost)

    def _ending_of(self, error: BaseException, exc_info: Any) -> Ending | None:
        """Say how the message ended; ``None`` when it is not dead."""
        if isinstance(error, Retry | Ignore | Terminated | SystemExit | KeyboardInterrupt):
            return None
        if getattr(error, DROPPED, False):
            return None
        if isinstance(error, WorkerLostError) and self._lives_on(error):
            return None
        is_anothers = isinstance(error, InvalidPayload) and error.task != self.task.name
        return ending_of(error, traceback=exc_info.traceback, reason="failed" if is_anothers else None)

    def _lives_on(self, error: WorkerLostError) -> bool:
        if self._success_was_stored() or self._goes_back_after_a_crash():
            return True
        return bool(self.task.retry_on_worker_lost) and not self._are_retries_used_up()

    def _are_retries_used_up(self) -> bool:
        most = self.task.max_retries
        return most is not None and self._context.retries >= most

    def _is_handed_back(self, error: Any) -> bool:
        undertaker = cast("Undertaker", self.undertaker)
        if self.acknowledged or undertaker.starts.forgive(self) > MOST_FORGIVEN:
            return False
        state.task_ready(self)
        is_held = isinstance(error.reason, tuple) and error.reason[:1] == (HANDED_BACK,)
        after = error.reason[1] if is_held else 1.0
        undertaker.returns.give_back(self.message, reject=super().reject, acknowledge=super().acknowledge, after=after)
        return True

    def _is_given_back_as_done(self) -> bool:
        """Give a message back whose claim says that it is done: its next delivery gives the result."""
        if self.acknowledged or self._goes_back_after_a_crash() or not claims.has_finished(self):
            return False
        undertaker = cast("Undertaker", self.undertaker)
        if undertaker.starts.forgive(self) > MOST_FORGIVEN:
            return False  # what it leads to kills its process each time
        state.task_ready(self)
        undertaker.returns.give_back(self.message, reject=super().reject, acknowledge=super().acknowledge)
        return True

    def _not_handed_back(self, error: Any) -> Any:
        """Make a failure of what was acknowledged when it started, or was handed back for ever."""
        if self.acknowledged:
            return info_of(Reject(error.reason, requeue=False))
        return info_of(Undeliverable(f"it was handed back {MOST_FORGIVEN} times: {error.reason}"))
