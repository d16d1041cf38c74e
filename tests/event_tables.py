"""
The tables of docs/events.md.

    python -m tests.event_tables     write them
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from celerykit.events import EVENTS, FACTS

__all__ = ["PAGE", "filled_in"]

PAGE = Path(__file__).parents[1] / "docs" / "events.md"


def _events() -> str:
    rows = [f"| `{name}` | {_level(event.level)} | {event.meaning} |" for name, event in EVENTS.items()]
    return "\n".join(["| Event | Level | |", "| --- | --- | --- |", *rows])


def _facts() -> str:
    return "\n".join(["| Fact | |", "| --- | --- |", *(f"| `{name}` | {meaning} |" for name, meaning in FACTS.items())])


def _level(level: int) -> str:
    return logging.getLevelName(level).lower()


_TABLES = {"events": _events, "facts": _facts}


def filled_in(page: str) -> str:
    """Give the page with its tables as they are to be."""
    return re.sub(
        r"(<!-- (\w+) -->\n).*?(\n<!-- end of \2 -->)",
        lambda found: found[1] + _TABLES[found[2]]() + found[3],
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(filled_in(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
