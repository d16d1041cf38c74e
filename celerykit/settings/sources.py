"""
Where settings are read, and which names are none.

A setting is called here as it is everywhere: Celery's by its name
(``task_acks_late``), ours by its place (``kit.max_eta``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from celerykit.settings.options import CODE_ONLY

__all__ = [
    "Layer",
    "UnknownNames",
    "from_env_file",
    "from_environment",
    "from_python",
    "from_secrets",
    "variable",
]

#: The longer one first: it begins like the other.
_PREFIXES = (("celerykit_", "kit."), ("celery_", ""))


@dataclass(frozen=True, slots=True)
class Layer:
    """
    The settings found in one place.

    Attributes:
        values:
            By name, unread. An empty variable counts as absent.

        is_text:
            Whether its names are those of variables, and its values text.
    """

    place: str
    values: Mapping[str, Any]
    is_text: bool = True

    def spelled(self, name: str) -> str:
        """Return *name* as it is written in this place."""
        return variable(name) if self.is_text else name.removeprefix("kit.")

    def source(self, name: str) -> str:
        """Tell where exactly *name* was found."""
        return f"{self.place} {variable(name)}" if self.is_text else self.place

    def only(self, names: Collection[str]) -> Layer:
        """Return the same place with these *names* alone."""
        return Layer(self.place, {name: self.values[name] for name in names if name in self.values}, self.is_text)


def variable(name: str) -> str:
    """Return the environment variable of the setting *name*."""
    if name.startswith("kit."):
        return f"CELERYKIT_{name.removeprefix('kit.').upper()}"
    return f"CELERY_{name.upper()}"


def from_python(place: str, values: Mapping[str, Any] | None, *, ours: Collection[str]) -> Layer:
    """Return what Python code or a config object set, by lower-case names. *ours* are celerykit's."""
    named = {f"kit.{name}" if name in ours else name: value for name, value in (values or {}).items()}
    return Layer(place, named, is_text=False)


def from_environment(environ: Mapping[str, str]) -> Layer:
    """Return what environment variables set."""
    return Layer("environment", dict(_settings_in(environ.items())))


def from_env_file(path: str | Path | None) -> Layer:
    """
    Return what a ``.env`` file sets, if it exists. Names that are not ours are ignored.

    Raises:
        OSError: It cannot be read.
        UnicodeDecodeError: It is no text.
    """
    if path is None or not Path(path).is_file():
        return Layer(str(path), {})
    # Here: most processes have no such file, and this import takes ten times as long as all the rest.
    from pydantic_settings import BaseSettings, DotEnvSettingsSource

    found = DotEnvSettingsSource(BaseSettings, env_file=path, env_file_encoding="utf-8").env_vars
    return Layer(str(path), dict(_settings_in((name, value or "") for name, value in found.items())))


def from_secrets(directory: str | Path | None) -> Layer:
    """
    Return what a secrets directory holds: one file for each setting, named as its variable.

    Raises:
        OSError: The directory cannot be read.
        UnicodeDecodeError: A file is no text.
    """
    if directory is None:
        return Layer("secrets file", {})
    from pydantic import create_model
    from pydantic_settings import BaseSettings, SecretsSettingsSource

    files = {path.name.lower() for path in Path(directory).iterdir()}
    # Its own words for a file that leads out of the directory: it warns, and does not read it.
    fields: dict[str, Any] = {name: (str, ...) for name in files if _setting(name) and name.isidentifier()}
    model = create_model("SecretFiles", __base__=BaseSettings, **fields)
    found = SecretsSettingsSource(model, secrets_dir=directory)()
    return Layer("secrets file", dict(_settings_in(found.items())))


def _settings_in(variables: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for spelled, value in variables:
        name = _setting(spelled)
        if name and value and name not in CODE_ONLY and not _is_kubernetes(spelled, value):
            yield name, value


def _setting(spelled: str) -> str | None:
    lowered = spelled.lower()
    for prefix, place in _PREFIXES:
        if lowered.startswith(prefix):
            return place + lowered.removeprefix(prefix)
    return None


#: What Kubernetes puts into every container for a service whose name begins with "celery".
_SERVICE = re.compile(r"(^|_)(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$", re.IGNORECASE)


def _is_kubernetes(spelled: str, value: str) -> bool:
    # A service called celery-redis makes CELERY_REDIS_PORT=tcp://10.0.0.1:6379: the name of a setting.
    is_address = spelled.upper().endswith("_PORT") and re.match(r"(tcp|udp|sctp)://", value) is not None
    return is_address or _SERVICE.search(spelled) is not None


#: Variables that Celery, its daemon scripts or celerykit read themselves, and that are no settings.
_OWN_VARIABLES = frozenset(
    {
        # Celery's command line, worker and debugger
        *("CELERY_APP", "CELERY_BROKER", "CELERY_CONFIG", "CELERY_CONFIG_MODULE", "CELERY_CUSTOM_WORKER_POOL"),
        *("CELERY_BENCH", "CELERY_BENCH_EVERY", "CELERY_DUMMY_PROXY", "CELERY_LOADER", "CELERY_NO_COLOR"),
        *("CELERY_LOG_FILE", "CELERY_LOG_LEVEL", "CELERY_LOG_REDIRECT", "CELERY_LOG_REDIRECT_LEVEL"),
        *("CELERY_QUIET", "CELERY_RDB_HOST", "CELERY_RDB_PORT", "CELERY_SKIP_CHECKS", "CELERY_TRACE_APP"),
        *("CELERY_VERSION", "CELERY_WORKDIR", "CELERY_WORKER_REVOKES_MAX", "CELERY_WORKER_REVOKE_EXPIRES"),
        *("CELERY_WORKER_SUCCESSFUL_EXPIRES", "CELERY_WORKER_SUCCESSFUL_MAX"),
        # its daemon scripts
        *("CELERY_BIN", "CELERY_CREATE_DIRS", "CELERY_CREATE_LOGDIR", "CELERY_CREATE_RUNDIR"),
        # ours: where settings are, rather than settings
        *("CELERYKIT_ENV_FILE", "CELERYKIT_SECRETS_DIR"),
    }
)

#: Settings of well-known packages, which live beside Celery's.
_PACKAGES = ("beat_dburi", "django_celery_", "email_", "flower_", "once", "redbeat_", "singleton_")

#: A slip of the pen (`task_ack_late`: 0.96), and not another name (`result_backend_url`: 0.88).
_MISSPELT = 0.9

#: Worth a hint.
_SIMILAR = 0.7


@dataclass(slots=True)
class UnknownNames:
    """
    Tell names that are no settings apart: misspelt, somebody else's, or merely unknown.

    Args:
        known:
            The names of all settings.

        command_options:
            Called for the variables of Celery's command line, and of its
            plug-ins as ``CELERY_FLOWER_*``, only when there is an unknown name:
            it has to import the commands.
    """

    known: Collection[str]
    command_options: Callable[[], Collection[str]]
    misspelt: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def sort(self, layer: Layer) -> None:
        """Sort the unknown names of *layer*."""
        for name in sorted(set(layer.values) - set(self.known)):
            if not self._is_somebody_elses(name, layer):
                self._judge(name, layer)

    def _is_somebody_elses(self, name: str, layer: Layer) -> bool:
        if not layer.is_text:
            # `deprecated_settings` is Celery's own note among what its constructor was given.
            return name == "deprecated_settings" or name.startswith(_PACKAGES)
        spelled = variable(name)
        if spelled in _OWN_VARIABLES or name.startswith(_PACKAGES):
            return True
        return any(fnmatchcase(spelled, option) for option in self.command_options())

    def _judge(self, name: str, layer: Layer) -> None:
        nearest = next(iter(get_close_matches(name, self.known, n=1, cutoff=_SIMILAR)), None)
        hint = f"Did you mean {layer.spelled(nearest)}?" if nearest else ""
        if name.startswith("kit.") or (nearest and _is_slip(name, nearest)):
            self.misspelt.append(f"{layer.spelled(name)} ({layer.place}) is not a setting. {hint or _NO_SUCH}")
        else:
            self.unknown.append(f"{layer.spelled(name)} ({layer.place}){'. ' + hint if hint else ''}")


_NO_SUCH = "Remove it: names that begin with CELERYKIT_ are celerykit's."


def _is_slip(name: str, nearest: str) -> bool:
    # `broker_url_internal` is somebody's own variable beside `broker_url`, however near.
    if name.startswith(f"{nearest}_"):
        return False
    return bool(get_close_matches(name, [nearest], cutoff=_MISSPELT))
