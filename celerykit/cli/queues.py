"""
``celerykit queues``: how full the queues are.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from celerykit.cli.finding import found_app
from celerykit.errors import CelerykitError

if TYPE_CHECKING:
    from celerykit.queues import Depths

__all__ = ["queues"]

_LINE = "{:32} {:>9} {:>9} {:>9} {:>9} {:>10} {:>9}"


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("-A", "--app", "named", metavar="APP", envvar="CELERY_APP", help="The app, as for `celery -A`.")
@click.option("--timeout", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="Seconds to ask for.")
@click.option("--json", "in_json", is_flag=True, help="Write JSON.")
@click.pass_context
def queues(ctx: click.Context, *, names: tuple[str, ...], named: str | None, timeout: float, in_json: bool) -> None:
    """
    Show how full the queues are, and how old what waits is.

    Without NAME all queues that the app defines, and that its routes and tasks
    name. Messages are ready, held by workers (unacked), or held by them until
    they are due (scheduled). What the broker does not tell is shown as "-",
    and null in JSON. Nothing is taken out of a queue, and none is declared.
    """
    app = found_app(ctx, named)
    app.loader.import_default_modules()
    from celerykit.queues import look

    try:
        depths = look(app, names, timeout=timeout)
    except CelerykitError as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps(depths.facts(), indent=2, ensure_ascii=False) if in_json else _shown(depths))


def _shown(depths: Depths) -> str:
    lines = [_LINE.format("QUEUE", "READY", "UNACKED", "SCHEDULED", "TOTAL", "OLDEST", "CONSUMERS")]
    for name, depth in depths.queues.items():
        numbers = (depth.ready, depth.unacked, depth.scheduled, depth.total, _age(depth.oldest_seconds))
        missing = "  (there is none yet)" if depth.missing else ""
        lines.append(_LINE.format(name, *map(_told, (*numbers, depth.consumers))) + missing)
    if depths.delayed is not None:
        lines.append(f"\n{depths.delayed} on their way to a queue, by delayed delivery.")
    lines.append(f"\nDead letters: {_told(depths.dead_letters)} in {depths.dead_letter_queue}.")
    return "\n".join(lines)


def _told(number: Any) -> str:
    return "-" if number is None else str(number)


def _age(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.0f} s"
