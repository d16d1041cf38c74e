"""
``celerykit explain``: what is known of a task, and of a message.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
from click.testing import CliRunner, Result
from pydantic import BaseModel

from celerykit import Concurrent, Key, Once, Rate
from celerykit.cli.explain import explain
from celerykit.dead_letters import Letter, Note
from celerykit.explain import Ambiguous, facts_of, life, life_of, life_text, near, queues, task_of, task_text
from celerykit.explain.queues import messages
from celerykit.headers import HEADER, Attempt, Headers
from celerykit.idempotency import Turn
from celerykit.idempotency.sending import Asked
from celerykit.retry import Backoff, Drop, Retry
from celerykit.stores import Hold
from celerykit.stores.memory import MemoryStore

SECRET = "hunter2"

ID = "7d3c3b4e-0000-4000-8000-000000000001"


class Order(BaseModel):
    id: int
    note: str = SECRET


class Marked(BaseModel):
    id: Annotated[int, Key()]


@pytest.fixture
def shop(app: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An app with two tasks, and no dead letters."""
    policy = Retry({ConnectionError: Backoff(base=1, cap=60), KeyError: Drop()}, attempts=3)

    @app.task(name="shop.charge", retry=policy, on_crash="bury", soft_time_limit=90)
    def charge(
        order: Order, *, currency: Literal["EUR", "USD"] = "EUR", tags: list[str] | None = None, more=SECRET
    ) -> Order:
        return order

    @app.task(name="shop.nap")
    def nap(length: timedelta) -> None: ...

    app.conf.task_routes = {"shop.charge": {"queue": "slow"}}
    app.backend.forget(ID)  # all apps of a process share the memory of results
    monkeypatch.setattr(type(app), "dead_letters", SimpleNamespace(find=lambda **_: iter(())), raising=False)
    return app


@pytest.fixture
def run(shop: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def invoke(*arguments: str, named: str | None = "shop", **how: Any) -> Result:
        module = ModuleType("shop")
        monkeypatch.setattr(module, "app", shop, raising=False)
        monkeypatch.setitem(sys.modules, "shop", module)
        return CliRunner().invoke(explain, [*arguments, *(("-A", named) if named else ())], **how)

    return invoke


# Tasks


def test_a_task_is_explained(shop: Any) -> None:
    charge = shop.tasks["shop.charge"]

    assert task_text(facts_of(charge)).splitlines() == [
        "shop.charge",
        f"  contract    {charge.contract.fingerprint}",
        "    order     Order",
        '    currency  "EUR" | "USD", optional',
        "    tags      array of string | null, optional",
        "    more      anything, optional",
        "    returns   Order",
        "  queue       slow",
        "  result      stored",
        "  on crash    bury: what a dying process leaves becomes a dead letter, and is never started twice",
        "  time limit  1 min 30 s (soft)",
        "  retry       at most 3 attempts",
        "              on ConnectionError: try again after 1 s, each wait 2 times the last, at most 1 min; "
        "chance shortens a wait by up to 50%",
        "                  attempt 2   0.5 s to 1 s later, 1 s in all",
        "                  attempt 3   1 s to 2 s later, 3 s in all",
        "              on KeyError: failed, without a dead letter",
        "              on any other error: dead letter at once",
    ]


def test_a_task_without_a_policy_says_so(shop: Any) -> None:
    text = task_text(facts_of(shop.tasks["shop.nap"]))

    assert "length    string (duration)" in text
    assert "result      only failures are stored" in text
    assert "on crash    rerun: " in text
    assert "retry       no policy; on any error: dead letter at once" in text


def test_what_a_task_keeps_in_the_store_is_explained(shop: Any) -> None:
    @shop.task(
        name="shop.pay", once=Once(running="skip", keep=90), limits=(Rate("100/m"), Concurrent(5, by="order.id"))
    )
    def pay(order: Marked) -> None: ...

    text = task_text(facts_of(pay))

    assert text[text.index("  once") :].splitlines() == [
        "  once        the key is order.id",
        "              while it is queued or runs: a second call does nothing",
        "              when it is done, for 1 min 30 s: a second call gets its result",
        "  limits      Rate('100/m')",
        "              Concurrent(5, by='order.id')",
        "  store       retry: without an answer a call is put off",
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"once": Once()}, "all arguments together are the key"),
        ({"once": Once(key=str)}, "a function makes the key"),
        ({"remember": True, "on_store_down": "fail"}, "a call's id is its key"),
    ],
)
def test_the_key_of_a_call_is_explained(shop: Any, options: Any, says: str) -> None:
    @shop.task(name="shop.pay", **options)
    def pay(order: int) -> None: ...

    assert says in task_text(facts_of(pay))
    assert json.loads(json.dumps(facts_of(pay)))["once"]["done"] == "reuse"


def test_celerys_own_tasks_have_no_contract(shop: Any) -> None:
    assert "contract    none: a task of Celery's own" in task_text(facts_of(shop.tasks["celery.chord"]))


def test_the_facts_are_json(shop: Any) -> None:
    facts = json.loads(json.dumps(facts_of(shop.tasks["shop.charge"])))

    assert facts["required"] == ["order"]
    assert facts["parameters"]["currency"]["enum"] == ["EUR", "USD"]
    assert facts["retry"]["on"]["KeyError"] == {"does": "Drop"}
    assert facts["retry"]["table"][0] == {
        "error": "ConnectionError",
        "attempt": 2,
        "delay_min": 0.5,
        "delay_max": 1.0,
        "cumulative": 1.0,
    }


def test_the_last_part_of_a_name_is_enough(shop: Any) -> None:
    assert task_of(shop, "charge") is task_of(shop, "shop.charge") is shop.tasks["shop.charge"]
    assert task_of(shop, "chrage") is None
    assert near(shop, "chrage") == near(shop, "shop.chrage") == "shop.charge"


def test_unless_it_is_the_last_part_of_several(shop: Any) -> None:
    @shop.task(name="billing.charge")
    def charge() -> None: ...

    shop.finalize()

    with pytest.raises(Ambiguous, match=r"billing\.charge, shop\.charge"):
        task_of(shop, "charge")


# Messages


class FakeClient:
    """What a client of Redis or Valkey answers."""

    def __init__(self, **lists: list[str]) -> None:
        self.lists = lists
        self.taken: dict[str, dict[str, str]] = {}

    def scan_iter(self, pattern: str, *, count: int) -> Any:
        assert pattern == "p:_kombu.binding.*"
        return iter([b"p:_kombu.binding.celery", b"p:_kombu.binding.x"])

    def smembers(self, key: bytes) -> set[bytes]:
        if key == b"p:_kombu.binding.x":
            return {b"\x06\x16\x06\x16celery@h.celery.pidbox", b"celeryev\x06\x16\x06\x16celeryev.1"}
        return {f"r\x06\x16\x06\x16{name}".encode() for name in self.lists if ":" not in name}

    def lrange(self, key: str, start: int, stop: int) -> list[str]:
        return self.lists.get(key.removeprefix("p:").replace("\x06\x16", ":"), [])[start : stop + 1]

    def hscan_iter(self, key: str, *, count: int) -> Any:
        return iter(self.taken.get(key, {}).items())


def channel(client: FakeClient) -> Any:
    return SimpleNamespace(
        pool=client,
        global_keyprefix="p:",
        keyprefix_queue="_kombu.binding.%s",
        sep="\x06\x16",
        priority_steps=[0, 3],
        unacked_key="unacked",
    )


def connection(client: FakeClient) -> Any:
    transport = SimpleNamespace(driver_type="redis", driver_name="redis")
    return SimpleNamespace(transport=transport, channel=lambda: channel(client))


def message(task_id: str, **headers: Any) -> str:
    return json.dumps({"body": SECRET, "headers": {"id": task_id, "task": "shop.charge", **headers}, "properties": {}})


@pytest.fixture(autouse=True)
def no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "_client", lambda channel: channel.pool)


@pytest.fixture
def broker(shop: Any, monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """A Redis that the app is connected to."""
    client = FakeClient(celery=[], dead_letters=[message(ID)])
    monkeypatch.setattr(type(shop), "connection_for_write", lambda self: nullcontext(connection(client)))
    return client


def seen(app: Any) -> dict[str, str]:
    return {sighting.place: sighting.says for sighting in life_of(app, ID).sightings if sighting.is_there}


def test_all_messages_are_looked_at_whatever_their_priority() -> None:
    client = FakeClient(
        celery=[message(str(n)) for n in range(120)] + ["no JSON", "[]"], **{"celery:3": [message("p")]}
    )

    ids = [headers.get("id") for _, _, headers in messages(channel(client), skip="dead_letters")]

    assert ids == [*map(str, range(120)), None, None, "p"]


def test_a_waiting_message_is_found_in_its_queue(shop: Any, broker: FakeClient) -> None:
    headers = Headers(sent_at=1.0, due_at=86400.0).added_to({})
    broker.lists["slow"] = [message("other"), message(ID, **headers)]

    assert seen(shop) == {"queue slow": "attempt 1 is waiting, due 1970-01-02 00:00:00 UTC"}


@pytest.mark.parametrize("key", ["p:unacked", "p:celerykit.unacked"])
def test_a_taken_message_is_found_with_its_worker(shop: Any, broker: FakeClient, key: str) -> None:
    """Ours and stock workers note what they have taken in places of their own."""
    eta = "1970-01-02T02:00:00+02:00"
    broker.taken[key] = {"1": "[]", "2": "no JSON", "3": json.dumps([json.loads(message(ID, eta=eta)), "", "slow"])}

    assert seen(shop) == {
        "queue slow": "attempt 1 was taken by a worker, which runs it or keeps it for its time, "
        "due 1970-01-02 00:00:00 UTC"
    }


def test_the_life_of_a_message_is_its_ledger_and_its_place(shop: Any, broker: FakeClient) -> None:
    ledger = (
        Attempt(10.0, 0.5, 2.0, "retry", "0123456789ab", "celery@a"),
        Attempt(20.0, 0.0, 0.25, "snooze", "", "celery@b"),
        Attempt(90.0, 60.0, 0.25, "retry", "0123456789ab", "celery@b"),
    )
    broker.lists["celery"] = [message(ID, **Headers(sent_at=9.5, attempt=3, ledger=ledger).added_to({}))]

    assert life_text(life_of(shop, ID)).splitlines() == [
        f"{ID}  shop.charge",
        "  sent          1970-01-01 00:00:09 UTC",
        "  attempt 1     1970-01-01 00:00:10 UTC: waited 0.5 s, ran 2 s, retry, error 0123456789ab, on celery@a",
        "  attempt 2     1970-01-01 00:00:20 UTC: waited 0 s, ran 0.25 s, snooze, on celery@b",
        "  attempt 2     1970-01-01 00:01:30 UTC: waited 1 min, ran 0.25 s, retry, error 0123456789ab, on celery@b",
        "  queue celery  attempt 3 is waiting",
        "  dead letters  not there",
        "  result        nothing is stored: "
        "it has not finished, its result is not kept, or there never was such a call",
    ]


def test_a_dead_letter_tells_why(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = (Attempt(10.0, 0.5, 2.0, "failed", "0123456789ab", "celery@a"),)
    note = Note(
        letter="L1",
        reason="failed",
        task="shop.charge",
        id=ID,
        error="OSError",
        message=f"no redis://:{SECRET}@h",
        died_at=86400.0,
        ledger=ledger,
    )
    letters = SimpleNamespace(find=lambda **_: iter([Letter(note=note, body=b"", headers={})]))
    monkeypatch.setattr(type(shop), "dead_letters", letters)
    found = life_of(shop, ID)

    assert found.ledger == ledger
    assert seen(shop) == {"dead letters": "failed, OSError: no redis://:***@h; died 1970-01-02 00:00:00 UTC; letter L1"}


def test_a_result_is_found_and_its_value_not_shown(shop: Any) -> None:
    shop.backend.mark_as_done(ID, {"id": 1, "note": SECRET})

    assert seen(shop)["result"].startswith("SUCCESS, 20")
    assert SECRET not in life_text(life_of(shop, ID))


def test_a_failure_names_its_error_without_secrets(shop: Any) -> None:
    shop.backend.mark_as_failure(ID, OSError(f"no redis://:{SECRET}@h"))

    assert seen(shop)["result"].startswith("FAILURE, OSError: no redis://:***@h")


@pytest.fixture
def pay(shop: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A task with keys, whose store others could see, too."""
    shop._store = MemoryStore()
    monkeypatch.setattr(shop._store, "is_shared", True)

    @shop.task(name="shop.pay", once=Once())
    def pay(order: int) -> None: ...

    return pay


def test_the_key_of_a_message_is_looked_at(shop: Any, broker: FakeClient, pay: Any) -> None:
    claims = pay.claims
    identity = claims.identify((1,), {}, id=None)
    broker.lists["celery"] = [message(ID, **Headers(key=identity.key).added_to({}))]
    assert key_seen(shop) == (False, f"{identity.key} is free")

    claims.send(Asked(claims, identity, ID))
    is_there, says = key_seen(shop)
    assert is_there
    assert says.startswith(f"{identity.key} is its own: claimed since 20")

    run = claims.start(identity, ID, Turn(), token="", joined=None, was_sent=True).run
    assert key_seen(shop)[1].endswith(" UTC, 30 s of its lease are left")
    pay.app.store.renew([Hold(run.key, run.claim.version, 0.0, 60)])
    assert key_seen(shop)[1].endswith(" UTC, its lease has lapsed")


def test_a_key_may_be_another_calls(shop: Any, broker: FakeClient, pay: Any) -> None:
    identity = pay.claims.identify((1,), {}, id=None)
    pay.claims.send(Asked(pay.claims, identity, "first"))
    broker.lists["celery"] = [message(ID, **Headers(key=identity.key).added_to({}))]

    is_there, says = key_seen(shop)
    assert not is_there
    assert says.startswith(f"{identity.key} is that of call first: claimed since 20")


def test_a_message_that_is_remembered_by_its_id_has_a_key(shop: Any, broker: FakeClient) -> None:
    @shop.task(name="shop.remembered", remember=True)
    def remembered(order: int) -> None: ...

    broker.lists["celery"] = [message(ID, task="shop.remembered")]

    is_there, says = key_seen(shop)
    assert is_there is None
    assert "in its own memory" in says


def key_seen(app: Any) -> tuple[bool | None, str]:
    *_, last = life_of(app, ID).sightings
    assert last.place == "key"
    return last.is_there, last.says


def test_a_broker_that_cannot_be_looked_into_says_so(shop: Any) -> None:
    first = life_of(shop, ID).sightings[0]

    assert first.is_there is None
    assert "memory shows no message without taking it out of its queue" in first.says


def test_a_place_that_fails_leaves_the_others(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: Any) -> Any:
        raise ConnectionError(f"no redis://:{SECRET}@h")

    monkeypatch.setattr(type(shop), "dead_letters", SimpleNamespace(find=fails))
    shop.backend.mark_as_done(ID, 1)
    found = life_of(shop, ID)

    assert [sighting.is_there for sighting in found.sightings] == [None, None, True]
    assert found.sightings[1].says == "cannot say: ConnectionError: no redis://:***@h"


def test_a_backend_that_hangs_is_not_waited_for(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "_PATIENCE", 0.05)
    monkeypatch.setattr(life, "_in_backend", lambda *_: time.sleep(0.5) or iter(()))

    assert life_of(shop, ID).sightings[-1].says == "cannot say: TimeoutError: no answer within 0.05 s"


def test_headers_of_others_may_hold_anything(shop: Any, broker: FakeClient) -> None:
    wild = {HEADER: {"sent_at": 1e300, "due_at": -1e300, "ledger": [[1e300, 0, 0, 1, 2, 3]]}, "eta": 7}
    broker.lists["celery"] = [message(ID, **wild)]

    assert "1e+300 s after 1970" in life_text(life_of(shop, ID))


# The command


def test_it_explains_a_task(run: Any) -> None:
    assert run("charge").stdout.startswith("shop.charge\n")
    assert json.loads(run("charge", "--json").stdout)["on_crash"] == "bury"


def test_it_explains_a_message(run: Any, shop: Any) -> None:
    shop.backend.mark_as_done(ID, 1)
    told, facts = run(ID), json.loads(run(ID, "--json").stdout)

    assert told.exit_code == 0
    assert told.stdout.startswith(f"{ID}\n")
    assert facts["seen"][-1]["place"] == "result"
    assert facts["seen"][-1]["is_there"] is True


def test_what_is_nowhere_ends_it_with_1(run: Any) -> None:
    lost, misspelt = run(ID), run("chrage")

    assert lost.exit_code == misspelt.exit_code == 1
    assert lost.stderr == ""
    assert "Did you mean shop.charge?" in misspelt.stderr


@pytest.mark.parametrize(("named", "says"), [(None, "Which app?"), ("nowhere", "No module named 'nowhere'")])
def test_without_an_app_it_ends_with_2(run: Any, named: str | None, says: str) -> None:
    result = run("charge", named=named, env={"CELERY_APP": ""})

    assert result.exit_code == 2
    assert says in result.stderr


def test_under_celerys_command_line_the_app_is_celerys(run: Any, shop: Any) -> None:
    assert run("charge", named=None, obj=SimpleNamespace(app=shop)).exit_code == 0


def test_its_help_imports_nothing_to_explain_with() -> None:
    code = "import sys, celerykit.cli.explain; sys.exit('celerykit.explain' in sys.modules or 'celery' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
