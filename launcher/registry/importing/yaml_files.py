"""YAML of others -> a registry: vLLM's `--config` file, and the seed family's registry with its `.env`.

Knows: the shape of both files. Refuses to know: what options mean. Read by the guarded parser, as our own files are.
"""

from __future__ import annotations

import json
from typing import Any

from launcher.errors import RegistryInvalid
from launcher.registry.document import DocumentError, Mapping, Node, Scalar, Sequence, read_tree
from launcher.registry.importing.changes import Change, Entry, Imported, ImportRefused, Judge, entry_name, finish
from launcher.registry.importing.options import apply_option
from launcher.registry.importing.variables import apply_variables, without_comment

_CONFIG_HINT = "a vLLM configuration is a mapping of options: model: org/name"
_REGISTRY_HINT = "a model registry has models: {NAME: {model: org/name}}"


def from_config_file(text: str, source: str, name: str | None = None, judge: Judge | None = None) -> Imported:
    """Convert a file that `vllm serve --config` takes. As pure as `judge`. Raises: ImportRefused, RegistryInvalid."""
    options = config_options(text, source)
    spelled = {key.replace("_", "-"): key for key in options}
    model_key = next((spelled[key] for key in ("model", "model-tag") if key in spelled), None)
    model = options.get(model_key or "")
    if not isinstance(model, str):
        raise ImportRefused(f"{source} names no model", hint="add model: org/name to it")
    entry = Entry(name or entry_name(model))
    changes = [apply_option(entry, "model", model, f"{model_key}: {model}")]
    if changes[0].action == "dropped":
        raise ImportRefused(f"{model!r} cannot be a model: {changes[0].reason}")
    changes += [apply_option(entry, key, value) for key, value in options.items() if key != model_key]
    return finish([entry], {}, changes, source, judge)


def config_options(text: str, source: str) -> dict[str, str | list[str]]:
    """Read the options of such a file, values as a command line would have them. Raises: as `from_config_file`."""
    return {key: _flat(value) for key, value in _mapping(_tree(text, source), source, _CONFIG_HINT).items()}


def from_model_registry(text: str, source: str, dotenv: str | None = None, judge: Judge | None = None) -> Imported:
    """Convert the seed family's registry, and the `.env` beside it. Pure, but for `judge`. Raises: as the others."""
    root = _mapping(_tree(text, source), source, _REGISTRY_HINT)
    models = root.get("models")
    if not isinstance(models, dict) or not models:
        raise ImportRefused(f"{source} has no models", hint=_REGISTRY_HINT)
    changes = [
        Change("dropped", f"{key}:", "", "a registry of this kind has only models") for key in root if key != "models"
    ]
    entries = []
    for written, block in models.items():
        entry = Entry(entry_name(written) if not _is_name(written) else written)
        if not isinstance(block, dict) or not isinstance(block.get("model"), str):
            changes.append(Change("dropped", f"models.{written}", "", "it names no model", entry.name))
            continue
        if entry.name != written:
            changes.append(Change("renamed", written, entry.name, "the name was not usable", entry.name))
        found = [apply_option(entry, key, _flat(value)) for key, value in block.items()]
        changes += found
        if "model" in entry.settings:
            entries.append(entry)
    if not entries:
        raise ImportRefused(f"{source} has no model that can be served", hint=_REGISTRY_HINT)
    env: dict[str, str] = {}
    if dotenv is not None:
        from launcher.fabric.dotenv import parse_dotenv

        values = {name: without_comment(value) for name, value in parse_dotenv(dotenv).values.items()}
        env, found = apply_variables(values)
        changes += found
    return finish(entries, env, changes, source, judge)


def _is_name(text: str) -> bool:
    import re

    from launcher.registry.shapes import NAME_PATTERN

    return re.fullmatch(NAME_PATTERN, text) is not None


def _tree(text: str, source: str) -> Any:
    try:
        root = read_tree(text, source)
    except DocumentError as error:
        raise RegistryInvalid(f"{source} has 1 error", issues=[error.issue]) from error
    return _plain(root) if root is not None else None


def _mapping(tree: Any, source: str, hint: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ImportRefused(f"{source} is not a mapping", hint=hint)
    return tree


def _plain(node: Node) -> Any:
    """Nodes as texts, lists and mappings; the last of two equal keys wins, as with any other reader."""
    if isinstance(node, Scalar):
        return None if node.is_null else node.text
    if isinstance(node, Sequence):
        return [_plain(item) for item in node.items]
    found: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, value in node.pairs:
        if isinstance(key, Scalar) and key.text == "<<" and key.style == "plain":
            for merged in value.items if isinstance(value, Sequence) else [value]:
                if isinstance(merged, Mapping):
                    found = {**_plain(merged), **found}
        elif isinstance(key, Scalar):
            own[key.text] = _plain(value)
    return {**found, **own}


def _flat(value: Any) -> str | list[str]:
    """A value as a command line would have it: lists of texts stay lists, mappings become JSON."""
    if value is None:
        return "null"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return list(value)
    return value if isinstance(value, str) else json.dumps(value)
