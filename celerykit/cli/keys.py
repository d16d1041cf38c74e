"""
``celerykit keys``: which calls hold which keys.

Results of calls may be secret. They are shown by ``show --result``, which a
person asks for, and by nothing else; what is marked as secret in them, or
called so, only with ``--reveal``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from celerykit.cli.finding import found_app
from celerykit.errors import CelerykitError, InvalidOptions, InvalidPayload
from celerykit.idempotency.claim import State
from celerykit.looks import STOCK

if TYPE_CHECKING:
    from celerykit.keys import Held, Keyring

__all__ = ["keys"]

_APP = click.option("-A", "--app", "named", metavar="APP", envvar="CELERY_APP", help="The app, as for `celery -A`.")
_JSON = click.option("--json", "in_json", is_flag=True, help="Write JSON.")

#: Of a key's 32 digits, so many are shown where there is little room; they tell keys apart.
_DIGITS = 13


def _for_keys(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the app and its keys, and say what is wrong with them in a line."""

    @functools.wraps(command)
    def run(*args: Any, named: str | None, **kwargs: Any) -> Any:
        ctx = click.get_current_context()
        app = found_app(ctx, named or ctx.meta.get(__name__))
        app.loader.import_default_modules()
        from celerykit.keys import Keyring

        try:
            keyring = Keyring(app)
            _warn_of_memory(keyring)
            return command(app, keyring, *args, **kwargs)
        except CelerykitError as error:
            raise click.ClickException(str(error)) from None

    return _APP(run)


def _warn_of_memory(keyring: Keyring) -> None:
    if not keyring.is_shared:
        click.echo("Each process keeps its keys in its own memory: set CELERYKIT_STORE_URL to see them.", err=True)


@click.group()
@_APP
@click.pass_context
def keys(ctx: click.Context, *, named: str | None) -> None:
    """
    Show which calls hold which keys, and let keys go.

    A key is written TASK:DIGITS; its beginning is enough, if no other begins
    so. Ends with 1 if something was refused, is not there, or went wrong.
    """
    ctx.meta[__name__] = named


# list


@keys.command("list")
@_for_keys
@click.option("--task", metavar="NAME", help="Of this task; * stands for any text.")
@click.option("--state", type=click.Choice([state.value for state in State]), help="Only those in this state.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="At most so many.")
@click.option("--json", "in_json", is_flag=True, help="Write a line of JSON for each.")
def list_(app: Any, keyring: Keyring, *, task: str | None, state: str | None, limit: int, in_json: bool) -> None:
    """List keys, in no order. Shows no results."""
    found = keyring.find(task=task, state=state)
    if in_json:
        for held in islice(found, limit):
            click.echo(json.dumps(_facts(held, with_result=False)))
        return
    number = 0
    for number, held in enumerate(islice(found, limit), start=1):
        if number == 1:
            click.echo(_LINE.format("KEY", "STATE", "CALL", "SINCE", "LEASE"))
        click.echo(_line(held))
    if not number:
        click.echo("No keys.")
    elif next(found, None) is not None:
        click.echo(f"There are more than {limit}: --limit shows them, --task and --state choose.", err=True)


_LINE = "{:44} {:8} {:36} {:19}  {}"


def _line(held: Held) -> str:
    claim = held.claim
    return _LINE.format(_short(held.key), claim.state.value, claim.id, _time(claim.since), _lease(held)).rstrip()


def _short(key: str) -> str:
    task, _, digits = key.rpartition(":")
    return f"{task}:{digits[:_DIGITS]}"


# show


@keys.command()
@_for_keys
@click.argument("key", required=False)
@click.option("--task", "task_name", metavar="NAME", help="Instead of KEY: that of a call of this task.")
@click.option("--args", metavar="JSON", help="What it is called with: [1, 2].")
@click.option("--kwargs", metavar="JSON", help='What it is called with: {"amount": 5}.')
@click.option("--key", "given", metavar="TEXT", help="What it was given with using(key=…), beside its arguments.")
@click.option("--id", "call_id", metavar="ID", help="Instead of arguments: the call's id.")
@click.option("--result", "with_result", is_flag=True, help="Also its result, secrets masked.")
@click.option("--reveal", is_flag=True, help="Also what is secret in its result.")
@_JSON
def show(
    app: Any,
    keyring: Keyring,
    *,
    key: str | None,
    task_name: str | None,
    with_result: bool,
    reveal: bool,
    in_json: bool,
    **call: Any,
) -> None:
    """Show what is known of a key."""
    if (key is None) is (task_name is None) or (key is not None and any(call.values())):
        raise click.UsageError("Which key? Name it, or a call of --task by its --args and --kwargs, or its --id.")
    held = keyring.get(key) if key is not None else _of_call(app, keyring, str(task_name), **call)
    facts = _facts(held, with_result=with_result or reveal)
    if "result" in facts and not reveal:
        facts["result"] = (getattr(app.tasks.get(held.task), "look", None) or STOCK).masked_result(facts["result"])
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False) if in_json else _shown(held, facts))


def _of_call(
    app: Any, keyring: Keyring, task_name: str, *, args: str | None, kwargs: str | None, given: str | None, call_id: str
) -> Held:
    task = _task(app, task_name)
    if call_id and (args or kwargs or given):
        raise click.UsageError("Say either --id, or what the call is called with.")
    try:
        if call_id:
            return keyring.of_call(task, call_id)
        called = _read("--args", args or "[]", list), _read("--kwargs", kwargs or "{}", dict)
        return keyring.get(keyring.key_of(task, *called, key=given))
    except (InvalidPayload, InvalidOptions) as error:
        raise click.UsageError(str(error).removesuffix(" The message was not sent.")) from None


def _task(app: Any, name: str) -> Any:
    from celerykit.explain import Ambiguous, near, task_of

    try:
        task = task_of(app, name)
    except Ambiguous as error:
        raise click.UsageError(str(error)) from None
    if task is None:
        guess = near(app, name)
        raise click.UsageError(f"There is no task {name!r}.{f' Did you mean {guess}?' if guess else ''}")
    return task


def _read(option: str, text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"it is no JSON: {error}", param_hint=option) from None
    if not isinstance(value, kind):
        raise click.BadParameter("it must be such as [1, 2] or {}.".format('{"amount": 5}'), param_hint=option)
    return value


def _facts(held: Held, *, with_result: bool) -> dict[str, Any]:
    """Give what is known of a key as JSON values; of a result its size, unless it is asked for."""
    claim = held.claim
    facts: dict[str, Any] = {
        "key": held.key,
        "task": held.task,
        "state": claim.state.value,
        "call": claim.id,
        "replay": claim.turn.replay,
        "turn": claim.turn.number,
        "since": claim.since,
        "lease": held.lease,
        "keep": claim.keep,
        "arguments": claim.call,
    }
    if claim.state is State.DONE:
        facts["result_bytes"] = len(claim.outcome.encode())
        if with_result:
            facts["result"] = json.loads(claim.outcome) if claim.outcome else None
    elif claim.state is State.FAILED:
        facts["error"] = claim.outcome
    elif claim.resume is not None:
        facts["resume"] = dict(claim.resume)
    return facts


def _shown(held: Held, facts: dict[str, Any]) -> str:
    from celerykit.retry import spoken

    said = {**facts, "since": _time(facts["since"]), "lease": _lease(held), "keep": spoken(facts["keep"])}
    if resume := said.pop("resume", None):
        said["next turn"] = f"{_time(resume.get('at'))}, {resume.get('kind')}, attempt {resume.get('attempt')}"
    size = said.pop("result_bytes", None)
    if "result" in said:
        said["result"] = json.dumps(said["result"], ensure_ascii=False)
    elif size is not None:
        said["result"] = f"{size} bytes of JSON; --result shows it" if size else "not kept"
    lines = [f"{name:10} {value}" for name, value in said.items() if value]
    return "\n".join([*lines, "", f"If it is let go, {held.meaning()}."])


# release


@keys.command()
@_for_keys
@click.argument("chosen", metavar="KEY...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Also while its call is being run, which another one may then run beside.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_JSON
def release(app: Any, keyring: Keyring, *, chosen: tuple[str, ...], force: bool, yes: bool, in_json: bool) -> None:
    """
    Let keys go, as if their calls had never been.

    Nothing is taken out of a queue, and no run is stopped: `show` says for each
    key what it means. One whose call is being run is refused, unless by --force.
    """
    from celerykit.keys import KeyInUse, KeyNotFound

    named = list(chosen) if yes else _confirmed(keyring, chosen, force=force)
    refused: dict[str, str] = {}
    released: list[str] = []
    for key in named:
        try:
            released.append(keyring.release(key, force=force).key)
        except KeyInUse as error:
            refused[error.held.key] = f"{error} Say --force, to let it go all the same."
        except KeyNotFound as error:
            refused[key] = str(error)
    click.echo(_report_as_json(released, refused) if in_json else _report(released, refused))
    click.get_current_context().exit(1 if refused else 0)


def _confirmed(keyring: Keyring, chosen: tuple[str, ...], *, force: bool) -> list[str]:
    """Say what it means, and ask once for all that would be let go; what is refused anyway is not asked about."""
    from celerykit.keys import KeyNotFound

    named, number = [], 0
    for key in chosen:
        try:
            held = keyring.get(key)
        except KeyNotFound:
            named.append(key)
            continue
        named.append(held.key)
        if force or not held.is_in_use:
            number += 1
            click.echo(f"{held.key}: {held.claim.state.value}, call {held.claim.id}: {held.meaning()}.", err=True)
    if number:
        click.confirm(f"Let {number} key{'' if number == 1 else 's'} go?", abort=True, err=True)
    return named


def _report_as_json(released: list[str], refused: dict[str, str]) -> str:
    refusals = [{"key": key, "why": why} for key, why in refused.items()]
    return json.dumps({"released": released, "refused": refusals}, indent=2, ensure_ascii=False)


def _report(released: list[str], refused: dict[str, str]) -> str:
    count = f"{len(released)} let go" + (f", {len(refused)} refused." if refused else ".")
    return "\n".join([*refused.values(), count])


def _lease(held: Held) -> str:
    if held.lease is None:
        return ""
    return "lapsed" if held.has_lapsed else f"{held.lease:.0f} s"


def _time(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds") if seconds else "?"
