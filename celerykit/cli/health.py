"""
``celerykit health``: do workers or beat live, and do they get on.

A probe's way is `run`, which needs neither click nor any other package.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, NamedTuple

from celerykit.pulse import MAX_AGE, Found, age_of, ail, find, folder_of

__all__ = ["health", "run"]  # noqa: F822  (see __getattr__)

USAGE = "Usage: celerykit health worker|beat [NAME] [--ready] [--max-age S] [--dir DIR] [--json]"

HELP = f"""\
{USAGE}

  Tell whether workers or beat live, and what ails them: for probes.

  Reads the signs of life that each leaves on this machine; asks no broker, and
  imports no app. Without NAME all of them have to be well, and there has to be
  one. NAME is that of the node, celery@host, or what is before its @.

  Ends with 0 if all is well, with 1 if not, and with 2 if there is none.

Options:
  --ready        Also has to do what it is there for: consume; lead or stand by.
  --max-age S    Seconds that a sign of life may be old. Default: {MAX_AGE:g}.
  --dir DIR      Where the signs are. Default: $CELERYKIT_HEALTH_DIR, or else
                 celerykit-<uid> in the directory for temporary files.
  --json         Write JSON.
  --help         Show this.
"""

_WELL, _UNWELL, _NOTHING = 0, 1, 2


class _Misused(Exception):
    """The command line makes no sense."""


class _Question(NamedTuple):
    kind: str
    name: str | None = None
    ready: bool = False
    max_age: float = MAX_AGE
    folder: str | None = None
    in_json: bool = False


def run(arguments: list[str]) -> int:
    """Do what *arguments* say, and give the exit code."""
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(HELP)
        return _WELL
    try:
        question = _read(arguments)
    except _Misused as error:
        sys.stderr.write(f"{USAGE}\n\nError: {error}\n")
        return _NOTHING
    try:
        found = find(question.kind, question.name, folder=question.folder)
    except FileNotFoundError:
        found = []
    except OSError as error:
        return _say_nothing(question, str(error))
    return _say(question, found) if found else _say_nothing(question, _missing(question))


def _read(arguments: list[str]) -> _Question:
    words, options = [], dict[str, Any](folder=os.environ.get("CELERYKIT_HEALTH_DIR"))
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            words.append(argument)
        elif argument == "--ready":
            options["ready"] = True
        elif argument == "--json":
            options["in_json"] = True
        elif option in ("--max-age", "--dir"):
            value = value if equals else next(rest, "")
            options |= {"folder": _dir(value)} if option == "--dir" else {"max_age": _seconds(value)}
        else:
            raise _Misused(f"there is no option {argument}.")
    if not words or words[0] not in ("worker", "beat"):
        raise _Misused("of what? Say worker or beat.")
    if len(words) > 2:
        raise _Misused(f"one NAME at most, and not {' '.join(words[1:])!r}.")
    return _Question(words[0], words[1] if len(words) > 1 else None, **options)


def _dir(value: str) -> str:
    if not value:
        raise _Misused("--dir needs a directory.")
    return value


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise _Misused(f"--max-age needs a number of seconds, and not {value!r}.")
    return seconds


def _missing(question: _Question) -> str:
    which = f"{question.kind} {question.name!r}" if question.name else question.kind
    folder, _ = folder_of(question.folder)
    return (
        f"no {which} has left a sign of life in {folder}. Does it run, as this user, with the same "
        "CELERYKIT_HEALTH_DIR, and not with profile stock?"
    )


def _say_nothing(question: _Question, line: str) -> int:
    if question.in_json:
        sys.stdout.write(json.dumps({"kind": question.kind, "healthy": False, "problem": line, "processes": []}) + "\n")
    else:
        sys.stdout.write(f"{line}\n")
    return _NOTHING


def _say(question: _Question, found: list[Found]) -> int:
    problems = [ail(one, max_age=question.max_age, ready=question.ready) for one in found]
    if question.in_json:
        processes = [_facts(question, one, problem) for one, problem in zip(found, problems, strict=True)]
        facts = {"kind": question.kind, "healthy": not any(problems), "processes": processes}
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        lines = [_line(question, one, problem) for one, problem in zip(found, problems, strict=True)]
        # What is wrong comes first: some platforms show one line.
        sys.stdout.write("\n".join(sorted(lines, key=lambda line: ": well" in line)) + "\n")
    return _UNWELL if any(problems) else _WELL


def _line(question: _Question, found: Found, problem: str | None) -> str:
    sign = found.sign
    who = question.kind if sign is None else f"{sign.kind} {sign.name}"
    if problem is not None or sign is None:
        return f"{who}: {problem}"
    doing = f", runs {sign.task}" if sign.task else ""
    return f"{who}: well, {sign.state.replace('_', ' ')} for {sign.since:.0f} s{doing}"


def _facts(question: _Question, found: Found, problem: str | None) -> dict[str, Any]:
    sign = found.sign
    if sign is None:
        return {"file": found.file, "healthy": False, "problem": problem}
    return {
        "name": sign.name,
        "pid": sign.pid,
        "healthy": problem is None,
        "problem": problem,
        "ready": ail(found, max_age=question.max_age, ready=True) is None,
        "state": sign.state,
        "since": round(sign.since, 3),
        "age": round(age_of(sign), 3),
        "silence": round(age_of(sign) + sign.silence, 3),
        "task": sign.task,
        "stuck": sign.stuck,
    }


def __getattr__(name: str) -> Any:
    if name != "health":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # For `celerykit --help`, and for whoever comes by click: a command that hands its words on.
    import click

    @click.command(
        "health",
        help="Tell whether workers or beat live, and what ails them: for probes.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def health(arguments: tuple[str, ...]) -> None:
        sys.exit(run(list(arguments)))

    return health
