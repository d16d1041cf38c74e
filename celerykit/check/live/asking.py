"""Asking somebody who may never answer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from threading import Thread
from typing import Any, TypeVar

from celerykit.errors import CelerykitError
from celerykit.settings import mask_text

__all__ = ["Unanswered", "within"]

T = TypeVar("T")


class Unanswered(CelerykitError):
    """Somebody did not answer in time, or refused."""


def within(seconds: float, question: Callable[[], T]) -> T:
    """
    Ask on a thread that is left behind when it takes too long.

    What a client waits for without an end (a lock, a handshake, tries of its
    own) cannot be ended otherwise.

    Raises:
        Unanswered: There was no answer; it says why, without secrets.
    """
    answer: Future[T] = Future()
    Thread(target=_put, args=(question, answer), name="celerykit-check", daemon=True).start()
    try:
        return answer.result(timeout=seconds)
    except Exception as error:  # noqa: BLE001  (an edge: a client may raise anything)
        if isinstance(error, FutureTimeout) and not answer.done():
            raise Unanswered(f"no answer within {seconds:g} s") from None
        raise Unanswered(_told(error)) from None


def _put(question: Callable[[], Any], answer: Future[Any]) -> None:
    try:
        answer.set_result(question())
    except BaseException as error:  # noqa: BLE001  (handed to who waits)
        answer.set_exception(error)


def _told(error: Exception) -> str:
    text = " ".join(str(error).split()).removesuffix(".")
    if isinstance(error, CelerykitError):
        # Ours end with a remedy; so does every finding.
        return mask_text(text.partition(". Check ")[0])
    return mask_text(f"{type(error).__name__}: {text}" if text else type(error).__name__)
