"""
Sets up logging where Celery does: in a worker and its processes, in beat, and where ``app.log.setup()`` is called.

A subclass of Celery's `Logging`, and no receiver of its signal
``setup_logging``: a receiver would turn off ``-l``, ``-f`` and what is done
about ``print``, and take the place of a program's own.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, Literal, cast

import celery.app.log as stock
import click
from celery import signals
from celery.platforms import isatty
from celery.utils.log import get_logger, mlevel

from celerykit.errors import InvalidOptions
from celerykit.logs.handlers import File, Stream
from celerykit.logs.joined import configure_structlog
from celerykit.logs.lines import Formatter
from celerykit.logs.pipe import handler_for
from celerykit.logs.printed import Printed, tell_uncaught

__all__ = ["Logging"]

#: Settings by which a program has said how Celery's own lines shall look.
_FORMATS = ("worker_log_format", "worker_task_log_format")

#: The loggers that Celery tells by, beside those below its own: its processes are billiard's.
_CELERYS = ("celery", "multiprocessing", "py.warnings")

_HIJACK = "worker_hijack_root_logger"

#: celery-types knows half of it.
_Logging: Any = stock.Logging


class Logging(_Logging):  # type: ignore[misc]
    """
    What ``app.log`` is.

    Attributes:
        format_kind:
            How lines are written: ``json``, ``text``, or ``celery`` as stock.
            Known once logging is set up, and ``celery`` before.

        is_joined:
            Whether the program has logging of its own, and its handlers write.
    """

    format_kind: Literal["json", "text", "celery"] = "celery"
    is_joined = False

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self._kit = app.settings.kit
        self._handlers: dict[Any, logging.Handler] = {}
        self._worker: str | None = None
        self._is_level_told = False
        if not self.is_stock:
            self.loglevel = mlevel(self._kit.log_level)

    @property
    def is_json(self) -> bool:
        """Whether each line that this process writes is to be JSON."""
        return self.format_kind == "json" and not self.is_joined

    @property
    def is_stock(self) -> bool:
        """Whether all of it is left as Celery has it."""
        if self._kit.profile == "stock" or self._kit.log_format == "celery":
            return True
        told = self.app.settings.celery
        return self._kit.log_format == "auto" and any(name in told for name in _FORMATS)

    # Levels

    def setup(self, loglevel: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Set up logging as Celery does, from the level on that `-l` or `CELERYKIT_LOG_LEVEL` says."""
        return super().setup(loglevel if self.is_stock else self._level(loglevel), *args, **kwargs)

    def _level(self, given: Any) -> Any:
        ours = mlevel(self._kit.log_level)
        is_ours_told = "log_level" in self._kit.model_fields_set
        if _is_default_of_command() or not given:
            self._is_level_told = is_ours_told
            return ours
        self._is_level_told = True
        return given

    # Handlers

    def setup_logging_subsystem(
        self,
        loglevel: Any = None,
        logfile: Any = None,
        format: Any = None,  # noqa: A002  (Celery's names)
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Set up logging as Celery does, with handlers of ours, or with those that the program has."""
        if self.already_setup:
            return None
        self._worker = kwargs.get("hostname") or self._worker
        self._handlers = {}
        self.is_joined = False
        self.format_kind = "celery" if self.is_stock or format else self._kind(logfile)
        if self.format_kind == "celery":
            return self._with_subsystem(loglevel, logfile, format, *args, **kwargs)
        root = logging.getLogger()
        self.is_joined = self._joins(root)
        level = root.level
        receivers = self._with_subsystem(loglevel, logfile, format, *args, **kwargs)
        if receivers:
            # Somebody has taken all of it over.
            self.format_kind = "celery"
            return receivers
        # By it billiard sets up logging of its own in processes that are no forks, before they come here.
        os.environ["_MP_FORK_LOGLEVEL_"] = ""
        if self.is_joined and not self._is_level_told:
            root.setLevel(level)
        configure_structlog(joined=self.is_joined)
        if not self.is_joined:
            tell_uncaught()
        return receivers

    def _with_subsystem(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().setup_logging_subsystem(*args, **kwargs)
        finally:
            # Celery marks its own class. Where a process had to set up again, it has said so on ours.
            if "_setup" in vars(type(self)):
                del type(self)._setup
            if not self.is_stock:
                _enable_celerys()

    def _kind(self, logfile: Any) -> Literal["json", "text"]:
        if self._kit.log_format in ("json", "text"):
            return cast("Literal['json', 'text']", self._kit.log_format)
        stream = sys.__stderr__ if logfile is None else logfile
        return "text" if hasattr(stream, "write") and isatty(stream) else "json"

    def foresee_json(self, logfile: Any) -> bool:
        """Tell whether each line is going to be JSON, as far as can be known before logging is set up."""
        if self.is_stock or signals.setup_logging.receivers:
            return False
        return self._kind(logfile) == "json" and not self._would_join(logging.getLogger())

    def _would_join(self, root: logging.Logger) -> bool:
        conf, told = self.app.conf, self.app.settings.celery
        if not any(map(_is_somebodys, root.handlers)):
            return False
        return not (conf[_HIJACK] and (self._kit.log_format != "auto" or told.get(_HIJACK)))

    def _joins(self, root: logging.Logger) -> bool:
        conf = self.app.conf
        if not self._would_join(root):
            return False
        # Celery looks at it next, and at nothing else before it takes handlers away.
        conf[_HIJACK] = False
        for handler in [handler for handler in root.handlers if isinstance(handler.formatter, Formatter)]:
            root.removeHandler(handler)
        return True

    def setup_handlers(
        self,
        logger: logging.Logger,
        logfile: Any,
        format: Any,  # noqa: A002
        colorize: Any,
        *args: Any,
        **kwargs: Any,
    ) -> logging.Logger:
        """Give *logger* a handler: the same one to all of Celery's."""
        if self.format_kind == "celery":
            return cast("logging.Logger", super().setup_handlers(logger, logfile, format, colorize, *args, **kwargs))
        if self.is_joined:
            logger.propagate = True
            if logfile is not None and logger is logging.getLogger():
                # Asked for by name, it is beside what the program has.
                logger.addHandler(self._handler(logfile, colours=False))
        elif not any(map(_is_handler, logger.handlers)):
            logger.addHandler(self._handler(logfile, colours=self._has_colours(colorize, logfile)))
        return logger

    def setup_task_loggers(
        self,
        loglevel: Any = None,
        logfile: Any = None,
        format: Any = None,  # noqa: A002
        colorize: Any = None,
        propagate: Any = False,
        **kwargs: Any,
    ) -> Any:
        """Set up the logger of tasks; in a program with logging of its own nothing is put in its way."""
        logger = get_logger("celery.task")
        level = logger.level
        super().setup_task_loggers(loglevel, logfile, format, colorize, propagate or self.is_joined, **kwargs)
        if self.is_joined and not self._is_level_told:
            logger.setLevel(level)
        return logger

    def _handler(self, logfile: Any, *, colours: bool) -> logging.Handler:
        if logfile not in self._handlers:
            handler = _made(logfile)
            kind = "json" if self.is_joined and self._kit.log_format == "auto" else self.format_kind
            handler.setFormatter(Formatter(cast("Any", kind), colours=colours, worker=self._worker))
            self._handlers[logfile] = handler
        return self._handlers[logfile]

    def _has_colours(self, colorize: Any, logfile: Any) -> bool:
        if self.format_kind != "text" or os.environ.get("NO_COLOR"):
            return False
        if os.environ.get("FORCE_COLOR") and logfile is None:
            return bool(colorize is None or colorize)
        return bool(self.supports_color(colorize, logfile))

    def redirect_stdouts_to_logger(
        self, logger: logging.Logger, loglevel: Any = None, stdout: bool = True, stderr: bool = True
    ) -> Any:
        """Have what is printed told, line by line."""
        if self.format_kind == "celery":
            return super().redirect_stdouts_to_logger(logger, loglevel, stdout, stderr)
        printed = Printed(logger, loglevel)
        if stdout:
            sys.stdout = cast("Any", printed)
        if stderr:
            sys.stderr = cast("Any", printed)
        return printed


def _enable_celerys() -> None:
    """Have Celery's loggers heard that a program's `logging.config` has found, and so disabled: it does by default."""
    for name, logger in tuple(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and (name in _CELERYS or name.startswith("celery.")):
            logger.disabled = False


def _made(logfile: Any) -> logging.Handler:
    if logfile is None:
        if sys.__stderr__ is None:
            raise InvalidOptions("There is no standard error to log to: name a file, with --logfile.")
        return handler_for(sys.__stderr__)
    if hasattr(logfile, "write"):
        return Stream(logfile)
    return File(logfile, encoding="utf-8", errors="backslashreplace")


def _is_default_of_command() -> bool:
    """Tell whether a level comes from Celery's command line, and nobody gave it there."""
    context = click.get_current_context(silent=True)
    if context is None or "loglevel" not in context.params:
        return False
    return context.get_parameter_source("loglevel") is click.core.ParameterSource.DEFAULT


def _is_handler(handler: logging.Handler) -> bool:
    return not isinstance(handler, logging.NullHandler)


def _is_somebodys(handler: logging.Handler) -> bool:
    """
    Tell whether somebody has chosen a handler.

    Not so what `logging.info()` and its like add by themselves, when they are
    called before anything is set up.
    """
    if not _is_handler(handler) or isinstance(handler.formatter, Formatter):
        return False
    is_plain = type(handler) is logging.StreamHandler and handler.formatter is not None
    return not (is_plain and cast("Any", handler.formatter)._fmt == logging.BASIC_FORMAT)
