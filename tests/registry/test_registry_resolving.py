"""Layers: what wins, what it hides, how a value from outside the file is typed, and what its errors say."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from registry_support import REGISTRY, ROOT, SEED, one

from launcher.errors import Issue, OverrideError, RegistryInvalid, UnknownModel
from launcher.registry import Layer, SecretRef, Value, load_registry, parse_registry, resolve
from launcher.registry.keys import DASHED, ENVIRONMENT, ENVIRONMENT_ALIASES, KEYS, Kind
from launcher.registry.overriding import list_text, read_text


def wrong(text: str) -> list[Issue]:
    with pytest.raises(RegistryInvalid) as caught:
        parse_registry(text)
    return [issue for issue in caught.value.issues if issue.severity == "error"]


def refused(*overrides: str, **environ: str) -> Issue:
    with pytest.raises(OverrideError) as caught:
        one("", environ, overrides)
    assert caught.value.exit_code == 2
    (issue,) = (issue for issue in caught.value.issues if issue.severity == "error")
    assert issue.line is None
    return issue


def test_the_seed_loads_unchanged() -> None:
    registry = load_registry(SEED, SEED.parent)
    assert registry.issues == ()
    entry = resolve(registry, "gpt-oss-20b")
    assert entry.model == "openai/gpt-oss-20b"
    assert entry.text("dtype") == "bfloat16"
    assert entry.integer("tensor-parallel-size") == 2
    assert entry.number("gpu-memory-utilization") == 0.35
    assert entry.integer("max-num-seqs") == 8
    assert entry.integer_or_none("max-model-len") == 131072
    assert entry.text("description") == "Lightweight"
    assert [item.key for item in entry.values.values() if item.origin.line is not None] == [
        "model",
        "dtype",
        "max-model-len",
        "max-num-seqs",
        "gpu-memory-utilization",
        "tensor-parallel-size",
        "description",
    ]


def test_the_registry_of_this_repository_is_valid_without_a_warning() -> None:
    registry = load_registry(ROOT / "model_registry.yml")
    assert registry.issues == ()
    assert list(registry.models) == ["tiny-oss", "gpt-oss-20b", "gpt-oss-120b"]
    for name in registry.models:
        assert resolve(registry, name).issues == ()


def test_every_layer_wins_over_the_ones_below_and_remembers_them() -> None:
    registry = parse_registry(REGISTRY, "r.yml")
    seqs = {"HLAUNCH_MAX_NUM_SEQS": "16"}
    stack = [
        (resolve(registry, "second", {}), 4),
        (resolve(registry, "first", {}), 8),
        (resolve(registry, "first", seqs), 16),
        (resolve(registry, "first", seqs, ["max-num-seqs=32"]), 32),
    ]
    for entry, expected in stack:
        assert entry.integer("max-num-seqs") == expected
    top = stack[-1][0].values["max-num-seqs"]
    assert str(top.origin) == "flag (--set max-num-seqs)"
    assert [(below.value, str(below.origin)) for below in top.shadowed] == [
        (KEYS["max-num-seqs"].default, "built-in"),
        (4, "defaults (r.yml:2:17)"),
        (8, "model (r.yml:10:19)"),
        (16, "environment ($HLAUNCH_MAX_NUM_SEQS)"),
    ]
    layers = [below.origin.layer for below in top.shadowed] + [top.origin.layer]
    assert layers == [layer for layer in Layer if layer in layers]
    assert resolve(registry, "second", {}).values["max-num-seqs"].origin.layer is Layer.DEFAULTS
    assert resolve(registry, "second", {}).values["port"].shadowed == ()


def test_variables_merge_by_name_and_an_empty_one_removes() -> None:
    registry = parse_registry(REGISTRY, "r.yml")
    first = resolve(registry, "first", {}, ["env.NEW=1", "env.SHARED="])
    assert {name: item.value for name, item in first.env.items()} == {"SHARED": None, "GONE": None, "NEW": "1"}
    assert [below.value for below in first.env["SHARED"].shadowed] == ["low", "high"]
    second = resolve(registry, "second", {})
    assert {name: item.value for name, item in second.env.items()} == {"SHARED": "low", "GONE": "x"}


def test_an_empty_value_leaves_a_layer_silent() -> None:
    registry = parse_registry("defaults: {port: 9000}\nmodels: {m: {model: x, port: , seed: ~, dtype: null}}")
    entry = resolve(registry, "m", {"HLAUNCH_PORT": ""}, ["port=", "port=null"])
    assert entry.integer("port") == 9000
    assert entry.values["port"].origin.layer is Layer.DEFAULTS
    assert not entry.is_set("seed")
    assert resolve(registry, "m", {}, ["port=1", "port="]).integer("port") == 9000


TYPED: list[tuple[str, Value]] = [
    ("port=8123", 8123),
    ("max-num-seqs=1e2", 100),
    ("max_num_seqs=7", 7),
    ("max-model-len=128k", 131072),
    ("max-model-len=auto", "auto"),
    ("max-model-len=-1", "auto"),
    ("tp=2", 2),
    ("tensor_parallel_size=2", 2),
    ("gpu-memory-utilization=0.5", 0.5),
    ("kv-cache-memory-bytes=4GiB", 4 << 30),
    ("kv-cache-memory-bytes=500MB", 500_000_000),
    ("drain-timeout=2m", 120.0),
    ("ready.timeout=1h", 3600.0),
    ("enforce-eager=true", True),
    ("enable-prefix-caching=False", False),
    ("dtype=bfloat16", "bfloat16"),
    ("served-model-name=a,b", ("a", "b")),
    ("served-model-name=[a, b]", ("a", "b")),
    ("served-model-name=[a, 'b', \"c\"]", ("a", "b", "c")),
    ("tool-call-parser=a=b", None),
    (" port =1", 1),
]


@pytest.mark.parametrize(("text", "value"), TYPED, ids=[case[0] for case in TYPED])
def test_set_and_variables_are_typed_alike(text: str, value: Value) -> None:
    key, _, written = text.partition("=")
    canonical = DASHED[key.strip().replace("_", "-")]
    variables = {spec: name for name, spec in ENVIRONMENT.items()}
    if value is None:
        assert refused(text).code == "bad-text"
        assert refused(**{variables[canonical]: written}).source == f"${variables[canonical]}"
        return
    by_flag = one("", {}, (text,)).values[canonical]
    by_variable = one("", {variables[canonical]: written}).values[canonical]
    assert by_flag.value == value
    assert type(by_flag.value) is type(value)
    assert by_variable.value == value
    assert by_flag.origin.layer is Layer.FLAG
    assert str(by_variable.origin) == f"environment (${variables[canonical]})"


def test_every_key_that_is_not_fixed_has_a_variable() -> None:
    named = set(ENVIRONMENT.values())
    assert named == {spec.key for spec in KEYS.values() if not spec.is_fixed and spec.kind is not Kind.VARIABLES}
    assert KEYS["ready.timeout"].environment == "HLAUNCH_READY_TIMEOUT"


def test_an_alias_has_a_variable_too() -> None:
    aliases = {alias: spec for spec in KEYS.values() for alias in spec.aliases if not spec.is_fixed}
    assert {"tp", "pp", "dp", "ep"} <= set(aliases)
    assert set(ENVIRONMENT_ALIASES.values()) == {spec.key for spec in aliases.values()}
    for alias, spec in aliases.items():
        written, value = ("true", True) if spec.kind is Kind.BOOLEAN else ("2", 2)
        item = one("", {f"HLAUNCH_{alias.upper()}": written}).values[spec.key]
        assert (item.value, item.origin.source) == (value, f"$HLAUNCH_{alias.upper()}")


def test_two_variables_of_one_option_must_agree() -> None:
    both = {"HLAUNCH_TP": "2", "HLAUNCH_TENSOR_PARALLEL_SIZE": "2"}
    assert one("", both).integer("tensor-parallel-size") == 2
    assert one("", {**both, "HLAUNCH_TENSOR_PARALLEL_SIZE": ""}).integer("tensor-parallel-size") == 2
    issue = refused(**{**both, "HLAUNCH_TENSOR_PARALLEL_SIZE": "4"})
    assert (issue.code, issue.source, issue.path) == ("two-spellings", "$HLAUNCH_TP", "tensor-parallel-size")
    assert "$HLAUNCH_TENSOR_PARALLEL_SIZE" in issue.message


LISTS = [
    ('[x, "y z"]', ("x", "y z")),
    ('x,"a, b"', ("x", "a, b")),
    ("['it''s', don't]", ("it's", "don't")),
    (r'"a \"b\" \\", c', ('a "b" \\', "c")),
    ('["x", y: #z]', ("x", "y: #z")),
]


@pytest.mark.parametrize(("text", "items"), LISTS)
def test_quotes_in_a_list_enclose_an_item(text: str, items: tuple[str, ...]) -> None:
    assert read_text(KEYS["tags"], text) == items
    assert read_text(KEYS["tags"], list_text(items)) == items


@pytest.mark.parametrize("text", ['["x, y]', '[x", y]', '["x" y, z]', "['x]", '"""'])
def test_quotes_that_do_not_match_are_one_error(text: str) -> None:
    issue = refused(f"served-model-name={text}")
    assert (issue.code, issue.message) == ("bad-text", "a quote is missing, or stands inside an item")
    assert issue.hint == 'write [x, "y z"]'


OVERRIDES = [
    ("prot=1", "unknown-key", "'port'"),
    ("dtype=bf16", "unknown-value", "'bfloat16'"),
    ("port", "bad-override", "key=value"),
    ("=1", "bad-override", "key=value"),
    ("", "bad-override", "key=value"),
    ("port=x", "wrong-type", "65535"),
    ("port=0", "out-of-range", "65535"),
    ("enforce-eager=yes", "wrong-type", "write true"),
    ("aliases=x", "fixed-key", "edit the entry"),
    ("env=x", "wrong-type", "env.NAME=value"),
    ("ready=3", "wrong-type", "ready.timeout=value"),
    ("env.A-B=1", "bad-name", "env.NAME=value"),
    ("env.A=${HOME}", "not-expanded", "export"),
    ("kv-cache-memory-bytes=4G", "wrong-type", "4GiB"),
    ("trust-remote-code=true", "remote-code", "remove"),
    ("max-num-seqs=4000", "step-budget", "max-num-seqs <= 2048"),
]


@pytest.mark.parametrize(("text", "code", "hint"), OVERRIDES, ids=[case[0] or "empty" for case in OVERRIDES])
def test_a_bad_override_says_what_is_accepted(text: str, code: str, hint: str) -> None:
    issue = refused(text)
    assert issue.code == code
    assert issue.source.startswith("--set")
    assert hint in issue.hint


def test_all_bad_overrides_are_reported_and_an_unknown_variable_only_warns() -> None:
    with pytest.raises(OverrideError) as caught:
        one("", {"HLAUNCH_PORT": "x", "HLAUNCH_DTYPE": "y"}, ("port=z",))
    assert [issue.source for issue in caught.value.issues] == ["$HLAUNCH_DTYPE", "$HLAUNCH_PORT", "--set port"]
    entry = one("", {"HLAUNCH_PROT": "1", "HLAUNCH_REGISTRY": "x", "HLAUNCH_STATE_DIR": "y"})
    assert [(issue.severity, issue.code, issue.source) for issue in entry.issues] == [
        ("warning", "unknown-variable", "$HLAUNCH_PROT")
    ]
    assert entry.issues[0].hint.startswith("did you mean 'HLAUNCH_PORT'")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("models: {m: {model: x, gpu-memory-utilisation: 1}}", "'gpu-memory-utilization'"),
        ("models: {m: {model: x, max_num_seq: 1}}", "'max-num-seqs'"),
        ("models: {m: {model: x, Dtype: auto}}", "'dtype'"),
        ("models: {m: {model: x, dtype: blfoat16}}", "'bfloat16'"),
        ("models: {m: {model: x, scheduling-policy: fifo}}", "fcfs"),
        ("models: {m: {model: x, ready: {timout: 3s}}}", "'timeout'"),
        ("models: {m: {model: x, ready.timeout: 3s}}", "ready: {timeout: …}"),
        ("modles: {}\nmodels: {m: {model: x}}", "'models'"),
        ("defualts: {}\nmodels: {m: {model: x}}", "'defaults'"),
        ("models: {m: {model: x, zzzzzz: 1}}", "schema --keys"),
    ],
)
def test_did_you_mean_in_the_file(text: str, hint: str) -> None:
    (issue,) = wrong(text)
    assert hint in issue.hint


def test_did_you_mean_for_models() -> None:
    registry = parse_registry(REGISTRY, "r.yml")
    for name, hint in (("frist", "'first'"), ("FIRST", "'first'"), ("on", "'one'"), ("zzz", "hlaunch list")):
        with pytest.raises(UnknownModel) as caught:
            resolve(registry, name)
        assert hint in caught.value.hint
        assert caught.value.available == ("first", "second")
        assert caught.value.exit_code == 4


def test_two_spellings_of_one_key_are_one_mistake() -> None:
    for first, second in (
        ("tp", "tensor-parallel-size"),
        ("max-num-seqs", "max_num_seqs"),
        ("tp", "tensor_parallel_size"),
    ):
        (issue,) = wrong(f"models:\n  m:\n    model: x\n    {first}: 2\n    {second}: 2\n")
        assert (issue.code, issue.line) == ("two-spellings", 5)
        assert f"'{first}' (line 4) and '{second}'" in issue.message
    assert one("max_num_seqs: 3").integer("max-num-seqs") == 3
    assert one("pp: 3").integer("pipeline-parallel-size") == 3


def test_merge_keys_fill_what_the_entry_leaves_open() -> None:
    text = (
        "x-base: &base {model: a, port: 1, ready: {timeout: 1s}}\n"
        "x-more: &more {model: b, dtype: float32, max_num_seqs: 9}\n"
        "models:\n"
        "  m: {<<: *base, port: 2}\n"
        "  n:\n    <<: [*base, *more]\n    max-num-seqs: 3\n"
        "  o: {<<: *base, port: 99999}\n"
    )
    (issue,) = wrong(text)
    assert (issue.code, issue.line, issue.path) == ("out-of-range", 8, "models.o.port")
    registry = parse_registry(text.rpartition("  o:")[0], "r.yml")
    merged = resolve(registry, "m")
    assert (merged.model, merged.integer("port"), merged.number("ready.timeout")) == ("a", 2, 1.0)
    # A merged value points at the line where its text stands.
    assert str(merged.origin("model")) == "model (r.yml:1:23)"
    both = resolve(registry, "n")
    assert (both.model, both.text("dtype"), both.integer("max-num-seqs")) == ("a", "float32", 3)


def test_a_wrong_merged_value_is_reported_once_per_entry_at_its_text() -> None:
    issues = wrong("x-b: &b {model: a, prot: 1}\nmodels:\n  m: *b\n  n: {<<: *b}\n")
    assert {(issue.line, issue.column, issue.code) for issue in issues} == {(1, 20, "unknown-key")}
    assert {issue.path for issue in issues} == {"models.m.prot", "models.n.prot"}


def test_aliases_name_an_entry_and_are_unique_in_any_case() -> None:
    registry = parse_registry(REGISTRY)
    assert resolve(registry, "one").name == "first"
    for first, second in (("aliases: [B]", "tags: []"), ("aliases: c", "aliases: [d, C]")):
        (issue,) = wrong(f"models: {{a: {{model: x, {first}}}, b: {{model: x, {second}}}}}")
        assert issue.code == "name-clash"


def test_the_users_own_keys_are_skipped_where_options_stand() -> None:
    entry = one("x-note: [1, {a: b}]\nready: {x-why: slow disk, timeout: 9s}")
    assert entry.number("ready.timeout") == 9.0


def test_errors_of_rules_blame_the_layer_that_was_touched_last() -> None:
    with pytest.raises(OverrideError) as by_flag:
        one("max-num-seqs: 9", {}, ("max-num-batched-tokens=3",))
    assert by_flag.value.issues[0].source == "--set max-num-batched-tokens"
    with pytest.raises(OverrideError) as by_variable:
        one("max-num-seqs: 9", {"HLAUNCH_MAX_NUM_BATCHED_TOKENS": "3"})
    assert by_variable.value.issues[0].source == "$HLAUNCH_MAX_NUM_BATCHED_TOKENS"


def test_secrets_are_references() -> None:
    entry = one('api-key: "${SOME_KEY}"')
    secret = entry.secret("api-key")
    assert secret == SecretRef("env", "SOME_KEY")
    assert str(secret) == "${SOME_KEY}"
    assert secret is not None
    assert secret.reveal({"SOME_KEY": "v"}) == "v"
    assert "canary" not in repr(SecretRef.parse("canary"))


def test_a_secret_file_is_read_late_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "key"
    secret = SecretRef.parse(f"file:{path}")
    with pytest.raises(ValueError, match="No such file"):
        secret.reveal({})
    path.write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        secret.reveal({})
    path.write_text("abc\n")
    assert secret.reveal({}) == "abc"
    path.write_bytes(b"x" * (1 << 20))
    assert len(secret.reveal({})) == 64 << 10


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_any_override_is_typed_or_refused(key: str, value: str) -> None:
    for text in (f"{key}={value}", f"port={value}", f"env.{key}={value}", f"max-model-len={value}", key):
        issues: tuple[Issue, ...] = ()
        try:
            one("", {}, (text,))
        except OverrideError as error:
            issues = error.issues
        assert all(issue.hint for issue in issues if issue.severity == "error")
