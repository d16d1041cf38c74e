"""
See celerykit work on this machine: an embedded Valkey, a stock `celery worker`, and the shop.

Started by `make demo`. Everything it starts, it stops, also on Ctrl-C. What the worker says of each part is shown as it
says it: events with facts, out of its log of JSON lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

from celerykit.dev.processes import Process
from celerykit.dev.servers import Server, ServerFailed, ServerNotFound, find_binary

HERE = Path(__file__).parent

#: Seconds: for the worker to be ready, and for any one result.
READY_WITHIN, RESULT_WITHIN = 30.0, 20.0


def say(line: str = "") -> None:
    print(line, flush=True)


def show(code: str, call: Callable[[], object]) -> None:
    """Print a line of code, what it gives or raises, and how long that took."""
    started = time.perf_counter()
    try:
        outcome = repr(call())
    except Exception as error:  # the demo shows errors
        outcome = f"{type(error).__name__}: {error}"
    say(f"\n>>> {code}\n{outcome}\n    {(time.perf_counter() - started) * 1000:.0f} ms")


#: Of an event that is shown: the most, and the facts, in this order.
_MOST_SHOWN = 12
_FACTS = ("text", "attempt", "then", "reason", "error", "delay", "wait_ms", "run_ms", "correlation_id", "tenant")

#: What happens for every call, and is only counted.
_COUNTED = ("task.received", "task.started", "task.succeeded", "task.sent")


class Log:
    """A worker's log: a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shown = 0

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines() if line.startswith("{")]

    def count(self, event: str) -> int:
        return sum(line["event"] == event for line in self.lines())

    def tell(self, *, all_of: str = "") -> None:
        """Show what the worker has said since the last time; of one task, every event."""
        lines = self.lines()
        new, self._shown = lines[self._shown :], len(lines)
        counted: Counter[str] = Counter()
        told = []
        for line in new:
            if line["event"] in _COUNTED and line.get("task") != all_of:
                counted[line["event"]] += 1
            elif "id" in line:
                told.append(line)
        if counted or told:
            say("\n    the worker's log:")
        for line in told[:_MOST_SHOWN]:
            say(f"    {_in_a_line(line)}")
        rest = counted + Counter(line["event"] for line in told[_MOST_SHOWN:])
        if rest:
            say("    and " + ", ".join(f"{count} x {event}" for event, count in rest.items()))


def _in_a_line(line: Mapping[str, Any]) -> str:
    facts = " ".join(f"{name}={str(line[name]).splitlines()[0][:60]}" for name in _FACTS if line.get(name) is not None)
    return f"{line['timestamp'][11:23]} {line['event']:22} {line.get('task', ''):18} {facts}"


@contextlib.contextmanager
def worker(env: dict[str, str]) -> Iterator[Log]:
    """Run a stock worker, and give its log."""
    with tempfile.TemporaryDirectory() as folder:
        log = Log(Path(folder) / "worker.log")
        command = [sys.executable, "-m", "celery", "-A", "shop", "worker", "--loglevel", "INFO", "--concurrency", "2"]
        with log.path.open("wb") as output:
            process = Process(command, env=env, cwd=HERE, output=output)
        try:
            wait_for(lambda: log.count("worker.ready") > 0, of=process, log=log)
            yield log
        finally:
            process.stop(grace=10)


def wait_for(condition: Callable[[], bool], *, of: Process, log: Log) -> None:
    deadline = time.monotonic() + READY_WITHIN
    while not condition():
        if of.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the worker did not start:\n{log.path.read_text()}")
        time.sleep(0.05)


def typed_calls() -> None:
    from celery import chord
    from shop import Order, charge, email_receipt, exchange_rate, turnover

    order = Order(order_id=uuid4(), amount=Decimal("19.90"))

    say("\n== Typed calls: models in, models out")
    show("charge.delay(order).get()", lambda: charge.delay(order).get(timeout=RESULT_WITHIN))
    show(
        "charge.s(order).then(email_receipt, cc='books@shop.example').delay().get()",
        lambda: charge.s(order).then(email_receipt, cc="books@shop.example").delay().get(timeout=RESULT_WITHIN),
    )
    show(
        "chord([charge.s(order)] * 3, turnover.s())().get()",
        lambda: chord([charge.s(order) for _ in range(3)], turnover.s())().get(timeout=RESULT_WITHIN),
    )
    show(
        "exchange_rate.delay('EUR', 'USD').get()   # async def",
        lambda: exchange_rate.delay("EUR", "USD").get(timeout=RESULT_WITHIN),
    )
    show(
        "[r.get() for r in charge.enqueue_many([(order,)] * 500)]   # how many?",
        lambda: len([result.get(timeout=RESULT_WITHIN) for result in charge.enqueue_many([(order,)] * 500)]),
    )


def each_key_once() -> None:
    from shop import Order, pay

    order = Order(order_id=uuid4(), amount=Decimal("19.90"))

    say("\n== A double click: two calls, one payment")
    first = pay.delay(order)
    second = pay.delay(order)
    say("\n>>> first, second = pay.delay(order), pay.delay(order)")
    show("second.duplicate", lambda: second.duplicate)
    show("first.get()", lambda: first.get(timeout=RESULT_WITHIN))
    show("first.get() == second.get()", lambda: first.get() == second.get(timeout=RESULT_WITHIN))
    show("pay.delay(order).get()   # later: the same, and nothing runs", lambda: pay.delay(order).get())
    other = Order(order_id=order.order_id, amount=Decimal("1990"))
    show("pay.delay(Order(order_id=order.order_id, amount=1990))", lambda: pay.delay(other))

    say("\n== The same, and the process is killed while it pays")
    order = Order(order_id=uuid4(), amount=Decimal("19.90"))
    first = pay.delay(order, seconds=1.0)
    victim = running_in(first.id)
    say(f"\npay.delay(order) runs in process {victim}; kill -9 {victim}")
    os.kill(victim, signal.SIGKILL)
    second = pay.delay(order, seconds=1.0)
    show("first.get() == second.get()", lambda: first.get(RESULT_WITHIN) == second.get(RESULT_WITHIN))


def wrong_calls() -> None:
    import celery
    from shop import Order, app, charge, exchange_rate

    order = Order(order_id=uuid4(), amount=Decimal("19.90"))
    wrong = {"order_id": "17", "amount": -1}
    stranger = celery.Celery(broker=app.conf.broker_url, backend=app.conf.result_backend, set_as_current=False)

    say("\n== Wrong calls: refused before anything is sent")
    show("charge.delay({'order_id': '17', 'amount': -1})", lambda: charge.delay(wrong))  # type: ignore[arg-type]
    show("charge.delay(order, curency='USD')", lambda: charge.delay(order, curency="USD"))  # type: ignore[call-arg]
    show("charge.s(order).then(exchange_rate, 'EUR')", lambda: charge.s(order).then(exchange_rate, "EUR"))  # type: ignore[arg-type]

    say("\n== A wrong message, sent past us with plain Celery: refused in the worker, and never run")
    show(
        "Celery().send_task('shop.charge', [{'order_id': '17', 'amount': -1}]).get()",
        lambda: stranger.send_task("shop.charge", [wrong]).get(timeout=RESULT_WITHIN),
    )


def crashes() -> None:
    from shop import Order, pack

    order = Order(order_id=uuid4(), amount=Decimal("19.90"))

    say("\n== A process is killed in the middle of a task: the task comes back")
    result = pack.delay(order, seconds=2.0)
    victim = running_in(result.id)
    say(f"\npack.delay(order, seconds=2.0) runs in process {victim}; kill -9 {victim}")
    os.kill(victim, signal.SIGKILL)
    show("result.get()   # the process that finished it", lambda: result.get(timeout=RESULT_WITHIN))


def running_in(task_id: str) -> int:
    """Wait until a task runs, and give its process."""
    from shop import app

    deadline = time.monotonic() + RESULT_WITHIN
    while time.monotonic() < deadline:
        for tasks in (app.control.inspect(timeout=0.3).active() or {}).values():
            for task in tasks:
                if task["id"] == task_id and task["worker_pid"]:
                    return int(task["worker_pid"])
    raise SystemExit(f"the task {task_id} did not start")


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + RESULT_WITHIN
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(otherwise)
        time.sleep(0.05)


def retries() -> None:
    from shop import Order, book_courier

    say("\n== Retries are data: printed before they happen, and then they happen")
    assert book_courier.retry_policy is not None
    say(f"\n>>> print(book_courier.retry_policy.describe())\n{book_courier.retry_policy.describe()}")
    order = Order(order_id=uuid4(), amount=Decimal("19.90"))
    show("book_courier.delay(order).get()", lambda: book_courier.delay(order).get(timeout=RESULT_WITHIN))


def dead_letters() -> None:
    from shop import Order, app, ship

    order = Order(order_id=uuid4(), amount=Decimal("19.90"))

    say("\n== What fails for good is kept: found by its cause, repaired, replayed")
    result = ship.delay(order, "Portugal")
    show("result = ship.delay(order, 'Portugal'); result.get()", lambda: result.get(timeout=RESULT_WITHIN))
    wait_until(lambda: app.dead_letters.count(task=ship) == 1, "the letter was not written")
    show(
        "[(cause.count, cause.task, cause.error) for cause in app.dead_letters.top()]",
        lambda: [(cause.count, cause.task, cause.error) for cause in app.dead_letters.top()],
    )
    show(
        "app.dead_letters.replay(error='NoSuchCountry', edit=lambda args, kwargs: ([args[0], 'PT'], kwargs))",
        lambda: app.dead_letters.replay(error="NoSuchCountry", edit=lambda args, kwargs: ([args[0], "PT"], kwargs)),
    )
    show(
        "ship.AsyncResult(result.id).get()   # the same call, under its own id",
        lambda: ship.AsyncResult(result.id).get(timeout=RESULT_WITHIN),
    )
    show("app.dead_letters.count(task=ship)", lambda: app.dead_letters.count(task=ship))


def one_story() -> None:
    from shop import Card, ShopContext, app, verify

    card = Card(holder="Ada", number="4242424242424242")

    say("\n== One id from a request to the last retry, and no secret in any of it")
    with ShopContext.bound(correlation_id="req-8f2", tenant="acme"):
        result = verify.delay(card)
    say("\n>>> with ShopContext.bound(correlation_id='req-8f2', tenant='acme'): result = verify.delay(card)")
    show("result.get()", lambda: result.get(timeout=RESULT_WITHIN))
    wait_until(lambda: app.dead_letters.count(task=verify) == 1, "the letter was not written")


def demo() -> None:
    # SIGTERM unwinds as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(find_binary(wheel_first=True)))
        os.environ |= {"CELERY_BROKER_URL": server.url, "CELERY_RESULT_BACKEND": server.backend_url}
        say(f"{server.binary.name} and a stock celery worker are starting ...")
        log = stack.enter_context(worker(dict(os.environ)))
        say(f"ready after {time.perf_counter() - started:.1f} s")
        sys.path.insert(0, str(HERE))
        for part, all_of in (
            (typed_calls, ""),
            (each_key_once, "shop.pay"),
            (wrong_calls, ""),
            (crashes, "shop.pack"),
            (retries, "shop.book_courier"),
            (dead_letters, "shop.ship"),
            (one_story, "shop.verify"),
        ):
            part()
            log.tell(all_of=all_of)
        ran = log.count("task.succeeded")
        say(f"\n{ran} tasks succeeded, {time.perf_counter() - started:.1f} s in all. Stopping everything ...")


def main() -> int:
    try:
        demo()
    except (ServerNotFound, ServerFailed) as error:
        print(f"make demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
