"""The rendered files: valid by schema and binary, equal to our model, free of secrets, the same bytes every time."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_support import CPU, GPU, VARIABLES, compose, compose_binary, make_plan, read_back, write_files
from jsonschema import Draft7Validator

from engine.config import EngineConfig
from launcher.compose.host import OVERRIDE_FILE, HostFacts, host_override
from launcher.compose.lint import lint
from launcher.compose.render import render
from launcher.errors import HlaunchError
from launcher.registry.cluster import Cluster, Container, Node
from launcher.supervise.node_spec import NodeSpec

SCHEMA = json.loads(Path(__file__).with_name("compose-spec.json").read_text())
THREE = replace(GPU, nodes=(*GPU.nodes, Node("spark-03", "worker", "192.168.100.3", gpus=1)))
BRIDGE = replace(CPU, container=replace(CPU.container, network="hl-fabric"))
CASES = [("tiny-oss", CPU), ("gpt-oss-20b", GPU), ("gpt-oss-20b", THREE), ("open", BRIDGE), ("local", CPU)]
IDS = ["cpu", "gpu", "three", "bridge", "local"]


def service_of(files: dict[str, bytes], folder: str = "head") -> dict[str, Any]:
    loaded = yaml.safe_load(files[f"{folder}/docker-compose.yml"])
    service: dict[str, Any] = loaded["services"]["node"]
    return service


@pytest.mark.parametrize(("name", "cluster"), CASES, ids=IDS)
def test_files_are_valid(name: str, cluster: Cluster, tmp_path: Path) -> None:
    files = render(make_plan(name, cluster))
    write_files(files, tmp_path)
    for path, content in files.items():
        if not path.endswith(".yml"):
            continue
        # The `$schema` URL of the file is one that jsonschema does not know; it would guess another draft.
        Draft7Validator(SCHEMA).validate(yaml.safe_load(content))
        result = compose("config", "-q", cwd=(tmp_path / path).parent)
        assert (result.returncode, result.stderr) == (0, "")
        assert {issue.code for issue in lint(content.decode(), path)} <= {"image-unpinned"}, (
            "the example's image has no version"
        )


def test_the_schema_is_the_binarys_own() -> None:
    text = Path(__file__).with_name("compose-spec.json").read_bytes().rstrip(b"\n")
    assert text in compose_binary().read_bytes()


@pytest.mark.parametrize(("name", "cluster"), CASES, ids=IDS)
def test_compose_reads_what_we_meant(name: str, cluster: Cluster, tmp_path: Path) -> None:
    plan = make_plan(name, cluster, {"NCCL_DEBUG": "WARN", "MODE": "010", "HOME_IS": "$HOME"})
    write_files(render(plan), tmp_path)
    service = read_back(tmp_path / "head")["services"]["node"]
    environment = service["environment"]
    assert environment["NCCL_DEBUG"] == "WARN"
    assert environment["MODE"] == "010"
    assert environment["HOME_IS"] == "$$HOME"
    assert environment["HLAUNCH_NODE_IP"] == plan.head.node.ip
    assert "PATH" not in environment
    assert "HOME" not in environment
    assert service["ulimits"]["memlock"] == -1 or service["ulimits"]["memlock"]["soft"] == -1
    assert int(service["shm_size"]) == cluster.container.shm_bytes
    assert service["restart"] == "on-failure:3"
    assert service["stop_grace_period"] == "40s"
    assert service["user"] == "1000:1000"
    assert service["healthcheck"]["test"] == ["CMD", "python", "-m", "launcher.probe", "ready"]
    content = read_back(tmp_path / "head")["configs"]
    spec = NodeSpec.from_json(content["node"]["content"].replace("$$", "$"), "node.json")
    assert (spec.role, spec.plan, [peer.ip for peer in spec.peers]) == (
        "head", plan.digest, [node.ip for node in cluster.nodes],
    )  # fmt: skip
    config = EngineConfig.from_json(content["engine"]["content"].replace("$$", "$"))
    assert config.server == plan.head.config.server
    worker = read_back(tmp_path / ("worker" if len(cluster.nodes) == 2 else "worker-spark-03"))
    assert "engine" not in worker["configs"]
    assert worker["services"]["node"]["healthcheck"]["test"][-1] == "worker"
    assert list(worker["secrets"]) == ["ray_token"]


def test_same_plan_same_bytes() -> None:
    one, two = (render(make_plan("gpt-oss-20b", GPU, {"B": "2", "A": "1"})) for _ in range(2))
    assert one == two
    assert list(one) == sorted(one)
    assert render(make_plan("gpt-oss-20b", GPU, {"B": "3", "A": "1"})) != one


def test_no_timestamp_and_no_path_of_this_machine() -> None:
    text = b"\n".join(render(make_plan("tiny-oss")).values()).decode()
    assert not re.search(r"20\d\d-\d\d-\d\d|/root|/home/|/work", text)


def test_secrets_stand_in_no_file(tmp_path: Path) -> None:
    env = {"HF_TOKEN": "canary-hf", "MY_PASSWORD": "canary-password", "PLAIN": "shown"}
    plan = make_plan("tiny-oss", CPU, env)
    server = replace(plan.nodes[0].config.server, api_key_sha256=("canary-digest",))
    head = replace(plan.nodes[0], config=replace(plan.nodes[0].config, server=server))
    files = render(replace(plan, nodes=(head, *plan.nodes[1:])))
    assert not [path for path, content in files.items() if b"canary" in content]
    write_files(files, tmp_path)
    missing = compose("config", "-q", cwd=tmp_path / "head", variables={})
    assert missing.returncode == 1
    # Compose names one of those that are missing, now this one, now that one.
    assert re.search(r"run: export (HF_TOKEN|MY_PASSWORD)=\.\.\.", missing.stderr)
    given = {**VARIABLES, "HF_TOKEN": "from-the-shell", "MY_PASSWORD": "x"}
    service = read_back(tmp_path / "head", variables=given)["services"]["node"]
    assert service["environment"]["HF_TOKEN"] == "from-the-shell"
    assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"


def test_a_literal_key_of_the_registry_stays_there() -> None:
    registry = "models:\n  m: {model: tiny-oss, api-key: canary-literal-key}\n"
    files = render(make_plan("m", CPU, registry=registry))
    assert not [path for path, content in files.items() if b"canary" in content]
    assert yaml.safe_load(files["head/docker-compose.yml"])["secrets"]["api_key"] == {"environment": "HLAUNCH_API_KEY"}


def test_the_ray_token_may_not_be_a_variable() -> None:
    with pytest.raises(HlaunchError, match="RAY_AUTH_TOKEN"):
        render(make_plan("open", CPU, {"RAY_AUTH_TOKEN": "x"}))


def test_the_model_folder_is_demanded_and_never_made(tmp_path: Path) -> None:
    write_files(render(make_plan("gpt-oss-20b", GPU)), tmp_path)
    missing = compose("config", "-q", cwd=tmp_path / "head", variables={})
    assert missing.returncode == 1
    assert "HLAUNCH_MODEL_DIR" in missing.stderr
    volume = service_of(render(make_plan("gpt-oss-20b", GPU)))["volumes"][0]
    assert (volume["read_only"], volume["bind"]) == (True, {"create_host_path": False})
    assert "volumes" not in service_of(render(make_plan("tiny-oss", CPU)))


@pytest.mark.parametrize("mode", ["reservation", "gpus", "cdi", "none"])
def test_one_gpu_mechanism(mode: str, tmp_path: Path) -> None:
    cluster = replace(GPU, container=Container(gpu_mode=mode))
    files = render(make_plan("gpt-oss-20b", cluster))
    service = service_of(files)
    found = [
        "deploy" in service,
        "gpus" in service,
        any("nvidia" in device for device in service.get("devices", ())),
    ]
    assert sum(found) == (0 if mode == "none" else 1)
    assert "runtime" not in service
    assert not {"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"} & set(service["environment"])
    write_files(files, tmp_path)
    assert compose("config", "-q", cwd=tmp_path / "head").returncode == 0


def test_rdma_devices_only_where_rdma_is_required() -> None:
    assert service_of(render(make_plan("gpt-oss-20b", GPU)))["devices"] == ["/dev/infiniband:/dev/infiniband"]
    assert "devices" not in service_of(render(make_plan("open", CPU)))


def test_shm_size_only_with_private_ipc() -> None:
    cluster = replace(CPU, container=replace(CPU.container, ipc="host"))
    assert "shm_size" not in service_of(render(make_plan("open", cluster)))


def test_a_named_network_gives_each_node_its_address(tmp_path: Path) -> None:
    write_files(render(make_plan("open", BRIDGE)), tmp_path)
    head, worker = (read_back(tmp_path / folder) for folder in ("head", "worker"))
    assert head["name"] != worker["name"]
    for document, node in ((head, BRIDGE.nodes[0]), (worker, BRIDGE.nodes[1])):
        assert document["services"]["node"]["networks"]["fabric"]["ipv4_address"] == node.ip
        assert document["networks"]["fabric"]["name"] == "hl-fabric"
        assert document["networks"]["fabric"]["external"] is True


def test_the_override_takes_out_what_the_host_cannot_do(tmp_path: Path) -> None:
    files = render(make_plan("open", CPU))
    override = host_override(HostFacts(can_raise_limits=False, engine_major=20, nofile_hard=4096))
    assert len(override.reasons) == 3
    assert "CAP_SYS_RESOURCE" in override.text
    write_files({**files, f"head/{OVERRIDE_FILE}": override.text.encode()}, tmp_path)
    service = read_back(tmp_path / "head")["services"]["node"]
    assert "memlock" not in service["ulimits"]
    assert service["ulimits"]["nofile"] == {"soft": 4096, "hard": 4096}
    assert "start_interval" not in service["healthcheck"]
    assert service["healthcheck"]["interval"] == "10s"


def test_a_capable_host_needs_no_override() -> None:
    assert host_override(HostFacts(engine_major=28)).text == ""
