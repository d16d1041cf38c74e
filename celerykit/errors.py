"""
Every error celerykit raises, in one tree.

    CelerykitError
    ├── InvalidContract     a function's signature cannot be a contract
    ├── InvalidPayload      arguments do not fit a task's contract
    ├── InvalidOptions      options a task cannot be declared or sent with
    ├── EnqueueError        the broker did not take a message
    ├── DuplicateCall       a call's key is another one's
    ├── KeyConflict         a call has the key of another one, and other arguments
    ├── ResultMismatch      a value is not of the task's return type
    ├── ResultNotStored     a result was asked for that nobody keeps
    ├── LimitReached        a call waits for a limit of its task
    ├── TaskInterrupted     a task raised what would have ended its process
    ├── Undeliverable       a message was started too often without coming to an end
    ├── StoreUnavailable    the store of counts and marks did not answer
    ├── LettersLocked       somebody else is walking through the dead letters
    ├── LetterNotFound      there is no such dead letter
    └── InvalidSettings     settings that are wrong, unknown or misspelt

A few stand where they belong: ``KeyNotFound`` and ``KeyInUse`` in `celerykit.keys`, ``AppNotFound`` in
`celerykit.check`, and those in `celerykit.dev`.

Each message says what happened, to which, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "CelerykitError",
    "DuplicateCall",
    "EnqueueError",
    "InvalidContract",
    "InvalidOptions",
    "InvalidPayload",
    "InvalidSettings",
    "KeyConflict",
    "LetterNotFound",
    "LettersLocked",
    "LimitReached",
    "ResultMismatch",
    "ResultNotStored",
    "StoreUnavailable",
    "TaskInterrupted",
    "Undeliverable",
]

#: One problem: where it is, its kind, and what is wrong. Never the value, which may be a secret.
Problem = Mapping[str, Any]


class CelerykitError(Exception):
    """Something celerykit refuses, or could not do."""


class InvalidContract(CelerykitError, TypeError):
    """A function's signature cannot be a contract."""


class InvalidPayload(CelerykitError, TypeError):
    """
    Arguments do not fit a task's contract.

    A caller sees it before anything is sent; in a worker it is the task's
    failure, and its function has not run.

    Attributes:
        task:
            The task's name.

        problems:
            A list of ``{"loc": [...], "type": ..., "msg": ...}``, as pydantic
            writes them, without the values.
    """

    def __init__(self, message: str, task: str = "", problems: Sequence[Problem] = ()) -> None:
        # All three stand in `args`: a result backend stores those, and builds the error again from them.
        super().__init__(message, task, [dict(problem) for problem in problems])
        self.task = task
        self.problems: list[Problem] = self.args[2]

    def __str__(self) -> str:
        return str(self.args[0])


class InvalidOptions(CelerykitError, ValueError):
    """A task cannot be declared, or a message sent, with these options."""


class EnqueueError(CelerykitError):
    """
    The broker did not take a message in time.

    What is raised is also a ``kombu.exceptions.OperationalError``, which is
    what callers of Celery catch.
    """


class DuplicateCall(CelerykitError):
    """
    A call's key is another one's, and the task says that this is an error.

    Attributes:
        key:
            As ``celerykit keys`` shows it.

        first:
            The id of the call that has it.
    """

    def __init__(self, message: str, key: str = "", first: str = "") -> None:
        # A result backend stores `args`, and builds the error again from them.
        super().__init__(message, key, first)
        self.key = key
        self.first = first

    def __str__(self) -> str:
        return str(self.args[0])


class KeyConflict(DuplicateCall):
    """A call has the key of another one, and other arguments: one of them is wrong, and nobody can tell which."""


class ResultMismatch(CelerykitError, TypeError):
    """
    A value is not of the task's return type.

    Attributes:
        task:
            The task's name.

        value:
            The value as it was stored or returned.
    """

    def __init__(self, message: str, task: str = "", value: Any = None) -> None:
        super().__init__(message)
        self.task = task
        self.value = value


class ResultNotStored(CelerykitError):
    """A result was asked for that nobody keeps."""


class InvalidSettings(CelerykitError, ValueError):
    """
    Settings are wrong, unknown or misspelt.

    Attributes:
        problems:
            One sentence for each setting that is wrong.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems)


class LimitReached(CelerykitError):
    """A call waits for a limit of its task. Run in place, it does not wait for long, and this is its failure."""


class TaskInterrupted(CelerykitError):
    """
    A task raised ``SystemExit``, ``KeyboardInterrupt`` or ``MemoryError``.

    Left as they are, these end the process or thread that runs the task, or
    the whole worker; so they become this, whose cause they are.
    """


class Undeliverable(CelerykitError):
    """A message was started too often without coming to an end: it seems to kill its worker."""


class StoreUnavailable(CelerykitError):
    """The store of counts and marks did not answer."""


class LettersLocked(CelerykitError):
    """Somebody else is walking through the dead letters."""


class LetterNotFound(CelerykitError, LookupError):
    """There is no such dead letter."""
