"""Checks of one node beside RDMA: interfaces, names, limits, memory, ports, container tools, configuration files.

Pure: facts in, findings out. Refuses to know: other nodes (`checks_cluster`).
"""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Iterator
from itertools import combinations

from launcher.fabric import catalogue, selection
from launcher.fabric.context import NodeContext
from launcher.fabric.facts import Listener, Netdev
from launcher.fabric.finding import Finding, Severity, finding
from launcher.redaction import Redaction
from launcher.sizes import GIB, size

_MEMLOCK_ENOUGH = 64 * GIB
_NOFILE_ENOUGH = 65536
_OURS = (
    "raylet",
    "gcs_server",
    "ray::",
    "ray/dashboard",
    "ray/_private",
    "launcher.node",
    "engine.server",
)
_OLDEST = {
    "docker": ((25,), "docker-old"),
    "compose": ((2, 40, 2), "compose-old"),
    "toolkit": ((1, 17, 8), "toolkit-old"),
}


def host_findings(context: NodeContext) -> list[Finding]:
    """Run every check of the host."""
    rules = (_address, _rails, _hostname, _files, _limits, _memory, _gpus, _ports, _containers)
    return [found for rule in rules for found in rule(context)]


def _address(context: NodeContext) -> Iterator[Finding]:
    node, facts, interface = context.node, context.facts, context.interface
    holder = facts.netdev_with(node.ip)
    declared = context.interface_name
    if holder is None:
        there = ", ".join(f"{item.name} {' '.join(item.addresses)}" for item in facts.netdevs if item.addresses)
        prefix = (context.cluster.fabric.subnet or ("/64" if ":" in node.ip else "/24")).rpartition("/")[2]
        fix = f"sudo ip addr add {node.ip}/{prefix} dev {declared}, or correct 'ip' of {node.name} in the registry"
        yield finding("node-ip-absent", subject=node.ip, where=node.name, evidence=there or "no address", fix=fix)
    if node.ifname is not None and interface is None:
        there = ", ".join(item.name for item in facts.netdevs)
        better = f"ifname: {holder.name}" if holder is not None else "correct 'ifname' of the node in the registry"
        yield finding("ifname-absent", subject=node.ifname, where=node.name, evidence=f"there are: {there}", fix=better)
    elif holder is not None and interface is not None and holder.name != interface.name:
        evidence = f"{node.ip} is on {holder.name}, the registry says {interface.name}"
        yield finding(
            "ifname-absent", subject=interface.name, where=node.name, evidence=evidence, fix=f"ifname: {holder.name}"
        )
    if interface is None:
        return
    if not interface.is_running:
        yield _link_down(context, interface)
    mtu = context.cluster.fabric.mtu
    if mtu is not None and interface.name != "lo" and interface.mtu < mtu:
        evidence = f"mtu {interface.mtu}, the fabric says {mtu}"
        fix = f"sudo ip link set {interface.name} mtu {mtu}"
        yield finding("mtu-small", subject=interface.name, where=node.name, evidence=evidence, fix=fix)


def _link_down(context: NodeContext, interface: Netdev) -> Finding:
    evidence = f"{interface.name} is {interface.operstate or 'in no state'}"
    fix = f"sudo ip link set {interface.name} up"
    if interface.carrier == 0:
        evidence += ": no carrier, so the cable or the other end is down"
        fix = f"ethtool {interface.name}; look at the cable and at the other end"
    return finding("link-down", subject=interface.name, where=context.name, evidence=evidence, fix=fix)


def _rails(context: NodeContext) -> Iterator[Finding]:
    """Look for two running interfaces in one subnet of the fabric."""
    subnet = context.cluster.fabric.subnet
    rails = [
        (netdev.name, address)
        for netdev in context.facts.netdevs
        if netdev.is_running and netdev.name != "lo"
        for address in netdev.addresses
        if selection.in_subnet(address.partition("/")[0], subnet) or netdev.name in _hca_netdevs(context)
    ]
    for (first, one), (second, other) in combinations(rails, 2):
        if first != second and ipaddress.ip_interface(one).network == ipaddress.ip_interface(other).network:
            evidence = f"{first} {one} and {second} {other}"
            yield finding("same-subnet-rails", subject=f"{first}, {second}", where=context.name, evidence=evidence)


def _hca_netdevs(context: NodeContext) -> set[str]:
    return {name for hca in context.hcas for name in hca.netdevs}


def _hostname(context: NodeContext) -> Iterator[Finding]:
    addresses = context.facts.hostname_addresses
    if "GLOO_SOCKET_IFNAME" in context.environment or len(context.cluster.nodes) < 2:
        return
    if not addresses or all(address.startswith("127.") for address in addresses):
        evidence = f"{context.facts.hostname} is {', '.join(addresses) or 'unknown'}, and GLOO_SOCKET_IFNAME is unset"
        fix = f"ifname: {context.interface_name} for the node in the registry"
        yield finding(
            "hostname-loopback", subject=context.facts.hostname, where=context.name, evidence=evidence, fix=fix
        )


def _files(context: NodeContext) -> Iterator[Finding]:
    for place, lines in context.facts.nccl_files.items():
        evidence = ", ".join(line.strip() for line in lines)
        fix = f"move the lines into the registry's env, then: sudo rm {shlex.quote(place)}"
        yield finding("nccl-conf-file", subject=place, where=context.name, evidence=evidence, fix=fix)


def _limits(context: NodeContext) -> Iterator[Finding]:
    facts = context.facts
    memlock = facts.limits.get("memlock", (-1, -1))[0]
    if context.has_rdma and memlock != -1:
        # A login's own limit does not bind a container, which is rendered with its own.
        severity: Severity = "error" if facts.is_container and memlock < _MEMLOCK_ENOUGH else "warning"
        place = "in the container" if facts.is_container else "in this login; a rendered container has its own"
        evidence = f"{size(memlock)} {place}"
        yield finding("memlock-low", subject="locked memory", where=context.name, evidence=evidence, severity=severity)
    nofile = facts.limits.get("nofile", (-1, -1))[0]
    if nofile != -1 and nofile < _NOFILE_ENOUGH:
        yield finding("nofile-low", subject="open files", where=context.name, evidence=f"{nofile:,} per process")
    if facts.limits.get("stack", (0, 0))[0] == -1:
        yield finding("stack-unlimited", subject="stack", where=context.name, evidence="ulimit -s is unlimited")
    wanted = GIB * max(1, len(facts.gpus))
    if 0 <= facts.shm_bytes < wanted:
        evidence = f"{size(facts.shm_bytes)}, {size(wanted)} wanted: 1 GiB per GPU"
        yield finding("shm-small", subject="/dev/shm", where=context.name, evidence=evidence)


def _memory(context: NodeContext) -> Iterator[Finding]:
    facts = context.facts
    if facts.is_unified_memory and 0 < facts.memory_available_bytes < context.needed_bytes:
        evidence = f"{size(facts.memory_available_bytes)} available, {size(context.needed_bytes)} planned"
        yield finding("uma-memory", subject="unified memory", where=context.name, evidence=evidence)
    if facts.oom_kills > 0:
        evidence = f"{facts.oom_kills} kills in this group"
        yield finding("oom-kills", subject="memory", where=context.name, evidence=evidence)


def _gpus(context: NodeContext) -> Iterator[Finding]:
    if context.node.gpus > len(context.facts.gpus):
        evidence = f"{context.node.gpus} declared, {len(context.facts.gpus)} there"
        yield finding("gpu-missing", subject="GPUs", where=context.name, evidence=evidence)


def _ports(context: NodeContext) -> Iterator[Finding]:
    ports = context.ports or {}
    taken = {listener.port: listener for listener in context.facts.listening}
    for port, use in sorted(ports.items()):
        if port in taken:
            yield _busy(context, use, taken[port])
    span = context.facts.ephemeral_ports
    if span is None:
        return
    inside = sorted(port for port in ports if span[0] <= port <= span[1])
    workers = context.cluster.ray.worker_ports if context.cluster.ray is not None else None
    clashes = [str(port) for port in inside]
    if workers is not None and workers[0] <= span[1] and span[0] <= workers[1]:
        clashes.append(f"{max(workers[0], span[0])}-{min(workers[1], span[1])}")
    if clashes:
        evidence = f"{', '.join(clashes)} inside {span[0]}-{span[1]}"
        fix = f"sudo sysctl net.ipv4.ip_local_reserved_ports={','.join(clashes)}"
        yield finding("ephemeral-overlap", subject="ports", where=context.name, evidence=evidence, fix=fix)


def _busy(context: NodeContext, use: str, listener: Listener) -> Finding:
    command = Redaction().line(listener.command)
    owner = f"pid {listener.pid}: {command}" if listener.pid else "a process this login may not see"
    subject = f"{listener.port} ({use})"
    if any(word in listener.command for word in _OURS):
        return finding("port-ours", subject=subject, where=context.name, evidence=owner)
    fix = (
        f"kill {listener.pid}, or choose another port in the registry"
        if listener.pid
        else f"sudo ss -ltnp sport = {listener.port}"
    )
    return finding("port-busy", subject=subject, where=context.name, evidence=owner, fix=fix)


def _containers(context: NodeContext) -> Iterator[Finding]:
    facts = context.facts
    for tool, (oldest, code) in _OLDEST.items():
        version = facts.tools.get(tool)
        if version is not None and catalogue.release(version) < oldest:
            yield finding(code, subject=tool, where=context.name, evidence=f"version {version}")
    for path in facts.cdi_missing:
        yield finding("cdi-stale", subject=path, where=context.name, evidence="named by CDI, and not there")
    if facts.remove_ipc == "yes" and context.cluster.container.ipc == "host":
        evidence = "RemoveIPC=yes, and the container has ipc: host"
        yield finding("removeipc", subject="logind", where=context.name, evidence=evidence)
