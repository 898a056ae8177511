"""Imports: a valid registry comes out, every option of the source is accounted for, and no secret gets through."""

from __future__ import annotations

import json
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from registry_support import SEED, Here

from launcher.errors import RegistryInvalid
from launcher.fabric.declared import registry_issues
from launcher.plan.entry_checks import entry_issues
from launcher.registry import ResolvedEntry, parse_registry, resolve
from launcher.registry.flags import flags
from launcher.registry.importing import Imported, ImportRefused, from_config_file, from_model_registry, from_serve_line
from launcher.registry.importing.changes import entry_name
from launcher.registry.keys import KEYS

CONFIG = """\
# a file as people have it
model: openai/gpt-oss-20b
served_model_name: [a, b]
tensor-parallel-size: 2
max-model-len: 32K
swap-space: 4
enable-lora: true
no-enable-prefix-caching: true
api-key: canary-key
compilation-config: {mode: 3}
max-num-seqs: 4000
tensor-paralel-size: 3
quantization: awq
trust-remote-code: true
seed:
"""
DOTENV = """\
# node
NCCL_IB_HCA=roceP2p1s0f0
NCCL_IB_GID_INDEX=0
NCCL_SOCKET_IFNAME="enp1"
export NCCL_IB_TC=106   # lossless
NCCL_IB_GDR_DMABUF_ENABLE=1
NCCL_TIMEOUT=1800
NCCL_DEBUG=
HF_TOKEN=canary-token
RANK=1
WORLD_SIZE=2
VLLM_HOST_IP=192.168.100.1
VLLM_RAY_WORKER_ENV_VARS=NCCL_IB_DISABLE
RAY_VISIBLE_DEVICES=0
RAY_ADDRESS=192.168.100.1:6379
MODEL_NAME=gpt-oss-20b
EDITOR=vi
"""


def only(imported: Imported) -> ResolvedEntry:
    registry = parse_registry(imported.text)
    (name,) = registry.models
    return resolve(registry, name)


def judged(imported: Imported) -> None:
    """Judge what was written by all that `validate` has to say."""
    registry = parse_registry(imported.text)
    found = [*registry.issues, *registry_issues(registry), *entry_issues(registry, {})]
    assert [issue for issue in found if issue.severity == "error"] == []


def done(imported: Imported) -> dict[str, str]:
    return {change.source: change.action for change in imported.changes}


def test_a_vllm_configuration() -> None:
    imported = from_config_file(CONFIG, "c.yaml")
    entry = only(imported)
    assert entry.name == "gpt-oss-20b"
    assert entry.model == "openai/gpt-oss-20b"
    assert entry.texts("served-model-name") == ("a", "b")
    assert entry.integer("max-model-len") == 32768
    assert entry.integer("tensor-parallel-size") == 2
    assert entry.flag("enable-prefix-caching") is False
    assert str(entry.secret("api-key")) == "${HLAUNCH_API_KEY}"
    assert done(imported) == {
        "model: openai/gpt-oss-20b": "kept",
        "served_model_name: a,b": "renamed",
        "tensor-parallel-size: 2": "kept",
        "max-model-len: 32K": "kept",
        "swap-space: 4": "dropped",
        "enable-lora: true": "dropped",
        "no-enable-prefix-caching: true": "renamed",
        "api-key": "renamed",
        'compilation-config: {"mode": "3"}': "dropped",
        "max-num-seqs: 4000": "dropped",
        "tensor-paralel-size: 3": "dropped",
        "quantization: awq": "dropped",
        "trust-remote-code: true": "dropped",
        "seed: null": "dropped",
    }
    assert all(change.reason for change in imported.changes if change.action == "dropped")
    assert "canary" not in imported.text + repr(imported.changes)
    typo = next(change for change in imported.changes if "paralel" in change.source)
    assert "did you mean 'tensor-parallel-size'" in typo.reason


LINES = [
    ("vllm serve org/m", {"model": "org/m"}),
    ("vllm serve org/m --port 9000", {"port": 9000}),
    ("vllm serve --port=9000 org/m", {"port": 9000}),
    ("vllm serve org/m -tp 4 -pp2 -dp=2",
     {"tensor-parallel-size": 4, "pipeline-parallel-size": 2, "data-parallel-size": 2}),
    ("vllm serve org/m --enforce-eager --no-async-scheduling", {"enforce-eager": True, "async-scheduling": False}),
    ("vllm serve org/m --enable-prefix-caching=false", {"enable-prefix-caching": False}),
    ("vllm serve org/m --max_num_seqs 4", {"max-num-seqs": 4}),
    ("vllm serve org/m --max-model-len 4k --max-num-batched-tokens 8K",
     {"max-model-len": 4000, "max-num-batched-tokens": 8192}),
    ("vllm serve org/m --max-model-len -1", {"max-model-len": "auto"}),
    ("vllm serve org/m --kv-cache-memory-bytes 4G", {"kv-cache-memory-bytes": 4 << 30}),
    ("vllm serve org/m --served-model-name a b --seed 1", {"served-model-name": ("a", "b"), "seed": 1}),
    ("vllm serve org/m \\\n  --port 1 \\\n  --seed 2", {"port": 1, "seed": 2}),
    ("$ sudo env A=1 /opt/vllm/bin/vllm serve org/m --seed 2 2>&1 | tee log --port 3", {"seed": 2, "port": 8000}),
    ("python -m vllm.entrypoints.openai.api_server --model org/m --port 7", {"port": 7}),
    ("docker run --gpus all -p 8000:8000 -e A=B vllm/vllm-openai:v0.11 --model org/m --seed 3", {"seed": 3}),
    ("vllm serve org/m --compilation-config.mode 3 --seed 1", {"seed": 1}),
    ("vllm serve org/m --lora-modules a=b c=d --seed 1", {"seed": 1}),
    ("vllm serve org/m --bogus 3 --seed 1", {"seed": 1}),
    ("vllm serve org/m --hf-overrides '{\"a\": {\"b\": 1}}' --seed 1", {"seed": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "values"), LINES, ids=[str(number) for number in range(len(LINES))])
def test_command_lines_as_people_write_them(line: str, values: dict[str, object]) -> None:
    entry = only(from_serve_line(line))
    assert entry.model == "org/m"
    assert {key: entry[key] for key in values} == values


def test_variables_before_the_command_become_env() -> None:
    imported = from_serve_line("NCCL_DEBUG=INFO HF_TOKEN=canary vllm serve org/m --api-key canary --hf-token canary")
    entry = only(imported)
    assert {name: item.value for name, item in entry.env.items()} == {"NCCL_DEBUG": "INFO"}
    assert "canary" not in imported.text + repr(imported.changes)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "no `vllm serve` line"),
        ("vllm bench serve", "no `vllm serve` line"),
        ("vllm serve", "names no model"),
        ("vllm serve --port 3", "names no model"),
        ("vllm serve 'org/m", "not a command line"),
        ("vllm serve ''", "cannot be a model"),
    ],
)
def test_what_is_no_serve_line_is_refused(line: str, why: str) -> None:
    with pytest.raises(ImportRefused, match=why) as caught:
        from_serve_line(line)
    assert caught.value.exit_code == 2


def test_the_seeds_registry_and_its_env() -> None:
    imported = from_model_registry(SEED.read_text(), "seed.yml", DOTENV)
    entry = only(imported)
    plain = resolve(parse_registry(SEED.read_text()), "gpt-oss-20b")
    assert {key: item.value for key, item in entry.values.items()} == {
        key: item.value for key, item in plain.values.items()
    }
    assert {name: item.value for name, item in entry.env.items()} == {"NCCL_IB_TC": "106", "NCCL_DMABUF_ENABLE": "1"}
    actions = {change.source.partition("=")[0]: change for change in imported.changes}
    assert actions["NCCL_IB_GDR_DMABUF_ENABLE"].action == "renamed"
    for name in ("NCCL_TIMEOUT", "VLLM_RAY_WORKER_ENV_VARS", "RAY_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "HF_TOKEN"):
        assert actions[name].action == "dropped"
        assert actions[name].reason
    assert "hcas" in actions["NCCL_IB_HCA"].reason
    assert "ifname" in actions["NCCL_SOCKET_IFNAME"].reason
    assert "canary" not in imported.text + repr(imported.changes)
    names = [line.split("=")[0].removeprefix("export ") for line in DOTENV.splitlines() if "=" in line]
    assert set(names) <= set(actions)


def test_items_of_a_list_stay_whole() -> None:
    imported = from_model_registry("models: {m: {model: org/m, tags: ['a, b', 'say \"c\"', d]}}", "r.yml")
    assert only(imported).texts("tags") == ("a, b", 'say "c"', "d")


def test_a_registry_with_unusable_parts() -> None:
    text = "x: 1\nmodels:\n  a b: {model: org/a, temperature: 1}\n  c: {dtype: auto}\n  d: [x]\n"
    imported = from_model_registry(text, "r.yml")
    assert list(parse_registry(imported.text).models) == ["a-b"]
    assert done(imported) == {
        "x:": "dropped",
        "a b": "renamed",
        "model: org/a": "kept",
        "temperature: 1": "dropped",
        "models.c": "dropped",
        "models.d": "dropped",
    }


@pytest.mark.parametrize("text", ["", "- a", "x", "models: []", "models: {a: {}}", "models: {}"])
def test_what_is_no_registry_is_refused(text: str) -> None:
    with pytest.raises(ImportRefused) as caught:
        from_model_registry(text, "r.yml")
    assert caught.value.exit_code == 2
    with pytest.raises(ImportRefused):
        from_config_file(text, "r.yml")


def test_broken_yaml_has_its_place() -> None:
    with pytest.raises(RegistryInvalid) as caught:
        from_config_file("model: [\n", "c.yaml")
    assert (caught.value.issues[0].line, caught.value.issues[0].column) == (1, 9)
    with pytest.raises(RegistryInvalid):
        from_model_registry("a: !!python/none x", "c.yaml")


def test_every_option_of_the_table_is_accounted_for() -> None:
    for flag in flags().values():
        if flag.name == "model":
            continue
        imported = from_serve_line(f"vllm serve org/m --{flag.name}=1")
        (change,) = imported.changes[1:]
        assert change.action == "dropped" or flag.status == "native"
        assert change.action != "dropped" or change.reason
        judged(imported)


REFUSED = [
    ("tool-call-parser", "openai", "takes it from the model"),
    ("reasoning-parser", "openai_gptoss", "takes it from the model"),
    ("tokenizer", "x/y", "takes it from the model"),
    ("dtype", "half", "computes in bfloat16"),
    ("dtype", "float16", "computes in bfloat16"),
    ("kv-cache-dtype", "fp8", "computes in bfloat16"),
]


@pytest.mark.parametrize(("key", "value", "why"), REFUSED, ids=[f"{key}-{value}" for key, value, _ in REFUSED])
def test_a_value_that_every_plan_refuses_is_dropped_with_the_reason(here: Here, key: str, value: str, why: str) -> None:
    here.write(f"model: openai/gpt-oss-20b\n{key.replace('-', '_')}: {value}\n", "c.yaml")
    here.write(f"models: {{m: {{model: openai/gpt-oss-20b, {key}: {value}}}}}", "seed.yml")
    for source in (
        ("vllm-serve", f"vllm serve openai/gpt-oss-20b --{key} {value} --enable-auto-tool-choice"),
        ("vllm-config", "c.yaml"),
        ("mixvllm", "seed.yml"),
    ):
        result = here("import", *source, "-o", "model_registry.yml", "--force", "--json")
        assert result.code == 0
        found = json.loads(result.out)["changes"]
        (change,) = [item for item in found if item["source"].lstrip("-").replace("_", "-").startswith(key)]
        assert (change["action"], change["result"]) == ("dropped", None)
        assert why in change["reason"]
        assert here("validate").code == 0


def test_what_the_files_of_a_model_forbid_is_dropped(here: Here) -> None:
    line = "vllm serve tiny-oss --tensor-parallel-size 3 --max-model-len 1000000 --seed 1"
    result = here("import", "vllm-serve", line, "-o", "model_registry.yml", "--force", "--json")
    found = {change["source"]: change for change in json.loads(result.out)["changes"]}
    assert found["--seed 1"]["action"] == "kept"
    for source, why in (("--tensor-parallel-size 3", "cannot be split over 3 ranks"), ("--max-model-len 1000000", "")):
        assert (found[source]["action"], found[source]["result"]) == ("dropped", None)
        assert why in found[source]["reason"]
    assert here("validate").out == "model_registry.yml: valid, 1 model\n"


def test_a_model_whose_files_cannot_be_served_is_dropped_whole(here: Here) -> None:
    (here.folder / "llama").mkdir()
    here.write('{"architectures": ["Other"]}', "llama/config.json")
    here.write("models: {a: {model: ./llama, tp: 2}, b: {model: tiny-oss}}", "seed.yml")
    result = here("import", "mixvllm", "seed.yml", "-o", "model_registry.yml", "--force", "--json")
    found = json.loads(result.out)["changes"]
    assert [(change["action"], change["source"]) for change in found] == [
        ("kept", "model: tiny-oss"),
        ("dropped", "models.a"),
    ]
    assert found[1]["reason"]
    assert here("validate").code == 0
    refused = here("import", "vllm-serve", "vllm serve ./llama", "-o", "other.yml")
    assert refused.code == 2
    assert "models.llama: " in refused.err
    assert not (here.folder / "other.yml").exists()


WORDS = st.one_of(
    st.sampled_from([f"--{name}" for name in flags()]),
    st.sampled_from(sorted({choice for spec in KEYS.values() for choice in spec.choices})),
    st.sampled_from(["-tp", "-O3", "--", "-", "1", "true", "{}", "=", "a=b", "org/m", "--no-x", "|", "${X}", "auto"]),
    st.text(max_size=10),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS, max_size=12))
def test_any_command_line_gives_a_registry_or_a_refusal(words: list[str]) -> None:
    try:
        imported = from_serve_line("vllm serve " + " ".join(map(shlex.quote, words)))
    except ImportRefused:
        return
    judged(imported)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.one_of(st.sampled_from(sorted(flags())), st.text(max_size=8)), st.text(max_size=12), max_size=6)
)
def test_any_configuration_gives_a_registry(options: dict[str, str]) -> None:
    text = json.dumps({"model": "org/m", **{key: value for key, value in options.items() if "model" not in key}})
    try:
        imported = from_config_file(text, "c.yaml")
    except RegistryInvalid:
        return
    assert len(imported.changes) >= 1
    judged(imported)


def test_names_of_entries() -> None:
    names = {"openai/gpt-oss-20b": "gpt-oss-20b", "/srv/My Model/": "my-model", "~/x": "x", "//": "model", "a:b": "a-b"}
    assert {model: entry_name(model) for model in names} == names


def test_the_commands(here: Here) -> None:
    (here.folder / "model_registry.yml").unlink()
    here.write(CONFIG, "c.yaml")
    shown = here("import", "vllm-config", "c.yaml")
    assert shown.code == 0
    parse_registry(shown.out)
    assert shown.err.splitlines()[-2] == "3 kept, 3 renamed, 8 dropped"
    assert here("import", "vllm-config", "c.yaml", "--name", "mine", "-o", "model_registry.yml").code == 0
    assert here("validate").out == "model_registry.yml: valid, 1 model\n"
    assert here("show", "mine").code == 0
    assert here("import", "vllm-config", "c.yaml", "-o", "model_registry.yml").code == 2
    assert here("import", "vllm-serve", "vllm serve org/x", "-o", "model_registry.yml", "--force").code == 0
    facts = json.loads(here("import", "vllm-serve", "vllm serve org/x --seed 1 --swap-space 2", "--json").out)
    parse_registry(facts["registry"])
    assert [change["action"] for change in facts["changes"]] == ["kept", "kept", "dropped"]
    here.write(DOTENV, ".env")
    here.write(SEED.read_bytes(), "seed.yml")
    assert here("import", "mixvllm", "seed.yml", "--env", ".env").code == 0
    assert here("import", "mixvllm", "absent.yml").code == 2
    assert here("import", "vllm-serve", "ls").code == 2
    here.write("model: [", "broken.yaml")
    assert here("import", "vllm-config", "broken.yaml").code == 3
    assert here("import", "--help").code == 0


def changes_of(imported: Imported) -> dict[str, tuple[str, str]]:
    return {change.source: (change.action, change.result or change.reason) for change in imported.changes}


def test_a_key_in_the_environment_becomes_a_reference() -> None:
    for before in (
        "VLLM_API_KEY=sk-canary vllm",
        "export VLLM_API_KEY=sk-canary; vllm",
        "docker run -e VLLM_API_KEY v vllm",
    ):
        imported = from_serve_line(f"{before} serve org/m --host 0.0.0.0")
        assert str(only(imported).secret("api-key")) == "${HLAUNCH_API_KEY}"
        assert changes_of(imported)["VLLM_API_KEY"] == ("renamed", "api-key: ${HLAUNCH_API_KEY}")
        assert "canary" not in imported.text + repr(imported.changes)


def test_every_option_of_docker_is_reported() -> None:
    line = (
        "sudo docker run --rm --gpus all -p 9000:8000 -v ~/.cache:/root/.cache --ipc=host --network host"
        " -e NCCL_DEBUG=INFO --env HF_TOKEN -e DEBUG vllm/vllm-openai:latest vllm serve org/m -tp 2"
    )
    imported = from_serve_line(line)
    found = changes_of(imported)
    entry = only(imported)
    assert entry.integer("port") == 9000
    assert entry.model == "org/m"
    assert entry.env["NCCL_DEBUG"].value == "INFO"
    assert found["-p 9000:8000"] == ("renamed", "port: 9000")
    assert {
        "--rm",
        "--gpus all",
        "-v ~/.cache:/root/.cache",
        "--ipc host",
        "--network host",
        "-e DEBUG",
    } <= found.keys()
    assert all(action != "dropped" or reason for action, reason in found.values())
    assert "container.ipc" in found["--ipc host"][1]


@pytest.mark.parametrize(
    ("publish", "options", "port"),
    [
        ("-p 9000:8000", "", 9000),
        ("-p9000:8000/tcp", "", 9000),
        ("--publish=127.0.0.1:9000:8000", "", 9000),
        ("-p 9000:7777", "--port 7777", 9000),
        ("-p 9000:7777", "", 8000),
        ("-p 8000", "", 8000),
        ("-p 9000-9001:8000-8001", "", 8000),
    ],
)
def test_the_published_port_is_where_clients_come_to(publish: str, options: str, port: int) -> None:
    assert only(from_serve_line(f"docker run {publish} vllm-openai org/m {options}")).integer("port") == port


def test_a_port_behind_a_published_one_is_not_reported_as_kept() -> None:
    line = "docker run -p {}:8000 vllm/vllm-openai --model org/m --port 8000"
    found = {change.source: change for change in from_serve_line(line.format(9000)).changes}
    assert (found["-p 9000:8000"].action, found["-p 9000:8000"].result) == ("renamed", "port: 9000")
    assert (found["--port 8000"].action, found["--port 8000"].result) == ("dropped", "")
    assert "-p 9000:8000" in found["--port 8000"].reason
    same = {change.source: change for change in from_serve_line(line.format(8000)).changes}
    assert (same["--port 8000"].action, same["--port 8000"].result) == ("kept", "port: 8000")


def test_the_options_of_a_named_config_stand_below_the_line() -> None:
    text = "model: org/m\ntensor_parallel_size: 4\nport: 1234\n"
    imported = from_serve_line("vllm serve --config c.yaml -tp 2", None, {"c.yaml": text}.get)
    entry = only(imported)
    assert (entry.model, entry.integer("tensor-parallel-size"), entry.integer("port")) == ("org/m", 2, 1234)
    assert only(from_serve_line("vllm serve org/n --config c.yaml", None, {"c.yaml": text}.get)).model == "org/n"
    with pytest.raises(ImportRefused) as caught:
        from_serve_line("vllm serve --config gone.yaml", None, lambda path: None)
    assert "hlaunch import vllm-config gone.yaml" in caught.value.details[0]


@pytest.mark.parametrize(
    "line",
    [
        "vllm serve org/m # don't forget",
        "# first\nvllm serve org/m  # a second model?\n# last",
        "vllm serve \\\n  org/m # why not\n",
    ],
)
def test_comments_are_no_models(line: str) -> None:
    assert done(from_serve_line(line)) == {"model org/m": "kept"}


def test_a_quotation_keeps_its_hash_and_its_lines() -> None:
    imported = from_serve_line("vllm serve org/m --chat-template '{\n a #b}' --served-model-name 'a#b'")
    assert any("a #b" in change.source for change in imported.changes)
    assert any("a#b" in change.source for change in imported.changes)


def test_a_line_without_quotes_is_taken_whole(here: Here) -> None:
    result = here("import", "vllm-serve", "vllm", "serve", "org/m", "--tp", "2", "--max-model-len=1k", "--name", "mine")
    assert result.code == 0, result.err
    assert resolve(parse_registry(result.out), "mine").integer("tensor-parallel-size") == 2


def test_what_lint_says_of_variables_is_reported() -> None:
    dotenv = "NCCL_NET_GDR_LEVEL=5\nNCCL_IB_TIMEOUT=23\nNCCL_NET_PLUGIN=/opt/plugin.so\nNCCL_IB_DISABLE=true\n"
    imported = from_model_registry("models: {m: {model: org/m}}", "r.yml", dotenv)
    found = {change.source: change for change in imported.changes}
    assert found["NCCL_NET_GDR_LEVEL=5"].result == "env.NCCL_NET_GDR_LEVEL: SYS"
    assert found["NCCL_NET_GDR_LEVEL=5"].action == "renamed"
    assert (found["NCCL_IB_TIMEOUT=23"].action, found["NCCL_NET_PLUGIN=/opt/plugin.so"].action) == ("kept", "kept")
    assert "unreported" in found["NCCL_IB_TIMEOUT=23"].reason
    assert "every node" in found["NCCL_NET_PLUGIN=/opt/plugin.so"].reason
    assert found["NCCL_IB_DISABLE=true"].action == "dropped"
    assert only(imported).env["NCCL_NET_GDR_LEVEL"].value == "SYS"
