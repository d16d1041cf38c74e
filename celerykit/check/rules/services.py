"""Rules about who answers at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from celerykit.check.facts import Facts
from celerykit.check.findings import Finding
from celerykit.check.live import Answers

__all__ = ["RULES"]


def broker(facts: Facts, answers: Answers) -> Iterator[Finding]:
    """Find a broker that does not answer."""
    if answers.broker_problem:
        yield Finding(
            "broker-unreachable",
            "error",
            f"The broker could not be asked: {answers.broker_problem}.",
            "Check that it runs, and CELERY_BROKER_URL.",
        )


def backend(facts: Facts, answers: Answers) -> Iterator[Finding]:
    """Find a result backend that does not answer."""
    if answers.backend_problem:
        yield Finding(
            "backend-unreachable",
            "error",
            f"The result backend could not be asked: {answers.backend_problem}.",
            "Check that it runs, and CELERY_RESULT_BACKEND.",
        )


def store(facts: Facts, answers: Answers) -> Iterator[Finding]:
    """Find a store that does not answer."""
    if answers.store_problem:
        yield Finding(
            "store-unreachable",
            "error",
            f"Counts and marks could not be asked for: {answers.store_problem}.",
            "Check that it runs, and CELERYKIT_STORE_URL.",
        )


def letters(facts: Facts, answers: Answers) -> Iterator[Finding]:
    """Find dead letters that wait for somebody."""
    if answers.letters:
        queue = facts.kit.dead_letter_queue
        count = "1 dead letter waits" if answers.letters == 1 else f"{answers.letters} dead letters wait"
        yield Finding(
            "dead-letters-wait",
            "info",
            f"{count} in {queue}.",
            "Look why with `celerykit dead top`, and replay or purge them.",
            (queue,),
        )


RULES: tuple[Callable[[Facts, Answers], Iterator[Finding]], ...] = (broker, backend, store, letters)
