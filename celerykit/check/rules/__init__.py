"""
The rules: each a small pure function from facts to findings.

What every code means is listed in ``docs/check.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from celerykit.check.facts import Facts
from celerykit.check.findings import Finding
from celerykit.check.live import Answers
from celerykit.check.rules import queues, rabbitmq, redis, services, settings, tasks

__all__ = ["findings_of", "live_findings_of"]

_RULES: tuple[Callable[[Facts], Iterator[Finding]], ...] = (*settings.RULES, *tasks.RULES, *queues.RULES)

_LIVE_RULES: tuple[Callable[[Facts, Answers], Iterator[Finding]], ...] = (
    *services.RULES,
    *redis.RULES,
    *rabbitmq.RULES,
)


def findings_of(facts: Facts) -> list[Finding]:
    """Judge what an app says of itself."""
    return [finding for rule in _RULES for finding in rule(facts)]


def live_findings_of(facts: Facts, answers: Answers) -> list[Finding]:
    """Judge what its broker, result backend and store say."""
    return [finding for rule in _LIVE_RULES for finding in rule(facts, answers)]
