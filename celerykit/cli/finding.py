"""The app a command is about."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

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

    own = getattr(ctx.obj, "app", None)
    # CELERY_APP may name another app than the one that `celery -A` was told.
    is_from_environment = ctx.get_parameter_source("named") is ParameterSource.ENVIRONMENT
    app = own if own is not None and is_from_environment else named or own
    if app is None:
        raise click.UsageError("Which app? Name it with -A, as for `celery -A`.")
    try:
        return find(app)
    except (AppNotFound, InvalidSettings) as error:
        raise click.UsageError(str(error)) from None
