"""The environment of a node: built-in < preset of the platform < fabric < cluster's env < node's env, each with origin.

Pure. Knows: which variable each field of the fabric renders, the presets, what may be carried from the machine that
starts the others. Refuses to know: what is wrong with a value (`lint`), paths inside a container, secrets.

With the facts of a host, what is `auto` becomes a name: the interface that carries the ip, the ACTIVE HCAs of the
subnet with their twins. Without them it stays out, and the node's own start fills it in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from launcher.fabric import catalogue, selection
from launcher.fabric.facts import NodeFacts
from launcher.registry.cluster import Cluster, Node
from launcher.registry.contradictions import contradictions

BUILT_IN = "built-in"
CARRIED = "carried from the launching environment"


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable of a node. `shadowed` are the values that it hides, nearest first."""

    name: str
    value: str
    origin: str
    shadowed: tuple[Variable, ...] = ()

    @property
    def shown(self) -> str:
        """The value as it may be printed."""
        return catalogue.shown(self.name, self.value)

    @property
    def told(self) -> str:
        """Value and origin as words: `IB, from fabric rdma`."""
        return f"{self.shown}, {self.origin if self.origin == CARRIED else f'from {self.origin}'}"


def node_environment(
    cluster: Cluster, node: Node, base: Mapping[str, str], facts: NodeFacts | None = None
) -> tuple[Variable, ...]:
    """List what is set for a node, in name order. `base` is the launching environment, applied set-if-absent.

    Of `base` only names of the catalogue go along that must be equal everywhere or are free: no interface, no HCA, no
    rank, no path, no secret.
    """
    platform = selection.platform_of(cluster, node, facts)
    fabric = _fabric(cluster, node, platform, facts)
    layers: list[Variable] = [
        *_carried(cluster, node, base, {item.name for item in fabric}),
        *_built_in(cluster, node, platform),
        *_preset(cluster, platform),
        *fabric,
        *(Variable(name, value, "cluster env") for name, value in cluster.env.items()),
        *(Variable(name, value, "node env") for name, value in node.env.items()),
    ]
    return _merged(layers)


def carried_environment(
    cluster: Cluster, node: Node, base: Mapping[str, str], planned: Collection[str]
) -> dict[str, str]:
    """Return what of `base` goes along at a start, in name order: nothing that the plan has (`planned`) already."""
    platform = selection.platform_of(cluster, node)
    fabric = {item.name for item in _fabric(cluster, node, platform, None)}
    return {item.name: item.value for item in _carried(cluster, node, base, fabric) if item.name not in planned}


def _carried(cluster: Cluster, node: Node, base: Mapping[str, str], fabric: Collection[str]) -> list[Variable]:
    """List what may travel; what says the opposite of the fabric stays, unless the fabric's own word goes over it."""
    found = {name: base[name] for name in sorted(base) if catalogue.is_carried(name)}
    opposed = {item.variable for item in contradictions(cluster.fabric, found, node)} - set(fabric)
    return [Variable(name, value, CARRIED) for name, value in found.items() if name not in opposed]


def as_mapping(variables: Iterable[Variable]) -> dict[str, str]:
    """Turn the list into what a process is started with."""
    return {variable.name: variable.value for variable in variables}


def _merged(layers: list[Variable]) -> tuple[Variable, ...]:
    """Let later ones win; each keeps what it hides."""
    chosen: dict[str, Variable] = {}
    for variable in layers:
        below = chosen.get(variable.name)
        if below is not None:
            variable = replace(variable, shadowed=(replace(below, shadowed=()), *below.shadowed))
        chosen[variable.name] = variable
    return tuple(chosen[name] for name in sorted(chosen))


def _built_in(cluster: Cluster, node: Node, platform: str) -> list[Variable]:
    values = {"HLAUNCH_NODE_IP": node.ip}
    if platform != "cpu":
        values |= {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "NCCL_NET_PLUGIN": "none",
            # NVLink multicast stays off in all three libraries that could use it.
            "NCCL_NVLS_ENABLE": "0",
            "NVSHMEM_DISABLE_NVLS": "1",
            "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        }
    if cluster.ray is not None:
        values |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        if platform != "cpu":
            values["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    return [Variable(name, value, BUILT_IN) for name, value in values.items()]


def _preset(cluster: Cluster, platform: str) -> list[Variable]:
    values: dict[str, str] = {}
    if platform == "gb10":
        values = {
            "NCCL_NET_GDR_LEVEL": "LOC",
            "NCCL_NET_GDR_C2C": "0",
            "NCCL_DMABUF_ENABLE": "0",
            "NCCL_IGNORE_CPU_AFFINITY": "1",
        }
        if cluster.ray is not None:
            # Memory is the GPU's too: loading weights looks like a leak, and Ray would kill the workers.
            values["RAY_memory_monitor_refresh_ms"] = "0"
    return [Variable(name, value, f"preset {platform}") for name, value in values.items()]


def _fabric(cluster: Cluster, node: Node, platform: str, facts: NodeFacts | None) -> list[Variable]:
    found: list[tuple[str, str, str]] = []
    interface = selection.interface_of(node, facts)
    if interface is not None:
        origin = "ifname" if node.ifname is not None else "ip, measured"
        found.append(("GLOO_SOCKET_IFNAME", interface, origin))
        if platform != "cpu":
            found.append(("NCCL_SOCKET_IFNAME", f"={interface}", origin))
    if platform != "cpu":
        found += _rdma(cluster, node, facts)
    return [Variable(name, value, f"fabric {field}") for name, value, field in found]


def _rdma(cluster: Cluster, node: Node, facts: NodeFacts | None) -> list[tuple[str, str, str]]:
    fabric = cluster.fabric
    if fabric.rdma == "off":
        return [("NCCL_NET", "Socket", "rdma"), ("NCCL_IB_DISABLE", "1", "rdma")]
    found: list[tuple[str, str, str]] = []
    if fabric.rdma == "required":
        found.append(("NCCL_NET", "IB", "rdma"))
    hcas = selection.hca_names_of(cluster, node, facts)
    if hcas:
        origin = "hcas" if node.hcas or fabric.hcas else "hcas, measured"
        found.append(("NCCL_IB_HCA", "=" + ",".join(hcas), origin))
    pinned = fabric.gid_index if node.gid_index is None else node.gid_index
    if isinstance(pinned, int):
        found.append(("NCCL_IB_GID_INDEX", str(pinned), "gid-index"))
    elif pinned == "auto-pin" and facts is not None:
        index = selection.pinned_gid(cluster, node, facts)
        if index is not None:
            found.append(("NCCL_IB_GID_INDEX", str(index), "gid-index, measured"))
    elif facts is not None and selection.range_covers(cluster, node, facts):
        found.append(("NCCL_IB_ADDR_RANGE", str(fabric.subnet), "subnet"))
    # What equals NCCL's default stays out, so that a later default of NCCL can win.
    numbers = (
        ("NCCL_IB_TC", fabric.traffic_class, 0, "tc"),
        ("NCCL_IB_SL", fabric.service_level, 0, "sl"),
        ("NCCL_IB_TIMEOUT", fabric.timeout, 20, "timeout"),
        ("NCCL_IB_MERGE_NICS", None if fabric.merge_nics is None else int(fabric.merge_nics), 1, "merge-nics"),
    )
    found += [(name, str(value), field) for name, value, default, field in numbers if value not in (None, default)]
    return found
