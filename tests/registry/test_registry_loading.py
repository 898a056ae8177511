"""What a valid registry becomes: the seed's form, merge keys, spellings, warnings, the search for the file."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launcher.errors import RegistryNotFound
from launcher.registry import SecretRef, check_registry, find_registry, load_registry, parse_registry, resolve
from launcher.registry.locate import packaged_registry

SEED = Path(__file__).parent / "seed.yml"
ROOT = Path(__file__).parents[2]


def test_the_seed_registry_loads_unchanged() -> None:
    registry = load_registry(SEED)
    assert registry.issues == ()
    entry = resolve(registry, "gpt-oss-20b")
    given = {key: item.value for key, item in entry.values.items() if entry.is_set(key)}
    assert given == {
        "model": "openai/gpt-oss-20b",
        "dtype": "bfloat16",
        "tensor-parallel-size": 2,
        "gpu-memory-utilization": 0.35,
        "max-num-seqs": 8,
        "max-model-len": 131072,
        "description": "Lightweight",
    }


def test_our_own_registry_has_the_three_models() -> None:
    registry, issues = check_registry(ROOT / "model_registry.yml")
    assert issues == []
    assert registry is not None
    assert {name: entry.model for name, entry in registry.models.items()} == {
        "tiny-oss": "tiny-oss",
        "gpt-oss-20b": "openai/gpt-oss-20b",
        "gpt-oss-120b": "openai/gpt-oss-120b",
    }
    assert all(entry.description for entry in registry.models.values())


def test_the_packaged_registry_is_the_one_at_the_root() -> None:
    assert packaged_registry().read_bytes() == (ROOT / "model_registry.yml").read_bytes()


def test_scalars_are_read_by_our_rules() -> None:
    registry = parse_registry(
        "\ufeffmodels:\n"
        "  on:\n"
        "    model: 1.10\n"
        "    description: yes\n"
        "    served-model-name: [22:30, 2024-01-01, no]\n"
        "    max-num-seqs: 1e1\n"
        "    max_model_len: 128k\n"
        "    kv_cache_memory_bytes: 4GiB\n"
        "    seed: 0\n"
        "    drain-timeout: 1.5\n"
        "    tp: 2\n"
        "    dtype:\n"
        "    revision: ~\n"
        "    env: {A: 1.10, B: yes, C: '', D: }\n"
        "    x-note: {anything: [goes]}\n"
    )
    entry = resolve(registry, "on")
    assert entry.model == "1.10"
    assert entry["description"] == "yes"
    assert entry.texts("served-model-name") == ("22:30", "2024-01-01", "no")
    assert entry.integer("max-num-seqs") == 10
    assert entry.integer_or_none("max-model-len") == 131072
    assert entry.integer("kv-cache-memory-bytes") == 4 << 30
    assert entry.integer_or_none("seed") == 0
    assert entry.number("drain-timeout") == 1.5
    assert entry.integer("tensor-parallel-size") == 2
    assert not entry.is_set("dtype")
    assert not entry.is_set("revision")
    assert {name: item.value for name, item in entry.env.items()} == {"A": "1.10", "B": "yes", "C": "", "D": None}


@pytest.mark.parametrize("text", ["auto", "-1"])
def test_auto_length_overrides_a_default_length(text: str) -> None:
    registry = parse_registry(f"defaults: {{max-model-len: 8k}}\nmodels: {{m: {{model: x, max-model-len: {text}}}}}\n")
    assert resolve(registry, "m").integer_or_none("max-model-len") is None


def test_merge_keys_keep_the_place_of_the_text() -> None:
    text = (
        "x-base: &base\n"
        "  max_num_seqs: 4\n"
        "  enforce-eager: true\n"
        "x-more: &more {max-num-seqs: 5, port: 9000}\n"
        "models:\n"
        "  m:\n"
        "    <<: [*base, *more]\n"
        "    model: x\n"
        "    enforce-eager: false\n"
    )
    entry = resolve(parse_registry(text, "r.yml"), "m")
    assert entry.integer("max-num-seqs") == 4
    assert entry.integer("port") == 9000
    assert entry.flag("enforce-eager") is False
    assert str(entry.origin("max-num-seqs")) == "model (r.yml:2:17)"
    assert str(entry.origin("port")) == "model (r.yml:4:39)"


def test_an_error_in_merged_text_points_at_the_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text("x-base: &base {port: 0}\nmodels:\n  m: {<<: *base, model: x}\n")
    _, issues = check_registry(path)
    assert [(issue.code, issue.line, issue.column) for issue in issues] == [("out-of-range", 1, 22)]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("host: 0.0.0.0", "open-server"),
        ("api-key: sk-written-down", "secret-literal"),
        ("env: {HF_TOKEN: hf_written_down}", "secret-literal"),
    ],
)
def test_what_works_but_is_unwise_warns(line: str, code: str) -> None:
    registry = parse_registry(f"models:\n  m:\n    model: x\n    {line}\n")
    assert [(issue.severity, issue.code, issue.line) for issue in registry.issues] == [("warning", code, 4)]


def test_a_guarded_open_server_does_not_warn() -> None:
    for line in ("api-key: ${KEY}", "api-key: file:/run/secrets/key", "insecure-no-auth: true"):
        registry = parse_registry(f"models:\n  m:\n    model: x\n    host: 0.0.0.0\n    {line}\n")
        assert registry.issues == ()
    assert isinstance(
        resolve(parse_registry("models: {m: {model: x, api-key: '${K}'}}"), "m").secret("api-key"), SecretRef
    )


def test_a_thousand_models_load_in_time(tmp_path: Path) -> None:
    lines = [
        f"  model-{i}:\n    model: org/model-{i}\n    dtype: bfloat16\n    tensor-parallel-size: 2\n"
        f"    gpu-memory-utilization: 0.35\n    max-num-seqs: 8\n    max-model-len: 128k\n    description: number {i}\n"
        for i in range(1000)
    ]
    path = tmp_path / "r.yml"
    path.write_text("models:\n" + "".join(lines))
    start = time.process_time()  # CPU time: a busy machine is not a slow loader
    registry = load_registry(path)
    assert len(registry.models) == 1000
    assert time.process_time() - start < 1.5


def test_the_search_takes_the_first_place(tmp_path: Path) -> None:
    config = tmp_path / "xdg"
    environ = {"XDG_CONFIG_HOME": str(config)}
    places = [
        config / "hlaunch" / "model_registry.yml",
        tmp_path / "hlaunch.yml",
        tmp_path / "config" / "model_registry.yml",
        tmp_path / "model_registry.yml",
    ]
    assert find_registry(None, environ, tmp_path) == packaged_registry()
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("models: {}\n")
        assert find_registry(None, environ, tmp_path) == place
    named = tmp_path / "named.yml"
    named.touch()
    assert find_registry(None, {**environ, "HLAUNCH_REGISTRY": "named.yml"}, tmp_path) == named
    assert find_registry(SEED, {**environ, "HLAUNCH_REGISTRY": "named.yml"}, tmp_path) == SEED


def test_a_named_registry_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(RegistryNotFound, match="does not exist") as caught:
        find_registry(Path("absent.yml"), {}, tmp_path)
    assert caught.value.exit_code == 3
    with pytest.raises(RegistryNotFound, match="is a folder"):
        find_registry(None, {"HLAUNCH_REGISTRY": str(tmp_path)}, tmp_path)
