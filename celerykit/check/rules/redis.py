"""Rules about a Redis or Valkey that was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from celerykit.check.facts import Facts
from celerykit.check.findings import Finding, named
from celerykit.check.live import Answers
from celerykit.check.live.redis import RedisAnswers

__all__ = ["RULES"]

#: For LMOVE and its kin, by which a message is taken without being lost in between.
_OLDEST = (6, 2)

#: Seconds by which clocks may differ before somebody notices.
_CLOCK = 5

#: The part of its memory from which on a server is nearly full.
_FULL = 0.9

_ROLES = {"broker": "the broker ({})", "results": "the result backend's {}", "store": "the store ({})"}


def _name(server: RedisAnswers, *, first: bool = True) -> str:
    name = _ROLES[server.role].format(server.name)
    return f"T{name[1:]}" if first else name


def forgets(facts: Facts, server: RedisAnswers) -> Iterator[Finding]:
    """Find a broker that forgets its messages when it stops."""
    if server.role != "broker":
        return
    if server.keeps is False:
        yield Finding(
            "redis-no-aof",
            "error",
            f"{_name(server)} writes no append-only file: when it stops, every task and dead letter in it is lost.",
            "Set appendonly yes in its configuration (a managed one has it among its parameters).",
        )
    if server.keeps and server.fsync == "no":
        yield Finding(
            "redis-fsync-off",
            "warning",
            f"{_name(server)} has appendfsync no: when its machine stops, up to half a minute of tasks is lost.",
            "Set appendfsync everysec, or always.",
        )
    if server.keeps and server.fsync == "everysec":
        yield Finding(
            "redis-fsync-everysec",
            "info",
            f"{_name(server)} has appendfsync everysec: when its machine stops, about a second of tasks is lost.",
            "Set appendfsync always, where that is too much; each publish then waits for the disk.",
        )
    if server.keeps and server.is_failing:
        yield Finding(
            "redis-aof-failing",
            "error",
            f"{_name(server)} could not write its append-only file the last time it tried.",
            "Look at its log and at its disk.",
        )


def forgets_keys(facts: Facts, server: RedisAnswers) -> Iterator[Finding]:
    """Find a store that forgets which calls are done. Of a broker, `forgets` says more."""
    if server.is_store and server.role != "broker" and server.keeps is False and facts.needing_store:
        names = tuple(task.name for task in facts.needing_store)
        yield Finding(
            "store-no-aof",
            "warning",
            f"{_name(server)} writes no append-only file: when it stops, nobody knows which calls of {named(names)} "
            "are done, and they may run twice.",
            "Set appendonly yes in its configuration (a managed one has it among its parameters).",
            names,
        )


def evicts(facts: Facts, server: RedisAnswers) -> Iterator[Finding]:
    """Find a server that makes room by throwing things away."""
    is_asked = server.role == "broker" or server.is_store
    if server.policy in (None, "noeviction") or not is_asked:
        return
    takes_queues = server.role == "broker" and str(server.policy).startswith("allkeys")
    takes_keys = server.is_store and bool(facts.needing_store)
    is_sure = bool(server.limit) and (takes_queues or takes_keys)
    what = "whole queues" if takes_queues else "results, counts and marks"
    if takes_keys:
        what += ", and the keys of calls, which then run twice,"
    when = "when its memory is full" if server.limit else "if a limit for its memory is ever set"
    yield Finding(
        "redis-evicts",
        "error" if is_sure else "warning",
        f"{_name(server)} has maxmemory-policy {server.policy}: {when} it throws away {what} without a word.",
        "Set maxmemory-policy noeviction, and keep caches in another server.",
    )


def full(facts: Facts, server: RedisAnswers) -> Iterator[Finding]:
    """Find a server that will soon take nothing more."""
    if server.limit and server.used and server.used > _FULL * server.limit:
        yield Finding(
            "redis-nearly-full",
            "warning",
            f"{_name(server)} uses {server.used / server.limit:.0%} of the memory it may have.",
            "Raise maxmemory, let results expire sooner, or look at what fills it.",
        )


def replica(facts: Facts, server: RedisAnswers) -> Iterator[Finding]:
    """Find a server that takes no writes."""
    if server.is_replica:
        yield Finding(
            "redis-replica",
            "error",
            f"{_name(server)} is a replica: it takes no writes, or loses them.",
            "Point the URL to the primary, or use sentinel://.",
        )


def old(facts: Facts, server: RedisAnswers) -> Iterator[Finding]:
    """Find a server that is too old."""
    if server.name == "Redis" and server.version is not None and server.version < _OLDEST:
        version = ".".join(map(str, server.version))
        yield Finding(
            "redis-old",
            "error",
            f"{_name(server)} is Redis {version}, and celerykit needs {'.'.join(map(str, _OLDEST))}.",
            "Upgrade it, or use Valkey.",
        )


def clock(facts: Facts, server: RedisAnswers) -> Iterator[Finding]:
    """Find a clock that is not the broker's."""
    if server.ahead is None or abs(server.ahead) < _CLOCK or server.role == "store":
        return  # who has only the store's leases goes by the store's clock
    word = "behind" if server.ahead > 0 else "ahead of"
    yield Finding(
        "clock-differs",
        "warning",
        f"This machine's clock is {abs(server.ahead):.1f} s {word} that of {_name(server, first=False)}: workers whose "
        "clocks differ start countdowns early or late, and take for expired what is not.",
        "Let NTP or chrony keep the clocks of all machines.",
    )


def no_scripts(facts: Facts, server: RedisAnswers) -> Iterator[Finding]:
    """Find a server that refuses what leases and counts are made of."""
    if server.may_eval is False:
        yield Finding(
            "redis-no-scripts",
            "error",
            f"{_name(server)} lets this user run no scripts, which leases, counts and marks are made of.",
            "Give the user EVAL and EVALSHA (ACL SETUSER … +@scripting).",
        )


def untold(facts: Facts, server: RedisAnswers) -> Iterator[Finding]:
    """Say what remains unknown."""
    if server.untold:
        yield Finding(
            "redis-untold",
            "info",
            f"{_name(server)} does not tell this user: {', '.join(server.untold)}.",
            "Look there yourself: appendonly yes, appendfsync everysec or always, maxmemory-policy noeviction.",
        )


_OF_ONE: tuple[Callable[[Facts, RedisAnswers], Iterator[Finding]], ...] = (
    forgets,
    forgets_keys,
    evicts,
    full,
    replica,
    old,
    clock,
    no_scripts,
    untold,
)


def each_server(facts: Facts, answers: Answers) -> Iterator[Finding]:
    """Judge each server that was asked."""
    for server in answers.redis:
        for rule in _OF_ONE:
            yield from rule(facts, server)


RULES: tuple[Callable[[Facts, Answers], Iterator[Finding]], ...] = (each_server,)
