"""
The ledger: one line for each thing that really happened, written by whoever did it.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

__all__ = ["Entry", "Ledger"]


class Entry(NamedTuple):
    """
    One line.

    Attributes:
        event:
            ``start``, ``half``, ``effect`` and ``end`` of a run;
            ``task_failure``, ``errback`` for what was told about it.
    """

    at: float
    pid: int
    id: str
    retries: int
    event: str


class Ledger:
    """
    An append-only file that several processes write to.

    A line is one write, which the kernel appends whole; what is written is
    there whatever becomes of its writer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, *, task_id: str, retries: int = 0) -> None:
        line = f"{time.time():.3f} {os.getpid()} {task_id} {retries} {event}\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    @property
    def entries(self) -> list[Entry]:
        text = self.path.read_text() if self.path.exists() else ""
        # What is behind the last line's end is being written.
        rows = (line.split() for line in text.split("\n")[:-1])
        return [Entry(float(at), int(pid), task_id, int(retries), event) for at, pid, task_id, retries, event in rows]

    def of(self, event: str, task_id: str | None = None) -> list[Entry]:
        return [entry for entry in self.entries if entry.event == event and task_id in (None, entry.id)]

    def count(self, event: str, task_id: str | None = None) -> int:
        return len(self.of(event, task_id))

    def counts(self, event: str) -> Counter[str]:
        """Say how often *event* happened, for each task_id."""
        return Counter(entry.id for entry in self.of(event))
