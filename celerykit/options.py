"""
What settings must know of Celery: its option table, its old names, its command line.

Handed to `celerykit.settings`, which does not import Celery.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import click
from celery.app.defaults import NAMESPACES, flatten

__all__ = ["by_new_name", "command_options", "config_name", "option_table"]


def option_table() -> dict[str, tuple[Any, Any]]:
    """Give the type, as Celery writes it, and the default of each of Celery's settings."""
    return {name: (option.type, option.default) for name, option in _flattened()}


def command_options() -> frozenset[str]:
    """
    Give the environment variables that Celery's command line reads its options from.

    Imports all of its commands, plug-ins too; asked for only when a name is unknown.
    """
    from celery.bin.celery import celery as command

    return frozenset(_variables(command, "CELERY"))


def _variables(command: click.Command, prefix: str) -> Iterator[str]:
    for option in command.params:
        yield f"{prefix}_{option.name}".upper()
    for name, sub in getattr(command, "commands", {}).items():
        yield from _variables(sub, f"{prefix}_{name}".upper().replace("-", "_"))


def config_name(source: Any) -> str:
    """Name a configuration object for a person."""
    if source is None:
        return "configuration"
    name = source if isinstance(source, str) else getattr(source, "__name__", type(source).__name__)
    return "Django settings" if str(name).startswith("django.conf") else str(name)


def by_new_name(config: Any, *, namespace: str | None) -> dict[str, Any]:
    """
    Give what a configuration object sets, by Celery's names of today.

    Args:
        namespace:
            The prefix of the names that count, as in ``config_from_object``;
            without one, the old upper-case names count too.
    """
    if not config:
        return {}
    if namespace:
        prefix = f"{namespace}_"
        return {str(k)[len(prefix) :].lower(): config[k] for k in config if str(k).startswith(prefix)}
    names = _names()
    return {names[key]: config[key] for key in config if key in names}


def _names() -> Mapping[str, str]:
    today = {name: name for name, _ in _flattened()}
    return {**dict(_flattened(keyfilter=_old_names)), **today}


def _flattened(**how: Any) -> Any:
    return cast("Any", flatten)(NAMESPACES, **how)


def _old_names(prefix: str, key: str, option: Any) -> list[tuple[str, str]]:
    old = [name.format(key).upper() for name in option.old] or [(prefix + key).upper()]
    return [(name, prefix + key) for name in old]
