"""When a task is sent by itself: what may be written, and what is refused as it is declared."""

from __future__ import annotations

import textwrap
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import celery
import celery.beat
import pytest
from celery import _state
from celery.schedules import crontab
from celery.schedules import schedule as interval

from celerykit import CeleryKit, InvalidOptions, InvalidPayload
from celerykit import shared_task as celerykit_shared_task
from celerykit.schedules import install, missed_of, read


def fields(schedule: Any) -> tuple[set[int], ...]:
    assert isinstance(schedule, crontab)
    return schedule.minute, schedule.hour, schedule.day_of_month, schedule.month_of_year, schedule.day_of_week


@pytest.fixture
def few_shared_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep shared tasks of one test out of the apps of the next."""
    monkeypatch.setattr(_state, "_on_app_finalizers", set(cast("Any", _state)._on_app_finalizers))


# What may be written


@pytest.mark.parametrize("when", [90, 90.0, timedelta(seconds=90)])
def test_an_interval_is_seconds_or_a_timedelta(when: Any) -> None:
    assert read(when) == interval(90)
    assert read(every=when) == interval(90)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("*/5 * * * *", crontab(minute="*/5")),
        ("0 3 * * *", crontab(minute=0, hour=3)),
        ("  0   3 * *\t* ", crontab(minute=0, hour=3)),
        ("0,30 8-18/2 * * *", crontab(minute="0,30", hour="8-18/2")),
        ("0 22-2 * * *", crontab(minute=0, hour="22-2")),
        ("0 0 1 jan *", crontab(minute=0, hour=0, day_of_month=1, month_of_year=1)),
        ("0 0 29 2 *", crontab(minute=0, hour=0, day_of_month=29, month_of_year=2)),
        ("0 0 * March-MAY *", crontab(minute=0, hour=0, month_of_year="3-5")),
        ("0 0 * * mon-fri", crontab(minute=0, hour=0, day_of_week="1-5")),
        ("0 0 * * Sat,Sunday", crontab(minute=0, hour=0, day_of_week="0,6")),
        ("0 0 * * fri-mon", crontab(minute=0, hour=0, day_of_week="5,6,0,1")),
        ("0 0 * * 7", crontab(minute=0, hour=0, day_of_week=0)),
        ("0 0 * * 5-7", crontab(minute=0, hour=0, day_of_week="5,6,0")),
        ("0 0 13 * 0-6", crontab(minute=0, hour=0, day_of_month=13)),
    ],
)
def test_cron_text_is_five_fields(text: str, same: crontab) -> None:
    assert fields(read(text)) == fields(same)
    assert fields(read(cron=text)) == fields(same)


def test_cron_text_is_shown_as_it_was_written() -> None:
    assert "*/5 8-18 * * *" in repr(read("*/5 8-18 * * *"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "* * * *",
            "there must be five fields (minute, hour, day of the month, month, day of the week), and there are 4.",
        ),
        ("* * * * * *", "there are 6."),
        ("@daily", "there are 1."),
        ("60 * * * *", "the minute must be 0 to 59; got '60'."),
        ("* 24 * * *", "the hour must be 0 to 23; got '24'."),
        ("0 0 0 * *", "the day of the month must be 1 to 31; got '0'."),
        ("0 0 1 13 *", "the month must be 1 to 12, or jan to dec; got '13'."),
        ("0 0 * * 8", "the day of the week must be 0 to 6, or sun to sat; got '8'."),
        ("0 0 * * someday", "or sun to sat; got 'someday'."),
        ("mon * * * *", "the minute must be 0 to 59; got 'mon'."),
        ("0 0 * mon *", "or jan to dec; got 'mon'."),
        ("1-5-7 * * * *", "the minute '1-5-7' is none of"),
        ("-5 * * * *", "the minute '-5' is none of"),
        ("5, * * * *", "the minute '' is none of"),
        ("*5 * * * *", "the minute '*5' is none of"),
        ("? * * * *", "the minute '?' is none of"),
        ("0 0 L * *", "the day of the month must be 1 to 31; got 'L'."),
        ("5/15 * * * *", "has a step but no end; write 5-59/15."),
        ("*/0 * * * *", "must have a step from 1 to 59"),
        ("*/90 * * * *", "for longer intervals use every=timedelta(...)."),
        ("*/x * * * *", "must have a step from 1 to 59"),
        ("0 0 30 feb *", "never occurs"),
        ("0 0 13 * fri", "cron runs on either and Celery only on both"),
        ("٣ * * * *", "the minute '٣' is none of"),
    ],
)
def test_cron_text_that_would_not_mean_what_it_says_is_refused(text: str, says: str) -> None:
    with pytest.raises(InvalidOptions) as refused:
        read(text, what="shop.settle")

    assert str(refused.value).startswith(f"shop.settle: cron text {text!r}: ")
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "give either every"),
        ({"every": 5, "cron": "* * * * *"}, "give either every"),
        ({"every": "* * * * *"}, "every is seconds or a timedelta"),
        ({"cron": 5}, "cron is text"),
        ({"every": 0}, "longer than nothing"),
        ({"every": timedelta(seconds=-1)}, "longer than nothing"),
        ({"every": float("nan")}, "longer than nothing"),
        ({"every": float("inf")}, "longer than nothing"),
        ({"every": 1e15}, "longer than a timedelta can be"),
        ({"every": True}, "got bool"),
        ({"when": [5]}, "got list"),
        ({"every": 5, "missed": "all"}, "missed must be 'once' or 'skip', got 'all'."),
    ],
)
def test_what_is_no_schedule_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidOptions, match=r"^shop\.settle: ") as refused:
        read(**given, what="shop.settle")

    assert says in str(refused.value)


def test_a_schedule_of_celerys_is_left_as_it_is() -> None:
    mine = crontab(minute=5, hour="*/2")

    assert read(mine) is mine
    assert missed_of(mine) == "once"


def test_that_missed_runs_are_skipped_does_not_change_a_schedule_somebody_else_has() -> None:
    mine = crontab(minute=5)

    skipping = read(mine, missed="skip")

    assert skipping == mine
    assert (missed_of(skipping), missed_of(mine)) == ("skip", "once")


# What an app declares


def test_a_task_with_a_schedule_is_in_beats_schedule(app: Any) -> None:
    @app.task(name="shop.settle", schedule="0 3 * * *")
    def settle(day: int = 0) -> None: ...

    app.finalize()

    entry = app.conf.beat_schedule["shop.settle"]
    assert (entry["task"], entry["args"], entry["kwargs"], entry["options"]) == ("shop.settle", (), {}, {})
    assert fields(entry["schedule"]) == fields(crontab(minute=0, hour=3))


def test_a_signature_with_a_schedule_is_in_beats_schedule_as_it_will_be_sent(app: Any) -> None:
    @app.task(name="shop.remind")
    def remind(since: timedelta, *, loudly: bool = False) -> None: ...

    name = app.schedule(remind.s(timedelta(hours=2), loudly=True), every=60, queue="slow")
    app.schedule(remind.s(timedelta(hours=1)).set(priority=3), cron="0 8 * * mon", name="weekly", missed="skip")
    app.finalize()

    assert name == "shop.remind"
    entry, weekly = app.conf.beat_schedule["shop.remind"], app.conf.beat_schedule["weekly"]
    assert (entry["args"], entry["kwargs"]) == (("PT2H",), {"loudly": True})
    assert (entry["schedule"], entry["options"]) == (interval(60), {"queue": "slow"})
    assert (weekly["args"], weekly["options"]) == (("PT1H",), {"priority": 3})
    assert missed_of(weekly["schedule"]) == "skip"


def test_declaring_reads_no_configuration(make_app: Any) -> None:
    app = make_app()

    @app.task(schedule=5)
    def settle() -> None: ...

    assert not app.configured
    app.conf.beat_schedule = {"other": {"task": "other", "schedule": 1}}
    app.finalize()

    assert len(app.conf.beat_schedule) == 2


def test_a_schedule_declared_later_is_there_too(app: Any) -> None:
    app.finalize()

    @app.task(schedule=5)
    def settle() -> None: ...

    app.schedule(settle.s(), every=6, name="again")

    assert {settle.name, "again"} <= set(app.conf.beat_schedule)


def test_apps_do_not_see_each_others_schedules(make_app: Any) -> None:
    one, other = make_app(), make_app()

    @one.task(schedule=5)
    def settle() -> None: ...

    one.finalize()
    other.finalize()

    assert settle.name in one.conf.beat_schedule
    assert settle.name not in (other.conf.beat_schedule or {})


def test_a_shared_task_has_its_schedule_in_every_app(make_app: Any, few_shared_tasks: None) -> None:
    one, other = make_app(), make_app(timezone="Asia/Tokyo")

    @celerykit_shared_task(name="shared.settle", schedule="0 3 * * *")
    def settle() -> None: ...

    for app in (one, other):
        app.finalize()
    entries = [app.conf.beat_schedule["shared.settle"] for app in (one, other)]

    assert entries[0]["schedule"] is not entries[1]["schedule"]


def test_a_stock_app_is_not_troubled_by_a_shared_task_with_a_schedule(few_shared_tasks: None) -> None:
    stock = celery.Celery("stock", set_as_current=False, broker="memory://")

    @celerykit_shared_task(name="shared.for_stock", schedule=5)
    def for_stock() -> None: ...

    assert "shared.for_stock" in cast("Any", stock).tasks


def test_a_class_has_a_schedule_but_not_what_inherits_from_it(app: Any) -> None:
    class Base(app.Task):  # type: ignore[name-defined,misc]
        name = "base"
        schedule = "0 3 * * *"

        def run(self) -> None: ...

    class Derived(Base):
        name = "derived"

        def run(self) -> None: ...

    app.register_task(Base())
    app.register_task(Derived())
    app.finalize()

    assert "base" in app.conf.beat_schedule
    assert "derived" not in app.conf.beat_schedule


def test_names_in_the_annotations_may_be_defined_further_down(make_app: Any) -> None:
    module: dict[str, Any] = {"app": make_app(), "__name__": "later"}
    source = """
        @app.task(schedule=5)
        def settle(of: "Day" = 1) -> None: ...

        Day = int
    """
    exec(textwrap.dedent(source), module)

    module["app"].finalize()

    assert "later.settle" in module["app"].conf.beat_schedule


# What is refused


def test_a_schedule_that_cannot_be_read_is_refused_where_the_task_is_declared(app: Any) -> None:
    with pytest.raises(InvalidOptions, match=r"shop\.settle: cron text 'daily'"):

        @app.task(name="shop.settle", schedule="daily")
        def settle() -> None: ...


def test_a_task_that_needs_arguments_is_not_scheduled_by_its_decorator(app: Any) -> None:
    with pytest.raises(InvalidOptions) as refused:

        @app.task(name="shop.charge", schedule=5)
        def charge(amount: int) -> None: ...

    assert "shop.charge: a task with schedule= is sent without arguments." in str(refused.value)
    assert "Use app.schedule(task.s(...)" in str(refused.value)


@pytest.mark.parametrize(("args", "kwargs"), [(("ten",), {}), ((), {}), ((1,), {"x": 1})])
def test_arguments_that_do_not_fit_are_refused_where_the_schedule_is_declared(app: Any, args: Any, kwargs: Any) -> None:
    @app.task
    def charge(amount: int) -> None: ...

    with pytest.raises(InvalidPayload):
        app.schedule(charge.s(*args, **kwargs), every=5)


def test_a_canvas_is_refused(app: Any) -> None:
    @app.task
    def charge() -> None: ...

    for sig in (charge.si() | charge.si(), celery.group(charge.s()), charge):
        with pytest.raises(InvalidOptions, match="the signature of one task"):
            app.schedule(sig, every=5)


def test_a_task_that_lives_elsewhere_is_sent_as_it_is(app: Any) -> None:
    app.schedule(app.signature("elsewhere.charge", args=("x",)), every=5)
    app.finalize()

    assert app.conf.beat_schedule["elsewhere.charge"]["args"] == ("x",)


def test_two_schedules_of_one_name_are_refused(app: Any) -> None:
    @app.task(name="shop.settle", schedule=5)
    def settle() -> None: ...

    app.schedule(settle.s(), every=5, name="extra")
    for name in (None, "extra"):
        with pytest.raises(InvalidOptions, match="this name is taken by another schedule"):
            app.schedule(settle.s(), every=5, name=name)


def test_a_name_that_is_in_the_configuration_too_is_refused(app: Any) -> None:
    @app.task(name="shop.settle", schedule=5)
    def settle() -> None: ...

    app.conf.beat_schedule = {"shop.settle": {"task": "shop.settle", "schedule": 6}}

    with pytest.raises(InvalidOptions, match=r"shop\.settle: this name is taken in beat_schedule"):
        app.finalize()


def test_installing_again_changes_nothing(app: Any) -> None:
    @app.task(schedule=5)
    def settle() -> None: ...

    app.finalize()
    before = app.conf.beat_schedule
    install(app)

    assert app.conf.beat_schedule is before


def test_celerys_own_periodic_tasks_stay(app: Any) -> None:
    @app.task(schedule=5)
    def settle() -> None: ...

    app.add_periodic_task(10.0, settle.s(), name="stock")
    app.finalize()
    app.add_periodic_task(crontab(minute=1), settle.s(), name="stock too")

    assert {"stock", "stock too", settle.name} <= set(app.conf.beat_schedule)


def test_an_entry_is_one_that_celerys_own_scheduler_takes(app: Any) -> None:
    @app.task(name="shop.settle")
    def settle() -> None: ...

    app.schedule(settle.s(), cron="0 3 * * *", missed="skip")
    app.finalize()
    scheduler = celery.beat.Scheduler(app, lazy=True)
    scheduler.merge_inplace(app.conf.beat_schedule)

    entry = scheduler.schedule["shop.settle"]
    assert entry.schedule.remaining_estimate(datetime.now(UTC)) > timedelta(0)


def test_the_schedule_of_an_app_is_typed() -> None:
    """The overloads of `task` know the option, and `CeleryKit.schedule` takes what `s` gives."""
    app = CeleryKit("typed", set_as_current=False, broker="memory://")

    @app.task(shared=False, schedule=timedelta(hours=1))
    def settle(times: int = 1) -> None: ...

    assert app.schedule(settle.s(2), every=timedelta(minutes=5), name="often", queue="slow") == "often"
