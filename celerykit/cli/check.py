"""``celerykit check``."""

from __future__ import annotations

from typing import Any

import click

__all__ = ["check"]


@click.command()
@click.option("--settings", "show_settings", is_flag=True, help="Show each setting and where it comes from.")
@click.option("-A", "--app", metavar="APP", help="The app, as for `celery -A`. Without it: the environment alone.")
@click.option("--json", "in_json", is_flag=True, help="Write JSON.")
@click.option("--all", "everything", is_flag=True, help="Also what is as Celery has it.")
@click.pass_context
def check(ctx: click.Context, *, show_settings: bool, app: str | None, in_json: bool, everything: bool) -> None:
    """
    Check an app before it is deployed.

    Ends with 1 if something is wrong, and with 2 if there is nothing to check.
    Secrets are masked.
    """
    if not show_settings:
        raise click.UsageError("Say what to check: --settings.")
    # Under `celery -A shop kit check` it is Celery that has the app.
    _check_settings(ctx, app or getattr(ctx.obj, "app", None), in_json=in_json, everything=everything)


def _check_settings(ctx: click.Context, app: Any, *, in_json: bool, everything: bool) -> None:
    # Here: a command line that only prints its help should not import Celery.
    from celerykit.check import AppNotFound, as_json, as_text, rows, settings_of
    from celerykit.errors import InvalidSettings

    try:
        table = rows(settings_of(app), everything=everything)
    except AppNotFound as error:
        raise click.UsageError(str(error)) from None
    except InvalidSettings as error:
        _refuse(ctx, error.problems, in_json=in_json)
    else:
        click.echo(as_json(table) if in_json else as_text(table))


def _refuse(ctx: click.Context, problems: list[str], *, in_json: bool) -> None:
    if in_json:
        import json

        click.echo(json.dumps({"problems": problems}, indent=2, ensure_ascii=False))
    else:
        click.echo("\n".join(problems), err=True)
    ctx.exit(1)
