"""GPUs as NVIDIA's management library shows them: memory, capability, driver, links, who holds memory.

Knows: the functions of the package nvidia-ml-py (module `pynvml`), and what old drivers and unified memory lack.
Refuses to know: CUDA; no context is made, so looking costs a GPU nothing. The module comes in as an argument: tests
hand in one of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from launcher.plan.inventory.values import Finding, Gpu, GpuLink, GpuProcess

_MAX_NVLINKS = 18
# nvmlDeviceGetTopologyCommonAncestor's levels.
_PCIE = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What NVML told. `findings` say why something is missing."""

    gpus: tuple[Gpu, ...] = ()
    driver_version: str = ""
    findings: tuple[Finding, ...] = ()


def load_nvml() -> ModuleType | None:
    """Import `pynvml` if it is installed."""
    try:
        return import_module("pynvml")
    except ImportError:
        return None


def read_gpus(nvml: Any, unified_memory: tuple[int, int]) -> GpuReading:
    """Read all GPUs; `unified_memory` is the host's (total, available), for GPUs that share it.

    Never raises: a driver that does not answer becomes a finding.
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return GpuReading(findings=(_init_finding(str(error)),))
    try:
        count = int(nvml.nvmlDeviceGetCount())
        driver = _text(_ask(nvml, "nvmlSystemGetDriverVersion"))
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        gpus = tuple(_gpu(nvml, index, handles, unified_memory) for index in range(count))
        return GpuReading(gpus, driver)
    except nvml.NVMLError as error:
        finding = Finding("nvml-failed", f"the NVIDIA driver answers NVML with: {error}", "run: nvidia-smi")
        return GpuReading(findings=(finding,))
    finally:
        _ask(nvml, "nvmlShutdown")


def _init_finding(reason: str) -> Finding:
    if "mismatch" in reason.lower():
        return Finding(
            "driver-mismatch",
            f"NVML cannot start: {reason}",
            "the driver was updated under a running kernel module: reboot",
        )
    if "not found" in reason.lower() or "not loaded" in reason.lower():
        return Finding("driver-missing", f"NVML cannot start: {reason}", "install the NVIDIA driver, or use CPUs")
    return Finding("nvml-failed", f"NVML cannot start: {reason}", "run: nvidia-smi")


def _ask(nvml: Any, name: str, *arguments: Any) -> Any:
    """Ask one thing that some drivers, GPUs or versions of the bindings do not know; None then."""
    try:
        return getattr(nvml, name)(*arguments)
    except Exception:  # noqa: BLE001 - NVMLError of whichever module came in, AttributeError of an old one
        return None


def _text(value: str | bytes | None) -> str:
    """Old bindings answer in bytes; no answer is an empty text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")


def _bus_id(nvml: Any, handle: Any) -> str:
    """NVML writes an eight-digit domain, sysfs one of four: `00000000:3B:00.0` is `0000:3b:00.0`."""
    info = _ask(nvml, "nvmlDeviceGetPciInfo", handle)
    return _short(_text(info.busId)) if info is not None else ""


def _short(bus_id: str) -> str:
    domain, _, rest = bus_id.lower().partition(":")
    return f"{domain[-4:]}:{rest}" if rest else bus_id.lower()


def _gpu(nvml: Any, index: int, handles: list[Any], unified_memory: tuple[int, int]) -> Gpu:
    handle = handles[index]
    memory = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    total, free = (int(memory.total), int(memory.free)) if memory is not None else (0, 0)
    # GB10: "Not Supported", since GPU and CPU share one memory.
    is_unified = not total
    if is_unified:
        total, free = unified_memory
    capability = _ask(nvml, "nvmlDeviceGetCudaComputeCapability", handle)
    numa = _ask(nvml, "nvmlDeviceGetNumaNodeId", handle)
    return Gpu(
        index=index,
        name=_text(_ask(nvml, "nvmlDeviceGetName", handle)) or "NVIDIA GPU",
        memory_bytes=total,
        free_bytes=free,
        capability=(int(capability[0]), int(capability[1])) if capability else None,
        bus_id=_bus_id(nvml, handle),
        uuid=_text(_ask(nvml, "nvmlDeviceGetUUID", handle)),
        numa_node=int(numa) if numa is not None and int(numa) >= 0 else None,
        is_unified=is_unified,
        links=_links(nvml, index, handles),
        processes=_processes(nvml, handle),
    )


def _links(nvml: Any, index: int, handles: list[Any]) -> tuple[GpuLink, ...]:
    """NVLink lanes by peer, through a switch to all peers; PCIe distance where there are none."""
    if len(handles) == 1:
        return ()
    own = handles[index]
    by_bus = {_bus_id(nvml, handle): peer for peer, handle in enumerate(handles)}
    lanes: dict[int, int] = {}
    switched = 0
    for link in range(_MAX_NVLINKS):
        if not _ask(nvml, "nvmlDeviceGetNvLinkState", own, link):
            continue
        remote = _ask(nvml, "nvmlDeviceGetNvLinkRemotePciInfo", own, link)
        peer = by_bus.get(_short(_text(remote.busId))) if remote is not None else None
        if peer is None:
            # The other end is no GPU: a switch, which leads to all of them.
            switched += 1
        elif peer != index:
            lanes[peer] = lanes.get(peer, 0) + 1
    found = []
    for peer, handle in enumerate(handles):
        if peer == index:
            continue
        if count := lanes.get(peer, 0) or switched:
            found.append(GpuLink(peer, "nvlink", count, "NVSwitch" if switched else ""))
        else:
            level = _ask(nvml, "nvmlDeviceGetTopologyCommonAncestor", own, handle)
            found.append(GpuLink(peer, "pcie", detail=_PCIE.get(int(level), "SYS") if level is not None else "SYS"))
    return tuple(found)


def _processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    found = []
    for item in _ask(nvml, "nvmlDeviceGetComputeRunningProcesses", handle) or ():
        used = getattr(item, "usedGpuMemory", None)
        name = _text(_ask(nvml, "nvmlSystemGetProcessName", item.pid))
        found.append(GpuProcess(int(item.pid), name, int(used) if used else 0))
    return tuple(sorted(found, key=lambda process: -process.memory_bytes))
