"""
What is secret by its name or its mark, and what is left of texts and errors without it.
"""

from __future__ import annotations

import json
import pickle
import sys
import traceback
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, NamedTuple, TypedDict
from urllib.parse import quote, quote_plus
from uuid import UUID, uuid4

import pytest
import yaml
from celery import chain, signals
from celery.app import trace
from celery.events import EventDispatcher
from celery.utils.saferepr import saferepr
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AliasChoices, AliasPath, BaseModel, Field, RootModel, SecretStr, ValidationError
from typing_extensions import TypeAliasType

from celerykit import Redact, Task, redact
from celerykit.backends import RedisBackend
from celerykit.contract import Contract
from celerykit.looks import STOCK, Look, letter, plain, told
from celerykit.marks import names_of
from celerykit.redact import MASK, Secrets, clean, is_secret_name, scrub, secrets_in
from celerykit.scrubbing import scrub_error
from celerykit.worker.request import Request

HIDDEN = Annotated[str, Redact()]

# Names


@pytest.mark.parametrize(
    "name",
    [
        *("password", "new_password", "password2", "userPassword", "passwd", "db-pwd", "pass", "passphrase"),
        *("secret", "client_secret", "secrets", "token", "access_token", "X-Auth-Token", "jwt", "otp"),
        *("api_key", "apiKey", "APIKEY", "X-API-Key", "access_key", "private_key", "aws_secret_access_key"),
        *("Authorization", "auth", "cookie", "Set-Cookie", "credentials", "card_number", "cardNumber", "cvv", "cvc2"),
        *("ssn", "pin", "password_hash", "session_key"),
    ],
)
def test_what_is_secret_by_its_name(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "idempotency_key",
            "sort_key",
            "key",
            "keys",
            "args",
            "kwargs",
            "author",
            "authority",
            "compass",
            "passenger",
        ),
        *("token_count", "max_tokens", "tokens", "secret_name", "token_type", "password_changed_at", "has_password"),
        *("keyword", "mapping", "spin", "monkey", "secretary", ""),
    ],
)
def test_what_is_not(name: str) -> None:
    assert not is_secret_name(name)


class Card(BaseModel):
    number: HIDDEN = Field(alias="no", validation_alias=AliasChoices("n", AliasPath("old", "card_no")))
    holder: str = ""
    next: Card | None = None


class Pair(NamedTuple):
    left: str
    right: HIDDEN


class Typed(TypedDict):
    plain: str
    hidden: Annotated[list[str], Redact]


@dataclass
class Data:
    hidden: Annotated[bytes, Redact()]
    plain: str = ""


Wrapped = TypeAliasType("Wrapped", Annotated[str, Redact()])


class Root(RootModel[list[HIDDEN]]):
    pass


@pytest.mark.parametrize(
    ("annotation", "names"),
    [
        (HIDDEN, {"it"}),
        (list[HIDDEN], {"it"}),
        (dict[str, list[HIDDEN | None]], {"it"}),
        (list[Card] | None, {"number", "no", "n", "card_no"}),
        (Pair, {"it"}),
        (Typed, {"hidden"}),
        (Data, {"hidden"}),
        (Wrapped, {"it"}),
        (Root, {"it"}),
        (str, set()),
    ],
)
def test_marks_are_found_by_the_nearest_name(annotation: Any, names: set[str]) -> None:
    assert names_of({"it": annotation}, Redact) == names


def test_a_contract_knows_the_names_of_its_parameters_and_of_its_result() -> None:
    def pay(card: Card, *more: HIDDEN, login: SecretStr, **rest: int) -> HIDDEN: ...

    assert Contract("pay", pay).redacted == {"number", "no", "n", "card_no", "more", "login", "return"}


# Values


def test_the_secret_texts_of_a_value() -> None:
    value = {"user": "ada", "password": "hunter2", "cards": [{"number": 4111}], "nothing": {"token": None}, "otp": "12"}

    assert {*secrets_in(value, {"cards"})} == {"hunter2", "4111"}
    assert {*secrets_in(Card(n="4111"))} == {"4111"}
    assert {*secrets_in({"authorization": "Bearer abc.def"})} == {"Bearer abc.def", "abc.def"}
    assert {*secrets_in(SecretStr("grapes"))} == {"grapes"}


SECRET = st.text(min_size=3).filter(lambda text: text.strip("*"))


def written(text: str) -> list[str]:
    """Write a text in the ways in which it comes into others."""
    as_json = [json.dumps(text), json.dumps({"a": [text]}, ensure_ascii=False)]
    shown = [repr(text), repr([text, "'"]), repr((text, '"')), ascii(text), repr(as_json[0]), json.dumps(repr(text))]
    encoded = text.encode(errors="surrogatepass")
    return [
        text,
        f"<{text}>",
        *as_json,
        *shown,
        repr(encoded),
        repr(b"'\"" + encoded),
        quote(encoded),
        quote_plus(encoded),
    ]


@given(st.lists(SECRET, min_size=1, max_size=4), st.text(), st.text())
def test_no_text_has_a_secret_in_it_after_scrubbing(values: list[str], before: str, after: str) -> None:
    secrets = Secrets(values)

    for value in values:
        for text in written(value):
            scrubbed = secrets.scrub(before + text + after)
            assert not any(one in scrubbed for one in values)
            assert not any(one in scrubbed for one in written(value) if len(one) > 4 and one.strip("*'\"<>"))


@given(SECRET, st.integers(25, 60))
def test_a_secret_that_was_cut_is_taken_out_by_its_beginning(value: str, length: int) -> None:
    long = (value.strip() or "abc").split()[0] * length

    assert long[:20] not in Secrets([long]).scrub(f"it was {long[:22]}...")


def test_what_has_no_secret_stays() -> None:
    assert Secrets(["hunter2"]).scrub("hunter1 and hunter3") == "hunter1 and hunter3"
    assert Secrets(["ab", "***", ""]).values == frozenset()


def test_many_secrets_cost_little() -> None:
    secrets = Secrets(f"secret-{number}" for number in range(5000))

    assert secrets.scrub("a line of log, " * 100 + "secret-4999").endswith(", ***")


# The running call


def test_the_secrets_of_a_call_are_known_while_it_runs() -> None:
    assert not redact.is_active()
    outer = redact.bind(["hunter2"])
    inner = redact.bind(["grapes"])
    assert scrub("hunter2 grapes") == "*** ***"
    redact.unbind(inner)
    assert scrub("hunter2 grapes") == "*** grapes"
    redact.unbind(outer)

    assert scrub("hunter2") == "hunter2"
    assert not redact.is_active()
    assert redact.bind([]) is None


def test_what_is_told_is_cleaned() -> None:
    bound = redact.bind(["hunter2"])
    try:
        told = clean({"a": "hunter2!", "password": "x", "card": Card(n="4111"), "at": Decimal(1), "n": [None, True, 7]})
        assert told == {
            "a": "***!",
            "password": MASK,
            "card": {"number": MASK, "holder": "", "next": None},
            "at": Decimal(1),
            "n": [None, True, 7],
        }
        assert clean(ValueError("hunter2")) == "ValueError: ***"
        assert clean(SecretStr("x")) == MASK
    finally:
        redact.unbind(bound)


def test_what_contains_itself_is_cleaned() -> None:
    endless: list[Any] = []
    endless.append(endless)

    assert "…" in repr(clean(endless))
    assert [*secrets_in(endless)] == []
    crowd: dict[str, Any] = {"token": "abc"}
    crowd["friends"] = [crowd] * 10
    assert clean(crowd)["token"] == MASK
    assert {*secrets_in(crowd)} == {"abc"}


def test_a_key_may_be_anything() -> None:
    class Broken:
        __repr__ = None  # type: ignore[assignment]

    assert clean({Broken(): 1, 2: "x"}) == {"<Broken>": 1, "2": "x"}


# Looks


class Item(BaseModel):
    sku: str
    more: dict[str, Any] = {}


class Order(BaseModel):
    order_id: str
    amount: Decimal
    card: HIDDEN
    items: list[Item] = []
    other: Order | None = None


def look() -> Look:
    def charge(
        order: Order, *rest: HIDDEN, currency: str = "EUR", either: Item | Card | None = None, **more: Item
    ) -> Order: ...

    return Look(Contract("charge", charge))


def order(**fields: Any) -> dict[str, Any]:
    return {"order_id": "7c1f", "amount": "9.50", "card": "4111", **fields}


def test_arguments_are_written_by_their_types() -> None:
    items = [{"sku": "a", "more": {"b": 1}}]

    args, kwargs = look().arguments(
        (order(items=items), "x"), {"currency": "EUR", "token": None, "extra": {"sku": "c"}}
    )

    assert args == "(Order(order_id='7c1f', amount='9.50', card=***, items=[Item(...)]), ***)"
    assert kwargs == "{'currency': 'EUR', 'token': None, 'extra': Item(sku='c')}"
    assert look().arguments((order(),), {}) == ("(Order(order_id='7c1f', amount='9.50', card=***),)", "{}")
    assert look().result(order()) == "Order(order_id='7c1f', amount='9.50', card=***)"


def test_what_is_not_known_is_masked_by_name() -> None:
    args, kwargs = STOCK.arguments(([1, "two"], {"task": "shop.pay", "args": ["x"], "kwargs": {}}), {"it": [["4111"]]})

    assert (args, kwargs) == ("([1, 'two'], shop.pay(...))", "{'it': ***}")
    assert STOCK.named({"api_key": "x", "url": "redis://u:p@h/0", "n": True}) == (
        "{'api_key': ***, 'url': 'redis://u:***@h/0', 'n': True}"
    )


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=50))
def test_a_description_is_as_long_as_it_may_be_at_most(value: Any) -> None:
    shown = STOCK.positional((value, {"x": value}), 60)

    assert len(shown) < 60 * 11  # in escapes
    assert shown.startswith("(")
    assert shown.endswith(")")


def test_of_what_is_long_only_as_much_is_looked_at_as_is_shown() -> None:
    class Untouched(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("it was looked at")

    assert STOCK.positional(("x" * 5000, Untouched([1]))).endswith("...', ...)")
    assert len(STOCK.positional((list(range(10**6)),))) < 1100


def test_a_call_s_secrets_are_those_of_its_names() -> None:
    assert look().secrets((order(), "rest"), {"currency": "EUR", "password": "hunter2"}) == ["4111", "rest", "hunter2"]

    def typed(a: int, b: list[Item]) -> None: ...

    def closed(a: int, b: str) -> None: ...

    assert Look(Contract("typed", typed)).secrets((1, [{"sku": "", "more": {"token": "abc"}}]), {}) == ["abc"]
    assert Look(Contract("closed", closed)).secrets((1, "x"), {}) == []


def test_arguments_keep_their_shape_when_they_are_masked() -> None:
    args, kwargs = look().masked((order(), "x"), {"currency": "EUR"})

    assert args == [{**order(), "card": MASK}, MASK]
    assert kwargs == {"currency": "EUR"}
    assert look().masked_result(order())["card"] == MASK


@pytest.mark.parametrize("result", [order(), [order()], []])
def test_a_result_is_what_it_was_and_celery_writes_it_by_its_look(result: Any) -> None:
    shown = told(result, look())

    assert shown == result
    assert json.loads(json.dumps(shown)) == result
    assert type(pickle.loads(pickle.dumps(shown))) is type(result)
    assert type(plain(shown)) is type(result)
    assert "4111" not in saferepr(shown, 1024)
    assert trace.saferepr is saferepr


def test_a_result_that_is_secret_as_a_whole_is_not_written() -> None:
    def give() -> Annotated[str, Redact()]: ...

    shown = told("hunter2", Look(Contract("give", give)))

    assert saferepr(shown, 1024) == MASK
    assert json.dumps(shown) == '"hunter2"'
    assert pickle.loads(pickle.dumps(shown)) == "hunter2"
    assert shown == "hunter2"
    assert told(None, look()) is None


@pytest.mark.parametrize(
    "result", ["no hunter2", {"it": "no hunter2"}, ["x" * 1010 + "hunter2"], {"hunter2": 1}, 998877]
)
def test_a_result_is_written_without_the_secrets_of_its_run(result: Any) -> None:
    bound = redact.bind(["hunter2", "998877"])
    try:
        shown = saferepr(told(result, look()), 1024)
    finally:
        redact.unbind(bound)

    assert MASK in shown
    assert "hun" not in shown
    assert "998877" not in shown


@pytest.mark.parametrize("result", ["plain", 998, 1.5, True, None])
def test_one_that_has_none_stays_of_its_class(result: Any) -> None:
    bound = redact.bind(["hunter2"])
    try:
        assert told(result, look()) is result
    finally:
        redact.unbind(bound)


@pytest.mark.parametrize("result", [order(), [order()], "hunter2", 1, 1.5])
def test_our_backends_hand_a_serializer_what_the_task_returned(result: Any, make_app: Any) -> None:
    def give() -> Annotated[str, Redact()]: ...

    backend = RedisBackend(app=make_app(), url="redis://nowhere", serializer="yaml")
    encoded = backend.encode_result(told(result, Look(Contract("give", give))), "SUCCESS")

    assert type(encoded) is type(result)
    assert yaml.safe_load(yaml.safe_dump(encoded)) == result


def test_a_dead_letter_is_shown_without_secrets() -> None:
    chain = [{"task": "charge", "args": [order()], "kwargs": {}, "options": {}}]
    facts = {
        "note": {"message": "KeyError: '4111'", "ledger": []},
        "body": [[order()], {"password": "hunter2"}, {"chain": chain, "callbacks": None}],
        "headers": {"task": "charge", "argsrepr": "('4111',)", "id": "1", "authorization": "x"},
    }

    shown = letter(facts, lambda name: look() if name == "charge" else STOCK)

    assert "4111" not in json.dumps(shown)
    assert "hunter2" not in json.dumps(shown)
    assert shown["headers"]["argsrepr"] == "(Order(order_id='7c1f', amount='9.50', card=***),)"
    assert shown["headers"]["authorization"] == MASK
    assert shown["body"][0] == [{**order(), "card": MASK}]


# Errors

KNOWN = Secrets(["hunter2", "4111-1111-1111"])


def all_of(error: BaseException) -> str:
    """Write an error in every way, but for the lines of this file in its traceback."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(line for line in lines if not line.startswith("    ")) + repr(error) + repr(vars(error))


class Declined(Exception):
    def __init__(self, text: str, *, card: str) -> None:
        super().__init__(text)
        self.card = card


class Slotted(Exception):
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def __str__(self) -> str:
        return f"{self.value}"


class Stubborn(Exception):
    def __str__(self) -> str:
        return "hunter2"


def unreadable() -> UnicodeDecodeError:
    return UnicodeDecodeError("utf-8", b"\xffhunter2", 0, 1, "hunter2")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("it is hunter2"),
        KeyError("hunter2", {"a": ["4111-1111-1111"]}),
        OSError(2, "no", "/hunter2"),
        unreadable(),
        Declined("no", card="4111-1111-1111"),
        Slotted("hunter2"),
        ValueError(b"hunter2", order(card="hunter2"), Order(**order(card="hunter2"))),
        ExceptionGroup("two", [ValueError("hunter2"), Declined("hunter2", card="")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_scrubbed_in_place(error: BaseException) -> None:
    assert scrub_error(error, KNOWN) is error
    assert "hunter2" not in all_of(error)
    assert "4111" not in all_of(error)


class Placed(Exception):
    """Keeps what it is about, as many errors do."""

    def __init__(self, order: Any) -> None:
        super().__init__(order)
        self.order = order


class Vague(Placed):
    def __init__(self, order: Any = None) -> None:
        super().__init__(order)
        self.args = ()


class Telling(Vague):
    def __str__(self) -> str:
        return f"{self.order} was declined"


class Counting(Placed):
    def __str__(self) -> str:
        return f"{len(self.args[0].items)} items of hunter2"


def placed(**fields: Any) -> Order:
    return Order.model_validate(order(card="4111-1111-1111", **fields))


class Line(NamedTuple):
    sku: str
    card: HIDDEN


def test_an_object_that_an_error_keeps_stays_that_object() -> None:
    given = placed()
    error = Placed(given)

    scrubbed: Any = scrub_error(error, KNOWN)

    assert scrubbed is error
    assert scrubbed.order is given
    assert scrubbed.order.card == "4111-1111-1111"
    assert "4111" not in str(scrubbed) + repr(scrubbed)


@pytest.mark.parametrize(
    ("given", "card"),
    [
        (placed(other=placed()), lambda kept: kept.other.card),
        ([placed()], lambda kept: kept[0].card),
        (Data(b"4111-1111-1111", "hunter2"), lambda kept: kept.hidden),
        (Line("a", "4111-1111-1111"), lambda kept: kept.card),
    ],
    ids=lambda given: type(given).__name__,
)
def test_among_its_arguments_is_a_copy_whose_secret_fields_are_masked(given: Any, card: Any) -> None:
    error = ValueError(given)

    assert scrub_error(error, KNOWN) is error
    [kept] = error.args
    assert type(kept) is type(given)
    assert card(kept) == MASK
    assert card(given) != MASK
    assert "hunter2" not in repr(error)


def test_an_error_whose_text_shows_what_it_keeps_has_a_copy_of_it() -> None:
    error = Telling(placed(other=placed()))

    scrubbed: Any = scrub_error(error, KNOWN)

    assert scrubbed is error
    assert isinstance(scrubbed.order, Order)
    assert scrubbed.order.order_id == "7c1f"
    assert "4111" not in str(scrubbed)


def test_one_whose_text_can_no_longer_be_made_is_replaced_by_its_text_of_before() -> None:
    class Basket:
        items = (1, 2)

        def __repr__(self) -> str:
            return "Basket(hunter2)"

    scrubbed = scrub_error(Counting(Basket()), KNOWN)

    assert type(scrubbed).__name__ == "Counting"
    assert str(scrubbed) == "2 items of ***"


def test_an_error_that_is_stored_whole_has_only_copies() -> None:
    error = Vague([placed(), SecretStr("hunter2")])

    stored = pickle.dumps(scrub_error(error, KNOWN, is_stored_whole=True))

    assert b"4111" not in stored
    assert b"hunter2" not in stored
    assert error.order[0].order_id == "7c1f"
    assert isinstance(error.order[1], SecretStr)


def test_a_value_that_contains_itself_is_copied_once() -> None:
    @dataclass
    class Node:
        hidden: HIDDEN
        nodes: list[Any]

    node = Node("hunter2", [])
    node.nodes += [node] * 20

    assert "hunter2" not in repr(scrub_error(ValueError(node), KNOWN))


def test_an_error_that_cannot_be_changed_is_replaced_under_its_name() -> None:
    scrubbed = scrub_error(Stubborn(), KNOWN)

    assert type(scrubbed).__name__ == "Stubborn"
    assert type(scrubbed).__module__ == __name__
    assert str(scrubbed) == MASK


def test_so_is_a_group_whose_text_or_members_are() -> None:
    scrubbed: Any = scrub_error(ExceptionGroup("hunter2", [ValueError(1), Stubborn()]), KNOWN)

    assert isinstance(scrubbed, ExceptionGroup)
    assert [type(error).__name__ for error in scrubbed.exceptions] == ["ValueError", "Stubborn"]
    assert "hunter2" not in all_of(scrubbed)


def test_what_led_to_an_error_is_scrubbed_with_it() -> None:
    try:
        try:
            Item.model_validate({"sku": 4, "hunter2": "4111-1111-1111" * 20, "more": "4111-1111-1111" * 5})
        except ValidationError as first:
            first.add_note("of hunter2")
            raise KeyError("hunter2") from first
    except KeyError:
        try:
            raise RuntimeError("third")
        except RuntimeError as third:
            scrubbed: Any = scrub_error(third, KNOWN)

    cause = scrubbed.__context__.__cause__
    assert isinstance(cause, ValidationError)
    assert [found["type"] for found in cause.errors()] == ["string_type", "dict_type"]
    for text in ("hunter2", "4111"):
        assert text not in all_of(scrubbed)
        assert text not in repr(cause.errors())
    assert "of ***" in all_of(scrubbed)


def test_errors_that_lead_to_themselves_have_an_end() -> None:
    first, second = ValueError("hunter2"), ValueError("b")
    first.__context__, second.__context__ = second, first

    assert scrub_error(first, KNOWN) is first


@given(st.lists(st.text() | st.integers() | st.binary() | st.none(), max_size=3), SECRET)
def test_no_error_shows_a_secret(args: list[Any], value: str) -> None:
    secrets = Secrets([value])
    error = ValueError(*args, value, {value: [value]})
    error.__cause__ = KeyError(value)

    scrubbed = scrub_error(error, secrets)

    shown = str(scrubbed) + repr(scrubbed)
    assert secrets.scrub(shown) == shown


# In a run


@pytest.fixture
def app(eager: Any) -> Any:
    return eager


def test_a_call_is_described_when_it_is_sent(make_app: Any) -> None:
    app = make_app()

    @app.task
    def pay(order: Order, password: str = "") -> None: ...

    message = app.amqp.as_task_v2("1", pay.name, (order(),), {"password": "hunter2"})

    assert message.headers["argsrepr"] == "(Order(order_id='7c1f', amount='9.50', card=***),)"
    assert message.headers["kwargsrepr"] == "{'password': ***}"
    assert app.amqp.as_task_v2("1", pay.name, (order(),), argsrepr="(…)").headers["argsrepr"] == "(…)"
    assert app.amqp.as_task_v2("1", pay.name, (order(),), argsrepr="").headers["argsrepr"] != ""
    assert app.amqp.as_task_v2("1", "unknown", ({"token": "x"},)).headers["argsrepr"] == "({'token': ***},)"
    sent = app.amqp.as_task_v1("1", pay.name, (order(),), create_sent_event=True).sent_event
    assert "4111" not in sent["args"]


def run(app: Any, queue: str) -> list[str]:
    """Run what is in a queue, as a pool's process does, and give the texts that Celery makes of the results."""
    texts = []
    with app.connection_for_read() as connection:
        while (message := connection.default_channel.basic_get(queue, no_ack=True)) is not None:
            request = Request(message, app=app, hostname="unit@here")
            kinds = (request.content_type, request.content_encoding)
            ran = trace.trace_task_ret(request.type, request.id, request.request_dict, request.body, *kinds, app=app)
            texts.append(ran[1])
    return texts


@pytest.fixture
def queue() -> str:
    return f"redact-{uuid4().hex}"


def test_what_a_run_sends_is_described_without_its_secrets(make_app: Any, queue: str) -> None:
    app = make_app(task_default_queue=queue, task_send_sent_event=True)
    sent: list[Any] = []
    told: list[Any] = []

    @app.task
    def tail(text: str) -> str:
        return text

    @app.task(bind=True)
    def head(self: Any, card: HIDDEN) -> str:
        tail.delay(f"no {card}")
        tail.apply_async((card,), shadow=f"of {card}", argsrepr=f"({card})")
        app.send_task("nowhere.known", (card, "x" * 1010 + card), {"a": card}, queue=f"{queue}-2")
        self.app.amqp.as_task_v1("1", "nowhere.known", (card,), create_sent_event=True)
        told.append(self.app.amqp.as_task_v1("1", tail.name, (card,), create_sent_event=True).sent_event)
        told.append(self.app.amqp.as_task_v2("1", tail.name, (card,), create_sent_event=True).sent_event)
        return f"charged {card}"

    def keep(headers: Any, **_: Any) -> None:
        sent.append({name: headers[name] for name in ("shadow", "argsrepr", "kwargsrepr")})

    chain(head.s("4111-1111"), tail.s())()
    signals.before_task_publish.connect(keep)
    try:
        texts = run(app, queue)
    finally:
        signals.before_task_publish.disconnect(keep)

    assert len(sent) == 4
    assert len(texts) == 4
    assert texts[0] == "'charged ***'"
    assert "4111" not in repr(sent) + repr(told)
    assert sent[1] == {"shadow": "of ***", "argsrepr": "(***)", "kwargsrepr": "{}"}


def test_an_event_of_a_task_s_own_has_no_secrets(make_app: Any, queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(task_default_queue=queue)
    sent: list[Any] = []
    monkeypatch.setattr(EventDispatcher, "send", lambda _, kind, **fields: sent.append((kind, fields)))

    @app.task(bind=True)
    def pay(self: Any, card: HIDDEN) -> None:
        self.send_event("task-progress", note=f"card {card}", done=5)

    pay.delay("4111-1111")
    run(app, queue)

    [(kind, fields)] = sent
    assert kind == "task-progress"
    assert fields["note"] == "card ***"
    assert fields["done"] == 5


def test_hooks_get_the_error_with_what_it_keeps(make_app: Any, queue: str) -> None:
    app = make_app(task_default_queue=queue)
    seen: list[Any] = []

    class Refunding(Task[..., Any]):
        def on_failure(self, exc: Any, *_: Any) -> None:
            seen.append(exc.order)

    @app.task(base=Refunding)
    def pay(order: Order) -> int:
        raise Placed(order)

    sent = pay.delay(Order(**order()))
    run(app, queue)

    assert isinstance(seen[0], Order)
    stored = app.backend.get(app.backend.get_key_for_task(sent.id))
    assert json.loads(stored)["result"]["exc_type"] == "Placed"
    assert b"4111" not in (stored if isinstance(stored, bytes) else stored.encode())


def test_a_pickled_error_has_no_secret_in_what_it_keeps(make_app: Any, queue: str) -> None:
    app = make_app(task_default_queue=queue, result_serializer="pickle", accept_content=["json", "pickle"])

    @app.task
    def pay(order: Order) -> int:
        raise Vague(order)

    sent = pay.delay(Order(**order(card="4111-1111")))
    run(app, queue)

    stored: Any = app.AsyncResult(sent.id).result
    assert type(stored).__name__ == "Vague"
    assert stored.order.order_id == "7c1f"
    assert stored.order.card == MASK


@pytest.mark.parametrize("serializer", ["json", "pickle", "yaml"])
def test_a_result_can_be_stored_and_passed_on_by_any_serializer(make_app: Any, queue: str, serializer: str) -> None:
    app = make_app(
        task_default_queue=queue,
        result_serializer=serializer,
        accept_content=["json", "pickle", "yaml"],
    )
    seen: list[Any] = []

    @app.task
    def give(n: int) -> Any:
        return {"n": n}

    @app.task
    def keep(given: Any, n: int = 0) -> list[Any]:
        seen.append(given)
        return [given]

    sent = chain(give.s(1), keep.s(n=2))()
    run(app, queue)

    assert sent.get(timeout=1) == [{"n": 1}]
    assert sent.parent.get(timeout=1) == {"n": 1}
    assert seen == [{"n": 1}]


def test_a_result_is_passed_on_plainly_where_it_is_told(make_app: Any) -> None:
    app = make_app()

    for make in (app.amqp.as_task_v1, app.amqp.as_task_v2):
        body = make("1", "nowhere.known", (told({"n": 1}, look()), 2)).body
        args = body["args"] if isinstance(body, dict) else body[0]
        assert [type(value) for value in args] == [dict, int]


def test_a_run_s_error_is_scrubbed_and_its_secrets_are_forgotten(app: Any) -> None:
    seen = []

    @app.task
    def pay(card: HIDDEN) -> None:
        seen.append(scrub(card))
        raise KeyError(f"no {card}")

    result = pay.apply(("4111-1111",))

    assert seen == [MASK]
    assert repr(result.result) == "KeyError('no ***')"
    assert "4111" not in result.traceback
    assert not redact.is_active()


def test_a_task_that_runs_within_another_has_the_secrets_of_both(app: Any) -> None:
    @app.task
    def inner(token: str) -> None:
        raise ValueError(f"{token} hunter2")

    @app.task
    def outer(password: str) -> str:
        inner.apply(("abcdef",), throw=False)
        return scrub("hunter2 abcdef")

    assert outer.apply(("hunter2",)).get() == "*** abcdef"


def test_a_policy_sees_the_error_as_it_was(app: Any) -> None:
    seen: list[str] = []

    def step(call_next: Any, call: Any) -> Any:
        try:
            return call_next(call)
        except ValueError as error:
            seen.append(str(error))
            raise

    app.call_steps = (*app.call_steps, step)

    @app.task
    def pay(card: HIDDEN) -> None:
        raise ValueError(card)

    assert str(pay.apply(("4111-1111",)).result) == MASK
    assert seen == ["4111-1111"]


def test_a_refused_call_does_not_tell_what_a_validator_quotes(app: Any) -> None:
    class Strict(BaseModel):
        number: HIDDEN

        def model_post_init(self, _: Any) -> None:
            raise ValueError(f"{self.number} is none")

    @app.task
    def pay(card: Strict) -> None: ...

    with pytest.raises(TypeError) as refused:
        pay.delay({"number": "4111-1111"})

    assert "4111" not in all_of(refused.value)
    assert MASK in str(refused.value)


def test_numbers_and_ids_that_are_secret_are_taken_out(app: Any) -> None:
    @app.task
    def pay(pin: Annotated[int, Redact()], ref: Annotated[UUID, Redact()]) -> None:
        raise ValueError(f"{pin} {ref}", pin, ref)

    shown = repr(pay.apply((987654, UUID(int=7))).result)

    assert "987654" not in shown
    assert str(UUID(int=7)) not in shown


def test_sentry_is_not_imported_for_this() -> None:
    assert "sentry_sdk" not in sys.modules
