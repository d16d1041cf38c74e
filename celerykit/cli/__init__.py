"""
The command line, as ``celerykit``.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["health"]:
        # Probes ask every few seconds, of each process: it has a way of its own, without click.
        from celerykit.cli.health import run

        sys.exit(run(sys.argv[2:]))
    from celerykit.cli.commands import celerykit

    celerykit(prog_name="celerykit")
