"""
Several processes that want the same of one store, at once.

They are forked by a process of their own, which has no thread. What to do comes
to it as JSON, and what came of it goes back so.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celerykit.stores import New, Store, Swap, open_store

_context = multiprocessing.get_context("fork")


def claim(store: Store, number: int, round_: int) -> bool:
    """Claim the round's key, which nobody has."""
    [swapped] = store.swap(Swap(f"k{round_}", None, New(f"v{number}", "data", ttl=600)))
    return swapped.done


def take_over(store: Store, number: int, round_: int) -> bool:
    """Take over from whoever had the key last, and try again when somebody else just did."""
    expected = getattr(store.read("k"), "version", None)
    while True:
        count = int((expected or "0:").partition(":")[0]) + 1
        [swapped] = store.swap(Swap("k", expected, New(f"{count}:{number}:{round_}", "data", ttl=600)))
        if swapped.done:
            return True
        expected = getattr(swapped.found, "version", None)


def take(store: Store, number: int, round_: int) -> bool:
    """Take one of five slots for a new holder."""
    return store.take("s", f"{number}:{round_}", limit=5, ttl=600) == 0


def add(store: Store, number: int, round_: int) -> bool:
    """Add to one count, and take off a third of it again."""
    store.add("n", ttl=600)
    if round_ % 3 == 0:
        store.subtract("n")
    return True


def mark(store: Store, number: int, round_: int) -> bool:
    """Be the first."""
    return store.mark(f"m{round_}", str(number), ttl=600) is None


def claim_many(store: Store, number: int, round_: int) -> bool:
    """Claim ten keys in one call, each process in another order, and say whether it got the round's first one."""
    keys = [f"k{round_}:{(number + step) % 10}" for step in range(10)]
    swapped = store.swap(*(Swap(key, None, New(f"v{number}", "data", ttl=600)) for key in keys))
    return swapped[keys.index(f"k{round_}:0")].done


ACTS: dict[str, Callable[[Store, int, int], bool]] = {
    act.__name__: act for act in (claim, take_over, take, add, mark, claim_many)
}


def crowd(url: str, act: str, *, rounds: int, warm: bool = False, processes: int = 8) -> list[list[int]]:
    """
    Let processes do the same at once, and tell the rounds that each of them won.

    Args:
        warm:
            Whether the process they are forked from has used the store before.
    """
    told = {"url": url, "act": act, "rounds": rounds, "warm": warm, "processes": processes}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.integration.stores_crowd", json.dumps(told)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    assert (said["codes"], ended.stderr) == ([0] * processes, "")
    wins: list[list[int]] = said["wins"]
    return wins


def main() -> None:
    told: dict[str, Any] = json.loads(sys.argv[1])
    store = open_store(told["url"], timeout=20)
    if told["warm"]:
        # Its connections are inherited.
        store.get("warm-up")
    barrier = _context.Barrier(told["processes"])
    queue: Any = _context.SimpleQueue()
    numbers = range(told["processes"])
    workers = [_context.Process(target=run, args=(store, told, number, barrier, queue)) for number in numbers]
    for process in workers:
        process.start()
    wins = [queue.get() for _ in workers]
    for process in workers:
        process.join(10)
    # The parent's own connections still work.
    store.get("warm-up")
    print(json.dumps({"wins": wins, "codes": [process.exitcode for process in workers]}))


def run(store: Store, told: dict[str, Any], number: int, barrier: Any, queue: Any) -> None:
    wins: list[Any] = []
    try:
        barrier.wait(30)
        act = ACTS[told["act"]]
        wins = [round_ for round_ in range(told["rounds"]) if act(store, number, round_)]
    except Exception as error:
        wins = [f"{type(error).__name__}: {error}"]
        raise
    finally:
        queue.put(wins)


if __name__ == "__main__":
    main()
