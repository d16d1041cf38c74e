"""
Keys for people: which are held, by which calls, and how one is let go.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from celerykit.errors import CelerykitError, InvalidOptions, StoreUnavailable
from celerykit.idempotency.claim import Claim, Event, State, after
from celerykit.stores import Record, Swap

__all__ = ["Held", "KeyInUse", "KeyNotFound", "Keyring"]

#: What a store has before a key.
_PREFIX = "once:"

#: A key that is not only the beginning of one.
_WHOLE = re.compile(r".+:[0-9a-f]{32}")

#: How often a key is looked at anew that changes while it is let go.
_MOST_ROUNDS = 20

#: How many keys are named that begin alike.
_NAMED = 3


class KeyNotFound(CelerykitError, LookupError):
    """No call holds this key, or several keys begin so."""


class KeyInUse(CelerykitError):
    """
    A key is that of a call which is being run.

    Attributes:
        held:
            What is known of it.
    """

    def __init__(self, message: str, held: Held) -> None:
        super().__init__(message)
        self.held = held


@dataclass(frozen=True, slots=True)
class Held:
    """
    A key that is held, as it was when it was looked at.

    Attributes:
        key:
            ``<task>:<digest>``.

        lease:
            Seconds left, by the store's clock: 0 or less when it has lapsed;
            ``None`` without one.

        version:
            What the store compares.
    """

    key: str
    claim: Claim
    lease: float | None
    version: str

    @property
    def task(self) -> str:
        """The name of the task whose key it is."""
        return self.key.rpartition(":")[0]

    @property
    def has_lapsed(self) -> bool:
        """Whether nothing was heard of its call for longer than its lease."""
        return self.lease is not None and self.lease <= 0

    @property
    def is_in_use(self) -> bool:
        """Whether its call is being run, as far as anybody knows."""
        return self.claim.state is State.RUNNING and not self.has_lapsed

    def meaning(self) -> str:
        """Say what it means to let this key go."""
        if self.claim.state is State.RUNNING and self.has_lapsed:
            return "its run is probably gone; should it end all the same, its result is not recorded"
        return _MEANING[self.claim.state]


_MEANING: Mapping[State, str] = {
    State.CLAIMED: "its message stays in the queue; it runs, unless another call takes the key before",
    State.WAITING: "the message of its next turn stays in the queue; another call may take the key, and run, before",
    State.RUNNING: "its run goes on, and what it returns is not recorded; another call may run beside it",
    State.DONE: "it is forgotten, and runs again when it is called or delivered once more",
    State.FAILED: "it has failed, so that the next call runs in any case",
}


class Keyring:
    """
    The keys that calls of an app's tasks hold.

    Every method raises `StoreUnavailable` when the store does not answer.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    @property
    def is_shared(self) -> bool:
        """Whether other processes' keys can be seen at all."""
        return bool(self._app.store.is_shared)

    # To look at

    def find(self, *, task: Any = None, state: State | str | None = None) -> Iterator[Held]:
        """
        Give the keys that are held, in no order, while they are read.

        One that changes meanwhile may be missed, or come twice.

        Args:
            task:
                A task, or its name, in which ``*`` and ``?`` stand for any text and any character.
        """
        pattern = str(getattr(task, "name", task) or "*")
        literal = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        for held in self._beginning(literal if literal != pattern else f"{pattern}:"):
            if fnmatchcase(held.task, pattern) and state in (None, held.claim.state):
                yield held

    def get(self, key: str) -> Held:
        """
        Give what is known of a key; its beginning is enough, if no other begins so.

        Raises:
            KeyNotFound: Nobody holds it, or several keys begin so.
        """
        return self.look(key) or self._only(key)

    def look(self, key: str) -> Held | None:
        """Give what is known of this very key; ``None`` when nobody holds it."""
        return _held(key, self._app.store.read(_PREFIX + key))

    def of_call(self, task: Any, id: str) -> Held:  # noqa: A002  (Celery's name)
        """
        Give the key that a call holds.

        Raises:
            KeyNotFound: It holds none.

            InvalidOptions: Calls of this task have no keys.
        """
        if _claims_of(task).keys is None:
            return self.get(self.key_of(task, id=id))
        held = next((held for held in self.find(task=task) if held.claim.id == id), None)
        if held is None:
            raise KeyNotFound(f"Call {id} of {task.name} holds no key.")
        return held

    def key_of(
        self,
        task: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        id: str | None = None,  # noqa: A002  (Celery's name)
        key: Any = None,
    ) -> str:
        """
        Give the key of a call, whether somebody holds it or not.

        Args:
            args, kwargs:
                What it is called with, typed or as JSON.

            id:
                Of the call, where the task has no `Once` and only remembers.

            key:
                What the call was given with ``task.using(key=…)``.

        Raises:
            InvalidPayload: The arguments do not fit.

            InvalidOptions: Calls of this task have no keys, or *id* is needed.
        """
        claims = _claims_of(task)
        if claims.keys is None and id is None:
            raise InvalidOptions(f"{task.name} remembers its calls by their ids; name one.")
        return str(claims.identify(args, kwargs or {}, id=id, key=key).key)

    # To change

    def release(self, key: str, *, force: bool = False) -> Held:
        """
        Let a key go, as if its call had never been; what that means, `Held.meaning` says.

        Args:
            force:
                Also of a call that is being run.

        Returns:
            What was known of it.

        Raises:
            KeyNotFound: Nobody holds it, or several keys begin so.

            KeyInUse: Its call is being run.
        """
        held = self.get(key)
        for _ in range(_MOST_ROUNDS):
            if held.is_in_use and not force:
                raise _in_use(held)
            after(held.claim.state, Event.RELEASE)
            # A run that was only slow may have been heard of in the meantime.
            lapsed = held.has_lapsed and not force
            [swapped] = self._app.store.swap(Swap(_PREFIX + held.key, held.version, None, lapsed=lapsed))
            if swapped.done:
                return held
            found = _held(held.key, swapped.found)
            if found is None:
                raise _not_found(held.key)
            held = found
        raise StoreUnavailable(f"the key {held.key} has changed {_MOST_ROUNDS} times while it was let go.")

    # Walking

    def _beginning(self, text: str) -> Iterator[Held]:
        for name, record in self._app.store.find(_PREFIX + text):
            held = _held(name.removeprefix(_PREFIX), record)
            if held is not None:
                yield held

    def _only(self, text: str) -> Held:
        if _WHOLE.fullmatch(text):
            raise _not_found(text)
        found: dict[str, Held] = {}  # one may come twice
        for held in self._beginning(text):
            found[held.key] = held
            if len(found) > _NAMED:
                break
        if len(found) > 1:
            named = [*list(found)[:_NAMED], *(["…"] if len(found) > _NAMED else [])]
            raise KeyNotFound(f"Several keys begin with {text!r}: {', '.join(named)}. Give more of it.")
        if not found:
            raise _not_found(text)
        return next(iter(found.values()))


def _not_found(key: str) -> KeyNotFound:
    return KeyNotFound(f"There is no key {key}: nobody holds it, or it was forgotten.")


def _held(key: str, record: Record | None) -> Held | None:
    try:
        return None if record is None else Held(key, Claim.of(record.data), record.lease, record.version)
    except (ValueError, TypeError, KeyError):
        return None  # nobody's


def _claims_of(task: Any) -> Any:
    claims = getattr(task, "claims", None)
    if claims is None:
        raise InvalidOptions(f"{task.name} has no keys: it is declared with neither once=Once() nor remember=True.")
    return claims


def _in_use(held: Held) -> KeyInUse:
    return KeyInUse(
        f"{held.key} stays: its call {held.claim.id} is being run. If it is let go by force, {held.meaning()}.", held
    )
