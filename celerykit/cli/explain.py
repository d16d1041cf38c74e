"""``celerykit explain``."""

from __future__ import annotations

from typing import Any

import click

from celerykit.cli.finding import found_app

__all__ = ["explain"]


@click.command()
@click.argument("what", metavar="TASK|ID")
@click.option("-A", "--app", "named", metavar="APP", envvar="CELERY_APP", help="The app, as for `celery -A`.")
@click.option("--json", "in_json", is_flag=True, help="Write JSON.")
@click.pass_context
def explain(ctx: click.Context, *, what: str, named: str | None, in_json: bool) -> None:
    """
    Tell what a task does, or what became of a message.

    TASK is a task's name, or the last part of it: shows its contract, what
    follows on which error, and when. ID is the id of a call: shows where it is
    now, and what came of its attempts so far. Takes nothing out of a queue.

    Ends with 1 if a message is found nowhere.
    """
    app = found_app(ctx, named)
    from celerykit.explain import Ambiguous, as_json, facts_of, task_of, task_text

    try:
        task = task_of(app, what)
    except Ambiguous as error:
        raise click.UsageError(str(error)) from None
    if task is None:
        _explain_message(ctx, app, what, in_json=in_json)
    else:
        facts = facts_of(task)
        click.echo(as_json(facts) if in_json else task_text(facts))


def _explain_message(ctx: click.Context, app: Any, task_id: str, *, in_json: bool) -> None:
    from celerykit.explain import as_json, life_of, life_text, near

    life = life_of(app, task_id)
    click.echo(as_json(life.facts()) if in_json else life_text(life))
    if not life.is_found:
        if guess := near(app, task_id):
            click.echo(f"There is no task {task_id!r} either. Did you mean {guess}?", err=True)
        ctx.exit(1)
