"""
A function's parameters, and how the arguments of a call meet them.

``inspect.Signature.bind`` costs more than all the validation of a small call,
so what it works out for every call is worked out here once, at declaration.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from celerykit.errors import Problem

__all__ = ["BindingError", "Parameters"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class BindingError(Exception):
    """Arguments that no call of the function could have."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems


@dataclass(frozen=True)
class Parameters:
    """
    The parameters of one function, by the ways an argument can reach them.

    A call's values are kept in a dict by parameter name; what ``*args`` and
    ``**kwargs`` collect stands under their own names, as a list and a dict.
    """

    positional: tuple[str, ...]
    by_name: frozenset[str]
    required: tuple[str, ...]
    defaults: Mapping[str, Any]
    var_positional: str | None
    var_keyword: str | None

    @classmethod
    def of(cls, function: Callable[..., Any], *, drop_first: bool) -> Parameters:
        """Read *function*; *drop_first* leaves out the ``self`` of a bound task."""
        parameters = list(inspect.signature(function).parameters.values())[int(drop_first) :]
        single = [p for p in parameters if p.kind in (*_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)]
        return cls(
            positional=tuple(p.name for p in parameters if p.kind in _POSITIONAL),
            by_name=frozenset(p.name for p in parameters if p.kind in _BY_NAME),
            required=tuple(p.name for p in single if p.default is p.empty),
            defaults={p.name: p.default for p in single if p.default is not p.empty},
            var_positional=_name_of(parameters, inspect.Parameter.VAR_POSITIONAL),
            var_keyword=_name_of(parameters, inspect.Parameter.VAR_KEYWORD),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every parameter, in the order of declaration as far as a call can tell."""
        keyword_only = [n for n in (*self.required, *self.defaults) if n not in self.positional]
        variable = [n for n in (self.var_positional, self.var_keyword) if n]
        return (*self.positional, *keyword_only, *variable)

    def bind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], *, skip: int = 0, partial: bool = False
    ) -> dict[str, Any]:
        """
        Give each argument to its parameter.

        Args:
            skip:
                How many positional parameters are left for values that come
                later, in front: the result of the task before, in a chain.

            partial:
                Whether required parameters may still be missing.

        Raises:
            BindingError: with every problem, not the first only.
        """
        names = self.positional[skip:]
        values = dict(zip(names, args, strict=False))
        problems: list[Problem] = []
        if len(args) > len(names):
            problems += self._collect_rest(values, args, len(names))
        for name, value in kwargs.items():
            if name in self.by_name and name not in values:
                values[name] = value
            else:
                problems += self._collect_keyword(values, name, value)
        if not partial:
            later = self.positional[:skip]
            problems += [_missing(name) for name in self.required if name not in values and name not in later]
        if problems:
            raise BindingError(problems)
        return values

    def unbind(
        self, values: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any], *, skip: int = 0
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put *values* back into the shape in which *args* and *kwargs* came."""
        positional = [values[name] for name in self.positional[skip : skip + len(args)]]
        if len(args) > len(positional):
            positional += values[str(self.var_positional)]
        keywords = {name: values[name] for name in kwargs if name in self.by_name}
        if len(keywords) < len(kwargs):
            keywords |= values[str(self.var_keyword)]
        return tuple(positional), keywords

    def named_by(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Give what *function* names of a call's arguments, with defaults: the same for every spelling of the call."""
        values = {**self.defaults, **self.bind(args, kwargs)}
        wanted = inspect.signature(function).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted):
            return values
        return {parameter.name: values[parameter.name] for parameter in wanted if parameter.name in values}

    def _collect_rest(self, values: dict[str, Any], args: Sequence[Any], taken: int) -> list[Problem]:
        if self.var_positional is None:
            return [_too_many(taken, len(args))]
        values[self.var_positional] = list(args[taken:])
        return []

    def _collect_keyword(self, values: dict[str, Any], name: str, value: Any) -> list[Problem]:
        if name in self.by_name:
            return [_twice(name)]
        if self.var_keyword is None:
            return [_unknown(name, self.by_name)]
        values.setdefault(self.var_keyword, {})[name] = value
        return []


def _name_of(parameters: list[inspect.Parameter], kind: Any) -> str | None:
    return next((p.name for p in parameters if p.kind is kind), None)


def _missing(name: str) -> Problem:
    return {"loc": [name], "type": "missing_argument", "msg": "is missing"}


def _twice(name: str) -> Problem:
    return {
        "loc": [name],
        "type": "multiple_argument_values",
        "msg": "is given twice, by position and by name",
    }


def _too_many(takes: int, given: int) -> Problem:
    return {
        "loc": [],
        "type": "unexpected_positional_argument",
        "msg": f"takes {takes} positional argument{'s' * (takes != 1)}, got {given}",
    }


def _unknown(name: str, known: frozenset[str]) -> Problem:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return {"loc": [name], "type": "unexpected_keyword_argument", "msg": f"is not a parameter{hint}"}
