"""Names that point at each other: unique names, aliases, bases of `extends`, profiles, clusters.

Knows: who may be named where, cycles, entries that nobody gives a model. Refuses to know: values and layers. Works on
the walked tree beside the built registry, so that a block with another mistake still counts as declared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from launcher.errors import Issue
from launcher.registry.document import Scalar
from launcher.registry.shapes import NAME_PATTERN
from launcher.registry.suggest import Suggester
from launcher.registry.types import NO_CLUSTER, Mark
from launcher.registry.values import show_text
from launcher.registry.walking import MAX_ISSUES, Path, Tree, dotted

MAX_BASES = 64
"""Generations of `extends`, counted as entries: more is a mistake, and would make every lookup slow."""


def reference_issues(tree: Tree, source: str) -> list[Issue]:
    """Return every problem between names, in no particular order."""
    return list(islice(_References(tree, source).issues(), MAX_ISSUES))


class _References:
    def __init__(self, tree: Tree, source: str) -> None:
        self.tree = tree
        self.source = source
        self.did_you_mean = Suggester()
        models = tree.data.get("models")
        self.models: Mapping[str, Any] = models if isinstance(models, dict) else {}
        clusters = tree.data.get("clusters")
        self.clusters = list(clusters) if isinstance(clusters, dict) else []
        self.owners: dict[str, str] = {}
        """Name or alias -> the entry that has it."""
        self.bare: set[str] = set()
        """Entries that get a model from nowhere; in doubt (a base is unknown, or a circle) an entry is not here."""
        self.doubtful: set[str] = set()
        """Entries with an unknown base."""

    def issues(self) -> Iterator[Issue]:
        yield from self._name_clashes()
        yield from self._bases()
        yield from self._missing_models()
        yield from self._cluster_names()

    def _name_clashes(self) -> Iterator[Issue]:
        """Names and aliases are unique whatever their case: a file system or a client may fold it."""
        seen: dict[str, tuple[str, Mark]] = {}
        for path, name, mark in self._claimed_names():
            self.owners.setdefault(name, path[1])
            folded = name.casefold()
            if folded in seen:
                other, first = seen[folded]
                message = f"'{name}' is already the name or alias '{other}' at line {first.line}"
                yield self._error("name-clash", mark, path, message, "rename one")
            seen.setdefault(folded, (name, mark))

    def _claimed_names(self) -> Iterator[tuple[Path, str, Mark]]:
        for name in self.models:
            yield ("models", name), name, self.tree.find(("models", name), is_key=True)
        for name, block in self.models.items():
            for _, alias in _texts(block, "aliases"):
                if re.fullmatch(NAME_PATTERN, alias.text):
                    yield ("models", name, "aliases"), alias.text, alias.mark

    def _bases(self) -> Iterator[Issue]:
        """Unknown bases, then cycles: each once, at the entry of it that stands first."""
        # Entries whose names were refused may be meant: that is one mistake, not two.
        bases: dict[str, list[tuple[str, Mark]]] = {}
        for name, block in self.models.items():
            bases[name] = []
            for path, base in _texts(block, "extends"):
                owner = self.owners.get(base.text)
                where: Path = ("models", name, *path)
                if owner is None:
                    hint = self.did_you_mean(base.text, self.owners) or "name an entry of models"
                    message = f"no model is called {show_text(base.text)}"
                    self.doubtful.add(name)
                    yield self._error("unknown-ref", base.mark, where, message, hint)
                else:
                    bases[name].append((owner, base.mark))
        done: dict[str, frozenset[str]] = {}
        for name in bases:
            yield from self._cycles_from(name, bases, done)

    def _cycles_from(
        self, start: str, bases: Mapping[str, list[tuple[str, Mark]]], done: dict[str, frozenset[str]]
    ) -> Iterator[Issue]:
        """Follow all bases of one entry, depth first and without recursion; report a way back, or too many.

        `done` gets all generations of each entry that was left.
        """
        if start in done:
            return
        way, here = [start], {start}
        waiting = [iter(bases[start])]
        while way:
            step = next(waiting[-1], None)
            if step is None:
                waiting.pop()
                name = way.pop()
                here.remove(name)
                direct = [base for base, _ in bases[name]]
                everyone = frozenset(direct).union(*(done.get(base, frozenset()) for base in direct))
                if len(everyone) > MAX_BASES:
                    message = f"{len(everyone)} entries stand below this one, at most {MAX_BASES} are allowed"
                    mark, everyone = bases[name][0][1], frozenset()
                    yield self._error("extends-too-many", mark, ("models", name, "extends"), message, "extend fewer")
                done[name] = everyone
                block = self.models[name]
                is_silent = isinstance(block, dict) and "model" not in block and ("extends" not in block or direct)
                if is_silent and name not in self.doubtful and all(base in self.bare for base in direct):
                    self.bare.add(name)
                continue
            base, mark = step
            path: Path = ("models", way[-1], "extends")
            if base in here:
                chain = " -> ".join([*way[way.index(base) :], base])
                yield self._error(
                    "extends-cycle", mark, path, f"the entries extend each other: {_cut(chain)}", "break the circle"
                )
            elif base not in done:
                way.append(base)
                here.add(base)
                waiting.append(iter(bases[base]))

    def _missing_models(self) -> Iterator[Issue]:
        for name, block in self.models.items():
            if isinstance(block, dict) and name in self.bare:
                hint = "add model: org/name, a folder, or tiny-oss"
                if name.startswith("x-"):
                    hint = "a template for '<<' stands outside models, at the top of the file"
                if "extends" in block:
                    hint = "none of the entries that it extends has a model either"
                path: Path = ("models", name, "model")
                mark = self.tree.find(path, is_key=True)
                yield self._error("missing-key", mark, path, "every entry says what to serve", hint)

    def _cluster_names(self) -> Iterator[Issue]:
        if NO_CLUSTER in self.clusters:
            path: Path = ("clusters", NO_CLUSTER)
            mark = self.tree.find(path, is_key=True)
            yield self._error("bad-name", mark, path, f"'{NO_CLUSTER}' means: no cluster", "choose another name")
        for path, block in self._option_blocks():
            name = block.get("cluster")
            if isinstance(name, Scalar) and name.text not in (NO_CLUSTER, *self.clusters):
                hint = self.did_you_mean(name.text, self.clusters) or (
                    f"clusters: {', '.join(self.clusters[:8])}" if self.clusters else "declare it under clusters:"
                )
                message = f"no cluster is called {show_text(name.text)}"
                yield self._error("unknown-ref", name.mark, (*path, "cluster"), message, hint)

    def _option_blocks(self) -> Iterator[tuple[Path, Mapping[str, Any]]]:
        """Every block that may name a cluster."""
        data = self.tree.data
        blocks: list[tuple[Path, Any]] = [(("defaults",), data.get("defaults"))]
        blocks += _named(("profiles",), data.get("profiles"))
        for name, block in self.models.items():
            blocks.append((("models", name), block))
            if isinstance(block, dict):
                blocks += _named(("models", name, "profiles"), block.get("profiles"))
        return ((path, block) for path, block in blocks if isinstance(block, dict))

    def _error(self, code: str, mark: Mark, path: Path, message: str, hint: str) -> Issue:
        return Issue("error", code, self.source, mark.line, mark.column, dotted(path), message, hint)


def _named(path: Path, blocks: Any) -> Iterable[tuple[Path, Any]]:
    return [((*path, name), block) for name, block in blocks.items()] if isinstance(blocks, dict) else []


def _texts(block: Any, key: str) -> Iterator[tuple[Path, Scalar]]:
    """The texts of a list, or the one that stands for a list, each with its path below the block."""
    written = block.get(key) if isinstance(block, dict) else None
    for index, item in enumerate(written if isinstance(written, list) else [written]):
        if isinstance(item, Scalar):
            yield (key, str(index)) if isinstance(written, list) else (key,), item


def _cut(chain: str) -> str:
    return chain if len(chain) <= 160 else f"{chain[:140]} …"
