"""
Logs: one line of JSON for each event, in a worker and in beat; text where a person looks.

    program     where Celery sets up logging; what `app.log` is
    lifting     Celery's own records as events
    lines       a record as a line
    handlers    what takes lines
    pipe        lines to a stream that may be slow to read
    printed     `print`, and exceptions that nobody catches
    joined      our part, for programs that have logging of their own
"""

from __future__ import annotations

from celerykit.logs.joined import lifted, redacted
from celerykit.logs.lines import Formatter
from celerykit.logs.program import Logging

__all__ = ["Formatter", "Logging", "lifted", "redacted"]
