"""Variables in a registry: which nobody may set there, and that lint speaks wherever a registry is judged or used."""

from __future__ import annotations

from pathlib import Path

import pytest
from registry_support import Here

from launcher.fabric.declared import launch_findings, problem_of, registry_issues, warnings_of
from launcher.registry import parse_registry, resolve, resolve_cluster

PAIR = """\
clusters:
  pair:
    platform: {platform}
    fabric: {{rdma: required, subnet: 10.0.0.0/24}}
    env:
      NCCL_DEBUG_SUBSYS: INIT
{env}
    nodes:
      - {{name: a, role: head, ip: 10.0.0.1, gpus: 1, gpu-memory: 80GiB, ifname: eth0, hcas: [mlx5_0]}}
      - {{name: b, role: worker, ip: 10.0.0.2, gpus: 1, gpu-memory: 80GiB, ifname: eth0, hcas: [mlx5_0]}}
models:
  m: {{model: openai/gpt-oss-20b, cluster: pair, tp: 2}}
  alone: {{model: tiny-oss}}
"""


def pair(*lines: str, platform: str = "hopper") -> str:
    return PAIR.format(platform=platform, env="\n".join(f"      {line}" for line in lines))


NAMES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("PATH", "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSTARTUP"),
    *("HLAUNCH_REGISTRY", "HLAUNCH_PORT", "HLAUNCH_NODE_SECRET"),
)


@pytest.mark.parametrize(
    ("name", "block"),
    [(name, "model") for name in NAMES] + [("RANK", block) for block in ("defaults", "profile", "cluster", "node")],
)
def test_a_reserved_variable_is_refused_in_every_block(here: Here, name: str, block: str) -> None:
    env = f"env: {{{name}: x}}"
    node = f"nodes: [{{name: n, role: head, ip: 10.0.0.1, {env if block == 'node' else ''}}}]"
    text = f"""\
models: {{m: {{model: tiny-oss, {env if block == "model" else ""}}}}}
defaults: {{{env if block == "defaults" else ""}}}
profiles: {{p: {{{env if block == "profile" else ""}}}}}
clusters: {{c: {{{env + "," if block == "cluster" else ""} {node}}}}}
"""
    here.write(text)
    result = here("validate")
    assert result.code == 3
    line = 1 + next(number for number, written in enumerate(text.splitlines()) if name in written)
    column = 1 + text.splitlines()[line - 1].index(name)
    assert f"model_registry.yml:{line}:{column}: error[reserved-variable]" in result.err
    assert result.err.count("error[") == 1


def test_a_reserved_variable_may_be_taken_away_and_ours_for_the_engine_set(here: Here) -> None:
    here.write("models: {m: {model: tiny-oss, env: {LD_PRELOAD: , HLAUNCH_KERNEL_CACHE: /tmp/kernels, PATHS: x}}}")
    assert here("validate").code == 0


def test_a_flag_cannot_set_a_reserved_variable_either(here: Here) -> None:
    here.write("models: {m: {model: tiny-oss}}")
    result = here("plan", "m", "--set", "env.LD_PRELOAD=/tmp/x.so")
    assert result.code == 2
    assert "error[reserved-variable] env.LD_PRELOAD decides which code runs" in result.err


def test_validate_lints_variables_at_their_lines(here: Here) -> None:
    text = pair('NCCL_IB_DISABLE: "true"', "NCCL_IB_TIMOUT: 22", "NCCL_IB_GID_INDEX: 3", "NCCL_TIMEOUT: 1800")
    here.write(text)
    result = here("validate")
    assert result.code == 3
    for line, column, severity, code in (
        (7, 24, "error", "bool-word"),
        (8, 23, "warning", "unknown-name"),
        (9, 26, "error", "gid-on-cluster"),
        (9, 26, "warning", "gid-pinned"),
        (10, 21, "warning", "dead-name"),
    ):
        assert f"model_registry.yml:{line}:{column}: {severity}[{code}] clusters.pair.env.NCCL_" in result.err
    assert "2 errors, 3 warnings" in result.err


def test_a_cluster_that_contradicts_its_nodes_is_not_valid(here: Here) -> None:
    here.write(pair("NCCL_SOCKET_IFNAME: eth9", "GLOO_SOCKET_IFNAME: eth9", "NCCL_IB_HCA: mlx5_9"))
    result = here("validate")
    assert result.code == 3
    assert result.err.count("error[env-contradicts-fabric]") == 3
    here.write(pair('NCCL_NVLS_ENABLE: "1"', 'NCCL_NET_GDR_LEVEL: "5"', platform="gb10"))
    result = here("validate")
    assert result.code == 3
    assert "error[nvls-on]" in result.err
    assert "error[gdr-on-gb10]" in result.err


def test_warnings_alone_are_valid_and_strict_refuses_them(here: Here) -> None:
    here.write(pair("NCCL_TIMEOUT: 1800"))
    assert here("validate").code == 0
    assert here("validate", "--strict").code == 3


@pytest.mark.parametrize("command", [("plan", "m"), ("render", "m", "-o", "out"), ("up", "m")])
def test_what_validate_refuses_no_command_launches(here: Here, command: tuple[str, ...]) -> None:
    here.write(pair('NCCL_IB_DISABLE: "true"', "NCCL_TIMEOUT: 1800"))
    result = here(*command)
    assert result.code == 5
    assert "model_registry.yml:7: NCCL_IB_DISABLE: NCCL reads 'true' as 0" in result.err
    assert "model_registry.yml:8: warning[dead-name] NCCL_TIMEOUT" in result.err
    assert not (here.folder / "out").exists()


def test_a_model_on_this_host_is_linted_too(here: Here) -> None:
    here.write("models: {m: {model: tiny-oss, env: {NCCL_IB_DISABLE: 'true'}}}")
    assert here("validate").code == 3
    assert here("up", "m").code == 5
    assert "NCCL reads 'true' as 0" in here("plan", "m").err


def test_what_many_models_extend_is_said_once() -> None:
    models = "\n".join(f"  m{number}: {{model: tiny-oss, extends: [base]}}" for number in range(50))
    registry = parse_registry(
        "defaults: {env: {NCCL_TIMEOUT: '1'}}\n"
        f"models:\n  base: {{model: tiny-oss, env: {{NCCL_IB_TIMOUT: '2'}}}}\n{models}\n"
    )
    issues = registry_issues(registry)
    assert [(issue.code, issue.line, issue.path) for issue in issues] == [
        ("dead-name", 1, "defaults.env.NCCL_TIMEOUT"),
        ("unknown-name", 3, "models.base.env.NCCL_IB_TIMOUT"),
    ]


def test_what_a_higher_layer_takes_away_is_not_judged_there() -> None:
    registry = parse_registry(
        "models:\n  m: {model: tiny-oss, env: {NCCL_TIMEOUT: '1'}, profiles: {quiet: {env: {NCCL_TIMEOUT: }}}}\n"
    )
    entry = resolve(registry, "m", {}, profiles=["quiet"])
    assert launch_findings(entry, None) == []
    found = launch_findings(resolve(registry, "m", {}), None)
    assert problem_of(found) is None
    assert [issue.code for issue in warnings_of(found)] == ["dead-name"]


def test_a_flag_goes_over_what_the_cluster_says() -> None:
    registry = parse_registry(pair('NCCL_IB_DISABLE: "true"'))
    for overrides, is_wrong in (([], True), (["env.NCCL_IB_DISABLE=0"], False)):
        entry = resolve(registry, "m", {}, overrides)
        found = launch_findings(entry, resolve_cluster(registry, "pair", {}, entry))
        assert (problem_of(found) is not None) is is_wrong


def test_the_examples_have_no_finding() -> None:
    root = Path(__file__).parents[2]
    for path in (*root.glob("examples/*.yml"), root / "model_registry.yml"):
        assert registry_issues(parse_registry(path.read_text(), str(path))) == [], path


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("postgres://u:canary@h/db", "http://u:canary@proxy"),
        ("https://h/x?api_key=canary&token=canary", "authorization=canary"),
        ("postgres://u@h?password=canary", "x-tenant=a,x-api-key=canary"),
    ],
)
def test_a_secret_inside_a_value_is_warned_of_and_shown_nowhere(here: Here, url: str, proxy: str) -> None:
    text = pair(f"DB_URL: '{url}'").replace(
        "alone: {model: tiny-oss}",
        f"alone: {{model: tiny-oss, cluster: pair, device: cpu, env: {{HTTPS_PROXY: '{proxy}'}}}}",
    )
    here.write(text)
    result = here("validate", "--json")
    assert result.out.count('"secret-literal"') == 2
    said = result.out + result.err
    for command in (
        ["show", "alone", "--explain"],
        ["plan", "alone"],
        ["plan", "alone", "--json"],
        ["env", "alone"],
        ["render", "alone", "-o", "out"],
        ["plan", "alone", "--diff", "--against", "out"],
    ):
        result = here(*command)
        assert result.code == 0, result.err
        said += result.out + result.err
    rendered = (here.folder / "out" / "head" / "docker-compose.yml").read_text()
    assert "${DB_URL:?" in rendered
    assert "${HTTPS_PROXY:?" in rendered
    assert "canary" not in said + rendered
