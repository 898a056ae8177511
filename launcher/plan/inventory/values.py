"""The inventory's values, and the JSON in which one host's travels to another. Units: bytes, or as a name says."""

from __future__ import annotations

import json
import types
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from launcher.errors import PreflightError

FORMAT = 1
THIS_HOST = "this host"
MAX_JSON_BYTES = 4 << 20
_T = TypeVar("_T")


class InventoryError(PreflightError):
    """A saved inventory cannot be read."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that could not be read or used: a stable code, what is the matter, what repairs it."""

    code: str
    message: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class GpuLink:
    """A way from one GPU to another: `nvlink` with its number of lanes, or `pcie` with what lies between.

    `detail` for PCIe: PIX (one switch), PXB (several), PHB (host bridge), NODE, SYS (across sockets).
    """

    peer: int
    kind: str
    lanes: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds memory of a GPU; bytes are 0 when the driver does not tell."""

    pid: int
    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `memory_bytes` 0: unknown. `is_unified`: its memory is the host's (GB10), and NVML counts none."""

    index: int
    name: str
    memory_bytes: int = 0
    free_bytes: int = 0
    capability: tuple[int, int] | None = None
    bus_id: str = ""
    uuid: str = ""
    numa_node: int | None = None
    is_unified: bool = False
    links: tuple[GpuLink, ...] = ()
    processes: tuple[GpuProcess, ...] = ()

    @property
    def capability_text(self) -> str:
        return "unknown" if self.capability is None else f"{self.capability[0]}.{self.capability[1]}"


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One NUMA node: its cores as the kernel numbers them, and its memory."""

    index: int
    cores: tuple[int, ...]
    memory_bytes: int = 0
    free_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RdmaPort:
    """One port of an RDMA device. `netdev` is the network interface on the same port."""

    device: str
    port: int
    state: str
    link_layer: str = ""
    rate_gbps: float = 0.0
    netdev: str = ""
    numa_node: int | None = None

    @property
    def is_active(self) -> bool:
        return self.state == "ACTIVE"


@dataclass(frozen=True, slots=True)
class Nic:
    """One network interface; virtual ones (bridges, container ends) are left out."""

    name: str
    state: str = ""
    speed_gbps: float = 0.0
    mtu: int = 0
    addresses: tuple[str, ...] = ()
    numa_node: int | None = None
    rdma_device: str = ""


@dataclass(frozen=True, slots=True)
class Inventory:
    """One machine. `memory_available_bytes` already respects cgroup limits.

    `memory_bandwidth` is measured read bandwidth in bytes per second, None until `--measure`. `torch_cuda` is the CUDA
    version that the installed torch was built for: None without torch, "" for a build without CUDA.
    """

    node: str
    cpu_name: str
    cpu_cores: int
    numa_nodes: int
    memory_total_bytes: int
    memory_available_bytes: int
    gpus: tuple[Gpu, ...] = ()
    cpu_features: tuple[str, ...] = ()
    numa: tuple[NumaNode, ...] = ()
    nics: tuple[Nic, ...] = ()
    rdma_ports: tuple[RdmaPort, ...] = ()
    driver_version: str = ""
    torch_cuda: str | None = None
    memory_bandwidth: float | None = None
    source: str = THIS_HOST
    findings: tuple[Finding, ...] = ()

    @property
    def has_rdma(self) -> bool:
        return any(port.is_active for port in self.rdma_ports)

    @property
    def is_this_host(self) -> bool:
        """Whether it was read here and now; what is installed here then says something about it."""
        return self.source == THIS_HOST

    def to_json(self) -> str:
        """Write the inventory for another host; `from_json` reads it back unchanged."""
        return json.dumps({"hlaunch_inventory": FORMAT, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str, where: str) -> Inventory:
        """Read what `to_json` wrote. Raises: InventoryError naming the field."""
        hint = "make it with: hlaunch inventory --json > FILE"
        if len(text) > MAX_JSON_BYTES:
            raise InventoryError(f"{where}: larger than an inventory can be", hint=hint)
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InventoryError(f"{where}: not valid JSON: {error}", hint=hint) from error
        if not isinstance(data, dict) or data.pop("hlaunch_inventory", None) != FORMAT:
            raise InventoryError(f"{where}: not an inventory of format {FORMAT}", hint=hint)
        try:
            return _build(cls, data, "")
        except (ValueError, RecursionError) as error:
            raise InventoryError(f"{where}: {error}", hint=hint) from error


def _build(kind: type[_T], data: object, where: str) -> _T:
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the file'} is not a mapping")
    types_of = get_type_hints(kind)
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(map(str, set(data) - names)):
        raise ValueError(f"unknown field {where}{unknown[0]}")
    needed = [item.name for item in fields(kind) if item.default is MISSING]  # type: ignore[arg-type]
    if absent := [f"{where}{name}" for name in needed if name not in data]:
        raise ValueError(f"missing field{'s' if len(absent) > 1 else ''} {', '.join(absent)}")
    return kind(**{name: _value(types_of[name], value, f"{where}{name}") for name, value in data.items()})


def _value(kind: Any, value: object, where: str) -> object:
    """Check one value against its annotation and give it the annotated form."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (kind,) = (arg for arg in args if arg is not type(None))
        return _value(kind, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is not a list")
        if args[-1] is Ellipsis:
            return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(value) != len(args):
            raise ValueError(f"{where} has {len(value)} items, not {len(args)}")
        return tuple(_value(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))
    if is_dataclass(kind) and isinstance(kind, type):
        return _build(kind, value, f"{where}.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{where} is not {kind.__name__}")
    return value
