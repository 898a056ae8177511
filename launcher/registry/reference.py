"""The commented reference inside `model_registry.yml`, and the committed JSON schema: both made from the key table.

`python -m launcher.registry.reference` rewrites both in a checkout; tests compare. Refuses to know: entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from launcher.registry.keys import CLUSTER, ENTRY, MODEL_ONLY, NODE, KeySpec, KeyTable, Kind, show_value
from launcher.registry.locate import packaged_registry
from launcher.registry.schema import SCHEMA_FILE, json_schema_text

BEGIN = "# --- reference: made by `python -m launcher.registry.reference`, do not edit below ---"

_INTRODUCTION = """\
#
# Every key, with its default. Copy a line into an entry, or into `defaults:` where it is not marked [entry only],
# and remove the '#'. A key without a value is unset: the engine or the model decides, as its comment says.
# Underscores work like dashes. Sizes: KiB MiB GiB are 1024^n bytes, kB MB GB are 1000^n. Tokens: 128k is 131072.
# Durations: 500ms, 30s, 15m, 1h; a bare number is seconds. Precedence, low to high: built-in, platform preset,
# defaults, extends (left to right), entry, overrides.<platform>, --profile, the cluster's env, the node's env,
# HLAUNCH_<KEY> (HLAUNCH_MAX_NUM_SEQS=8), --set key=value. `hlaunch show NAME --explain` tells which one won.
"""

_STRUCTURE = """\
#
# Beside these keys an entry may hold, with any of them that is not [entry only]:
#   profiles: {NAME: {KEY: value}}             chosen by --profile NAME or HLAUNCH_PROFILE; may stand at the top, too
#   overrides: {PLATFORM: {KEY: value}}        PLATFORM: generic, hopper, gb10, blackwell, cpu; as the cluster says
#
# Every key of a cluster, which stands at the top of the file; examples/two-nodes.yml is a whole one.
"""


def reference() -> str:
    """The reference block, from its marker line to the end of the file."""
    entry, cluster = _commented(reference_lines()), _commented(cluster_reference_lines())
    return BEGIN + "\n" + _INTRODUCTION + entry + _STRUCTURE + cluster


def reference_lines() -> Iterator[str]:
    """The keys of an entry without comment signs: a mapping that validates inside an entry."""
    yield from _table_lines(ENTRY)


def cluster_reference_lines() -> Iterator[str]:
    """The keys of a cluster and its nodes without comment signs: a mapping that validates at the top of a file."""
    yield "clusters:"
    yield "  pair:"
    yield from _indented("    ", _table_lines(CLUSTER))
    yield "    nodes:"
    lines = list(_indented("        ", _table_lines(NODE, {"name": "spark-01", "role": "head", "ip": "192.168.100.1"})))
    first = next(index for index, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#"))
    yield from lines[:first]
    yield "      - " + lines[first].lstrip()
    yield from lines[first + 1 :]


def _commented(lines: Iterable[str]) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _indented(indent: str, lines: Iterable[str]) -> Iterator[str]:
    return (f"{indent}{line}" if line else "" for line in lines)


def _table_lines(table: KeyTable, examples: Mapping[str, str] | None = None) -> Iterator[str]:
    opened = ""
    for spec in table.specs.values():
        group, _, leaf = spec.key.rpartition(".")
        if group and group != opened:
            opened = group
            yield ""
            yield f"{group}:"
        indent = "  " if group else ""
        yield ""
        yield f"{indent}# {spec.summary}."
        yield f"{indent}# {_terms(spec)}"
        yield f"{indent}{leaf}: {(examples or {}).get(spec.key) or _example(spec)}".rstrip()


def replace_reference(text: str) -> str:
    """Return a registry's text with its reference block brought up to date."""
    return text.partition(BEGIN)[0] + reference()


def _terms(spec: KeySpec) -> str:
    terms = [f"default: {spec.describe_default()}"]
    if spec.unit:
        terms.append(f"unit: {spec.unit}")
    if accepted := spec.describe_range():
        terms.append(f"range: {accepted}")
    if spec.aliases:
        terms.append(f"also: {', '.join(spec.aliases)}")
    if spec.key in MODEL_ONLY:
        terms.append("entry only")
    return "; ".join(terms)


def _example(spec: KeySpec) -> str:
    if spec.is_required:
        return "tiny-oss"
    if spec.default is None:
        return ""
    text = show_value(spec, spec.default)
    return f'"{text}"' if spec.kind is Kind.TEXT and text.count(":") else text


def main() -> None:
    """Rewrite the registry's reference and the JSON schema of this checkout."""
    registry = packaged_registry().resolve()
    registry.write_text(replace_reference(registry.read_text(encoding="utf-8")), encoding="utf-8")
    (registry.parent / SCHEMA_FILE).write_text(json_schema_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
