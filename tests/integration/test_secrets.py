"""
Secrets with a real worker: they arrive, and no byte that leaves a process has them.
"""

from __future__ import annotations

import base64
import gc
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import celery
import pytest
import redis
from celery import chain, chord
from cryptography.fernet import Fernet
from pydantic import SecretStr

from celerykit.dev.servers import Server
from celerykit.errors import ResultMismatch
from tests import services
from tests.integration import secrets_shop
from tests.integration.conftest import ROOT
from tests.integration.secrets_shop import Login
from tests.services import eventually

pytestmark = pytest.mark.timeout(90)

NEW, OLD, LOST = (Fernet.generate_key().decode() for _ in range(3))

SECRET = "correct horse battery staple"
LOGIN = Login(user="ann", password=SecretStr(SECRET))


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with services.valkey() as server:
        yield server
        gc.collect()  # results say goodbye to their server


@pytest.fixture(scope="module")
def node(valkey: Server) -> Iterator[services.Worker]:
    with worker(valkey, f"{NEW},{OLD}") as node:
        yield node


def worker(valkey: Server, keys: str) -> Any:
    env = {"CELERY_RESULT_BACKEND": valkey.backend_url, "CELERYKIT_SECRET_KEYS": keys}
    return services.worker("tests.integration.secrets_shop", url=valkey.url, env=env, concurrency=2, cwd=ROOT)


#: An app that is collected leaves its connections to the collector, too, which complains.
_callers: list[Any] = []


def caller(valkey: Server, keys: str | None = NEW) -> Any:
    """Give the shop as a program has it whose environment has these keys."""
    made = secrets_shop.make(broker_url=valkey.url, result_backend=valkey.backend_url, secret_keys=keys)
    _callers.append(made)
    return made


def everything(valkey: Server) -> str:
    """Give all that the server holds, with bodies as they are inside of base64."""
    with redis.Redis.from_url(valkey.client_url) as client:
        held = b"\n".join(bytes(part) for key in client.scan_iter() for part in (key, client.dump(key) or b""))
        values = [value for key in client.scan_iter() for value in values_of(client, key)]
    text = held.decode(errors="replace") + "\n".join(values)
    bodies = re.findall(r'"body": ?"([A-Za-z0-9+/]+=*)"', text)
    return "\n".join([text, *(base64.b64decode(body).decode(errors="replace") for body in bodies)])


def values_of(client: Any, key: bytes) -> list[str]:
    read = {
        b"string": lambda: [client.get(key)],
        b"list": lambda: client.lrange(key, 0, -1),
        b"hash": lambda: client.hgetall(key).values(),
        b"zset": lambda: client.zrange(key, 0, -1),
        b"set": lambda: client.smembers(key),
    }.get(client.type(key), list)
    return [value.decode(errors="replace") for value in read()]


def test_secrets_arrive_by_every_way_and_nobody_else_reads_them(valkey: Server, node: services.Worker) -> None:
    app = caller(valkey)
    sign_in, twice, remembered, lengths = (
        app.tasks[f"secrets.{name}"] for name in ("sign_in", "twice", "remembered", "lengths")
    )

    parked = sign_in.using(queue="parked").delay(LOGIN)
    assert f'"{parked.id}"' in everything(valkey)
    assert '"user": "ann", "password": "ck1:gAAAA' in everything(valkey)

    got = [
        sign_in.delay(LOGIN),
        twice.delay(LOGIN),
        remembered.delay(LOGIN),
        chain(sign_in.s(LOGIN), lengths.signature(([SecretStr(SECRET)],), immutable=True)).delay(),
        chord([sign_in.s(LOGIN), sign_in.s(Login(user="bob", password=SecretStr(SECRET)))])(lengths.s()),
    ]
    assert [result.get(timeout=20) for result in got] == [
        SecretStr(f"{SECRET} of ann"),
        LOGIN.password,
        LOGIN.password,
        [len(SECRET)],
        [len(SECRET) + 7] * 2,
    ]
    again = remembered.delay(Login(user="ann", password=SecretStr("another")))
    assert again.get(timeout=10) == LOGIN.password
    inner = app.tasks["secrets.all_of"].delay([LOGIN]).get(timeout=10)
    assert lengths.AsyncResult(inner).get(timeout=10) == [len(SECRET) + 7]
    assert "ck1:gAAAA" in str(sign_in.AsyncResult(got[0].id).result)

    assert SECRET not in everything(valkey)
    assert SECRET not in node.log
    with app.connection_for_write() as connection:
        connection.default_channel.queue_purge("parked")


def test_a_dead_letter_keeps_its_secrets_encrypted_through_edit_and_replay(
    valkey: Server, node: services.Worker
) -> None:
    app = caller(valkey)
    fails = app.tasks["secrets.fails"]
    sent = fails.delay(LOGIN, -1)
    with pytest.raises(ValueError, match="too little"):
        sent.get(timeout=10)
    eventually(lambda: len(list(app.dead_letters.find())) == 1)

    shown = subprocess.run(
        [sys.executable, "-m", "celerykit", "dead", "show", sent.id, "-A", "tests.integration.secrets_shop"],
        env=os.environ | {"CELERY_BROKER_URL": valkey.url, "CELERYKIT_SECRET_KEYS": NEW},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "secrets.fails" in shown.stdout, shown.stderr
    assert SECRET not in everything(valkey) + shown.stdout

    def repaired(args: Any, kwargs: Any) -> Any:
        return [args[0], 1], kwargs

    assert app.dead_letters.replay(edit=repaired).replayed == 1
    eventually(lambda: fails.AsyncResult(sent.id).state == "SUCCESS")
    assert fails.AsyncResult(sent.id).get(timeout=10) == LOGIN.password
    assert SECRET not in everything(valkey)


def test_keys_are_changed_one_process_after_the_other(valkey: Server, node: services.Worker) -> None:
    before, after = (caller(valkey, keys).tasks["secrets.sign_in"] for keys in (OLD, f"{OLD},{NEW}"))

    sent = before.delay(LOGIN)

    assert after.AsyncResult(sent.id).get(timeout=10) == SecretStr(f"{SECRET} of ann")
    with pytest.raises(ResultMismatch, match="encrypted with a key that is not among CELERYKIT_SECRET_KEYS"):
        sent.get(timeout=10)


def test_a_foreign_producer_s_plain_secret_is_taken(valkey: Server, node: services.Worker) -> None:
    with celery.Celery(broker=valkey.url, set_as_current=False) as stock:
        sent = stock.send_task("secrets.sign_in", kwargs={"login": {"user": "ann", "password": "plain"}})

    result = caller(valkey).tasks["secrets.sign_in"].AsyncResult(sent.id)
    assert result.get(timeout=10) == SecretStr("plain of ann")


def test_what_no_worker_can_read_is_buried_and_replayed_when_one_can(valkey: Server, node: services.Worker) -> None:
    app = caller(valkey, LOST)
    sent = app.tasks["secrets.sign_in"].delay(LOGIN)

    eventually(lambda: sent.state == "FAILURE")
    assert "encrypted with a key that is not among CELERYKIT_SECRET_KEYS" in str(sent.result)
    eventually(lambda: [letter.note.reason for letter in app.dead_letters.find()] == ["invalid_payload"])
    assert caller(valkey).dead_letters.replay().replayed == 0
    assert node.stop()

    with worker(valkey, f"{NEW},{OLD},{LOST}"):
        assert app.dead_letters.replay().replayed == 1
        read = caller(valkey).tasks["secrets.sign_in"].AsyncResult(sent.id)
        eventually(lambda: app.AsyncResult(sent.id).state == "SUCCESS", within=20)
        assert read.get(timeout=10) == SecretStr(f"{SECRET} of ann")
