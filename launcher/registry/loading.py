"""A registry file -> `Registry`, or every error of it at once.

Knows: which mappings hold keys, names or variables; duplicates, spellings and merge keys; how pydantic's errors become
issues with positions. Refuses to know: layers above the file (`launcher.registry.resolving`), the terminal.
The only effect is reading the file, in `load_registry`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping as MappingABC
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from launcher.errors import Issue, RegistryInvalid
from launcher.registry.document import DocumentError, Mapping, Node, Scalar, decode, read_tree
from launcher.registry.locate import display_path
from launcher.registry.reading import describe
from launcher.registry.resolving import file_layers, rule_issues
from launcher.registry.schema import NAME_PATTERN, document_model
from launcher.registry.types import Mark, ModelEntry, Options, Registry, Setting
from launcher.registry.values import is_secret_name, show_text
from launcher.registry.walking import Path as KeyPath
from launcher.registry.walking import Tree, dotted, walk

_GLUED = re.compile(r"([A-Za-z][A-Za-z_-]{0,60}):\S.*", re.ASCII)
_EMPTY_HINT = "write at least: models: {tiny-oss: {model: tiny-oss}}"


def load_registry(path: Path, cwd: Path | None = None) -> Registry:
    """Read, validate and return a registry file. Blocks on the file, reads at most 1 MiB of it.

    Raises: RegistryInvalid with every error of the file, `file:line:column` each.
    """
    registry, issues = check_registry(path, cwd)
    return _unless_errors(registry, issues, display_path(path, cwd or Path.cwd()))


def parse_registry(text: str, source: str = "model_registry.yml") -> Registry:
    """Validate a registry held in a string. Pure. Raises: RegistryInvalid."""
    registry, issues = _check_text(text, source, Path(source))
    return _unless_errors(registry, issues, source)


def check_registry(path: Path, cwd: Path | None = None) -> tuple[Registry | None, list[Issue]]:
    """Return the registry (None when it has errors) and every issue of the file, in file order. Never raises."""
    source = display_path(path, cwd or Path.cwd())
    try:
        with path.open("rb") as handle:
            # One byte more than allowed is enough to refuse; a device or a pipe never fills the memory.
            data = handle.read((1 << 20) + 1)
    except OSError as error:
        hint = "name a readable file: hlaunch --file PATH …"
        return None, [Issue("error", "unreadable", source, None, None, "", f"cannot be read: {error.strerror}", hint)]
    try:
        text = decode(data, source)
    except DocumentError as error:
        return None, [error.issue]
    return _check_text(text, source, path)


def _unless_errors(registry: Registry | None, issues: list[Issue], source: str) -> Registry:
    if registry is None:
        count = sum(issue.severity == "error" for issue in issues)
        noun = "error" if count == 1 else "errors"
        raise RegistryInvalid(f"{source} has {count} {noun}", issues=issues)
    return registry


def _check_text(text: str, source: str, path: Path) -> tuple[Registry | None, list[Issue]]:
    try:
        root = read_tree(text, source)
    except DocumentError as error:
        return None, [error.issue]
    if root is None or (isinstance(root, Scalar) and root.is_null):
        return None, [Issue("error", "empty", source, 1, 1, "", "the registry is empty", _EMPTY_HINT)]
    if not isinstance(root, Mapping):
        return None, [_not_a_mapping(root, source)]
    tree = walk(root, source)
    return _Validation(tree, source, path).run()


def _not_a_mapping(root: Node, source: str) -> Issue:
    shape = describe(root) if isinstance(root, Scalar) else "a list"
    return Issue(
        "error",
        "wrong-type",
        source,
        root.mark.line,
        root.mark.column,
        "",
        f"a registry is a mapping, got {shape}",
        _EMPTY_HINT,
    )


class _Validation:
    """One file on its way through the schema and the rules; `issues` grows."""

    def __init__(self, tree: Tree, source: str, path: Path) -> None:
        self.tree = tree
        self.source = source
        self.path = path
        self.issues = list(tree.issues)

    def run(self) -> tuple[Registry | None, list[Issue]]:
        document, has_defaults = self._validate()
        self._name_clashes()
        registry = None
        if document is not None:
            registry = self._build(document)
            # Without its defaults an entry may look broken where it is not.
            if has_defaults:
                for entry in registry.models.values():
                    values, env = file_layers(registry, entry)
                    self.issues += rule_issues(entry.name, values, env, self.source, _place(entry.mark))
        self.issues = sorted(set(self.issues), key=lambda issue: (issue.line or 0, issue.column or 0, issue.path))
        if registry is None or any(issue.severity == "error" for issue in self.issues):
            return None, self.issues
        frozen = Registry(registry.path, registry.source, registry.defaults, registry.models, tuple(self.issues))
        return frozen, self.issues

    def _validate(self) -> tuple[Any, bool]:
        """Validate all; on errors, validate again without the broken blocks, so that the rules can judge the rest."""
        data = self.tree.data
        model = document_model()
        try:
            return model.model_validate(data), True
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)
        # Entries whose names were refused are gone by now: that is one mistake, not two.
        has_lost_entries = any(issue.path == "models" for issue in self.issues)
        self.issues += [self._issue(item) for item in found if not (item["type"] == "too_short" and has_lost_entries)]
        broken = {item["loc"][:2] if item["loc"][0] == "models" else item["loc"][:1] for item in found}
        models = data.get("models")
        if not isinstance(models, dict):
            return None, False
        sound = {name: block for name, block in models.items() if ("models", name) not in broken}
        rest = {"models": sound}
        has_defaults = ("defaults",) not in broken
        if has_defaults and "defaults" in data:
            rest["defaults"] = data["defaults"]
        try:
            return model.model_validate(rest), has_defaults
        except ValidationError:
            return None, False

    def _issue(self, item: Any) -> Issue:
        path: KeyPath = tuple(str(part) for part in item["loc"] if part != "[key]")
        is_key = item["type"] in ("missing", "extra_forbidden", "string_pattern_mismatch")
        mark = self.tree.find(path, is_key=is_key)
        code, message, hint = self._explain(item, path)
        return Issue("error", code, self.source, mark.line, mark.column, dotted(path), message, hint)

    def _explain(self, item: Any, path: KeyPath) -> tuple[str, str, str]:
        context = item.get("ctx", {})
        match item["type"]:
            case "hlaunch":
                return context["code"], self._without_secret(path, context["message"]), context["hint"]
            case "missing" if path[-1] == "model":
                hint = "add model: org/name, a folder, or tiny-oss"
                if path[-2].startswith("x-"):
                    hint = "a template for '<<' stands outside models, at the top of the file"
                return "missing-key", "every entry says what to serve", hint
            case "missing":
                return "missing-key", "the registry has no models", _EMPTY_HINT
            case "too_short":
                return "no-models", "the registry lists no model", _EMPTY_HINT
            case "too_long":
                return "out-of-range", f"at most {context.get('max_length')} items are allowed", "remove some"
            case "string_pattern_mismatch":
                return "bad-name", "not a name of an environment variable", "use letters, digits and '_'"
        expected = "a list" if item["type"] == "list_type" else "a mapping"
        raw = self.tree.value(path)
        shape = describe(raw)
        hint = "write one setting per line, indented: key: value" if expected == "a mapping" else "write [a, b]"
        if path == ("models",):
            hint = "write a name for each model: models: {tiny-oss: {model: tiny-oss}}"
        elif isinstance(raw, Scalar) and (glued := _GLUED.fullmatch(raw.text)):
            hint = f"put a space after the colon: {glued[1]}: …"
        return "wrong-type", f"expected {expected}, got {shape}", hint

    def _without_secret(self, path: KeyPath, message: str) -> str:
        """A variable's value is quoted in its message, unless the name says that it is a secret."""
        raw = self.tree.value(path)
        if isinstance(raw, Scalar) and raw.text and "env" in path[:-1] and is_secret_name(path[-1]):
            return message.replace(show_text(raw.text), "the value").replace(raw.text, "the value")
        return message

    def _name_clashes(self) -> None:
        """Names and aliases are unique whatever their case: a file system or a client may fold it."""
        seen: dict[str, tuple[str, Mark]] = {}
        for path, name, mark in self._claimed_names():
            folded = name.casefold()
            if folded in seen:
                other, first = seen[folded]
                message = f"'{name}' is already the name or alias '{other}' at line {first.line}"
                self.issues.append(
                    Issue(
                        "error", "name-clash", self.source, mark.line, mark.column, dotted(path), message, "rename one"
                    )
                )
            seen.setdefault(folded, (name, mark))

    def _claimed_names(self) -> list[tuple[KeyPath, str, Mark]]:
        models = self.tree.data.get("models")
        blocks = models if isinstance(models, dict) else {}
        names: list[tuple[KeyPath, str, Mark]] = [
            (("models", name), name, self.tree.find(("models", name), is_key=True)) for name in blocks
        ]
        for name, block in blocks.items():
            written = block.get("aliases") if isinstance(block, dict) else None
            for alias in written if isinstance(written, list) else [written]:
                if isinstance(alias, Scalar) and re.fullmatch(NAME_PATTERN, alias.text):
                    names.append((("models", name, "aliases"), alias.text, alias.mark))
        return names

    def _build(self, document: Any) -> Registry:
        models = {
            name: ModelEntry(
                name, self.tree.find(("models", name), is_key=True), self._options(block, ("models", name))
            )
            for name, block in document.models_.items()
        }
        defaults = self._options(document.defaults_, ("defaults",))
        return Registry(self.path, self.source, defaults, MappingProxyType(models))

    def _options(self, block: BaseModel | None, path: KeyPath) -> Options:
        if block is None:
            return Options()
        settings: dict[str, Setting] = {}
        env: dict[str, Setting] = {}
        for key, value in _fields(block):
            if key == "env" and isinstance(value, dict):
                env = {name: Setting(item, self.tree.find((*path, key, name))) for name, item in value.items()}
            elif isinstance(value, BaseModel):
                for inner, leaf in _fields(value):
                    settings[f"{key}.{inner}"] = Setting(_frozen(leaf), self.tree.find((*path, key, inner)))
            else:
                settings[key] = Setting(_frozen(value), self.tree.find((*path, key)))
        return Options(MappingProxyType(settings), MappingProxyType(env))


def _fields(block: BaseModel) -> list[tuple[str, Any]]:
    """The keys that were written, by their canonical names, in the table's order."""
    fields: MappingABC[str, Any] = type(block).model_fields
    return [
        (info.alias or name, getattr(block, name)) for name, info in fields.items() if name in block.model_fields_set
    ]


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _place(mark: Mark) -> tuple[int, int]:
    return mark.line, mark.column
