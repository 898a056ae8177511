"""How findings read in a terminal of 80 columns. Knows layout; which severity has which colour, the console says."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

from launcher.console import SEVERITY_STYLES, Console
from launcher.fabric.facts import NodeFacts
from launcher.fabric.finding import Finding
from launcher.fabric.remote import Unreachable
from launcher.fabric.selection import interface_of
from launcher.registry.cluster import Node
from launcher.sizes import counted

WIDTH = 80


def print_findings(console: Console, findings: Sequence[Finding], *, are_messages: bool = False) -> None:
    """Write each finding: what and where, the evidence, the cause, and the fix on lines of its own.

    They go to stdout, or to stderr where they are not what was asked for.
    """
    styled, plain = (console.styled_note, console.note) if are_messages else (console.styled, console.data)
    for found in findings:
        of_what = "" if found.subject == found.where else f": {found.subject}"
        label = (f"{found.severity}[{found.code}]", SEVERITY_STYLES[found.severity])
        styled([label, (f" {found.where}{of_what}", "bold")])
        for text in dict.fromkeys((found.evidence, found.cause)):
            for line in textwrap.wrap(text, WIDTH - 2, break_long_words=False, break_on_hyphens=False):
                plain(f"  {line}")
        # Unbroken, so that it can be copied; a terminal folds it by itself.
        plain(f"  fix: {found.fix}")


def summary(findings: Sequence[Finding]) -> str:
    """Count by severity: `2 errors, 1 warning, 3 notes`; `nothing found` for none."""
    words = (("error", "error"), ("warning", "warning"), ("info", "note"))
    counts = [(sum(found.severity == severity for found in findings), noun) for severity, noun in words]
    parts = [counted(count, noun) for count, noun in counts if count]
    return ", ".join(parts) or "nothing found"


def node_row(node: Node, answer: NodeFacts | Unreachable) -> tuple[str, str, str, str, str, str, str]:
    """One line about a node that was read, or that was not."""
    if not isinstance(answer, NodeFacts):
        return node.name, node.ip, "unreachable", "", "", "", ""
    name = interface_of(node, answer)
    netdev = answer.netdev(name) if name is not None else None
    active = [hca.name for hca in answer.hcas if hca.is_active]
    skew = answer.skew_seconds
    return (
        node.name,
        node.ip,
        name or "-",
        ", ".join(active) or "none",
        ", ".join(f"{count} x {gpu}" for gpu, count in Counter(gpu.name for gpu in answer.gpus).items()) or "none",
        str(netdev.mtu) if netdev is not None else "-",
        "-" if skew is None else f"{skew:+.1f} s",
    )
