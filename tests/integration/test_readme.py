"""
What the README shows, runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests import services
from tests.integration.conftest import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_first_screen_works_as_shown(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(blocks("python")[0])
    lines = [line[4:] for line in blocks("pycon")[0].splitlines() if line.startswith(">>> ")]
    shown = [line for line in blocks("pycon")[0].splitlines() if not line.startswith(">>> ")]
    # Each line's value or error, as an interactive interpreter would show it.
    drive = "from uuid import uuid4\nfrom shop import *\n" + "".join(
        f"try:\n    print(repr(eval({line!r})))\nexcept Exception as error:\n    print(type(error).__name__ + ':', error)\n"
        if " = " not in line
        else f"{line}\n"
        for line in lines
    )
    env = environment | {"CELERY_TASK_DEFAULT_QUEUE": "readme"}

    with services.worker("shop", url=environment["CELERY_BROKER_URL"], env=env, cwd=tmp_path):
        out = subprocess.run(
            [sys.executable, "-c", drive],
            env=os.environ | env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=40,
        )

    said = re.sub(r"UUID\('[^']+'\)", "UUID('…')", out.stdout).splitlines()
    assert said == shown, out.stderr


def test_the_step_shown_is_a_step(tmp_path: Path) -> None:
    program = (
        "from time import monotonic\nfrom typing import Any\nfrom celerykit import Call, CeleryKit, Next\n"
        + blocks("python")[1]
        + "app.conf.task_always_eager = True\n@app.task\ndef add(a: int, b: int) -> int:\n    return a + b\n"
        + "print(add.delay(1, 2).get())\n"
    )

    out = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=40)

    assert out.stdout.splitlines()[-1] == "3", out.stderr
    assert out.stdout.startswith("__main__.add 0.0") or "add " in out.stdout


def test_every_default_that_differs_is_listed() -> None:
    from celerykit.settings import OPINIONS

    table = README.partition("undoes them all:")[2].partition("## ")[0]

    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [opinion.name for opinion in OPINIONS]


def test_the_readme_is_short() -> None:
    assert 77 <= len(README.splitlines()) <= 150
