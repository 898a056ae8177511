"""Malformed registries by hand: each gives one error at its line and column in under a second, never a traceback."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launcher.errors import RegistryInvalid
from launcher.registry import check_registry, load_registry

ENTRY = "models:\n  m:\n    model: tiny-oss\n"


def entry(line: str) -> str:
    """One entry whose last line, the fourth, is under test."""
    return f"{ENTRY}    {line}\n"


def bomb(levels: int, width: int) -> str:
    lines = ["x-0: &a0 [" + ", ".join("x" * width) + "]"]
    lines += [f"x-{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n" + ENTRY


def nested_alias() -> str:
    lists = (f"{'[' * 40}{f'*b{i - 1}' if i else ''}{']' * 40}" for i in range(4))
    return "".join(f"x-{i}: &b{i} {text}\n" for i, text in enumerate(lists))


Case = tuple[str, str | bytes, str, int, int]

CASES: list[Case] = [
    # The document.
    ("empty file", "", "empty", 1, 1),
    ("only a comment", "# nothing\n", "empty", 1, 1),
    ("only null", "~\n", "empty", 1, 1),
    ("a list", "- models\n", "wrong-type", 1, 1),
    ("a word", "models\n", "wrong-type", 1, 1),
    ("utf-16", ENTRY.encode("utf-16"), "not-utf8", 1, 1),
    ("utf-16 without mark", ENTRY.encode("utf-16-le"), "not-utf8", 1, 1),
    ("latin-1", b"models:\n  m: {model: caf\xe9}\n", "not-utf8", 2, 17),
    ("nul byte", b"models:\n  m\x00: {}\n", "bad-character", 2, 4),
    ("control character", "models:\n  m: {model: a\x07b}\n", "bad-character", 2, 15),
    ("larger than 1 MiB", "# " + "x" * (1 << 20), "too-large", 1, 1),
    ("two documents", ENTRY + "---\n" + ENTRY, "several-documents", 4, 1),
    # Syntax.
    ("tab", "models:\n\tm: 1\n", "syntax", 2, 1),
    ("unclosed brace", "models: {m: {model: x}\n", "syntax", 1, 9),
    ("unclosed bracket", "models:\n  m: [a\n", "syntax", 2, 6),
    ("unclosed quote", 'models:\n  m: "a\n', "syntax", 2, 6),
    ("two colons", "models:\n  m: a: b\n", "syntax", 2, 7),
    ("bad indent", "models:\n  m:\n    model: x\n   dtype: auto\n", "syntax", 4, 4),
    ("at sign", "models:\n  m: @x\n", "syntax", 2, 6),
    ("bad escape", 'models:\n  m: "\\q"\n', "syntax", 2, 7),
    ("list in a mapping", "models:\n  m: {}\n  - x\n", "syntax", 3, 3),
    ("unknown directive value", "%YAML 9.9\n---\nmodels: {}\n", "syntax", 1, 1),
    # Dangers.
    ("deep flow nesting", "[" * 200_000, "too-deep", 1, 65),
    ("deep mapping nesting", "{a: " * 1000, "too-deep", 1, 257),
    ("deep block nesting", "\n".join(" " * i + "a:" for i in range(100)), "too-deep", 65, 65),
    ("deep by alias", nested_alias(), "too-deep", 2, 50),
    ("many events in brackets", "x-a: [" + "[]," * 200_001 + "]", "too-many-nodes", 1, 299999),
    ("many events on lines", "x-a:\n" + "- a\n" * 200_001, "too-many-nodes", 1, 1),
    ("many events, no end", "x-a: [" + "a," * 200_001, "too-many-nodes", 1, 399997),
    ("many dashes", "x-a:\n  " + "- " * 500_000, "too-many-nodes", 1, 1),
    ("many events", "x-a: [" + "a," * 200_001 + "]", "too-many-nodes", 1, 1),
    ("alias bomb", bomb(9, 9), "alias-bomb", 5, 11),
    ("wide alias bomb", "x-a: &a [" + "x," * 5000 + "]\nx-b: [*a, *a, *a]\n", "alias-bomb", 2, 11),
    ("recursive list", "x-a: &a [*a]\n", "recursive-anchor", 1, 10),
    ("recursive mapping", "x-a: &a {b: {c: *a}}\n", "recursive-anchor", 1, 17),
    ("recursive merge", "models:\n  m: &a\n    <<: *a\n", "recursive-anchor", 3, 9),
    ("unknown alias", "models: *nothing\n", "unknown-anchor", 1, 9),
    ("python tag", "models: !!python/object/apply:os.system ['true']\n", "custom-tag", 1, 9),
    ("own tag", entry("dtype: !mine auto"), "custom-tag", 4, 12),
    ("binary tag", entry("description: !!binary aGk="), "custom-tag", 4, 18),
    ("int tag", entry("port: !!int '8000'"), "custom-tag", 4, 11),
    ("set tag", "models: !!set {a}\n", "custom-tag", 1, 9),
    # Keys.
    ("no models", "version: 1\n", "missing-key", 1, 1),
    ("empty models", "models:\n", "missing-key", 1, 1),
    ("models without entries", "models: {}\n", "no-models", 1, 9),
    ("unknown top key", ENTRY + "modles: {}\n", "unknown-key", 4, 1),
    ("unknown key", entry("gpu-memory-utilisation: 0.9"), "unknown-key", 4, 5),
    ("vllm-like unknown key", entry("swap-spaec: 4"), "unknown-key", 4, 5),
    ("unsupported option", entry("enable-lora: true"), "unsupported-flag", 4, 5),
    ("unsupported option with underscores", entry("speculative_config: {model: x}"), "unsupported-flag", 4, 5),
    ("unsupported default", "defaults: {cpu-offload-gb: 4}\n" + ENTRY, "unsupported-flag", 1, 12),
    ("negated option", entry("no-enable-prefix-caching: true"), "unknown-key", 4, 5),
    ("short option", entry("q: mxfp4"), "unknown-key", 4, 5),
    ("upper-case key", entry("Dtype: auto"), "unknown-key", 4, 5),
    ("unknown default", "defaults: {max-num-seq: 1}\n" + ENTRY, "unknown-key", 1, 12),
    ("unknown ready key", entry("ready: {timeot: 3s}"), "unknown-key", 4, 13),
    ("flat nested key", entry("ready.timeout: 3s"), "unknown-key", 4, 5),
    ("entry key in defaults", "defaults: {model: x}\n" + ENTRY, "model-only", 1, 12),
    ("duplicate key", entry("model: other"), "duplicate-key", 4, 5),
    ("duplicate entry", ENTRY + "  m: {model: x}\n", "duplicate-key", 4, 3),
    ("duplicate top key", ENTRY + "models: {}\n", "duplicate-key", 4, 1),
    ("duplicate variable", entry("env: {A: 1, A: 2}"), "duplicate-key", 4, 17),
    ("alias and name of a key", entry("tp: 2\n    tensor-parallel-size: 2"), "two-spellings", 5, 5),
    ("dash and underscore", entry("max-num-seqs: 2\n    max_num_seqs: 2"), "two-spellings", 5, 5),
    ("a list as key", "models:\n  [a]: {model: x}\n", "bad-key", 2, 3),
    ("a mapping as key", entry("? {a: b}\n    : c"), "bad-key", 4, 7),
    ("octal key", "models:\n  010: {model: x}\n", "ambiguous-number", 2, 3),
    ("merge of a text", "models:\n  m: {model: x, <<: y}\n", "bad-merge", 2, 21),
    ("merge of a list of texts", "models:\n  m: {model: x, <<: [y]}\n", "bad-merge", 2, 22),
    # Names.
    ("entry named like a flag", "models:\n  --help: {model: x}\n", "bad-name", 2, 3),
    ("entry named -x", "models:\n  -x: {model: x}\n", "bad-name", 2, 3),
    ("entry with a space", "models:\n  a b: {model: x}\n", "bad-name", 2, 3),
    ("empty entry name", "models:\n  '': {model: x}\n", "bad-name", 2, 3),
    ("null entry name", "models:\n  ~: {model: x}\n", "bad-name", 2, 3),
    ("rich markup as name", "models:\n  '[/red]': {model: x}\n", "bad-name", 2, 3),
    ("long entry name", f"models:\n  {'a' * 129}: {{model: x}}\n", "bad-name", 2, 3),
    ("names differ in case", ENTRY + "  M: {model: x}\n", "name-clash", 4, 3),
    ("alias is a name", ENTRY + "  n: {model: x, aliases: [m]}\n", "name-clash", 4, 27),
    ("alias twice", entry("aliases: [a, A]"), "name-clash", 4, 18),
    ("alias like a flag", entry("aliases: [-d]"), "bad-text", 4, 15),
    # Shapes.
    ("models is a list", "models: [a]\n", "wrong-type", 1, 9),
    ("models is text", "models: tiny-oss\n", "wrong-type", 1, 9),
    ("defaults is a list", ENTRY + "defaults: [a]\n", "wrong-type", 4, 11),
    ("entry is text", "models:\n  m: tiny-oss\n", "wrong-type", 2, 6),
    ("entry is a list", "models:\n  m: [model, x]\n", "wrong-type", 2, 6),
    ("entry is empty", "models:\n  m:\n", "missing-key", 2, 3),
    ("entry without model", "models:\n  m: {dtype: auto}\n", "missing-key", 2, 3),
    ("empty model", "models:\n  m: {model: }\n", "missing-key", 2, 7),
    ("model is a list", "models:\n  m: {model: [a]}\n", "wrong-type", 2, 14),
    ("number is a mapping", entry("port: {a: 1}"), "wrong-type", 4, 11),
    ("ready is a number", entry("ready: 30s"), "wrong-type", 4, 12),
    ("env is a list", entry("env: [A=1]"), "wrong-type", 4, 10),
    ("env value is a list", entry("env: {A: [1]}"), "wrong-type", 4, 14),
    ("tags is a mapping", entry("tags: {a: b}"), "wrong-type", 4, 11),
    ("tag is a list", entry("tags: [[a]]"), "wrong-type", 4, 12),
    ("tag is empty", entry("tags: [a, '']"), "wrong-type", 4, 15),
    ("tag is null", entry("tags: [a, ~]"), "wrong-type", 4, 15),
    # Scalars that YAML readers read differently.
    ("octal", entry("port: 010"), "ambiguous-number", 4, 11),
    ("octal 0755", entry("max-num-seqs: 0755"), "ambiguous-number", 4, 19),
    ("octal 0o17", entry("max-num-seqs: 0o17"), "ambiguous-number", 4, 19),
    ("hexadecimal", entry("port: 0x1F40"), "ambiguous-number", 4, 11),
    ("underscored", entry("max-model-len: 131_072"), "ambiguous-number", 4, 20),
    ("underscore at the end", entry("port: 8_"), "ambiguous-number", 4, 11),
    ("octal text", entry("revision: 0123456"), "ambiguous-number", 4, 15),
    ("infinity", entry("gpu-memory-utilization: .inf"), "not-finite", 4, 29),
    ("not a number", entry("gpu-memory-utilization: .nan"), "not-finite", 4, 29),
    ("infinite duration", entry("drain-timeout: -.inf"), "not-finite", 4, 20),
    ("sexagesimal", entry("port: 22:30"), "wrong-type", 4, 11),
    ("date", entry("seed: 2024-01-01"), "wrong-type", 4, 11),
    ("yes", entry("enforce-eager: yes"), "wrong-type", 4, 20),
    ("off", entry("async-scheduling: Off"), "wrong-type", 4, 23),
    ("1 as a boolean", entry("enforce-eager: 1"), "wrong-type", 4, 20),
    ("quoted true", entry("enforce-eager: 'true'"), "wrong-type", 4, 20),
    ("true as a number", entry("port: true"), "wrong-type", 4, 11),
    ("quoted number", entry("port: '8000'"), "wrong-type", 4, 11),
    ("word as a number", entry("max-num-seqs: many"), "wrong-type", 4, 19),
    ("fraction as a whole number", entry("max-num-seqs: 1.5"), "wrong-type", 4, 19),
    ("whole number with a point", entry("max-num-seqs: 8.0"), "wrong-type", 4, 19),
    ("percent", entry("gpu-memory-utilization: 90%"), "wrong-type", 4, 29),
    ("exponent beyond floats", entry("max-num-seqs: 1e999"), "wrong-type", 4, 19),
    ("fullwidth digits", entry("port: ８０００"), "wrong-type", 4, 11),
    ("5000 digits", entry("max-num-seqs: " + "9" * 5000), "wrong-type", 4, 19),
    # Values.
    ("version 2", "version: 2\n" + ENTRY, "unknown-value", 1, 10),
    ("version as text", "version: one\n" + ENTRY, "wrong-type", 1, 10),
    ("unknown dtype", entry("dtype: bfloat61"), "unknown-value", 4, 12),
    ("unknown policy", entry("scheduling-policy: lifo"), "unknown-value", 4, 24),
    ("unknown backend", entry("distributed-executor-backend: multiproc"), "unknown-value", 4, 35),
    ("unknown device", entry("device: gpu"), "unknown-value", 4, 13),
    ("unknown load format", entry("load-format: pickle"), "unknown-value", 4, 18),
    ("block size", entry("block-size: 24"), "unknown-value", 4, 17),
    ("port 0", entry("port: 0"), "out-of-range", 4, 11),
    ("port 65536", entry("port: 65536"), "out-of-range", 4, 11),
    ("negative seqs", entry("max-num-seqs: -1"), "out-of-range", 4, 19),
    ("no tensor ranks", entry("tp: 0"), "out-of-range", 4, 9),
    ("utilization 0", entry("gpu-memory-utilization: 0"), "out-of-range", 4, 29),
    ("utilization above 1", entry("gpu-memory-utilization: 1.01"), "out-of-range", 4, 29),
    ("length 0", entry("max-model-len: 0"), "out-of-range", 4, 20),
    ("length -2", entry("max-model-len: -2"), "out-of-range", 4, 20),
    ("length with a wrong suffix", entry("max-model-len: 128kb"), "wrong-type", 4, 20),
    ("length of 1.0001k", entry("max-model-len: 1.0001k"), "wrong-type", 4, 20),
    ("size without meaning", entry("kv-cache-memory-bytes: lots"), "wrong-type", 4, 28),
    ("ambiguous size", entry("kv-cache-memory-bytes: 4G"), "wrong-type", 4, 28),
    ("huge size", entry("kv-cache-memory-bytes: 99999999999PiB"), "out-of-range", 4, 28),
    ("tiny size", entry("kv-cache-memory-bytes: 1KiB"), "out-of-range", 4, 28),
    ("duration without meaning", entry("drain-timeout: soon"), "wrong-type", 4, 20),
    ("ready in no time", entry("ready: {timeout: 0}"), "out-of-range", 4, 22),
    ("model like a flag", "models:\n  m: {model: --port}\n", "bad-text", 2, 14),
    ("blank model", "models:\n  m: {model: '  '}\n", "wrong-type", 2, 14),
    ("model with a newline", 'models:\n  m: {model: "a\\nb"}\n', "bad-text", 2, 14),
    ("escape in a description", entry('description: "\\e[31m"'), "bad-text", 4, 18),
    ("bad host", entry("host: 'a b'"), "bad-text", 4, 11),
    ("long description", entry("description: " + "x" * 5000), "out-of-range", 4, 18),
    ("bad variable name", entry("env: {A-B: 1}"), "bad-name", 4, 11),
    ("variable not expanded", entry("env: {A: '${HOME}'}"), "not-expanded", 4, 14),
    ("half a secret reference", entry("api-key: $KEY"), "bad-secret", 4, 14),
    ("secret file without name", entry("api-key: 'file:'"), "bad-secret", 4, 14),
    ("empty secret", entry("api-key: ''"), "bad-secret", 4, 14),
    # Between keys.
    ("remote code", entry("trust-remote-code: true"), "remote-code", 4, 24),
    ("step budget", entry("max-num-seqs: 64\n    max-num-batched-tokens: 32"), "step-budget", 4, 19),
    ("step budget of defaults", "defaults: {max-num-batched-tokens: 8}\n" + ENTRY, "step-budget", 1, 36),
    ("whole prefill", entry("enable-chunked-prefill: false\n    max-model-len: 128k"), "prefill-budget", 5, 20),
    ("two sizes", entry("gpu-memory-utilization: 0.5\n    kv-cache-memory-bytes: 4GB"), "sizing-conflict", 5, 28),
    ("uni with two ranks", entry("distributed-executor-backend: uni\n    tp: 2"), "backend-ranks", 4, 35),
]  # fmt: skip


@pytest.mark.parametrize(("text", "code", "line", "column"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_one_clear_error_at_its_place(text: str | bytes, code: str, line: int, column: int, tmp_path: Path) -> None:
    path = tmp_path / "model_registry.yml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.process_time()
    with pytest.raises(RegistryInvalid) as caught:
        load_registry(path, tmp_path)
    seconds = time.process_time() - start
    errors = [issue for issue in caught.value.issues if issue.severity == "error"]
    assert [(issue.code, issue.line, issue.column) for issue in errors] == [(code, line, column)]
    (issue,) = errors
    assert issue.headline().startswith(f"model_registry.yml:{line}:{column}: error[{code}] ")
    assert "\n" not in issue.headline()
    assert issue.message
    assert issue.hint
    assert len(issue.headline()) < 300
    assert caught.value.exit_code == 3
    assert seconds < 1.0


def test_there_are_many_cases() -> None:
    assert len(CASES) >= 150
    assert len({case[0] for case in CASES}) == len(CASES)


def test_all_errors_of_one_file_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(
        "version: 3\n"
        "defaults: {dtpye: auto}\n"
        "models:\n"
        "  a: {model: x, port: 99999, tp: 0}\n"
        "  b: {dtype: auto}\n"
        "  c: {model: x, max-num-seqs: 9, max-num-batched-tokens: 3}\n"
        "  A: {model: x}\n"
    )
    registry, issues = check_registry(path, tmp_path)
    assert registry is None
    assert [(issue.line, issue.code) for issue in issues] == [
        (1, "unknown-value"),
        (2, "unknown-key"),
        (4, "out-of-range"),
        (4, "out-of-range"),
        (5, "missing-key"),
        (6, "step-budget"),
        (7, "name-clash"),
    ]


CROWDS = {
    "unknown keys": "models: {m: {model: x, " + ", ".join(f"k{i}: 1" for i in range(40_000)) + "}}",
    "unknown bases": "models:\n" + "".join(f" m{i}: {{model: x, extends: d{i}}}\n" for i in range(5_000)),
    "unknown clusters": (
        "clusters:\n"
        + "".join(f" c{i}: {{nodes: [{{name: n, role: head, ip: 10.0.0.1}}]}}\n" for i in range(1_500))
        + "models:\n"
        + "".join(f" m{i}: {{model: x, cluster: d{i}}}\n" for i in range(1_500))
    ),
    "wrong values": "models:\n" + "".join(f" m{i}: {{model: x, port: q}}\n" for i in range(8_000)),
    "clashes": "models:\n" + "".join(f" m{i}: {{model: x, aliases: [a]}}\n" for i in range(5_000)),
    "nodes at one address": (
        "clusters: {c: {nodes: [{name: h, role: head, ip: 10.0.0.1}, "
        + ", ".join(f"{{name: n{i}, ip: 10.0.0.1}}" for i in range(1000))
        + "]}}\nmodels: {m: {model: x}}\n"
    ),
    "too many nodes": (
        "clusters: {c: {nodes: [" + ", ".join(f"{{name: n{i}, ip: 10.0.0.1}}" for i in range(10_000)) + "]}}\n" + ENTRY
    ),
}


@pytest.mark.parametrize("text", CROWDS.values(), ids=CROWDS)
def test_a_crowd_of_mistakes_is_refused_as_fast_as_one(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(text)
    start = time.process_time()
    registry, issues = check_registry(path, tmp_path)
    assert time.process_time() - start < 1.0
    assert registry is None
    assert 0 < len(issues) <= 3000
    assert all(issue.line and issue.column and issue.hint for issue in issues)


def test_a_folder_and_a_missing_file_are_errors_too(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.yml"):
        registry, issues = check_registry(path, tmp_path)
        assert registry is None
        assert [issue.code for issue in issues] == ["unreadable"]


def test_a_secret_is_never_quoted(tmp_path: Path) -> None:
    canary = "sk-canary-31337"
    texts = [
        entry(f"api-key: {canary}"),
        entry(f"api-key: '{canary} $X'"),
        entry(f"api-key: [{canary}]"),
        entry(f"api-key: {canary}: x"),
        entry(f"api-key: !tag {canary}"),
        entry(f"env: {{HF_TOKEN: {canary}}}"),
        entry(f"api-kay: {canary}"),
    ]
    for text in texts:
        path = tmp_path / "r.yml"
        path.write_text(text)
        _, issues = check_registry(path, tmp_path)
        assert issues
        assert canary not in repr([issue.as_dict() for issue in issues])
