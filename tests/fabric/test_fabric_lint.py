"""Every lint code is planted once and found once, and nothing is found in what is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fabric_support import codes, only, spark_pair

from launcher.fabric.dotenv import parse_dotenv
from launcher.fabric.finding import Finding
from launcher.fabric.lint import lint
from launcher.fabric.sources import Source, registry_sources
from launcher.fabric.target import Target, sources_of

SEED_ENV = """\
# as the seed deployment wrote it
NCCL_IB_HCA=roceP2p1s0f0
NCCL_IB_GID_INDEX=0
NCCL_NET_GDR_LEVEL=5
NCCL_IB_TC=106
NCCL_IB_SL=3
NCCL_IB_TIMEOUT=23
NCCL_IB_RETRY_CNT=7
NCCL_CROSS_NIC=0
NCCL_IB_DISABLE=0
NCCL_NET_PLUGIN=/opt/hpcx/nccl_rdma_sharp_plugin/lib/libnccl-net.so
NCCL_IB_GDR_DMABUF_ENABLE=1
NCCL_TIMEOUT=1200
RAY_VISIBLE_DEVICES=0
export VLLM_RAY_WORKER_ENV_VARS="NCCL_IB_DISABLE,NCCL_IB_HCA"
CUDA_VISIBLE_DEVICES=0
"""


def lint_file(values: dict[str, str], **options: Any) -> list[Finding]:
    return lint([Source(".env", "file", values)], **options)


def lint_cluster(env: dict[str, str], fabric: dict[str, Any] | None = None, **changes: Any) -> list[Finding]:
    cluster = spark_pair(env=env, fabric=fabric, **changes)
    return lint(registry_sources(cluster), cluster=cluster)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("NCCL_IB_DISABLE", "true", "bool-word"),
        ("NCCL_IB_TIMEOUT", "20s", "trailing-text"),
        ("NCCL_IB_TIMEOUT", "40", "out-of-range"),
        ("NCCL_SOCKET_IFNAME", "=^lo", "list-order"),
        ("NCCL_SOCKET_IFNAME", "=eth0, eth1", "list-space"),
        ("GLOO_SOCKET_IFNAME", "=eth0", "gloo-pattern"),
        ("NCCL_NVLS_ENABLE", "1", "nvls-on"),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "0", "nvls-on"),
        ("RANK", "1", "rank-env-leak"),
        ("CUDA_VISIBLE_DEVICES", "0", "rank-env-leak"),
        ("RAY_memory_monitor_refresh_ms", "abc", "ray-parse"),
        ("RAY_AUTH_TOKEN", "canary-7f3a", "token-in-env"),
        ("NCCL_MERGE_LEVEL", "PORT", "dead-name"),
        ("NCCL_LL_THRESHOLD", "1", "removed-name"),
        ("NCCL_IB_TIMOUT", "20", "unknown-name"),
        ("NCCL_CHECK_MODE", "DEBUG_LOCAL", "too-new"),
        ("NCCL_IB_TIMEOUT", "024", "octal"),
        ("NCCL_NET_PLUGIN", "", "empty-value"),
        ("NCCL_NET_GDR_LEVEL", "sys", "level-word"),
        ("NCCL_NET_GDR_LEVEL", "5", "level-int"),
        ("NCCL_IB_HCA", "mlx5_1", "list-prefix"),
        ("NCCL_IB_GID_INDEX", "3", "gid-pinned"),
        ("NCCL_IB_TIMEOUT", "23", "timeout-silence"),
        ("NCCL_IB_TIMEOUT", "0", "timeout-silence"),
        ("NCCL_NET_PLUGIN", "aws-ofi", "plugin-skew"),
        ("NCCL_CONF_FILE", "/etc/other.conf", "conf-file"),
        ("NCCL_BLOCKING_WAIT", "1", "torch-alias"),
        ("NCCL_DEBUG", "TRACE", "debug-left-on"),
        ("NCCL_DEBUG_FILE", "/tmp/nccl.log", "debug-left-on"),
        ("NCCL_P2P_DISABLE", "1", "debug-only"),
        ("NCCL_IB_DISABLE", "0", "default-restated"),
        ("OMPI_MCA_btl_tcp_if_include", "eth0", "foreign-name"),
        ("VLLM_HOST_IP", "10.0.0.1", "foreign-name"),
        ("NCCL_IB_SL", "3", "sl-untagged"),
        ("NCCL_IB_TC", "106", "tc-decoded"),
    ],
)
def test_one_wrong_line_has_one_code(name: str, value: str, code: str) -> None:
    found = lint([Source(".env", "file", {name: value}, lines={name: 4})])
    assert code in codes(found)
    finding = next(item for item in found if item.code == code)
    assert finding.subject == name
    assert finding.where == ".env:4"
    assert finding.cause
    assert finding.fix
    assert "canary" not in finding.evidence


def test_right_lines_are_silent() -> None:
    values = {
        "NCCL_DEBUG": "WARN",
        "NCCL_IB_HCA": "=mlx5_0,mlx5_1",
        "NCCL_SOCKET_IFNAME": "^docker,lo",
        "NCCL_IB_TIMEOUT": "19",
        "GLOO_SOCKET_IFNAME": "eth0",
        "RAY_worker_niceness": "0",
        "PATH": "/bin",
        "MY_OWN": "1",
    }
    assert lint_file(values) == []


def test_the_seeds_environment_as_a_file_is_judged_line_by_line() -> None:
    parsed = parse_dotenv(SEED_ENV)
    cluster = spark_pair(fabric={"traffic_class": None, "timeout": None})
    found = lint([Source(".env", "file", parsed.values, lines=parsed.lines)], cluster=cluster)
    by_name: dict[str, set[str]] = {}
    for item in found:
        by_name.setdefault(item.subject, set()).add(item.code)
    assert by_name == {
        "NCCL_IB_HCA": {"list-prefix", "gid-on-cluster"},
        "NCCL_IB_GID_INDEX": {"gid-pinned", "gid-on-cluster"},
        "NCCL_NET_GDR_LEVEL": {"level-int", "gdr-on-gb10"},
        "NCCL_IB_TC": {"tc-decoded", "tc-on-v1"},
        "NCCL_IB_SL": {"sl-untagged"},
        "NCCL_IB_TIMEOUT": {"timeout-silence"},
        "NCCL_IB_RETRY_CNT": {"default-restated"},
        "NCCL_CROSS_NIC": {"no-effect"},
        "NCCL_IB_DISABLE": {"default-restated"},
        "NCCL_NET_PLUGIN": {"plugin-skew"},
        "NCCL_IB_GDR_DMABUF_ENABLE": {"dead-name"},
        "NCCL_TIMEOUT": {"dead-name"},
        "RAY_VISIBLE_DEVICES": {"dead-name"},
        "VLLM_RAY_WORKER_ENV_VARS": {"dead-name"},
        "CUDA_VISIBLE_DEVICES": {"rank-env-leak"},
    }
    silence = only(found, "timeout-silence")
    assert "241 s" in silence.cause
    assert silence.where == ".env:7"


def test_rdma_required_allows_no_way_around_it() -> None:
    assert "env-contradicts-fabric" in codes(lint_cluster({"NCCL_IB_DISABLE": "1"}))
    assert "net-conflict" in codes(lint_cluster({"NCCL_NET": "Socket"}))
    both = lint_file({"NCCL_NET": "IB", "NCCL_IB_DISABLE": "1"})
    assert "net-conflict" in codes(both)


def test_a_variable_that_repeats_or_overrules_a_field() -> None:
    found = lint_cluster({"NCCL_IB_TC": "104"})
    contradiction = next(item for item in found if item.code == "env-contradicts-fabric")
    assert contradiction.evidence == "NCCL_IB_TC=104"
    assert "tc" in contradiction.fix
    assert "env-contradicts-fabric" not in codes(lint_cluster({"NCCL_IB_TC": "106"}))


def test_facts_of_one_node_are_not_said_for_all() -> None:
    for name in ("NCCL_IB_HCA", "NCCL_SOCKET_IFNAME", "NCCL_IB_GID_INDEX", "UCX_NET_DEVICES"):
        assert "gid-on-cluster" in codes(lint_cluster({name: "3"}))
    field = lint_cluster({}, fabric={"gid_index": 3})
    assert only(field, "gid-on-cluster").subject == "fabric.gid-index"
    own = spark_pair(first={"env": {"NCCL_IB_GID_INDEX": "3"}})
    assert "gid-on-cluster" not in codes(lint(registry_sources(own), cluster=own))


def test_what_must_be_equal_differs() -> None:
    cluster = spark_pair(first={"env": {"NCCL_IB_QPS_PER_CONNECTION": "4"}})
    found = only(lint(registry_sources(cluster), cluster=cluster), "c-scope-differs")
    assert found.evidence == "spark-01: 4, spark-02: unset"
    same = spark_pair(env={"NCCL_IB_QPS_PER_CONNECTION": "4"})
    assert "c-scope-differs" not in codes(lint(registry_sources(same), cluster=same))


def test_gpudirect_on_unified_memory() -> None:
    found = lint_cluster({"NCCL_NET_GDR_LEVEL": "SYS", "NCCL_DMABUF_ENABLE": "1", "NCCL_NET_GDR_C2C": "1"})
    assert sorted({item.subject for item in found if item.code == "gdr-on-gb10"}) == [
        "NCCL_DMABUF_ENABLE",
        "NCCL_NET_GDR_C2C",
        "NCCL_NET_GDR_LEVEL",
    ]
    assert "gdr-on-gb10" not in codes(lint_cluster({"NCCL_NET_GDR_LEVEL": "SYS"}, platform="hopper"))


def test_an_interface_makes_ucx_use_tcp() -> None:
    cluster = spark_pair(first={"env": {"UCX_NET_DEVICES": "eth0"}})
    assert "ucx-tcp" in codes(lint(registry_sources(cluster), cluster=cluster))


def test_an_image_may_not_set_the_fabric() -> None:
    found = lint([Source("image", "image", {"NCCL_DEBUG": "WARN", "PATH": "/bin"})])
    assert only(found, "image-env").subject == "NCCL_DEBUG"


def test_a_newer_nccl_knows_newer_names_and_forgets_old_ones() -> None:
    assert lint_file({"NCCL_CHECK_MODE": "DEBUG_LOCAL"}, nccl_version="2.30.7") == []
    assert codes(lint_file({"NCCL_SHM_USE_CUDA_MEMCPY": "1"}, nccl_version="2.30.7")) == ["removed-name"]


def test_dotenv_reads_what_docker_reads() -> None:
    parsed = parse_dotenv("A=1\n\n# B=2\nexport C='x # y'\nD=a=b\nnonsense\nA=3\n")
    assert dict(parsed.values) == {"A": "3", "C": "x # y", "D": "a=b"}
    assert parsed.lines["A"] == 7


def test_dotenv_tells_quotes_and_lines_that_set_nothing() -> None:
    parsed = parse_dotenv("A='1'\nA=2\nB=\"x\"\nNCCL_NET\nHF_TOKEN canary\n=x\n# c\n")
    assert parsed.quoted == {"B"}
    assert dict(parsed.unread) == {4: "name", 5: "refused", 6: "refused"}


def test_a_quoted_value_and_an_unread_line_are_told_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "t.env"
    path.write_text('NCCL_IB_DISABLE="1"\nHF_TOKEN canary-7f3a\nNCCL_NET\n')
    target = Target(spark_pair(), spark_pair().nodes)
    found = lint(sources_of(target, {}, [path]))
    assert only(found, "quoted-value").where == f"{path}:1"
    bad = [item for item in found if item.code == "bad-line"]
    assert [(item.where, item.severity) for item in bad] == [(f"{path}:2", "error"), (f"{path}:3", "warning")]
    assert "canary" not in str(found)


def test_a_file_of_nothing_but_a_bad_line_is_not_silent(tmp_path: Path) -> None:
    path = tmp_path / "t.env"
    path.write_text("BAD LINE\n")
    target = Target(spark_pair(), spark_pair().nodes)
    assert codes(lint(sources_of(target, {}, [path]))) == ["bad-line"]


@pytest.mark.parametrize(
    ("name", "value", "code", "fix"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0 # c", "gloo-pattern", "GLOO_SOCKET_IFNAME=eth0"),
        ("GLOO_SOCKET_IFNAME", "=eth0 # c", "gloo-pattern", "GLOO_SOCKET_IFNAME=eth0"),
        ("GLOO_SOCKET_IFNAME", "eth0 eth1", "gloo-pattern", "GLOO_SOCKET_IFNAME=eth0,eth1"),
        ("NCCL_SOCKET_IFNAME", "=eth0 # fabric", "list-space", "NCCL_SOCKET_IFNAME==eth0"),
        ("NCCL_SOCKET_IFNAME", "=eth0 eth1", "list-space", "NCCL_SOCKET_IFNAME==eth0,eth1"),
        ("NCCL_SOCKET_IFNAME", "=^lo # c", "list-order", "NCCL_SOCKET_IFNAME=^=lo"),
        ("NCCL_IB_HCA", "mlx5_0 # c", "list-space", "NCCL_IB_HCA=mlx5_0"),
        ("NCCL_IB_HCA", "mlx5_0 # c", "list-prefix", "NCCL_IB_HCA==mlx5_0"),
        ("NCCL_IB_HCA", "mlx5_0, mlx5_1", "list-prefix", "NCCL_IB_HCA==mlx5_0,mlx5_1"),
        ("NCCL_IB_HCA", " # c", "list-prefix", "write = before the names"),
        ("NCCL_NET", "ib # c", "level-word", "NCCL_NET=IB"),
        ("NCCL_NET_GDR_LEVEL", "loc # c", "level-word", "NCCL_NET_GDR_LEVEL=LOC"),
        ("NCCL_IB_TIMEOUT", "20 # def", "trailing-text", "NCCL_IB_TIMEOUT=20"),
        ("NCCL_IB_TIMEOUT", "08", "trailing-text", "NCCL_IB_TIMEOUT=8"),
        ("NCCL_BUFFSIZE", "4M", "trailing-text", "NCCL_BUFFSIZE=4194304"),
        ("NCCL_BUFFSIZE", "512 KiB # c", "trailing-text", "NCCL_BUFFSIZE=524288"),
        ("NCCL_BUFFSIZE", "8mb", "trailing-text", "NCCL_BUFFSIZE=8388608"),
        ("NCCL_BUFFSIZE", "4m", "trailing-text", "write the number alone"),
        ("NCCL_BUFFSIZE", "1e6", "trailing-text", "write the number alone"),
        ("NCCL_BUFFSIZE", "1.5M", "trailing-text", "write the number alone"),
        ("NCCL_IB_TIMEOUT", "20K", "trailing-text", "write the number alone"),
    ],
)
def test_a_fix_says_what_was_meant(name: str, value: str, code: str, fix: str) -> None:
    assert only(lint_file({name: value}), code).fix == fix


def test_a_comment_is_named_as_what_it_is() -> None:
    assert "comment" in only(lint_file({"GLOO_SOCKET_IFNAME": "eth0 # c"}), "gloo-pattern").cause
    assert "comment" not in only(lint_file({"GLOO_SOCKET_IFNAME": "eth0, eth1"}), "gloo-pattern").cause


def test_no_fix_of_a_spelling_keeps_what_is_forbidden() -> None:
    env = {"NCCL_NET_GDR_LEVEL": "5", "NCCL_DMABUF_ENABLE": "true", "NCCL_NVLS_ENABLE": "1x"}
    found = lint_cluster(env)
    assert {"level-int", "bool-word", "trailing-text", "gdr-on-gb10", "nvls-on"} <= {item.code for item in found}
    for name in env:
        assert len({item.fix for item in found if item.subject == name}) == 1, name
    assert only(found, "level-int").fix.startswith("NCCL_NET_GDR_LEVEL=LOC")
    assert only(lint_file({"NCCL_NET_GDR_LEVEL": "5"}), "level-int").fix == "NCCL_NET_GDR_LEVEL=SYS"


@pytest.mark.parametrize(
    ("rdma", "name", "value", "fix"),
    [
        ("required", "NCCL_IB_DISABLE", "true", "remove NCCL_IB_DISABLE: the fabric says it"),
        ("preferred", "NCCL_IB_DISABLE", "true", "NCCL_IB_DISABLE=1"),
        ("required", "NCCL_IB_TC", "08", "remove NCCL_IB_TC: the fabric says it"),
    ],
)
def test_no_fix_contradicts_the_fabric(rdma: str, name: str, value: str, fix: str) -> None:
    found = lint_cluster({name: value}, {"rdma": rdma})
    assert fix in {item.fix for item in found}
    assert all(item.fix == fix for item in found if item.fix.startswith(f"{name}="))
