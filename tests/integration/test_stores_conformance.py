"""
What every store does, on every store there is.

Time is not waited for: each bench makes its store believe that it has gone by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import create_engine

from celerykit.dev.servers import Server
from celerykit.stores import Hold, New, Record, Store, Swap, Swapped, open_store
from celerykit.stores.memory import MemoryStore
from celerykit.stores.sql import SqlStore
from tests import services
from tests.integration.stores_crowd import crowd
from tests.unit.test_stores_model import Comparison

#: Lets each key of a Redis believe that it is so many seconds older.
_AGE = """
for _, key in ipairs(redis.call('KEYS', '*')) do
    local kind = redis.call('TYPE', key).ok
    if kind == 'hash' and redis.call('HEXISTS', key, 'lease') == 1 then
        redis.call('HINCRBY', key, 'lease', -ARGV[1] * 1000000)
    elseif kind == 'zset' then
        for _, holder in ipairs(redis.call('ZRANGE', key, 0, -1)) do
            redis.call('ZINCRBY', key, -ARGV[1] * 1000000, holder)
        end
    end
    redis.call('PEXPIRE', key, math.max(0, redis.call('PTTL', key) - ARGV[1] * 1000))
end
"""


@dataclass
class Bench:
    """
    A store, and what a test does behind its back.

    Attributes:
        pass_time:
            Let so many seconds go by for what is in the store.

        held:
            Tell how much is held, after what is over was swept away.
    """

    name: str
    url: str
    store: Store
    pass_time: Callable[[float], None]
    held: Callable[[], int]
    empty: Callable[[], None]


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with services.valkey() as server:
        yield server


@pytest.fixture(scope="module")
def postgresql() -> Iterator[services.PostgreSQL]:
    with services.postgresql() as server:
        yield server


def memory_bench(request: Any) -> Iterator[Bench]:
    now = [0.0]

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    store = MemoryStore(clock=lambda: now[0])
    yield Bench("memory", "memory://", store, pass_time, lambda: len(list(store.find(""))), store._begin)


def valkey_bench(request: Any) -> Iterator[Bench]:
    server: Server = request.getfixturevalue("valkey")
    with redis.Redis.from_url(server.client_url, decode_responses=True) as client:
        client.flushall()
        store = open_store(server.url, timeout=5)
        yield Bench(
            "valkey",
            server.url,
            store,
            pass_time=lambda seconds: client.eval(_AGE, 0, seconds),
            held=client.dbsize,
            empty=client.flushall,
        )
        store.close()


def sqlite_bench(request: Any) -> Iterator[Bench]:
    path = request.getfixturevalue("tmp_path") / "store.sqlite"
    yield from sql_bench(f"sqlite:///{path}", driver=f"sqlite:///{path}")


def postgresql_bench(request: Any) -> Iterator[Bench]:
    server: services.PostgreSQL = request.getfixturevalue("postgresql")
    yield from sql_bench(server.url, driver=server.url.replace("postgresql:", "postgresql+psycopg:"))


def sql_bench(url: str, *, driver: str) -> Iterator[Bench]:
    store = open_store(url, timeout=5)
    assert isinstance(store, SqlStore)
    store.get("make the tables")
    engine = create_engine(driver)

    def run(*statements: str) -> list[Any]:
        with engine.begin() as connection:
            return [connection.exec_driver_sql(statement) for statement in statements]

    def pass_time(seconds: float) -> None:
        run(
            f"UPDATE celerykit_counts SET expires = expires - {seconds}",
            f"UPDATE celerykit_records SET expires = expires - {seconds}, lease_ends = lease_ends - {seconds}",
            f"UPDATE celerykit_slots SET ends = ends - {seconds}",
        )

    def held() -> int:
        while store.sweep():
            pass
        with engine.begin() as connection:
            return sum(connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one() for table in TABLES)

    def empty() -> None:
        run(*(f"DELETE FROM {table}" for table in TABLES))

    empty()
    yield Bench(url.partition(":")[0], url, store, pass_time, held, empty)
    store.close()
    engine.dispose()


TABLES = ("celerykit_counts", "celerykit_records", "celerykit_slots")

SHARED = {"valkey": valkey_bench, "sqlite": sqlite_bench, "postgresql": postgresql_bench}
BENCHES = {"memory": memory_bench, **SHARED}


@pytest.fixture(params=list(BENCHES))
def bench(request: Any) -> Iterator[Bench]:
    yield from BENCHES[request.param](request)


@pytest.fixture(params=list(SHARED))
def shared(request: Any) -> Iterator[Bench]:
    """A store that several processes can share."""
    yield from SHARED[request.param](request)


@pytest.fixture
def store(bench: Bench) -> Store:
    return bench.store


def new(version: str = "v", data: str = "data", *, ttl: float = 100, lease: float | None = None) -> New:
    return New(version, data, ttl=ttl, lease=lease)


def put(store: Store, key: str, **facts: Any) -> None:
    """Write a record where there is none."""
    assert store.swap(Swap(key, None, new(**facts))) == [Swapped(done=True, found=None)]


def lease_of(store: Store, key: str) -> float | None:
    record = store.read(key)
    assert record is not None
    return record.lease


# Counts and marks


def test_a_count_goes_up_and_down_but_never_below_nothing(store: Store) -> None:
    assert [store.add("n", ttl=10), store.add("n", ttl=10), store.add("n", ttl=10)] == [1, 2, 3]
    store.subtract("n")
    assert store.get("n") == "2"
    for _ in range(3):
        store.subtract("n")

    assert store.get("n") is None
    assert store.add("n", ttl=10) == 1


def test_a_count_is_forgotten_after_its_last_addition(store: Store, bench: Bench) -> None:
    store.add("n", ttl=100)
    bench.pass_time(90)
    assert store.add("n", ttl=100) == 2
    bench.pass_time(90)
    store.add("n", ttl=100)
    store.subtract("n")
    assert store.get("n") == "2"

    bench.pass_time(101)

    assert store.get("n") is None
    store.subtract("n")
    assert store.add("n", ttl=100) == 1


def test_who_marks_first_has_it_until_it_is_forgotten_or_deleted(store: Store, bench: Bench) -> None:
    assert store.mark("m", "ä", ttl=50) is None
    assert store.mark("m", "b", ttl=500) == "ä"
    bench.pass_time(51)
    assert store.get("m") is None
    assert store.mark("m", "c", ttl=50) is None
    store.delete("m")
    store.delete("m")
    assert store.mark("m", "d", ttl=50) is None
    assert store.get("m") == "d"


def test_a_count_that_is_back_at_nothing_is_no_mark(store: Store) -> None:
    store.add("n", ttl=50)
    store.subtract("n")

    assert store.mark("n", "mine", ttl=50) is None
    assert store.get("n") == "mine"


# Records


def test_where_nothing_is_nothing_is_read(store: Store) -> None:
    assert store.read("k") is None


def test_what_is_written_where_nothing_is_can_be_read(store: Store) -> None:
    put(store, "k", version="1", data="one")
    put(store, "leased", lease=60)

    assert store.read("k") == Record("1", "one", lease=None)
    assert lease_of(store, "leased") == pytest.approx(60, abs=10)


def test_a_swap_that_expects_nothing_tells_what_it_found(store: Store) -> None:
    put(store, "k", version="1", data="one", lease=60)

    [(done, found)] = store.swap(Swap("k", None, new("2")))

    assert not done
    assert found is not None
    assert found[:2] == ("1", "one")
    assert found.lease == pytest.approx(60, abs=10)


def test_a_swap_is_done_only_where_the_expected_version_is(store: Store) -> None:
    put(store, "k", version="1", data="one")

    assert store.swap(Swap("k", "0", new("2"))) == [Swapped(done=False, found=Record("1", "one", None))]
    assert store.swap(Swap("k", "1", new("2", "two"))) == [Swapped(done=True, found=None)]
    assert store.read("k") == Record("2", "two", lease=None)
    assert store.swap(Swap("nowhere", "1", new("2"))) == [Swapped(done=False, found=None)]
    assert store.read("nowhere") is None


def test_a_swap_may_forget_what_is_there(store: Store) -> None:
    put(store, "k", version="1")

    assert [swapped.done for swapped in store.swap(Swap("k", "0", None), Swap("k", "1", None))] == [False, True]
    assert store.read("k") is None


def test_a_swap_may_only_look_whether_nothing_is_there(store: Store) -> None:
    assert store.swap(Swap("k", None, None)) == [Swapped(done=True, found=None)]
    put(store, "k", version="1")
    assert store.swap(Swap("k", None, None)) == [Swapped(done=False, found=Record("1", "data", None))]


def test_a_lapsed_lease_can_be_taken_over_and_a_good_one_not(store: Store, bench: Bench) -> None:
    put(store, "k", version="1", ttl=1000, lease=60)
    take_over = Swap("k", "1", new("2", ttl=1000, lease=60), lapsed=True)

    assert not store.swap(take_over)[0].done
    bench.pass_time(61)
    assert lease_of(store, "k") == pytest.approx(-1, abs=10)
    assert [swapped.done for swapped in store.swap(take_over, take_over)] == [True, False]
    assert lease_of(store, "k") == pytest.approx(60, abs=10)


def test_what_has_no_lease_can_be_taken_over_at_once(store: Store) -> None:
    put(store, "k", version="1")

    [swapped] = store.swap(Swap("k", "1", new("2"), lapsed=True))

    assert swapped.done


def test_a_new_record_inherits_neither_lease_nor_time(store: Store, bench: Bench) -> None:
    put(store, "k", version="1", ttl=100, lease=60)
    store.swap(Swap("k", "1", new("2", ttl=1000)))
    assert lease_of(store, "k") is None

    bench.pass_time(500)

    assert store.read("k") == Record("2", "data", None)


def test_a_record_is_forgotten_after_its_time(store: Store, bench: Bench) -> None:
    put(store, "k", version="1", ttl=100, lease=1000)
    bench.pass_time(101)

    assert store.read("k") is None
    assert store.swap(Swap("k", "1", new("2"))) == [Swapped(done=False, found=None)]
    assert store.renew([Hold("k", "1", lease=60, ttl=60)]) == [False]
    assert list(store.find("")) == []
    put(store, "k", version="3")


def test_swaps_of_one_call_follow_each_other(store: Store) -> None:
    swaps = [
        Swap("b", None, new("1")),
        Swap("a", None, new("1")),
        Swap("b", "1", new("2")),
        Swap("b", None, new("3")),
        Swap("b", "2", None),
        Swap("b", None, new("4")),
    ]

    assert [swapped.done for swapped in store.swap(*swaps)] == [True, True, True, False, True, True]
    assert store.read("b") == Record("4", "data", None)
    assert store.swap() == []


def test_a_call_may_hold_many_swaps(store: Store) -> None:
    put(store, "k7", version="other")
    swaps = [Swap(f"k{number}", None, new(f"v{number}")) for number in range(500)]

    swapped = store.swap(*swaps)

    assert [number for number, (done, _) in enumerate(swapped) if not done] == [7]
    assert swapped[7].found == Record("other", "data", None)
    assert store.read("k499") == Record("v499", "data", None)


def test_renewing_begins_lease_and_time_anew(store: Store, bench: Bench) -> None:
    put(store, "k", version="1", ttl=100, lease=60)
    put(store, "lost", version="2", ttl=100, lease=60)
    bench.pass_time(90)

    holds = [Hold(key, "1", lease=60, ttl=100) for key in ("k", "lost", "nowhere", "k")]
    assert store.renew(holds) == [True, False, False, True]

    assert lease_of(store, "k") == pytest.approx(60, abs=10)
    bench.pass_time(20)
    assert store.read("lost") is None
    assert store.read("k") is not None
    assert store.renew([]) == []


def test_counts_records_and_slots_do_not_know_each_other(store: Store) -> None:
    store.add("k", ttl=60)
    put(store, "k", version="1")
    store.take("k", "me", limit=1, ttl=60)
    store.delete("k")
    store.swap(Swap("k", "1", None))

    assert store.get("k") is None
    assert store.take("k", "you", limit=1, ttl=60) > 0


def test_any_text_is_a_key_a_version_a_holder_or_data(store: Store) -> None:
    texts = ["", " ", "ключ", "🔑", "a%b_c", "it's", '"', "\\", "{a}b", "*", "[x]?", "line\nbreak", "x" * 250]
    for text in texts:
        put(store, text, version=f"v{text}", data=text)
        assert store.take(text, text, limit=1, ttl=60) == 0
        assert store.add(text, ttl=60) == 1

    for text in texts:
        assert store.read(text) == Record(f"v{text}", text, None)
        assert store.swap(Swap(text, f"v{text}", new("2", text))) == [Swapped(done=True, found=None)]
        assert store.take(text, text, limit=1, ttl=60) == 0
    assert {key for key, _ in store.find("")} == set(texts)
    for text in ("*", "[x]", "a%", "a%b_", "A", "\\", "клю"):
        assert {key for key, _ in store.find(text)} == {key for key in texts if key.startswith(text)}


def test_what_a_stranger_may_write_into_an_id_is_a_key_too(store: Store) -> None:
    for text in ("x" * 5000, "ж" * 5000, "\0", "\ud83d", "a\0\udc00"):
        put(store, text, version="1")
        assert store.read(text) == Record("1", "data", None)
        assert store.take(text, text, limit=1, ttl=60) == 0
        assert store.take(text, f"{text}!", limit=1, ttl=60) > 0
        assert [store.add(text, ttl=60), store.add(text, ttl=60)] == [1, 2]
        store.give(text, text)
        assert store.take(text, f"{text}!", limit=1, ttl=60) == 0


def test_a_record_may_be_large(store: Store) -> None:
    data = "dätä" * 250_000
    put(store, "k", version="1", data=data)

    [(done, found)] = store.swap(Swap("k", "0", new("2")))

    assert not done
    assert found is not None
    assert found.data == data
    assert dict(store.find("k"))["k"].data == data


def test_thousands_of_records_are_found(store: Store) -> None:
    for start in range(0, 5000, 500):
        store.swap(*(Swap(f"once:{number}", None, new(f"v{number}")) for number in range(start, start + 500)))
    put(store, "oncf", version="another")
    put(store, "beat:x", version="another")

    found = dict(store.find("once:"))

    assert len(found) == 5000
    assert all(record.version == f"v{key.removeprefix('once:')}" for key, record in found.items())


def test_looking_for_records_can_be_broken_off(store: Store) -> None:
    for number in range(10):
        put(store, f"k{number}")

    next(iter(store.find("k")))

    put(store, "another")


# Slots


def test_there_are_as_many_slots_as_the_limit_says(store: Store) -> None:
    assert [store.take("s", holder, limit=2, ttl=60) for holder in "ab"] == [0, 0]
    assert store.take("s", "c", limit=2, ttl=60) == pytest.approx(60, abs=10)
    assert store.take("another", "c", limit=2, ttl=60) == 0


def test_a_slot_that_is_given_back_is_free(store: Store) -> None:
    store.take("s", "a", limit=1, ttl=60)
    store.give("s", "b")
    store.give("nowhere", "a")
    assert store.take("s", "b", limit=1, ttl=60) > 0

    store.give("s", "a")

    assert store.take("s", "b", limit=1, ttl=60) == 0


def test_taking_again_begins_anew(store: Store, bench: Bench) -> None:
    store.take("s", "a", limit=1, ttl=100)
    bench.pass_time(60)
    assert store.take("s", "a", limit=1, ttl=100) == 0
    bench.pass_time(60)

    assert store.take("s", "b", limit=1, ttl=100) == pytest.approx(40, abs=10)


def test_a_slot_is_free_when_its_time_is_over(store: Store, bench: Bench) -> None:
    store.take("s", "a", limit=2, ttl=100)
    bench.pass_time(50)
    store.take("s", "b", limit=2, ttl=100)
    bench.pass_time(51)

    assert store.take("s", "c", limit=2, ttl=100) == 0
    assert store.take("s", "d", limit=2, ttl=100) == pytest.approx(49, abs=10)


def test_a_lower_limit_waits_until_enough_slots_are_free(store: Store) -> None:
    for ttl in (100, 200, 300):
        store.take("s", f"holder {ttl}", limit=3, ttl=ttl)

    assert store.take("s", "new", limit=1, ttl=60) == pytest.approx(300, abs=10)
    assert store.take("s", "new", limit=2, ttl=60) == pytest.approx(200, abs=10)
    # Who has one keeps it.
    assert store.take("s", "holder 100", limit=1, ttl=60) == 0


def test_a_rate_holds_in_any_window(store: Store, bench: Bench) -> None:
    taken: list[int] = []
    for second in range(0, 600, 20):
        for attempt in range(3):
            if store.take("s", f"{second} {attempt}", limit=5, ttl=110) == 0:
                taken.append(second)
        bench.pass_time(20)

    assert all(sum(start <= second < start + 110 for second in taken) <= 5 for start in taken)
    assert len(taken) >= 5 * (600 // 120)


# What is left


def test_nothing_leaks(store: Store, bench: Bench) -> None:
    store.add("n", ttl=100)
    store.mark("m", "x", ttl=100)
    put(store, "k", version="1", ttl=100)
    put(store, "leased", version="1", ttl=50, lease=1000)
    store.renew([Hold("leased", "1", lease=1000, ttl=100)])
    store.take("s", "a", limit=2, ttl=100)
    store.take("s", "b", limit=2, ttl=50)
    store.take("s", "a", limit=2, ttl=100)
    put(store, "forgotten", version="1")
    store.swap(Swap("forgotten", "1", None))
    store.take("given", "a", limit=1, ttl=100)
    store.give("given", "a")
    store.add("subtracted", ttl=100)
    store.subtract("subtracted")

    bench.pass_time(101)

    assert bench.held() == 0


def test_it_is_a_store_like_the_model_says(bench: Bench) -> None:
    class AsTheModelSays(Comparison):
        def open(self) -> Store:
            bench.empty()
            return bench.store

        def pass_time(self, seconds: float) -> None:
            bench.pass_time(seconds)

    run_state_machine_as_test(
        AsTheModelSays,
        settings=settings(
            max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# Many at once


def test_of_threads_one_wins_and_no_more_hold_slots_than_there_are(store: Store) -> None:
    def race(number: int) -> tuple[bool, bool]:
        [swapped] = store.swap(Swap("k", None, new(f"v{number}")))
        return swapped.done, store.take("s", f"holder {number}", limit=3, ttl=60) == 0

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(race, range(60)))

    assert sum(done for done, _ in outcomes) == 1
    assert sum(taken for _, taken in outcomes) == 3


def test_of_processes_one_claims_each_key(shared: Bench) -> None:
    wins = crowd(shared.url, "claim", rounds=40)

    assert sorted(round_ for mine in wins for round_ in mine) == list(range(40))


def test_no_process_overwrites_what_another_just_wrote(shared: Bench) -> None:
    crowd(shared.url, "take_over", rounds=10)

    record = shared.store.read("k")
    assert record is not None
    assert record.version.startswith("80:")


def test_processes_claim_many_keys_at_once_in_any_order(shared: Bench) -> None:
    wins = crowd(shared.url, "claim_many", rounds=10)

    assert sorted(round_ for mine in wins for round_ in mine) == list(range(10))


def test_processes_never_hold_more_slots_than_there_are(shared: Bench) -> None:
    wins = crowd(shared.url, "take", rounds=10)

    assert sum(map(len, wins)) == 5


def test_processes_lose_no_count_and_share_no_mark(shared: Bench) -> None:
    crowd(shared.url, "add", rounds=30)
    wins = crowd(shared.url, "mark", rounds=20)

    assert shared.store.get("n") == str(8 * 20)
    assert sorted(round_ for mine in wins for round_ in mine) == list(range(20))


def test_a_forked_process_uses_no_connection_of_its_parent(shared: Bench) -> None:
    wins = crowd(shared.url, "claim", rounds=20, warm=True, processes=4)

    assert sorted(round_ for mine in wins for round_ in mine) == list(range(20))
