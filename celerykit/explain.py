"""
What a task is declared to do, and what became of a message: ``celerykit explain``.

Nothing is taken out of a queue or changed, and no argument of a call is shown.
"""

from __future__ import annotations

import difflib
import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from celerykit.errors import CelerykitError
from celerykit.headers import Attempt, Headers
from celerykit.retry import Dead, spoken
from celerykit.settings import mask_text

__all__ = [
    "Life",
    "Sighting",
    "Unexplained",
    "as_json",
    "facts_of",
    "life_of",
    "life_text",
    "near",
    "task_of",
    "task_text",
]

#: How long the result backend may take, in seconds: some wait for a dead server without an end.
_PATIENCE = 5.0

#: Messages that are fetched from Redis at a time; each may be a megabyte.
_BATCH = 50

#: Of an error's message, as many letters are shown.
_WIDTH = 200


class Unexplained(CelerykitError):
    """A word that names neither one task of the app, nor a message that is known anywhere."""


# Tasks


def task_of(app: Any, name: str) -> Any:
    """
    Find a task by its name, or by the last part of it; None if there is none.

    Raises:
        Unexplained: Several tasks end like this.
    """
    if name in app.tasks:
        return app.tasks[name]
    named = sorted(full for full in app.tasks if full.rpartition(".")[2] == name)
    if len(named) > 1:
        raise Unexplained(f"{name!r} is the end of several tasks' names: {', '.join(named)}. Give the whole name.")
    return app.tasks[named[0]] if named else None


def near(app: Any, name: str) -> str | None:
    """Guess which task was meant."""
    ours = {full.rpartition(".")[2]: full for full in app.tasks if not full.startswith("celery.")}
    close = difflib.get_close_matches(name, [*ours, *ours.values()], n=1)
    return ours.get(close[0], close[0]) if close else None


def facts_of(task: Any) -> dict[str, Any]:
    """Tell what a task is declared to do, as JSON values."""
    contract, policy = task.contract, task.retry_policy
    described = contract.describe() if contract else {}
    conf = task.app.conf
    return {
        "task": task.name,
        "contract": contract and contract.fingerprint,
        "returns": described.pop("return", {}),
        "parameters": described,
        "required": list(contract.parameters.required) if contract else [],
        "queue": _queue_of(task),
        "result": _kept_result(task),
        "on_crash": task.on_crash,
        "max_deliveries": task.app.settings.kit.max_deliveries,
        "time_limit": task.time_limit or conf.task_time_limit,
        "soft_time_limit": task.soft_time_limit or conf.task_soft_time_limit,
        "retry": policy and _facts_of_policy(policy),
    }


def _facts_of_policy(policy: Any) -> dict[str, Any]:
    return {
        "attempts": policy.attempts,
        "within": policy.within,
        "on": {_name(kind): {"does": type(remedy).__name__, **asdict(remedy)} for kind, remedy in policy.on.items()},
        "table": [row._asdict() for row in policy.table()],
        "text": policy.describe(),
    }


def _queue_of(task: Any) -> str | None:
    own = getattr(task, "queue", None)
    try:
        route = task.app.amqp.router.route({"queue": own} if own else {}, task.name, (), {}, task)
    except Exception:  # noqa: BLE001  (an edge: routers are the user's, and may want the arguments of a call)
        return None
    found = route.get("queue")
    return str(getattr(found, "name", found)) if found else None


def _kept_result(task: Any) -> str:
    if not task.ignore_result:
        return "stored"
    return "only failures are stored" if task.store_errors_even_if_ignored else "not stored"


def task_text(facts: Mapping[str, Any]) -> str:
    """Write what `facts_of` told for a person."""
    crash = {
        "rerun": f"rerun: what a dying process leaves is started again, {facts['max_deliveries']} times at most",
        "bury": "bury: what a dying process leaves becomes a dead letter, and is never started twice",
    }
    limits = [
        f"{spoken(limit)} ({kind})"
        for kind, limit in (("soft", facts["soft_time_limit"]), ("hard", facts["time_limit"]))
        if limit
    ]
    lines = [
        ("contract", facts["contract"] or "none: a task of Celery's own"),
        *(
            (f"  {name}", _type(schema) + ("" if name in facts["required"] else ", optional"))
            for name, schema in facts["parameters"].items()
        ),
        ("  returns", _type(facts["returns"])),
        ("queue", facts["queue"] or "as the routers say, for each call"),
        ("result", facts["result"]),
        ("on crash", crash[facts["on_crash"]]),
        ("time limit", ", ".join(limits) or "none"),
        ("retry", (facts["retry"] or {}).get("text") or f"no policy; on any error: {Dead()}"),
    ]
    return "\n".join([facts["task"], *_columns(lines)])


def _type(schema: Mapping[str, Any]) -> str:
    """Name the type a JSON Schema describes, in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "enum" in schema:
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " | ".join(dict.fromkeys(_type(one) for one in schema[several]))
    kind = str(schema.get("type", "anything"))
    if kind == "array" and isinstance(schema.get("items"), Mapping):
        return f"array of {_type(schema['items'])}"
    if kind == "object" and "properties" in schema:
        return str(schema.get("title", kind))
    return f"{kind} ({schema['format']})" if "format" in schema else kind


def _columns(lines: Iterable[tuple[str, str]]) -> Iterator[str]:
    lines = list(lines)
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        first, *rest = text.split("\n")
        yield f"  {name:{width}}  {first}".rstrip()
        yield from (f"  {'':{width}}  {line}" for line in rest)


# Messages


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
        return [Sighting(place=place, is_there=None, says=f"cannot say: {_said(error)}")]


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
            says = f"cannot say: {connection.transport.driver_name} shows no message without taking it out of its queue"
            yield Sighting(place="queues", is_there=None, says=says)
            return
        letters = app.settings.kit.dead_letter_queue
        for place, says, headers in _in_redis(connection.channel(), skip=letters):
            if headers.get("id") == task_id:
                ours = Headers.of(headers)
                says = f"attempt {ours.attempt} {says}{_due(ours, headers)}"
                yield Sighting(place=place, is_there=True, says=says, task=headers.get("task"), headers=ours)


def _due(ours: Headers, headers: Mapping[str, Any]) -> str:
    if ours.due_at is None:
        try:
            return f", due {_time(datetime.fromisoformat(headers['eta']).timestamp())}"
        except (KeyError, TypeError, ValueError):
            return ""
    return f", due {_time(ours.due_at)}"


def _in_redis(channel: Any, *, skip: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    # How Kombu lays messages down: one list for each queue and priority, and a hash of what workers have taken.
    client, prefix = channel.client, channel.global_keyprefix or ""
    for name in sorted(_queues(channel) - {skip}):
        for step in channel.priority_steps:
            key = f"{prefix}{name}{channel.sep}{step}" if step else f"{prefix}{name}"
            for item in _listed(client, key):
                yield f"queue {name}", "is waiting", _headers(_read(item))
    for _, item in client.hscan_iter(f"{prefix}{channel.unacked_key}", count=_BATCH):
        match _read(item):
            case [message, _, name, *_]:
                yield (
                    f"queue {name}",
                    "was taken by a worker, which runs it or keeps it for its time",
                    _headers(message),
                )


def _queues(channel: Any) -> set[str]:
    """Name every queue that anybody declared."""
    client, prefix = channel.client, channel.global_keyprefix or ""
    names: set[str] = set()
    for key in client.scan_iter(f"{prefix}{channel.keyprefix_queue % '*'}", count=1000):
        for member in client.smembers(_text(key).removeprefix(prefix)):
            names.add(_text(member).rpartition(channel.sep)[2])
    return {name for name in names if not name.endswith(".pidbox") and not name.startswith("celeryev.")}


def _listed(client: Any, key: str) -> Iterator[Any]:
    # From the end where messages come in: those that are added meanwhile move the rest towards us.
    start = 0
    while items := client.lrange(key, start, start + _BATCH - 1):
        yield from items
        start += _BATCH


def _read(item: Any) -> Any:
    try:
        return json.loads(item)
    except ValueError:
        return None


def _headers(found: Any) -> Mapping[str, Any]:
    """Give the headers of what may be a message."""
    headers = found.get("headers") if isinstance(found, dict) else None
    return headers if isinstance(headers, dict) else {}


def _in_letters(app: Any, task_id: str) -> Iterator[Sighting]:
    for letter in app.dead_letters.find(id=task_id):
        note = letter.note
        cause = _shortened(f"{note.error}: {note.message}") if note.error else ""
        says = ", ".join(filter(None, (note.reason, cause))) + f"; died {_time(note.died_at)}; letter {note.letter}"
        headers = Headers(sent_at=note.sent_at, attempt=note.attempts, replay=note.replay, ledger=note.ledger)
        yield Sighting(place="dead letters", is_there=True, says=says, task=note.task, headers=headers)


def _in_backend(app: Any, task_id: str) -> Iterator[Sighting]:
    meta = app.backend.get_task_meta(task_id, cache=False)
    state, value = meta.get("status", "PENDING"), meta.get("result")
    if state == "PENDING":
        says = "nothing is stored: it has not finished, its result is not kept, or there never was such a call"
        yield Sighting(place="result", is_there=False, says=says)
        return
    says = state + (f", {_said(value)}" if isinstance(value, BaseException) else "")
    if done := meta.get("date_done"):
        says += f", {done}"
    yield Sighting(place="result", is_there=True, says=says, task=meta.get("name"))


def life_text(life: Life) -> str:
    """Write a life for a person."""
    lines = [("sent", _time(life.sent_at))] if life.sent_at else []
    attempt = 1
    for row in life.ledger:
        lines.append((f"attempt {attempt}", _ran(row)))
        attempt += row.outcome != "snooze"
    lines += [(sighting.place, sighting.says) for sighting in life.sightings]
    return "\n".join([f"{life.id}  {life.task or ''}".rstrip(), *_columns(lines)])


def _ran(row: Attempt) -> str:
    error = f", error {row.error}" if row.error else ""
    where = f", on {row.worker}" if row.worker else ""
    return f"{_time(row.started)}: waited {spoken(row.waited)}, ran {spoken(row.ran)}, {row.outcome}{error}{where}"


def as_json(facts: Any) -> str:
    """Write facts for a program."""
    return json.dumps(facts, indent=2, ensure_ascii=False, default=str)


def _said(error: BaseException) -> str:
    # Errors of clients quote URLs.
    return _shortened(f"{type(error).__name__}: {error}")


def _shortened(text: str) -> str:
    text = mask_text(" ".join(text.split())).removesuffix(": ").rstrip(":")
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def _time(seconds: float | None) -> str:
    return f"{datetime.fromtimestamp(seconds or 0, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
