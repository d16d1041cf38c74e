"""
Sending a dead letter again: whether it may, with which arguments, and what becomes of the failure that is stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast
from uuid import uuid4

from celery.backends.redis import RedisBackend
from celery.utils.time import rate as per_second
from kombu.serialization import loads, prepare_accept_content
from kombu.utils.json import dumps

from celerykit import events, running
from celerykit.dead_letters import Letter, Outgoing, payload_of, repaired, replay_mark, rewritten
from celerykit.errors import InvalidPayload, Problem, StoreUnavailable
from celerykit.headers import Headers
from celerykit.idempotency import Claims, State, find_claim
from celerykit.letter_queues import Held, LetterQueue, NoQueue

if TYPE_CHECKING:
    from celerykit.app import CeleryKit

__all__ = ["Change", "Refusal", "Replay", "Report", "edited"]

#: Refusals beyond this are counted, not kept.
_KEPT_REFUSALS = 100

#: Gets the arguments of a call as JSON values, and returns new ones, or changes those it got.
Change: TypeAlias = Callable[[list[Any], dict[str, Any]], "tuple[Any, Mapping[str, Any]] | None"]


class Refusal(NamedTuple):
    """
    A letter that was not replayed.

    Attributes:
        problems:
            What does not fit the task's contract today, without the values.
    """

    letter: str
    task: str | None
    why: str
    problems: list[Problem]


@dataclass(slots=True)
class Report:
    """
    What came of a replay, so far.

    Attributes:
        replayed:
            Sent again; in a dry run: would be.

        skipped:
            Replayed before, or taken away by somebody else meanwhile.

        refused:
            Left where they are.

        refusals:
            The first hundred of these.
    """

    replayed: int = 0
    skipped: int = 0
    refused: int = 0
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many letters were looked at."""
        return self.replayed + self.skipped + self.refused

    def refuse(self, letter: Letter, error: NotReplayable | NoQueue | InvalidPayload) -> None:
        """Count a letter that stays."""
        self.refused += 1
        if len(self.refusals) < _KEPT_REFUSALS:
            problems = error.problems if isinstance(error, InvalidPayload) else []
            self.refusals.append(Refusal(letter.id, letter.note.task, str(error), problems))


class NotReplayable(Exception):
    """Says why."""


class Replay:
    """
    Sends letters again, one by one.

    Attributes:
        report:
            What came of it so far.

    For the arguments, see `celerykit.letters.DeadLetters.replay`.
    """

    def __init__(
        self,
        app: CeleryKit,
        *,
        rate: str | float | None,
        edit: Change | None,
        force: bool,
        new_ids: bool,
        dry_run: bool,
    ) -> None:
        self.report = Report()
        self._app = app
        self._edit = edit
        self._force = force
        self._new_ids = new_ids
        self._dry_run = dry_run
        self._pause = _Pace(rate)

    def __call__(self, queue: LetterQueue, held: Held) -> None:
        """Send one, unless it may not be sent."""
        try:
            letter = held.letter if self._edit is None else edited(self._app, held.letter, self._edit)
            _check(self._app, letter, force=self._force)
            if self._dry_run or self._send(queue, held, letter):
                self.report.replayed += 1
            else:
                self.report.skipped += 1
        except (InvalidPayload, NotReplayable, NoQueue) as error:
            self.report.refuse(held.letter, error)

    def _send(self, queue: LetterQueue, held: Held, letter: Letter) -> bool:
        new_id = str(uuid4()) if self._new_ids else None
        message = repaired(letter, now=time.time(), nonce=uuid4().hex, new_id=new_id)
        if self._has_started(message):
            # Whoever sent it died before it was taken away.
            queue.remove(held)
            return False
        self._pause()
        former = _FormerResult(self._app, None if self._new_ids else letter.note.id)
        former.look()
        was_sent = queue.send(held, message)
        if was_sent:
            former.forget()
            _tell_replayed(letter, message)
        return was_sent

    def _has_started(self, message: Outgoing) -> bool:
        mark = replay_mark(message.headers)
        # Without a store the worker cannot tell either.
        with suppress(StoreUnavailable):
            return mark is not None and self._app.store.get(mark.key) is not None
        return False


def _tell_replayed(letter: Letter, message: Outgoing) -> None:
    header, note = Headers.of(message.headers), letter.note
    events.TASK_REPLAYED.tell(
        task=note.task,
        id=message.headers.get("id", note.id),
        root_id=message.headers.get("root_id"),
        queue=message.queue,
        key=header.key,
        letter=letter.id,
        correlation_id=running.facts_of(message.headers).get("correlation_id"),
    )


class _Pace:
    """Waits, so that it comes to an end at most so often."""

    def __init__(self, rate: str | float | None) -> None:
        self._seconds = 1 / per_second(cast("Any", rate)) if rate else 0.0
        self._next = 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if now < self._next:
            time.sleep(self._next - now)
        self._next = max(now, self._next) + self._seconds


# Arguments


def edited(app: CeleryKit, letter: Letter, change: Change) -> Letter:
    """
    Give a letter with the arguments that *change* makes of its own.

    Raises:
        InvalidPayload: They do not fit the task.
    """
    before = payload_of(letter)
    old = (list(before.args), dict(before.kwargs)) if before else ([], {})
    args, kwargs = change(*old) or old
    task = app.tasks.get(cast("Any", letter.note.task))
    contract = getattr(task, "contract", None)
    if contract is not None:
        args, kwargs = contract.dump(args, kwargs)
    changed = rewritten(letter, args, kwargs, contract=contract and contract.fingerprint, encode=dumps)
    return _with_key_of_new(task, changed, before, (args, kwargs)) if before else changed


def _with_key_of_new(task: Any, letter: Letter, before: Any, after: tuple[Any, Any]) -> Letter:
    """Give a letter the key of its new arguments, if it had that of the old ones, and not one that was given."""
    claims, header = getattr(task, "claims", None), Headers.of(letter.headers)
    if claims is None or claims.keys is None or header.key is None:
        return letter
    try:
        was_derived = claims.identify(before.args, before.kwargs, id=None).key == header.key
    except Exception:  # noqa: BLE001  (they did not fit; or a user's function has no key for them)
        was_derived = True
    if not was_derived:
        return letter
    try:
        new = claims.identify(*after, id=None)
    except Exception:  # noqa: BLE001  (the worker will say so)
        return letter
    return replace(letter, headers=replace(header, key=new.key, call=new.call or None).added_to(letter.headers))


def _check(app: CeleryKit, letter: Letter, *, force: bool) -> None:
    """Refuse what would only die again."""
    name, args, kwargs = _call_in(letter, _decoded(app, letter))
    task = app.tasks.get(name)
    if task is None and not force:
        raise NotReplayable(f"there is no task {name} here")
    contract = getattr(task, "contract", None)
    if contract is not None:
        contract.load(args, kwargs)
    if letter.note.chord and payload_of(letter) is None:
        raise NotReplayable("only a body of JSON can be taken out of its chord")
    if not force and (other := _superseded_by(app, task, letter, args, kwargs)):
        raise NotReplayable(f"superseded: call {other}, which has the same key, is done")


def _superseded_by(app: CeleryKit, task: Any, letter: Letter, args: Any, kwargs: Any) -> str | None:
    """Give the id of another call that has done what this letter's was to do."""
    claims: Claims | None = getattr(task, "claims", None)
    if claims is None:
        return None
    call_id = str(letter.note.id)
    try:
        key = Headers.of(letter.headers).key or claims.identify(args, kwargs, id=call_id).key
        claim = find_claim(app.store, key)
    except Exception:  # noqa: BLE001  (the store's, or those of a user's function: the worker will find out)
        return None
    return claim.id if claim is not None and claim.state is State.DONE and claim.id != call_id else None


def _decoded(app: CeleryKit, letter: Letter) -> Any:
    if letter.headers.get("compression"):
        raise NotReplayable("its body cannot be unpacked")
    accept = prepare_accept_content(app.conf.accept_content)
    kinds: tuple[Any, Any] = (letter.content_type, letter.content_encoding)
    try:
        return loads(cast("Any", letter.body), *kinds, accept=accept)
    except Exception as error:  # noqa: BLE001  (an edge: any serializer may be in use)
        raise NotReplayable(f"its body cannot be decoded ({type(error).__name__})") from None


def _call_in(letter: Letter, body: Any) -> tuple[str, Any, Any]:
    if isinstance(body, Mapping):
        # Celery's first protocol.
        name, task_id, args, kwargs = (body.get(key) for key in ("task", "id", "args", "kwargs"))
        args, kwargs = args or [], kwargs or {}
    elif isinstance(body, list | tuple) and len(body) == 3:
        name, task_id, (args, kwargs, _) = letter.headers.get("task"), letter.headers.get("id"), body
    else:
        raise NotReplayable("its body is not that of a task")
    if not isinstance(name, str) or not isinstance(task_id, str):
        raise NotReplayable("it names no task, or has no id")
    if not isinstance(args, list | tuple) or not isinstance(kwargs, Mapping):
        raise NotReplayable("its body is not that of a task")
    return name, args, kwargs


# Results


class _FormerResult:
    """
    The failure that is stored for a call, to be forgotten when the call is sent again.

    Whoever waits for it then sees the new outcome. It must not be that one
    which is forgotten: a worker may be quick. In Redis the failure as it was
    goes away, and nothing else; other backends forget before the call is sent.
    """

    _FORGET = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"

    def __init__(self, app: CeleryKit, task_id: str | None) -> None:
        self._backend: Any = app.backend
        self._task_id = task_id
        self._stored: Any = None

    def look(self) -> None:
        """Before the call is sent: find the failure."""
        if self._task_id is None:
            return
        try:
            if isinstance(self._backend, RedisBackend):
                self._stored = self._failure_in_redis(self._backend)
            elif _is_failure(self._backend.get_task_meta(self._task_id, cache=False)):
                self._backend.forget(self._task_id)
        except NotImplementedError:
            # A backend that keeps nothing, or cannot forget.
            return
        except Exception as error:  # noqa: BLE001  (an edge: results may be kept anywhere)
            self._tell(error)

    def forget(self) -> None:
        """After it was sent: forget what was found."""
        if self._stored is None:
            return
        try:
            self._backend.client.eval(self._FORGET, 1, self._backend.get_key_for_task(self._task_id), self._stored)
        except Exception as error:  # noqa: BLE001  (an edge: the call is on its way, and will have a result)
            self._tell(error)

    def _failure_in_redis(self, backend: Any) -> Any:
        stored = backend.client.get(backend.get_key_for_task(self._task_id))
        return stored if stored and _is_failure(backend.decode_result(stored)) else None

    def _tell(self, error: Exception) -> None:
        events.DEAD_LETTER_RESULT_KEPT.tell(id=self._task_id, error=error)


def _is_failure(meta: Any) -> bool:
    return isinstance(meta, Mapping) and meta.get("status") in ("FAILURE", "REVOKED")
