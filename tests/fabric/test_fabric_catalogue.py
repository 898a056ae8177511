"""The catalogue as data: every row is legal by its own rules, every name is found, every trap of a reader is known."""

from __future__ import annotations

import pytest

from launcher.fabric import catalogue
from launcher.fabric.kinds import GlooNames, Level, Names, NcclInt, RayBool, RayNumber, TorchValue, read_nccl_int
from launcher.fabric.spec import Spec


@pytest.mark.parametrize("row", catalogue.MAIN, ids=lambda row: row.name)
def test_row_takes_its_legal_example_and_no_other(row: Spec) -> None:
    good, bad = row.kind.examples
    assert row.kind.problems(good) == []
    found = row.kind.problems(bad)
    assert found
    assert all(problem.message for problem in found)
    assert row.effect
    assert row.source
    assert row.kind.describe()


def test_names_are_unique_and_counted() -> None:
    names = list(catalogue.names())
    assert len(names) == len(set(names))
    # 245 names of NCCL 2.30.7 and those of 2.28.9 that are gone since.
    assert len([name for name in names if name.startswith("NCCL_")]) >= 245
    lower = [name for name in names if name.startswith("RAY_") and name[4].islower()]
    assert len(lower) == 247


def test_no_name_is_dead_and_alive() -> None:
    assert [name for name in catalogue.names() if catalogue.find_dead(name) is not None] == []
    assert [name for name in catalogue.TORCH_ALIASES if catalogue.find(name) is not None] == []


@pytest.mark.parametrize(
    ("text", "number", "rest"),
    [
        ("20", 20, ""),
        ("20s", 20, "s"),
        ("010", 8, ""),
        ("0x1F", 31, ""),
        ("-1", -1, ""),
        ("  7", 7, ""),
        ("true", 0, "true"),
        ("", None, ""),
        ("08", 0, "8"),
        ("99999999999999999999", None, ""),
    ],
)
def test_nccl_reads_numbers_as_strtoll_does(text: str, number: int | None, rest: str) -> None:
    assert read_nccl_int(text) == (number, rest)


@pytest.mark.parametrize(
    ("kind", "text", "code", "better"),
    [
        (NcclInt(0, 1), "true", "bool-word", "1"),
        (NcclInt(0, 1), "Off", "bool-word", "0"),
        (NcclInt(1, 31), "20s", "trailing-text", "20"),
        (NcclInt(1, 31), "fast", "trailing-text", None),
        (NcclInt(0, 100), "010", "octal", "8"),
        (NcclInt(0, 1), "2", "out-of-range", None),
        (NcclInt(), "", "empty-value", None),
        (Level(("LOC", "PIX", "PXB", "PHB", "SYS")), "sys", "level-word", "SYS"),
        (Level(("LOC", "PIX", "PXB", "PHB", "SYS")), "5", "level-int", "SYS"),
        (Level(("LOC", "PIX", "PXB", "PHB", "SYS")), "2", "level-int", "PXB"),
        (Level(("LOC", "PORT"), is_prefix_match=True), "port", "level-word", "PORT"),
        (Names("interface", 16), "=^docker", "list-order", "^=docker"),
        (Names("interface", 16), "=eth0, eth1", "list-space", "=eth0,eth1"),
        (Names("HCA", 32, has_ports=True), "mlx5_1", "list-prefix", "=mlx5_1"),
        (Names("HCA", 32, has_ports=True), "=mlx5_1:one", "out-of-range", None),
        (GlooNames(), "=lo", "gloo-pattern", "lo"),
        (GlooNames(), "lo, eth0", "gloo-pattern", "lo,eth0"),
        (GlooNames(), "^docker", "gloo-pattern", None),
        (RayNumber(), "abc", "ray-parse", None),
        (RayNumber(), "", "ray-parse", None),
        (RayNumber(), "0.5", "ray-parse", None),
        (RayBool(), "yes", "ray-parse", "1"),
        (TorchValue(is_bool=True), "2", "out-of-range", None),
        (TorchValue(low=0, high=3), "4", "out-of-range", None),
    ],
)
def test_trap_is_named_with_what_to_write(kind: object, text: str, code: str, better: str | None) -> None:
    found = kind.problems(text)  # type: ignore[attr-defined]
    assert [(problem.code, problem.better) for problem in found] == [(code, better)]
    if better is not None:
        assert kind.problems(better) == []  # type: ignore[attr-defined]


def test_legal_lists_pass() -> None:
    for text in ("=eth0", "^docker", "^=docker0,lo", "=eth0,eth1"):
        assert Names("interface", 16).problems(text) == []
    for text in ("=mlx5_0", "=mlx5_0:1,mlx5_1:2", "=mlx5_0:1:0:1"):
        assert Names("HCA", 32, has_ports=True).problems(text) == []


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("NCCL_IB_TIMOUT", "NCCL_IB_TIMEOUT"),
        ("NCCL_SOCKET_IF_NAME", "NCCL_SOCKET_IFNAME"),
        ("RAY_MEMORY_MONITOR_REFRESH_MS", "RAY_memory_monitor_refresh_ms"),
        ("GLOO_SOCKET_IFNAMES", "GLOO_SOCKET_IFNAME"),
        ("UCX_NET_DEVICE", "UCX_NET_DEVICES"),
        ("nccl_debug", "NCCL_DEBUG"),
        ("NCCL_HCA", "NCCL_IB_HCA"),
        ("NCCL_GID_INDEX", "NCCL_IB_GID_INDEX"),
        ("NCCL_PORTO", "NCCL_PROTO"),
        ("CUDA_VISIBEL_DEVICES", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_misspelt_name_gets_a_suggestion(wrong: str, right: str) -> None:
    assert catalogue.suggestions(wrong)[0] == right


@pytest.mark.parametrize("name", ["NCCL_FOO_BAR", "NCCL_MY_SETTING", "NCCL_XYZ", "RAY_FOO_BAR", "NCCL_"])
def test_what_a_family_shares_makes_no_two_names_alike(name: str) -> None:
    assert catalogue.suggestions(name) == ()


def test_releases_decide_what_is_too_new_or_gone() -> None:
    row = catalogue.find("NCCL_CHECK_MODE")
    assert row is not None
    assert catalogue.is_too_new(row, "2.28.9")
    assert not catalogue.is_too_new(row, "2.30.7")
    gone = catalogue.find("NCCL_SHM_USE_CUDA_MEMCPY")
    assert gone is not None
    assert not catalogue.is_gone(gone, "2.28.9")
    assert catalogue.is_gone(gone, "2.30.7")


def test_facts_of_a_node_and_secrets_are_never_carried() -> None:
    for name in ("NCCL_IB_HCA", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "UCX_NET_DEVICES", "RANK", "MASTER_ADDR"):
        assert not catalogue.is_carried(name)
    for name in ("RAY_AUTH_TOKEN", "HF_TOKEN", "HF_HOME", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "PATH"):
        assert not catalogue.is_carried(name)
    assert catalogue.is_carried("NCCL_DEBUG")
    assert catalogue.is_carried("NCCL_IB_TC")
