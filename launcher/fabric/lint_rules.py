"""What variables mean together: with each other, with the fabric's fields, with the platform, with what a host has.

Pure. One function per rule, each a generator of findings over one node's view or over the cluster. Refuses to know:
names and values by themselves (`lint`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import MappingProxyType

from launcher.fabric import catalogue, selection
from launcher.fabric.environment import node_environment
from launcher.fabric.facts import NodeFacts
from launcher.fabric.finding import Finding, finding
from launcher.fabric.kinds import GlooNames, Names, read_nccl_int
from launcher.fabric.sources import NodeView, Source, said
from launcher.fabric.spec import Scope
from launcher.registry.cluster import Cluster

SILENCE_SECONDS = 60.0
_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "NVSHMEM_DISABLE_NVLS": "1", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
_NO_GDR = {"NCCL_NET_GDR_LEVEL": "LOC", "NCCL_NET_GDR_C2C": "0", "NCCL_DMABUF_ENABLE": "0"}


def view_findings(view: NodeView) -> list[Finding]:
    """Run every rule of one node."""
    return [found for rule in _RULES for found in rule(view)]


def silence_seconds(timeout: int, retries: int = 7) -> float:
    """Return how long a dead link stays unreported; infinite for 0 and from 32 on."""
    return float("inf") if timeout <= 0 or timeout >= 32 else 4.096e-6 * 2**timeout * retries


def decode_traffic_class(value: int) -> tuple[int, int, int]:
    """Split a traffic class into DSCP, ECN and the priority that a switch takes from the DSCP by default."""
    return value >> 2, value & 3, value >> 5


def _number(view: NodeView, name: str) -> int | None:
    value = view.value(name)
    return None if value is None else read_nccl_int(value)[0]


def _say(view: NodeView, code: str, name: str, cause: str = "", fix: str = "") -> Finding:
    setting = view.settings[name]
    return said(code, name, setting.value, setting.source, cause, fix)


def _place(view: NodeView) -> str:
    return view.node.name if view.node is not None else "this host"


def _is_rendered(view: NodeView, name: str) -> bool:
    """Say whether the value comes from a field of the fabric; doctor judges the field itself."""
    return view.settings[name].source.place == "fabric"


def _net_conflict(view: NodeView) -> Iterator[Finding]:
    net = (view.value("NCCL_NET") or "").lower()
    is_required = view.cluster is not None and view.cluster.fabric.rdma == "required"
    if net == "ib" and _number(view, "NCCL_IB_DISABLE") == 1:
        yield _say(view, "net-conflict", "NCCL_IB_DISABLE", "NCCL_NET=IB and NCCL_IB_DISABLE=1: no net is left")
    if net == "socket" and is_required:
        yield _say(view, "net-conflict", "NCCL_NET", "the fabric says rdma: required", "remove NCCL_NET")


def _contradictions(view: NodeView) -> Iterator[Finding]:
    if view.cluster is None or view.node is None:
        return
    fabric = view.cluster.fabric
    if fabric.rdma == "required" and (_number(view, "NCCL_IB_DISABLE") or 0) > 0:
        yield _say(view, "env-contradicts-fabric", "NCCL_IB_DISABLE", "the fabric says rdma: required")
    if fabric.rdma == "off" and (view.value("NCCL_NET") or "").lower() == "ib":
        yield _say(view, "env-contradicts-fabric", "NCCL_NET", "the fabric says rdma: off")
    bare = replace(view.cluster, env=MappingProxyType({}))
    node = replace(view.node, env=MappingProxyType({}))
    rendered = {item.name: item for item in node_environment(bare, node, {}) if item.origin.startswith("fabric ")}
    for name, item in rendered.items():
        if name in ("NCCL_NET", "NCCL_IB_DISABLE") or name not in view.settings:
            continue
        setting = view.settings[name]
        if setting.source.place in ("model", "cluster", "node") and setting.value != item.value:
            field = item.origin.removeprefix("fabric ")
            cause = f"the fabric's '{field}' renders {name}={item.value}"
            yield _say(view, "env-contradicts-fabric", name, cause, f"remove {name}, or change '{field}'")


def _gdr(view: NodeView) -> Iterator[Finding]:
    if view.cluster is None or view.node is None:
        return
    if selection.platform_of(view.cluster, view.node, view.facts) != "gb10":
        return
    for name, wanted in _NO_GDR.items():
        value = view.value(name)
        if value is not None and value != wanted:
            yield _say(view, "gdr-on-gb10", name, fix=f"{name}={wanted}, or remove it: the preset sets it")


def _multicast(view: NodeView) -> Iterator[Finding]:
    for name, wanted in _MULTICAST.items():
        value = view.value(name)
        if value is not None and value != wanted and not (wanted == "1" and value.lower() in ("true", "yes", "y", "t")):
            yield _say(view, "nvls-on", name, fix=f"remove it; hlaunch sets {name}={wanted}")


def _timeout(view: NodeView) -> Iterator[Finding]:
    timeout = _number(view, "NCCL_IB_TIMEOUT")
    if timeout is None:
        return
    retries = _number(view, "NCCL_IB_RETRY_CNT")
    seconds = silence_seconds(timeout, 7 if retries is None else retries)
    if seconds > SILENCE_SECONDS:
        length = "for ever" if seconds == float("inf") else f"{seconds:.0f} s"
        yield _say(view, "timeout-silence", "NCCL_IB_TIMEOUT", f"a dead link stays unreported {length}")


def _traffic_class(view: NodeView) -> Iterator[Finding]:
    value = _number(view, "NCCL_IB_TC")
    if value is None or not 0 < value <= 255:
        return
    dscp, ecn, priority = decode_traffic_class(value)
    pfc = ",".join("1" if i == priority else "0" for i in range(8))
    text = f"{value} = DSCP {dscp}, ECN {ecn}, priority {priority}; lossless only with PFC on priority {priority}"
    interface = selection.interface_of(view.node, view.facts) if view.node is not None else None
    command = f"mlnx_qos -i {interface or '<interface>'} --trust dscp --pfc {pfc}"
    yield _say(view, "tc-decoded", "NCCL_IB_TC", text, command)
    index = _number(view, "NCCL_IB_GID_INDEX")
    if index is not None and index >= 0 and _is_v1(view, index):
        yield _say(view, "tc-on-v1", "NCCL_IB_TC", f"GID {index} is RoCE v1: DSCP {dscp} has no IP header to live in")


def _is_v1(view: NodeView, index: int) -> bool:
    """Say whether a GID index is RoCE v1: by the node's table, else by habit (0 is the link-local one)."""
    if view.facts is None or not view.facts.hcas:
        return index == 0
    gids = [gid for hca in view.facts.hcas for port in hca.ports for gid in port.gids if gid.index == index]
    return any(gid.type == "IB/RoCE v1" for gid in gids)


def _service_level(view: NodeView) -> Iterator[Finding]:
    if (_number(view, "NCCL_IB_SL") or 0) <= 0:
        return
    layers = {port.link_layer for hca in (view.facts.hcas if view.facts else ()) for port in hca.ports}
    if layers != {"InfiniBand"}:
        yield _say(view, "sl-untagged", "NCCL_IB_SL")


def _gid_pinned(view: NodeView) -> Iterator[Finding]:
    index = _number(view, "NCCL_IB_GID_INDEX")
    if index is None or index < 0:
        return
    # `gid-index: auto-pin` reads the node's own table at each start, which is what a fixed number lacks.
    if (
        not _is_rendered(view, "NCCL_IB_GID_INDEX")
        or view.cluster is None
        or view.cluster.fabric.gid_index != "auto-pin"
    ):
        cause = "index 0 is by habit the link-local RoCE v1 GID; " if index == 0 else ""
        cause += "NCCL uses it for all HCAs of the node and checks nothing"
        yield _say(view, "gid-pinned", "NCCL_IB_GID_INDEX", cause)


def _interfaces(view: NodeView) -> Iterator[Finding]:
    if view.facts is None:
        return
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = view.value(name)
        kind = getattr(catalogue.find(name), "kind", None)
        if value is None or not isinstance(kind, Names | GlooNames) or _is_rendered(view, name):
            continue
        is_exact = isinstance(kind, GlooNames) or value.startswith("=")
        for token in kind.names(value):
            if not _is_usable(view.facts, token, is_exact):
                there = ", ".join(
                    netdev.name for netdev in view.facts.netdevs if netdev.is_running and netdev.addresses
                )
                cause = f"{_place(view)} has no running interface '{token}' with an address"
                yield _say(view, "ifname-absent", name, cause, f"name one of {there}")


def _is_usable(facts: NodeFacts, token: str, is_exact: bool) -> bool:
    return any(
        netdev.is_running
        and netdev.addresses
        and (netdev.name == token or (not is_exact and netdev.name.startswith(token)))
        for netdev in facts.netdevs
    )


def _hcas(view: NodeView) -> Iterator[Finding]:
    value = view.value("NCCL_IB_HCA")
    if value is None or view.facts is None or value.startswith("^"):
        return
    names = Names("HCA", 32, has_ports=True).names(value)
    is_exact = value.startswith("=")
    facts = view.facts
    chosen = []
    for name in names:
        hcas = [hca for hca in facts.hcas if hca.name == name or (not is_exact and hca.name.startswith(name))]
        chosen += hcas
        if any(hca.is_active for hca in hcas) or (hcas and _is_rendered(view, "NCCL_IB_HCA")):
            continue
        state = "is not ACTIVE" if hcas else "is not there"
        active = ", ".join(hca.name for hca in facts.hcas if hca.is_active)
        fix = f"hcas: [{active}]" if active else "rdma link show; no HCA of this node is ACTIVE"
        yield _say(view, "hca-absent", "NCCL_IB_HCA", f"'{name}' {state} on {_place(view)}", fix)
    taken = {hca.name for hca in chosen}
    for hca in () if _is_rendered(view, "NCCL_IB_HCA") else chosen:
        for twin in facts.twins(hca):
            if twin.name not in taken:
                both = ",".join(sorted({*taken, twin.name}))
                cause = f"'{twin.name}' is the other half of the same cable"
                yield _say(view, "twin-idle", "NCCL_IB_HCA", cause, f"NCCL_IB_HCA=={both}")
    subnet = view.value("NCCL_IB_ADDR_RANGE")
    missed = [hca.name for hca in chosen if subnet is not None and selection.gid_in(hca, subnet) is None]
    if missed:
        cause = (
            f"{', '.join(missed)} of {_place(view)} has no RoCE v2 GID in {subnet}: GID 0 stays, which cannot connect"
        )
        yield _say(view, "addr-range-misses-hca", "NCCL_IB_ADDR_RANGE", cause)


def _plugins(view: NodeView) -> Iterator[Finding]:
    plugin = view.value("NCCL_NET_PLUGIN")
    if plugin and plugin.lower() != "none":
        yield _say(view, "plugin-skew", "NCCL_NET_PLUGIN")
    if view.value("NCCL_CONF_FILE"):
        yield _say(view, "conf-file", "NCCL_CONF_FILE")


def _ucx(view: NodeView) -> Iterator[Finding]:
    devices = view.value("UCX_NET_DEVICES")
    is_required = view.cluster is not None and view.cluster.fabric.rdma == "required"
    if is_required and devices and devices != "all" and ":" not in devices:
        yield _say(view, "ucx-tcp", "UCX_NET_DEVICES")


def _no_effect(view: NodeView) -> Iterator[Finding]:
    names = (view.value("NCCL_IB_HCA") or "").lstrip("^=").split(",")
    if view.value("NCCL_CROSS_NIC") is not None and len(names) == 1 and names[0]:
        yield _say(view, "no-effect", "NCCL_CROSS_NIC", "there is one NIC, so nothing to cross")


_RULES: tuple[Callable[[NodeView], Iterator[Finding]], ...] = (
    _net_conflict,
    _contradictions,
    _gdr,
    _multicast,
    _timeout,
    _traffic_class,
    _service_level,
    _gid_pinned,
    _interfaces,
    _hcas,
    _plugins,
    _ucx,
    _no_effect,
)


def cluster_findings(cluster: Cluster, sources: Sequence[Source], views: Sequence[NodeView]) -> list[Finding]:
    """Run the rules that compare nodes."""
    return [*_shared_node_facts(cluster, sources, views), *_differing(views)]


def _shared_node_facts(cluster: Cluster, sources: Sequence[Source], views: Sequence[NodeView]) -> Iterator[Finding]:
    if len(cluster.nodes) < 2:
        return
    if isinstance(cluster.fabric.gid_index, int):
        yield finding(
            "gid-on-cluster",
            subject="fabric.gid-index",
            where=f"cluster '{cluster.name}'",
            evidence=f"gid-index: {cluster.fabric.gid_index}",
            fix="gid-index: auto",
        )
    for source in sources:
        if source.node is not None or source.place == "process":
            continue
        for name in sorted(source.values):
            row = catalogue.find(name)
            if row is None or row.scope is not Scope.NODE or _is_right_everywhere(name, source.values[name], views):
                continue
            cause = f"{name} is a fact of one node, and this says it for {len(cluster.nodes)}"
            yield said("gid-on-cluster", name, source.values[name], source, cause)


def _is_right_everywhere(name: str, value: str, views: Sequence[NodeView]) -> bool:
    """Say whether measured nodes agree that a shared value is right on each: names that exist, one v2 GID."""
    if not views or any(view.facts is None for view in views):
        return False
    facts = [view.facts for view in views if view.facts is not None]
    if name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        tokens = value.lstrip("=").split(",")
        return all(_is_usable(fact, token, is_exact=True) for fact in facts for token in tokens)
    if name == "NCCL_IB_HCA":
        tokens = [token.partition(":")[0] for token in value.lstrip("=").split(",")]
        return all((hca := fact.hca(token)) is not None and hca.is_active for fact in facts for token in tokens)
    if name in ("NCCL_IB_GID_INDEX", "UCX_IB_GID_INDEX") and value.isdecimal() and len(value) <= 5:
        return all(
            any(gid.index == int(value) and gid.is_v2 and gid.ipv4 is not None for gid in port.gids)
            for fact in facts
            for hca in fact.hcas
            for port in hca.ports
            if port.is_active
        )
    return False


def _differing(views: Sequence[NodeView]) -> Iterator[Finding]:
    """Find values that must be equal everywhere and are not; a node without the name has its default.

    A node that was not read says nothing while others were, and a node without GPUs lacks most names by right.
    """
    is_measured = any(view.facts is not None for view in views)
    views = [view for view in views if view.facts is not None or not is_measured]
    names = sorted({name for view in views for name in view.settings})
    for name in names:
        row = catalogue.find(name)
        if row is None or row.scope is not Scope.CLUSTER:
            continue
        values = {
            view.node.name: view.value(name)
            for view in views
            if view.node is not None and (name in view.settings or not _lacks_gpus(view))
        }
        if len(set(values.values())) > 1:
            evidence = ", ".join(f"{node}: {'unset' if value is None else value}" for node, value in values.items())
            holder = next(view for view in views if name in view.settings)
            yield finding(
                "c-scope-differs",
                subject=name,
                where=holder.settings[name].source.at(name),
                evidence=evidence,
                fix=f"move {name} into the cluster's env block",
            )


def _lacks_gpus(view: NodeView) -> bool:
    if view.cluster is None or view.node is None:
        return False
    return selection.platform_of(view.cluster, view.node, view.facts) == "cpu"
