"""
What a task is declared to do, and what became of a message: ``celerykit explain``.

::

    tasks   the contract, the retry policy with its delays, what happens at a crash
    life    a message's attempts so far, and where it is now
    queues  what is in Redis, without taking it out
    text    for people and programs
"""

from __future__ import annotations

from celerykit.explain.life import Life, Sighting, life_of, life_text
from celerykit.explain.tasks import Ambiguous, facts_of, near, task_of, task_text
from celerykit.explain.text import as_json

__all__ = [
    "Ambiguous",
    "Life",
    "Sighting",
    "as_json",
    "facts_of",
    "life_of",
    "life_text",
    "near",
    "task_of",
    "task_text",
]
