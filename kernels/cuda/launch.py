"""Launches one compiled kernel on torch's current stream, with programmatic dependent launch; graph-capturable.

CuPy's own launch knows no launch attributes, so this goes through the driver API of cuda.bindings.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import torch
from torch import Tensor

from kernels.build import KernelBuildError

Argument = Tensor | int | float | ctypes.Structure


class Kernel:
    """One kernel of a loaded module: `kernel(grid, *arguments)`, tensors as pointers, int as int32, float as
    float32, a ctypes structure by value.

    `is_dependent` lets it start before its predecessor on the stream has finished; the kernel itself waits.
    """

    def __init__(
        self, module: Any, name: str, threads: int, *, shared_bytes: int = 0, is_dependent: bool = True
    ) -> None:
        self.name = name
        self._driver = importlib.import_module("cuda.bindings.driver")
        function = module.get_function(name)
        if shared_bytes > 48 * 1024:
            function.max_dynamic_shared_size_bytes = shared_bytes
        self._function = self._driver.CUfunction(function.kernel.ptr)
        self._module = module  # owns the code
        self._threads = threads
        self._shared_bytes = shared_bytes
        self._attributes = [self._dependent()] if is_dependent else []

    def __call__(self, grid: tuple[int, int, int], *arguments: Argument) -> None:
        """Launch. Raises: KernelBuildError when the driver refuses."""
        values = [_packed(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        config.hStream = self._driver.CUstream(torch.cuda.current_stream().cuda_stream)
        config.attrs = self._attributes
        config.numAttrs = len(self._attributes)
        (status,) = self._driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise KernelBuildError(f"{self.name}: launch of {grid} x {self._threads} failed: {status.name}")

    def _dependent(self) -> Any:
        attribute = self._driver.CUlaunchAttribute()
        attribute.id = self._driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        value = self._driver.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
        attribute.value = value
        return attribute


def read_int(module: Any, name: str) -> int:
    """Read a module's `extern "C" __device__ int`."""
    cupy = importlib.import_module("cupy")
    return int(cupy.ndarray((1,), dtype=cupy.int32, memptr=module.get_global(name))[0])


def _packed(argument: Argument) -> Any:
    if isinstance(argument, ctypes.Structure):
        return argument
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_float(argument)
