"""
What the README shows, runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from celerykit.settings import OPINIONS
from tests import services
from tests.integration.conftest import ROOT

README = (ROOT / "README.md").read_text()
DESIGN = (ROOT / "docs/design.md").read_text()

#: Says what an interactive session would, with each error on one line.
SESSION = """
import sys
from uuid import uuid4
from shop import *

for line in sys.stdin.read().splitlines():
    try:
        code = compile(line, "README.md", "single")
        exec(code)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def run(program: str, *, cwd: Path, typed: str = "", env: dict[str, str] | None = None) -> str:
    out = subprocess.run(
        [sys.executable, "-c", program],
        input=typed,
        env=os.environ | (env or {}),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert out.returncode == 0, out.stderr
    return out.stdout


def test_the_first_screen_works_as_shown(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(blocks("python")[0])
    session = blocks("pycon")[0].splitlines()
    typed = [line.removeprefix(">>> ") for line in session if line.startswith(">>> ")]
    shown = [line for line in session if not line.startswith(">>> ")]
    env = environment | {"CELERY_TASK_DEFAULT_QUEUE": "readme"}

    with services.worker("shop", url=environment["CELERY_BROKER_URL"], env=env, cwd=tmp_path):
        said = run(SESSION, typed="\n".join(typed), cwd=tmp_path, env=env)

    assert re.sub(r"UUID\('[^']+'\)", "UUID('…')", said).splitlines() == shown


def test_the_step_shown_is_a_step(tmp_path: Path) -> None:
    program = (
        "from time import monotonic\nfrom typing import Any\nfrom celerykit import Call, CeleryKit, Next\n"
        + blocks("python", DESIGN)[0]
        + "app.conf.task_always_eager = True\n@app.task\ndef add(a: int, b: int) -> int:\n    return a + b\n"
        + "print(add.delay(1, 2).get())\n"
    )

    timed, result = run(program, cwd=tmp_path).splitlines()

    assert re.fullmatch(r"shop\.add [\d.e-]+", timed)
    assert result == "3"


def test_the_policies_shown_can_be_declared(tmp_path: Path) -> None:
    first, policies, keys, _ = blocks("python")
    program = (
        "from datetime import timedelta\nfrom celerykit import Backoff, Concurrent, Dead, Rate, Retry\n\n"
        + first
        + "class CardDeclined(Exception): ...\n"
        + policies
        + keys
        + "print(collect.retry_policy.attempts, pay_out.on_crash, refund.once_policy.keep, len(sync.limit_rules))"
    )

    assert run(program, cwd=tmp_path) == "5 bury 86400.0 2\n"


def test_the_context_shown_goes_along(tmp_path: Path) -> None:
    shown = blocks("python")[3].replace("...", "print(ShopContext.current())", 1)
    program = (
        "from typing import Annotated\nfrom pydantic import BaseModel\n"
        "from celerykit import CeleryKit, Context, Redact\n"
        + shown.replace("with Shop", "app.conf.task_always_eager = True\nwith Shop")
        + "print(ShopContext.current())"
    )

    inside, outside = run(program, cwd=tmp_path).splitlines()

    assert "correlation_id='req-8f2'" in inside
    assert "tenant='acme'" in inside
    assert "acme" not in outside


def test_every_default_that_differs_is_listed() -> None:
    table = README.partition("undoes them all:")[2].partition("## ")[0]

    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [opinion.name for opinion in OPINIONS]


def test_the_readme_is_short() -> None:
    assert 77 <= len(README.splitlines()) <= 210
