"""
Declaring tasks, and calling them in place.
"""

from __future__ import annotations

import asyncio
import gc
import pickle
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import celery
import pytest
from pydantic import BaseModel

from celerykit import (
    Call,
    CeleryKit,
    InvalidContract,
    InvalidOptions,
    InvalidPayload,
    Next,
    ResultNotStored,
    Task,
    loops,
    shared_task,
)
from celerykit.call import compose, validated
from celerykit.contract import Contract
from celerykit.headers import Headers
from celerykit.idempotency import once
from celerykit.limits import limited
from celerykit.retry import Snooze, retried
from celerykit.task import STEPS


class Order(BaseModel):
    amount: int


def test_the_order_of_the_steps_is_one_tuple() -> None:
    assert (once, validated, limited, retried) == STEPS


def test_steps_nest_outermost_first() -> None:
    def tagged(tag: str) -> Any:
        return lambda call_next, call: f"{tag}({call_next(call)})"

    call = Call("t", "1", 1, Headers(), Contract("t", lambda: None), (), {})

    assert compose([tagged("a"), tagged("b")], lambda call: call.task)(call) == "a(b(t))"


def test_the_validating_step_hands_on_types_and_writes_the_result() -> None:
    def double(order: Order) -> Order: ...

    call = Call("t", "1", 1, Headers(), Contract("t", double), ({"amount": "2"},), {})

    assert validated(lambda call: Order(amount=call.args[0].amount * 2), call) == {"amount": 4}
    with pytest.raises(InvalidPayload, match="did not run"):
        validated(lambda call: pytest.fail("it ran"), Call("t", "1", 1, Headers(), call.contract, ("x",), {}))


def test_an_eager_call_makes_the_same_journey(eager: Any) -> None:
    @eager.task
    def double(order: Order) -> Order:
        assert isinstance(order, Order)
        return Order(amount=order.amount * 2)

    assert double.delay({"amount": "2"}).get() == Order(amount=4)
    assert double.apply((Order(amount=3),)).get() == Order(amount=6)
    assert double.s(Order(amount=1)).then(double).delay().get() == Order(amount=4)
    with pytest.raises(InvalidPayload):
        double.delay("nonsense")


def test_an_eager_call_of_an_async_task_works_inside_a_running_loop(eager: Any) -> None:
    @eager.task
    async def double(n: int) -> int:
        await asyncio.sleep(0)
        return n * 2

    async def in_a_web_request() -> int:
        sent = await double.adelay(2)
        return (await sent.aget()) + double.delay(3).get(disable_sync_subtasks=False)

    assert asyncio.run(in_a_web_request()) == 10
    assert asyncio.run(double(4)) == 8


def test_a_user_s_step_may_answer_for_the_task(make_app: Any) -> None:
    def closed(call_next: Next, call: Call) -> Any:
        return "closed" if call.kwargs.get("n") == 0 else call_next(call)

    app = make_app(steps=[closed])
    app.conf.task_always_eager = True

    @app.task
    def opened(n: int) -> str:
        return f"opened {n}"

    assert [opened.delay(n=n).get() for n in (0, 1)] == ["closed", "opened 1"]


def test_a_plain_call_is_the_function(app: Any) -> None:
    @app.task
    def double(order: Order) -> Order:
        return order

    order = Order(amount=1)

    assert double(order) is order


def test_models_defined_in_the_declaring_function_or_further_down_are_found(app: Any) -> None:
    class Local(BaseModel):
        n: int

    @app.task
    def local(value: Local) -> Local:
        return value

    @app.task
    def forward(value: Later) -> Later:
        return value

    assert local.contract.dump((Local(n=1),), {}) == (({"n": 1},), {})
    assert forward.contract.dump((Later(n=1),), {}) == (({"n": 1},), {})


class Later(BaseModel):
    n: int


def test_a_declaration_that_cannot_be_a_contract_fails_at_its_line(app: Any) -> None:
    class Thing: ...

    with pytest.raises(InvalidContract, match="parameter 'thing': Thing cannot be read from JSON"):

        @app.task
        def task(thing: Thing) -> None: ...


def test_a_misspelt_option_is_refused(app: Any) -> None:
    with pytest.raises(InvalidOptions, match="there is no option 'ignore_results'; did you mean 'ignore_result'"):

        @app.task(ignore_results=True)
        def task() -> None: ...


def test_an_option_that_would_hide_a_method_is_refused(app: Any) -> None:
    with pytest.raises(InvalidOptions, match=r"would hide the method Task\.map"):

        @app.task(map=3)
        def task() -> None: ...


def test_options_of_a_base_class_and_hooks_are_options(app: Any) -> None:
    class Base(celery.Task):  # type: ignore[type-arg]
        colour = "red"

        def on_success(self, *args: Any) -> None: ...

    @app.task(base=Base, colour="blue", shadow_name=lambda *args: "shadow")
    def task(n: int) -> int:
        return n

    assert isinstance(task, Base)
    assert isinstance(task, Task)
    assert task.colour == "blue"  # type: ignore[attr-defined]
    assert task.contract is not None


def test_what_returns_nothing_stores_no_success_unless_it_is_told_to(app: Any) -> None:
    @app.task
    def silent() -> None: ...

    @app.task(ignore_result=False)
    def kept() -> None: ...

    @app.task
    def loud() -> int:
        return 1

    @app.task
    def unknown():  # type: ignore[no-untyped-def]
        ...

    assert [task.ignore_result for task in (silent, kept, loud, unknown)] == [True, False, False, False]
    assert silent.store_errors_even_if_ignored
    with pytest.raises(ResultNotStored, match="ignore_result=False"):
        silent.AsyncResult("1").get()


def test_without_a_backend_a_result_says_so(make_app: Any) -> None:
    app = make_app(backend=None)

    @app.task
    def loud() -> int:
        return 1

    with pytest.raises(ResultNotStored, match="CELERY_RESULT_BACKEND"):
        loud.delay().get()


def test_celery_s_own_tasks_stay_stock(app: Any) -> None:
    assert app.tasks["celery.chord_unlock"].contract is None


def test_an_app_survives_pickling_with_its_settings() -> None:
    app = CeleryKit("unit", broker="memory://", set_as_current=False)
    app.conf.task_always_eager = True

    again = pickle.loads(pickle.dumps(app))

    assert isinstance(again, CeleryKit)
    assert again.main == "unit"
    assert again.conf.task_always_eager is True


def test_callers_of_a_task_without_typing_are_not_checked(app: Any) -> None:
    @app.task(typing=False)
    def task(n: int) -> None: ...

    assert task.prepare((), {}, {})[:2] == ((), {})
    assert task.prepare(("3",), {}, {})[:2] == ((3,), {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("nan")]])
def test_nan_is_refused(app: Any, value: Any) -> None:
    @app.task
    def task(a, number):  # type: ignore[no-untyped-def]
        ...

    with pytest.raises(InvalidPayload, match="argument 'number': holds NaN or Infinity"):
        task.delay(1, value)


def test_a_lone_surrogate_is_refused_and_an_emoji_is_not(app: Any) -> None:
    @app.task
    def task(text: Any) -> None: ...

    task.delay("🎉 \\ud83c")
    with pytest.raises(InvalidPayload, match="lone surrogate"):
        task.delay("\ud83c")


def test_what_cannot_be_json_is_refused(app: Any) -> None:
    @app.task
    def task(thing: Any) -> None: ...

    circle: list[Any] = []
    circle.append(circle)

    with pytest.raises(InvalidPayload, match="argument 'thing': holds something that cannot be written as JSON"):
        task.delay(object())
    with pytest.raises(InvalidPayload, match="refers to itself"):
        task.delay(circle)


def test_pickle_still_takes_what_json_does_not(app: Any) -> None:
    @app.task(serializer="pickle")
    def task(thing: Any) -> None: ...

    task.delay({1, 2})


def test_a_payload_that_is_too_large_is_refused(make_app: Any) -> None:
    app = make_app(max_payload_bytes=1000)

    @app.task
    def task(text: str) -> None: ...

    task.delay("x" * 900)
    with pytest.raises(InvalidPayload, match=r"CELERYKIT_MAX_PAYLOAD_BYTES is 1000"):
        task.delay("x" * 1000)


@pytest.mark.parametrize(
    "options",
    [
        {"countdown": 366 * 86400},
        {"eta": datetime.now(UTC) + timedelta(days=366)},
        {"eta": datetime(9999, 1, 1)},
        {"countdown": float("nan")},
        {"countdown": "5"},
    ],
)
def test_a_delay_that_no_broker_should_hold_is_refused(app: Any, options: Any) -> None:
    @app.task
    def task() -> None: ...

    with pytest.raises(InvalidOptions, match="was not sent"):
        task.apply_async(**options)


def test_a_delay_within_bounds_is_sent(app: Any) -> None:
    @app.task
    def task() -> None: ...

    task.apply_async(eta=datetime.now(UTC) + timedelta(days=1))
    task.using(countdown=5.5).delay()


def test_an_async_task_is_refused_under_green_threads(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Monkey:
        @staticmethod
        def is_module_patched(name: str) -> bool:
            return True

    monkeypatch.setitem(__import__("sys").modules, "gevent.monkey", Monkey)  # type: ignore[arg-type]

    @app.task
    async def task() -> None: ...

    with pytest.raises(InvalidOptions, match="cannot run under gevent"):
        task.delay()


def test_a_header_of_a_newer_sender_is_tolerated_and_kept() -> None:
    newer = {"celerykit": {"v": 2, "contract": "abc", "colour": "red"}, "mine": 1}

    assert Headers.of(newer) == Headers(contract="abc")
    assert Headers(contract="def").added_to(newer) == {
        "celerykit": {"v": 1, "contract": "def", "colour": "red"},
        "mine": 1,
    }
    assert Headers.of({"celerykit": "nonsense"}) == Headers.of(None) == Headers()


def test_an_eager_async_task_in_a_loop_sees_its_request(eager: Any) -> None:
    @eager.task(bind=True)
    async def own_id(self: Task[..., Any]) -> str:
        return str(self.request.id)

    async def in_a_web_request() -> bool:
        sent = own_id.delay()
        return bool(sent.get(disable_sync_subtasks=False) == sent.id)

    assert asyncio.run(in_a_web_request())


def test_a_child_class_has_a_contract_and_a_result_of_its_own(app: Any) -> None:
    class Silent(app.Task):  # type: ignore[name-defined,misc]
        name = "unit.silent"

        def run(self, n: int) -> None: ...

    class Loud(Silent):
        name = "unit.loud"

        def run(self, order: Order) -> Order:  # type: ignore[override]
            return order

    silent, loud = app.register_task(Silent()), app.register_task(Loud())

    assert (silent.contract.task, loud.contract.task) == ("unit.silent", "unit.loud")
    assert (silent.ignore_result, loud.ignore_result) == (True, False)


def test_a_shared_task_with_our_base_works_in_a_stock_app() -> None:
    stock = celery.Celery("stock", broker="memory://", backend="cache+memory://", set_as_current=False)

    @shared_task(name="unit.based", base=Task)
    def based(n: int) -> int:
        return n

    assert stock.tasks["unit.based"].apply((3,)).get() == 3
    stock.tasks["unit.based"].delay(3)


def test_a_thread_s_loop_ends_with_the_thread() -> None:
    seen: list[asyncio.AbstractEventLoop] = []

    async def look() -> None:
        seen.append(asyncio.get_running_loop())

    thread = threading.Thread(target=lambda: [loops.run(look), loops.run(look)])
    thread.start()
    thread.join()
    gc.collect()

    assert seen[0] is seen[1]
    assert seen[0].is_closed()


def test_an_eager_call_that_is_put_off_for_ever_fails(eager: Any) -> None:
    @eager.task
    def waits() -> int:
        raise Snooze(1)

    assert waits.apply().state == "FAILURE"


def test_a_program_ends_whose_async_task_has_used_a_thread() -> None:
    """
    To close a loop that has, asyncio starts a thread; while Python ends, it would wait for that without end.
    """
    program = (
        "import asyncio\nfrom celerykit import CeleryKit\n"
        "app = CeleryKit('shop', set_as_current=False)\napp.conf.task_always_eager = True\n"
        "@app.task\nasync def look() -> int:\n    return await asyncio.to_thread(lambda: 7)\n"
        "print(look.delay().get())\n"
    )

    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)

    assert (out.stdout, out.returncode) == ("7\n", 0), out.stderr
