"""
Writes dead letters, until they are written; only then may their messages be acknowledged.

The first try is made at once, where the message ended. If it fails, a thread
goes on trying, so that the worker's event loop does not wait for the broker.
At shutdown what is still unwritten stays unacknowledged, and so goes back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import kombu
from celery.canvas import maybe_signature

from celerykit import events, letters, running
from celerykit.dead_letters import HEADER, Letter, Note, error_fingerprint, identify, letter_id
from celerykit.errors import CelerykitError, StoreUnavailable
from celerykit.headers import Headers
from celerykit.publishing import telling_of
from celerykit.worker.ending import Ending, ending_of
from celerykit.worker.returns import Returns, undelayed
from celerykit.worker.starts import Starts, buried_key, letter_of

if TYPE_CHECKING:
    from celerykit.app import CeleryKit

__all__ = ["Undertaker"]

#: Seconds between two looks for letters that are too old, or too many.
_EVICTS_EVERY = 3600.0

#: Seconds between tries to write a letter, growing from the first to the second.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0


@dataclass(frozen=True, slots=True)
class _Grave:
    """A letter, what is to be done when it is written, and the id of a message that is taken along."""

    letter: Letter
    then: Callable[[], None]
    chord: Any = None


class Undertaker:
    """
    Buries messages.

    Attributes:
        starts, returns:
            What else a request needs to know when it ends.
    """

    def __init__(self, app: CeleryKit, *, worker: str, starts: Starts, returns: Returns) -> None:
        self.starts = starts
        self.returns = returns
        self._app = app
        self._worker = worker
        self._waiting: dict[str, _Grave] = {}
        self._lock = threading.Lock()
        self._has_more = threading.Event()
        self._thread: threading.Thread | None = None
        self._evicts_at = 0.0

    def bury(self, request: Any, ending: Ending, *, then: Callable[[], None]) -> None:
        """Write the letter of a request, then call *then*."""
        self._bury(_Grave(self._letter(request.message, ending), then, chord=request.chord))

    def bury_message(self, message: Any, ending: Ending, *, then: Callable[[], Any], chord: Any) -> None:
        """Write the letter of a message that never became a request, then call *then*."""
        self._bury(_Grave(self._letter(message, ending), then, chord=chord))

    def bury_item(self, queue: str, item: bytes, error: BaseException) -> None:
        """
        Write the letter of what lay in a queue of Redis, and is not even a message.

        Raises:
            EnqueueError: It could not be written; it has to go back.
        """
        ending = ending_of(error, reason="malformed")
        note = Note(
            letter=identify(None, item),
            reason=ending.reason,
            died_at=time.time(),
            error=ending.error,
            message=ending.message,
            queue=queue,
            worker=self._worker,
        )
        kinds = {"content_type": "application/octet-stream", "content_encoding": "binary"}
        letters.bury(self._app, Letter(note=note, body=item, headers={}, properties={}, **kinds))
        _tell_dead(note, {})

    def is_waiting(self, request: Any) -> bool:
        """
        Tell whether the letter of this message is still to be written.

        If it is, the message was delivered again in the meantime, and this
        delivery is what will be acknowledged.
        """
        name = letter_of(request)
        with self._lock:
            grave = self._waiting.get(name)
            if grave is not None:
                self._waiting[name] = _Grave(grave.letter, request.acknowledge, chord=grave.chord)
        return grave is not None

    # Writing

    def _bury(self, grave: _Grave) -> None:
        if self._waiting:
            # A broker that does not answer is waited for by the thread, and not once for each letter by the event loop.
            self._wait_with(grave)
            return
        try:
            self._write(grave)
        except Exception as error:  # noqa: BLE001  (an edge: whatever it is, the message must not be lost)
            _tell_not_written(grave.letter.note, error, then="retry")
            self._wait_with(grave)

    def _write(self, grave: _Grave) -> None:
        letters.bury(self._app, grave.letter)
        self._note(grave.letter.note)
        _tell_dead(grave.letter.note, grave.letter.headers)
        if grave.chord:
            self._bury_body(grave)
        grave.then()
        self._evict()

    def _note(self, note: Note) -> None:
        try:
            keep = self._app.settings.kit.dead_letter_keep.total_seconds()
            self._app.store.mark(buried_key(note.letter), note.reason, ttl=keep)
        except StoreUnavailable as error:
            # Then a redelivery may write it a second time, under the same id.
            events.DEAD_LETTER_NOT_NOTED.tell(task=note.task, id=note.id, letter=note.letter, error=error)

    def _wait_with(self, grave: _Grave) -> None:
        with self._lock:
            self._waiting[grave.letter.note.letter] = grave
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._go_on, name="celerykit-burial", daemon=True)
                self._thread.start()
        self._has_more.set()

    def _go_on(self) -> None:
        pause = _SHORTEST_PAUSE
        while True:
            self._has_more.clear()
            time.sleep(pause)
            pause = _SHORTEST_PAUSE if self._try_all() else min(2 * pause, _LONGEST_PAUSE)
            if not self._waiting:
                self._has_more.wait()

    def _try_all(self) -> bool:
        """Try each letter that waits, until one fails; tell whether none did."""
        for name in list(self._waiting):
            grave = self._waiting[name]
            try:
                self._write(grave)
            except Exception as error:  # noqa: BLE001  (as above)
                _tell_not_written(grave.letter.note, error, then="retry")
                return False
            with self._lock:
                last = self._waiting.pop(name)
            if last is not grave:
                # Delivered once more while it was written.
                last.then()
        return True

    # Keeping them in bounds

    def _evict(self) -> None:
        """Let go what is too old or too much, on a thread, now and then, and in one worker at a time."""
        if time.monotonic() < self._evicts_at:
            return
        self._evicts_at = time.monotonic() + _EVICTS_EVERY
        threading.Thread(target=self._evict_now, name="celerykit-eviction", daemon=True).start()

    def _evict_now(self) -> None:
        try:
            if self._app.store.mark("evicting", self._worker, ttl=_EVICTS_EVERY / 2) is None:
                self._app.dead_letters.evict()
        except CelerykitError as error:
            events.DEAD_LETTER_NOT_EVICTED.tell(error=error)

    # What is written

    def _letter(self, message: Any, ending: Ending) -> Letter:
        note = self._note_of(
            message.headers or {}, message, ending, message.properties or {}, message.delivery_info or {}
        )
        return letters.letter_of(message, note)

    def _note_of(self, headers: Any, message: Any, ending: Ending, properties: Any, delivery: Any) -> Note:
        ours = Headers.of(headers)
        return Note(
            letter=identify(message.headers, message.body),
            reason=ending.reason,
            died_at=time.time(),
            task=_text(headers.get("task")),
            id=_text(headers.get("id")),
            error=ending.error,
            message=ending.message,
            traceback=ending.traceback,
            problems=[dict(problem) for problem in ending.problems],
            fingerprint=error_fingerprint(ending.error or ending.reason, ending.traceback),
            attempts=ours.attempt,
            # On Redis and Valkey our connection knows.
            queue=ours.queue or getattr(message, "queue", None) or self._queue_of(delivery),
            exchange=_text(delivery.get("exchange")),
            routing_key=_text(delivery.get("routing_key")),
            sent_at=ours.sent_at,
            worker=self._worker,
            replay=ours.replay,
            chord=_text(headers.get("group")),
            priority=properties.get("priority") if isinstance(properties.get("priority"), int) else None,
            expiration=_text(properties.get("expiration")),
            ledger=ours.ledger,
        )

    def _queue_of(self, delivery: Any) -> str | None:
        """Find the queue that a message came from whose sender did not say it."""
        exchange, key = delivery.get("exchange"), undelayed(delivery.get("routing_key"))
        queues = self._app.amqp.queues.consume_from.values()
        bound = (queue.name for queue in queues if queue.exchange.name == exchange and queue.routing_key == key)
        return next(bound, None) or _text(key)

    # Chords

    def _bury_body(self, grave: _Grave) -> None:
        """
        Keep the body of a chord that will never run, as one of its members is dead.

        Sent as Celery would send it, but to the dead letters, and without the results it was to get.
        """
        body, note = cast("Any", maybe_signature)(grave.chord, app=self._app), grave.letter.note
        name = letter_id(str(body.id), 1, 0, "chord")
        if self._is_kept(name):
            return
        told = Note(
            letter=name,
            reason="chord_failed",
            died_at=note.died_at,
            task=body.task,
            id=body.id,
            error=note.error,
            message=f"Its member {note.id} is dead ({note.reason}). It lacks the results of all members.",
            fingerprint=note.fingerprint,
            queue=self._queue_for(body),
            worker=self._worker,
            chord=note.chord,
        )
        try:
            with running.handling(grave.letter.headers, self._app):
                self._send_body(body, told)
        except Exception as error:  # noqa: BLE001  (a signature may hold anything; the member's letter is what counts)
            _tell_not_written(told, error, then="nothing")
        else:
            _tell_dead(told, grave.letter.headers)

    def _send_body(self, body: Any, note: Note) -> None:
        body = body.clone()
        for option in ("queue", "countdown", "eta", "expires", "priority"):
            body.options.pop(option, None)
        name = self._app.settings.kit.dead_letter_queue
        # It is there: the member's letter was put in it.
        queue = kombu.Queue(name, kombu.Exchange(""), routing_key=name, no_declare=True)
        # With a parent, it is not refused for what it lacks.
        with telling_of():
            body.apply_async(queue=queue, headers={HEADER: note.to_header()}, parent_id=note.id, delivery_mode=2)

    def _queue_for(self, body: Any) -> str | None:
        route = cast("Any", self._app.amqp).router.route(dict(body.options), body.task)
        return getattr(route.get("queue"), "name", None)

    def _is_kept(self, name: str) -> bool:
        keep = self._app.settings.kit.dead_letter_keep.total_seconds()
        try:
            return self._app.store.mark(buried_key(name), "chord_failed", ttl=keep) is not None
        except StoreUnavailable:
            return False


def _tell_dead(note: Note, headers: Mapping[str, Any]) -> None:
    events.TASK_DEAD.tell(
        task=note.task,
        id=note.id,
        root_id=_text(headers.get("root_id")),
        attempt=note.attempts,
        queue=note.queue,
        reason=note.reason,
        error=note.error or None,
        error_fingerprint=note.fingerprint or None,
        letter=note.letter,
        correlation_id=running.facts_of(headers).get("correlation_id"),
    )


def _tell_not_written(note: Note, error: Exception, *, then: str) -> None:
    events.DEAD_LETTER_NOT_WRITTEN.tell(
        task=note.task, id=note.id, reason=note.reason, letter=note.letter, error=error, then=then
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
