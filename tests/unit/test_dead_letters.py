"""Dead letters as records: what a note says, which letters are meant, and what is sent again."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celerykit.dead_letters import (
    HEADER,
    REASONS,
    Filter,
    Letter,
    Note,
    described,
    error_fingerprint,
    identify,
    letter_id,
    payload_of,
    repaired,
    replay_mark,
    rewritten,
)
from celerykit.errors import InvalidPayload, LetterNotFound
from celerykit.headers import Attempt, Headers
from celerykit.letter_queues.messages import letter_in_list, letter_of
from celerykit.letters import bury

NOW = 1_800_000_000.0

TRACEBACK = """\
Traceback (most recent call last):
  File "/lib/celery/app/trace.py", line 453, in trace_task
    R = retval = fun(*args, **kwargs)
  File "/srv/{deploy}/shop/tasks.py", line {line}, in charge
    gateway.charge(order)
  File "/srv/{deploy}/shop/gateway.py", line 7, in charge
    raise {error}
"""


def note(**facts: Any) -> Note:
    return Note(**{"letter": letter_id("1", 1, 0), "reason": "failed", "died_at": NOW, **facts})


def letter(
    args: Any = (1,), *, note_: Note | None = None, embed: Any = None, headers: Any = None, body: bytes | None = None
) -> Letter:
    return Letter(
        note=note_ or note(task="shop.charge", id="1", queue="work"),
        body=json.dumps([list(args), {}, embed or {}]).encode() if body is None else body,
        headers={"task": "shop.charge", "id": "1", "root_id": "1", "retries": 3, **(headers or {})},
        content_type="application/json",
        content_encoding="utf-8",
        properties={"correlation_id": "1"},
    )


# Notes


def test_note_is_read_as_it_was_written():
    ledger = (Attempt(NOW, 1.0, 2.0, "retry", "abc", "w1"),)
    written = note(task="t", id="1", error="KeyError", problems=[{"loc": ["a"]}], ledger=ledger, priority=0, chord="c")

    assert Note.of({HEADER: written.to_header()}) == written


@pytest.mark.parametrize("limit", [16 * 1024, 4096, 2048])
def test_note_fits_whatever_was_in_the_error(limit: int):
    ledger = (Attempt(NOW, 1.0, 2.0, "retry", "abc", "w1"),) * 100
    problems = [{"loc": ["ä" * 50], "msg": "€" * 200}] * 200
    big = note(message="ü" * 50_000, traceback="\ud800x\n" * 50_000, problems=problems, ledger=ledger)

    header = big.to_header(limit=limit)

    assert len(header.encode()) <= limit
    assert Note.of({HEADER: header}).letter == big.letter


def test_end_of_a_long_traceback_is_kept():
    assert Note.of({HEADER: note(traceback="x\n" * 20_000 + "ValueError: the end").to_header()}).traceback.endswith(
        "end"
    )


@given(
    st.text() | st.binary() | st.none() | st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.none()))
)
def test_reading_a_note_never_fails(value: Any):
    Note.of({HEADER: value})


@given(st.sampled_from(sorted(Note.__dataclass_fields__)), st.none() | st.integers() | st.text() | st.lists(st.text()))
def test_one_wrong_fact_spoils_only_itself(name: str, value: Any):
    facts = json.loads(note(task="t", error="E").to_header())

    read = Note.of({HEADER: json.dumps({**facts, name: value})})

    assert name in ("letter", "reason") or read is not None


def test_message_that_a_queue_dead_lettered_gets_a_note_of_why():
    died = datetime(2026, 3, 1, tzinfo=UTC)
    deaths = [{"reason": "expired", "queue": "work", "time": died}]

    read = Note.made_up({"task": "t", "id": "1", "x-death": deaths}, b"")

    assert (read.reason, read.queue, read.died_at, read.task) == ("expired", "work", died.timestamp(), "t")


@pytest.mark.parametrize("item", [b"", b"garbage", b"[]", b"{}", b'{"body": 1, "headers": 2, "properties": {}}'])
def test_anything_in_a_list_is_a_letter(item: bytes):
    read = letter_in_list(item)

    assert read.note.reason == "malformed"
    assert read.body == item


# Ids and fingerprints


def test_letter_is_named_alike_at_each_delivery():
    headers = {"task": "t", "id": "1", "celerykit": {"attempt": 2, "sent_at": NOW}}

    assert identify(headers, b"x") == identify({**headers, "x-delivery-count": 3, "redelivered": True}, b"x")


def test_letters_of_other_calls_attempts_and_replays_have_other_names():
    first = {"task": "t", "id": "1", "celerykit": {"attempt": 1, "sent_at": NOW}}
    others = [
        {**first, "task": "u"},
        {**first, "id": "2"},
        {**first, "replaced_task_nesting": 1},
        {**first, "celerykit": {"attempt": 2, "sent_at": NOW}},
        {**first, "celerykit": {"attempt": 1, "sent_at": NOW, "replay": 1}},
        {**first, "celerykit": {"attempt": 1, "sent_at": NOW + 1}},
    ]

    assert len({identify(headers, b"") for headers in [first, *others]}) == 1 + len(others)


def test_message_without_an_id_is_named_by_what_it_is():
    assert identify({}, b"x") == identify(None, "x") != identify({}, b"y")
    assert identify({"a": object}, b"x") == identify({"a": object}, b"x")


def test_fingerprint_is_that_of_the_cause():
    one = error_fingerprint("KeyError", TRACEBACK.format(deploy="v1", line=10, error="KeyError(17)"))

    assert one == error_fingerprint("builtins.KeyError", TRACEBACK.format(deploy="v2", line=99, error="KeyError(18)"))
    assert one != error_fingerprint("ValueError", TRACEBACK.format(deploy="v1", line=10, error="KeyError(17)"))
    assert one != error_fingerprint("KeyError", TRACEBACK.replace("in charge", "in refund"))


# Which


@pytest.mark.parametrize(
    "which",
    [
        {"task": "shop.*"},
        {"reason": "failed"},
        {"reason": ["expired", "failed"]},
        {"error": "Card*"},
        {"error": "insufficient"},
        {"since": NOW},
        {"until": NOW + 1},
        {"id": "42"},
        {"id": ["7", letter_id("1", 1, 0)]},
        {"id": letter_id("1", 1, 0)[:8]},
        {"fingerprint": "f00"},
        {"queue": "work", "task": "shop.charge"},
        {},
    ],
)
def test_letter_is_found_by(which: dict[str, Any]):
    facts = {"task": "shop.charge", "id": "42", "error": "CardDeclined", "message": "insufficient funds"}

    assert Filter(**which).matches(note(**facts, queue="work", fingerprint="f00"))


@pytest.mark.parametrize(
    "which",
    [
        {"task": "shop"},
        {"reason": "expired"},
        {"error": "Card"},
        {"since": NOW + 1},
        {"until": NOW},
        {"id": letter_id("1", 1, 0)[:7]},
        {"fingerprint": "f0"},
        {"queue": "work", "task": "other"},
    ],
)
def test_letter_is_not_found_by(which: dict[str, Any]):
    assert not Filter(**which).matches(note(task="shop.charge", id="42", error="CardDeclined", queue="work"))


# Again


def send_again(again: Letter, **how: Any) -> Any:
    return repaired(again, **{"now": NOW, "nonce": "n", **how})


def test_replay_leaves_out_what_would_kill_it_again():
    deadly = {
        "expires": "2020-01-01T00:00:00+00:00",
        "eta": "2020-01-01T00:00:00",
        "redelivered": True,
        "x-death": [{}],
        "x-delivery-count": 9,
        "x-first-death-queue": "q",
        "CC": ["elsewhere"],
        HEADER: "note",
    }

    headers = send_again(letter(headers=deadly)).headers

    assert (headers["expires"], headers["eta"], headers["retries"]) == (None, None, 0)
    assert not {"redelivered", "x-death", "x-delivery-count", "x-first-death-queue", "CC", HEADER} & {*headers}


def test_replay_keeps_what_belongs_to_the_call():
    own = {"stamps": {"a": 1}, "stamped_headers": ["a"], "group": "g", "root_id": "r", "x-request-id": "mine"}
    later = "2040-01-01T00:00:00+00:00"

    again = send_again(letter(headers={**own, "eta": later}, note_=note(queue="slow", priority=7)))

    assert {**own, "eta": later, "id": "1"}.items() <= again.headers.items()
    assert (again.queue, again.priority, again.properties) == ("slow", 7, {"correlation_id": "1"})
    assert again.body == letter().body


def test_replay_starts_attempts_anew_and_keeps_their_ledger():
    ledger = (Attempt(NOW, 0.0, 1.0, "retry", "abc", "w1"),)
    before = Headers(contract="c", attempt=5, sent_at=1.0, due_at=2.0, replay=1).added_to({})
    again = Headers.of(send_again(letter(headers=before, note_=note(replay=1, queue="work", ledger=ledger))).headers)

    assert (again.attempt, again.sent_at, again.due_at, again.replay) == (1, NOW, None, 2)
    assert (again.contract, again.queue, again.ledger) == ("c", "work", ledger)


def test_copies_of_one_replay_have_one_key_and_two_values():
    dead = letter()
    first, second = (replay_mark(send_again(dead, nonce=nonce).headers) for nonce in "ab")

    assert first.key == second.key
    assert first.value != second.value
    assert replay_mark(dead.headers) is None


def test_member_of_a_chord_leaves_it_and_nothing_else():
    embed = {"chord": {"task": "total"}, "callbacks": [{"task": "mail"}], "chain": [{"task": "next"}]}

    args, kwargs, again = json.loads(send_again(letter([1, "ä"], embed=embed)).body)

    assert (args, kwargs, again) == ([1, "ä"], {}, {**embed, "chord": None})


def test_new_id_is_everywhere():
    again = send_again(letter(), new_id="2")

    assert (again.headers["id"], again.headers["root_id"], again.properties["correlation_id"]) == ("2", "2", "2")


def test_message_of_the_first_protocol_is_repaired_in_its_body():
    body = {"task": "t", "id": "1", "args": [1], "kwargs": {}, "expires": "2020-01-01", "retries": 3, "chord": {"x": 1}}
    old = Letter(note=note(), body=json.dumps(body).encode(), headers={}, content_type="application/json")

    again = json.loads(send_again(old, new_id="2").body)

    assert again == {**body, "id": "2", "expires": None, "eta": None, "retries": 0, "chord": None}
    assert payload_of(old).args == [1]


@pytest.mark.parametrize("body", [b"", b"\xff", b"{}", b"[1, 2]", b"[1, {}, {}]", b"[" * 100_000, b"null"])
def test_what_is_not_a_payload_is_none(body: bytes):
    assert payload_of(letter(body=body)) is None


def test_new_arguments_keep_what_is_to_follow():
    old = letter([1], embed={"chain": ["next"]}, headers={"argsrepr": "(1,)", "kwargsrepr": "{}"})

    new = rewritten(old, [2], {"b": 3}, contract="c")

    assert json.loads(new.body) == [[2], {"b": 3}, {"chain": ["next"]}]
    assert not {"argsrepr", "kwargsrepr"} & {*new.headers}
    assert Headers.of(new.headers).contract == "c"


def test_arguments_are_told_only_when_asked_for():
    secret = letter(["4111"], headers={"argsrepr": "4111"})

    assert "4111" not in json.dumps(described(secret, arguments=False)) + repr(secret)
    assert described(secret, arguments=True)["body"][0] == ["4111"]
    assert "body_base64" in described(letter(body=b"\xff"), arguments=True)


# With an app


@pytest.fixture
def shop(make_app: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    # Kombu's memory is one for all apps of a process.
    monkeypatch.setenv("CELERYKIT_DEAD_LETTER_QUEUE", f"dead-{uuid4()}")
    app = make_app()
    app.queue = f"work-{uuid4()}"

    @app.task(name="shop.charge")
    def charge(amount: int, currency: str = "EUR") -> int:
        return amount

    return app


@pytest.fixture
def die(shop: Any) -> Any:
    numbers = count(1)

    def die_(args: Any = (1,), *, body: bytes | None = None, headers: Any = None, **facts: Any) -> str:
        number = str(next(numbers))
        known = {"letter": letter_id(number, 1, 0), "task": "shop.charge", "id": number, "queue": shop.queue}
        dead = letter(args, note_=note(**{**known, **facts}), body=body, headers={"id": number, **(headers or {})})
        bury(shop, dead)
        return number

    return die_


def sent(app: Any) -> list[Any]:
    with app.connection_for_read() as connection:
        return [message.payload[0] for message in iter(lambda: connection.default_channel.basic_get(app.queue), None)]


def ids(app: Any, **which: Any) -> list[str]:
    return [found.note.id for found in app.dead_letters.find(**which)]


def test_letters_stay_while_they_are_looked_at(shop: Any, die: Any):
    for _ in range(5):
        die()

    assert ids(shop) == ids(shop) == ["1", "2", "3", "4", "5"]
    assert ids(shop, limit=2, id=["2", "3", "4"]) == ["2", "3"]
    assert shop.dead_letters.count() == 5


def test_what_cannot_be_unpacked_hides_nothing(shop: Any, die: Any):
    die()
    die(headers={"compression": "application/x-nonsense"}, body=b"\x00")
    die(body=b"\xff\xfe")
    die()

    assert ids(shop) == ["1", "2", "3", "4"]
    assert shop.dead_letters.replay().refused == 2
    assert ids(shop) == ["2", "3"]


def test_tasks_and_times_choose_letters_too(shop: Any, die: Any):
    die(died_at=time.time() - 7200)
    die(died_at=time.time())

    assert ids(shop, task=shop.tasks["shop.charge"], since=timedelta(hours=1)) == ["2"]
    assert ids(shop, until=datetime.now(UTC) - timedelta(hours=1)) == ["1"]


def test_letter_is_got_by_any_name_that_is_its_own(shop: Any, die: Any):
    task_id = die()
    die()

    assert shop.dead_letters.get(task_id).id == letter_id(task_id, 1, 0)
    assert shop.dead_letters.get(letter_id(task_id, 1, 0)[:9]).note.id == task_id
    with pytest.raises(LetterNotFound, match="no dead letter nobody"):
        shop.dead_letters.get("nobody")


def test_two_letters_of_one_id_are_told_apart(shop: Any, die: Any):
    die(id="same")
    die(id="same")

    with pytest.raises(LetterNotFound, match="2 letters"):
        shop.dead_letters.get("same")


def test_causes_are_counted(shop: Any, die: Any):
    for fingerprint, died in [("a", 1), ("b", 2), ("a", 3)]:
        die(fingerprint=fingerprint, died_at=float(died), error="E")

    found = [(cause.fingerprint, cause.count, cause.first, cause.last) for cause in shop.dead_letters.top()]

    assert found == [("a", 2, 1.0, 3.0), ("b", 1, 2.0, 2.0)]


def test_a_replay_is_told(shop: Any, die: Any, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "celerykit.task")
    die([5])
    [letter] = shop.dead_letters.find()

    shop.dead_letters.replay(dry_run=True)
    shop.dead_letters.replay()

    [record] = caplog.records
    told = {"task": letter.note.task, "id": letter.note.id, "letter": letter.id, "queue": letter.note.queue}
    assert record.getMessage().startswith("task.replayed ")
    assert {name: record.data[name] for name in told} == told


def test_replay_sends_what_fits_today_and_keeps_the_rest(shop: Any, die: Any):
    die([5])
    die(["much"])
    die(task="gone", headers={"task": "gone"})

    report = shop.dead_letters.replay()

    assert sent(shop) == [[5]]
    assert (report.replayed, report.refused) == (1, 2)
    assert [refusal.problems[0]["loc"] for refusal in report.refusals if refusal.problems] == [["amount"]]
    assert "no task gone here" in report.refusals[1].why
    assert ids(shop) == ["2", "3"]


def test_unknown_tasks_are_replayed_when_told(shop: Any, die: Any):
    die([5], task="gone", headers={"task": "gone"})

    assert shop.dead_letters.replay(force=True).replayed == 1
    assert sent(shop) == [[5]]


def test_dry_run_sends_nothing(shop: Any, die: Any):
    die()
    die(["much"])

    report = shop.dead_letters.replay(dry_run=True)

    assert (report.replayed, report.refused) == (1, 1)
    assert sent(shop) == []
    assert ids(shop) == ["1", "2"]


def test_replay_is_as_slow_as_told(shop: Any, die: Any):
    for _ in range(4):
        die()
    seen: list[int] = []

    began = time.monotonic()
    shop.dead_letters.replay(rate="20/s", limit=3, on_progress=lambda report: seen.append(report.replayed))

    assert time.monotonic() - began >= 0.1
    assert seen == [1, 2, 3]


def test_replay_edits_on_its_way(shop: Any, die: Any):
    die(["5"])
    die(["x"])

    def to_cents(args: Any, kwargs: Any) -> Any:
        return [int(args[0]) * 100 if args[0].isdecimal() else "?"], {"currency": "cent"}

    report = shop.dead_letters.replay(edit=to_cents)

    assert (report.replayed, report.refused) == (1, 1)
    assert sent(shop) == [[500]]


def test_edited_letter_stays_until_it_is_replayed(shop: Any, die: Any):
    die(["x"])

    shop.dead_letters.edit("1", lambda args, kwargs: kwargs.update(currency="USD") or args.__setitem__(0, 7))

    assert sent(shop) == []
    assert payload_of(shop.dead_letters.get("1"))[:2] == ([7], {"currency": "USD"})
    assert shop.dead_letters.replay().replayed == 1


def test_edit_that_does_not_fit_changes_nothing(shop: Any, die: Any):
    die(["x"])

    with pytest.raises(InvalidPayload):
        shop.dead_letters.edit("1", lambda *_: (["y"], {}))

    assert payload_of(shop.dead_letters.get("1")).args == ["x"]


def test_what_cannot_be_decoded_can_be_written_anew(shop: Any, die: Any):
    die(body=b"\xff")

    shop.dead_letters.edit("1", lambda args, kwargs: ([*args, 3], kwargs))

    assert shop.dead_letters.replay().replayed == 1
    assert sent(shop) == [[3]]


def test_failure_is_forgotten_and_success_is_not(shop: Any, die: Any):
    for state in ("FAILURE", "SUCCESS"):
        shop.backend.store_result(die(), ValueError("x") if state == "FAILURE" else 1, state)

    shop.dead_letters.replay()

    assert [shop.AsyncResult(id_).state for id_ in "12"] == ["PENDING", "SUCCESS"]


def test_letter_whose_replay_has_started_is_not_sent_again(shop: Any, die: Any):
    """Whoever sent it died before it was taken away."""
    die()
    mark = replay_mark(send_again(shop.dead_letters.get("1")).headers)
    shop.store.mark(mark.key, mark.value, ttl=60)

    report = shop.dead_letters.replay()

    assert (report.replayed, report.skipped) == (0, 1)
    assert sent(shop) == ids(shop) == []


def test_new_ids_make_new_calls(shop: Any, die: Any):
    die()
    shop.backend.store_result("1", ValueError("x"), "FAILURE")

    shop.dead_letters.replay(new_ids=True)

    with shop.connection_for_read() as connection:
        message = connection.default_channel.basic_get(shop.queue)
    assert message.headers["id"] != "1"
    assert shop.AsyncResult("1").state == "FAILURE"


def test_letter_that_names_no_queue_is_refused(shop: Any, die: Any):
    die(queue=None)

    assert "which queue" in shop.dead_letters.replay().refusals[0].why


def test_purge_takes_what_is_meant(shop: Any, die: Any):
    die(reason="expired")
    die()

    assert shop.dead_letters.purge(reason="expired") == 1
    assert ids(shop) == ["2"]


def test_export_writes_lines(shop: Any, die: Any):
    die([5])
    die(body=b"\xff")

    first, second = map(json.loads, shop.dead_letters.export())

    assert first["body"][0] == [5]
    assert second["body_base64"] == "/w=="


def test_what_is_too_old_or_too_much_is_evicted_and_told(
    shop: Any, die: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    now = time.time()
    for age in (40 * 86400, 30, 20, 10):
        die(died_at=now - age)
    monkeypatch.setitem(shop.settings.kit.__dict__, "dead_letter_max", 2)

    assert shop.dead_letters.evict() == 2

    assert ids(shop) == ["3", "4"]
    assert [record.data["id"] for record in caplog.records if "evicted" in record.message] == ["1", "2"]
    assert shop.dead_letters.evict() == 0


def test_compressed_message_is_buried_as_it_reads(shop: Any):
    """Kombu unpacks a body when it receives it, and would try to unpack it again."""
    shop.send_task("shop.charge", (5,), queue=shop.queue, compression="gzip")
    with shop.connection_for_read() as connection:
        message = connection.default_channel.basic_get(shop.queue)
        bury(shop, letter_of(message, note(task="shop.charge", id="1", queue=shop.queue)))
        message.ack()

    assert shop.dead_letters.replay().replayed == 1
    assert sent(shop) == [[5]]


def test_every_reason_can_be_written():
    assert {Note.of({HEADER: note(reason=reason).to_header()}).reason for reason in REASONS} == {*REASONS}
