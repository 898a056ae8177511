"""The commented reference inside `model_registry.yml`, and the committed JSON schema: both made from the key table.

`python -m launcher.registry.reference` rewrites both in a checkout; tests compare. Refuses to know: entries.
"""

from __future__ import annotations

from collections.abc import Iterator

from launcher.registry.keys import GROUPS, KEYS, MODEL_ONLY, KeySpec, Kind, show_value
from launcher.registry.locate import packaged_registry
from launcher.registry.schema import SCHEMA_FILE, json_schema_text

BEGIN = "# --- reference: made by `python -m launcher.registry.reference`, do not edit below ---"

_INTRODUCTION = """\
#
# Every key, with its default. Copy a line into an entry, or into `defaults:` where it is not marked [entry only],
# and remove the '#'. A key without a value is unset: the engine or the model decides, as its comment says.
# Underscores work like dashes. Sizes: KiB MiB GiB are 1024^n bytes, kB MB GB are 1000^n. Tokens: 128k is 131072.
# Durations: 500ms, 30s, 15m, 1h; a bare number is seconds. Precedence, low to high: built-in, defaults, entry,
# HLAUNCH_<KEY> (HLAUNCH_MAX_NUM_SEQS=8), --set key=value. `hlaunch show NAME --explain` tells which one won.
"""


def reference() -> str:
    """The reference block, from its marker line to the end of the file."""
    return BEGIN + "\n" + _INTRODUCTION + "".join(f"# {line}".rstrip() + "\n" for line in reference_lines())


def reference_lines() -> Iterator[str]:
    """The block without its comment signs: a mapping that validates inside an entry."""
    opened = ""
    for spec in KEYS.values():
        group, _, leaf = spec.key.rpartition(".")
        if group and group in GROUPS and group != opened:
            opened = group
            yield f"{group}:"
        indent = "  " if group else ""
        yield ""
        yield f"{indent}# {spec.summary}."
        yield f"{indent}# {_terms(spec)}"
        yield f"{indent}{leaf}: {_example(spec)}".rstrip()


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
