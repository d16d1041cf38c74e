"""``celerykit check``."""

from __future__ import annotations

from typing import Any

import click

__all__ = ["check"]


@click.command()
@click.option("-A", "--app", metavar="APP", help="The app, as for `celery -A`.")
@click.option("--live", is_flag=True, help="Ask the broker, the result backend and the store too.")
@click.option("--strict", is_flag=True, help="End with 1 for warnings too.")
@click.option("--ignore", metavar="CODE", multiple=True, help="Leave out what has this code; may be given again.")
@click.option("--settings", "show_settings", is_flag=True, help="Show each setting and where it comes from instead.")
@click.option("--all", "everything", is_flag=True, help="With --settings: also what is as Celery has it.")
@click.option("--json", "in_json", is_flag=True, help="Write JSON.")
@click.pass_context
def check(
    ctx: click.Context,
    *,
    app: str | None,
    live: bool,
    strict: bool,
    ignore: tuple[str, ...],
    show_settings: bool,
    everything: bool,
    in_json: bool,
) -> None:
    """
    Check an app before it is deployed: what loses, doubles or stops tasks, and the fix.

    Ends with 0 if there is no error, with 1 if there is one (with --strict: or
    a warning), and with 2 if there is nothing to check. Without -A, --settings
    shows what the environment alone sets. Secrets are masked.
    """
    # Under `celery -A shop kit check` it is Celery that has the app.
    app = app or getattr(ctx.obj, "app", None)
    if show_settings:
        _check_settings(ctx, app, in_json=in_json, everything=everything)
    elif app is None:
        raise click.UsageError("Name the app: celerykit check -A shop. Or --settings, for the environment alone.")
    else:
        _check_app(ctx, app, live=live, strict=strict, ignore=ignore, in_json=in_json)


def _check_app(
    ctx: click.Context, app: Any, *, live: bool, strict: bool, ignore: tuple[str, ...], in_json: bool
) -> None:
    # Here: a command line that only prints its help should not import Celery.
    from celerykit.check import AppNotFound, check_app
    from celerykit.errors import InvalidSettings

    try:
        report = check_app(app, live=live).without(ignore)
    except AppNotFound as error:
        raise click.UsageError(str(error)) from None
    except InvalidSettings as error:
        _refuse(ctx, error.problems, in_json=in_json)
    else:
        click.echo(report.as_json() if in_json else report.as_text())
        ctx.exit(int(report.is_bad(strict=strict)))


def _check_settings(ctx: click.Context, app: Any, *, in_json: bool, everything: bool) -> None:
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
