"""
A secret travels encrypted, wherever it is in a call or a result, or it does not travel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from typing import Annotated, Any, NamedTuple, cast

import hypothesis
import pytest
from celery import _state
from cryptography.fernet import Fernet
from hypothesis import strategies as st
from pydantic import (
    BaseModel,
    Field,
    InstanceOf,
    Json,
    Secret,
    SecretBytes,
    SecretStr,
    TypeAdapter,
    field_serializer,
    model_serializer,
)

from celerykit import Key, Once, shared_task
from celerykit.ciphers import Cipher, is_encrypted
from celerykit.contract import Contract
from celerykit.errors import InvalidContract, InvalidPayload, ResultMismatch
from celerykit.sealing import is_secret

OLD, NEW = Fernet.generate_key().decode(), Fernet.generate_key().decode()
CIPHER = Cipher([NEW])


class SecretDate(Secret[date]):
    def _display(self) -> str:
        return str(self.get_secret_value().year)


class Token(SecretStr):
    """A class of the user's own."""


class Span(NamedTuple):
    start: int
    end: int


class Login(BaseModel):
    user: str
    password: SecretStr
    data: SecretBytes = SecretBytes(b"\xff\x00")
    born: Secret[date] | None = None
    pin: Annotated[SecretStr, Field(min_length=4)] = SecretStr("0000")
    either: SecretStr | int = 3
    span: Span = Span(1, 2)
    metadata: Token | None = None
    default: bytes = b"x"
    others: list[Login] = []


def sealed(function: Any, *, cipher: Cipher | None = CIPHER, **how: Any) -> Contract:
    return Contract("shop.task", function, **how).with_cipher(lambda: cipher)


def taking(annotation: Any, **how: Any) -> Contract:
    def task(value: Any) -> None: ...

    task.__annotations__["value"] = annotation
    return sealed(task, **how)


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def sign_in(
    login: Login,
    token: SecretStr,
    keys: dict[SecretStr, int],
    *dates: Secret[date],
    more: Secret[int | bytes] | None = None,
) -> Secret[list[SecretStr]]: ...


LOGIN = Login(
    user="ann",
    password=SecretStr("hunter2"),
    born=Secret(date(2000, 1, 31)),
    either=SecretStr("hunter2"),
    metadata=Token("hunter2"),
    others=[Login(user="bob", password=SecretStr("hunter2"))],
)
ARGS = (
    LOGIN,
    SecretStr("hunter2"),
    {SecretStr("hunter2"): 1},
    Secret(date(2000, 1, 31)),
    SecretDate(date(2000, 1, 31)),
)
KWARGS = {"more": Secret(b"\xffhunter2")}


def texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (*texts_in(key), *texts_in(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


# On the way


@pytest.mark.parametrize("strict", [False, True])
def test_secrets_are_encrypted_wherever_they_are(strict: bool) -> None:
    contract = sealed(sign_in, strict=strict)

    args, kwargs = through_json(contract.dump(ARGS, KWARGS))

    assert sum(map(is_encrypted, texts_in([args, kwargs]))) == 14
    assert "hunter2" not in json.dumps([args, kwargs])
    assert "2000" not in json.dumps([args, kwargs])
    read_args, read_kwargs = contract.load(args, kwargs)
    assert read_args[:4] == list(ARGS[:4]) or read_args[:4] == ARGS[:4]
    assert read_args[4].get_secret_value() == date(2000, 1, 31)
    assert read_kwargs["more"].get_secret_value() == b"\xffhunter2"
    assert read_args[0].others[0].data.get_secret_value() == b"\xff\x00"


@pytest.mark.parametrize("strict", [False, True])
def test_what_was_written_may_be_written_again(strict: bool) -> None:
    contract = sealed(sign_in, strict=strict)
    once = through_json(contract.dump(ARGS, KWARGS))

    twice = through_json(contract.dump(*once))

    assert twice != once
    assert contract.load(*twice) == contract.load(*once)
    assert contract.canonical(*twice) == contract.canonical(*once) == contract.canonical(ARGS, KWARGS)


@pytest.mark.parametrize("strict", [False, True])
def test_of_one_argument_a_part_may_have_been_written_already(strict: bool) -> None:
    contract = sealed(sign_in, strict=strict)
    written = contract.dump(ARGS, {})[0]

    args, _ = contract.load(*contract.dump((*ARGS[:3], written[3], Secret(date(1999, 1, 1))), {}))

    assert [one.get_secret_value() for one in args[3:]] == [date(2000, 1, 31), date(1999, 1, 1)]


@hypothesis.given(st.text(st.characters(codec="utf-8")), st.binary(), st.dates())
def test_any_secret_comes_back_as_it_was(text: str, data: bytes, day: date) -> None:
    args = (SecretStr(text), [SecretBytes(data)], Secret(day))

    assert _any(*through_json(CONTRACT.dump(args, {})[0])) == args


def one_each(text: SecretStr, data: list[SecretBytes], day: Secret[date]) -> None: ...


CONTRACT = sealed(one_each)


def _any(*args: Any) -> Any:
    return tuple(CONTRACT.load(args, {})[0])


@pytest.mark.parametrize("strict", [False, True])
def test_a_foreign_producer_s_plain_secret_is_taken(strict: bool) -> None:
    contract = sealed(sign_in, strict=strict)
    plain = [{"user": "ann", "password": "hunter2", "born": "2000-01-31"}, "hunter2", {}, "2000-01-31"]

    args, _ = contract.load(plain, {"more": 7})

    assert args[0].password.get_secret_value() == args[1].get_secret_value() == "hunter2"
    assert args[0].born.get_secret_value() == args[3].get_secret_value() == date(2000, 1, 31)


def test_a_secret_must_be_what_it_should_be_inside() -> None:
    contract = sealed(sign_in)
    short = contract.dump(ARGS, {})[0][1]

    with pytest.raises(InvalidPayload, match=r"'login\.pin': Value should have at least 4 items"):
        contract.load(({"user": "a", "password": "b", "pin": CIPHER.encrypt(b'"1"')}, short, {}), {})
    with pytest.raises(InvalidPayload, match=r"'dates\.0': Input should be a valid date"):
        contract.load(({"user": "a", "password": "b"}, short, {}, CIPHER.encrypt(b'"hunter2"')), {})


@pytest.mark.parametrize(
    ("annotation", "given"),
    [
        (Sequence[SecretStr], ["hunter2"]),
        (set[SecretStr] | None, ["hunter2"]),
        (tuple[int, SecretStr], [1, "hunter2"]),
        (Json[list[SecretStr]], '["hunter2"]'),
    ],
)
def test_every_container_of_secrets_can_be_sent(annotation: Any, given: Any) -> None:
    contract = taking(annotation)
    contract.check_secrets()

    [written] = through_json(contract.dump((given,), {})[0])

    assert "hunter2" not in str(written)
    assert contract.load((written,), {})[0][0] == TypeAdapter(annotation).validate_python(given)


def test_a_text_is_no_secret_where_none_is_expected() -> None:
    def note(text: str, secret: SecretStr) -> None: ...

    token = CIPHER.encrypt(b'"hunter2"')

    args, _ = sealed(note).load((token, token), {})

    assert args[0] == token
    assert args[1].get_secret_value() == "hunter2"


@pytest.mark.parametrize(
    "annotation", [SecretStr, SecretBytes, Secret[int], Secret[list[SecretStr]], SecretDate, Token]
)
def test_what_pydantic_makes_of_a_secret_is_known(annotation: Any) -> None:
    """The shape of its schemas is pydantic's own affair: this test says with which version it changes."""
    schema: Any = TypeAdapter(annotation).core_schema

    assert is_secret(schema.get("lax_schema", schema))


# Signatures


def test_a_signature_that_waits_for_its_first_argument_encrypts_no_other_text() -> None:
    def note(secret: SecretStr, text: str, n: int = 1) -> None: ...

    contract = sealed(note)

    assert contract.dump_partial(("hello",), {}) == (("hello",), {})
    assert contract.dump_partial(("hello", 2), {}) == (("hello", 2), {})
    assert is_encrypted(contract.dump_partial((SecretStr("hello"),), {})[0][0])
    assert is_encrypted(contract.dump_partial(contract.dump_partial((SecretStr("hello"),), {})[0], {})[0][0])


# Keys


def test_another_key_or_none_is_an_error_that_says_so() -> None:
    args, kwargs = sealed(sign_in).dump(ARGS, {})
    plain = ({"user": "ann", "password": "x"}, args[1], {})

    with pytest.raises(InvalidPayload) as told:
        sealed(sign_in, cipher=Cipher([OLD])).load(plain, kwargs)
    assert str(told.value) == (
        "shop.task: argument 'token': Input is encrypted with a key that is not among CELERYKIT_SECRET_KEYS (got str). "
        "The task did not run."
    )
    with pytest.raises(InvalidPayload, match="'token': Input is encrypted, and CELERYKIT_SECRET_KEYS is not set here"):
        sealed(sign_in, cipher=None).load(plain, kwargs)
    assert sealed(sign_in, cipher=Cipher([OLD, NEW])).load(args, kwargs)[0][1] == SecretStr("hunter2")


def test_what_cannot_be_read_is_no_other_member_of_its_union() -> None:
    args, _ = taking(SecretStr | str).dump((SecretStr("hunter2"),), {})

    with pytest.raises(InvalidPayload, match="a secret is encrypted with a key that is not among"):
        taking(SecretStr | str, cipher=Cipher([OLD])).load(args, {})


def test_without_keys_nothing_is_sent_that_holds_a_secret() -> None:
    contract = sealed(sign_in, cipher=None)

    with pytest.raises(InvalidPayload, match=r"'login': holds a SecretStr, .* set CELERYKIT_SECRET_KEYS"):
        contract.check_secrets()
    with pytest.raises(InvalidPayload, match="needs CELERYKIT_SECRET_KEYS"):
        contract.dump(ARGS, {})


@pytest.mark.parametrize("annotation", [SecretStr, SecretBytes, Secret[int], list[SecretDate], Login, Token])
def test_every_kind_of_secret_is_known_for_one(annotation: Any) -> None:
    with pytest.raises(InvalidPayload, match="holds a SecretStr"):
        taking(annotation, cipher=None).check_secrets()


def test_a_contract_is_the_same_with_any_keys() -> None:
    contracts = [sealed(sign_in, cipher=cipher) for cipher in (None, CIPHER, Cipher([OLD]))]

    assert len({contract.fingerprint for contract in contracts}) == 1
    assert contracts[1].describe() == contracts[0].describe()
    assert "hunter2" not in repr(contracts[1].describe())


def test_a_contract_without_secrets_never_asks_for_keys() -> None:
    def task(n: int, data: bytes) -> str: ...

    contract = Contract("shop.task", task)

    assert contract.with_cipher(lambda: pytest.fail("asked")) is contract
    assert not contract.has_secrets
    assert contract.secret_values((1, b""), {}) == []


# Serializers of the user's


class OwnWay(BaseModel):
    password: SecretStr | None = None

    @field_serializer("password", when_used="json")
    def as_it_is(self, value: SecretStr | None) -> str | None:
        return value and value.get_secret_value()


class AllOwn(BaseModel):
    password: SecretStr

    @model_serializer
    def as_it_is(self) -> dict[str, Any]:
        return {"password": self.password.get_secret_value()}


class Many(BaseModel):
    passwords: list[SecretStr]

    @field_serializer("passwords")
    def as_they_are(self, values: list[SecretStr]) -> list[str]:
        return [value.get_secret_value() for value in values]


def test_a_serializer_that_writes_a_secret_as_it_is_has_no_say() -> None:
    contract = taking(OwnWay)

    contract.check_secrets()
    [written] = contract.dump((OwnWay(password=SecretStr("hunter2")),), {})[0]

    assert is_encrypted(written["password"])


@pytest.mark.parametrize("annotation", [AllOwn, list[AllOwn], Many, InstanceOf[SecretStr]])
def test_what_cannot_be_encrypted_is_not_sent(annotation: Any) -> None:
    with pytest.raises(InvalidPayload, match="has a serializer of its own, and so cannot be encrypted"):
        taking(annotation).check_secrets()


# Results


def test_a_result_is_stored_encrypted() -> None:
    contract = sealed(sign_in)

    stored = contract.dump_result(["hunter2"])

    assert is_encrypted(stored)
    assert [one.get_secret_value() for one in contract.load_result(stored).get_secret_value()] == ["hunter2"]
    with pytest.raises(ResultMismatch, match="encrypted with a key that is not among CELERYKIT_SECRET_KEYS"):
        sealed(sign_in, cipher=Cipher([OLD])).load_result(stored)
    with pytest.raises(ResultMismatch, match="a secret travels encrypted only"):
        sealed(sign_in, cipher=None).dump_result(["hunter2"])


# What others know of them


def test_the_secrets_of_a_call_are_known_where_it_runs() -> None:
    contract = sealed(sign_in)

    values = contract.secret_values(*contract.load(*contract.dump(ARGS, KWARGS)))

    assert values.count("hunter2") == 6
    assert values.count(date(2000, 1, 31)) == 3
    assert b"\xffhunter2" in values


def test_secrets_are_masked_by_name() -> None:
    assert {"password", "data", "born", "pin", "metadata", "token", "keys", "dates", "more", "return"} <= sealed(
        sign_in
    ).redacted
    assert "user" not in sealed(sign_in).redacted


def test_secrets_have_no_part_in_what_makes_two_calls_the_same() -> None:
    def task(user: str, tokens: set[SecretStr], day: SecretDate) -> None: ...

    contract = sealed(task)
    one = contract.canonical(("ann", {"a", "b"}, "2000-01-31"), {})

    assert one == contract.canonical(("ann", {"c", "d"}, "1999-01-01"), {})
    assert one != contract.canonical(("bob", {"a", "b"}, "2000-01-31"), {})


class Marked(BaseModel):
    password: Annotated[SecretStr | None, Key()]


@pytest.mark.parametrize("annotation", [Marked, Annotated[Secret[int], Key()], Annotated[list[SecretStr], Key()]])
def test_no_key_is_made_of_a_secret(app: Any, annotation: Any) -> None:
    def task(value: Any) -> None: ...

    task.__annotations__["value"] = annotation

    with pytest.raises(InvalidContract, match=r"Key\(\) stands on a secret"):
        app.task(task, once=Once())


def test_a_key_on_a_model_is_made_of_what_is_no_secret_in_it(app: Any) -> None:
    @app.task(once=Once())
    def task(login: Annotated[Login, Key()]) -> None: ...

    identify = task.claims.keys.identify

    assert identify(({"user": "ann", "password": "a"},), {}) == identify(({"user": "ann", "password": "b"},), {})
    assert identify(({"user": "ann", "password": "a"},), {}) != identify(({"user": "bob", "password": "a"},), {})


# In an app


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERYKIT_SECRET_KEYS", f"{NEW},{OLD}")


def declare(app: Any) -> Any:
    @app.task
    def change(user: str, password: SecretStr) -> SecretStr:
        return SecretStr(password.get_secret_value() + "!")

    @app.task
    def again(password: SecretStr, times: int = 1) -> SecretStr:
        return SecretStr(password.get_secret_value() * times)

    return change, again


@pytest.mark.usefixtures("keys")
def test_every_way_to_call_a_task_encrypts(eager: Any) -> None:
    change, again = declare(eager)
    secret = SecretStr("hunter2")

    results = [
        change.delay("ann", secret),
        change.apply_async(("ann", "hunter2")),
        change.s("ann", secret).delay(),
        change.s("ann").clone(kwargs={"password": secret}).delay(),
        change.apply(("ann",), {"password": secret}),
        *change.enqueue_many([("ann", secret)]),
    ]

    assert [result.get().get_secret_value() for result in results] == ["hunter2!"] * 6
    assert all(is_encrypted(result.result) for result in results)
    assert change.s("ann", secret).then(again, times=2).delay().get().get_secret_value() == "hunter2!hunter2!"
    for sig in (change.s("ann", secret), change.si("ann", password="hunter2"), change.map([]), again.map([secret])):
        assert "hunter2" not in json.dumps(sig)


@pytest.mark.usefixtures("keys")
def test_a_schedule_keeps_its_secrets_encrypted(app: Any) -> None:
    change, _ = declare(app)

    app.schedule(change.s("ann", SecretStr("hunter2")), every=timedelta(hours=1))

    [entry] = app.schedules.values()
    assert is_encrypted(entry["args"][1])
    assert change.contract.load(entry["args"], entry["kwargs"])[0][1] == SecretStr("hunter2")


def test_without_keys_every_way_to_call_a_task_is_refused(eager: Any) -> None:
    change, again = declare(eager)
    secret = SecretStr("hunter2")

    for call in (
        lambda: change.delay("ann", secret),
        lambda: change.apply(("ann", secret)),
        lambda: change.s("ann", secret),
        lambda: again.map([secret]),
        lambda: change.enqueue_many([("ann", secret)]),
        lambda: eager.schedule(change.s("ann", secret), every=1),
    ):
        with pytest.raises(InvalidPayload, match="CELERYKIT_SECRET_KEYS"):
            call()
    assert change.s("ann").args == ("ann",)


def test_a_shared_task_has_the_keys_of_each_of_its_apps(make_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is shared here is not of the apps of other tests.
    monkeypatch.setattr(_state, "_on_app_finalizers", set(cast("Any", _state)._on_app_finalizers))

    @shared_task(name="shared.secret")
    def shared(password: SecretStr) -> None: ...

    contracts = []
    for key in (OLD, NEW):
        monkeypatch.setenv("CELERYKIT_SECRET_KEYS", key)
        app = make_app()
        contracts.append(app.tasks["shared.secret"].contract)
        assert app.settings.kit.secret_keys == SecretStr(key)

    old, new = contracts
    assert Cipher([OLD]).decrypt(old.dump(("hunter2",), {})[0][0]) == b'"hunter2"'
    assert Cipher([NEW]).decrypt(new.dump(("hunter2",), {})[0][0]) == b'"hunter2"'


@pytest.mark.usefixtures("keys")
def test_a_secret_is_not_handed_on_to_an_argument_that_is_none(app: Any) -> None:
    change, again = declare(app)

    @app.task
    def greet(text: str) -> None: ...

    @app.task
    def maybe(password: SecretStr | None) -> None: ...

    with pytest.raises(InvalidPayload, match="argument 'text' is no secret, and would be the encrypted text"):
        change.s("ann", "hunter2").then(greet)
    assert change.s("ann", "hunter2").then(maybe)
    assert change.s("ann", "hunter2").then(again)
