"""Safetensors folders: every header checked, then tensors as views of mapped files.

Knows: the file format, shards and their index. Refuses to know: what a tensor is for (a model's loader states what it
expects), and every format that can run code: `.bin` and `.pt` files are refused, not read.

Errors: `CheckpointError`, with file, tensor, what was expected and what was found. Nothing is allocated before all
headers have passed.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

MAX_HEADER_BYTES = 64 << 20
INDEX_NAME = "model.safetensors.index.json"
DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
FLOATS = ("BF16", "F32", "F16")


class CheckpointError(Exception):
    """A checkpoint cannot be loaded. `hint` says what the user can do."""

    def __init__(self, file: Path | str, tensor: str, expected: str, found: str, hint: str = "") -> None:
        subject = f"{file}: tensor {tensor!r}" if tensor else str(file)
        super().__init__(f"{subject}: expected {expected}, found {found}")
        self.file = str(file)
        self.tensor = tensor
        self.expected = expected
        self.found = found
        self.hint = hint


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: bytes [begin, end) of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """What a model wants of one tensor."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS


class TensorSource(Protocol):
    """Gives tensors by name: a checkpoint, or something that makes them up."""

    def get(self, name: str) -> Tensor: ...


class Checkpoint:
    """The tensors of one folder. Get them by name; each is a view of the mapped file, copied only when written to."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.folder = folder
        self.tensors = tensors
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read and check all headers of a folder. Raises: CheckpointError."""
        tensors: dict[str, TensorInfo] = {}
        index = _read_index(folder)
        for path in _safetensors_files(folder, index):
            for info in read_header(path):
                if info.name in tensors:
                    raise CheckpointError(
                        path, info.name, "one definition", f"another in {tensors[info.name].file.name}"
                    )
                tensors[info.name] = info
        for name, file in index.items():
            if name not in tensors:
                raise CheckpointError(folder / file, name, f"the tensor that {INDEX_NAME} promises", "nothing")
            if tensors[name].file.name != file:
                raise CheckpointError(
                    tensors[name].file, name, f"it in {file}, as {INDEX_NAME} says", "it in this file"
                )
        return cls(folder, tensors)

    def check(self, expected: Mapping[str, ExpectedTensor]) -> None:
        """Hold names, shapes and dtypes against what a model wants: nothing missing, extra or different."""
        for name, want in expected.items():
            info = self.tensors.get(name)
            if info is None:
                raise CheckpointError(
                    self.folder, name, f"{'/'.join(want.dtypes)} {list(want.shape)}", "no such tensor"
                )
            if info.shape != want.shape:
                raise CheckpointError(info.file, name, f"shape {list(want.shape)}", f"shape {list(info.shape)}")
            if info.dtype not in want.dtypes:
                raise CheckpointError(info.file, name, f"dtype {' or '.join(want.dtypes)}", f"dtype {info.dtype}")
        for name in self.tensors:
            if name not in expected:
                raise CheckpointError(self.tensors[name].file, name, "no such tensor in this architecture", "it")

    def get(self, name: str) -> Tensor:
        """Give a tensor as a view of the mapped file."""
        info = self.tensors[name]
        mapped = self._maps.get(info.file)
        if mapped is None:
            with info.file.open("rb") as file:
                # Private pages: a write would copy, never reach the file; and torch accepts them without complaint.
                mapped = self._maps[info.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        dtype = DTYPES[info.dtype]
        if info.end == info.begin:
            return torch.empty(info.shape, dtype=dtype)
        count = math.prod(info.shape)
        if info.begin % dtype.itemsize:
            raw = torch.frombuffer(mapped, dtype=torch.uint8, count=info.end - info.begin, offset=info.begin)
            return raw.clone().view(dtype).view(info.shape)
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=info.begin).view(info.shape)


def read_header(path: Path) -> Iterator[TensorInfo]:
    """Check one file's header against the format and the file's size; yield its tensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(path, "", "a safetensors header", f"a file of {size} bytes")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(path, "", f"a header of at most {size - 8} bytes", f"one of {length} bytes")
            header = json.loads(file.read(length), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except OSError as error:
        raise CheckpointError(path, "", "a readable file", str(error.strerror)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, "", "a safetensors header in JSON", str(error)) from error
    if not isinstance(header, dict):
        raise CheckpointError(path, "", "a safetensors header", type(header).__name__)
    infos = [_tensor_info(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"]
    at = 8 + length
    for info in sorted(infos, key=lambda info: (info.begin, info.end)):
        if info.begin != at:
            raise CheckpointError(path, info.name, f"data from byte {at}", f"data from byte {info.begin}")
        at = info.end
    if at != size:
        raise CheckpointError(path, "", f"a file of {at} bytes", f"{size} bytes", "is the download complete?")
    yield from infos


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in pairs:
        if key in keys:
            raise CheckpointError(path, key, "one definition", "two in this file")
        keys[key] = value
    return keys


def _tensor_info(path: Path, name: str, entry: object, data_at: int) -> TensorInfo:
    try:
        if not isinstance(entry, dict):
            raise TypeError(type(entry).__name__)
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, begin, end)):
            raise TypeError("negative or non-integer sizes")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(path, name, "dtype, shape and data_offsets", f"a malformed entry ({error})") from error
    if dtype not in DTYPES:
        raise CheckpointError(path, name, f"dtype {', '.join(DTYPES)}", f"dtype {dtype}")
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != wanted:
        raise CheckpointError(path, name, f"{wanted} bytes for {dtype} {list(shape)}", f"{end - begin} bytes")
    return TensorInfo(name, path, dtype, shape, data_at + begin, data_at + end)


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX_NAME
    if not path.is_file():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        index = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(path, "", "a weight_map from tensor to file", f"{error}") from error
    for name, file in index.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(path, name, "the name of a safetensors file in this folder", repr(file))
    return index


def _safetensors_files(folder: Path, index: Mapping[str, str]) -> list[Path]:
    if index:
        files = [folder / file for file in sorted(set(index.values()))]
        for file in files:
            if not file.is_file():
                raise CheckpointError(file, "", f"the shard that {INDEX_NAME} names", "no such file")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
        found = f"only {', '.join(pickles)}" if pickles else "none"
        hint = "pickle files can run code and are never read; convert them to safetensors" if pickles else ""
        raise CheckpointError(folder, "", "safetensors files", found, hint)
    return files
