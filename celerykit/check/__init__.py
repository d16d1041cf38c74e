"""
Checks that a person or a deployment asks for: ``celerykit check``.

::

    apps      the app that -A names
    settings  --settings: what they are, and where each came from
    facts     what the app says of itself, as plain data
    live      --live: what the broker, the result backend and the store say
    rules     each a small function from facts to findings
    findings  what is wrong, how bad it is, and the fix
"""

from __future__ import annotations

from celerykit.check.apps import AppNotFound, find, import_tasks, settings_of
from celerykit.check.facts import facts_of
from celerykit.check.findings import Finding, Report
from celerykit.check.live import ask
from celerykit.check.rules import findings_of, live_findings_of
from celerykit.check.settings import Row, as_json, as_text, rows

__all__ = [
    "AppNotFound",
    "Finding",
    "Report",
    "Row",
    "as_json",
    "as_text",
    "check_app",
    "rows",
    "settings_of",
]


def check_app(app: object, *, live: bool = False) -> Report:
    """
    Look for what loses, doubles or stops tasks.

    Args:
        app:
            The app, or what ``-A`` says.

        live:
            Ask the broker, the result backend and the store too. It takes a
            few publish deadlines at most, and changes nothing there.

    Raises:
        AppNotFound: There is none, or it or its tasks cannot be imported.

        InvalidSettings: Something is wrong with its settings.
    """
    found = find(app)
    import_tasks(found)
    facts = facts_of(found)
    findings = findings_of(facts)
    if live:
        findings += live_findings_of(facts, ask(found, facts))
    return Report(findings, is_live=live, tasks=len(facts.tasks), queues=len(facts.queues))
