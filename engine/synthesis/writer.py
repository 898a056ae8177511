"""A synthetic checkpoint on disk: Hugging Face layout, streamed by several threads, resumable, finished at once.

Knows: how the folder looks while it grows and when it is done. Refuses to know: command lines, progress bars, torch.

    unfinished-synthetic.json    what is being written; the folder is ours as long as this file lies there
    .model-00001-of-00005.part   a shard under way; takes its final name when its last byte is written
    model-00001-of-00005.safetensors, model.safetensors.index.json, generation_config.json, tokenizer files
    synthetic.json, config.json  written last, in this order: without config.json the folder is no checkpoint to anyone

Memory: one piece of `PIECE_BYTES` per thread. An interrupted job keeps its whole shards when it is run again.

    SynthesisError
    ├── FolderTaken     the folder holds something else
    └── NoSpace         the disk is too small; nothing was written, or what was can be resumed
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.models.synthetic import SyntheticRule, synthetic_rule
from engine.synthesis.values import FORMAT, PIECE_BYTES, fill, tensor_key

MARKER = "synthetic.json"
UNFINISHED = "unfinished-synthetic.json"
SHARD_BYTES = 4_000_000_000
# A task writes this much before the next thread's turn.
TASK_BYTES = 4 * PIECE_BYTES
_ITEM_BYTES = {"BF16": 2, "U8": 1}


class SynthesisError(Exception):
    """A checkpoint cannot be written. `hint` says what the user can do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class FolderTaken(SynthesisError):
    """The target folder holds something that is not this checkpoint."""


class NoSpace(SynthesisError):
    """The disk does not hold the checkpoint."""


@dataclass(frozen=True, slots=True)
class SyntheticTensor:
    """One tensor to write. `dtype` is safetensors' name: BF16 or U8."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    @property
    def rule(self) -> SyntheticRule:
        return synthetic_rule(self.name, self.shape)


@dataclass(frozen=True, slots=True)
class Job:
    """A checkpoint to write: its configuration, tensors in file order, and what else belongs into the folder.

    `files` are small files by name, such as the tokenizer's.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Sequence[SyntheticTensor]
    seed: int
    model: str = ""
    shard_bytes: int = SHARD_BYTES
    files: Mapping[str, bytes] | None = None

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def fingerprint(self) -> str:
        """Name the content: equal fingerprints mean equal weights, on any machine."""
        text = json.dumps([FORMAT, self.seed, self.shard_bytes, self.config], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass(frozen=True, slots=True)
class Outcome:
    """`written_bytes` is 0 when the folder held this very checkpoint already; `resumed_bytes` were found in place."""

    written_bytes: int
    resumed_bytes: int
    num_shards: int


def write_synthetic(job: Job, threads: int, progress: Callable[[int, int], None] = lambda *_: None) -> Outcome:
    """Write the checkpoint, or finish one that was interrupted. `progress` gets (bytes done, bytes in all).

    Raises: FolderTaken, NoSpace, SynthesisError; OSError as the file system gives it.
    """
    shards = _shards(job.tensors, job.shard_bytes)
    if _claim(job):
        return Outcome(0, job.weight_bytes, len(shards))
    paths = [job.folder / f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    resumed = 0
    todo = []
    for path, tensors in zip(paths, shards, strict=True):
        header = _header(tensors)
        size = len(header) + sum(tensor.num_bytes for tensor in tensors)
        if path.is_file() and path.stat().st_size == size:
            resumed += size - len(header)
        else:
            todo.append(_Shard(path, tensors, header, size))
    _check_space(job.folder, sum(shard.size - shard.present_bytes for shard in todo))
    _write_shards(todo, job.seed, threads, lambda done: progress(resumed + done, job.weight_bytes))
    _write_small_files(job, paths, shards)
    return Outcome(job.weight_bytes - resumed, resumed, len(shards))


def _claim(job: Job) -> bool:
    """Make the folder ours; True when it holds the finished checkpoint. Raises: FolderTaken."""
    folder = job.folder
    description = {"format": FORMAT, "seed": job.seed, "model": job.model, "fingerprint": job.fingerprint}
    if folder.exists() and not folder.is_dir():
        raise FolderTaken(f"{folder} is a file", "name a folder that does not exist yet")
    folder.mkdir(parents=True, exist_ok=True)
    names = {entry.name for entry in folder.iterdir()}
    for marker in (MARKER, UNFINISHED):
        found = _read_marker(folder / marker) if marker in names else None
        if found is None:
            continue
        if found.get("fingerprint") != job.fingerprint:
            what = "an unfinished synthetic checkpoint" if marker == UNFINISHED else "a synthetic checkpoint"
            raise FolderTaken(
                f"{folder} holds {what} of {found.get('model') or 'another model'}, seed {found.get('seed')}",
                "name another folder, or remove this one",
            )
        if marker == MARKER and "config.json" in names:
            return True
        break
    else:
        if names:
            raise FolderTaken(
                f"{folder} is not empty: it holds {sorted(names)[0]} and {len(names) - 1} more"
                if len(names) > 1
                else f"{folder} is not empty: it holds {sorted(names)[0]}",
                "name a folder that does not exist yet, or an empty one",
            )
    (folder / UNFINISHED).write_text(json.dumps(description, indent=2) + "\n")
    return False


def _read_marker(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _shards(tensors: Sequence[SyntheticTensor], shard_bytes: int) -> list[list[SyntheticTensor]]:
    """Cut the tensors, in order, into shards of at most `shard_bytes`; a larger tensor is a shard of its own."""
    shards: list[list[SyntheticTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _header(tensors: Sequence[SyntheticTensor]) -> bytes:
    """Give the first bytes of a safetensors file: length, then JSON padded with spaces to a multiple of 64."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.num_bytes],
        }
        at += tensor.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return struct.pack("<Q", len(text)) + text


@dataclass(slots=True)
class _Shard:
    """A file under way."""

    path: Path
    tensors: Sequence[SyntheticTensor]
    header: bytes
    size: int

    @property
    def part(self) -> Path:
        return self.path.with_name(f".{self.path.stem}.part")

    @property
    def present_bytes(self) -> int:
        """Bytes of the disk that an earlier attempt holds already."""
        try:
            return min(self.size, self.part.stat().st_blocks * 512)
        except OSError:
            return 0

    def tasks(self) -> Iterator[tuple[SyntheticTensor, int, int, int]]:
        """List (tensor, offset in it, length, place in the file)."""
        at = len(self.header)
        for tensor in self.tensors:
            for offset in range(0, tensor.num_bytes, TASK_BYTES):
                yield tensor, offset, min(TASK_BYTES, tensor.num_bytes - offset), at + offset
            at += tensor.num_bytes


def _write_shards(shards: Sequence[_Shard], seed: int, threads: int, progress: Callable[[int], None]) -> None:
    done = 0
    lock = threading.Lock()
    stop = threading.Event()
    buffers = threading.local()

    def run(file: int, tensor: SyntheticTensor, offset: int, length: int, place: int) -> None:
        nonlocal done
        if not hasattr(buffers, "piece"):
            buffers.piece = np.empty(PIECE_BYTES, dtype=np.uint8)
        rule, key = tensor.rule, tensor_key(seed, tensor.name)
        for begin in range(0, length, PIECE_BYTES):
            if stop.is_set():
                return
            piece = buffers.piece[: min(PIECE_BYTES, length - begin)]
            fill(piece, offset + begin, rule, key)
            _write_all(file, piece, place + begin)
            with lock:
                done += len(piece)
                progress(done)

    with ThreadPoolExecutor(threads, thread_name_prefix="synthesis") as pool:
        for shard in shards:
            file = os.open(shard.part, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _reserve(file, shard)
                _write_all(file, np.frombuffer(shard.header, dtype=np.uint8), 0)
                futures = [pool.submit(run, file, *task) for task in shard.tasks()]
                try:
                    finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
                    for future in finished:
                        future.result()
                finally:
                    # An error or Ctrl-C: let no thread outlive the file it writes to.
                    stop.set()
                    for future in futures:
                        future.cancel()
                    wait(futures)
                stop.clear()
            finally:
                os.close(file)
            shard.part.replace(shard.path)


def _reserve(file: int, shard: _Shard) -> None:
    """Take the disk space now: better than after ten gigabytes. Raises: NoSpace."""
    os.ftruncate(file, shard.size)
    try:
        os.posix_fallocate(file, 0, shard.size)
    except OSError as error:
        raise NoSpace(
            f"no room for {shard.size / 1e9:.1f} GB in {shard.path.parent}: {error.strerror}",
            "free some space, then run the same command again: whole shards are kept",
        ) from error


def _write_all(file: int, data: np.ndarray[Any, np.dtype[np.uint8]], place: int) -> None:
    view = data.data
    while view:
        written = os.pwrite(file, view, place)
        view, place = view[written:], place + written


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoSpace(
            f"{folder} has {free / 1e9:.1f} GB free, the checkpoint needs {needed / 1e9:.1f} GB more",
            "name a folder on a larger disk, or keep fewer layers: --layers",
        )


def _write_small_files(job: Job, paths: Sequence[Path], shards: Sequence[Sequence[SyntheticTensor]]) -> None:
    folder = job.folder
    weight_map = {tensor.name: path.name for path, part in zip(paths, shards, strict=True) for tensor in part}
    index = {"metadata": {"total_size": job.weight_bytes}, "weight_map": weight_map}
    marker = {
        "synthetic": True,
        "format": FORMAT,
        "model": job.model,
        "seed": job.seed,
        "fingerprint": job.fingerprint,
        "weight_bytes": job.weight_bytes,
        "note": "random weights of the true shape: for speed, never for quality",
    }
    _replace(folder / "model.safetensors.index.json", _json(index))
    for name, content in (job.files or {}).items():
        _replace(folder / name, content)
    _replace(folder / MARKER, _json(marker))
    _replace(folder / "config.json", _json(job.config))
    (folder / UNFINISHED).unlink(missing_ok=True)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)
