"""
`celery -A shop kit …`: the commands that need an app, as one of Celery's own.

Celery imports this module on every call.
"""

from __future__ import annotations

from typing import Any

import click

from celerykit.cli.commands import NEED_APP, LazyGroup

__all__ = ["kit"]


class _NeedsApp(LazyGroup):
    """A group that refuses Celery's default app, which has neither tasks nor a broker."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, if there is an app for it."""
        is_help = set(ctx.help_option_names) & set(ctx.args)
        if not is_help and ctx.parent is not None and ctx.parent.params.get("app") is None:
            ctx.fail("Which app? Name it before kit: celery -A shop kit …")
        return super().invoke(ctx)


@click.group(cls=_NeedsApp, lazy=NEED_APP)
def kit() -> None:
    """Celerykit's commands."""
