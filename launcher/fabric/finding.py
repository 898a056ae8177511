"""One thing that lint or doctor found: a stable code, how bad it is, the evidence, the cause and the fix.

Knows: the shape of a finding and how findings sort. Refuses to know: who finds what (`codes` lists every code).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.fabric.codes import CODES

Severity = Literal["error", "warning", "info"]

_RANK = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """`subject` is what is wrong (a variable, an HCA, an interface, a node); `where` the source or the node's name.

    `evidence` is what was read, as it was read. `fix` is a command or a line to write.
    """

    code: str
    severity: Severity
    subject: str
    where: str
    evidence: str
    cause: str
    fix: str

    def as_dict(self) -> dict[str, str]:
        """The same as plain values, for `--json`."""
        return {name: getattr(self, name) for name in self.__slots__}

    def headline(self) -> str:
        """The finding in one line: `node-a: error[memlock-low] locked memory: 8 MiB`."""
        return f"{self.where}: {self.severity}[{self.code}] {self.subject}: {self.evidence}"


def finding(
    code: str,
    *,
    subject: str,
    where: str,
    evidence: str,
    cause: str = "",
    fix: str = "",
    severity: Severity | None = None,
) -> Finding:
    """Make a finding; severity, cause and fix come from the code's row in `codes` unless this case knows better."""
    row = CODES[code]
    return Finding(code, severity or row.severity, subject, where, evidence, cause or row.cause, fix or row.fix)


def ordered(findings: list[Finding]) -> list[Finding]:
    """Sort errors first, then by place; equal findings once."""
    unique = dict.fromkeys(findings)
    return sorted(unique, key=lambda found: (_RANK[found.severity], found.where, found.code, found.subject))


def has_errors(findings: list[Finding]) -> bool:
    return any(found.severity == "error" for found in findings)
