"""Compiles our CUDA C++ with NVRTC and keeps the cubins on disk; loads them as CuPy modules.

Knows: where the sources lie, the compiler, the cache. Refuses to know: what any kernel computes.
CuPy and cuda.bindings are imported on first use, so that machines without a GPU never need them.

A cubin's name is the digest of sources, options, architecture and compiler version; files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kernels.contract import KernelError

SOURCES = Path(__file__).resolve().parent / "cuda"


class KernelBuildError(KernelError):
    """A CUDA kernel cannot be built or loaded here; the message says what is missing or the compiler's first line."""


def cache_folder() -> Path:
    """Give the folder of compiled kernels: $HLAUNCH_KERNEL_CACHE, else hlaunch/kernels in the user's cache."""
    named = os.environ.get("HLAUNCH_KERNEL_CACHE")
    if named:
        return Path(named)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "hlaunch" / "kernels"


def compile_cubin(source: str, defines: Mapping[str, int], arch: str) -> Path:
    """Compile kernels/cuda/`source` for `arch` ("sm_90") and give the cubin's path; a cached one costs a file look-up.

    Raises: KernelBuildError without NVRTC, or on a compile error.
    """
    nvrtc = _optional("cuda.bindings.nvrtc", "cuda-bindings")
    text = (SOURCES / source).read_bytes()
    headers = {path.name: path.read_bytes() for path in sorted(SOURCES.glob("*.cuh"))}
    options = [f"--gpu-architecture={arch}", "-std=c++17", *(f"-D{name}={value}" for name, value in defines.items())]
    try:
        version = _checked(nvrtc, nvrtc.nvrtcVersion())
    except RuntimeError as error:
        raise KernelBuildError(f"CUDA kernels need NVRTC (package nvidia-cuda-nvrtc): {error}") from error
    digest = hashlib.sha256()
    for part in (source.encode(), text, *headers.values(), *map(str.encode, options), repr(version).encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    target = cache_folder() / f"{source.removesuffix('.cu')}-{arch}-{digest.hexdigest()[:24]}.cubin"
    if not target.is_file():
        _write_whole(target, _compile(nvrtc, source, text, headers, options))
    return target


def build_all(jobs: Sequence[tuple[str, Mapping[str, int]]], arch: str, workers: int | None = None) -> float:
    """Compile many (source, defines) into the cache, on `workers` threads; returns the seconds it took.

    NVRTC compiles outside Python's lock, so threads run at once; by default one for each CPU core of this process.
    Raises: KernelBuildError, the first of any.
    """
    begin = time.monotonic()
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(max(1, min(workers, len(jobs) or 1))) as pool:
        for done in [pool.submit(compile_cubin, source, defines, arch) for source, defines in jobs]:
            done.result()
    return time.monotonic() - begin


def load(source: str, defines: Mapping[str, int]) -> Any:
    """Compile for the current device and load: a `cupy.RawModule`. Raises: KernelBuildError."""
    import torch

    cupy = _optional("cupy", "cupy-cuda13x")
    path = compile_cubin(source, defines, device_arch(torch.device("cuda", torch.cuda.current_device())))
    try:
        module = cupy.RawModule(path=str(path))
        module.compile()
    except cupy.cuda.driver.CUDADriverError as error:
        # Perhaps a file that a crash cut short: the next start compiles it anew.
        path.unlink(missing_ok=True)
        raise KernelBuildError(
            f"{source}: the driver refuses the compiled kernel; start again, or it is too old: {error}"
        ) from error
    return module


def device_arch(device: Any = "cuda") -> str:
    """Name a CUDA device's architecture, "sm_90". Raises: KernelBuildError without a device, or below sm_80."""
    import torch

    if not torch.cuda.is_available():
        raise KernelBuildError("no CUDA device")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise KernelBuildError(
            f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}; these kernels need sm_80 or later"
        )
    return f"sm_{major}{minor}"


def _compile(nvrtc: Any, source: str, text: bytes, headers: Mapping[str, bytes], options: list[str]) -> bytes:
    names = [name.encode() for name in headers]
    program = _checked(
        nvrtc, nvrtc.nvrtcCreateProgram(text, source.encode(), len(names), list(headers.values()), names)
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            lines = bytes(log).rstrip(b"\0").decode(errors="replace").splitlines()
            first = next((line for line in lines if "error" in line), lines[0] if lines else str(status))
            raise KernelBuildError(f"{source}: {first.strip()}")
        cubin = bytearray(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelBuildError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return values[0] if len(values) == 1 else tuple(values)


def _write_whole(target: Path, content: bytes) -> None:
    name = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(target)
    except OSError as error:
        if name:
            Path(name).unlink(missing_ok=True)
        raise KernelBuildError(
            f"compiled kernels cannot be kept in {target.parent}: {error.strerror}; "
            "name a folder that can be written in HLAUNCH_KERNEL_CACHE"
        ) from error


def _optional(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise KernelBuildError(f"CUDA kernels need {name} (package {package}): {error}") from error
