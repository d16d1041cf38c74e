"""What a Redis or Valkey says of itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import redis

__all__ = ["RedisAnswers", "ask_redis"]

Role: TypeAlias = Literal["broker", "results", "store"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisAnswers:
    """
    One server. None stands for what it would not say.

    Attributes:
        role:
            What it is to the app, before all else.

        is_store:
            Whether counts, marks and keys are there.

        run_id:
            Its own, to know it again; its address, if it would not say.

        keeps:
            Whether it writes an append-only file.

        fsync:
            How often that reaches the disk: ``always``, ``everysec``, ``no``.

        is_failing:
            Whether its last write to that file went wrong.

        policy, limit, used:
            What it evicts when its memory is full, and the bytes.

        ahead:
            Seconds that its clock is ahead of ours.

        may_eval:
            Whether this user may run scripts.

        untold:
            What it would not say.
    """

    role: Role
    is_store: bool = False
    name: str = "Redis"
    version: tuple[int, ...] | None = None
    run_id: str = ""
    keeps: bool | None = None
    fsync: str | None = None
    is_failing: bool = False
    policy: str | None = None
    limit: int | None = None
    used: int | None = None
    is_replica: bool | None = None
    ahead: float | None = None
    may_eval: bool | None = None
    untold: tuple[str, ...] = ()


def ask_redis(client: Any, *, role: Role) -> RedisAnswers:
    """Ask with as few rights as possible: managed servers refuse CONFIG, and most else is in INFO."""
    untold: list[str] = []
    server = _or_untold(untold, "INFO", lambda: dict(client.info())) or {}
    fsync = _or_untold(untold, "CONFIG GET appendfsync", lambda: client.config_get("appendfsync").get("appendfsync"))
    ahead = _or_untold(untold, "TIME", lambda: _ahead(client))
    is_valkey = "valkey_version" in server
    return RedisAnswers(
        role=role,
        is_store=role == "store",
        name="Valkey" if is_valkey else "Redis",
        version=_version(server.get("valkey_version" if is_valkey else "redis_version")),
        run_id=str(server.get("run_id") or _address(client)),
        keeps=bool(server["aof_enabled"]) if "aof_enabled" in server else None,
        fsync=fsync,
        is_failing=server.get("aof_last_write_status", "ok") != "ok",
        policy=server.get("maxmemory_policy"),
        limit=server.get("maxmemory"),
        used=server.get("used_memory"),
        is_replica=server["role"] == "slave" if "role" in server else None,
        ahead=ahead,
        may_eval=_may_eval(client),
        untold=tuple(untold),
    )


def _address(client: Any) -> str:
    known = getattr(getattr(client, "connection_pool", None), "connection_kwargs", {})
    place = known.get("path") or known.get("host")
    return f"{place}:{known.get('port', '')}" if place else ""


def _or_untold(untold: list[str], what: str, question: Callable[[], Any]) -> Any:
    try:
        return question()
    except redis.ResponseError:  # no right to, or no such command
        untold.append(what)
        return None


def _may_eval(client: Any) -> bool:
    try:
        client.eval("return 1", 0)
    except redis.ResponseError:
        return False
    return True


def _ahead(client: Any) -> float:
    before = time.time()
    seconds, micros = client.time()
    return float(seconds + micros / 1e6 - (before + time.time()) / 2)


def _version(text: Any) -> tuple[int, ...] | None:
    numbers = str(text or "").split(".")
    return tuple(map(int, numbers)) if all(number.isdigit() for number in numbers) else None
