"""Where a model's files are on this machine, where else they could be, and what is missing of them.

Knows: bundled names, folders, the Hugging Face cache layout. Refuses to know: the network; nothing is ever downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.config import BUNDLED_MODELS, MODEL_TYPES, resolve_model_folder
from launcher.errors import PreflightError

_MAX_INDEX_BYTES = 64 << 20
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_LFS_POINTER = b"version "


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What was found: `folder` is None when nothing is on disk, `looked_in` lists the places in order."""

    model: str
    revision: str | None
    folder: Path | None
    looked_in: tuple[str, ...]

    def missing(self, *, needs_weights: bool) -> PreflightError | None:
        """Return why the files cannot be served, with the line that gets them; None when they are complete."""
        if self.folder is None:
            return self.absent()
        if not needs_weights:
            return None
        absent = missing_shards(self.folder)
        if absent:
            shown = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
            return self._error(f"{self.folder} is incomplete: no {shown}", ())
        for file in weight_files(self.folder):
            if damage := damage_of(file):
                return self._error(f"{file} {damage}", (), again=f"remove {file.name}, then ")
        return None

    def absent(self) -> PreflightError:
        """Make the error of a model of which nothing is here: which one, where was looked, how to get it."""
        return self._error(f"the files of {self.model} are not on this machine{self._doubt()}", self.looked_in)

    def _doubt(self) -> str:
        """Say what is served before anybody downloads gigabytes of something else."""
        from launcher.plan.known_models import known_model

        if not is_repository(self.model) or known_model(self.model) is not None:
            return ""
        return f"; only models of type {', '.join(MODEL_TYPES)} are served, as its config.json names it"

    def _error(self, message: str, looked_in: tuple[str, ...], again: str = "") -> PreflightError:
        details = [f"looked in {place}" for place in looked_in]
        if is_repository(self.model):
            revision = f" --revision {self.revision}" if self.revision else ""
            download = f"huggingface-cli download {self.model}{revision}"
            hint = f"{again}run: {download}   (or point HLAUNCH_MODEL_DIR at the cache)"
        elif self.model in BUNDLED_MODELS:
            hint = "the bundled model is part of the package: install hlaunch again"
        elif self.folder is not None:
            hint = f"{again}put all files of the checkpoint into this folder"
        else:
            hint = "write a folder with config.json, or a Hugging Face id such as openai/gpt-oss-20b"
        return PreflightError(message, details=details, hint=hint)


def is_repository(model: str) -> bool:
    """Whether a name reads as a Hugging Face id, `org/name`, rather than as a path."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def cache_folders(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """List the model caches to search, in order: HLAUNCH_MODEL_DIR and its `hub`, then Hugging Face's own rules."""
    folders: list[Path] = []
    if model_dir := environ.get("HLAUNCH_MODEL_DIR"):
        folders += [Path(model_dir), Path(model_dir) / "hub"]
    if hub := environ.get("HF_HUB_CACHE"):
        folders.append(Path(hub))
    elif home := environ.get("HF_HOME"):
        folders.append(Path(home) / "hub")
    elif cache := environ.get("XDG_CACHE_HOME"):
        folders.append(Path(cache) / "huggingface" / "hub")
    elif user_home := environ.get("HOME"):
        folders.append(Path(user_home) / ".cache" / "huggingface" / "hub")
    return tuple(folders)


def find_model_files(model: str, revision: str | None, environ: Mapping[str, str], base: Path) -> ModelFiles:
    """Find the folder of `model`; a relative folder counts from `base`.

    Reads a few small files; never raises for what is absent.
    """
    if model in BUNDLED_MODELS:
        folder = BUNDLED_MODELS[model]
        found = folder if (folder / "config.json").is_file() else None
        return ModelFiles(model, revision, found, (str(folder),))
    local = base / _expand_home(model, environ)
    if (local / "config.json").is_file():
        return ModelFiles(model, revision, local.resolve(), (str(local),))
    looked_in = [str(local)]
    for cache in cache_folders(environ) if is_repository(model) else ():
        looked_in.append(str(cache))
        folder_in_cache = _in_cache(cache, model, revision)
        if folder_in_cache is not None:
            return ModelFiles(model, revision, folder_in_cache.absolute(), tuple(looked_in))
    return ModelFiles(model, revision, None, tuple(looked_in))


def _expand_home(model: str, environ: Mapping[str, str]) -> Path:
    if model.startswith("~/") and environ.get("HOME"):
        return Path(environ["HOME"]) / model[2:]
    return Path(model)


def _in_cache(cache: Path, model: str, revision: str | None) -> Path | None:
    if revision is None or revision == "main":
        return resolve_model_folder(model, str(cache))
    repository = cache / ("models--" + model.replace("/", "--"))
    reference = repository / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    snapshot = repository / "snapshots" / commit
    return snapshot if (snapshot / "config.json").is_file() else None


def missing_shards(folder: Path) -> list[str]:
    """List the weight files that a folder should have and lacks.

    Without an index, any one `*.safetensors` counts as complete; a malformed index is the engine's to report.
    """
    names = _indexed(folder)
    if names is None:
        return [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]
    return sorted(name for name in names if not (folder / name).is_file())


def weight_files(folder: Path) -> list[Path]:
    """List the weight files that are there and belong to the model, in name order."""
    names = _indexed(folder)
    found = folder.glob("*.safetensors") if names is None else (folder / name for name in names)
    return sorted(path for path in found if path.is_file())


def damage_of(file: Path) -> str:
    """Say how a safetensors file is not whole: its header tells its size. Empty for a whole one.

    Reads the header only. What else may be wrong with it is the engine's to report.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            first = opened.read(8)
            if first == _LFS_POINTER:
                return "is a pointer of Git LFS, not the weights: git lfs pull"
            length = int.from_bytes(first, "little")
            if len(first) < 8 or 8 + length > size:
                return f"is cut short: {size} bytes, and its header alone has more"
            if length > _MAX_HEADER_BYTES:
                return ""
            header = json.loads(opened.read(length))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        whole = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return ""
    return f"is cut short: {size} of {whole} bytes" if size < whole else ""


def _indexed(folder: Path) -> set[str] | None:
    """Read which files the index names. None: there is no index; a malformed one names nothing."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            return set()
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()
