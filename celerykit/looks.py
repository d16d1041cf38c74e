"""
How the arguments and the result of a call are written for people: typed, in little room, without secrets.

    (Order(order_id='7c1f…', amount='9.50', card=***),)

It is what Celery calls ``argsrepr``: in a message's headers, events, logs and
Flower. It is made of JSON values, when a call is sent; of what is long, only
as much is looked at as will be shown. What a run sends or returns is also
looked through for the run's secret values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from numbers import Number
from typing import Any, get_origin

from celerykit import redact
from celerykit.contract import Contract
from celerykit.marks import EACH, RESULT, all_names, names_at, parts_of
from celerykit.masks import mask_text
from celerykit.redact import Secrets

__all__ = ["DEEPEST", "LONGEST", "STOCK", "Look", "can_be_told", "letter", "plain", "told"]

#: The most characters of a description, as Celery's ``argsrepr_maxsize``.
LONGEST = 1024

#: So many lists and objects deep, as Celery's ``task_repr_maxlevels``.
DEEPEST = 3


class _Shape:
    """What is known of a value's type: its name, if it has fields, and the shapes of what is in it."""

    __slots__ = ("fields", "item", "name", "places")

    def __init__(self) -> None:
        self.name = ""
        self.fields: dict[str, _Shape | None] = {}
        self.places: dict[int, _Shape | None] = {}
        self.item: _Shape | None = None


def _shape_of(annotation: Any, known: list[tuple[Any, _Shape]]) -> _Shape | None:
    for kind, shape in known:
        if kind is annotation:
            return shape
    shape = _Shape()
    known.append((annotation, shape))
    same = []
    for part in parts_of(annotation):
        step = part.steps[-1] if part.steps else None
        inner = _shape_of(part.annotation, known)
        if step is None:
            same.append(inner)
        elif step == EACH:
            shape.item = inner
        elif isinstance(step, int):
            shape.places[step] = inner
        else:
            shape.fields |= dict.fromkeys(names_at(annotation, part), inner)
    if same:
        told = [one for one in same if one is not None]
        return told[0] if len(told) == 1 else None
    if shape.fields:
        shape.name = (get_origin(annotation) or annotation).__name__
    return shape if shape.fields or shape.places or shape.item else None


class Look:
    """
    How the calls of one task are written.

    Args:
        contract:
            The task's; ``None`` when nothing is known of it.

        names:
            What is masked beside what is marked.
    """

    def __init__(self, contract: Contract | None, names: Collection[str] = ()) -> None:
        self._contract = contract
        self._names = frozenset(names) if contract is None else contract.redacted | frozenset(names)

    def arguments(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        longest: int = LONGEST,
        deepest: int = DEEPEST,
        secrets: Sequence[Secrets] = (),
    ) -> tuple[str, str]:
        """
        Write positional and named arguments, as in ``argsrepr`` and ``kwargsrepr``.

        Args:
            secrets:
                Values that are taken out wherever they stand.
        """
        return self.positional(args, longest, deepest, secrets), self.named(kwargs, longest, deepest, secrets)

    def positional(
        self,
        args: Sequence[Any],
        longest: int = LONGEST,
        deepest: int = DEEPEST,
        secrets: Sequence[Secrets] = (),
    ) -> str:
        """Write positional arguments, as a tuple."""
        if not args:
            return "()"
        writer = _Writer(self._names, longest, deepest, secrets)
        known = len(self._places)
        writer.text("(")
        for place, value in enumerate(args):
            if not writer.is_next(place):
                break
            name, shape = self._places[place] if place < known else self._rest
            writer.field(name, value, shape, 1)
        return writer.closed(",)" if len(args) == 1 else ")")

    def named(
        self,
        kwargs: Mapping[str, Any],
        longest: int = LONGEST,
        deepest: int = DEEPEST,
        secrets: Sequence[Secrets] = (),
    ) -> str:
        """Write named arguments, as a dict."""
        if not kwargs:
            return "{}"
        writer = _Writer(self._names, longest, deepest, secrets)
        writer.text("{")
        for place, (name, value) in enumerate(kwargs.items()):
            if not writer.is_next(place):
                break
            writer.text(f"{name!r}: ")
            shape = self._shapes[name] if name in self._shapes else self._more[1]
            writer.field(self._owner_of(name), value, shape, 1)
        return writer.closed("}")

    def result(self, value: Any, *, longest: int = LONGEST, deepest: int = DEEPEST) -> str:
        """Write what a task returned, as JSON values; it runs still."""
        writer = _Writer(self._names, longest, deepest, redact.running())
        writer.field(RESULT, value, self._returned, 0)
        return writer.closed("")

    def masked(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Give JSON values as they are, but for what is secret in them."""
        shown = [self._masked(self._name_at(place), value) for place, value in enumerate(args)]
        return shown, {name: self._masked(self._owner_of(name), value) for name, value in kwargs.items()}

    def masked_result(self, value: Any) -> Any:
        """Give a result as it is, but for what is secret in it."""
        return self._masked(RESULT, value)

    def _masked(self, name: str, value: Any) -> Any:
        return redact.clean({name: value}, self._names, most=sys.maxsize)[name]

    def _name_at(self, place: int) -> str:
        return self._places[place][0] if place < len(self._places) else self._rest[0]

    def _owner_of(self, name: str) -> str:
        """Give the parameter that takes a named argument, where it decides whether that is secret."""
        collector = "" if name in self._shapes else self._more[0]
        return collector if collector in self._names else name

    def secrets(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
        """Give the secret texts among a call's arguments."""
        if not self._may_hold_secrets:
            return []
        named = [(self._name_at(place), value) for place, value in enumerate(args)]
        named += [(self._owner_of(name), value) for name, value in kwargs.items()]
        return [text for name, value in named for text in redact.secrets_in(value, self._names, name=name)]

    def secrets_of_result(self, value: Any) -> list[str]:
        """Give the secret texts in what a task returned."""
        return [*redact.secrets_in(value, self._names, name=RESULT)]

    @cached_property
    def _may_hold_secrets(self) -> bool:
        if self._contract is None:
            return True
        types = self._contract.types
        return self._may_hold({name: types.get(name, Any) for name in self._contract.parameters.names})

    @cached_property
    def may_return_secrets(self) -> bool:
        """Whether a result may have something in it that is secret."""
        return self._contract is None or self._may_hold({RESULT: self._contract.returns})

    def _may_hold(self, types: Mapping[str, Any]) -> bool:
        names = all_names(types)
        return names is None or any(name in self._names or redact.is_secret_name(name) for name in names)

    @cached_property
    def hides_result(self) -> bool:
        """Whether the result as a whole is secret."""
        return RESULT in self._names

    @cached_property
    def _shapes(self) -> dict[str, _Shape | None]:
        if self._contract is None:
            return {}
        known: list[tuple[Any, _Shape]] = []
        types = self._contract.types
        return {name: _shape_of(types.get(name, Any), known) for name in self._contract.parameters.names}

    @cached_property
    def _places(self) -> list[tuple[str, _Shape | None]]:
        names = self._contract.parameters.positional if self._contract else ()
        return [(name, self._shapes[name]) for name in names]

    @cached_property
    def _rest(self) -> tuple[str, _Shape | None]:
        return self._collector(self._contract.parameters.var_positional if self._contract else None)

    @cached_property
    def _more(self) -> tuple[str, _Shape | None]:
        return self._collector(self._contract.parameters.var_keyword if self._contract else None)

    def _collector(self, name: str | None) -> tuple[str, _Shape | None]:
        shape = self._shapes.get(name) if name else None
        return name or "", shape and shape.item

    @cached_property
    def _returned(self) -> _Shape | None:
        return _shape_of(self._contract.returns, []) if self._contract else None


#: How Celery's own tasks are written, and what is not known here: those that send items hold other tasks' arguments.
STOCK = Look(None, ("it",))


# Messages


def letter(facts: Mapping[str, Any], look_of: Callable[[Any], Look]) -> dict[str, Any]:
    """
    Mask what is secret in a dead letter that was written as plain data.

    Args:
        look_of:
            Gives the look of a task, by name.
    """
    shown = {**facts}
    headers = dict(redact.clean(facts["headers"]))
    if "body" in facts:
        name, (args, kwargs), shown["body"] = _body(facts, look_of)
        look = look_of(name)
        headers |= dict(zip(("argsrepr", "kwargsrepr"), look.arguments(args, kwargs), strict=True))
        secrets = redact.Secrets(look.secrets(args, kwargs))
        shown["note"] = redact.scrubbed(facts["note"], secrets)
    else:
        # What cannot be read cannot be masked.
        shown["body_bytes"] = len(shown.pop("body_base64", "")) * 3 // 4
        headers |= {name: redact.MASK for name in ("argsrepr", "kwargsrepr") if name in headers}
    shown["headers"] = headers
    return shown


def _body(facts: Mapping[str, Any], look_of: Callable[[Any], Look]) -> tuple[Any, tuple[Any, Any], Any]:
    body, name = facts["body"], facts["headers"].get("task")
    if isinstance(body, Mapping):  # Celery's first protocol
        name = name or body.get("task")
        args, kwargs = _arguments(body.get("args"), body.get("kwargs"))
        masked = look_of(name).masked(args, kwargs)
        rest = {key: _signatures(value, look_of) for key, value in body.items()}
        return name, (args, kwargs), {**rest, **dict(zip(("args", "kwargs"), masked, strict=True))}
    if isinstance(body, list) and len(body) == 3:
        args, kwargs = _arguments(body[0], body[1])
        return name, (args, kwargs), [*look_of(name).masked(args, kwargs), _signatures(body[2], look_of)]
    return name, ([], {}), redact.clean(body)


def _arguments(args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    return args if isinstance(args, list) else [], kwargs if isinstance(kwargs, dict) else {}


def _signatures(value: Any, look_of: Callable[[Any], Look]) -> Any:
    """Mask the arguments of calls that follow on one."""
    if isinstance(value, list):
        return [_signatures(item, look_of) for item in value]
    if not isinstance(value, Mapping):
        return value
    shown = {key: _signatures(item, look_of) for key, item in value.items()}
    if "task" in value and isinstance(value.get("args"), list) and isinstance(value.get("kwargs"), dict):
        args, kwargs = look_of(value["task"]).masked(value["args"], value["kwargs"])
        inner = _signatures(kwargs, look_of) if str(value["task"]).startswith("celery.") else kwargs
        shown |= {"args": args, "kwargs": inner}
    return shown


# Results


class _Told:
    """A result, as it is stored and passed on; only the text that Celery makes of it for people is ours."""

    look: Look

    def __str__(self) -> str:
        return self.look.result(self)

    def __reduce__(self) -> Any:
        return type(self).__mro__[2], (plain(self),)


class _Dict(_Told, dict[str, Any]):
    pass


class _List(_Told, list[Any]):
    pass


class _Text(_Told, str):
    __slots__ = ("look",)


class _Int(_Told, int):
    pass


class _Float(_Told, float):
    pass


_TOLD: dict[type, Any] = {dict: _Dict, list: _List}
_TOLD_IF_SECRET: dict[type, Any] = {str: _Text, int: _Int, float: _Float}

#: Serializers that write a dict, a text and so on of a class of its own as they write any other.
_TAKE_TOLD = ("json", "pickle")

for _kind in (*_TOLD.values(), *_TOLD_IF_SECRET.values()):
    # Celery's `saferepr` writes dicts, lists and texts by itself, and numbers by their own `str`.
    Number.register(_kind)


def can_be_told(backend: Any) -> bool:
    """Whether a result backend stores what `told` gives: ours take it apart, others hand it to their serializers."""
    return getattr(backend, "takes_told", False) or getattr(backend, "serializer", None) in _TAKE_TOLD


def told(result: Any, look: Look) -> Any:
    """Give a result in JSON values that Celery writes by its *look*: in events, in logs and in Flower."""
    kind = _TOLD.get(type(result))
    if kind is None:
        kind = _TOLD_IF_SECRET.get(type(result))
        if kind is None or not _is_secret(result, look):
            return result
    shown = kind(result)
    shown.look = look
    return shown


def _is_secret(result: Any, look: Look) -> bool:
    return look.hides_result or (redact.is_active() and redact.clean(result) != result)


def plain(result: Any) -> Any:
    """Give the result that `told` was given."""
    if not isinstance(result, _Told):
        return result
    # A text's own `str` is what it shows.
    return str.__str__(result) if isinstance(result, _Text) else type(result).__mro__[2](result)


class _Writer:
    """A text that is written piece by piece, until it is long enough; then secret values are taken out of it."""

    __slots__ = ("_deepest", "_left", "_names", "_pieces", "_secrets")

    def __init__(self, names: Collection[str], longest: int, deepest: int, secrets: Sequence[Secrets] = ()) -> None:
        self._names, self._left, self._deepest, self._secrets = names, longest, deepest, secrets
        self._pieces: list[str] = []

    def text(self, text: str) -> None:
        self._pieces.append(text)
        self._left -= len(text)

    def is_next(self, place: int) -> bool:
        """Go on to the next item; or say that there are more, and that no room is left."""
        if self._left <= 0:
            self._pieces.append(", ..." if place else "...")
            return False
        if place:
            self.text(", ")
        return True

    def closed(self, end: str) -> str:
        self._pieces.append(end)
        text = "".join(self._pieces)
        for some in self._secrets:
            text = some.scrub(text)
        return text

    def field(self, name: Any, value: Any, shape: _Shape | None, depth: int) -> None:
        """Write the value that stands under *name*."""
        if redact.is_hidden(name, value, self._names):
            self.text(redact.MASK)
        else:
            self.value(value, shape, depth)

    def value(self, value: Any, shape: _Shape | None, depth: int) -> None:
        if isinstance(value, str):
            self.text(_quoted(str.__str__(value), self._left, self._secrets))
        elif value is None or isinstance(value, int | float):
            self.text(_number(value))
        elif isinstance(value, Mapping):
            self._pairs(value, shape, depth)
        elif isinstance(value, list | tuple):
            self._row(value, shape, depth)
        else:
            self.text(_other(value)[: max(self._left, 0)])

    def _pairs(self, value: Mapping[Any, Any], shape: _Shape | None, depth: int) -> None:
        name = shape.name if shape else ""
        if "task" in value and "kwargs" in value:  # a signature: its arguments are another task's
            self.text(f"{str(value['task'])[:100]}(...)")
            return
        start, end = (f"{name}(", ")") if name else ("{", "}")
        if depth >= self._deepest or self._left <= 0:
            self.text(f"{start}...{end}" if value else start + end)
            return
        self.text(start)
        for place, (key, item) in enumerate(value.items()):
            if not self.is_next(place):
                break
            self.text(f"{key}=" if name else f"{key!r}: ")
            inner = None if shape is None else shape.fields.get(key, shape.item)
            self.field(key, item, inner, depth + 1)
        self._pieces.append(end)

    def _row(self, value: Sequence[Any], shape: _Shape | None, depth: int) -> None:
        start, end = ("[", "]") if isinstance(value, list) else ("(", ",)" if len(value) == 1 else ")")
        if depth >= self._deepest or self._left <= 0:
            self.text(f"{start}...{end}" if value else start + end)
            return
        self.text(start)
        for place, item in enumerate(value):
            if not self.is_next(place):
                break
            inner = None if shape is None else shape.places.get(place, shape.item)
            self.value(item, inner, depth + 1)
        self._pieces.append(end)


def _quoted(value: str, most: int, secrets: Sequence[Secrets] = ()) -> str:
    if len(value) > (most := max(most, 0)):
        for some in secrets:  # before it is cut: of a secret, the half would be left
            value = some.scrub(value[: most + some.longest])
        value = f"{value[:most]}..."
    return repr(mask_text(value) if "://" in value else value)


def _number(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # an int of more digits than Python writes
        return "..."


def _other(value: Any) -> str:
    """Write what is no JSON: arguments of a call that nobody checked."""
    try:
        shown = redact.clean(value)
    except Exception:  # noqa: BLE001  (an edge: objects may do anything)
        return f"<{type(value).__name__}>"
    return shown if isinstance(shown, str) else repr(shown)
