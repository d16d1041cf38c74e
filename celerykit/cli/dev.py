"""`celerykit dev`: everything a project needs while somebody works on it."""

from __future__ import annotations

import click

from celerykit.dev.plan import Plan
from celerykit.dev.session import run
from celerykit.errors import CelerykitError

__all__ = ["dev"]


class _Refused(click.ClickException):
    """What a user can put right: as with a wrong option, the exit code is 2."""

    exit_code = 2


@click.command()
@click.option("-A", "--app", envvar="CELERY_APP", help="The app, as for celery -A.  [env: CELERY_APP]")
@click.option("--pool", type=click.Choice(["prefork", "threads", "solo"]), help="The worker's pool; else the app's.")
@click.option("--concurrency", type=click.IntRange(min=1), help="Tasks at a time; else the app's, or at most 4.")
@click.option("--beat/--no-beat", default=True, help="Run beat.  [default: on]")
@click.option("--flower/--no-flower", default=None, help="Run Flower.  [default: if it is installed]")
@click.option("--port", type=click.IntRange(1, 65535), default=5555, show_default=True, help="Flower's port.")
@click.option("--reload/--no-reload", default=True, help="Restart when a .py file changes.  [default: on]")
@click.pass_context
def dev(
    ctx: click.Context,
    app: str | None,
    pool: str | None,
    concurrency: int | None,
    beat: bool,
    flower: bool | None,
    port: int,
    reload: bool,
) -> None:
    """
    Run a broker, a worker, beat and Flower, to work on a project.

    The configured broker is used if it answers; else an installed Valkey or
    Redis is started, or the one that comes with celerykit[dev]. What it keeps
    is in .celerykit. Ctrl-C stops everything. Not for production.
    """
    if app is None:
        raise _Refused("which app? Name it with -A, as for Celery: celerykit dev -A shop (or set CELERY_APP).")
    plan = Plan(app, pool=pool, concurrency=concurrency, beat=beat, flower=flower, flower_port=port, reload=reload)
    try:
        code = run(plan)
    except CelerykitError as error:
        raise _Refused(str(error)) from None
    ctx.exit(code)
