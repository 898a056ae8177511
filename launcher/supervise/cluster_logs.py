"""What the logs of a launch's nodes tell: what connects the ranks, and which known failures are in them.

Knows: how a node's log is fetched, and where its last start begins in it. Refuses to know: what lines mean
(`launcher.fabric`), what follows from it (`cluster_run`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from engine.placement import Placement
from launcher.errors import HlaunchError
from launcher.fabric.log_lines import worst
from launcher.fabric.transports import PairTransport, transports_of
from launcher.supervise.logfile import START_LINES
from launcher.supervise.runtimes import RUNTIMES, NodeHandle
from launcher.supervise.shell import Shell
from launcher.supervise.status import one_line

TAIL_LINES = 400
"""How far back a log is read for the cause of a failure."""
_SECONDS = 30.0
_BEGINS = re.compile(r"=== |keeper: ended with|node: \S+ -m ray\.")


def transports_in_use(
    placement: str, runtime: str, nodes: Sequence[NodeHandle], environ: Mapping[str, str]
) -> tuple[PairTransport, ...]:
    """Read what connects the ranks of a placement, given as JSON; nothing where there is one rank."""
    ranks = Placement.from_json(placement) if placement else None
    if ranks is None or len(ranks.ranks) < 2:
        return ()
    return transports_of(ranks, _logs(runtime, nodes, START_LINES, environ))


def known_failures(runtime: str, nodes: Sequence[NodeHandle], environ: Mapping[str, str]) -> list[str]:
    """List the lines whose cause is known, one text each, with the node and the fix."""
    return [
        one_line(f"{node.name}: {item.cause} [{item.code}]; fix: {item.fix}")
        for node, lines in zip(nodes, _logs(runtime, nodes, TAIL_LINES, environ), strict=True)
        for item in worst(lines)
        if item.severity == "error"
    ]


def last_lines(
    runtime: str, nodes: Sequence[NodeHandle], num_lines: int, environ: Mapping[str, str]
) -> dict[str, list[str]]:
    """Fetch the end of every node's log, of all its starts; that of a node that does not answer is empty."""
    return {node.name: lines for node, lines in zip(nodes, _ends(runtime, nodes, num_lines, environ), strict=True)}


def _logs(runtime: str, nodes: Sequence[NodeHandle], num_lines: int, environ: Mapping[str, str]) -> list[list[str]]:
    return [last_run(lines) for lines in _ends(runtime, nodes, num_lines, environ)]


def _ends(runtime: str, nodes: Sequence[NodeHandle], num_lines: int, environ: Mapping[str, str]) -> list[list[str]]:
    """Fetch all nodes' logs side by side."""

    def fetch(node: NodeHandle) -> list[str]:
        shell = Shell(node.name, node.ssh, environ)
        argv = RUNTIMES[runtime].logs_argv(shell, node, num_lines, follow=False)
        try:
            return shell.run(argv, seconds=_SECONDS, is_checked=False).splitlines()
        except HlaunchError:
            return []

    with ThreadPoolExecutor(max_workers=max(1, len(nodes))) as pool:
        return list(pool.map(fetch, nodes))


def last_run(lines: list[str]) -> list[str]:
    """Return what a node has said since it was last started."""
    begins = [index for index, line in enumerate(lines) if _BEGINS.match(line)]
    return lines[begins[-1] :] if begins else lines
