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
from uuid import UUID

import pytest
from celery.app import trace
from celery.utils.saferepr import saferepr
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AliasChoices, AliasPath, BaseModel, Field, RootModel, SecretStr, ValidationError
from typing_extensions import TypeAliasType

from celerykit import Redact, redact
from celerykit.contract import Contract
from celerykit.looks import STOCK, Look, letter, told
from celerykit.marks import names_of
from celerykit.redact import MASK, Secrets, clean, is_secret_name, scrub, secrets_in
from celerykit.scrubbing import scrub_error

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
    assert "4111" not in saferepr(shown, 1024)
    assert trace.saferepr is saferepr


def test_a_result_that_is_secret_as_a_whole_is_not_written() -> None:
    def give() -> Annotated[str, Redact()]: ...

    shown = told("hunter2", Look(Contract("give", give)))

    assert saferepr(shown, 1024) == MASK
    assert json.dumps(shown) == '"hunter2"'
    assert shown == "hunter2"
    assert told(None, look()) is None


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
