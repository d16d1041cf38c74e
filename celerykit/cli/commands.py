"""
The commands: of `celerykit`, and of `celery … kit`.

Nothing heavy is imported until a command runs: Celery imports its plug-ins on
every call, and `--help` should be there at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import click

__all__ = ["NEED_APP", "Lazy", "LazyGroup", "celerykit"]


class Lazy(NamedTuple):
    """
    A command that is imported when it is used.

    Attributes:
        where:
            ``package.module:attribute``.

        what:
            Its line in the list of commands.
    """

    where: str
    what: str


class LazyGroup(click.Group):
    """A group that knows the names of its commands, and imports one when it is used."""

    def __init__(self, *args: Any, lazy: Mapping[str, Lazy], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return their names."""
        return sorted(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one."""
        if cmd_name not in self.lazy:
            return None
        module, _, attribute = self.lazy[cmd_name].where.partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List them by the lines kept here."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.lazy[name].what) for name in self.list_commands(ctx)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Guess what a misspelt one was meant to be."""
        near = difflib.get_close_matches(args[0], self.lazy, n=1)
        if near and args[0] not in self.lazy:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)


_CHECK = Lazy("celerykit.cli.check:check", "Find what loses, doubles or stops tasks; or show the settings.")

#: Those that need an app are in `plugin.kit` too.
NEED_APP = {
    "check": _CHECK,
    "dead": Lazy("celerykit.cli.dead:dead", "Find, repair and replay what no worker could finish."),
    "explain": Lazy("celerykit.cli.explain:explain", "Tell what a task does, or what became of a message."),
    "keys": Lazy("celerykit.cli.keys:keys", "Show which calls hold which keys, and let keys go."),
    "queues": Lazy("celerykit.cli.queues:queues", "Show how full the queues are, and how old what waits is."),
}

_COMMANDS = {
    **NEED_APP,
    "dev": Lazy("celerykit.cli.dev:dev", "Run a broker, a worker, beat and Flower, to work on a project."),
    "health": Lazy("celerykit.cli.health:health", "Tell whether workers or beat live, and what ails them: for probes."),
}


@click.group(cls=LazyGroup, lazy=_COMMANDS)
@click.version_option(package_name="celerykit")
def celerykit() -> None:
    """Typed tasks on real Celery."""
