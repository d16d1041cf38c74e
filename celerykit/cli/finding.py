"""The app a command is about."""

from __future__ import annotations

from typing import Any

import click

__all__ = ["found_app"]


def found_app(ctx: click.Context, named: str | None) -> Any:
    """
    Return the app that ``-A`` names, or the one of ``celery -A … kit``.

    Raises:
        click.UsageError: There is none, or something is wrong with its settings.
    """
    # Here: a command line that only prints its help should not import Celery.
    from celerykit.check.apps import AppNotFound, find
    from celerykit.errors import InvalidSettings

    app = named or getattr(ctx.obj, "app", None)
    if app is None:
        raise click.UsageError("Which app? Name it with -A, as for `celery -A`.")
    try:
        return find(app)
    except (AppNotFound, InvalidSettings) as error:
        raise click.UsageError(str(error)) from None
