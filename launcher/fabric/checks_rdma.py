"""Checks of RDMA on one node: devices, ports, GIDs, twins, PCI, what lets a NIC reach GPU memory.

Pure: facts in, findings out. Refuses to know: other nodes (`checks_cluster`), limits and memory (`checks_host`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from launcher.fabric import catalogue, selection
from launcher.fabric.context import NodeContext
from launcher.fabric.facts import Hca, Port
from launcher.fabric.finding import Finding, Severity, finding
from launcher.fabric.kinds import read_nccl_int

_ERROR_COUNTERS = ("packet_seq_err", "local_ack_timeout_err", "rnr_nak_retry_err", "out_of_sequence")
_GDR_PLATFORMS = ("hopper", "blackwell", "generic")
_DMABUF_KERNEL = (5, 12)


def rdma_findings(context: NodeContext) -> list[Finding]:
    """Run every RDMA check of one node; nothing when the fabric switches RDMA off or the node has no GPU."""
    if not context.has_rdma:
        return []
    if not context.facts.hcas:
        evidence = "sys/class/infiniband is empty"
        severity: Severity = "error" if context.needs_rdma else "warning"
        return [finding("rdma-absent", subject="RDMA", where=context.name, evidence=evidence, severity=severity)]
    rules = (_devices, _ports, _gids, _pinned_gid, _twins, _pci, _numa, _acs, _gdr, _counters)
    return [found for rule in rules for found in rule(context)]


def _devices(context: NodeContext) -> Iterator[Finding]:
    facts = context.facts
    for hca in context.hcas:
        device = facts.verbs.get(hca.name)
        if device is None or device not in facts.device_nodes:
            there = ", ".join(facts.device_nodes) or "nothing"
            text = f"{device or 'no verbs device'} is not in /dev/infiniband ({there})"
            yield finding("dev-node-missing", subject=hca.name, where=context.name, evidence=text)
    if "rdma_cm" not in facts.device_nodes and context.hcas:
        text = "/dev/infiniband/rdma_cm is not there"
        yield finding("dev-node-missing", subject="rdma_cm", where=context.name, evidence=text, severity="warning")
    if not facts.has_libibverbs:
        text = "the dynamic linker finds no libibverbs.so.1"
        yield finding("verbs-lib-missing", subject="libibverbs.so.1", where=context.name, evidence=text)


def _ports(context: NodeContext) -> Iterator[Finding]:
    for hca in context.hcas:
        if hca.is_active:
            continue
        states = ", ".join(f"port {port.port}: {port.state} / {port.phys_state}" for port in hca.ports) or "no port"
        interface = hca.netdevs[0] if hca.netdevs else context.interface_name
        fix = f"sudo ip link set {interface} up; ibv_devinfo -d {hca.name}"
        yield finding("port-not-active", subject=hca.name, where=context.name, evidence=states, fix=fix)


def _active_ethernet(context: NodeContext) -> list[tuple[Hca, Port]]:
    pairs = [(hca, port) for hca in context.hcas for port in hca.ports]
    return [(hca, port) for hca, port in pairs if port.is_active and port.link_layer == "Ethernet"]


def _gids(context: NodeContext) -> Iterator[Finding]:
    subnet = context.cluster.fabric.subnet
    for hca, port in _active_ethernet(context):
        usable = [gid for gid in port.gids if gid.is_v2 and gid.ipv4 is not None]
        if usable:
            continue
        kinds = ", ".join(f"{gid.index}: {gid.type} {gid.short}" for gid in port.gids) or "the GID table is empty"
        interface = hca.netdevs[0] if hca.netdevs else context.interface_name
        prefix = (subnet or "0.0.0.0/24").rpartition("/")[2]
        address = context.node.ip if interface == context.interface_name else "<an address of its own subnet>"
        fix = f"sudo ip addr add {address}/{prefix} dev {interface}"
        yield finding("gid-missing", subject=hca.name, where=context.name, evidence=kinds, fix=fix)


def _pinned_gid(context: NodeContext) -> Iterator[Finding]:
    text = context.environment.get("NCCL_IB_GID_INDEX")
    index = read_nccl_int(text)[0] if text is not None else None
    if index is None or index < 0:
        return
    for hca, port in _active_ethernet(context):
        gid = next((gid for gid in port.gids if gid.index == index), None)
        right = selection.gid_of(hca, context.cluster.fabric.subnet)
        fix = "remove NCCL_IB_GID_INDEX" + ("" if right is None else f"; the right index on this HCA is {right}")
        if gid is None:
            evidence = f"NCCL_IB_GID_INDEX={index}, and gids/{index} is empty"
            yield finding("gid-index-empty", subject=hca.name, where=context.name, evidence=evidence, fix=fix)
        elif gid.is_link_local or not gid.is_v2:
            evidence = f"NCCL_IB_GID_INDEX={index} is {gid.short} ({gid.type})"
            yield finding("gid-linklocal", subject=hca.name, where=context.name, evidence=evidence, fix=fix)


def _twins(context: NodeContext) -> Iterator[Finding]:
    chosen = {hca.name for hca in context.hcas}
    for hca in context.hcas:
        for twin in context.facts.twins(hca):
            if twin.name in chosen and twin.is_active:
                continue
            interface = twin.netdevs[0] if twin.netdevs else "<twin>"
            if not twin.is_active:
                evidence = f"its twin {twin.name} ({interface}) is not ACTIVE"
                fix = f"sudo ip link set {interface} up, and give it an address of its own subnet"
            else:
                evidence = f"its twin {twin.name} ({interface}) is not among the fabric's HCAs"
                fix = f"hcas: [{', '.join(sorted({*chosen, twin.name}))}]"
            if hca.is_active:
                yield finding("twin-port-idle", subject=hca.name, where=context.name, evidence=evidence, fix=fix)


def _pci(context: NodeContext) -> Iterator[Finding]:
    for hca in context.hcas:
        is_narrow = 0 < hca.link_width < hca.max_link_width
        is_slow = 0 < _gigatransfers(hca.link_speed) < _gigatransfers(hca.max_link_speed)
        if is_narrow or is_slow:
            evidence = f"x{hca.link_width} at {hca.link_speed} of x{hca.max_link_width} at {hca.max_link_speed}"
            yield finding("pcie-narrow", subject=hca.name, where=context.name, evidence=evidence)


def _gigatransfers(text: str) -> float:
    match = re.match(r"([\d.]+)", text)
    return float(match[1]) if match else 0.0


def _numa(context: NodeContext) -> Iterator[Finding]:
    if context.facts.numa_nodes < 2:
        return
    known = [hca for hca in context.hcas if hca.numa_node >= 0]
    for gpu in context.facts.gpus:
        if gpu.numa_node < 0 or not known or any(hca.numa_node == gpu.numa_node for hca in known):
            continue
        where = ", ".join(f"{hca.name} on node {hca.numa_node}" for hca in known)
        evidence = f"GPU {gpu.index} ({gpu.bdf}) is on NUMA node {gpu.numa_node}, {where}"
        yield finding("numa-far", subject=f"GPU {gpu.index}", where=context.name, evidence=evidence)


def _acs(context: NodeContext) -> Iterator[Finding]:
    redirecting = context.facts.acs_redirecting
    if not redirecting or context.platform not in _GDR_PLATFORMS:
        return
    bridges = [bdf for bdf in redirecting if any(bdf in hca.path for hca in context.hcas)]
    if bridges:
        evidence = f"redirecting bridges above the HCA: {', '.join(bridges)}"
        fix = "; ".join(f"sudo setpci -s {bdf} ECAP_ACS+6.w=0" for bdf in bridges)
        yield finding("acs-on", subject="PCI", where=context.name, evidence=evidence, fix=fix)


def _gdr(context: NodeContext) -> Iterator[Finding]:
    driver = context.facts.driver
    has_module = driver.has_peermem or driver.has_nv_mem
    if context.platform == "gb10":
        if has_module:
            text = "the module is loaded"
            yield finding("gdr-forbidden", subject="nvidia_peermem", where=context.name, evidence=text)
    elif context.platform in _GDR_PLATFORMS and context.facts.gpus:
        has_dmabuf = driver.is_open and catalogue.release(context.facts.kernel)[:2] >= _DMABUF_KERNEL
        if not has_module and not has_dmabuf:
            kind = "open" if driver.is_open else "closed"
            version = driver.version or "of unknown version"
            evidence = f"no nvidia_peermem; {kind} driver {version}, kernel {context.facts.kernel}"
            yield finding("gdr-none", subject="GPUDirect", where=context.name, evidence=evidence)


def _counters(context: NodeContext) -> Iterator[Finding]:
    for hca in context.hcas:
        for port in hca.ports:
            counted = {name: port.counters.get(name, 0) for name in _ERROR_COUNTERS}
            if any(counted.values()):
                evidence = ", ".join(f"{name} {value:,}" for name, value in counted.items() if value)
                interface = hca.netdevs[0] if hca.netdevs else context.interface_name
                fix = f"ethtool -S {interface} | grep -iE 'err|drop|discard'; reseat the cable"
                yield finding("counters", subject=hca.name, where=context.name, evidence=evidence, fix=fix)
