"""A registry file -> `Registry`, or every error of it at once.

Knows: the order of the steps, and how pydantic's errors become issues with positions. Refuses to know: layers above
the file (`launcher.registry.resolving`), the terminal. The only effect is reading the file, in `load_registry`.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from launcher.errors import Issue, RegistryInvalid
from launcher.registry.building import build
from launcher.registry.cluster_rules import cluster_issues
from launcher.registry.document import DocumentError, Mapping, Node, Scalar, decode, read_tree
from launcher.registry.findings import NO_PLACE
from launcher.registry.locate import display_path
from launcher.registry.reading import describe
from launcher.registry.references import reference_issues
from launcher.registry.resolving import entry_issues
from launcher.registry.schema import document_model
from launcher.registry.types import Registry
from launcher.registry.values import holds_secret, show_text
from launcher.registry.walking import MAX_ISSUES, Tree, dotted, walk
from launcher.registry.walking import Path as KeyPath
from launcher.sizes import counted

_GLUED = re.compile(r"([A-Za-z][A-Za-z_-]{0,60}):\S.*", re.ASCII)
_NAMED = frozenset({"models", "clusters", "profiles"})
_EMPTY_HINT = "write at least: models: {tiny-oss: {model: tiny-oss}}"


def load_registry(path: Path, cwd: Path | None = None) -> Registry:
    """Read, validate and return a registry file. Blocks on the file, reads at most 1 MiB of it.

    Raises: RegistryInvalid with every error of the file, `file:line:column` each.
    """
    registry, issues = check_registry(path, cwd)
    return _unless_errors(registry, issues, display_path(path, cwd or Path.cwd()))


def parse_registry(text: str, source: str = "model_registry.yml", *, known: Sequence[Issue] | None = None) -> Registry:
    """Validate a registry held in a string. Pure. Raises: RegistryInvalid.

    With `known`, also for an entry that finds no place on its cluster, unless these say so already.
    """
    registry, issues = _check_text(text, source, Path(source))
    if registry is not None and known is not None:
        before = {(issue.code, issue.path) for issue in known}
        if any(issue.severity == "error" and (issue.code, issue.path) not in before for issue in issues):
            registry = None
    return _unless_errors(registry, issues, source)


def check_registry(path: Path, cwd: Path | None = None) -> tuple[Registry | None, list[Issue]]:
    """Return the registry (None when it has errors) and every issue of the file, in file order. Never raises.

    Errors of entries that only find no place on their cluster are among the issues; the registry is there.
    """
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
        raise RegistryInvalid(f"{source} has {counted(count, 'error')}", issues=issues)
    return registry


@contextmanager
def _no_collector() -> Iterator[None]:
    """Stop Python's cycle collector meanwhile: a tree has no cycles, and looking for them is a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_no_collector()
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
    if tree.is_cut:
        return None, tree.issues
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
        self.issues += reference_issues(self.tree, self.source)
        registry, own = None, list[Issue]()
        # A circle of bases says nothing about values, and nobody reads the thousandth problem's neighbours.
        is_hopeless = len(self.issues) >= MAX_ISSUES or any(item.code.startswith("extends-") for item in self.issues)
        if document is not None and not is_hopeless:
            registry = build(document, self.tree, self.path, self.source)
            for cluster in registry.clusters.values():
                self.issues += cluster_issues(cluster, self.source)
            # Without its defaults an entry may look broken where it is not.
            if has_defaults:
                own = entry_issues(registry)
        # An entry that has no place fails where it is named: the others are as right as before.
        blocking = [*self.issues, *(issue for issue in own if issue.code not in NO_PLACE)]
        is_blocked = any(issue.severity == "error" for issue in blocking)
        self.issues = sorted({*self.issues, *own}, key=lambda issue: (issue.line or 0, issue.column or 0, issue.path))
        if registry is None or is_blocked:
            return None, self.issues
        return replace(registry, issues=tuple(self.issues)), self.issues

    def _validate(self) -> tuple[Any, bool]:
        """Validate all; on errors, validate again without the broken blocks, so that the rules can judge the rest."""
        data = self.tree.data
        model = document_model()
        try:
            return model.model_validate(data), True
        except ValidationError as error:
            count = error.error_count()
            found = error.errors(include_url=False, include_input=False)[:MAX_ISSUES]
        # Entries whose names were refused are gone by now: that is one mistake, not two.
        has_lost_entries = any(issue.path == "models" for issue in self.issues)
        self.issues += [self._issue(item) for item in found if not (item["type"] == "too_short" and has_lost_entries)]
        if count >= MAX_ISSUES:
            return None, False
        broken = {item["loc"][:2] if item["loc"][0] in _NAMED else item["loc"][:1] for item in found}
        rest = {key: value for key, value in data.items() if (key,) not in broken}
        for group in _NAMED & rest.keys():
            if isinstance(rest[group], dict):
                rest[group] = {name: block for name, block in rest[group].items() if (group, name) not in broken}
        try:
            return model.model_validate(rest), ("defaults",) not in broken
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
            case "missing" | "too_short" if path[-1] == "nodes":
                return "missing-key", "a cluster has nodes", "add nodes: [{name: …, role: head, ip: …}]"
            case "missing" if len(path) > 1:
                return "missing-key", f"every node has its {path[-1]}", f"add {path[-1]}: …"
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
        if isinstance(raw, Scalar) and raw.text and "env" in path[:-1] and holds_secret(path[-1], raw.text):
            return message.replace(show_text(raw.text), "the value").replace(raw.text, "the value")
        return message
