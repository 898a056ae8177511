"""What one GPU holds and draws, as NVIDIA's management library tells without disturbing work on it.

Knows: the package nvidia-ml-py (module `pynvml`), and that it may lack. Refuses to know: whose memory it is: a device's
is counted whole, as its limit is.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from engine.usage import DeviceUsage


class GpuMeter:
    """Measures the device `index`; without NVML it knows memory alone. From one thread at a time."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._opened: tuple[Any, Any] | None = None

    def read(self) -> DeviceUsage:
        """Measure. Never raises: what the driver does not tell is 0."""
        if self._opened is None:
            self._opened = _open(self._index)
        nvml, handle = self._opened
        if nvml is None:
            try:
                free, total = torch.cuda.mem_get_info(self._index)
            except RuntimeError:  # after a fault of the device nothing answers any more
                return DeviceUsage()
            return DeviceUsage(total - free)
        memory = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
        milliwatts = _ask(nvml, "nvmlDeviceGetPowerUsage", handle)
        return DeviceUsage(int(memory.used) if memory is not None else 0, (milliwatts or 0) / 1000)


def _open(index: int) -> tuple[Any, Any]:
    """Find the device by its UUID: CUDA and NVML count devices differently, and CUDA only those that it is shown."""
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
    except Exception:  # noqa: BLE001 - no package, an old one, no library, a device that NVML does not know
        return None, None


def _ask(nvml: Any, name: str, handle: Any) -> Any:
    try:
        return getattr(nvml, name)(handle)
    except Exception:  # noqa: BLE001 - NVMLError, or AttributeError of an old binding
        return None
