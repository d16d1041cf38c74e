"""
``celerykit dead``: what no worker could finish.

Arguments of calls may be secret. ``show`` masks what is marked so, and what is
called so, unless told to reveal it; ``edit`` and ``export`` work on messages as
they are.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import IO, TYPE_CHECKING, Any

import click

from celerykit.cli.finding import found_app
from celerykit.dead_letters import REASONS, Letter, Note, described, payload_of
from celerykit.errors import CelerykitError

if TYPE_CHECKING:
    from celerykit.letters import Cause, Change, DeadLetters, Report

__all__ = ["dead"]

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class _Moment(click.ParamType):  # type: ignore[type-arg]
    """A time, or how long ago it was."""

    name = "when"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read ``2h`` or ISO 8601."""
        if not isinstance(value, str):
            return value
        if ago := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", value.strip()):
            return timedelta(**{_UNITS[ago[2]]: float(ago[1])})
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            self.fail(
                f"{value!r} is neither a time, such as 2026-03-01T12:00, nor an age, such as 2h or 3d.", param, ctx
            )


_FILTERS: Sequence[Callable[..., Any]] = (
    click.option("--task", metavar="NAME", help="Of this task; * stands for any text."),
    click.option("--reason", type=click.Choice(REASONS), multiple=True, help="Died of this; may be given again."),
    click.option("--error", metavar="TEXT", help="The error's type, with *, or a part of its message."),
    click.option("--fingerprint", metavar="HEX", help="One cause, as `top` shows it."),
    click.option("--queue", metavar="NAME", help="Came from this queue."),
    click.option("--since", type=_Moment(), metavar="WHEN", help="Died since then: 2h, 3d, or a time."),
    click.option("--until", type=_Moment(), metavar="WHEN", help="Died before then."),
    click.option("--id", "ids", metavar="ID", multiple=True, help="A letter's or a task's id; may be given again."),
)

#: A path, and what is to be there.
_Assignment = tuple[list[str], Any]

_APP = click.option("-A", "--app", "named", metavar="APP", envvar="CELERY_APP", help="The app, as for `celery -A`.")
_JSON = click.option("--json", "in_json", is_flag=True, help="Write JSON.")


def _for_letters(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the app's letters, and say what is wrong with them in a line."""

    @functools.wraps(command)
    def run(*args: Any, named: str | None, **kwargs: Any) -> Any:
        ctx = click.get_current_context()
        app = found_app(ctx, named or ctx.meta.get(__name__))
        app.loader.import_default_modules()
        try:
            return command(app.dead_letters, *args, **kwargs)
        except CelerykitError as error:
            raise click.ClickException(str(error)) from None

    return _APP(run)


def _filtered(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command take the options that choose letters, as ``which``."""

    @functools.wraps(command)
    def run(letters: DeadLetters, *args: Any, reason: Sequence[str], ids: Sequence[str], **kwargs: Any) -> Any:
        which = {name: kwargs.pop(name) for name in ("task", "error", "fingerprint", "queue", "since", "until")}
        which |= {"reason": reason or None, "id": ids or None}
        return command(letters, *args, which={name: value for name, value in which.items() if value}, **kwargs)

    for option in reversed(_FILTERS):
        run = option(run)
    return run


@click.group()
@_APP
@click.pass_context
def dead(ctx: click.Context, *, named: str | None) -> None:
    """
    Find, repair and replay what no worker could finish.

    Ends with 1 if something was refused, is not there, or went wrong.
    """
    ctx.meta[__name__] = named


@dead.command("list")
@_for_letters
@_filtered
@click.option("--limit", type=click.IntRange(min=1), help="At most so many.")
@click.option("--json", "in_json", is_flag=True, help="Write a line of JSON for each.")
def list_(letters: DeadLetters, *, which: Mapping[str, Any], limit: int | None, in_json: bool) -> None:
    """List letters, the oldest first. Shows no arguments."""
    found = letters.find(limit=limit, **which)
    if in_json:
        for letter in found:
            click.echo(json.dumps(described(letter, arguments=False), default=str))
        return
    number = 0
    for number, letter in enumerate(found, start=1):
        if number == 1:
            click.echo(_LINE.format("LETTER", "DIED", "REASON", "TASK", "ERROR"))
        click.echo(_line(letter.note))
    if not number:
        click.echo("No dead letters.")


_LINE = "{:14} {:20} {:16} {:30} {}"


def _line(note: Note) -> str:
    error = ": ".join(filter(None, (note.error, _first_line(note.message))))
    return _LINE.format(note.letter[:13], _time(note.died_at), note.reason, note.task or "?", _cut(error, 60)).rstrip()


@dead.command()
@_for_letters
@click.argument("letter")
@click.option("--reveal", is_flag=True, help="Also what is secret in its arguments.")
@_JSON
def show(letters: DeadLetters, *, letter: str, reveal: bool, in_json: bool) -> None:
    """Show a letter whole, arguments included, secrets masked."""
    found = letters.get(letter)
    facts = described(found, arguments=True) if reveal else letters.shown(found)
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False, default=str) if in_json else _shown(facts))


def _shown(facts: Mapping[str, Any]) -> str:
    note = dict(facts["note"])
    traceback, ledger = note.pop("traceback", ""), note.pop("ledger", [])
    for name in ("died_at", "sent_at"):
        note[name] = _time(note.get(name))
    lines = [f"{name:15} {value}" for name, value in note.items() if value not in ("", [], None)]
    lines += [f"{'attempt':15} {_time(row['started'])}  {row['outcome']}  {row['error']}" for row in ledger]
    body = facts["body"] if "body" in facts else facts.get("body_base64", f"{facts.get('body_bytes')} bytes")
    lines += ["", "body", json.dumps(body, indent=2, ensure_ascii=False)]
    lines += ["", "headers", json.dumps(facts["headers"], indent=2, ensure_ascii=False, default=str)]
    return "\n".join([*lines, "", traceback.rstrip()]).rstrip()


@dead.command()
@_for_letters
@_filtered
@click.option("--limit", type=click.IntRange(min=1), help="The most frequent so many.")
@_JSON
def top(letters: DeadLetters, *, which: Mapping[str, Any], limit: int | None, in_json: bool) -> None:
    """Group letters by what they died of."""
    from dataclasses import asdict

    causes: list[Cause] = letters.top(**which)[:limit]
    if in_json:
        click.echo(json.dumps([asdict(cause) for cause in causes], indent=2, ensure_ascii=False))
        return
    if not causes:
        click.echo("No dead letters.")
        return
    line = "{:>7} {:20} {:13} {:16} {:30} {}"
    click.echo(line.format("LETTERS", "LAST", "FINGERPRINT", "REASON", "TASK", "ERROR"))
    for cause in causes:
        error = ": ".join(filter(None, (cause.error, _first_line(cause.message))))
        facts = (cause.count, _time(cause.last), cause.fingerprint, cause.reason, cause.task or "?", _cut(error, 60))
        click.echo(line.format(*facts).rstrip())


@dead.command()
@_for_letters
@_filtered
@click.argument("chosen", metavar="[LETTER]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All there are.")
@click.option("--rate", metavar="RATE", help="At most: 20/s, 100/m, 5/h.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be replayed and what refused.")
@click.option("--force", is_flag=True, help="Also of tasks that are not known here.")
@click.option("--new-ids", is_flag=True, help="As calls of their own, under new ids.")
@_JSON
def replay(
    letters: DeadLetters,
    *,
    which: dict[str, Any],
    chosen: tuple[str, ...],
    everything: bool,
    rate: str | None,
    limit: int | None,
    in_json: bool,
    **how: Any,
) -> None:
    """
    Send letters again, each to the queue it came from.

    Each is checked against its task as it is here now. What does not fit
    stays. Interrupted, it can be done again: no letter is sent twice.
    """
    which = _chosen(which, chosen, everything=everything)
    _check_rate(rate)
    with _progress(letters, which, limit, is_quiet=in_json) as on_progress:
        report = letters.replay(rate=rate, limit=limit, on_progress=on_progress, **how, **which)
    click.echo(_report_as_json(report) if in_json else _report_as_text(report, dry_run=how["dry_run"]))
    click.get_current_context().exit(1 if report.refused else 0)


def _chosen(which: dict[str, Any], chosen: tuple[str, ...], *, everything: bool) -> dict[str, Any]:
    """Take care that nobody means all letters by saying nothing."""
    if chosen:
        which = {**which, "id": (*which.get("id", ()), *chosen)}
    if not which and not everything:
        raise click.UsageError("Which letters? Name some, choose with --task, --error and the like, or say --all.")
    return which


def _check_rate(rate: str | None) -> None:
    if rate is not None and not re.fullmatch(r"[1-9]\d*(\.\d+)?(/[smh])?", rate):
        raise click.BadParameter("say how many in a second, minute or hour: 20/s, 100/m, 5/h.", param_hint="--rate")


@contextmanager
def _progress(
    letters: DeadLetters, which: Mapping[str, Any], limit: int | None, *, is_quiet: bool
) -> Iterator[Callable[[Report], None] | None]:
    stream = sys.stderr
    if is_quiet or not stream.isatty():
        yield None
        return
    total = letters.count(**which)
    with click.progressbar(length=min(total, limit or total), file=stream, label="Replaying") as bar:
        yield lambda report: bar.update(report.total - bar.pos)


def _report_as_json(report: Report) -> str:
    refusals = [refusal._asdict() for refusal in report.refusals]
    counts = {"replayed": report.replayed, "skipped": report.skipped, "refused": report.refused}
    return json.dumps({**counts, "refusals": refusals}, indent=2, ensure_ascii=False, default=str)


def _report_as_text(report: Report, *, dry_run: bool) -> str:
    lines = [f"{letter[:13]}  {why}" for letter, _, why, _ in report.refusals]
    if report.refused > len(lines):
        lines.append(f"… and {report.refused - len(lines)} more")
    verb = "would be replayed" if dry_run else "replayed"
    skipped = f", {report.skipped} were gone or replayed before" if report.skipped else ""
    return "\n".join([*lines, f"{report.replayed} {verb}, {report.refused} refused{skipped}."])


@dead.command()
@_for_letters
@click.argument("letter")
@click.option("--set", "sets", metavar="PATH=VALUE", multiple=True, help="Such as order.amount=5 or 0.tags.1=new.")
@click.option("--from-file", type=click.File(), metavar="FILE", help='JSON: {"args": […], "kwargs": {…}}; - is stdin.')
@click.option("--replay", "again", is_flag=True, help="And replay it.")
@_JSON
def edit(
    letters: DeadLetters, *, letter: str, sets: tuple[str, ...], from_file: IO[str] | None, again: bool, in_json: bool
) -> None:
    """
    Change the arguments of a letter, in an editor unless told how.

    What does not fit the task is refused, and the letter stays as it was.
    """
    found = letters.get(letter)
    change: Change
    if sets:
        change = functools.partial(_set, names=letters.parameters(found), sets=[_assignment(text) for text in sets])
    else:
        change = _typed(from_file.read() if from_file else _in_editor(found))
    edited = letters.edit(found.id, change)
    report = letters.replay(id=edited.id) if again else None
    if in_json:
        click.echo(json.dumps({"letter": edited.id, "replayed": report and report.replayed}))
    else:
        click.echo(f"{edited.id[:13]} was changed{'.' if report is None else ';'}")
        if report is not None:
            click.echo(_report_as_text(report, dry_run=False))
    click.get_current_context().exit(1 if report is not None and report.refused else 0)


def _in_editor(letter: Letter) -> str:
    payload = payload_of(letter)
    before = {"args": payload.args, "kwargs": payload.kwargs} if payload else {"args": [], "kwargs": {}}
    text = click.edit(json.dumps(before, indent=2, ensure_ascii=False), extension=".json", require_save=True)
    if text is None:
        raise click.Abort
    return text


def _typed(text: str) -> Callable[..., Any]:
    try:
        new = json.loads(text)
        args, kwargs = list(new["args"]), dict(new["kwargs"])
    except (ValueError, TypeError, KeyError) as error:
        raise click.UsageError(f'It must be JSON such as {{"args": [], "kwargs": {{}}}}: {error!r}') from None
    return lambda *_: (args, kwargs)


def _assignment(text: str) -> _Assignment:
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise click.BadParameter(f"{text!r} is not PATH=VALUE.", param_hint="--set")
    try:
        return path.split("."), json.loads(value)
    except ValueError:
        return path.split("."), value


def _set(
    args: list[Any], kwargs: dict[str, Any], *, names: Sequence[str], sets: Sequence[tuple[list[str], Any]]
) -> Any:
    for path, value in sets:
        _set_one(args, kwargs, names, path, value)
    return args, kwargs


def _set_one(args: list[Any], kwargs: dict[str, Any], names: Sequence[str], path: list[str], value: Any) -> None:
    first, *rest = path
    is_positional = first in names and names.index(first) < len(args) and first not in kwargs
    place: Any = args if is_positional or first.isdecimal() else kwargs
    steps = [names.index(first) if is_positional else first, *rest]
    try:
        for step in steps[:-1]:
            place = place[_key(place, step)]
        place[_key(place, steps[-1])] = value
    except (LookupError, TypeError, ValueError):
        raise click.UsageError(f"There is no {'.'.join(path)!r} in the letter.") from None


def _key(place: Any, step: Any) -> Any:
    return int(step) if isinstance(place, list) else step


@dead.command()
@_for_letters
@_filtered
@click.argument("chosen", metavar="[LETTER]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All there are.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_JSON
def purge(
    letters: DeadLetters, *, which: dict[str, Any], chosen: tuple[str, ...], everything: bool, yes: bool, in_json: bool
) -> None:
    """Throw letters away for good."""
    which = _chosen(which, chosen, everything=everything)
    if not yes:
        count = letters.count(**which)
        click.confirm(f"Throw away {count} dead letter{'' if count == 1 else 's'} for good?", abort=True, err=True)
    purged = letters.purge(**which)
    click.echo(json.dumps({"purged": purged}) if in_json else f"{purged} thrown away.")


@dead.command()
@_for_letters
@_filtered
@click.option("-o", "--output", type=click.File("w"), default="-", metavar="FILE", help="Instead of standard output.")
def export(letters: DeadLetters, *, which: Mapping[str, Any], output: IO[str]) -> None:
    """Write each letter as a line of JSON, arguments included."""
    for line in letters.export(**which):
        output.write(line + "\n")


def _time(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds") if seconds else "?"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
