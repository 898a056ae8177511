"""What every plan of an entry would refuse, whatever the hardware: values that this version cannot do, and sizes that
the model's own config forbids.

Knows: entries of a registry, the small files of models that are here. Refuses to know: hosts, memory, clusters. A model
that is not here is judged by whoever has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

from engine.config import BUNDLED_MODELS, ConfigError, ModelConfig, load_model_config
from launcher.errors import HlaunchError, Issue
from launcher.plan.known_models import KNOWN_CONFIGS
from launcher.plan.weights import find_model_files, is_repository
from launcher.registry.keys import KEYS
from launcher.registry.placement_rules import shape_findings
from launcher.registry.resolving import issues_of, resolve
from launcher.registry.suggest import did_you_mean
from launcher.registry.types import ModelEntry, Options, Registry

JUDGED = ("dtype", "kv-cache-dtype", "tokenizer", "tool-call-parser", "reasoning-parser")


def entry_issues(registry: Registry, environ: Mapping[str, str]) -> list[Issue]:
    """Judge every entry of a file; each value is blamed once, where it stands. Reads each `config.json` once."""
    found: dict[Issue, None] = {}
    read = cache(_config)
    blocks: list[tuple[str, Options]] = [("defaults", registry.defaults)]
    blocks += [(f"profiles.{name}", options) for name, options in registry.profiles.items()]
    for path, options in blocks:
        found |= dict.fromkeys(_values(registry, path, options))
    for entry in registry.models.values():
        own = [(f"models.{entry.name}", entry.options)]
        own += [(f"models.{entry.name}.profiles.{name}", options) for name, options in entry.profiles.items()]
        own += [(f"models.{entry.name}.overrides.{name}", options) for name, options in entry.overrides.items()]
        for path, options in own:
            found |= dict.fromkeys(_values(registry, path, options))
        if entry.model and entry.model not in KNOWN_CONFIGS:
            found |= dict.fromkeys(_model(registry, entry, environ, read))
    return list(found)


def _values(registry: Registry, path: str, options: Options) -> Iterator[Issue]:
    for key in JUDGED:
        setting = options.settings.get(key)
        refused = (
            KEYS[key].refusal_of(str(setting.value)) if setting is not None and setting.value is not None else None
        )
        if setting is not None and refused is not None:
            line, column = setting.mark
            hint = f"remove {key}, or write auto" if key.endswith("dtype") else f"remove {key}"
            yield Issue("error", "unsupported-value", registry.source, line, column, f"{path}.{key}", refused, hint)


def _config(folder: Path) -> ModelConfig | ConfigError:
    try:
        return load_model_config(folder)
    except ConfigError as error:
        return error


def _model(
    registry: Registry, entry: ModelEntry, environ: Mapping[str, str], read: Callable[[Path], ModelConfig | ConfigError]
) -> Iterator[Issue]:
    setting = entry.options.settings.get("model")
    line, column = setting.mark if setting is not None else entry.mark
    path = f"models.{entry.name}.model"
    revision = entry.options.settings.get("revision")
    wanted = None if revision is None or revision.value is None else str(revision.value)
    files = find_model_files(entry.model, wanted, environ, registry.path.parent)
    if files.folder is None:
        if setting is not None and not is_repository(entry.model):
            message = "no bundled model, and no folder here with a config.json"
            hint = did_you_mean(entry.model, BUNDLED_MODELS) or "write org/name, or a folder that has the files"
            yield Issue("warning", "model-absent", registry.source, line, column, path, message, hint)
        return
    shape = read(files.folder)
    if isinstance(shape, ConfigError):
        yield Issue("error", "model-config", registry.source, line, column, path, str(shape), shape.hint)
        return
    try:
        resolved = resolve(registry, entry.name, {})
    except HlaunchError:
        # Said already by the rules of the registry.
        return
    found = shape_findings(resolved.values, shape)
    yield from issues_of(registry, entry, found, resolved.values, resolved.env)
