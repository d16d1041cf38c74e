"""Several beats, one tick: beats that share a store, in a time that is handed to them."""

from __future__ import annotations

import itertools
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import celery.beat
import kombu.exceptions
import pytest
from celery.schedules import crontab
from hypothesis import given, settings
from hypothesis import strategies as st

from celerykit import CeleryKit, InvalidOptions, InvalidPayload, StoreUnavailable
from celerykit.beat import Scheduler, status
from celerykit.beat.book import entry_key
from celerykit.beat.lead import leader_key
from celerykit.beat.ticks import State, Tick
from celerykit.pulse import ail, find
from celerykit.schedules import read
from celerykit.stores import New, Swap
from celerykit.stores.memory import MemoryStore

LEASE = 30.0
START = datetime(2026, 3, 2, 12, 0, 0, tzinfo=UTC)


class Killed(BaseException):
    """The end of a beat's process, wherever it is."""


class SharedStore(MemoryStore):
    """One that all beats of a test share."""

    is_shared = True


class Wire:
    """
    One beat's way to the store: what is asked may fail before it is done, or after, or take its time.

    Attributes:
        plan:
            What happens at which call, by its number: a function that may raise.
    """

    is_shared = True

    def __init__(self, store: SharedStore) -> None:
        self._store = store
        self.calls = 0
        self.before: dict[int, Callable[[], None]] = {}
        self.after: dict[int, Callable[[], None]] = {}
        self.is_cut = False

    def __getattr__(self, name: str) -> Any:
        asked = getattr(self._store, name)

        def ask(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            number = self.calls
            if self.is_cut:
                raise StoreUnavailable("cut")
            self.before.pop(number, bool)()
            answer = asked(*args, **kwargs)
            self.after.pop(number, bool)()
            return answer

        return ask


class Sent(NamedTuple):
    """A message on its way to a worker."""

    at: datetime
    task: str
    id: str
    by: Any


class Beat(Scheduler):
    """A beat whose messages end up in a list."""

    world: World
    wire: Wire
    wakes_at: float
    broker_error: Exception | None = None
    before_send: Callable[[], None] = staticmethod(bool)
    after_send: Callable[[], None] = staticmethod(bool)

    def send_task(self, name: str, *args: Any, **options: Any) -> Any:
        hook, self.before_send = self.before_send, bool
        hook()
        if self.broker_error is not None:
            raise self.broker_error
        assert options["headers"]["celery_beat_task"] is True
        self.world.sent.append(Sent(self.world.now, name, options["task_id"], self))
        hook, self.after_send = self.after_send, bool
        hook()


class World:
    """Beats, their store, and the time, which passes when `run` says so."""

    def __init__(self, schedule: dict[str, Any], **conf: Any) -> None:
        self.now = START
        self.store = SharedStore(clock=self.clock)
        self.sent: list[Sent] = []
        self.beats: list[Beat] = []
        self.frozen: list[Beat | None] = []
        self.app: Any = CeleryKit("unit", broker="memory://", set_as_current=False)
        self.app.now = lambda: self.now.astimezone(self.app.timezone)
        # Without Celery's own entry, which cleans up.
        self.app.conf.update(beat_schedule=schedule, result_expires=None, **conf)
        self.app.finalize()

    def clock(self) -> float:
        return self.now.timestamp()

    def beat(self) -> Beat:
        """Start one more."""
        wire = Wire(self.store)
        self.app._store = wire
        beat = Beat(self.app, clock=self.clock)
        beat.world, beat.wire, beat.wakes_at = self, wire, self.clock()
        self.beats.append(beat)
        return beat

    def run(self, seconds: float = 0, *, without: Beat | None = None) -> None:
        """Let so many seconds pass; *without* is frozen as long."""
        end = self.clock() + seconds
        self.frozen.append(without)
        while True:
            awake = [beat for beat in self.beats if beat not in self.frozen]
            first = min(awake, key=lambda beat: beat.wakes_at, default=None)
            if first is None or first.wakes_at > end:
                break
            self.now = datetime.fromtimestamp(max(first.wakes_at, self.clock()), UTC)
            self.wake(first)
        self.frozen.pop()
        self.now = datetime.fromtimestamp(max(end, self.clock()), UTC)

    def wake(self, beat: Beat) -> None:
        try:
            pause = beat.tick()
        except Killed:
            if beat in self.beats:
                self.beats.remove(beat)
            return
        # Celery's own asks to be woken too early, again and again.
        beat.wakes_at = self.clock() + (pause if isinstance(beat, Beat) else max(pause, 0.01))

    def kill(self, beat: Beat) -> None:
        self.beats.remove(beat)

    def ids(self, task: str = "tick") -> list[str]:
        return [sent.id for sent in self.sent if sent.task == task]

    def times(self, task: str = "tick") -> list[float]:
        return [round((sent.at - START).total_seconds(), 1) for sent in self.sent if sent.task == task]


def every(seconds: float, **more: Any) -> dict[str, Any]:
    return {"tick": {"task": "tick", "schedule": seconds, **more}}


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, "celerykit.beat")
    return lambda: [record.getMessage().split()[0] for record in caplog.records if record.name == "celerykit.beat"]


# One of several


def test_one_beat_sends_what_is_due(events: Any) -> None:
    world = World(every(10))
    world.beat()

    world.run(35)

    assert world.times() == [10, 20, 30]
    assert len(set(world.ids())) == 3
    assert events() == ["beat.leads"]


def test_of_several_beats_one_sends(events: Any) -> None:
    world = World(every(10))
    for _ in range(3):
        world.beat()

    world.run(100)

    assert world.times() == [10 * n for n in range(1, 11)]
    assert len({sent.by for sent in world.sent}) == 1
    assert events() == ["beat.leads", "beat.stands_by", "beat.stands_by"]


def test_when_the_leader_is_killed_another_goes_on_within_a_lease(events: Any) -> None:
    world = World(every(10))
    first, second = world.beat(), world.beat()
    world.run(25)
    world.kill(first)

    world.run(75)

    assert world.times()[:2] == [10, 20]
    assert 20 < world.times()[2] <= 25 + LEASE + 1
    assert all(9 < b - a < 11 for a, b in zip(world.times()[2:], world.times()[3:], strict=False))
    assert world.sent[-1].by is second
    assert events().count("beat.missed") == 0


def test_when_the_leader_is_stopped_another_goes_on_at_once() -> None:
    world = World(every(10))
    first, _ = world.beat(), world.beat()
    world.run(25)
    first.close()
    world.kill(first)

    world.run(30)

    assert world.times() == [10, 20, 30, 40, 50]


def test_closing_twice_does_no_harm() -> None:
    """Celery's handler of signals closes the scheduler, and so does the end of its loop."""
    world = World(every(10))
    first = world.beat()
    world.run(5)
    first.close()
    second = world.beat()
    world.kill(first)
    world.run(1)
    first.close()

    world.run(5)

    assert [sent.by for sent in world.sent] == [second]


def test_a_beat_that_starts_late_knows_when_an_entry_last_ran() -> None:
    world = World(every(3600))
    first = world.beat()
    world.run(3000)
    first.close()
    world.kill(first)

    world.beat()
    world.run(1200)

    assert world.times() == [3600]


def test_a_leader_that_was_frozen_stands_by(events: Any) -> None:
    world = World(every(10))
    first, second = world.beat(), world.beat()
    world.run(25)
    world.run(60, without=first)

    world.run(40)

    assert {sent.by for sent in world.sent if sent.at > START + timedelta(seconds=60)} == {second}
    assert len(world.ids()) == len(set(world.ids()))
    assert all(b - a > 9 for a, b in zip(world.times(), world.times()[1:], strict=False))
    assert events() == ["beat.leads", "beat.stands_by", "beat.leads", "beat.lost", "beat.stands_by"]


def test_a_leader_that_was_frozen_while_nobody_else_was_there_leads_on(events: Any) -> None:
    world = World(every(10))
    first = world.beat()
    world.run(5)
    world.run(300, without=first)

    world.run(20)

    assert world.times() == [305, 315, 325]
    assert events() == ["beat.leads", "beat.missed"]


def test_two_apps_do_not_lead_each_other() -> None:
    world = World(every(10))
    world.beat()
    world.app.main = "other"
    world.app.conf.beat_schedule = {"tock": {"task": "tock", "schedule": 10}}
    world.beat()

    world.run(35)

    assert len(world.times("tick")) == len(world.times("tock")) == 3


def test_a_beat_that_stands_by_says_that_the_leader_has_another_schedule(events: Any) -> None:
    world = World(every(10))
    world.beat()
    world.run(1)
    world.app.conf.beat_schedule = every(20)
    world.beat()

    world.run(5)

    assert events() == ["beat.leads", "beat.stands_by", "beat.unlike"]


# The way of a tick


def test_a_tick_whose_sender_dies_before_it_is_sent_is_sent_by_the_next(events: Any) -> None:
    world = World(every(10))
    first, second = world.beat(), world.beat()
    first.before_send = die

    world.run(60)

    assert world.times()[0] <= 10 + LEASE + 2
    assert world.sent[0].by is second
    assert len(world.ids()) == len(set(world.ids()))


def test_a_tick_whose_sender_dies_when_it_was_sent_is_sent_again_under_its_id() -> None:
    """Nobody can tell. A task that remembers its calls does not run again."""
    world = World(every(100))
    first, second = world.beat(), world.beat()
    first.after_send = die

    world.run(150)

    assert [sent.by for sent in world.sent] == [first, second]
    assert len(set(world.ids())) == 1


def die() -> None:
    raise Killed


@pytest.mark.parametrize("hook", ["before", "after"])
@pytest.mark.parametrize("call", range(1, 12))
def test_wherever_a_leader_is_killed_each_tick_has_one_message_or_two_of_one_id(call: int, hook: str) -> None:
    world = World(every(10))
    first = world.beat()
    world.run(0)
    world.beat()
    getattr(first.wire, hook)[first.wire.calls + call] = die

    world.run(200)

    assert first not in world.beats
    assert_each_tick_once(world)
    assert max(gaps(world)) <= 10 + LEASE + 2


def assert_each_tick_once(world: World) -> None:
    """No more than one id for each run that was due, and never two runs within less than an interval."""
    firsts: dict[str, float] = {}
    for id_, at in zip(world.ids(), world.times(), strict=True):
        firsts.setdefault(id_, at)
    times = list(firsts.values())
    assert all(b - a >= 9.9 for a, b in itertools.pairwise(times)), times


def gaps(world: World) -> Iterator[float]:
    times = [0.0, *world.times(), (world.now - START).total_seconds()]
    return (b - a for a, b in itertools.pairwise(times))


@pytest.mark.parametrize("hook", ["before", "after"])
@pytest.mark.parametrize("call", range(1, 12))
def test_wherever_a_leader_is_frozen_no_tick_is_sent_twice(call: int, hook: str) -> None:
    """Between the store's answer and the message, and between the message and the store, it is under its id."""
    world = World(every(10))
    first = world.beat()
    world.run(0)
    world.beat()
    getattr(first.wire, hook)[first.wire.calls + call] = lambda: world.run(100, without=first)

    world.run(200)

    assert_each_tick_once(world)
    assert len(set(world.ids())) >= len(world.ids()) - 1
    assert max(gaps(world)) <= 10 + LEASE + 2


def test_a_leader_that_wakes_with_a_claim_that_has_lapsed_does_not_send() -> None:
    world = World(every(100))
    first, second = world.beat(), world.beat()
    world.run(90)
    claim = first._book.claim

    def slow_claim(*args: Any, **kwargs: Any) -> Any:
        claimed = claim(*args, **kwargs)
        world.run(50, without=first)
        return claimed

    first._book.claim = slow_claim  # type: ignore[method-assign]

    world.run(80)

    assert [sent.by for sent in world.sent] == [second]


def test_a_claim_whose_answer_was_lost_is_gone_on_with() -> None:
    world = World(every(100))
    first = world.beat()
    world.run(90)
    calm = first.wire.calls
    for n in range(1, 4):
        first.wire.after[calm + n] = unavailable

    world.run(30)

    assert len(world.ids()) == 1
    assert 100 <= world.times()[0] <= 104


def unavailable() -> None:
    raise StoreUnavailable("no answer")


@pytest.mark.parametrize("hook", ["before", "after"])
def test_what_was_sent_and_could_not_be_noted_is_noted_when_the_store_is_back(hook: str) -> None:
    world = World(every(100))
    first = world.beat()

    def cut() -> None:
        getattr(first.wire, hook).update({first.wire.calls + n: unavailable for n in range(1, 4)})

    first.after_send = cut
    world.run(150)

    assert world.times() == [100]
    state = State.load(world.store.read(entry_key("unit", "tick")).data)  # type: ignore[union-attr]
    assert state is not None
    assert (state.runs, state.tick) == (1, None)


def test_what_another_took_over_meanwhile_is_said(events: Any) -> None:
    world = World(every(100))
    first, _ = world.beat(), world.beat()

    def cut() -> None:
        first.wire.is_cut = True

    first.after_send = cut
    world.run(180)
    first.wire.is_cut = False
    world.run(10)

    assert len(world.ids()) == 2
    assert len(set(world.ids())) == 1
    assert events().count("beat.doubtful") == 1


# The broker


def test_a_tick_that_the_broker_did_not_take_is_sent_when_it_does(events: Any) -> None:
    world = World(every(100))
    first = world.beat()
    first.broker_error = kombu.exceptions.OperationalError("gone")
    world.run(200)
    first.broker_error = None

    world.run(50)

    assert 200 < world.times()[0] <= 216
    assert len(world.times()) == 1
    assert 5 < events().count("beat.not_sent") < 20


def test_while_a_broker_is_gone_nothing_piles_up() -> None:
    world = World(every(1))
    first = world.beat()
    first.broker_error = OSError("gone")
    world.run(60)
    first.broker_error = None

    world.run(16)

    assert world.times()[0] > 60
    assert all(b - a > 0.9 for a, b in zip(world.times(), world.times()[1:], strict=False))


def test_a_beat_that_stops_with_a_tick_in_hand_puts_it_down() -> None:
    world = World(every(100))
    first, second = world.beat(), world.beat()
    first.broker_error = OSError("gone")
    world.run(105)
    first.close()
    world.kill(first)

    world.run(2)

    assert [sent.by for sent in world.sent] == [second]


def test_an_entry_that_can_never_be_sent_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    world = World({**every(10), "bad": {"task": "tock", "schedule": 10}})
    first = world.beat()
    send = first.send_task

    def send_task(name: str, *args: Any, **options: Any) -> Any:
        if name == "tock":
            raise InvalidPayload("tock: argument 'n': Field required.")
        return send(name, *args, **options)

    first.send_task = send_task  # type: ignore[method-assign]

    world.run(35)

    assert world.times() == [10, 20, 30]
    assert caplog.text.count("Message Error") == 3
    assert "tock: argument 'n': Field required." in caplog.text


def test_an_entry_whose_schedule_breaks_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(crontab):
        def is_due(self, last_run_at: datetime) -> Any:
            raise RuntimeError("broken")

    world = World({**every(10), "bad": {"task": "tock", "schedule": Broken()}})
    world.beat()

    world.run(35)

    assert world.times() == [10, 20, 30]
    assert "Cannot calculate the next run of 'bad'" in caplog.text


# The store


def test_without_the_store_nothing_is_sent_and_it_is_said_once(events: Any) -> None:
    world = World(every(10))
    first, second = world.beat(), world.beat()
    world.run(15)
    first.wire.is_cut = second.wire.is_cut = True
    world.run(100)
    assert world.times() == [10]
    first.wire.is_cut = second.wire.is_cut = False

    world.run(30)

    assert 115 < world.times()[1] < 118
    assert len(world.ids()) == len(set(world.ids()))
    assert events().count("beat.store_unavailable") == 2
    assert events().count("beat.found_store") == 2


def test_a_store_that_has_forgotten_everything_is_told_again() -> None:
    world = World(every(100))
    world.beat()
    world.run(130)
    world.store._begin()

    world.run(200)

    assert world.times() == [100, 200, 300]


def test_a_record_that_is_none_is_written_anew() -> None:
    world = World(every(100))
    key = entry_key("unit", "tick")
    world.store.swap(Swap(key, None, New("x", "[]", ttl=1000)))
    world.store.swap(Swap(leader_key("unit"), None, New("x", "", ttl=1000, lease=-1)))
    world.beat()

    world.run(150)

    assert world.times() == [100]


def test_a_store_that_is_away_does_not_keep_a_beat_from_stopping() -> None:
    world = World(every(10))
    first = world.beat()
    world.run(5)
    first.wire.is_cut = True

    first.close()


# What was missed


def test_after_downtime_a_schedule_runs_once() -> None:
    world = World({"tick": {"task": "tick", "schedule": read(cron="*/5 * * * *")}})
    world.beat()
    world.run(301)
    world.kill(world.beats[0])
    world.run(3600)

    world.beat()
    world.run(600)

    assert world.times() == [300, 3901, 4200, 4500]


@pytest.mark.parametrize("when", [{"every": 300}, {"cron": "*/5 * * * *"}])
def test_or_leaves_out_what_was_missed(when: Any, events: Any) -> None:
    world = World({"tick": {"task": "tick", "schedule": read(**when, missed="skip")}})
    world.beat()
    world.run(301)
    world.kill(world.beats[0])
    world.run(3540)

    world.beat()
    world.run(400)

    late = [4141] if "every" in when else [3900, 4200]
    assert world.times() == [300, *late]
    assert events().count("beat.missed") == 1


def test_another_leader_is_no_downtime() -> None:
    world = World({"tick": {"task": "tick", "schedule": read(every=100, missed="skip")}})
    first, _ = world.beat(), world.beat()
    world.run(95)
    world.kill(first)

    world.run(40)

    assert len(world.times()) == 1


def test_a_tick_that_was_claimed_and_left_long_ago_is_left_out_too() -> None:
    world = World({"tick": {"task": "tick", "schedule": read(every=100, missed="skip")}})
    first = world.beat()
    first.before_send = die
    world.run(500)

    world.beat()
    world.run(50)

    assert world.times() == []


def test_what_is_late_says_so(events: Any, caplog: pytest.LogCaptureFixture) -> None:
    world = World(every(100))
    world.beat()
    world.run(1)
    world.kill(world.beats[0])
    world.run(999)

    world.beat()
    world.run(1)

    assert events() == ["beat.leads", "beat.leads", "beat.missed"]
    assert "entry=tick due=2026-03-02T12:01:40+00:00 late=900 then=once" in caplog.text


# Time


@pytest.mark.parametrize(
    ("change", "hours"),
    [
        # 02:30 is not there on this day, and twice on that one.
        (datetime(2026, 3, 29, tzinfo=UTC), [(28, 2, 30), (29, 3, 30), (30, 2, 30)]),
        (datetime(2026, 10, 25, tzinfo=UTC), [(24, 2, 30), (25, 2, 30), (26, 2, 30)]),
    ],
)
def test_the_hours_of_cron_are_those_of_the_time_zone(change: datetime, hours: list[tuple[int, int, int]]) -> None:
    """Also when clocks change; and as Celery's own scheduler has them."""
    ours, stock = in_berlin(change, Beat), in_berlin(change, celery.beat.Scheduler)

    assert [(at.day, at.hour, at.minute) for at in ours] == hours
    assert ours == stock


def in_berlin(change: datetime, kind: Any) -> list[datetime]:
    world = World({"tick": {"task": "tick", "schedule": read(cron="30 2 * * *")}}, timezone="Europe/Berlin")
    world.now = change - timedelta(hours=36)
    if kind is Beat:
        world.beat()
    else:
        beat = kind(world.app)
        beat.producer = None
        beat.send_task = lambda name, *args, **options: world.sent.append(Sent(world.now, name, "", beat))
        beat.wakes_at = world.clock()
        world.beats.append(beat)
    world.run(3 * 86400)
    # To the second: Celery's wakes a little early, or late.
    return [sent.at.astimezone(world.app.timezone).replace(microsecond=0) for sent in world.sent]


def test_a_beat_whose_clock_is_behind_does_not_send_again_what_is_sent() -> None:
    world = World({"tick": {"task": "tick", "schedule": read(cron="* * * * *")}})
    first = world.beat()
    world.run(60)
    first.close()
    world.kill(first)
    world.now -= timedelta(seconds=5)

    world.beat()
    world.run(64)

    assert len(world.ids()) == 1


# The state of an entry

times = st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2100, 1, 1), timezones=st.just(UTC))
ticks = st.builds(Tick, due=times, at=times, id=st.text(), by=st.text())
states = st.builds(State, since=times, sent_at=st.none() | times, runs=st.integers(0), tick=st.none() | ticks)


@given(states)
def test_a_state_is_read_as_it_was_written(state: State) -> None:
    assert State.load(state.dump()) == state


@given(states, states)
def test_states_have_one_version_only_if_they_are_the_same(state: State, other: State) -> None:
    assert (state.version == other.version) == (state == other)


@given(states, times)
def test_no_move_goes_back_in_time(state: State, at: datetime) -> None:
    for after in (state.sent(), state.skipped(at)):
        assert after.since >= state.since
        assert state.tick is None or after.since >= state.tick.due


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"since": 5, "runs": 1}', '{"since": "2026-01-01", "runs": []}', "x"]
)
def test_what_is_no_state_is_not_read_as_one(text: str) -> None:
    assert State.load(text) is None


# Whatever happens


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["freeze", "kill", "lose question", "lose answer", "refuse", "stop"]),
            st.integers(1, 40),
            st.sampled_from(["before", "after"]),
        ),
        max_size=6,
    )
)
def test_whatever_happens_each_tick_is_sent_under_one_id(happenings: list[tuple[str, int, str]]) -> None:
    world = World(every(10))
    for _ in range(3):
        world.beat()
    for what, when, hook in happenings:
        beat = world.beats[when % len(world.beats)]
        number = beat.wire.calls + when
        if what == "freeze":
            getattr(beat.wire, hook)[number] = lambda beat=beat: world.run(70, without=beat)
        elif what == "kill":
            getattr(beat.wire, hook)[number] = die
        elif what == "refuse":
            beat.broker_error = OSError("gone")
            world.run(when)
            beat.broker_error = None
        elif what == "stop":
            with suppress(Killed):
                beat.close()
            world.kill(beat)
        else:
            getattr(beat.wire, {"lose question": "before", "lose answer": "after"}[what])[number] = unavailable
        world.beat()
        world.run(when)
    world.run(120)

    assert_each_tick_once(world)
    assert max(Counter(world.ids()).values()) <= 2
    assert (world.now - START).total_seconds() - world.times()[-1] <= 10 + LEASE + 2


# The status


def test_the_status_says_who_leads_and_what_is_next() -> None:
    world = World({**every(10), "daily": {"task": "tock", "schedule": read(cron="0 3 * * *")}})
    world.beat()
    world.run(25)

    found = status(world.app)

    assert found.leader is not None
    assert found.leader.is_alive
    assert found.leader.node.endswith(f":{os.getpid()}")
    assert found.last == START + timedelta(seconds=20)
    daily, tick = (entry for entry in found.entries if entry.name in ("daily", "tick"))
    assert (tick.last, tick.next, tick.runs) == (found.last, START + timedelta(seconds=30), 2)
    assert (daily.last, daily.next, daily.runs) == (None, datetime(2026, 3, 3, 3, tzinfo=UTC), 0)
    assert "3" in daily.schedule


def test_the_status_says_that_nobody_leads() -> None:
    world = World(every(10))
    beat = world.beat()
    assert status(world.app).leader is None
    world.run(15)
    world.kill(beat)
    world.run(60)

    dead = status(world.app)
    beat.close()

    assert dead.leader is not None
    assert not dead.leader.is_alive
    assert dead.entries[-1].next == START + timedelta(seconds=20)
    assert status(world.app).leader is None


def test_the_status_says_what_is_being_sent() -> None:
    world = World(every(10))
    world.beat().before_send = die
    world.run(15)

    tick = status(world.app).entries[-1]

    assert tick.is_being_sent
    assert (tick.next, tick.last) == (START + timedelta(seconds=10), None)


def test_the_status_needs_the_store() -> None:
    world = World(every(10))
    world.beat().wire.is_cut = True

    with pytest.raises(StoreUnavailable):
        status(world.app)


# Beside Celery's own


def test_without_a_shared_store_it_is_celerys_own(app: Any, tmp_path: Any, events: Any) -> None:
    make: Any = Scheduler
    banner = make(app, schedule_filename=str(tmp_path / "beat"), lazy=True)

    scheduler = make(app, schedule_filename=str(tmp_path / "beat"), max_interval=7)
    scheduler.close()

    assert type(banner) is type(scheduler)
    assert isinstance(scheduler, celery.beat.PersistentScheduler)
    assert scheduler.max_interval == 7
    assert events() == ["beat.not_shared"]


@pytest.fixture
def signs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[str, bool]]]:
    """What the signs of life of this process's beats say: the state, and whether that is all right."""
    monkeypatch.setenv("CELERYKIT_HEALTH_DIR", str(tmp_path))

    def states() -> list[tuple[str, bool]]:
        found = find("beat", folder=tmp_path)
        return [(one.sign.state, ail(one, ready=True) is None) for one in found if one.sign is not None]

    return states


def test_a_beat_says_at_its_ticks_whether_it_leads(signs: Any) -> None:
    world = World(every(10))
    beat = world.beat()
    assert signs() == []

    world.run(1)
    assert signs() == [("leading", True)]
    beat.wire.is_cut = True
    world.run(40)
    assert signs() == [("without_store", False)]
    beat.wire.is_cut = False
    world.run(40)
    assert signs() == [("leading", True)]
    beat.close()
    assert signs() == []


def test_a_beat_that_stands_by_says_so(signs: Any) -> None:
    world = World(every(10))
    first, second = world.beat(), world.beat()
    first.tick()
    second.tick()

    assert signs() == [("standing_by", True)]


def test_a_beat_says_until_when_it_will_be_silent(signs: Any, tmp_path: Any) -> None:
    world = World(every(86400))
    pause = world.beat().tick()

    [one] = find("beat", folder=tmp_path)

    # A tick may take as long as its claim.
    assert one.sign is not None
    assert pause <= 10
    assert pause + LEASE <= one.sign.due <= pause + LEASE + 2


def test_without_a_shared_store_a_beat_says_that_it_is_alone(app: Any, tmp_path: Any, signs: Any, events: Any) -> None:
    make: Any = Scheduler
    scheduler = make(app, schedule_filename=str(tmp_path / "beat"))

    assert scheduler.tick() <= 10
    assert signs() == [("alone", True)]
    scheduler.close()
    assert signs() == []


def test_signs_of_a_beat_that_cannot_be_written_are_missed_once(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CELERYKIT_HEALTH_DIR", str(tmp_path / "file"))
    world = World(every(10))
    world.beat()

    world.run(60)

    assert len(world.sent) == 6
    assert [record.getMessage().split()[0] for record in caplog.records if record.name == "celerykit.health"] == [
        "health.not_written"
    ]


def test_a_stock_app_is_told_that_it_cannot_have_it() -> None:
    stock = celery.Celery("stock", set_as_current=False)

    with pytest.raises(InvalidOptions, match=r"needs one"):
        Scheduler(stock)


def test_for_the_banner_the_store_is_not_asked() -> None:
    world = World(every(10))
    wire = Wire(world.store)
    wire.is_cut = True
    world.app._store = wire

    scheduler = Scheduler(world.app, lazy=True)

    assert "lease 30 s" in scheduler.info
    assert wire.calls == 0


def test_an_entry_added_while_it_runs_is_sent() -> None:
    world = World(every(10))
    beat = world.beat()
    world.run(15)
    beat.add(name="more", task="tock", schedule=10)

    world.run(30)

    assert world.times("tock") == [30, 40]
    assert world.times() == [10, 20, 30, 40]


def test_options_and_a_task_id_of_the_entry_are_kept() -> None:
    world = World(every(10, options={"task_id": "mine", "queue": "slow"}))
    world.beat()

    world.run(25)

    assert world.ids() == ["mine", "mine"]
    assert world.app.conf.beat_schedule["tick"]["options"] == {"task_id": "mine", "queue": "slow"}


def test_a_beat_asked_to_end_ends_its_tick_first(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(every(10))
    beat = world.beat()

    def end(number: int, frame: Any) -> None:
        beat.close()
        raise SystemExit

    before = signal.signal(signal.SIGTERM, end)
    try:
        beat.before_send = lambda: os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit):
            world.run(15)
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)

    assert len(world.sent) == 1
    assert not status(world.app).entries[-1].is_being_sent
    assert status(world.app).leader is None


def test_a_second_signal_is_not_put_off() -> None:
    world = World(every(10))
    beat = world.beat()

    def end(number: int, frame: Any) -> None:
        raise SystemExit

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        beat.before_send = twice
        with pytest.raises(SystemExit):
            world.run(15)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert world.sent == []
