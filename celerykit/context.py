"""
What a call takes along: whose request it was, for which tenant, in which trace.

    class ShopContext(Context):
        tenant: str | None = None

    app = CeleryKit("shop", context=ShopContext)

    with ShopContext.bound(tenant="acme"):
        charge.delay(order)

Whatever that call sends in turn has the same context: retries, callbacks, what
its task sends. It is for ids and names, and small. It never keeps a message
from being sent or read: what does not fit is left out.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, NamedTuple, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from celerykit import events, masks
from celerykit.errors import InvalidOptions
from celerykit.fields import Fields
from celerykit.marks import Redact, names_of

__all__ = [
    "Bound",
    "Context",
    "bind",
    "carried",
    "check_class",
    "current",
    "is_bound",
    "is_of_run",
    "shown_while_bound",
    "told",
    "travelling",
    "unbind",
]

#: The most a context may take of a message, in bytes. It travels with every message there is.
_MAX_BYTES = 2 * 1024

#: The longest id that is taken from a request or a message.
_LONGEST_ID = 128

#: The facts of events, and what else a log line says: no field of a context may be called the same.
_RESERVED = frozenset(
    (
        *("task", "id", "root_id", "parent_id", "attempt", "queue", "worker", "key", "wait_ms", "run_ms", "outcome"),
        *("error", "error_fingerprint", "reason", "delay", "then", "first", "kind", "next_attempt", "letter"),
        *("trace_id", "event", "level", "logger", "timestamp", "message", "exception", "data"),
    )
)

#: Headers of HTTP requests that name one, the first one first.
_REQUEST_IDS = ("x-request-id", "x-correlation-id")

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)


C = TypeVar("C", bound="Context")


def _traceparent(value: str) -> str:
    if not _TRACEPARENT.fullmatch(value):
        raise ValueError("not a W3C traceparent")
    return value


class Context(BaseModel):
    """
    What travels with every call. Inherit from it to add fields; each one needs a default.

    Attributes:
        correlation_id:
            What a request and all that follows on it have in common. In a
            task of which nobody said it, the id of the first call.

        traceparent:
            The W3C trace context of where it began.
    """

    # A newer or older deploy has other fields.
    model_config = ConfigDict(
        frozen=True, extra="ignore", populate_by_name=True, hide_input_in_errors=True, ser_json_inf_nan="constants"
    )

    correlation_id: Annotated[str, Field(max_length=_LONGEST_ID, pattern=r"^[\x21-\x7e]+$")] | None = None
    traceparent: Annotated[str, AfterValidator(_traceparent)] | None = None

    #: The names whose values no log line shows.
    _masked: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls._masked = frozenset(name for name, of in cls.model_fields.items() if _is_marked(name, of))

    @classmethod
    @contextmanager
    def bound(cls, context: Context | None = None, /, **values: Any) -> Iterator[Self]:
        """
        Add to the context of all that is sent, and logged, in this block.

        Args:
            context:
                As `of_request` gives it.

            **values:
                By field. They go before those in *context*.

        Raises:
            InvalidOptions: There is no such field, or a value does not fit.
        """
        given = _given(cls, context, values)
        before = _bound.get() or Bound()
        token = bind(before.plus(given))
        try:
            with shown_while_bound(given.shown):
                yield cls.current()
        finally:
            unbind(token)

    @classmethod
    def current(cls) -> Self:
        """Give the context of the running call, or of this request."""
        return current().as_a(cls)

    @classmethod
    def of_request(cls, headers: Mapping[Any, Any] | Iterable[tuple[Any, Any]]) -> Self:
        """
        Read ``X-Request-ID`` (or ``X-Correlation-ID``) and ``traceparent`` of an HTTP request.

        What is too long, or no such thing, counts as absent: anybody can send it.

        Args:
            headers:
                A mapping, or pairs, of texts or, as in ASGI, of bytes.
        """
        pairs = headers.items() if isinstance(headers, Mapping) else headers
        told = {_ascii(name).lower(): _ascii(value) for name, value in pairs}
        ids = (told.get(name, "") for name in _REQUEST_IDS)
        found = {
            "correlation_id": next(filter(_is_id, ids), None),
            "traceparent": _valid_traceparent(told.get("traceparent", "")),
        }
        return cls(**{name: value for name, value in found.items() if value is not None})


# What is bound


class Bound(NamedTuple):
    """
    A context as it is in force.

    Attributes:
        values:
            By field, of their types.

        sent:
            The same as JSON, without what does not fit into a message.

        shown:
            The same for log lines, without secrets.

        default_id:
            What stands in for a correlation id that nobody gave.
    """

    values: Mapping[str, Any] = MappingProxyType({})
    sent: Mapping[str, Any] = MappingProxyType({})
    shown: Mapping[str, Any] = MappingProxyType({})
    default_id: str | None = None

    def plus(self, other: Bound) -> Bound:
        """Give both; what *other* has goes before."""
        sent = {name: value for name, value in self.sent.items() if name not in other.values}
        return self._replace(
            values={**self.values, **other.values},
            sent=_fitting({**sent, **other.sent}),
            shown={**self.shown, **other.shown},
        )

    def within(self, root_id: str) -> Bound:
        """Give the same for a call that runs in place."""
        shown = self.shown if self.correlation_id is not None else {**self.shown, "correlation_id": root_id}
        return self._replace(shown=shown, default_id=self.default_id or root_id)

    @property
    def correlation_id(self) -> str | None:
        """The one that was given, or what stands in for it."""
        return self.values.get("correlation_id") or self.default_id

    def as_a(self, kind: type[C]) -> C:
        """Give the model, with the fields of *kind*."""
        values = {name: value for name, value in self.values.items() if name in kind.model_fields}
        if (correlation_id := self.correlation_id) is not None:
            values["correlation_id"] = correlation_id
        return _read(kind, values)


# Of what is bound, for tasks of all apps.
_bound: ContextVar[Bound | None] = ContextVar("celerykit_context", default=None)


def bind(context: Bound) -> Token[Bound | None]:
    """Put *context* in force, until `unbind`."""
    return _bound.set(context)


def unbind(token: Token[Bound | None]) -> None:
    """Put in force what was before."""
    # Web frameworks may leave a block in another context than they came into it, one that is thrown away.
    try:  # (`suppress` takes a microsecond, and this is done in each run)
        _bound.reset(token)
    except ValueError:
        return


def is_bound() -> bool:
    """Tell whether anything is in force."""
    return _bound.get() is not None


def is_of_run() -> bool:
    """Tell whether what is in force came with a call, which this process runs or handles."""
    bound = _bound.get()
    return bound is not None and bound.default_id is not None


def current() -> Bound:
    """Give what is in force: what is bound, and what other libraries know of this request."""
    bound = _bound.get() or Bound()
    # In a run, all that is to be known came with its message.
    return bound if bound.default_id is not None else _with_picked_up(bound)


def travelling(root_id: Any = None) -> Mapping[str, Any]:
    """Give what a message takes along, as JSON; *root_id* is the message's, and need not be said twice."""
    bound = current()
    correlation_id = bound.correlation_id
    if correlation_id is None or correlation_id == root_id or "correlation_id" in bound.sent:
        return bound.sent
    return {**bound.sent, "correlation_id": correlation_id}


def carried(kind: type[Context], context: Mapping[str, Any] | None, *, root_id: str | None) -> Bound:
    """
    Give what a message brought, as a worker puts it in force.

    Args:
        context:
            What `travelling` gave to a sender, which may know other fields.

        root_id:
            Stands in for a correlation id that is not there.
    """
    known = {name: context[name] for name in kind.model_fields if name in context} if context else {}
    if not known:
        return Bound(shown={"correlation_id": root_id} if root_id else {}, default_id=root_id)
    model = _read(kind, known)
    sent = _fitting(
        {name: value for name, value in known.items() if name in model.model_fields_set and value is not None}
    )
    correlation_id = model.correlation_id or root_id
    return Bound(
        values={name: getattr(model, name) for name in sent},
        sent=sent,
        shown=_shown(kind, {**sent, "correlation_id": correlation_id} if correlation_id else sent),
        default_id=root_id,
    )


def told(context: Mapping[str, Any] | None, *, root_id: str | None) -> dict[str, Any]:
    """Give what lines tell of a call's context where it does not run, and where the app's fields are not known."""
    found = context or {}
    correlation_id, traceparent = found.get("correlation_id"), found.get("traceparent")
    is_id = isinstance(correlation_id, str) and _is_id(correlation_id)
    shown: dict[str, Any] = {"correlation_id": correlation_id if is_id else root_id}
    if isinstance(traceparent, str) and (match := _TRACEPARENT.fullmatch(traceparent)):
        shown["trace_id"] = match[1]
    return shown


@contextmanager
def shown_while_bound(facts: Mapping[str, Any]) -> Iterator[None]:
    """Have log lines carry these facts in this block."""
    # Here, as it is 50 ms that a program that only declares tasks has no use for.
    from structlog.contextvars import bind_contextvars, reset_contextvars

    tokens = bind_contextvars(**facts)
    try:
        yield
    finally:
        with suppress(ValueError):  # (see `unbind`)
            reset_contextvars(**tokens)


# Declaring


def check_class(kind: Any) -> None:
    """
    Refuse a class of contexts that could not travel.

    Raises:
        InvalidOptions: It is none, or a field has no default, is named like a fact of events, or is a ``SecretStr``.
    """
    if not (isinstance(kind, type) and issubclass(kind, Context)):
        raise InvalidOptions(f"context must be a class that inherits from celerykit.Context, got {kind!r}.")
    for name, of in kind.model_fields.items():
        if of.is_required():
            raise InvalidOptions(f"{kind.__name__}.{name} needs a default: not every call has a context.")
        if name in _RESERVED:
            raise InvalidOptions(f"{kind.__name__}.{name}: every log line has a {name!r} of its own; rename it.")
    for name in Fields({name: of.annotation for name, of in kind.model_fields.items()}).secrets:
        raise InvalidOptions(
            f"{kind.__name__}.{name} is a SecretStr, which would travel as asterisks. Declare it "
            f"Annotated[str, Redact()], or leave it out."
        )


def _is_marked(name: str, of: Any) -> bool:
    is_marked = any(mark is Redact or isinstance(mark, Redact) for mark in of.metadata)
    return is_marked or bool(names_of({name: of.annotation}, Redact))


# Reading


def _read(kind: type[C], values: Mapping[str, Any]) -> C:
    """Make a model of what fits."""
    for _ in range(2):
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            wrong = {problem["loc"][0] for problem in error.errors(include_input=False) if problem["loc"]}
            values = {name: value for name, value in values.items() if wrong and name not in wrong}
        except Exception:  # noqa: BLE001  (an edge: a user's validator, and no reason to refuse a message)
            break
    return kind.model_construct(_fields_set=set())


def _given(kind: type[Context], context: Context | None, values: Mapping[str, Any]) -> Bound:
    if unknown := values.keys() - kind.model_fields.keys():
        known = ", ".join(kind.model_fields)
        raise InvalidOptions(f"{kind.__name__} has no field {sorted(unknown)[0]!r}; there are {known}.")
    before = {name: getattr(context, name) for name in context.model_fields_set} if context is not None else {}
    try:
        model = kind.model_validate({**before, **values})
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "context"
        raise InvalidOptions(f"{kind.__name__}: {where}: {problem['msg']}.") from None
    names = [name for name in kind.model_fields if name in model.model_fields_set]
    sent = _as_json(model, names)
    values = {name: getattr(model, name) for name in names}
    # What is taken out, structlog has as an ellipsis.
    gone = {name: ... for name, value in values.items() if value is None}
    return Bound(values=values, sent=sent, shown={**gone, **_shown(kind, sent)})


def _as_json(model: Context, names: Iterable[str]) -> dict[str, Any]:
    """Write the fields that can be written; a set, a Decimal or a model can, by pydantic."""
    written: dict[str, Any] = {}
    for name in names:
        if getattr(model, name) is None:
            continue
        try:
            value = model.model_dump(mode="json", include={name}, by_alias=False, warnings=False)[name]
            _check_portable(value)
        except Exception as error:  # noqa: BLE001  (an edge: a user's serializer, and no reason not to send)
            events.CONTEXT_NOT_JSON.tell(field=name, error=type(error).__name__)
        else:
            written[name] = value
    return written


def _check_portable(value: Any) -> None:
    """Raise for what one of the brokers could not carry in a header."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, int):
        value.to_bytes(8, signed=True)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("not a number of JSON")
    elif isinstance(value, list):
        for item in value:
            _check_portable(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            # RabbitMQ's names are short.
            if len(name.encode()) > _LONGEST_ID:
                raise ValueError("a name is too long")
            _check_portable(item)
    else:
        raise TypeError("no value of JSON")


def _fitting(written: dict[str, Any]) -> dict[str, Any]:
    """Leave out the largest fields until the rest fits."""
    while written and (size := len(json.dumps(written))) > _MAX_BYTES:
        largest = max(written, key=lambda name: len(json.dumps(written[name])))
        del written[largest]
        events.CONTEXT_TOO_LARGE.tell(field=largest, bytes=size, limit=_MAX_BYTES)
    return written


def _shown(kind: type[Context], written: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: masks.MASK if name in kind._masked else _told(value) for name, value in written.items()}
    if traceparent := shown.pop("traceparent", None):
        # What log and trace viewers look for.
        shown["trace_id"] = traceparent.split("-")[1]
    return shown


def _told(value: Any) -> Any:
    """Mask what is called a secret within a value; lines mask by the names of their fields."""
    return masks.shown("", value) if isinstance(value, dict | list) else value


# Picking up


def _with_picked_up(bound: Bound) -> Bound:
    """Add what libraries know that this program has imported, where nobody has said it here."""
    told: dict[str, Any] = {}
    if (traceparent := bound.values.get("traceparent")) is None and (traceparent := _of_opentelemetry()):
        told["traceparent"] = traceparent
    if bound.correlation_id is None:
        trace_id = traceparent.split("-")[1] if traceparent else None
        if correlation_id := _of_asgi_correlation_id() or _of_structlog() or trace_id:
            told["correlation_id"] = correlation_id
    return bound.plus(Bound(values=told, sent=told, shown=_shown(Context, told))) if told else bound


def _of_asgi_correlation_id() -> str | None:
    return _id_of("asgi_correlation_id.context", lambda module: module.correlation_id.get(None))


def _of_structlog() -> str | None:
    # django-structlog binds the latter.
    def find(module: Any) -> Any:
        bound = module.get_contextvars()
        return bound.get("correlation_id") or bound.get("request_id")

    return _id_of("structlog.contextvars", find)


def _id_of(module: str, find: Callable[[Any], Any]) -> str | None:
    if module not in sys.modules:
        return None
    try:
        found = str(find(sys.modules[module]) or "")
    except Exception:  # noqa: BLE001  (an edge: another library's business, and no reason not to send)
        return None
    return found if _is_id(found) else None


def _of_opentelemetry() -> str | None:
    module: Any = sys.modules.get("opentelemetry.trace")
    if module is None:
        return None
    try:
        span = module.get_current_span().get_span_context()
        text = f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags & 0xFF:02x}"
    except Exception:  # noqa: BLE001  (as above; another module may have the name while it is imported)
        return None
    return _valid_traceparent(text)


def _is_id(text: str) -> bool:
    return 0 < len(text) <= _LONGEST_ID and text.isascii() and text.isprintable() and " " not in text


def _valid_traceparent(text: str) -> str | None:
    # A later version may say more behind it.
    text = text[:55] if text[55:56] == "-" and text[:2] != "00" else text
    return text if _TRACEPARENT.fullmatch(text) else None


def _ascii(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("ascii", errors="replace").strip()
    return value.strip() if isinstance(value, str) else ""
