"""An NVML of our own for tests: the functions of `pynvml` that the inventory asks, over a list of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    pass


@dataclass
class FakeGpu:
    """One GPU; `memory` None: not supported. `nvlinks` are the peers of its lanes, -1 for a switch."""

    name: str = "NVIDIA H100 80GB HBM3"
    memory: tuple[int, int] | None = (80 << 30, 79 << 30)
    capability: tuple[int, int] | None = (9, 0)
    bus: int = 0
    numa: int | None = 0
    nvlinks: Sequence[int] = ()
    ancestor: int = 50
    processes: Sequence[tuple[int, str, int | None]] = ()


@dataclass
class FakeNvml:
    """Stands in for the module `pynvml`. `init_error` is what nvmlInit raises; `lacks` functions an old one lacks."""

    gpus: Sequence[FakeGpu] = field(default_factory=list)
    driver: str | bytes = "580.65.06"
    init_error: str = ""
    lacks: Sequence[str] = ()
    is_open: bool = False
    NVMLError: type[Exception] = NVMLError

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "lacks"):
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init_error:
            raise NVMLError(self.init_error)
        self.is_open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlSystemGetDriverVersion(self) -> str | bytes:  # noqa: N802
        return self.driver

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
        assert self.is_open
        return self.gpus[index]

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> Any:  # noqa: N802
        if gpu.memory is None:
            raise NVMLError("Not Supported")
        return SimpleNamespace(total=gpu.memory[0], free=gpu.memory[1])

    def nvmlDeviceGetCudaComputeCapability(self, gpu: FakeGpu) -> tuple[int, int]:  # noqa: N802
        if gpu.capability is None:
            raise NVMLError("Not Supported")
        return gpu.capability

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> bytes:  # noqa: N802
        return gpu.name.encode()

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:  # noqa: N802
        return f"GPU-{gpu.bus}"

    def nvmlDeviceGetNumaNodeId(self, gpu: FakeGpu) -> int:  # noqa: N802
        if gpu.numa is None:
            raise NVMLError("Not Supported")
        return gpu.numa

    def nvmlDeviceGetPciInfo(self, gpu: FakeGpu) -> Any:  # noqa: N802
        return SimpleNamespace(busId=f"00000000:{gpu.bus:02X}:00.0")

    def nvmlDeviceGetNvLinkState(self, gpu: FakeGpu, link: int) -> int:  # noqa: N802
        if link >= len(gpu.nvlinks):
            raise NVMLError("Invalid Argument")
        return 1

    def nvmlDeviceGetNvLinkRemotePciInfo(self, gpu: FakeGpu, link: int) -> Any:  # noqa: N802
        peer = gpu.nvlinks[link]
        return SimpleNamespace(busId="00000000:FF:00.0" if peer < 0 else f"00000000:{self.gpus[peer].bus:02X}:00.0")

    def nvmlDeviceGetTopologyCommonAncestor(self, one: FakeGpu, other: FakeGpu) -> int:  # noqa: N802
        return max(one.ancestor, other.ancestor)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGpu) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, _, used in gpu.processes]

    def nvmlSystemGetProcessName(self, pid: int) -> bytes:  # noqa: N802
        for gpu in self.gpus:
            for known, name, _ in gpu.processes:
                if known == pid:
                    return name.encode()
        raise NVMLError("Not Found")
