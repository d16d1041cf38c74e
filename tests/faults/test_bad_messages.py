"""
Messages that are none: each is kept dead, and the next one runs.
"""

from __future__ import annotations

import pytest

from tests.faults.bad_messages import BROKEN_ENVELOPES, MESSAGES, Message
from tests.faults.brokers import Valkey
from tests.faults.scene import Scene
from tests.services import eventually

BAD = [message for message in MESSAGES if message.reasons]
ODD = [message for message in MESSAGES if not message.reasons]


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_no_message_kills_a_worker(scene: Scene, pool: str) -> None:
    node = scene.worker(pool=pool, concurrency=1)
    for message in MESSAGES:
        scene.publish(message.body, headers=message.headers, **message.properties)
        try:
            scene.canary(within=15)
        except AssertionError:
            pytest.fail(f"no canary runs after: {message.name}\n{node.log[-3000:]}", pytrace=False)
    scene.sent += [str(message.task_id) for message in ODD]

    eventually(lambda: len(scene.letters) >= len(BAD), within=20, what=lambda: f"letters of {_missing(scene)}")

    reasons = _reasons(scene)
    wrong = {message.name: reasons.get(message.name) for message in BAD if not _is_right(message, reasons)}
    assert not wrong
    assert len(scene.letters) == len(BAD)
    assert node.process.poll() is None
    assert not _untold(scene)
    scene.verdict(f"Bad messages of {len(BAD)} kinds, each followed by a good one ({pool})")


@pytest.mark.parametrize("scene", ["valkey"], indirect=True)
def test_nothing_on_a_list_kills_a_worker(scene: Scene) -> None:
    assert isinstance(scene.broker, Valkey)
    node = scene.worker(concurrency=1)
    for name, envelope in BROKEN_ENVELOPES.items():
        scene.published += 1
        scene.broker.publish_envelope(envelope)
        try:
            scene.canary(within=15)
        except AssertionError:
            pytest.fail(f"no canary runs after: {name}\n{node.log[-3000:]}", pytrace=False)

    eventually(lambda: len(scene.letters) == len(BROKEN_ENVELOPES), within=20, what=scene.told)
    assert {letter.note.reason for letter in scene.letters} <= {"malformed", "undecodable"}
    assert node.process.poll() is None
    scene.verdict(f"Broken envelopes of {len(BROKEN_ENVELOPES)} kinds on a Redis list, each followed by a good message")


def test_a_payload_that_is_wrong_is_repaired_and_replayed(scene: Scene) -> None:
    scene.worker()
    [message] = [message for message in BAD if message.name == "an argument of a wrong type"]
    scene.publish(message.body, headers=message.headers, **message.properties)
    assert message.task_id
    scene.sent.append(message.task_id)

    [letter] = scene.dies(message.task_id, of="invalid_payload")
    assert letter.note.problems[0]["loc"] == ["seconds"]
    scene.replays(message.task_id, edit=lambda args, kwargs: (args, {**kwargs, "seconds": 0.0}))

    scene.verdict("A payload that does not validate, repaired and replayed")


def _reasons(scene: Scene) -> dict[str, str]:
    """Give the reason of each message's letter; those that have no name are found by their body."""
    named = {}
    for letter in scene.letters:
        name = letter.properties.get("correlation_id") or ("plain text" if b"hello" in letter.body else "?")
        named[name] = letter.note.reason
    return named


def _is_right(message: Message, reasons: dict[str, str]) -> bool:
    return reasons.get(message.name) in message.reasons


def _missing(scene: Scene) -> list[str]:
    reasons = _reasons(scene)
    return [message.name for message in BAD if message.name not in reasons]


def _untold(scene: Scene) -> list[str]:
    """Give those whose sender waits for a result in vain."""
    states = {message.name: scene.state(message.task_id) for message in BAD if message.task_id}
    return [f"{name}: {state}" for name, state in states.items() if state not in ("FAILURE", "REVOKED")]
