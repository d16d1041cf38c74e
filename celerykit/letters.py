"""
Dead letters on their way: into their queue, and, when a person says so, out of it again.
"""

from __future__ import annotations

import heapq
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, cast
from weakref import WeakKeyDictionary

from celerykit import events, looks
from celerykit.dead_letters import Filter, Letter, described
from celerykit.errors import EnqueueError, LetterNotFound
from celerykit.letter_queues import Held, LetterQueue, declare, letter_of, letter_queue, publish
from celerykit.looks import STOCK, Look
from celerykit.publishing import UnreachableBroker, sending
from celerykit.replay import Change, Refusal, Replay, Report, edited

if TYPE_CHECKING:
    from celerykit.app import CeleryKit

__all__ = ["Cause", "Change", "DeadLetters", "Refusal", "Report", "Which", "bury", "letter_of"]

# In


#: In which processes the queue is known to be there, by app.
_declared: WeakKeyDictionary[CeleryKit, set[int]] = WeakKeyDictionary()


def bury(app: CeleryKit, letter: Letter) -> None:
    """
    Put a letter into the queue of dead letters, to stay there when the broker restarts.

    Safe from any thread.

    Raises:
        EnqueueError: It is not sure that the broker has it.
    """
    what = f"dead letter {letter.id} of {letter.note.task}"
    try:
        with sending(app, what):
            _bury(app, letter)
    except EnqueueError:
        raise
    except Exception as error:  # an edge: whatever it was, the letter may not be there
        raise UnreachableBroker(f"{what} could not be written: {events.describe(error)}") from error


def _bury(app: CeleryKit, letter: Letter) -> None:
    name = app.settings.kit.dead_letter_queue
    here = _declared.setdefault(app, set())
    if os.getpid() not in here:
        # Over a connection of its own: one from the pool may have been lost, which is only noticed here.
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0)
            declare(connection, name)
        here.add(os.getpid())
    try:
        with app.producer_pool.acquire(block=True) as producer:
            publish(producer, letter, queue=name)
    except Exception:
        # The queue may be gone. It is looked for at the next try.
        here.discard(os.getpid())
        raise


# Out


class Which(TypedDict, total=False):
    """
    Which letters are meant: those for which all that is given is true.

    Attributes:
        task:
            A task, or its name, in which ``*`` and ``?`` stand for any text and any character.

        since, until:
            Of the death. A ``timedelta`` counts back from now.

    The others are those of `celerykit.dead_letters.Filter`.
    """

    task: Any
    reason: str | Collection[str] | None
    error: str | None
    since: datetime | timedelta | float | None
    until: datetime | timedelta | float | None
    id: str | Collection[str] | None
    fingerprint: str | None
    queue: str | None


@dataclass(slots=True)
class Cause:
    """
    Letters that died of one thing.

    Attributes:
        letter, message:
            Of the first one that was found.

        first, last:
            When they died, in seconds since 1970.
    """

    fingerprint: str
    task: str | None
    reason: str
    error: str
    message: str
    letter: str
    first: float
    last: float
    count: int = 0


class DeadLetters:
    """
    What no worker could finish: to find, repair and replay.

    Args:
        lock_within:
            How long to wait, in seconds, for somebody else who walks through
            the letters. On RabbitMQ one person can at a time.

    Every method raises `LettersLocked` when that is not long enough, and
    `EnqueueError` when the broker cannot be reached.
    """

    def __init__(self, app: CeleryKit, *, lock_within: float = 5.0) -> None:
        self._app = app
        self.lock_within = lock_within

    # To look at

    def find(self, *, limit: int | None = None, **which: Unpack[Which]) -> Iterator[Letter]:
        """
        Give letters, in general the oldest first, while they are read.

        None is taken away. On RabbitMQ others wait until this is at its end, or closed.
        """
        with self._queue() as queue:
            for number, held in enumerate(_matching(queue, _filter(which)), start=1):
                yield held.letter
                if number == limit:
                    return

    def get(self, id: str) -> Letter:  # noqa: A002  (what it is)
        """
        Give the letter with this id, or with an id that begins so, or the only one of a task's id.

        Raises:
            LetterNotFound: There is none, or more than one.
        """
        with self._queue() as queue:
            return self._hold(queue, id).letter

    def count(self, **which: Unpack[Which]) -> int:
        """Count letters."""
        with self._queue() as queue:
            return sum(1 for _ in _matching(queue, _filter(which))) if which else queue.count()

    def top(self, **which: Unpack[Which]) -> list[Cause]:
        """Group letters by what they died of, the most frequent first."""
        causes: dict[tuple[Any, ...], Cause] = {}
        for letter in self.find(**which):
            note = letter.note
            key = (note.fingerprint, note.reason, note.task)
            if key not in causes:
                known = (note.fingerprint, note.task, note.reason, note.error, note.message, note.letter)
                causes[key] = Cause(*known, first=note.died_at, last=note.died_at)
            cause = causes[key]
            cause.count += 1
            cause.first, cause.last = min(cause.first, note.died_at), max(cause.last, note.died_at)
        return sorted(causes.values(), key=lambda cause: (-cause.count, -cause.last))

    def export(self, **which: Unpack[Which]) -> Iterator[str]:
        """Write each letter, arguments included, as a line of JSON; a body that is not JSON as base64."""
        for letter in self.find(**which):
            yield json.dumps(described(letter, arguments=True), default=str)

    def shown(self, letter: Letter) -> dict[str, Any]:
        """Write a letter as plain data, with what is secret in its arguments masked."""
        return looks.letter(described(letter, arguments=True), self._look)

    def _look(self, name: Any) -> Look:
        return getattr(self._app.tasks.get(name), "look", None) or STOCK

    def parameters(self, letter: Letter) -> Sequence[str]:
        """Name the parameters that a letter's positional arguments are for; none if its task is not known here."""
        contract = getattr(self._app.tasks.get(cast("Any", letter.note.task)), "contract", None)
        return contract.parameters.positional if contract else ()

    # To change

    def replay(
        self,
        *,
        rate: str | float | None = None,
        edit: Change | None = None,
        dry_run: bool = False,
        force: bool = False,
        new_ids: bool = False,
        limit: int | None = None,
        on_progress: Callable[[Report], Any] | None = None,
        **which: Unpack[Which],
    ) -> Report:
        """
        Send letters again, each to the queue it came from, under its old id.

        Each is checked against the contract that its task has here; what does
        not fit stays, and the report says why. Stopped in the middle, it can be
        done again: a letter that was replayed is gone, or is known to have been.

        Args:
            rate:
                At most: ``"20/s"``, ``"100/m"``, or a number in a second.

            edit:
                Changes the arguments first.

            dry_run:
                Only tell what would be replayed, and what would be refused.

            force:
                Also letters of tasks that are not known here.

            new_ids:
                Let each be a call of its own; nobody who waits for the old one hears of it.

            on_progress:
                Is told after each letter.
        """
        send = Replay(self._app, rate=rate, edit=edit, force=force, new_ids=new_ids, dry_run=dry_run)
        with self._queue() as queue:
            for held in _matching(queue, _filter(which)):
                send(queue, held)
                if on_progress is not None:
                    on_progress(send.report)
                if send.report.total == limit:
                    break
        return send.report

    def edit(self, id: str, change: Change) -> Letter:  # noqa: A002
        """
        Change the arguments of a letter, which stays where it is, and return it.

        One that cannot be decoded begins with no arguments at all.

        Raises:
            LetterNotFound: There is no such letter, or more than one, or it is gone by now.

            InvalidPayload: What *change* returned does not fit the task.
        """
        with self._queue() as queue:
            held = self._hold(queue, id)
            letter = edited(self._app, held.letter, change)
            if not queue.replace(held, letter):
                raise LetterNotFound(f"The letter {letter.id} was taken away meanwhile.")
            return letter

    def purge(self, **which: Unpack[Which]) -> int:
        """Throw letters away for good, all if nothing is said; return how many."""
        with self._queue() as queue:
            return sum(queue.remove(held) for held in _matching(queue, _filter(which)))

    def evict(self) -> int:
        """
        Throw away what is older than ``DEAD_LETTER_KEEP``, and the oldest beyond ``DEAD_LETTER_MAX``; return how many.

        Each is logged.
        """
        kit = self._app.settings.kit
        too_old = time.time() - kit.dead_letter_keep.total_seconds()
        evicted = 0
        with self._queue() as queue:
            surplus = queue.count() - kit.dead_letter_max
            for held in _oldest(queue, surplus=surplus, too_old=too_old):
                if queue.remove(held):
                    evicted += 1
                    _tell_evicted(held.letter)
        return evicted

    # Behind them

    def _queue(self) -> Any:
        return letter_queue(self._app, lock_within=self.lock_within)

    def _hold(self, queue: LetterQueue, name: str) -> Held:
        found: list[Held] = []
        for held in _matching(queue, Filter(id=name)):
            if held.letter.id == name:
                return held
            found.append(held)
        if len(found) == 1:
            return found[0]
        if found:
            letters = ", ".join(held.letter.id for held in found[:5])
            raise LetterNotFound(f"{len(found)} letters are called {name}: {letters}. Say which by its own id.")
        raise LetterNotFound(f"There is no dead letter {name} in {queue.name}.")


def _filter(which: Which) -> Filter:
    task = which.get("task")
    told: dict[str, Any] = {**which, "since": _moment(which.get("since")), "until": _moment(which.get("until"))}
    return Filter(**told | {"task": getattr(task, "name", task)})


def _moment(time_: datetime | timedelta | float | None) -> float | None:
    if isinstance(time_, timedelta):
        return time.time() - time_.total_seconds()
    return time_.timestamp() if isinstance(time_, datetime) else time_


def _matching(queue: LetterQueue, which: Filter) -> Iterator[Held]:
    return (held for held in queue.walk() if which.matches(held.letter.note))


def _oldest(queue: LetterQueue, *, surplus: int, too_old: float) -> Iterator[Held]:
    """Give the *surplus* oldest letters, and those that died before *too_old*."""
    if not queue.is_ordered:
        died = (held.letter.note.died_at for held in queue.walk())
        too_old = max([too_old, *heapq.nsmallest(surplus, died)]) if surplus > 0 else too_old
        surplus = 0
    for number, held in enumerate(queue.walk()):
        # A letter whose death nobody dated is no older than others.
        is_old = 0 < held.letter.note.died_at <= too_old
        if number < surplus or is_old:
            yield held
        elif queue.is_ordered:
            return


def _tell_evicted(letter: Letter) -> None:
    note = letter.note
    died_at = datetime.fromtimestamp(note.died_at, UTC).isoformat(timespec="seconds") if note.died_at else None
    events.DEAD_LETTER_EVICTED.tell(
        task=note.task, id=note.id, reason=note.reason, error=note.error or None, letter=note.letter, died_at=died_at
    )
