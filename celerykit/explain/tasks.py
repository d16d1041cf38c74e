"""What a task is declared to do."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Literal

from celerykit.errors import CelerykitError
from celerykit.explain.text import columns
from celerykit.idempotency import Key
from celerykit.marks import paths_of
from celerykit.needs import needs_store
from celerykit.retry import Dead, spoken

__all__ = ["Ambiguous", "facts_of", "near", "task_of", "task_text"]


class Ambiguous(CelerykitError):
    """A word that several tasks' names end with."""


def task_of(app: Any, name: str) -> Any:
    """
    Find a task by its name, or by the last part of it; None if there is none.

    Raises:
        Ambiguous: Several tasks end like this.
    """
    if name in app.tasks:
        return app.tasks[name]
    named = sorted(full for full in app.tasks if full.rpartition(".")[2] == name)
    if len(named) > 1:
        raise Ambiguous(f"{name!r} is the end of several tasks' names: {', '.join(named)}. Give the whole name.")
    return app.tasks[named[0]] if named else None


def near(app: Any, name: str) -> str | None:
    """Guess which task was meant."""
    ours = {full.rpartition(".")[2]: full for full in app.tasks if not full.startswith("celery.")}
    close = difflib.get_close_matches(name, [*ours, *ours.values()], n=1)
    return ours.get(close[0], close[0]) if close else None


def facts_of(task: Any) -> dict[str, Any]:
    """Tell what a task is declared to do, as JSON values."""
    contract, policy = task.contract, task.retry_policy
    described = contract.describe() if contract else {}
    conf = task.app.conf
    return {
        "task": task.name,
        "contract": contract and contract.fingerprint,
        "returns": described.pop("return", {}),
        "parameters": described,
        "required": list(contract.parameters.required) if contract else [],
        "queue": _queue_of(task),
        "result": _kept_result(task),
        "on_crash": task.on_crash,
        "max_deliveries": task.app.settings.kit.max_deliveries,
        "time_limit": task.time_limit or conf.task_time_limit,
        "soft_time_limit": task.soft_time_limit or conf.task_soft_time_limit,
        "retry": policy and _facts_of_policy(policy),
        "once": _facts_of_claims(task),
        "limits": [str(rule) for rule in task.limit_rules],
        "on_store_down": task.on_store_down if needs_store(task) else None,
    }


def _facts_of_claims(task: Any) -> dict[str, Any] | None:
    claims = task.claims
    if claims is None:
        return None
    policy = claims.policy
    return {"key": _key_of(task), "running": policy.running, "done": policy.done, "keep": policy.keep}


def _key_of(task: Any) -> list[str] | Literal["id", "function", "arguments"]:
    """Tell what a call's key is made of: the marked fields, if there are some."""
    if task.once_policy is None:
        return "id"
    if task.once_policy.key is not None:
        return "function"
    return [".".join(map(str, path)) for path in paths_of(task.contract.types, Key)] or "arguments"


def _facts_of_policy(policy: Any) -> dict[str, Any]:
    return {
        "attempts": policy.attempts,
        "within": policy.within,
        "on": {_name(kind): {"does": type(remedy).__name__, **asdict(remedy)} for kind, remedy in policy.on.items()},
        "table": [row._asdict() for row in policy.table()],
        "text": policy.describe(),
    }


def _queue_of(task: Any) -> str | None:
    own = getattr(task, "queue", None)
    try:
        route = task.app.amqp.router.route({"queue": own} if own else {}, task.name, (), {}, task)
    except Exception:  # noqa: BLE001  (an edge: routers are the user's, and may want the arguments of a call)
        return None
    found = route.get("queue")
    return str(getattr(found, "name", found)) if found else None


def _kept_result(task: Any) -> str:
    if not task.ignore_result:
        return "stored"
    return "only failures are stored" if task.store_errors_even_if_ignored else "not stored"


def task_text(facts: Mapping[str, Any]) -> str:
    """Write what `facts_of` told for a person."""
    crash = {
        "rerun": f"rerun: what a dying process leaves is started again, {facts['max_deliveries']} times at most",
        "bury": "bury: what a dying process leaves becomes a dead letter, and is never started twice",
    }
    limits = [
        f"{spoken(limit)} ({kind})"
        for kind, limit in (("soft", facts["soft_time_limit"]), ("hard", facts["time_limit"]))
        if limit
    ]
    lines = [
        ("contract", facts["contract"] or "none: a task of Celery's own"),
        *(
            (f"  {name}", _type(schema) + ("" if name in facts["required"] else ", optional"))
            for name, schema in facts["parameters"].items()
        ),
        ("  returns", _type(facts["returns"])),
        ("queue", facts["queue"] or "as the routers say, for each call"),
        ("result", facts["result"]),
        ("on crash", crash[facts["on_crash"]]),
        ("time limit", ", ".join(limits) or "none"),
        ("retry", (facts["retry"] or {}).get("text") or f"no policy; on any error: {Dead()}"),
        *_store_lines(facts),
    ]
    return "\n".join([facts["task"], *columns(lines)])


_KEYS = {
    "id": "a call's id is its key",
    "function": "a function makes the key",
    "arguments": "all arguments together are the key",
}

_DUPLICATES = {
    "join": "a second call gets the first one's result",
    "raise": "a second call is an error",
    "skip": "a second call does nothing",
    "reuse": "a second call gets its result",
    "rerun": "a second call runs",
}

_DOWN = {
    "run": "run: without an answer a call runs, though it may be a duplicate",
    "retry": "retry: without an answer a call is put off",
    "fail": "fail: without an answer a call is refused",
}


def _store_lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Write what a task keeps in the store, if it does."""
    if once := facts["once"]:
        key = once["key"]
        yield (
            "once",
            "\n".join(
                [
                    _KEYS[key] if isinstance(key, str) else f"the key is {', '.join(key)}",
                    f"while it is queued or runs: {_DUPLICATES[once['running']]}",
                    f"when it is done, for {spoken(once['keep'])}: {_DUPLICATES[once['done']]}",
                ]
            ),
        )
    if facts["limits"]:
        yield "limits", "\n".join(facts["limits"])
    if facts["on_store_down"]:
        yield "store", _DOWN[facts["on_store_down"]]


def _type(schema: Mapping[str, Any]) -> str:
    """Name the type a JSON Schema describes, in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "enum" in schema:
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " | ".join(dict.fromkeys(_type(one) for one in schema[several]))
    kind = str(schema.get("type", "anything"))
    if kind == "array" and isinstance(schema.get("items"), Mapping):
        return f"array of {_type(schema['items'])}"
    if kind == "object" and "properties" in schema:
        return str(schema.get("title", kind))
    return f"{kind} ({schema['format']})" if "format" in schema else kind


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
