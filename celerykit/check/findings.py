"""What a check finds: how bad it is, what it is, and the fix."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

__all__ = ["SEVERITIES", "Finding", "Report", "Severity", "named"]

Severity: TypeAlias = Literal["error", "warning", "info"]

#: The worst first.
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

#: So many names fit a sentence; JSON has them all.
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """
    One thing to know.

    Attributes:
        code:
            Its name, which stays the same: for ``--ignore``, and for a search in the docs.

        severity:
            ``error`` loses or doubles tasks, or stops them; ``warning`` may,
            or is not what was meant; ``info`` is good to know.

        what:
            One sentence.

        fix:
            One sentence.

        subjects:
            The tasks or queues it is about.
    """

    code: str
    severity: Severity
    what: str
    fix: str
    subjects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """
    All that was found, the worst first.

    Attributes:
        is_live:
            Whether the broker was asked.
    """

    findings: Sequence[Finding]
    is_live: bool = False
    tasks: int = 0
    queues: int = 0

    def __post_init__(self) -> None:
        ordered = sorted(self.findings, key=lambda finding: SEVERITIES.index(finding.severity))
        object.__setattr__(self, "findings", ordered)

    def without(self, codes: Collection[str]) -> Report:
        """Leave out what somebody knows already."""
        kept = [finding for finding in self.findings if finding.code not in codes]
        return Report(kept, is_live=self.is_live, tasks=self.tasks, queues=self.queues)

    def count(self, severity: Severity) -> int:
        """Tell how many there are."""
        return sum(finding.severity == severity for finding in self.findings)

    def is_bad(self, *, strict: bool = False) -> bool:
        """Tell whether it should stop a deployment; *strict* counts warnings too."""
        return bool(self.count("error") or (strict and self.count("warning")))

    def as_text(self) -> str:
        """Write it for a person."""
        return "\n".join([*(line for finding in self.findings for line in _lines(finding)), self._summary()])

    def as_json(self) -> str:
        """Write it for a program."""
        written = {
            "live": self.is_live,
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "findings": [asdict(finding) for finding in self.findings],
        }
        return json.dumps(written, indent=2, ensure_ascii=False)

    def _summary(self) -> str:
        counts = ", ".join(_counted(self.count(severity), severity) for severity in SEVERITIES if self.count(severity))
        looked_at = f"{_counted(self.tasks, 'task')} and {_counted(self.queues, 'queue')} looked at"
        asked = "" if self.is_live else " The broker was not asked: --live does."
        return f"{counts or 'Nothing found'}; {looked_at}.{asked}"


def _lines(finding: Finding) -> Iterable[str]:
    yield f"{finding.severity}: {finding.code}"
    for text in (finding.what, f"Fix: {finding.fix}"):
        yield textwrap.fill(text, width=100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _counted(number: int, noun: str) -> str:
    plural = noun if number == 1 or noun == "info" else f"{noun}s"
    return f"{number} {plural}"


def named(names: Sequence[str]) -> str:
    """Name the first few, and say how many more there are."""
    shown, more = names[:_NAMED], len(names) - _NAMED
    return f"{', '.join(shown)} and {more} more" if more > 0 else ", ".join(shown)
