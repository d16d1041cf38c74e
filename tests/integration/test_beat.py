"""
Celery's own beat works on a celerykit app as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from celerykit.dev.processes import Process
from tests.integration.conftest import ROOT
from tests.services import eventually

APP = """
from pathlib import Path
from celerykit import CeleryKit

app = CeleryKit("timed")

@app.task
def note(path: Path, times: int) -> None:
    with path.open("a") as notes:
        notes.write("x" * times)

app.conf.beat_schedule = {
    "right": {"task": "timed.note", "schedule": 0.2, "args": (NOTES, 2)},
    "wrong": {"task": "timed.note", "schedule": 0.2, "args": (NOTES, "many")},
}
"""


@contextmanager
def celery(*words: str, env: dict[str, str], cwd: Path, log: Path) -> Iterator[Process]:
    with log.open("wb") as output:
        process = Process([sys.executable, "-m", "celery", *words], env=os.environ | env, cwd=cwd, output=output)
    try:
        yield process
    finally:
        process.stop(grace=10)


def test_beat_sends_typed_calls_and_refuses_wrong_ones(environment: dict[str, str], tmp_path: Path) -> None:
    notes, log = tmp_path / "notes", tmp_path / "log"
    (tmp_path / "timed.py").write_text(APP.replace("NOTES", repr(str(notes))))
    env = environment | {"CELERY_TASK_DEFAULT_QUEUE": "timed"}

    with celery("-A", "timed", "worker", "--beat", "-l", "INFO", "-P", "threads", env=env, cwd=tmp_path, log=log):
        eventually(lambda: notes.exists() and notes.read_text().startswith("xxxx"), within=20, what=log.read_text)
        eventually(lambda: "InvalidPayload" in log.read_text(), within=10, what=log.read_text)

    assert "argument 'times': Input should be a valid integer" in log.read_text()


def test_an_app_that_is_not_there_is_a_clear_error() -> None:
    command = [sys.executable, "-m", "celerykit", "check", "--settings", "-A", "nowhere"]

    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)

    assert out.returncode == 2
    assert "nowhere" in out.stderr


def test_a_django_project_s_settings_are_a_source(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "conf.py").write_text(
        "SECRET_KEY = 'x'\n"
        "INSTALLED_APPS = []\n"
        "CELERY_TASK_DEFAULT_QUEUE = 'django'\n"
        "CELERY_TASK_TRACK_STARTED = 'false'\n"
    )
    (tmp_path / "proj.py").write_text(
        "from celerykit import CeleryKit\n"
        "app = CeleryKit('proj')\n"
        "app.config_from_object('django.conf:settings', namespace='CELERY')\n"
        "app.autodiscover_tasks()\n"
    )
    ask = (
        "from proj import app; conf = app.conf;"
        "print(hasattr(app.Task, 'delay_on_commit'), hasattr(app.Task, 'using'));"
        "print(conf.task_default_queue, conf.task_track_started, conf.task_acks_late,"
        "app.settings.sources['task_default_queue'])"
    )

    out = subprocess.run(
        [sys.executable, "-c", ask],
        env=os.environ | environment | {"DJANGO_SETTINGS_MODULE": "conf", "CELERY_TASK_ACKS_LATE": "false"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert out.stdout.splitlines() == ["True True", "django False False Django settings"], out.stderr
