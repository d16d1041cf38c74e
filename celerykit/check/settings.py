"""What the settings are, and where each comes from."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from celerykit.settings import FROM_KIT, OPINIONS, Kit, Settings, shown, variable

__all__ = ["Row", "as_json", "as_text", "rows"]

#: Wider values are cut in a terminal; JSON has them whole.
_WIDTH = 60


@dataclass(frozen=True, slots=True)
class Row:
    """
    One setting, fit to be shown to anybody.

    Attributes:
        value:
            Plain data, with secrets masked.

        reason:
            Why, where celerykit's default differs from Celery's.
    """

    name: str
    variable: str
    value: Any
    source: str
    reason: str = ""


def rows(settings: Settings, *, everything: bool = False) -> list[Row]:
    """Return the settings that differ from Celery's defaults, or *everything*; ours first."""
    reasons = {opinion.name: opinion.reason for opinion in OPINIONS}
    return [
        Row(
            name=name,
            variable=variable(name),
            value=shown(name, value),
            source=settings.sources[name],
            reason=reasons.get(name, "") if settings.sources[name] == FROM_KIT else "",
        )
        for name, value, default in (*_ours(settings), *_celerys(settings))
        if everything or value != default
    ]


def _ours(settings: Settings) -> Iterator[tuple[str, Any, Any]]:
    for name, field in Kit.model_fields.items():
        yield f"kit.{name}", getattr(settings.kit, name), field.default


def _celerys(settings: Settings) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*settings.defaults, *settings.celery}):
        default = settings.defaults.get(name)
        yield name, settings.celery.get(name, default), default


def as_text(table: Sequence[Row]) -> str:
    """Write *table* in columns, and below them why celerykit's defaults are what they are."""
    lines = [(row.name, _cut(_written(row.value)), row.source) for row in table]
    widths = [max((len(line[column]) for line in lines), default=0) for column in (0, 1)]
    listed = [f"{name:{widths[0]}}  {value:{widths[1]}}  {source}" for name, value, source in lines]
    reasons = [_paragraph(f"{row.name}: {row.reason}") for row in table if row.reason]
    if reasons:
        listed += [
            "",
            "Why celerykit's defaults differ from Celery's (CELERYKIT_PROFILE=stock undoes them all):",
        ]
    return "\n".join(listed + reasons)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _paragraph(text: str) -> str:
    return textwrap.fill(text, width=100, initial_indent="  ", subsequent_indent="    ")


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def as_json(table: Sequence[Row]) -> str:
    """Write *table* for a program."""
    return json.dumps([asdict(row) for row in table], indent=2, ensure_ascii=False)
