"""
Flower is stock, and shows what it should: types, retries, deaths, and no secret.
"""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import celery
import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr

from celerykit.dev.processes import Process
from celerykit.dev.servers import Server, free_port
from tests import services
from tests.integration.conftest import ROOT
from tests.services import eventually

pytestmark = pytest.mark.timeout(90)

SHOP = "tests.integration.flower_shop"

CARD, PIN = "kartoffel-4111-salat", "pin-8392-geheim"
ORDER_ID = UUID("7c1f0a52-0d4c-4f0e-9a55-0f7f5c1f2a11")
ORDER = {"order_id": str(ORDER_ID), "amount": "9.50", "card": CARD}

#: Those that run again in an hour.
WAITING = ("wait", "again")


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with services.valkey() as server:
        yield server


@pytest.fixture(scope="module")
def env(valkey: Server) -> dict[str, str]:
    return {
        "CELERY_BROKER_URL": valkey.url,
        "CELERY_RESULT_BACKEND": valkey.backend_url,
        "CELERYKIT_SECRET_KEYS": Fernet.generate_key().decode(),
        "FLOWER_UNAUTHENTICATED_API": "true",
    }


@pytest.fixture(scope="module")
def node(valkey: Server, env: Mapping[str, str]) -> Iterator[services.Worker]:
    with services.worker(SHOP, url=valkey.url, env=env, concurrency=2, cwd=ROOT, options=["-E"]) as node:
        yield node


class Flower:
    """A stock Flower, and a browser to look at it."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self._folder = folder

    def ask(self, path: str) -> str:
        """Give what Flower answers to a program."""
        try:
            with urllib.request.urlopen(f"{self.url}/{path}", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    def look(self, path: str, name: str) -> str:
        """Give a page as a person sees it, once it has got all it asks for; and make a picture of it."""
        command = [
            services.chromium(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
        ]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command += [f"--user-data-dir={self._folder / 'profile'}", "--window-size=1400,900"]
        command += [f"--screenshot={self._folder / name}.png", "--virtual-time-budget=4000", "--dump-dom"]
        seen = subprocess.run([*command, f"{self.url}/{path}"], capture_output=True, text=True, timeout=40, check=True)
        return html.unescape(re.sub(r"<script.*?</script>|<[^>]+>", " ", seen.stdout, flags=re.DOTALL))


@pytest.fixture(scope="module")
def flower(node: services.Worker, env: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    folder, port = tmp_path_factory.mktemp("flower"), free_port()
    command = [sys.executable, "-m", "celery", "-A", SHOP, "flower", f"--port={port}", "--address=127.0.0.1"]
    command += ["--tasks-columns=name,uuid,state,args,result,retries"]
    with (folder / "log").open("wb") as output:
        process = Process(command, env={**os.environ, **env}, cwd=ROOT, output=output)
    flower = Flower(f"http://127.0.0.1:{port}", folder)
    try:
        eventually(lambda: len(flower.ask("api/workers?refresh=true")) > 5, within=30, what=(folder / "log").read_text)
        yield flower
    finally:
        process.stop(grace=10)


@pytest.fixture(scope="module")
def sent(valkey: Server, env: Mapping[str, str], flower: Flower) -> dict[str, str]:
    """Send one call of each kind, wait until Flower has heard how they went, and give their ids."""
    from tests.integration import flower_shop as shop

    shop.app.conf.update(
        broker_url=valkey.url, result_backend=valkey.backend_url, secret_keys=env["CELERYKIT_SECRET_KEYS"]
    )
    order = shop.Order(**ORDER)
    with celery.Celery(broker=valkey.url, set_as_current=False) as stock:
        invalid = stock.send_task("shop.charge", kwargs={"order": {**ORDER, "amount": "many"}, "pin": PIN})
    sent = {
        "charge": shop.charge.delay(order, SecretStr(PIN)).id,
        "refuse": shop.refuse.delay(order, pin=SecretStr(PIN)).id,
        "crash": shop.crash.delay(order).id,
        "overrun": shop.overrun.delay(order).id,
        "wait": shop.wait.delay(order).id,
        "again": shop.again.delay(order, SecretStr(PIN)).id,
        "in_the_end": shop.in_the_end.delay(order).id,
        "invalid": invalid.id,
    }
    tasks: dict[str, dict[str, Any]] = {}

    def are_told() -> bool:
        tasks.update({name: known(flower, call_id) for name, call_id in sent.items()})
        return all(
            (task.get("eta") and task.get("retried"))
            if name in WAITING
            else task.get("state") in ("SUCCESS", "FAILURE")
            for name, task in tasks.items()
        )

    eventually(
        are_told,
        within=20,
        what=lambda: str({name: (task.get("state"), task.get("eta")) for name, task in tasks.items()}),
    )
    return sent


def known(flower: Flower, call_id: str) -> dict[str, Any]:
    return json.loads(flower.ask(f"api/task/info/{call_id}") or "{}")


def test_the_states_are_those_of_the_calls(flower: Flower, sent: Mapping[str, str]) -> None:
    tasks = {name: known(flower, call_id) for name, call_id in sent.items()}

    assert {name: task["state"] for name, task in tasks.items() if name not in WAITING} == {
        "charge": "SUCCESS",
        "refuse": "FAILURE",
        "crash": "FAILURE",
        "overrun": "FAILURE",
        "in_the_end": "SUCCESS",
        "invalid": "FAILURE",
    }
    # A retry that its worker holds until it is due was received, too, and either event may be the last.
    assert all(tasks[name]["state"] in ("RETRY", "RECEIVED") for name in WAITING)
    assert tasks["in_the_end"]["retries"] == 1
    assert tasks["refuse"]["exception"] == "ValueError('card *** with *** is refused')"
    assert tasks["again"]["exception"] == "OSError('no connection for *** with ***')"
    assert all(tasks[name]["retried"] and tasks[name]["retries"] == 1 for name in WAITING)
    assert tasks["crash"]["exception"].startswith("WorkerLostError('Worker exited prematurely: signal 9 (SIGKILL)")
    assert tasks["overrun"]["exception"] == "TimeLimitExceeded(0.5)"
    assert "InvalidPayload" in tasks["invalid"]["exception"]
    assert "'order.amount': Input should be a valid decimal" in tasks["invalid"]["exception"]


def test_people_see_typed_values_and_what_became_of_them(flower: Flower, sent: Mapping[str, str]) -> None:
    tasks = flower.look("tasks", "tasks")
    dead = flower.look(f"task/{sent['refuse']}", "dead")
    workers = flower.look("workers", "workers")

    assert all(call_id in tasks for call_id in sent.values())
    assert f"(Order(order_id='{ORDER_ID}', amount='9.50', card=***), ***)" in tasks
    assert f"Receipt(order_id='{ORDER_ID}', token=***)" in tasks
    assert "FAILURE" in dead
    assert "ValueError: card *** with *** is refused" in dead
    assert re.search(r"celery@\S+\s+Online", workers)


def test_no_page_and_no_number_has_a_secret(flower: Flower, sent: Mapping[str, str]) -> None:
    [worker] = json.loads(flower.ask("api/workers"))
    paths = ["", "workers", f"worker/{worker}", "tasks", "broker", "metrics", "api/tasks", "api/workers?refresh=true"]
    paths += [f"{kind}/{call_id}" for call_id in sent.values() for kind in ("task", "api/task/info")]
    query = "draw=1&start=0&length=100&search[value]=&order[0][column]=0&columns[0][data]=name&order[0][dir]=asc"

    pages = {path: flower.ask(path) for path in (*paths, f"tasks/datatable?{query}")}

    assert [path for path, page in pages.items() if not page] == []
    assert [path for path, page in pages.items() if CARD in page or PIN in page or "ck1:" in page] == []
