"""Which device an entry runs on, and why not a GPU where there is one.

Knows: what the engine needs of a GPU, its driver and its packages. Refuses to know: memory arithmetic, CUDA itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from engine.config import ModelConfig
from launcher.errors import DoesNotFit, HlaunchError, PreflightError
from launcher.plan.inventory import Gpu, GpuProcess, Inventory
from launcher.sizes import GIB

SUPPORTED_CAPABILITIES = ((9, 0), (10, 0))
"""Compute capabilities that the engine's kernels serve: from the first, below the second."""

OLDEST_DRIVERS: Mapping[int, tuple[int, ...]] = {11: (450, 80), 12: (525, 60), 13: (580,)}
"""Oldest driver for each major CUDA version that torch may be built for, on Linux."""

GPU_PACKAGES: Mapping[str, str] = {"torch": "torch", "triton": "triton", "cupy": "cupy-cuda13x"}
"""Modules that a GPU rank imports, and the packages that bring them."""

_CPU = "add --set device=cpu"


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """`device` as the engine takes it. `problems` when a GPU was demanded and cannot serve; `notes` when auto has none.

    `gpu` is the one that was chosen, by its place in the inventory.
    """

    device: str
    gpu: Gpu | None = None
    problems: tuple[HlaunchError, ...] = ()
    notes: tuple[str, ...] = ()


def choose_device(
    asked: str, inventory: Inventory, environ: Mapping[str, str], model: ModelConfig | None = None
) -> DeviceChoice:
    """Choose the device of a single rank: `cuda:N` of the first GPU that can serve, else `cpu`.

    `asked` is auto, cpu or cuda. N counts the GPUs that CUDA_VISIBLE_DEVICES leaves.
    """
    if asked == "cpu":
        return DeviceChoice("cpu")
    gpus = visible_gpus(inventory.gpus, environ)
    if not gpus:
        if asked != "cuda":
            return DeviceChoice("cpu")
        hidden = f" (CUDA_VISIBLE_DEVICES={environ['CUDA_VISIBLE_DEVICES']} hides all)" if inventory.gpus else ""
        message = f"device cuda: no NVIDIA GPU is seen on {inventory.node}{hidden}"
        return DeviceChoice("cpu", problems=(DoesNotFit(message, hint=f"{_CPU}, or leave it at auto"),))
    problems = [gpu_problem(gpu, inventory) or model_problem(model) for gpu in gpus]
    for place, (gpu, problem) in enumerate(zip(gpus, problems, strict=True)):
        if problem is None:
            return DeviceChoice(f"cuda:{place}", gpu)
    first = next(problem for problem in problems if problem is not None)
    if asked == "cuda":
        return DeviceChoice("cuda:0", gpus[0], problems=(first,))
    return DeviceChoice("cpu", notes=(f"device auto runs on CPU: {first.message} ({first.hint})",))


def visible_gpus(gpus: Sequence[Gpu], environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Apply CUDA_VISIBLE_DEVICES as CUDA does: indices or UUIDs in order, up to the first that is none."""
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return tuple(gpus)
    chosen: list[Gpu] = []
    for word in (part.strip() for part in wanted.split(",")):
        found = [
            gpu
            for gpu in gpus
            if (word.isdecimal() and len(word) <= 5 and gpu.index == int(word))
            or (word.startswith("GPU-") and gpu.uuid.startswith(word))
        ]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen.append(found[0])
    return tuple(chosen)


def usable_gpus(inventory: Inventory, environ: Mapping[str, str]) -> dict[int, Gpu]:
    """List the GPUs that can serve, by the number that CUDA_VISIBLE_DEVICES leaves them."""
    seen = enumerate(visible_gpus(inventory.gpus, environ))
    return {number: gpu for number, gpu in seen if gpu_problem(gpu, inventory) is None}


def gpu_problem(gpu: Gpu, inventory: Inventory) -> HlaunchError | None:
    """Say why a GPU cannot serve on this host; None when it can."""
    low, high = SUPPORTED_CAPABILITIES
    if gpu.capability is None:
        finding = inventory.findings[0] if inventory.findings else None
        message = finding.message if finding else f"GPU {gpu.index} ({gpu.name}): the driver tells no capability"
        return PreflightError(message, hint=finding.fix if finding else "update the NVIDIA driver")
    if not low <= gpu.capability < high:
        return DoesNotFit(
            f"GPU {gpu.index} ({gpu.name}) has compute capability {gpu.capability_text}, "
            f"the engine's kernels serve {low[0]}.{low[1]} to below {high[0]}.{high[1]}",
            hint=_CPU,
        )
    if (problem := driver_problem(inventory)) is not None or not inventory.is_this_host:
        return problem
    return gpu_packages_missing(inventory.torch_cuda)


def model_problem(model: ModelConfig | None) -> HlaunchError | None:
    """Say why a model cannot run on a GPU; None when it can."""
    if model is None or model.quantization == "mxfp4":
        return None
    return DoesNotFit("a GPU rank serves MXFP4 experts only, and this model's are not quantized", hint=_CPU)


def driver_problem(inventory: Inventory) -> HlaunchError | None:
    """Compare the driver with what the installed torch was built for."""
    if not inventory.torch_cuda or not inventory.driver_version:
        return None
    major = int(inventory.torch_cuda.partition(".")[0])
    oldest = OLDEST_DRIVERS.get(major)
    driver = tuple(int(part) for part in re.findall(r"\d+", inventory.driver_version))
    if oldest is None or driver >= oldest:
        return None
    needed = ".".join(map(str, oldest))
    older = [cuda for cuda, minimum in OLDEST_DRIVERS.items() if cuda < major and driver >= minimum]
    other = f", or install torch for CUDA {older[-1]}" if older else ""
    return PreflightError(
        f"the NVIDIA driver {inventory.driver_version} is too old for torch's CUDA {inventory.torch_cuda}: "
        f"it needs {needed} or newer",
        hint=f"update the driver{other}, or {_CPU}",
    )


def gpu_packages_missing(torch_cuda: str | None, packages: Mapping[str, str] = GPU_PACKAGES) -> PreflightError | None:
    """Say which packages a GPU rank lacks; None when all are there. Nothing is imported."""
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    if missing:
        return PreflightError(
            f"a GPU needs packages that are not installed: {', '.join(missing)}",
            hint=f"run: pip install {' '.join(missing)}, or {_CPU}",
        )
    if torch_cuda == "":
        return PreflightError("the installed torch was built without CUDA", hint=f"install torch for CUDA, or {_CPU}")
    return None


def holders(processes: Sequence[GpuProcess]) -> str:
    """Name the processes that hold a GPU's memory, largest first."""
    shown = [
        f"{process.name or 'a process'} (pid {process.pid}"
        + (f", {process.memory_bytes / GIB:.1f} GiB)" if process.memory_bytes else ")")
        for process in processes[:3]
    ]
    more = f" and {len(processes) - 3} more" if len(processes) > 3 else ""
    return ", ".join(shown) + more if shown else "processes that the driver does not name"


def memory_note(gpu: Gpu, share_bytes: int) -> str | None:
    """Say that others hold memory which the entry's share counts on; None when enough is free."""
    if not gpu.free_bytes or gpu.free_bytes >= share_bytes:
        return None
    held = (gpu.memory_bytes - gpu.free_bytes) / GIB
    return (
        f"GPU {gpu.index}: {held:.1f} of {gpu.memory_bytes / GIB:.1f} GiB are held by {holders(gpu.processes)}; "
        f"{gpu.free_bytes / GIB:.1f} GiB are left"
    )
