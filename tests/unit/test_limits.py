"""
Limits let calls run while there are slots, and put off all others. Time is the store's, and handed in.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, RootModel
from typing_extensions import TypedDict

from celerykit.call import Call, Later
from celerykit.contract import Contract
from celerykit.errors import InvalidOptions, LimitReached, StoreUnavailable
from celerykit.headers import Attempt, Headers
from celerykit.limits import Concurrent, Limits, Rate, limited, pause
from celerykit.stores.memory import MemoryStore


class Region(Enum):
    EU = "eu"


class Tenant(TypedDict):
    name: str


class Place(NamedTuple):
    city: str


@dataclass
class Shop:
    place: Place
    name: str = ""


class Order(BaseModel):
    tenant: str = "acme"
    owner: Tenant | None = None
    shop: Annotated[Shop | None, Field()] = None
    notes: dict[str, str] = {}

    @property
    def label(self) -> str:
        return self.tenant.upper()


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Rooted(RootModel[Order]): ...


def charge(order: Order, amount: int = 1, *, region: Region = Region.EU, extra: Any = None, **more: str) -> str:
    return f"charged {amount}"


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Keeper:
    """Renews when it is told to."""

    kept: dict[str, Callable[[], None]] = field(default_factory=dict)

    def keep(self, name: str, renew: Callable[[], None]) -> None:
        self.kept[name] = renew

    def drop(self, name: str) -> None:
        self.kept.pop(name, None)

    def renew(self) -> None:
        for renew in list(self.kept.values()):
            renew()


class Broken:
    """A store that fails where it is told to, and notes what it was asked."""

    def __init__(self, store: MemoryStore, *, take: int = 0, give: bool = False) -> None:
        self.store, self.take_fails_from, self.give_fails = store, take, give
        self.asked: list[str] = []

    def take(self, key: str, holder: str, *, limit: int, ttl: float) -> float:
        self.asked.append(f"take {key}")
        if self.take_fails_from and len(self.asked) >= self.take_fails_from:
            raise StoreUnavailable("the store did not answer")
        return self.store.take(key, holder, limit=limit, ttl=ttl)

    def give(self, key: str, holder: str) -> None:
        self.asked.append(f"give {key}")
        if self.give_fails:
            raise StoreUnavailable("the store did not answer")
        self.store.give(key, holder)


class World:
    """A task with limits, and a store whose time is handed in."""

    def __init__(self) -> None:
        self.time, self.keeper = Time(), Keeper()
        self.store: Any = MemoryStore(clock=self.time)
        self.contract = Contract("shop.charge", charge)
        self.lease = 30.0

    def limits(self, *rules: Any) -> Limits:
        return Limits(self.contract, rules, store=lambda: self.store, lease=lambda: self.lease, renewal=self.keeper)

    def call(self, *rules: Any, order: Order | None = None, **kwargs: Any) -> Call:
        policies = {name: kwargs.pop(name) for name in ("on_store_down",) if name in kwargs}
        headers = kwargs.pop("headers", Headers())
        return Call(
            task="shop.charge",
            id=kwargs.pop("id", "an-id"),
            attempt=kwargs.pop("attempt", 1),
            headers=headers,
            contract=self.contract,
            args=(order or Order(),),
            kwargs=kwargs,
            policies={"limits": self.limits(*rules), **policies},
        )

    def run(self, call: Call, body: Callable[[Call], Any] = lambda call: "done") -> Any:
        return limited(body, call)

    def waits(self, call: Call) -> float:
        """Run a call that is over a limit, and tell for how long it is put off."""

        def never(call: Call) -> Any:
            raise AssertionError("it ran")

        with pytest.raises(Later) as caught:
            limited(never, call)
        assert caught.value.kind == "snooze"
        return caught.value.delay


@pytest.fixture
def world() -> World:
    return World()


# What is declared


@pytest.mark.parametrize(
    ("rate", "limit", "per"),
    [("100/m", 100, 60), ("5/s", 5, 1), ("1000/h", 1000, 3600), ("10/d", 10, 86400), ("100/15m", 100, 900)],
)
def test_a_rate_is_read(rate: str, limit: int, per: float) -> None:
    assert (Rate(rate).limit, Rate(rate).per) == (limit, per)


@pytest.mark.parametrize(
    "rate",
    ["", "100", "100/", "/m", "-1/m", "0.5/s", "100/w", "100 / m", "100/M", "\u0661/s", "9" * 5000 + "/s", 100, None],
)
def test_what_is_no_rate_is_refused(rate: Any) -> None:
    with pytest.raises(InvalidOptions, match=r"^Rate\(…\) must be a text such as '100/m'"):
        Rate(rate)


@pytest.mark.parametrize(
    ("declare", "says"),
    [
        (lambda: Rate("0/m"), r"^Rate\('0/m'\) would let nothing run; it must be at least 1\.$"),
        (lambda: Rate("5/0s"), r"^Rate\('5/0s'\): its span must be between a second and a year\.$"),
        (lambda: Rate("5/367d"), "between a second and a year"),
        (lambda: Rate("100001/d"), "more than 100000 are too many for the store to count"),
        (lambda: Concurrent(0), r"^Concurrent\(0\) would let nothing run; it must be at least 1\.$"),
        (lambda: Concurrent(-1), r"^Concurrent\(-1\) would let nothing run"),
        (lambda: Concurrent(10**6), "too many for the store"),
        (lambda: Concurrent(True), r"^Concurrent\(…\) must be a whole number, got True\.$"),
        (lambda: Concurrent(1.5), "must be a whole number, got 1.5"),  # type: ignore[arg-type]
        (lambda: Concurrent("5"), "must be a whole number, got '5'"),  # type: ignore[arg-type]
        (lambda: Concurrent(1, by=""), "must be the name of a parameter"),
        (lambda: Concurrent(1, by="order..tenant"), r"such as 'order\.tenant', got 'order\.\.tenant'\.$"),
        (lambda: Rate("1/s", by=5), r"^Rate\(by=…\) must be .* or None; got 5\.$"),  # type: ignore[arg-type]
    ],
)
def test_what_makes_no_sense_is_refused(declare: Callable[[], Any], says: str) -> None:
    with pytest.raises(InvalidOptions, match=says):
        declare()


def test_a_coroutine_function_cannot_be_what_is_counted_by() -> None:
    async def tenant(order: Order) -> str: ...  # type: ignore[empty-body]

    with pytest.raises(InvalidOptions, match="a plain function"):
        Concurrent(1, by=tenant)


def test_a_rule_is_written_as_it_was_declared() -> None:
    def tenant(order: Order) -> str: ...  # type: ignore[empty-body]

    assert str(Rate("100/m")) == "Rate('100/m')"
    assert str(Rate("100/m", by="order.tenant")) == "Rate('100/m', by='order.tenant')"
    assert str(Concurrent(5, by=tenant)).startswith("Concurrent(5, by=test_a_rule_is_written")
    assert Rate("1/s") == Rate("1/s") != Rate("1/s", by="order")


def test_one_rule_needs_no_tuple(world: World) -> None:
    limits = Limits(
        world.contract,
        Rate("1/s"),
        store=lambda: world.store,
        lease=lambda: 1.0,
        renewal=world.keeper,  # type: ignore[arg-type]
    )

    assert limits.rules == (Rate("1/s"),)


@pytest.mark.parametrize("rules", [("100/m",), (Rate,), ("100/m", Rate("1/s"))])
def test_what_is_no_rule_is_refused(world: World, rules: Any) -> None:
    with pytest.raises(InvalidOptions, match=r"^shop\.charge: limits must be Rate\(…\) and Concurrent\(…\) in a tuple"):
        world.limits(*rules)


@pytest.mark.parametrize(
    "by",
    [
        "order",
        "amount",
        "more",
        "more.anything",
        "extra.anything.at_all",
        "order.tenant",
        "order.owner.name",
        "order.shop.place.city",
        "order.notes.colour",
        "order.label",
    ],
)
def test_limits_are_counted_by_what_the_task_is_called_with(world: World, by: str) -> None:
    assert world.limits(Rate("1/s", by=by)).rules[0].by == by


@pytest.mark.parametrize(
    ("by", "says"),
    [
        (
            "tenant",
            r"^shop\.charge: Rate\('1/s', by='tenant'\): there is no parameter 'tenant'\. A field is named with",
        ),
        ("amonut", r"no parameter 'amonut' \(did you mean 'amount'\?\)"),
        ("order.tennant", r"^shop\.charge: Rate\('1/s', by='order\.tennant'\): 'order' has no field 'tennant'\.$"),
        ("order.owner.id", r"'order\.owner' has no field 'id'\.$"),
        ("order.shop.place.street", r"'order\.shop\.place' has no field 'street'\.$"),
        ("order.model_dump", "has no field 'model_dump'"),
        ("amount.size", "'amount' has no field 'size'"),
        ("region.name_of", "'region' has no field 'name_of'"),
    ],
)
def test_limits_by_what_is_not_there_are_refused(world: World, by: str, says: str) -> None:
    with pytest.raises(InvalidOptions, match=says):
        world.limits(Rate("1/s", by=by))


def test_models_that_take_any_field_may_have_any(world: World) -> None:
    def open_task(one: Open, other: Rooted, either: Order | Open) -> None: ...

    world.contract = Contract("shop.open", open_task)

    assert world.limits(Rate("1/s", by="one.x"), Rate("1/s", by="other.root"), Rate("1/s", by="either.tenant")).rules


# How many run


def test_without_limits_a_call_runs(world: World) -> None:
    assert limited(lambda call: "done", replace(world.call(), policies={})) == "done"


def test_no_rules_ask_no_store(world: World) -> None:
    world.store = None

    assert world.run(world.call()) == "done"


def test_a_rate_lets_so_many_start_in_any_span_of_time(world: World) -> None:
    for _ in range(3):
        assert world.run(world.call(Rate("3/m"))) == "done"
        world.time.passes(10)

    assert 30 <= world.waits(world.call(Rate("3/m"))) <= 50
    world.time.passes(29)
    world.waits(world.call(Rate("3/m")))
    world.time.passes(1.1)

    assert world.run(world.call(Rate("3/m"))) == "done"
    world.waits(world.call(Rate("3/m")))


def test_a_failure_has_used_up_its_slot_of_a_rate(world: World) -> None:
    def fails(call: Call) -> Any:
        raise LookupError

    with pytest.raises(LookupError):
        world.run(world.call(Rate("1/m")), fails)

    world.waits(world.call(Rate("1/m")))


def test_so_many_run_at_once(world: World) -> None:
    def outer(call: Call) -> Any:
        return world.run(world.call(Concurrent(2)), inner)

    def inner(call: Call) -> Any:
        return world.waits(world.call(Concurrent(2)))

    assert 0.05 <= world.run(world.call(Concurrent(2)), outer) <= 0.5
    assert world.run(world.call(Concurrent(2))) == "done"
    assert not world.keeper.kept


@pytest.mark.parametrize("error", [LookupError, SystemExit, KeyboardInterrupt, StopIteration])
def test_a_slot_is_given_back_however_the_call_ends(world: World, error: type[BaseException]) -> None:
    def fails(call: Call) -> Any:
        raise error

    with pytest.raises(error):
        world.run(world.call(Concurrent(1)), fails)

    assert world.run(world.call(Concurrent(1))) == "done"


def test_a_slot_is_given_back_when_the_call_is_put_off(world: World) -> None:
    def put_off(call: Call) -> Any:
        raise Later(5, attempt=2, kind="retry")

    with pytest.raises(Later, match="retry"):
        world.run(world.call(Concurrent(1)), put_off)

    assert world.run(world.call(Concurrent(1))) == "done"


def test_the_slot_of_a_process_that_died_is_free_after_the_lease(world: World) -> None:
    world.limits(Concurrent(1)).take(world.call())

    world.waits(world.call(Concurrent(1)))
    world.time.passes(30.1)

    assert world.run(world.call(Concurrent(1))) == "done"


def test_a_call_waits_no_longer_than_for_the_end_of_a_lease(world: World) -> None:
    world.limits(Concurrent(1)).take(world.call())
    world.time.passes(29.8)

    assert world.waits(world.call(Concurrent(1))) <= 0.21


def test_a_slot_is_kept_as_long_as_its_call_runs(world: World) -> None:
    def long(call: Call) -> Any:
        for _ in range(10):
            world.time.passes(20)
            world.keeper.renew()
        world.time.passes(20)
        return world.waits(world.call(Concurrent(1)))

    assert world.run(world.call(Concurrent(1)), long)


def test_a_renewal_that_comes_too_late_takes_no_slot(world: World) -> None:
    late: list[Callable[[], None]] = []
    world.run(world.call(Concurrent(1)), lambda call: late.extend(world.keeper.kept.values()))

    for renew in late:
        renew()

    assert late
    assert world.run(world.call(Concurrent(1))) == "done"


def test_a_slot_that_was_lost_is_told_of(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def overtaken(call: Call) -> Any:
        world.time.passes(31)
        return world.run(world.call(Concurrent(1)), lambda call: world.keeper.renew())

    world.run(world.call(Concurrent(1)), overtaken)

    assert "limit.lost slot='slots:shop.charge:concurrent0:all an-id:" in caplog.text


def test_a_call_that_is_put_off_has_used_no_attempt(world: World) -> None:
    world.run(world.call(Rate("1/m")))

    with pytest.raises(Later) as caught:
        world.run(world.call(Rate("1/m"), attempt=3))

    assert caught.value.attempt == 3
    assert isinstance(caught.value.error, LimitReached)
    assert str(caught.value.error) == "shop.charge: its limit Rate('1/m') is reached; the call waits."


# Several limits


def test_all_limits_must_have_a_slot(world: World) -> None:
    rules = (Rate("1/m"), Rate("100/h"), Concurrent(1))
    world.run(world.call(*rules))

    assert 60 <= world.waits(world.call(*rules)) <= 90


def test_a_call_that_is_put_off_keeps_no_slot(world: World) -> None:
    rules = (Rate("2/m"), Rate("1/m"), Concurrent(1))
    world.run(world.call(*rules))
    for _ in range(5):
        world.waits(world.call(*rules))

    # In the order of the tuple, so that these are the same limits.
    assert world.run(world.call(Rate("2/m"))) == "done"
    assert world.run(world.call(Rate("9/m"), Rate("9/m"), Concurrent(1))) == "done"


def test_what_is_given_back_anyway_is_taken_first(world: World) -> None:
    world.store = Broken(world.store)
    world.run(world.call(Rate("2/m"), Concurrent(1)))

    assert world.store.asked == [
        "take slots:shop.charge:concurrent1:all",
        "take slots:shop.charge:rate0:all",
        "give slots:shop.charge:concurrent1:all",
    ]


# By what


def tenants(world: World, rule: Any, *orders: Order, **kwargs: Any) -> list[str]:
    """Take a slot for each, one after the other, and tell which ran."""

    def ran(order: Order) -> str:
        try:
            return str(world.run(world.call(rule, order=order, **kwargs)))
        except Later:
            return "waits"

    return [ran(order) for order in orders]


@pytest.mark.parametrize("by", ["order.tenant", "order.label", lambda order, **rest: (order.tenant, 1)])
def test_each_value_has_slots_of_its_own(world: World, by: Any) -> None:
    orders = [Order(tenant="acme"), Order(tenant="acme"), Order(tenant="globex"), Order(tenant="acme")]

    assert tenants(world, Rate("1/m", by=by), *orders) == ["done", "waits", "done", "waits"]


def test_what_is_not_there_is_a_value_like_others(world: World) -> None:
    shop = Shop(place=Place("Bern"))
    orders = [Order(), Order(shop=shop), Order(), Order(shop=shop)]

    assert tenants(world, Rate("1/m", by="order.shop.place.city"), *orders) == ["done", "done", "waits", "waits"]


def test_defaults_are_values_too(world: World) -> None:
    rule = Rate("1/m", by="region")

    assert tenants(world, rule, Order()) == ["done"]
    assert tenants(world, rule, Order(), region=Region.EU) == ["waits"]


def test_keys_of_dicts_are_fields(world: World) -> None:
    orders = [Order(notes={"colour": "red"}), Order(notes={"colour": "red"}), Order(notes={"colour": "blue"})]

    assert tenants(world, Rate("1/m", by="order.notes.colour"), *orders) == ["done", "waits", "done"]
    assert tenants(world, Rate("1/m", by="more.x"), Order(), x="1") == ["done"]
    assert tenants(world, Rate("1/m", by="more.x"), Order(), x="2") == ["done"]


@pytest.mark.parametrize(
    ("one", "other"), [(1, "1"), (None, "null"), (True, 1), (("a", "b"), "ab"), (date(2026, 1, 1), date(2026, 1, 2))]
)
def test_values_that_differ_are_told_apart(world: World, one: Any, other: Any) -> None:
    rule = Rate("1/m", by=lambda order, extra: extra)

    assert tenants(world, rule, Order(), extra=one) == ["done"]
    assert tenants(world, rule, Order(), extra=other) == ["done"]
    assert tenants(world, rule, Order(), extra=one) == ["waits"]


@pytest.mark.parametrize("value", [UUID(int=1), Decimal("1.5"), Region.EU, "ä", 10**30, ("a", 1), {"b": 1, "a": 2}])
def test_values_of_many_types_can_be_counted_by(world: World, value: Any) -> None:
    assert tenants(world, Rate("1/m", by="extra"), Order(), Order(), extra=value) == ["done", "waits"]


def test_what_cannot_be_counted_by_is_refused_without_showing_it(world: World) -> None:
    secret = type("Secret", (), {"__repr__": lambda self: "hunter2"})()

    with pytest.raises(InvalidOptions) as caught:
        world.run(world.call(Rate("1/m", by="extra"), extra=secret))

    assert "what Rate('1/m', by='extra') is counted by is a value of type Secret; it must be a text" in str(
        caught.value
    )


def test_keys_do_not_show_the_value_and_are_bounded(world: World) -> None:
    world.store = Broken(world.store)
    world.contract = Contract("shop." + "x" * 500, charge)
    call = world.call(Concurrent(1, by="order.tenant"), order=Order(tenant="secret" * 100), id="y" * 500)
    world.run(replace(call, task=world.contract.task))
    world.run(replace(call, task=world.contract.task + "x"))

    taken = [asked.removeprefix("take ") for asked in world.store.asked if asked.startswith("take")]

    assert len(set(taken)) == 2
    assert all("secret" not in key and len(key) < 200 for key in taken)


# Waiting


def attempts(*outcomes: str, since: float) -> Headers:
    rows = [Attempt(since + place, 0, 0, outcome, "", "w") for place, outcome in enumerate(outcomes)]
    return Headers(ledger=tuple(rows))


def test_who_has_waited_for_long_looks_more_seldom(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celerykit.limits.time.time", lambda: 5000.0)
    world.limits(Concurrent(1)).take(world.call())

    def waits(headers: Headers) -> float:
        return world.waits(world.call(Concurrent(1), headers=headers))

    assert waits(Headers()) <= 0.5
    assert 2 <= waits(attempts("snooze", "snooze", since=4984)) <= 4
    assert waits(attempts("snooze", "retry", since=4984)) <= 0.5
    assert waits(attempts("retry", "snooze", since=4984)) <= 4
    assert waits(attempts("snooze", since=9999)) <= 0.5


times = st.floats(0, 10**9)
chances = st.floats(0, 1, exclude_max=True)
rates = st.builds(
    lambda limit, spans, unit: Rate(f"{limit}/{spans}{unit}"),
    st.integers(1, 10**5),
    st.integers(1, 300),
    st.sampled_from("smhd"),
)


@given(rates | st.builds(Concurrent, st.integers(1, 10**5)), times, times, chances)
def test_a_pause_is_never_nothing_and_never_too_long(rule: Any, wait: float, waited: float, chance: float) -> None:
    seconds = pause(rule, wait, waited=waited, chance=chance)

    assert math.isfinite(seconds)
    assert 0.05 <= seconds <= 630


@given(rates, st.floats(0, 600), times, chances)
def test_nobody_looks_before_a_rate_has_a_slot(rule: Rate, wait: float, waited: float, chance: float) -> None:
    assert pause(rule, wait, waited=waited, chance=chance) >= wait


@given(st.builds(Concurrent, st.integers(1, 9)), times, times, chances)
def test_where_slots_are_given_back_a_call_looks_before_the_lease_ends(
    rule: Concurrent, wait: float, waited: float, chance: float
) -> None:
    assert pause(rule, wait, waited=waited, chance=chance) <= max(0.05, min(wait, 30))


def test_pauses_differ_by_chance() -> None:
    for rule in (Rate("100/m"), Concurrent(5)):
        assert len({pause(rule, 20, waited=10, chance=chance / 10) for chance in range(10)}) == 10


# A store that fails


def test_without_a_store_a_call_waits(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.store = Broken(world.store, take=1, give=True)

    assert 0.05 <= world.waits(world.call(Concurrent(1))) <= 30
    assert "limit.unknown task=shop.charge id=an-id then=retry error='StoreUnavailable: the store did" in caplog.text


def test_without_a_store_a_call_runs_if_its_task_says_so(world: World) -> None:
    world.store = Broken(world.store, take=1, give=True)

    assert world.run(world.call(Concurrent(1), Rate("1/m"), on_store_down="run")) == "done"


def test_without_a_store_a_call_fails_if_its_task_says_so(world: World) -> None:
    world.store = Broken(world.store, take=1)

    with pytest.raises(StoreUnavailable):
        world.run(world.call(Concurrent(1), on_store_down="fail"))


def test_what_was_taken_before_the_store_failed_is_given_back(world: World) -> None:
    store, world.store = world.store, Broken(world.store, take=2)

    world.waits(world.call(Concurrent(1), Rate("1/m")))

    assert world.store.asked[2:] == ["give slots:shop.charge:rate1:all", "give slots:shop.charge:concurrent0:all"]
    world.store = store
    assert world.run(world.call(Concurrent(1), Rate("1/m"))) == "done"


def test_after_the_task_has_run_a_store_that_fails_changes_nothing(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.store = Broken(world.store, give=True)

    assert world.run(world.call(Concurrent(1))) == "done"
    assert "limit.not_given_back slot='slots:shop.charge:concurrent0:all an-id:" in caplog.text
    assert "delay=30 " in caplog.text


def test_a_time_limit_that_strikes_afterwards_changes_nothing(world: World) -> None:
    class SoftTimeLimitExceeded(Exception): ...

    def strikes(*args: Any) -> None:
        raise SoftTimeLimitExceeded

    world.store.give = strikes

    assert world.run(world.call(Concurrent(1))) == "done"


def test_a_thread_that_cannot_start_leaves_no_slot_behind(world: World) -> None:
    def cannot(name: str, renew: Any) -> None:
        raise RuntimeError("can't start new thread")

    keep, world.keeper.keep = world.keeper.keep, cannot  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="thread"):
        world.run(world.call(Concurrent(1)))

    world.keeper.keep = keep  # type: ignore[method-assign]
    assert world.run(world.call(Concurrent(1))) == "done"


# For any calls


@given(st.lists(st.tuples(st.floats(0, 40), st.sampled_from("ab")), max_size=60))
def test_no_span_of_time_ever_has_more_starts_than_its_rate(steps: list[tuple[float, str]]) -> None:
    world, started = World(), list[tuple[float, str]]()
    for seconds, tenant in steps:
        world.time.passes(seconds)
        if tenants(world, Rate("3/m", by="order.tenant"), Order(tenant=tenant)) == ["done"]:
            started.append((world.time.now, tenant))

    for now, tenant in started:
        assert sum(now <= at < now + 60 and who == tenant for at, who in started) <= 3


def test_nothing_is_logged_of_calls_that_run_or_wait(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    world.run(world.call(Rate("1/m")))
    world.waits(world.call(Rate("1/m")))

    assert not caplog.records
