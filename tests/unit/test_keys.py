"""Keys for people: found, shown, named by their calls, and let go."""

from __future__ import annotations

from typing import Annotated, Any

import pytest

from celerykit import Key, Once
from celerykit.errors import InvalidOptions, InvalidPayload, StoreUnavailable
from celerykit.idempotency.claim import State, Turn
from celerykit.idempotency.claims import Run
from celerykit.idempotency.sending import Asked
from celerykit.keys import KeyInUse, KeyNotFound, Keyring
from celerykit.stores import New, Swap
from celerykit.stores.memory import MemoryStore


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shop(app: Any, clock: Clock) -> Any:
    app._store = MemoryStore(clock=clock)

    @app.task(name="shop.charge", once=Once(keep=3600))
    def charge(order: Annotated[int, Key()], *, note: str = "") -> int:
        return order

    @app.task(name="shop.charges", once=Once())
    def charges(order: int) -> None: ...

    @app.task(name="shop.ship", remember=True)
    def ship(order: int) -> None: ...

    @app.task(name="shop.plain")
    def plain(order: int) -> None: ...

    return app


@pytest.fixture
def keyring(shop: Any) -> Keyring:
    return Keyring(shop)


def sent(shop: Any, order: int, *, task: str = "shop.charge", call: str = "first") -> str:
    """Claim the key of a call, as who sends it does."""
    claims = shop.tasks[task].claims
    identity = claims.identify((order,), {}, id=call)
    claims.send(Asked(claims, identity, call))
    return str(identity.key)


def running(shop: Any, order: int, *, call: str = "first") -> Run:
    claims = shop.tasks["shop.charge"].claims
    sent(shop, order, call=call)
    started = claims.start(claims.identify((order,), {}, id=call), call, Turn(), token="", joined=None, was_sent=True)
    return started.run


def done(shop: Any, order: int, *, result: Any = None) -> str:
    run = running(shop, order)
    shop.tasks["shop.charge"].claims.finish(run, result)
    return run.key.removeprefix("once:")


# Found


def test_all_keys_are_found_with_what_is_known_of_them(shop: Any, keyring: Keyring):
    keys = {sent(shop, 1, call="a"), sent(shop, 2, call="b"), sent(shop, 3, task="shop.charges", call="c")}

    found = {held.key: held for held in keyring.find()}

    assert set(found) == keys
    assert {held.claim.id for held in found.values()} == {"a", "b", "c"}
    assert {held.claim.state for held in found.values()} == {State.CLAIMED}
    assert {held.task for held in found.values()} == {"shop.charge", "shop.charges"}


@pytest.mark.parametrize(
    ("task", "ids"),
    [
        ("shop.charge", {"a"}),
        ("shop.charge*", {"a", "b"}),
        ("shop.charge?", {"b"}),
        ("*s", {"b"}),
        ("shop", set()),
        (None, {"a", "b"}),
    ],
)
def test_keys_are_found_by_task(shop: Any, keyring: Keyring, task: str | None, ids: set[str]):
    sent(shop, 1, call="a")
    sent(shop, 1, task="shop.charges", call="b")

    assert {held.claim.id for held in keyring.find(task=task)} == ids


def test_keys_are_found_by_task_object_and_state(shop: Any, keyring: Keyring):
    sent(shop, 1, call="queued")
    running(shop, 2, call="runs")

    assert [held.claim.id for held in keyring.find(task=shop.tasks["shop.charge"], state="running")] == ["runs"]


def test_what_is_no_claim_is_left_out(shop: Any, keyring: Keyring):
    shop.store.swap(Swap("once:shop.charge:0", None, New("1", "nonsense", ttl=60)))
    shop.store.swap(Swap("beat:shop", None, New("1", "{}", ttl=60)))

    assert list(keyring.find()) == []
    with pytest.raises(KeyNotFound):
        keyring.get("shop.charge:0")


# One of them


def test_beginning_of_a_key_is_enough_if_no_other_begins_so(shop: Any, keyring: Keyring):
    key = sent(shop, 1)

    assert keyring.get(key).key == keyring.get(key[:16]).key == keyring.get("shop.ch").key == key


def test_beginning_of_several_keys_names_some(shop: Any, keyring: Keyring):
    keys = [sent(shop, order, call=str(order)) for order in range(9)]

    with pytest.raises(KeyNotFound, match=r"Several keys begin with 'shop': .*, …\. Give more of it") as error:
        keyring.get("shop")

    assert sum(key in str(error.value) for key in keys) == 3


def test_key_that_nobody_holds(keyring: Keyring):
    with pytest.raises(KeyNotFound, match=r"There is no key shop\.charge:1234"):
        keyring.get("shop.charge:1234")


def test_key_is_named_by_any_spelling_of_its_call(shop: Any, keyring: Keyring):
    charge, key = shop.tasks["shop.charge"], sent(shop, 1)

    spellings = [((1,), {}), ((), {"order": 1}), (("1",), {"note": "other"})]
    assert {keyring.key_of(charge, args, kwargs) for args, kwargs in spellings} == {key}
    assert keyring.key_of(charge, (1,), key="mine") != key


def test_key_is_named_by_the_id_of_the_call_that_holds_it(shop: Any, keyring: Keyring):
    key, remembered = sent(shop, 1, call="a"), sent(shop, 1, task="shop.ship", call="b")

    assert keyring.of_call(shop.tasks["shop.charge"], "a").key == key
    assert keyring.of_call(shop.tasks["shop.ship"], "b").key == remembered
    for task in ("shop.charge", "shop.ship"):
        with pytest.raises(KeyNotFound):
            keyring.of_call(shop.tasks[task], "nobody")


def test_calls_without_keys_say_why(shop: Any, keyring: Keyring):
    with pytest.raises(InvalidOptions, match="neither once"):
        keyring.key_of(shop.tasks["shop.plain"], (1,))
    with pytest.raises(InvalidOptions, match="by their ids"):
        keyring.key_of(shop.tasks["shop.ship"], (1,))
    with pytest.raises(InvalidPayload):
        keyring.key_of(shop.tasks["shop.charge"], ("one",))


# Let go


def test_key_that_is_let_go_is_free(shop: Any, keyring: Keyring):
    key = done(shop, 1)

    assert keyring.release(key[:20]).claim.state is State.DONE
    assert list(keyring.find()) == []
    with pytest.raises(KeyNotFound):
        keyring.release(key)


def test_key_of_a_run_is_let_go_by_force_only(shop: Any, keyring: Keyring):
    key = running(shop, 1).key.removeprefix("once:")

    with pytest.raises(KeyInUse, match="another call may run beside it") as error:
        keyring.release(key)
    assert error.value.held.key == key
    assert keyring.get(key).claim.state is State.RUNNING

    keyring.release(key, force=True)
    assert list(keyring.find()) == []


def test_run_whose_key_was_let_go_takes_nobody_elses(shop: Any, keyring: Keyring):
    run = running(shop, 1, call="slow")
    keyring.release("shop.charge", force=True)
    key = sent(shop, 1, call="second")

    shop.tasks["shop.charge"].claims.finish(run, 1)

    assert keyring.get(key).claim.id == "second"


def test_key_of_a_run_that_was_not_heard_of_needs_no_force(shop: Any, keyring: Keyring, clock: Clock):
    running(shop, 1)
    clock.now += 31

    [held] = keyring.find()
    assert held.has_lapsed
    assert not held.is_in_use
    assert "probably gone" in held.meaning()
    keyring.release(held.key)
    assert list(keyring.find()) == []


def test_run_that_is_heard_of_meanwhile_keeps_its_key(shop: Any, keyring: Keyring, clock: Clock):
    """Between the look and the swap the worker has renewed its lease."""
    key = running(shop, 1).key.removeprefix("once:")
    clock.now += 31
    stale = keyring.get(key)
    clock.now -= 31
    keyring.get = lambda key: stale  # type: ignore[method-assign]

    with pytest.raises(KeyInUse):
        keyring.release(key)


def test_call_that_has_moved_on_meanwhile_is_looked_at_again(shop: Any, keyring: Keyring):
    run = running(shop, 1)
    before = keyring.get("shop.charge")
    shop.tasks["shop.charge"].claims.finish(run, 1)
    keyring.get = lambda key: before  # type: ignore[method-assign]

    assert keyring.release(before.key, force=True).claim.state is State.DONE


def test_key_that_never_stands_still_is_given_up(shop: Any, keyring: Keyring, monkeypatch: pytest.MonkeyPatch):
    key = sent(shop, 1)
    swap, number = shop.store.swap, iter(range(1000))

    def meddled(wanted: Swap) -> Any:
        data = keyring.get(key)
        swap(Swap(wanted.key, data.version, New(str(next(number)), shop.store.read(wanted.key).data, ttl=60)))
        return swap(wanted)

    monkeypatch.setattr(shop.store, "swap", meddled)

    with pytest.raises(StoreUnavailable, match="changed 20 times"):
        keyring.release(key)


@pytest.mark.parametrize("state", list(State))
def test_each_state_says_what_letting_go_means(shop: Any, keyring: Keyring, state: State):
    sent(shop, 1)
    [held] = keyring.find()

    assert held.meaning()
    assert type(held)(held.key, type(held.claim)(state=state, id="a"), None, "").meaning()
