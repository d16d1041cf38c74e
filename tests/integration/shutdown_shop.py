"""
A shop whose tasks take as long as they are told, and write down when they start and end.
"""

from __future__ import annotations

import time
from pathlib import Path

from celerykit import CeleryKit

app = CeleryKit("tests.integration.shutdown_shop")


@app.task
def work(ledger: Path, name: str, seconds: float) -> str:
    _write(ledger, f"start {name}")
    until = time.monotonic() + seconds
    # In short sleeps: a signal's handler runs between them.
    while time.monotonic() < until:
        time.sleep(0.02)
    _write(ledger, f"end {name}")
    return name


@app.task(acks_late=False)
def early(ledger: Path, name: str, seconds: float) -> str:
    return str(work.run(ledger, name, seconds))


def _write(ledger: Path, line: str) -> None:
    with ledger.open("a") as lines:
        lines.write(line + "\n")
