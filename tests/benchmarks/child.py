"""
A fresh interpreter that measures itself: sending, or the contract alone.

It is told through a list on the server how many calls to make, as often as
`lanes.Sender` likes, and answers through another one.
"""

from __future__ import annotations

import json
import sys
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter, process_time
from typing import Any

import celery
import redis

from tests.benchmarks.subjects import ORDER, RECEIPT, Subject, argument_for, arguments_for, declare

__all__ = ["BULK", "FOUND", "GO", "commands"]

#: The lists on which it is asked, and answers.
GO, FOUND = "benchmark-go", "benchmark-found"

#: Calls in one `group`, or one `enqueue_many`.
BULK = 500

#: What the benchmark itself asks a server for.
_OURS = ("info", "hlen", "rpush", "blpop", "llen", "lpop", "rename")


def main(how: str, subject: str, url: str, client_url: str) -> None:
    # It waits while others have their turn.
    client = redis.Redis.from_url(client_url, socket_timeout=None)
    measure = _measure_of(how, Subject.read(subject), url, client)
    while True:
        asked: Any = client.blpop([GO])
        client.rpush(FOUND, json.dumps(measure(int(asked[1]))))


def _measure_of(how: str, subject: Subject, url: str, client: Any) -> Callable[[int], dict[str, float]]:
    task = declare(subject, url=url)
    if how == "contract":
        return partial(_contract, task)
    send = partial(_SENDERS[how], task)
    return lambda count: _sending(client, send, _arguments(how, subject, count))


def _arguments(how: str, subject: Subject, count: int) -> Sequence[Any]:
    """Give what the calls are made with: all with the same, but for first calls of their keys."""
    return arguments_for(subject, count) if how == "first" else [argument_for(subject)] * count


def commands(client: Any) -> int:
    """Count what a server was asked to do, but for what the benchmark itself asks it."""
    calls = {name.removeprefix("cmdstat_"): stats["calls"] for name, stats in client.info("commandstats").items()}
    return sum(number for name, number in calls.items() if name not in _OURS)


# Sending


def _by_delay(task: Any, arguments: Sequence[Any]) -> None:
    for argument in arguments:
        task.delay(argument)


def _by_group(task: Any, arguments: Sequence[Any]) -> None:
    for start in range(0, len(arguments), BULK):
        celery.group([task.s(argument) for argument in arguments[start : start + BULK]]).apply_async()


def _by_enqueue_many(task: Any, arguments: Sequence[Any]) -> None:
    for start in range(0, len(arguments), BULK):
        task.enqueue_many([(argument,) for argument in arguments[start : start + BULK]])


#: By `delay` are also sent: calls each of which is the first with its key, and such that come again.
_SENDERS = {
    "delay": _by_delay,
    "first": _by_delay,
    "again": _by_delay,
    "group": _by_group,
    "enqueue_many": _by_enqueue_many,
}


def _sending(client: Any, send: Callable[[Sequence[Any]], None], arguments: Sequence[Any]) -> dict[str, float]:
    count = len(arguments)
    asked = commands(client)
    wall, cpu = perf_counter(), process_time()
    send(arguments)
    cpu, wall = process_time() - cpu, perf_counter() - wall
    return {"cpu": cpu / count * 1e6, "wall": wall / count * 1e6, "commands": (commands(client) - asked) / count}


# The contract


def _contract(task: Any, count: int) -> dict[str, float]:
    contract = task.contract
    dumped, result = contract.dump((ORDER,), {}), contract.dump_result(RECEIPT)
    stock = declare(Subject("pydantic", results=True), url="memory://")
    plain = ORDER.model_dump(mode="json")
    calls: dict[str, Callable[[], Any]] = {
        "contract.dump": lambda: contract.dump((ORDER,), {}),
        "contract.load": lambda: contract.load(*dumped),
        "contract.dump_result": lambda: contract.dump_result(RECEIPT),
        "contract.load_result": lambda: contract.load_result(result),
        "pydantic=True, the caller's side": lambda: stock._dump_pydantic_arguments((ORDER,), {}),
        "Order.model_dump": lambda: ORDER.model_dump(mode="json"),
        "Order.model_validate": lambda: type(ORDER).model_validate(plain),
    }
    return {
        name: min(timeit.repeat(call, timer=process_time, number=count)) / count * 1e6 for name, call in calls.items()
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
