"""
Settings: read once, checked, and able to say where each came from.

Two parts: Celery's settings (``CELERY_<NAME>``) and ours (``CELERYKIT_<NAME>``).
A place listed earlier wins:

1. code: arguments of the app, ``app.conf.x = …``
2. the process environment
3. ``.env`` in the current directory, or ``CELERYKIT_ENV_FILE``
4. a secrets directory, one file for each setting: ``CELERYKIT_SECRETS_DIR``
5. a config object, or Django's ``settings.CELERY_…``
6. our defaults (`OPINIONS`)
7. Celery's defaults

with one exception that is Celery's: it asks the process environment for
``CELERY_BROKER_URL``, ``CELERY_BROKER_READ_URL``, ``CELERY_BROKER_WRITE_URL``
and ``CELERY_RESULT_BACKEND`` before anything else, code included.

::

    load  ->  sources   the layers above, and names that are no settings
          ->  options   what each of Celery's settings really holds
          ->  kit       ours
          ->  opinions  our defaults, for what is still open
          ->  urls      Valkey's schemes, TLS, misspelt ones
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from celerykit.errors import InvalidSettings
from celerykit.masks import MASK, Masked, mask_text, shown
from celerykit.settings.kit import Kit
from celerykit.settings.opinions import OPINIONS, Opinion, hold, is_container
from celerykit.settings.options import UNLISTED, OptionTable
from celerykit.settings.reading import Found, check_urls, read_celery, read_kit, settle_urls
from celerykit.settings.sources import (
    Layer,
    UnknownNames,
    from_env_file,
    from_environment,
    from_python,
    from_secrets,
    variable,
)
from celerykit.settings.urls import URLS, settle

__all__ = [
    "MASK",
    "OPINIONS",
    "Kit",
    "Opinion",
    "Settings",
    "UnknownSettingWarning",
    "load",
    "mask_text",
    "settle",
    "shown",
    "variable",
]

#: What Celery asks the process environment for before it looks at its settings (celery/app/utils.py).
ENVIRONMENT_FIRST = URLS

FROM_KIT = "celerykit default"
FROM_CELERY = "Celery default"


class UnknownSettingWarning(UserWarning):
    """A name looks like a setting, and is none that Celery or celerykit knows."""


@dataclass(frozen=True, repr=False)
class Settings:
    """
    All settings of one app, as they were when it was made.

    Attributes:
        kit:
            celerykit's own.

        celery:
            Celery's, by lower-case name: those set anywhere, and our defaults.
            Not Celery's defaults. Its repr shows no secret.

        sources:
            Where each came from, for every setting there is: ours are called
            ``kit.max_eta``.

        defaults:
            Celery's own defaults.
    """

    kit: Kit
    celery: Masked
    sources: Mapping[str, str]
    defaults: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"Settings(kit={self.kit!r}, celery={self.celery!r})"


def load(
    options: OptionTable,
    *,
    code: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    config_source: str = "config object",
    environ: Mapping[str, str] | None = None,
    env_file: str | Path | None = ".env",
    secrets_dir: str | Path | None = None,
    transports: Collection[str] = (),
    backends: Collection[str] = (),
    command_options: Callable[[], Collection[str]] = tuple,
    container: bool | None = None,
) -> Settings:
    """
    Read every setting once, and check all of them.

    Args:
        options:
            Celery's option table: name -> (type, default).

        code:
            What code set explicitly, by lower-case name: Celery's or ours.

        config:
            The same from a config object or Django's settings.

        config_source:
            What to call that.

        environ:
            Instead of ``os.environ``.

        env_file:
            Read if it exists. ``CELERYKIT_ENV_FILE`` wins, and must exist.

        secrets_dir:
            ``CELERYKIT_SECRETS_DIR`` wins.

        transports:
            The URL schemes Kombu knows. Without them a broker's is not checked.

        backends:
            The URL schemes Celery keeps results under.

        command_options:
            Returns the variables that Celery's command line reads; a name may
            end in ``*``. Called only when there is a name nobody knows.

        container:
            Whether this is a container. Found out if not told.

    Raises:
        InvalidSettings: Something is wrong or misspelt; it names all of it.
    """
    environ = os.environ if environ is None else environ
    options = {**UNLISTED, **options}
    env, unreadable_env = _file(from_env_file, env_file, named_by="CELERYKIT_ENV_FILE", environ=environ)
    secrets, unreadable = _file(from_secrets, secrets_dir, named_by="CELERYKIT_SECRETS_DIR", environ=environ)
    environment = from_environment(environ)
    layers = [
        environment.only(ENVIRONMENT_FIRST),
        from_python("code", code, ours=Kit.model_fields),
        environment,
        env,
        secrets,
        from_python(config_source, config, ours=Kit.model_fields),
    ]
    names = _sort_names(layers, options, command_options)
    found = {name: layer for layer in reversed(layers) for name in layer.values}
    celery, wrong_celery = read_celery(found, options)
    kit, wrong_kit = read_kit(found)
    wrong_urls = check_urls(found, transports=transports, backends=backends)
    _refuse([*unreadable_env, *unreadable, *names.misspelt, *wrong_celery, *wrong_kit, *wrong_urls])
    _warn_of(names.unknown)
    held = _opinions(kit, celery, container=is_container(environ) if container is None else container)
    return _settings(kit, celery | held, held, found=found, options=options)


def _sort_names(
    layers: list[Layer], options: OptionTable, command_options: Callable[[], Collection[str]]
) -> UnknownNames:
    names = UnknownNames([*options, *(f"kit.{name}" for name in Kit.model_fields)], cache(command_options))
    for layer in layers:
        names.sort(layer)
    return names


def _opinions(kit: Kit, celery: Mapping[str, Any], *, container: bool) -> dict[str, Any]:
    return {} if kit.profile == "stock" else hold(celery, container=container)


def _file(
    read: Callable[[str | Path | None], Layer],
    path: str | Path | None,
    *,
    named_by: str,
    environ: Mapping[str, str],
) -> tuple[Layer, list[str]]:
    named = environ.get(named_by)
    path = named or path
    if named and not Path(named).exists():
        return read(None), [f"{named_by} (environment): there is no {named}. Correct it, or remove it."]
    try:
        return read(path), []
    except (OSError, UnicodeDecodeError) as error:
        # Not the error's own words: a decoding error holds the text, and that may be a secret.
        return read(None), [f"{path} cannot be read ({type(error).__name__}). Make it readable, as UTF-8."]


def _refuse(problems: list[str]) -> None:
    if not problems:
        return
    count = "A setting is wrong" if len(problems) == 1 else f"{len(problems)} settings are wrong"
    raise InvalidSettings("\n  ".join([f"{count}:", *problems]), problems)


def _warn_of(unknown: list[str]) -> None:
    if unknown:
        listed = "; ".join(unknown)
        warnings.warn(f"Nothing reads these settings: {listed}", UnknownSettingWarning, stacklevel=3)


def _settings(
    kit: Kit, celery: dict[str, Any], held: Collection[str], *, found: Found, options: OptionTable
) -> Settings:
    ours = [f"kit.{name}" for name in Kit.model_fields]
    return Settings(
        kit=kit,
        celery=Masked(settle_urls(celery)),
        sources=MappingProxyType(
            {
                **dict.fromkeys(options, FROM_CELERY),
                **dict.fromkeys(ours, FROM_KIT),
                **dict.fromkeys(held, FROM_KIT),
                **{name: found[name].source(name) for name in (*celery, *ours) if name in found},
            }
        ),
        defaults=MappingProxyType({name: default for name, (_, default) in options.items()}),
    )
