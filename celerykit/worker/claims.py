"""
The claims of runs whose process cannot speak for them any more: the parent ends them, or gives them up.

In a process of the pool the step `once` does it, for all that ends as it should.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import uuid4

from celerykit import events
from celerykit.again import TOKEN
from celerykit.errors import StoreUnavailable
from celerykit.headers import Headers
from celerykit.idempotency import Claims, State, Turn, find_claim
from celerykit.idempotency.claim import Event, version
from celerykit.idempotency.records import end_claim, key_in, record_of

__all__ = ["begin", "end", "end_message", "give_up", "hand_back", "has_finished", "release"]


class _Place(NamedTuple):
    """Where a message's claim stands in the store, and which of its versions is this message's."""

    name: str
    id: str
    turn: Turn


def begin(request: Any) -> None:
    """Draw the token of a run, so that this process knows it, too."""
    if _claims_of(request) is not None:
        request.request_dict[TOKEN] = uuid4().hex


def give_up(request: Any) -> None:
    """Let the lease of a run go whose process is gone: its message goes back, and the next one may start at once."""
    claims, token = _claims_of(request), request.request_dict.get(TOKEN)
    if claims is None or token is None or (place := _place(request, claims)) is None:
        return
    claims.abandon(place.name, version(State.RUNNING, place.id, place.turn, token))


def hand_back(request: Any) -> None:
    """Let a run go that was cut off, and whose message goes back: its start does not count."""
    _end(request, Event.HAND_BACK, "")


def has_finished(request: Any) -> bool:
    """Tell whether a call is done, though its process died before it could store the result."""
    claims = _claims_of(request)
    if claims is None or (place := _place(request, claims)) is None:
        return False
    try:
        claim = find_claim(claims.store(), key_in(place.name))
    except StoreUnavailable:
        return False
    return claim is not None and claim.state is State.DONE and claim.id == place.id


def end(request: Any, why: str) -> None:
    """Let a call have failed that is about to be buried. Its key is free then."""
    _end(request, Event.FAIL, why)


def release(request: Any) -> None:
    """Free the key of a call that is revoked."""
    _end(request, Event.RELEASE, "revoked")


def _end(request: Any, event: Event, why: str) -> None:
    claims = _claims_of(request)
    if claims is not None and (place := _place(request, claims)) is not None:
        _move(claims.store, place, event, why, token=request.request_dict.get(TOKEN))


def end_message(app: Any, headers: Any, why: str) -> None:
    """Let a call have failed whose message never became a request, if the message says which key is its own."""
    ours, call_id = Headers.of(headers if isinstance(headers, Mapping) else {}), (headers or {}).get("id")
    if ours.key is not None and isinstance(call_id, str):
        place = _Place(record_of(ours.key), call_id, Turn(ours.replay, ours.turn))
        _move(lambda: app.store, place, Event.FAIL, why)


def _move(store: Any, place: _Place, event: Event, why: str, *, token: str | None = None) -> None:
    try:
        end_claim(store(), place.name, place.id, place.turn, token=token, event=event, why=why)
    except StoreUnavailable as error:
        events.CLAIM_NOT_ENDED.tell(key=key_in(place.name), id=place.id, error=error)
    except Exception as error:  # noqa: BLE001  (an edge: the message must still come to its end)
        events.CLAIM_NOT_ENDED.tell(key=key_in(place.name), id=place.id, error=type(error).__name__)


def _claims_of(request: Any) -> Claims | None:
    return getattr(request.task, "claims", None)


def _place(request: Any, claims: Claims) -> _Place | None:
    header = Headers.of(request.request_dict)
    try:
        key = header.key or claims.identify(request.args, request.kwargs, id=request.id).key
    except Exception:  # noqa: BLE001  (an edge: a key may be made by a user's function)
        return None  # it never had a claim
    return _Place(record_of(key), request.id, Turn(header.replay, header.turn))
