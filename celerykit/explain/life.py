"""What became of a message. Nothing is taken out of a queue, and no argument of a call is shown."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from celerykit.explain.queues import messages
from celerykit.explain.text import columns, said, shortened, time_of
from celerykit.headers import Attempt, Headers
from celerykit.idempotency import State
from celerykit.keys import Keyring
from celerykit.retry import spoken

__all__ = ["Life", "Sighting", "life_of", "life_text"]

#: How long the result backend may take, in seconds: some wait for a dead server without an end.
_PATIENCE = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """
    What came of looking in one place.

    Attributes:
        is_there:
            None when nobody can tell: the place did not answer, or cannot be
            looked into.

        headers:
            Ours, of the message that was found.
    """

    place: str
    is_there: bool | None
    says: str
    task: str | None = None
    headers: Headers = field(default_factory=Headers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What is known of one message."""

    id: str
    task: str | None
    sent_at: float | None
    ledger: tuple[Attempt, ...]
    sightings: tuple[Sighting, ...]

    @property
    def is_found(self) -> bool:
        """Whether it was seen anywhere."""
        return any(sighting.is_there for sighting in self.sightings)

    def facts(self) -> dict[str, Any]:
        """Give it as JSON values."""
        return {
            "id": self.id,
            "task": self.task,
            "sent_at": self.sent_at,
            "ledger": [attempt._asdict() for attempt in self.ledger],
            "seen": [{"place": one.place, "is_there": one.is_there, "says": one.says} for one in self.sightings],
        }


def life_of(app: Any, task_id: str) -> Life:
    """Look for a message in the queues, with the workers, among the dead letters and at its result."""
    # In the order in which messages wander, so that one that moves meanwhile is met again and not missed.
    sightings = (
        *_asked("queues", lambda: _in_broker(app, task_id)),
        *_asked("dead letters", lambda: _in_letters(app, task_id)),
        *_asked("result", lambda: _within(_PATIENCE, lambda: [*_in_backend(app, task_id)])),
    )
    sightings += tuple(_in_store(app, task_id, sightings))
    headers = max((sighting.headers for sighting in sightings), key=lambda found: len(found.ledger))
    return Life(
        id=task_id,
        task=next((sighting.task for sighting in sightings if sighting.task), None),
        sent_at=next((sighting.headers.sent_at for sighting in sightings if sighting.headers.sent_at), None),
        ledger=headers.ledger,
        sightings=sightings,
    )


def _asked(place: str, look: Callable[[], Iterable[Sighting]]) -> list[Sighting]:
    try:
        return [*look()] or [Sighting(place=place, is_there=False, says="not there")]
    except Exception as error:  # noqa: BLE001  (an edge: one place that fails leaves the others to be looked at)
        return [Sighting(place=place, is_there=None, says=f"cannot say: {said(error)}")]


def _within(seconds: float, look: Callable[[], list[Sighting]]) -> list[Sighting]:
    answers: queue.SimpleQueue[list[Sighting] | Exception] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put(look())
        except Exception as error:  # noqa: BLE001  (handed over)
            answers.put(error)

    threading.Thread(target=answer, daemon=True).start()
    try:
        answered = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {spoken(seconds)}") from None
    if isinstance(answered, Exception):
        raise answered
    return answered


def _in_broker(app: Any, task_id: str) -> Iterator[Sighting]:
    with app.connection_for_write() as connection:
        if connection.transport.driver_type != "redis":
            broker = "RabbitMQ" if connection.transport.driver_type == "amqp" else connection.transport.driver_type
            says = f"cannot say: {broker} shows no message without taking it out of its queue"
            yield Sighting(place="queues", is_there=None, says=says)
            return
        letters = app.settings.kit.dead_letter_queue
        for place, says, headers in messages(connection.channel(), skip=letters):
            if headers.get("id") == task_id:
                ours = Headers.of(headers)
                says = f"attempt {ours.attempt} {says}{_due(ours, headers)}"
                yield Sighting(place=place, is_there=True, says=says, task=headers.get("task"), headers=ours)


def _due(ours: Headers, headers: Mapping[str, Any]) -> str:
    if ours.due_at is None:
        try:
            return f", due {time_of(datetime.fromisoformat(headers['eta']).timestamp())}"
        except (KeyError, TypeError, ValueError):
            return ""
    return f", due {time_of(ours.due_at)}"


def _in_letters(app: Any, task_id: str) -> Iterator[Sighting]:
    for letter in app.dead_letters.find(id=task_id):
        note = letter.note
        cause = shortened(f"{note.error}: {note.message}") if note.error else ""
        says = ", ".join(filter(None, (note.reason, cause))) + f"; died {time_of(note.died_at)}; letter {note.letter}"
        headers = replace(
            Headers.of(letter.headers),
            sent_at=note.sent_at,
            attempt=note.attempts,
            replay=note.replay,
            ledger=note.ledger,
        )
        yield Sighting(place="dead letters", is_there=True, says=says, task=note.task, headers=headers)


def _in_backend(app: Any, task_id: str) -> Iterator[Sighting]:
    meta = app.backend.get_task_meta(task_id, cache=False)
    state, value = meta.get("status", "PENDING"), meta.get("result")
    if state == "PENDING":
        says = "nothing is stored: it has not finished, its result is not kept, or there never was such a call"
        yield Sighting(place="result", is_there=False, says=says)
        return
    says = state + (f", {said(value)}" if isinstance(value, BaseException) else "")
    if done := meta.get("date_done"):
        says += f", {done}"
    yield Sighting(place="result", is_there=True, says=says, task=meta.get("name"))


def _in_store(app: Any, task_id: str, seen: Sequence[Sighting]) -> list[Sighting]:
    """Look at the key that a message says it has, or has by its id. To find any other, all would have to be read."""
    key = next((sighting.headers.key for sighting in seen if sighting.headers.key), None)
    task = app.tasks.get(next((sighting.task for sighting in seen if sighting.task), None))
    claims = getattr(task, "claims", None)
    if key is None and claims is not None and claims.keys is None:
        key = Keyring(app).key_of(task, id=task_id)
    return [] if key is None else _asked("key", lambda: [_claim(Keyring(app), key, task_id)])


def _claim(keyring: Keyring, key: str, task_id: str) -> Sighting:
    if not keyring.is_shared:
        return Sighting(place="key", is_there=None, says=f"cannot say: each process keeps {key} in its own memory")
    held = keyring.look(key)
    if held is None:
        return Sighting(place="key", is_there=False, says=f"{key} is free")
    claim = held.claim
    whose = "its own" if claim.id == task_id else f"that of call {claim.id}"
    says = f"{key} is {whose}: {claim.state.value} since {time_of(claim.since)}"
    if claim.state is State.RUNNING:
        says += ", its lease has lapsed" if held.has_lapsed else f", {held.lease:.0f} s of its lease are left"
    return Sighting(place="key", is_there=claim.id == task_id, says=says)


def life_text(life: Life) -> str:
    """Write a life for a person."""
    lines = [("sent", time_of(life.sent_at))] if life.sent_at else []
    attempt = 1
    for row in life.ledger:
        lines.append((f"attempt {attempt}", _ran(row)))
        attempt += row.outcome != "snooze"
    lines += [(sighting.place, sighting.says) for sighting in life.sightings]
    return "\n".join([f"{life.id}  {life.task or ''}".rstrip(), *columns(lines)])


def _ran(row: Attempt) -> str:
    error = f", error {row.error}" if row.error else ""
    where = f", on {row.worker}" if row.worker else ""
    return f"{time_of(row.started)}: waited {spoken(row.waited)}, ran {spoken(row.ran)}, {row.outcome}{error}{where}"
