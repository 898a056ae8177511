"""A name for a model's content, so that nodes can tell whether they hold the same one.

Knows: which files make a checkpoint. Refuses to know: what is in them. The digest covers `config.json`, every tensor's
name, type, shape and place, and samples of the weights; not every byte, which would take as long as loading them.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from pathlib import Path

from engine.config import resolve_model_folder

_SAMPLE_BYTES = 64 << 10
_NUM_SAMPLES = 8
_MAX_HEADER_BYTES = 64 << 20


def digest_of(model: str, load_format: str = "auto") -> str:
    """Take the SHA-256 of a model as hex; empty when it is not on this node. Dummy weights have only a shape."""
    folder = resolve_model_folder(model)
    if folder is None:
        return ""
    digest = hashlib.sha256()
    with contextlib.suppress(OSError):
        digest.update((folder / "config.json").read_bytes())
        if load_format != "dummy":
            for path in sorted(folder.glob("*.safetensors")):
                digest.update(path.name.encode() + b"\0")
                _add_file(digest, path)
        return digest.hexdigest()
    return ""


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    digest.update(struct.pack("<Q", size))
    with path.open("rb") as file:
        prefix = file.read(8)
        header = min(int.from_bytes(prefix, "little"), _MAX_HEADER_BYTES, size)
        digest.update(prefix + file.read(header))
        start = 8 + header
        for number in range(_NUM_SAMPLES):
            file.seek(start + (size - start) * number // _NUM_SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(start, size - _SAMPLE_BYTES))
        digest.update(file.read(_SAMPLE_BYTES))
