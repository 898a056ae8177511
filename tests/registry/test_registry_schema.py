"""One table, no drift: JSON schema, commented reference, engine defaults and loader say the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from engine.config import CacheConfig, EngineConfig, SchedulerConfig, ServerConfig
from launcher.registry import Cluster, Node, RaySettings, RegistryInvalid, parse_registry, resolve
from launcher.registry.keys import CLUSTER, ENVIRONMENT, KEYS, NODE, SPELLINGS, Kind
from launcher.registry.reference import cluster_reference_lines, reference_lines, replace_reference
from launcher.registry.schema import document_model, json_schema, json_schema_text

ROOT = Path(__file__).parents[2]
REGISTRY = ROOT / "model_registry.yml"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_committed_schema_is_the_generated_one() -> None:
    committed = (ROOT / "model_registry.schema.json").read_text(encoding="utf-8")
    assert committed == json_schema_text(), "run: python -m launcher.registry.reference"
    assert (ROOT / "launcher" / "model_registry.schema.json").read_text(encoding="utf-8") == committed


def test_the_commented_reference_is_the_generated_one() -> None:
    text = REGISTRY.read_text(encoding="utf-8")
    assert text == replace_reference(text), "run: python -m launcher.registry.reference"
    assert text.splitlines()[0] == "# yaml-language-server: $schema=./model_registry.schema.json"


def test_the_reference_uncommented_is_an_entry_with_every_key() -> None:
    lines = list(reference_lines())
    text = "models:\n  m:\n" + "".join(f"    {line}\n" for line in lines)
    entry = resolve(parse_registry(text), "m")
    for key, item in entry.values.items():
        assert item.value == (KEYS[key].default if key != "model" else "tiny-oss"), key
    written = {line.strip().split(":")[0] for line in lines if not line.strip().startswith("#")}
    assert {part for key in KEYS for part in key.split(".")} <= written


def test_the_cluster_reference_uncommented_is_a_cluster_with_every_default() -> None:
    lines = list(cluster_reference_lines())
    registry = parse_registry("\n".join(lines) + "\nmodels: {m: {model: x}}\n")
    nodes = (Node("spark-01", "head", "192.168.100.1"),)
    assert registry.clusters["pair"].cluster == Cluster("pair", nodes, ray=RaySettings())
    written = {line.strip().removeprefix("- ").split(":")[0] for line in lines if not line.strip().startswith("#")}
    assert {part for key in (*CLUSTER.specs, *NODE.specs) for part in key.split(".")} <= written


def test_every_key_says_default_and_meaning() -> None:
    for spec in (*KEYS.values(), *CLUSTER.specs.values(), *NODE.specs.values()):
        assert spec.summary
        assert spec.describe_default()
        if spec.kind in (Kind.INTEGER, Kind.NUMBER, Kind.SIZE, Kind.DURATION, Kind.TOKENS):
            assert spec.describe_range(), spec.key
        if spec.kind in (Kind.SIZE, Kind.DURATION, Kind.TOKENS):
            assert spec.unit, spec.key


def test_names_are_unambiguous() -> None:
    assert len(SPELLINGS) == len({*SPELLINGS})
    assert set(SPELLINGS.values()) == set(KEYS)
    assert len(ENVIRONMENT) == len(set(ENVIRONMENT.values()))
    for spec in KEYS.values():
        assert re.fullmatch(r"[a-z]+([-.][a-z]+)*", spec.key)


def test_the_schema_knows_exactly_the_tables_keys() -> None:
    schema = json_schema()
    assert set(schema["$defs"]["Model"]["properties"]) == {key.split(".")[0] for key in KEYS} | {
        "profiles",
        "overrides",
    }
    assert schema["$defs"]["Model"]["additionalProperties"] is False
    assert schema["$defs"]["Model"]["anyOf"] == [{"required": ["model"]}, {"required": ["extends"]}]
    assert document_model().model_config["extra"] == "forbid"


def test_defaults_are_the_engines() -> None:
    scheduler, cache, server, engine = SchedulerConfig(), CacheConfig(), ServerConfig(), EngineConfig(model="x")
    expected = {
        "max-num-seqs": scheduler.max_num_seqs,
        "max-num-batched-tokens": scheduler.max_num_batched_tokens,
        "scheduling-policy": scheduler.policy,
        "block-size": cache.block_size,
        "host": server.host,
        "port": server.port,
        "drain-timeout": server.drain_timeout_seconds,
        "max-body-size": server.max_body_bytes,
        "step-timeout": engine.step_timeout_seconds,
    }
    assert {key: KEYS[key].default for key in expected} == expected


def test_block_sizes_are_those_the_engine_takes() -> None:
    for size in KEYS["block-size"].values:
        EngineConfig(model="x", cache=CacheConfig(block_size=size))


GOOD = [
    "models: {m: {model: x}}",
    "version: 1\nmodels: {m: {model: org/x, max_model_len: 128k, tp: 2, env: {A: 1, B: }}}",
    "models: {m: {model: x, kv-cache-memory-bytes: 4GiB, ready: {timeout: 5m}, aliases: a}}",
    "x-a: 1\nmodels: {m: {model: x, x-b: 2, max-model-len: -1, dtype: }}",
    "defaults: {max-num-seqs: 3}\nmodels: {m: {model: x, tags: [a, b], api-key: '${K}'}}",
    "profiles: {p: {tp: 2}}\n"
    "models: {m: {model: x, profiles: {q: {port: 1}}}, n: {extends: m, overrides: {cpu: {tp: 2}}}}",
    "clusters: {c: {ray: {worker-ports: 10002-19999}, nodes: [{name: n, role: head, ip: 1.0.0.1, gpu_memory: 1GiB}]}}\n"
    "models: {m: {model: x, cluster: c, placement: {nodes: n}}}",
]
BAD = [
    "models: {}",
    "models: {m: {}}",
    "models: {m: {model: x, bogus: 1}}",
    "models: {m: {model: -x}}",
    "models: {m: {model: x, tp: 0}}",
    "models: {m: {model: x, port: 70000}}",
    "models: {m: {model: x, port: '8000'}}",
    "models: {m: {model: x, dtype: int8}}",
    "models: {m: {model: x, block-size: 24}}",
    "models: {m: {model: x, gpu-memory-utilization: 0}}",
    "models: {m: {model: x, kv-cache-memory-bytes: 4G}}",
    "models: {m: {model: x, enforce-eager: maybe}}",
    "models: {m: {model: x, env: {A-B: 1}}}",
    "models: {-m: {model: x}}",
    "version: 2\nmodels: {m: {model: x}}",
    "defaults: {model: x}\nmodels: {m: {model: x}}",
    "profiles: {p: {model: x}}\nmodels: {m: {model: x}}",
    "profiles: [p]\nmodels: {m: {model: x}}",
    "models: {m: {model: x, overrides: {h100: {tp: 2}}}}",
    "models: {m: {model: x, overrides: {cpu: {cluster: c}}}}",
    "clusters: {c: {}}\nmodels: {m: {model: x}}",
    "clusters: {c: {nodes: [{name: n, role: head}]}}\nmodels: {m: {model: x}}",
    "clusters: {c: {nodes: [{name: n, role: boss, ip: 10.0.0.1}]}}\nmodels: {m: {model: x}}",
    "clusters: {c: {rays: {}, nodes: [{name: n, role: head, ip: 10.0.0.1}]}}\nmodels: {m: {model: x}}",
    "clusters: {c: {ray: {port: 22}, nodes: [{name: n, role: head, ip: 1.0.0.1}]}}\nmodels: {m: {model: x}}",
]


@pytest.mark.parametrize("text", GOOD)
def test_editor_and_loader_accept_the_same(text: str, validator: jsonschema.Draft202012Validator) -> None:
    parse_registry(text)
    assert list(validator.iter_errors(yaml.safe_load(text))) == []


@pytest.mark.parametrize("text", BAD)
def test_editor_and_loader_refuse_the_same(text: str, validator: jsonschema.Draft202012Validator) -> None:
    with pytest.raises(RegistryInvalid):
        parse_registry(text)
    assert list(validator.iter_errors(yaml.safe_load(text)))


def test_our_registry_and_the_seed_satisfy_the_committed_schema() -> None:
    schema = json.loads((ROOT / "model_registry.schema.json").read_text(encoding="utf-8"))
    for path in (REGISTRY, Path(__file__).parent / "seed.yml", ROOT / "examples" / "two-nodes.yml"):
        jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_the_page_names_every_code_that_a_registry_can_get() -> None:
    page = (ROOT / "docs" / "registry.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.partition("## Codes")[2].splitlines() if line.startswith("| `")]
    table = set(re.findall(r"`([a-z0-9-]+)`", " ".join(rows)))
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "launcher" / "registry").glob("*.py")))
    words = set(re.findall(r'"((?:[a-z0-9]+-)+[a-z0-9]+|empty|syntax|unreadable)"', source))
    keys = {part for key in (*KEYS, *CLUSTER.specs, *NODE.specs) for part in (key, key.partition(".")[2])}
    others = {"utf-8", "utf-8-sig", "ray-cgraph", "strict-pack", "strict-spread", "secret-unset", "built-in"}
    others |= {"prefill-context-parallel-size", "decode-context-parallel-size", "num-scheduler-steps", "auto-pin"}
    others |= {"spark-01", "tiny-oss", "gpt-oss-20b"}
    assert words - keys - others == table
