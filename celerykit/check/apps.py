"""The app that ``-A`` names."""

from __future__ import annotations

from typing import Any

from celerykit.errors import CelerykitError, InvalidSettings
from celerykit.settings import Settings, mask_text

__all__ = ["AppNotFound", "find", "import_tasks", "settings_of"]


class AppNotFound(CelerykitError):
    """There is no app of ours where ``-A`` points."""


def find(app: Any) -> Any:
    """
    Return an app of ours.

    Args:
        app:
            The app, or what ``-A`` says: it is found as Celery finds it.

    Raises:
        AppNotFound: There is none, or it cannot be imported.

        InvalidSettings: Something is wrong with its settings.
    """
    found = _import(app) if isinstance(app, str) else app
    if not isinstance(getattr(found, "settings", None), Settings):
        raise AppNotFound(f"-A {app}: it is a {type(found).__name__}, and not a celerykit.CeleryKit.")
    return found


def import_tasks(app: Any) -> None:
    """
    Import the modules that a worker would, and declare their tasks.

    Raises:
        AppNotFound: One cannot be imported, or a task not be declared; no worker would start.
    """
    try:
        app.loader.import_default_modules()
        app.finalize()
    except Exception as error:  # noqa: BLE001  (an edge: as in `_import`)
        raise AppNotFound(f"The tasks of {app.main or 'the app'} cannot be imported: {_told(error)}.") from None


def settings_of(app: Any) -> Settings:
    """
    Return the settings of an app; with None, those that an app without code would have here.

    Raises:
        AppNotFound: There is none, or it cannot be imported.

        InvalidSettings: Something is wrong with them.
    """
    if app is None:
        from celerykit.app import CeleryKit

        return CeleryKit("celerykit", set_as_current=False).settings
    settings: Settings = find(app).settings
    return settings


def _import(app: str) -> Any:
    from celery.app.utils import find_app

    try:
        return find_app(app)
    except InvalidSettings:
        raise
    except Exception as error:  # noqa: BLE001  (an edge: importing somebody's module can raise anything)
        remedy = "Name a module with an app in it, as for `celery -A`, such as shop or shop.tasks:app."
        raise AppNotFound(f"-A {app}: {_why_not_found(app, error)}. {remedy}") from None


def _why_not_found(app: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == app and ":" in app:
        # Celery looks for a module of that name when the one before the colon has no such attribute.
        module, _, attribute = app.partition(":")
        return f"{module} has no {attribute!r}"
    return _told(error)


def _told(error: Exception) -> str:
    # What others raise may quote a URL.
    return mask_text(f"{type(error).__name__}: {error}").strip().removesuffix(".")
