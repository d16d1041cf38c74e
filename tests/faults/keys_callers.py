"""
Those who call, in processes of their own: to be killed, or to be many.

    python -m tests.faults.keys_callers '{"task": "pay", "kwargs": {"number": "1"}}'

Prints a JSON line for each call: what its caller was told.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.faults import keys_shop as shop

__all__ = ["run"]

#: Seconds that anything here is waited for.
_PATIENCE = 40.0


def run(task: str, kwargs: dict[str, Any], *, times: int = 1, after: str = "", stays: bool = True) -> list[Any]:
    """
    Call a task.

    Args:
        times:
            So many calls at once, each from a thread of its own.

        after:
            The number whose gate is waited for first.

        stays:
            Whether to wait for the results.
    """
    called: Any = getattr(shop, task)

    def call(_: int) -> Any:
        shop.wait_for("gate", after) if after else None
        result = called.delay(**kwargs)
        told = result.get(timeout=_PATIENCE).model_dump() if stays else None
        return {"id": result.id, "duplicate": result.duplicate, "result": told}

    shop.ledger.write("ready", task_id=kwargs["number"])
    with ThreadPoolExecutor(times) as threads:
        return list(threads.map(call, range(times)))


if __name__ == "__main__":
    for line in run(**json.loads(sys.argv[1])):
        print(json.dumps(line))
