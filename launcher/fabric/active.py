"""The active check: two ranks on two nodes sum 1 MiB over the declared fabric, within a deadline.

Knows: starting both ranks (the probe's source is piped into a Python that has torch), following their phases, naming
both ends of a hang. Refuses to know: torch itself; the ranks are child processes, here or over ssh.
"""

from __future__ import annotations

import json
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import engine.config
from launcher.fabric import selection
from launcher.fabric.attest import Transport, edges_of
from launcher.fabric.bounded import kill_group
from launcher.fabric.environment import as_mapping, node_environment
from launcher.fabric.facts import NodeFacts
from launcher.fabric.finding import Finding, finding
from launcher.fabric.log_lines import classify
from launcher.fabric.remote import Reach, program
from launcher.registry.cluster import Cluster, Node

SECONDS = 30.0
SIZE_BYTES = 1 << 20
IMPORT_SECONDS = 90.0
GRACE_SECONDS = 3.0
LINES = 1000
"""A rank says ten; whoever says more than this is not our probe."""


@dataclass
class Rank:
    """One running rank, and what it has said so far."""

    node: Node
    number: int
    process: subprocess.Popen[bytes]
    messages: queue.Queue[dict[str, Any] | None] = field(default_factory=queue.Queue)
    phase: str = "start"
    result: dict[str, Any] | None = None
    failure: str = ""
    is_hung: bool = False
    is_over: bool = False
    errors: str = ""
    lines: tuple[str, ...] = ()
    """What NCCL's own log said, when the rank has one."""

    def take(self, message: dict[str, Any] | None) -> None:
        """Learn from one line; None is the end of its output."""
        if message is None:
            self.is_over = True
            return
        event = message.get("event")
        log = message.get("nccl")
        if isinstance(log, list):
            self.lines = tuple(line for line in log if isinstance(line, str))
        if event == "done":
            self.result = message
        elif event == "failed":
            self.failure = str(message.get("message", ""))[:300]
        elif event == "hang":
            self.is_hung = True
        if isinstance(event, str) and event in ("import", "store", "group", "all-reduce", "done"):
            self.phase = event


def probe_source() -> str:
    """Return the probe's source, which stands alone."""
    path = Path(engine.config.__file__).with_name("comm") / "probe.py"
    return path.read_text(encoding="utf-8")


def all_reduce_check(
    cluster: Cluster,
    facts: Mapping[str, NodeFacts],
    reach: Reach,
    *,
    seconds: float = SECONDS,
    size_bytes: int = SIZE_BYTES,
) -> list[Finding]:
    """Check the head with every other node, one pair after the other; a single node with itself."""
    head = cluster.head
    others = [node for node in cluster.nodes if node.name != head.name] or [head]
    return [
        found
        for other in others
        for found in check_pair(cluster, (head, other), facts, reach, seconds=seconds, size_bytes=size_bytes)
    ]


def check_pair(
    cluster: Cluster,
    pair: tuple[Node, Node],
    facts: Mapping[str, NodeFacts],
    reach: Reach,
    *,
    seconds: float = SECONDS,
    size_bytes: int = SIZE_BYTES,
) -> list[Finding]:
    """Run two ranks to their end, or end them at the deadline; never raises, never leaves a process."""
    platforms = {selection.platform_of(cluster, node, facts.get(node.name)) for node in pair}
    backend = "gloo" if "cpu" in platforms or pair[0].name == pair[1].name else "nccl"
    ranks: list[Rank] = []
    until = time.monotonic() + IMPORT_SECONDS + seconds + GRACE_SECONDS
    try:
        port = 0
        for number, node in enumerate(pair):
            settings = {
                "rank": number,
                "world": len(pair),
                "host": pair[0].ip,
                "port": port,
                "backend": backend,
                "bytes": size_bytes,
                "seconds": seconds,
                "environment": _environment(cluster, node, facts.get(node.name)),
            }
            ranks.append(_start(node, number, settings, reach))
            if number == 0:
                port = _port_of(ranks[0], until)
                if port == 0:
                    break
        while any(not rank.is_over for rank in ranks) and time.monotonic() < until:
            for rank in ranks:
                _hear(rank, 0.05)
            if any(rank.is_over and rank.result is None for rank in ranks):
                # One end is gone; the other has a moment to say what it saw.
                until = min(until, time.monotonic() + GRACE_SECONDS)
    except OSError as error:
        evidence = f"cannot start a rank: {error.strerror}"
        return [finding("all-reduce-failed", subject=_names(pair), where=pair[0].name, evidence=evidence)]
    finally:
        for rank in ranks:
            _finish(rank)
    return _verdict(cluster, pair, facts, ranks, backend, seconds)


def _environment(cluster: Cluster, node: Node, facts: NodeFacts | None) -> dict[str, str]:
    variables = as_mapping(node_environment(cluster, node, {}, facts))
    return {name: value for name, value in variables.items() if not name.startswith("RAY_")}


def _start(node: Node, number: int, settings: Mapping[str, Any], reach: Reach) -> Rank:
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - the listening thread closes it
    try:
        with tempfile.TemporaryFile() as given:
            given.write(program(probe_source(), settings))
            given.seek(0)
            process = subprocess.Popen(
                reach.argv(node), stdin=given, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
    except OSError:
        errors.close()
        raise
    rank = Rank(node, number, process)
    threading.Thread(target=_listen, args=(rank, errors), daemon=True).start()
    return rank


def _listen(rank: Rank, errors: IO[bytes]) -> None:
    """Turn a rank's output into messages until it ends."""
    stream = rank.process.stdout
    if stream is None:
        raise RuntimeError("a rank is started with a pipe")
    with stream:
        for number, line in enumerate(stream):
            if number == LINES:
                # It is not our probe; what it writes into a closed pipe ends it.
                break
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if isinstance(message, dict):
                rank.messages.put(message)
    rank.process.wait()
    with errors:
        errors.seek(0)
        rank.errors = errors.read(65536).decode("utf-8", "replace")
    rank.messages.put(None)


def _hear(rank: Rank, seconds: float) -> None:
    if rank.is_over:
        return
    try:
        rank.take(rank.messages.get(timeout=seconds))
    except queue.Empty:
        return


def _port_of(rank: Rank, until: float) -> int:
    """Wait until rank 0 says where its store listens; 0 when it ended or the deadline passed first."""
    while not rank.is_over and time.monotonic() < until:
        try:
            message = rank.messages.get(timeout=0.2)
        except queue.Empty:
            continue
        rank.take(message)
        if message is not None and message.get("event") == "listening":
            port = message.get("port")
            return port if isinstance(port, int) else 0
    return 0


def _finish(rank: Rank) -> None:
    """End a rank that still runs, and hear its last words."""
    kill_group(rank.process)
    until = time.monotonic() + 5.0
    while not rank.is_over and time.monotonic() < until:
        _hear(rank, 0.1)


def _names(pair: Sequence[Node]) -> str:
    return " <-> ".join(node.name for node in pair)


def _end(rank: Rank, facts: Mapping[str, NodeFacts]) -> str:
    """Name one end: `rank 1 on spark-02 (192.168.100.2, enP2p1s0f0np0) in 'all-reduce'`."""
    interface = selection.interface_of(rank.node, facts.get(rank.node.name))
    place = f"{rank.node.ip}, {interface}" if interface else rank.node.ip
    return f"rank {rank.number} on {rank.node.name} ({place}) in '{rank.phase}'"


def _verdict(
    cluster: Cluster,
    pair: Sequence[Node],
    facts: Mapping[str, NodeFacts],
    ranks: Sequence[Rank],
    backend: str,
    seconds: float,
) -> list[Finding]:
    names, where = _names(pair), ", ".join(dict.fromkeys(node.name for node in pair))
    results = [rank.result for rank in ranks if rank.result is not None]
    if len(results) == len(pair):
        return _passed(cluster, names, where, results, [line for rank in ranks for line in rank.lines], backend)
    for rank in ranks:
        if "No module named" in rank.failure:
            return [finding("probe-missing", subject="torch", where=rank.node.name, evidence=rank.failure)]
    ends = "; ".join(_end(rank, facts) for rank in ranks)
    for rank in ranks:
        for line in rank.lines:
            told = classify(line)
            if told is not None and told.severity == "error":
                evidence = f"{ends}: {told.cause}: {line.rpartition('NCCL ')[2]}"
                return [finding("all-reduce-failed", subject=names, where=where, evidence=evidence, fix=told.fix)]
    # A reason of its own explains more than the wait of the other end.
    reason = next((rank.failure for rank in ranks if rank.failure and not _is_echo(rank.failure)), "")
    is_waiting = any(rank.is_hung or rank.phase in _WAITING for rank in ranks)
    if not reason and is_waiting:
        evidence = f"no result within {seconds:.0f} s: {ends}"
        fix = "look at peer-unreachable and mtu-mismatch above, then at the firewall: hlaunch doctor --print-firewall"
        return [finding("all-reduce-hang", subject=names, where=where, evidence=evidence, fix=fix)]
    words = next((word for rank in ranks if (word := _last_word(rank))), "it ended without a word")
    evidence = f"{ends}: {(reason or words)[:300]}"
    return [finding("all-reduce-failed", subject=names, where=where, evidence=evidence)]


_WAITING = ("store", "group", "all-reduce")


def _last_word(rank: Rank) -> str:
    lines = rank.errors.strip().splitlines()
    return rank.failure or (lines[-1] if lines else "")


def _is_echo(message: str) -> bool:
    """Say whether a failure only tells that the other end was silent or went away."""
    words = ("timed out", "timeout", "connection closed", "connection reset", "connection refused", "broken pipe")
    return any(word in message.lower() for word in words)


def _passed(
    cluster: Cluster,
    names: str,
    where: str,
    results: Sequence[Mapping[str, Any]],
    lines: Sequence[str],
    backend: str,
) -> list[Finding]:
    if not all(result.get("is_right") is True for result in results):
        return [finding("all-reduce-wrong", subject=names, where=where, evidence="sums differ from what was sent")]
    transports = sorted({edge.transport for edge in edges_of(lines)})
    used = ", ".join(transports) or backend
    if cluster.fabric.rdma == "required" and Transport.SOCKET in transports:
        evidence = f"NCCL used {used}"
        return [finding("transport-fallback", subject=names, where=where, evidence=evidence)]
    slowest = max(float(result.get("seconds", 0.0)) for result in results)
    size = int(results[0].get("bytes", 0))
    rate = size / slowest / 1e9 if slowest > 0 else 0.0
    evidence = f"{size:,} bytes summed in {1e3 * slowest:.2f} ms over {used}, {rate:.2f} GB/s"
    return [finding("all-reduce-ok", subject=names, where=where, evidence=evidence)]
