"""The last lines of a launch's nodes, kept here: what a node wrote goes with the node.

Knows: one bounded file in the instance's folder, without secrets. Refuses to know: how lines are fetched
(`cluster_logs`) and how they are shown.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.redaction import Redaction
from launcher.supervise.instance import InstanceFolder, write_private
from launcher.supervise.logfile import clean

KEPT_LINES = 500
"""Of each node."""
_LINE_CHARACTERS = 4000


def kept_file(folder: InstanceFolder) -> Path:
    """Where the lines of the last launch on nodes are kept."""
    return folder.path / "nodes.log"


def keep(folder: InstanceFolder, lines: Mapping[str, Sequence[str]], environ: Mapping[str, str]) -> None:
    """Keep the last lines of each node. A node that says nothing any more keeps what is known of it.

    Raises: PreflightError when the disk refuses.
    """
    redaction = Redaction(environ)
    known = _by_node(folder, KEPT_LINES)
    for node, said in lines.items():
        if said:
            known[node] = [redaction.line(clean(line))[:_LINE_CHARACTERS] for line in said[-KEPT_LINES:]]
    if any(known.values()):
        text = "".join(json.dumps([node, line]) + "\n" for node, told in known.items() for line in told)
        write_private(kept_file(folder), text)


def kept_lines(folder: InstanceFolder, num_lines: int = KEPT_LINES) -> list[tuple[str, str]]:
    """Return node and line, node by node, the last `num_lines` of each; nothing where nothing was kept."""
    return [(node, line) for node, told in _by_node(folder, num_lines).items() for line in told]


def _by_node(folder: InstanceFolder, num_lines: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    with contextlib.suppress(OSError, ValueError):
        for text in kept_file(folder).read_text(encoding="utf-8").splitlines():
            node, line = json.loads(text)
            found.setdefault(str(node), []).append(str(line))
    return {node: told[max(0, len(told) - num_lines) :] for node, told in found.items()}


def forget(folder: InstanceFolder) -> None:
    """Drop what an earlier launch left: a new one begins."""
    with contextlib.suppress(OSError):
        kept_file(folder).unlink()
