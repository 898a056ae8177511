"""One source of truth for the fabric: variables that say the opposite of a fabric field.

Knows: which variable repeats which field, and when the two disagree. Refuses to know: everything else about variables
(`launcher.fabric` lints them), positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher.registry.cluster import Fabric, Node


@dataclass(frozen=True, slots=True)
class Contradiction:
    """`variable` disagrees with `field` (dotted, below the cluster)."""

    variable: str
    field: str
    message: str


def contradictions(fabric: Fabric, env: Mapping[str, str], node: Node | None = None) -> Iterator[Contradiction]:
    """Compare variables of a cluster, or of one of its nodes, with the fabric's fields. Pure."""
    for variable, value in env.items():
        text = value.strip()
        if variable in _WORDS:
            field, says, opposite = _WORDS[variable](fabric, text)
            if opposite:
                yield Contradiction(variable, field, f"{text!r} contradicts {says}")
        elif variable in _NUMBERS:
            attribute, field = _NUMBERS[variable]
            declared = getattr(fabric, attribute)
            if declared is not None and text != str(int(declared)):
                shown = str(declared).lower() if isinstance(declared, bool) else declared
                yield Contradiction(variable, f"fabric.{field}", f"{text!r} contradicts {field}: {shown}")
        if node is not None:
            yield from _of_node(node, variable, text)


def _of_node(node: Node, variable: str, text: str) -> Iterator[Contradiction]:
    names = set(text.removeprefix("^").removeprefix("=").split(","))
    if variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") and node.ifname and text.lstrip("=") != node.ifname:
        yield Contradiction(variable, "ifname", f"{text!r} contradicts ifname: {node.ifname}")
    if variable == "NCCL_IB_HCA" and node.hcas and (text.startswith("^") or names != set(node.hcas)):
        yield Contradiction(variable, "hcas", f"{text!r} contradicts hcas: [{', '.join(node.hcas)}]")
    if variable == "NCCL_IB_GID_INDEX" and node.gid_index is not None and text != str(node.gid_index):
        yield Contradiction(variable, "gid-index", f"{text!r} contradicts gid-index: {node.gid_index}")
    if variable == "HLAUNCH_NODE_IP" and text != node.ip:
        yield Contradiction(variable, "ip", f"{text!r} contradicts ip: {node.ip}")


def _ib_disable(fabric: Fabric, text: str) -> tuple[str, str, bool]:
    # NCCL reads words as 0: only a number other than 0 switches InfiniBand off.
    is_off = text.isascii() and text.isdigit() and text.strip("0") != ""
    return "fabric.rdma", f"rdma: {fabric.rdma}", (fabric.rdma == "required") if is_off else (fabric.rdma == "off")


def _net(fabric: Fabric, text: str) -> tuple[str, str, bool]:
    opposite = {"required": "socket", "off": "ib"}.get(fabric.rdma)
    return "fabric.rdma", f"rdma: {fabric.rdma}", text.lower() == opposite


def _addr_range(fabric: Fabric, text: str) -> tuple[str, str, bool]:
    return "fabric.subnet", f"subnet: {fabric.subnet}", fabric.subnet is not None and text != fabric.subnet


def _gid_index(fabric: Fabric, text: str) -> tuple[str, str, bool]:
    is_pinned = text not in ("", "-1")
    return "fabric.gid-index", f"gid-index: {fabric.gid_index}", is_pinned and fabric.gid_index == "auto-pin"


_WORDS = {
    "NCCL_IB_DISABLE": _ib_disable,
    "NCCL_NET": _net,
    "NCCL_IB_ADDR_RANGE": _addr_range,
    "NCCL_IB_GID_INDEX": _gid_index,
}
_NUMBERS = {
    "NCCL_IB_TC": ("traffic_class", "tc"),
    "NCCL_IB_SL": ("service_level", "sl"),
    "NCCL_IB_TIMEOUT": ("timeout", "timeout"),
    "NCCL_IB_MERGE_NICS": ("merge_nics", "merge-nics"),
}
