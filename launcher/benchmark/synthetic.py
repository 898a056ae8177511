"""Synthetic checkpoints as the launcher sees them: whose shape, how large, and the child that writes them.

Knows: where a model's configuration is found, the protocol of `python -m engine.synthesis`, the marker that such a
folder carries. Refuses to know: how weights are drawn.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import ConfigError, parse_model_config
from engine.memory import model_bytes
from launcher.benchmark.child import run_child
from launcher.commands import Invocation
from launcher.errors import EngineFailed, HlaunchError, PreflightError, UnknownModel
from launcher.plan.known_models import KNOWN_CONFIGS
from launcher.plan.weights import find_model_files

MARKER = "synthetic.json"
# Tokenizer, index and configuration; and what a file system keeps for itself.
SMALL_FILES_BYTES = 64 << 20
# Keys that other engines read and ours does not, as gpt-oss's own files have them.
_COMMON_KEYS: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.9,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What to write: a configuration, how many bytes its weights take, and the folder with the model's tokenizer."""

    name: str
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    tokenizer_folder: Path | None
    weight_bytes: int
    num_layers: int


def shape_of(invocation: Invocation, name: str, layers: int | None = None) -> Shape:
    """Find the configuration of a registry model, a Hugging Face id or a folder; `layers` keeps only the first ones.

    Raises: UnknownModel; PreflightError when the model is known but its configuration is nowhere.
    """
    model, revision, base = _model_of(invocation, name)
    files = find_model_files(model, revision, invocation.environ, base)
    generation: dict[str, Any] | None = None
    if files.folder is not None:
        config = _read_json(files.folder / "config.json")
        generation_file = files.folder / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.is_file() else None
    elif model in KNOWN_CONFIGS:
        config = _COMMON_KEYS | KNOWN_CONFIGS[model]
        # The stop set is wider than config.json's single id: return, endoftext and call.
        generation = {"bos_token_id": 199998, "eos_token_id": [200002, 199999, 200012], "pad_token_id": 199999}
    else:
        raise PreflightError(
            f"the configuration of {model} is not on this machine",
            details=[f"looked in {place}" for place in files.looked_in],
            hint=f"known without files: {', '.join(KNOWN_CONFIGS)}; or name a folder with its config.json",
        )
    if layers is not None:
        config = _keep_layers(config, layers, name)
    try:
        parsed = parse_model_config(config, f"{model}: config.json")
    except ConfigError as error:
        raise PreflightError(str(error), hint=error.hint) from error
    return Shape(name, config, generation, files.folder, model_bytes(parsed), parsed.num_layers)


def synthesize(
    shape: Shape,
    folder: Path,
    seed: int,
    threads: int,
    environ: Mapping[str, str],
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write the checkpoint in a child process and return its facts.

    Raises: PreflightError when the disk is too small or the folder holds something else, EngineFailed otherwise.
    """
    _check_space(folder, shape.weight_bytes)
    request = {
        "folder": str(folder),
        "config": shape.config,
        "generation_config": shape.generation_config,
        "seed": seed,
        "model": shape.name,
        "threads": threads,
        "tokenizer_folder": None if shape.tokenizer_folder is None else str(shape.tokenizer_folder),
    }
    facts: dict[str, Any] | None = None
    for event in run_child("engine.synthesis", request, environ):
        if event["event"] == "progress":
            progress(int(event["done"]), int(event["total"]))
        elif event["event"] == "error":
            kind: type[HlaunchError] = EngineFailed if event["kind"] == "OSError" else PreflightError
            raise kind(event["message"], hint=event["hint"])
        elif event["event"] == "done":
            facts = {key: value for key, value in event.items() if key != "event"}
    if facts is None:
        raise EngineFailed("the writer of the checkpoint ended without a word")
    return facts


def is_synthetic(folder: Path) -> bool:
    """Whether a checkpoint folder says that its weights are random."""
    return (folder / MARKER).is_file()


def _model_of(invocation: Invocation, name: str) -> tuple[str, str | None, Path]:
    """Give (model, revision, the folder that a relative path counts from)."""
    if (invocation.cwd / name / "config.json").is_file():
        return name, None, invocation.cwd
    try:
        entry = invocation.resolve(name)
    except UnknownModel:
        if name in KNOWN_CONFIGS:
            return name, None, invocation.cwd
        raise
    revision = entry.values["revision"].value
    return str(entry.values["model"].value), None if revision is None else str(revision), entry.registry.parent


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PreflightError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise PreflightError(f"{path}: expected an object")
    return data


def _keep_layers(config: Mapping[str, Any], layers: int, name: str) -> dict[str, Any]:
    total = int(config.get("num_hidden_layers", 0))
    if layers > total:
        raise PreflightError(f"{name} has {total} layers, not {layers}", hint=f"--layers takes 1 to {total}")
    kept = {**config, "num_hidden_layers": layers}
    if isinstance(config.get("layer_types"), list):
        kept["layer_types"] = config["layer_types"][:layers]
    return kept


def _check_space(folder: Path, weight_bytes: int) -> None:
    """Hold the free space against what is still to be written; shards of an earlier attempt count as written."""
    place = folder
    while not place.exists():
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
        present = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
    except OSError as error:
        raise PreflightError(f"{place}: cannot be read: {error.strerror}") from error
    needed = weight_bytes - present + SMALL_FILES_BYTES
    if needed > free:
        raise PreflightError(
            f"{place} has {free / 1e9:.1f} GB free, the checkpoint needs {needed / 1e9:.1f} GB",
            hint="name a folder on a larger disk, or keep fewer layers: --layers",
        )
