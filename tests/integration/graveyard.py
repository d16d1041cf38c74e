"""An app with dead letters, in this process or in one that is to be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from celerykit import CeleryKit
from celerykit.dead_letters import Letter, Note, letter_id, replay_mark
from celerykit.letters import bury

ROOT = Path(__file__).parents[2]

QUEUE = "work"


def make(url: str, backend: str | None = None, **conf: Any) -> Any:
    app = CeleryKit("graveyard", broker=url, backend=backend, set_as_current=False)
    app.conf.update(conf)

    @app.task(name="graveyard.dig", shared=False)
    def dig(number: int) -> None:
        pass

    return app


def letter(number: int, *, args: Any = None, headers: Mapping[str, Any] | None = None, **facts: Any) -> Letter:
    name = str(number)
    known = {"task": "graveyard.dig", "id": name, "queue": QUEUE, "error": "ValueError"}
    return Letter(
        note=Note(**{"letter": letter_id(name, 1, 0), "reason": "failed", "died_at": time.time(), **known, **facts}),
        body=json.dumps([[number] if args is None else args, {}, {}]).encode(),
        headers={"task": "graveyard.dig", "id": name, **(headers or {})},
        content_type="application/json",
        content_encoding="utf-8",
        properties={"correlation_id": name},
    )


def fill(app: Any, numbers: range, **how: Any) -> None:
    for number in numbers:
        bury(app, letter(number, **how))


def ids(app: Any, **which: Any) -> list[int]:
    return [int(found.note.id) for found in app.dead_letters.find(**which)]


def sent(app: Any, queue: str = QUEUE) -> Iterator[Any]:
    """Take what lies in a queue of work."""
    with app.connection_for_read() as connection:
        channel = connection.channel()
        while (message := channel.basic_get(queue)) is not None:
            channel.basic_ack(message.delivery_tag)
            yield channel.message_to_python(message)


def started(app: Any) -> list[int]:
    """Take what lies in the queue of work, and leave out what a worker would: copies of one replay."""
    marks: dict[str, str] = {}
    numbers = []
    for message in sent(app):
        mark = replay_mark(message.headers)
        if marks.setdefault(mark.key, mark.value) == mark.value:
            numbers.append(int(message.headers["id"]))
    return numbers


def elsewhere(code: str, *, url: str, **kwargs: Any) -> subprocess.Popen[str]:
    """Run *code* in another process, with ``app`` there."""
    before = f"from tests.integration import graveyard; app = graveyard.make({url!r})\n"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-c", before + code], cwd=ROOT, env=dict(os.environ), text=True, **pipes, **kwargs
    )


def outcome(process: subprocess.Popen[str], told: str | None = None, *, within: float = 60.0) -> str:
    """Wait for a process to end well, and return what it wrote."""
    try:
        out, error = process.communicate(told, timeout=within)
    finally:
        process.kill()
    assert process.returncode == 0, error
    return out
