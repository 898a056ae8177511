"""What the logs of a launch's nodes tell: what connects the ranks, and which known failures are in them.

Knows: how a node's log is fetched, and where its last start begins in it. Refuses to know: what lines mean
(`launcher.fabric`), what follows from it (`cluster_run`).
"""

from __future__ import annotations

import queue
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from engine.placement import Placement
from launcher.errors import HlaunchError
from launcher.fabric.log_lines import worst
from launcher.fabric.transports import PairTransport, transports_of
from launcher.supervise.logfile import START_LINES, clean
from launcher.supervise.runtimes import RUNTIMES, NodeHandle
from launcher.supervise.shell import Shell
from launcher.supervise.status import one_line

TAIL_LINES = 400
"""How far back a log is read for the cause of a failure."""
_SECONDS = 30.0
_Lines: TypeAlias = "queue.SimpleQueue[tuple[str, str | None] | None]"
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


def node_lines(
    runtime: str, nodes: Sequence[NodeHandle], num_lines: int, environ: Mapping[str, str], *, follow: bool
) -> Iterator[tuple[str, str | None]]:
    """Yield node and line of all logs, which are asked for at the same time.

    Without `follow` they come node by node in the given order, else as they are written, until closed. None instead of
    a line: this node's log cannot be read, or no further.
    """
    heard: list[_Lines] = [queue.SimpleQueue() for _ in nodes]
    if follow:
        heard = heard[:1] * len(nodes)
    copies: list[tuple[subprocess.Popen[str], threading.Thread]] = []
    try:
        for node, into in zip(nodes, heard, strict=True):
            shell = Shell(node.name, node.ssh, environ)
            process = shell.popen(RUNTIMES[runtime].logs_argv(shell, node, num_lines, follow=follow))
            thread = threading.Thread(target=_copy, args=(process, node.name, into), daemon=True)
            copies.append((process, thread))
            thread.start()
        for source in dict.fromkeys(heard):
            for _ in range(heard.count(source)):
                yield from iter(source.get, None)
    finally:
        for process, thread in copies:
            process.terminate()
            thread.join(timeout=1.0)
            if process.stdout is not None and not thread.is_alive():
                process.stdout.close()


def _copy(process: subprocess.Popen[str], node: str, into: _Lines) -> None:
    """Hand on what a process writes, then whether that was all, then None."""
    assert process.stdout is not None
    for line in process.stdout:
        into.put((node, clean(line.rstrip())))
    if process.wait() != 0:
        into.put((node, None))
    into.put(None)


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
