"""Located problems as SARIF 2.1.0, which code hosts and editors show beside the line.

Knows: SARIF's words for ours. Refuses to know: how problems are found.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from launcher.errors import Issue

_LEVELS = {"error": "error", "warning": "warning", "info": "note"}
_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(issues: Iterable[Issue], version: str) -> dict[str, Any]:
    """Make one SARIF log of one run. Pure."""
    found = list(issues)
    rules = sorted({issue.code for issue in found})
    driver = {"name": "hlaunch", "version": version, "rules": [{"id": code} for code in rules]}
    results = [_result(issue, rules.index(issue.code)) for issue in found]
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}


def _result(issue: Issue, rule: int) -> dict[str, Any]:
    subject = f"{issue.path}: " if issue.path else ""
    hint = f" ({issue.hint})" if issue.hint else ""
    location: dict[str, Any] = {"artifactLocation": {"uri": issue.source}}
    if issue.line is not None:
        location["region"] = {"startLine": issue.line, "startColumn": issue.column or 1}
    return {
        "ruleId": issue.code,
        "ruleIndex": rule,
        "level": _LEVELS[issue.severity],
        "message": {"text": f"{subject}{issue.message}{hint}"},
        "locations": [{"physicalLocation": location}],
    }
