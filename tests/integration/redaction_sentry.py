"""
Sentry's SDK, which tells all that it can, into a file.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import sentry_sdk
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.transport import Transport


class Recording(Transport):
    """Writes what it would send."""

    path: Path

    def capture_envelope(self, envelope: Any) -> None:
        """Write it."""
        written = io.BytesIO()
        envelope.serialize_into(written)
        with self.path.open("ab") as file:
            file.write(written.getvalue())


def start(path: str) -> None:
    """Begin to tell."""
    Recording.path = Path(path)
    sentry_sdk.init(
        dsn="http://key@localhost/1",
        transport=Recording,
        integrations=[CeleryIntegration()],
        send_default_pii=True,
        include_local_variables=True,
        traces_sample_rate=1.0,
    )


def add(name: str, value: Any) -> None:
    """Add to what is told of the running call."""
    sentry_sdk.set_extra(name, value)
