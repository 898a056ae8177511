"""The generated parts of the documentation: the table of codes, and the table of variables.

`python -m launcher.fabric.reference` rewrites them in `docs/`; a test compares. Knows Markdown; refuses to know rules.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

from launcher.fabric import catalogue
from launcher.fabric.codes import CODES

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
DOCTOR, VARIABLES = "doctor.md", "fabric-variables.md"
_GROUPS = {
    "host": "Hosts",
    "cluster": "Between nodes",
    "active": "The active check (`--active`)",
    "environment": "Variables (also `hlaunch env --lint`)",
}


def codes_section() -> str:
    """Return the table of every code, by group, errors first."""
    rank = {"error": 0, "warning": 1, "info": 2}
    lines: list[str] = []
    for group, title in _GROUPS.items():
        rows = [row for row in CODES.values() if row.group == group]
        lines += [f"### {title}", "", "| code | severity | why it matters | what mends it |", "|---|---|---|---|"]
        for row in sorted(rows, key=lambda row: (rank[row.severity], row.code)):
            lines.append(f"| `{row.code}` | {row.severity} | {_cell(row.cause)} | {_cell(row.fix)} |")
        lines.append("")
    return "\n".join(lines)


def variables_section() -> str:
    """Return the table of the variables that have a row of their own, by owner."""
    lines: list[str] = []
    for owner, rows in groupby(catalogue.MAIN, key=lambda row: row.owner):
        lines += [f"### {owner}", "", "| variable | legal | default | where | effect |", "|---|---|---|---|---|"]
        for row in rows:
            since = f" (since {row.since})" if row.since else ""
            legal, scope = _cell(row.kind.describe()), catalogue.SCOPE_WORDS[row.scope]
            effect = _cell(row.effect) + since
            lines.append(f"| `{row.name}` | {legal} | {_cell(row.default)} | {scope} | {effect} |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") or "-"


def filled(page: str, section: str) -> str:
    """Put a section between the marks of a page. Raises: ValueError when the marks are not there."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the page has no marks")
    return f"{before}{BEGIN}\n\n{section}\n{END}{after}"


def main(folder: Path) -> None:
    """Rewrite both pages."""
    for name, section in ((DOCTOR, codes_section()), (VARIABLES, variables_section())):
        page = folder / name
        page.write_text(filled(page.read_text(encoding="utf-8"), section), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs"))
