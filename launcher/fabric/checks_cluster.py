"""Checks that compare nodes: packets between them, rates, link layers, clocks, versions.

Pure: facts in, findings out. Refuses to know: one node by itself (`checks_rdma`, `checks_host`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from launcher.fabric.context import NodeContext
from launcher.fabric.finding import Finding, Severity, finding

CLOCK_SECONDS = 2.0
_MUST_MATCH = ("hlaunch", "ray", "python")
_SHOULD_MATCH = ("torch", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "driver", "kernel")


def cluster_findings(contexts: Sequence[NodeContext]) -> list[Finding]:
    """Run every check between nodes that were read."""
    rules = (_paths, _mtus, _rates, _layers, _clocks, _versions)
    return [found for rule in rules for found in rule(contexts)]


def _name_of(contexts: Sequence[NodeContext], ip: str) -> str:
    nodes = contexts[0].cluster.nodes
    return next((node.name for node in nodes if node.ip == ip), ip)


def _paths(contexts: Sequence[NodeContext]) -> Iterator[Finding]:
    for context in contexts:
        for probe in context.facts.paths:
            peer = _name_of(contexts, probe.peer)
            subject = f"{context.name} -> {peer}"
            is_small = probe.size_bytes <= 56
            detail = f" ({probe.detail})" if probe.detail else ""
            if probe.verdict == "unknown" and is_small:
                yield finding("path-untested", subject=subject, where=context.name, evidence=probe.detail)
            elif probe.verdict in ("lost", "unreachable", "too-long") and is_small:
                evidence = f"ping {probe.peer}: {probe.verdict}{detail}"
                fix = f"ip -br link; ip route get {probe.peer}; is {context.interface_name} up on both nodes?"
                yield finding("peer-unreachable", subject=subject, where=context.name, evidence=evidence, fix=fix)
            elif probe.verdict in ("lost", "unreachable", "too-long"):
                mtu = probe.size_bytes + (48 if ":" in probe.peer else 28)
                evidence = f"ping -M do -s {probe.size_bytes} {probe.peer}: {probe.verdict}{detail}; small ones arrive"
                fix = f"sudo ip link set {context.interface_name} mtu {mtu} on both nodes, and {mtu} on the switch"
                yield finding("mtu-mismatch", subject=subject, where=context.name, evidence=evidence, fix=fix)


def _mtus(contexts: Sequence[NodeContext]) -> Iterator[Finding]:
    found = {context.name: context.interface.mtu for context in contexts if context.interface is not None}
    if len(set(found.values())) > 1:
        largest = max(found.values())
        small = [name for name, mtu in found.items() if mtu < largest]
        evidence = ", ".join(f"{name}: {mtu}" for name, mtu in found.items())
        where = next(context for context in contexts if context.name == small[0])
        fix = f"on {', '.join(small)}: sudo ip link set {where.interface_name} mtu {largest}"
        yield finding("mtu-mismatch", subject="mtu", where=", ".join(found), evidence=evidence, fix=fix)


def _active_ports(context: NodeContext) -> Iterator[tuple[str, float, str]]:
    for hca in context.hcas:
        for port in hca.ports:
            if port.is_active:
                yield hca.name, port.rate_gbps, port.link_layer


def _rates(contexts: Sequence[NodeContext]) -> Iterator[Finding]:
    rates = [(context.name, hca, rate) for context in contexts for hca, rate, _ in _active_ports(context)]
    if len({rate for _, _, rate in rates}) > 1:
        evidence = ", ".join(f"{node} {hca}: {rate:g} Gb/s" for node, hca, rate in rates)
        yield finding("rate-differs", subject="rate", where=_places(contexts), evidence=evidence)


def _layers(contexts: Sequence[NodeContext]) -> Iterator[Finding]:
    layers = [(context.name, hca, layer) for context in contexts for hca, _, layer in _active_ports(context)]
    if len({layer for _, _, layer in layers}) > 1:
        evidence = ", ".join(f"{node} {hca}: {layer}" for node, hca, layer in layers)
        yield finding("link-layer-differs", subject="link layer", where=_places(contexts), evidence=evidence)


def _places(contexts: Sequence[NodeContext]) -> str:
    return ", ".join(context.name for context in contexts)


def _clocks(contexts: Sequence[NodeContext]) -> Iterator[Finding]:
    for context in contexts:
        skew = context.facts.skew_seconds
        if skew is not None and abs(skew) > CLOCK_SECONDS:
            evidence = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} this machine"
            yield finding("clock-skew", subject="clock", where=context.name, evidence=evidence)


def _versions(contexts: Sequence[NodeContext]) -> Iterator[Finding]:
    tables = {context.name: _version_table(context) for context in contexts}
    for part in (*_MUST_MATCH, *_SHOULD_MATCH):
        found = {node: table[part] for node, table in tables.items() if part in table}
        if len(set(found.values())) < 2:
            continue
        counts = Counter(found.values()).most_common()
        # A majority says who is odd; without one nobody can.
        is_tie = counts[0][1] == counts[1][1]
        odd = [node for node, version in found.items() if is_tie or version != counts[0][0]]
        evidence = ", ".join(f"{node}: {version}" for node, version in found.items())
        severity: Severity = "error" if part in _MUST_MATCH else "warning"
        yield finding("version-skew", subject=part, where=", ".join(odd), evidence=evidence, severity=severity)


def _version_table(context: NodeContext) -> Mapping[str, str]:
    facts = context.facts
    table = {**facts.versions, "python": facts.python, "kernel": facts.kernel, "driver": facts.driver.version}
    return {name: version for name, version in table.items() if version}
