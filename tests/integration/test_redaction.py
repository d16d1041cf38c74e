"""
Secrets are planted wherever a call may hold one, and all that leaves a worker is searched for them.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import celery
import pytest
import redis
from click.testing import CliRunner

from celerykit.cli.commands import celerykit
from celerykit.dev.servers import Server
from tests import services
from tests.integration import redaction_shop
from tests.integration.conftest import ROOT
from tests.integration.redaction_shop import SENTRY_FILE, Card, Order, planted

SHOP = "tests.integration.redaction_shop"

#: A number is a secret, too.
PIN = 998877665544


def order(where: str) -> Order:
    cards = [Card(no=planted(f"{where} card"), holder="Ada")]
    return Order(order_id=f"order-{where}", cards=cards, notes=[planted(f"{where} note")], pin=PIN)


@dataclass
class Told:
    """What has left the worker, by the way it went."""

    app: Any
    node: services.Worker
    client: Any
    sentry: Path
    ids: dict[str, str] = field(default_factory=dict)
    events: list[Any] = field(default_factory=list)
    inspected: str = ""

    def cli(self, *words: str) -> str:
        ran = CliRunner().invoke(celerykit, [words[0], "-A", SHOP, *words[1:]], catch_exceptions=False)
        return ran.output


@pytest.fixture(scope="module")
def told(broker: Server, environment: dict[str, str], tmp_path_factory: Any) -> Iterator[Told]:
    app: Any = redaction_shop.app
    app.conf.update(broker_url=broker.url, result_backend=broker.backend_url)
    sentry = tmp_path_factory.mktemp("sentry") / "sent"
    environment = {**environment, "CELERY_TASK_DEFAULT_QUEUE": "redaction", SENTRY_FILE: str(sentry)}
    client = redis.Redis.from_url(broker.client_url)
    # Other tests' workers are at the same broker.
    options = ["--hostname=redaction@%h"]
    with services.worker(SHOP, url=broker.url, env=environment, cwd=ROOT, options=options) as node:
        told = Told(app=app, node=node, client=client, sentry=sentry)
        with _capturing(app, told.events):
            _run(told)
        yield told
    client.close()


@contextmanager
def _capturing(app: Any, events: list[Any]) -> Iterator[None]:
    ready, over = threading.Event(), threading.Event()

    def capture() -> None:
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": events.append})
            with receiver.consumer_context() as (own, _, _):
                ready.set()
                while not over.is_set():
                    with suppress(TimeoutError):
                        own.drain_events(timeout=0.2)

    thread = threading.Thread(target=capture, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield
    finally:
        over.set()
        thread.join(10)


def _run(told: Told) -> None:
    """Send all calls, and wait until they have come to their ends."""
    shop = redaction_shop
    headers = {"Authorization": f"Bearer {planted('header')}", "plain": "visible"}
    sent = {
        "succeed": shop.succeed.delay(order("model"), planted("parameter"), api_key=planted("named"), headers=headers),
        "fail": shop.fail.delay(order("failing"), planted("error"), api_key=planted("path")),
        "again": shop.again.delay(planted("retried"), planted("password")),
        "by_hand": shop.by_hand.delay(planted("reason")),
        "spread": shop.spread.delay(planted("spread")),
        "outer": shop.outer.delay(planted("nested")),
        "later": shop.succeed.using(countdown=300).delay(
            order("later"), planted("waiting"), api_key=planted("eta"), headers={}
        ),
    }
    sent |= dict(
        zip(("many", "more"), shop.by_hand.enqueue_many([(planted("many"),), (planted("more"),)]), strict=True)
    )
    sent["by_name"] = told.app.send_task(f"{SHOP}.by_hand", (planted("by name"),))
    with celery.Celery("stock", broker=told.app.conf.broker_url, set_as_current=False) as stock:
        foreign = {
            "order": order("foreign").model_dump(by_alias=True),
            "phrase": planted("foreign"),
            "api_key": planted("foreign key"),
        }
        to = {"queue": "redaction"}
        sent["foreign"] = stock.send_task(f"{SHOP}.succeed", kwargs={**foreign, "headers": headers}, **to)
        wrong = {**foreign["order"], "order_id": 1}
        sent["invalid"] = stock.send_task(f"{SHOP}.never", (wrong, planted("invalid")), **to)
        sent["unknown"] = stock.send_task("nowhere.known", kwargs={"password": "visible"}, **to)
    told.ids = {name: result.id for name, result in sent.items()}
    ends = ("succeed", "fail", "again", "by_hand", "spread", "outer", "many", "more", "by_name", "foreign", "invalid")
    services.eventually(lambda: not _running(told, ends), within=20, what=lambda: f"ends of {_running(told, ends)}")
    services.eventually(lambda: _letters(told) >= 4, within=10, what=lambda: f"{_letters(told)} letters")
    inspect = told.app.control.inspect(timeout=1, pattern="redaction@*", matcher="glob")
    told.inspected = json.dumps([inspect.scheduled(), inspect.query_task(told.ids["later"]), inspect.reserved()])
    told.app.control.revoke(told.ids["later"])


def _running(told: Told, names: Sequence[str]) -> list[str]:
    over = {event.get("uuid") for event in [*told.events] if event["type"] in ("task-succeeded", "task-failed")}
    return [name for name in names if told.ids[name] not in over]


def _letters(told: Told) -> int:
    return sum(1 for _ in told.app.dead_letters.find())


def assert_discreet(text: str | bytes) -> None:
    """Look for secrets: for their beginnings and ends, which any way of writing them leaves as they are."""
    written = text if isinstance(text, str) else text.decode(errors="replace")
    for sign in ("planted", "zzend", str(PIN)):
        place = written.find(sign)
        assert place < 0, written[max(0, place - 300) : place + 200]


def test_the_log(told: Told) -> None:
    log = told.node.log

    assert_discreet(log)
    # It was told all the same.
    for text in ("order-model", "order-failing", "order-foreign", "printed", "a line", "an f-string", "structured"):
        assert text in log
    assert "***" in log


def test_events_and_so_flower(told: Told) -> None:
    assert_discreet(json.dumps(told.events, default=repr))

    received = [event for event in told.events if event["type"] == "task-received"]
    shown = {event["uuid"]: event["kwargs"] + event["args"] for event in received}
    assert "order_id='order-model'" in shown[told.ids["succeed"]]
    assert "order_id='order-foreign'" in shown[told.ids["foreign"]]
    [succeeded] = [e for e in told.events if e["type"] == "task-succeeded" and e["uuid"] == told.ids["succeed"]]
    assert succeeded["result"] == "Receipt(order_id='order-model', code=***)"
    assert {event["type"] for event in told.events} >= {"task-sent", "task-failed", "task-retried"}


def test_what_a_run_makes_of_a_secret_and_tells_itself(told: Told) -> None:
    of_call = [event for event in told.events if event.get("uuid") == told.ids["spread"]]

    assert {event["type"]: event for event in of_call}["task-succeeded"]["result"] == "'charged ***'"
    assert [event["note"] for event in of_call if event["type"] == "task-progress"] == ["progress with ***"]
    [handed_on] = [e for e in told.events if e["type"] == "task-sent" and e["name"].endswith("quiet")]
    assert handed_on["args"] == "('handed on ***',)"
    assert told.app.AsyncResult(told.ids["spread"]).result == f"charged {planted('spread')}"


def test_what_is_asked_of_a_worker(told: Told) -> None:
    assert_discreet(told.inspected)
    assert "order-later" in told.inspected


def test_the_broker_and_the_results(told: Told) -> None:
    """
    Bodies of messages and what tasks have returned are the calls' own; nothing else holds a secret.
    """
    seen = 0
    for key in told.client.scan_iter(count=1000):
        assert_discreet(key)
        for value in _values(told.client, key):
            seen += 1
            assert_discreet(json.dumps(_without_own(value)) if value.startswith(b"{") else value)
    assert seen > 10


def _values(client: Any, key: bytes) -> list[bytes]:
    kind = client.type(key)
    if kind == b"list":
        return list(client.lrange(key, 0, -1))
    if kind == b"hash":
        return [part for pair in client.hgetall(key).items() for part in pair]
    if kind == b"set":
        return list(client.smembers(key))
    return list(client.zrange(key, 0, -1)) if kind == b"zset" else [client.get(key) or b""]


def _without_own(value: bytes) -> Any:
    stored = json.loads(value)
    if stored.get("status") == "SUCCESS":
        assert stored["result"] is None or stored.pop("result")
    if "body" in stored:
        assert base64.b64decode(stored.pop("body"))
    return stored


def test_stored_arguments_are_masked_and_results_are_whole(told: Told) -> None:
    stored = json.loads(told.client.get(f"celery-task-meta-{told.ids['succeed']}"))

    assert stored["args"][0]["order_id"] == "order-model"
    assert stored["args"][0]["cards"] == [{"number": "***", "holder": "Ada"}]
    assert stored["kwargs"]["headers"] == {"Authorization": "***", "plain": "visible"}
    assert stored["result"] == {"order_id": "order-model", "code": planted("result")}


def test_dead_letters_and_what_becomes_of_a_call(told: Told) -> None:
    letters = [json.loads(line) for line in told.cli("dead", "list", "--json").splitlines()]
    assert {letter["id"] for letter in letters} >= {told.ids[name] for name in ("fail", "again", "invalid")}
    assert_discreet(json.dumps(letters))
    assert_discreet(told.cli("dead", "list"))
    assert_discreet(told.cli("dead", "top") + told.cli("dead", "top", "--json"))
    for letter in letters:
        shown = told.cli("dead", "show", letter["letter"])
        assert_discreet(shown + told.cli("dead", "show", letter["letter"], "--json"))
        assert_discreet(told.cli("explain", letter["id"], "--json") + told.cli("explain", letter["id"]))
        assert letter["error"] in shown


def test_a_person_can_ask_for_all_of_a_letter(told: Told) -> None:
    [letter] = told.app.dead_letters.find(id=told.ids["fail"])

    revealed = json.loads(told.cli("dead", "show", letter.id, "--json", "--reveal"))

    assert revealed["body"][0][1] == planted("error")


def test_errors_keep_their_types(told: Told) -> None:
    notes = {letter.note.id: letter.note for letter in told.app.dead_letters.find()}

    assert notes[told.ids["fail"]].error == "ExceptionGroup"
    assert "ValidationError" in notes[told.ids["fail"]].traceback
    assert "Declined" in notes[told.ids["fail"]].traceback
    assert notes[told.ids["again"]].error == "KeyError"
    assert notes[told.ids["invalid"]].reason == "invalid_payload"


def test_sentry(told: Told) -> None:
    sent = told.sentry.read_bytes()

    assert_discreet(sent)
    assert b"celery-job" in sent
    assert b"ExceptionGroup" in sent
    assert b"order-failing" in sent
