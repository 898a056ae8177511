"""What people see of hosts and the fabric between them, as reviewed snapshots over fixture trees in place of hosts."""

from __future__ import annotations

from pathlib import Path

import pytest
from screens_support import SCREENS, Screens, masked, prepare, reviewed_names
from trees import EMPTY_GID, healthy

REVIEWED = SCREENS / "fabric"

REGISTRY = """\
version: 1
clusters:
  spark-pair:
    platform: gb10
    fabric: {rdma: required, subnet: 192.168.100.0/24, mtu: 9000, tc: 106}
    ray: {port: 6379}
    env: {NCCL_DEBUG: TRACE, NCCL_IB_TIMOUT: "23"}
    nodes:
      - {name: spark-01, role: head, ip: 192.168.100.1, ssh: spark-01, gpus: 1, ifname: enP2p1s0f0np0,
         hcas: [rocep1s0f0, roceP2p1s0f0]}
      - {name: spark-02, role: worker, ip: 192.168.100.2, ssh: spark-02, gpus: 1, ifname: enP2p1s0f0np0,
         hcas: [rocep1s0f0, roceP2p1s0f0]}
models:
  gpt-oss-20b: {model: openai/gpt-oss-20b, cluster: spark-pair}
"""
SECONDS = masked(r"(node|nodes), \d+\.\d s$", r"\1, N.N s")

CASES: dict[str, tuple[list[str], int]] = {
    "doctor": (["doctor", "gpt-oss-20b", "--root", "broken"], 5),
    "doctor-healthy": (["doctor", "--cluster", "spark-pair", "--root", "healthy"], 0),
    "doctor-unread": (["doctor", "--cluster", "spark-pair", "--root", "nowhere"], 5),
    "doctor-firewall": (["doctor", "--cluster", "spark-pair", "--node", "spark-01", "--print-firewall"], 0),
    "doctor-firewall-nft": (
        ["doctor", "--cluster", "spark-pair", "--node", "spark-01", "--print-firewall", "--firewall", "nft"],
        0,
    ),
    "env": (["env", "gpt-oss-20b"], 0),
    "env-node": (["env", "gpt-oss-20b", "--node", "spark-02"], 0),
    "env-explain": (["env", "gpt-oss-20b", "--explain", "NCCL_IB_HCA"], 0),
    "env-lint": (["env", "gpt-oss-20b", "--lint"], 0),
    "env-set": (["env", "--cluster", "spark-pair", "--set", "NCCL_DEBUG=INFO", "--dry-run"], 0),
    "env-set-refused": (["env", "--cluster", "spark-pair", "--set", "NCCL_IB_GID_INDEX=x", "--dry-run"], 5),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fabric")
    (folder / "model_registry.yml").write_text(REGISTRY)
    for number in (1, 2):
        healthy(folder / f"healthy/spark-0{number}", number)
    healthy(folder / "broken/spark-01", 1)
    second = healthy(folder / "broken/spark-02", 2)
    second.set("sys/class/net/enP2p1s0f0np0/mtu", "1500\n")
    second.set("etc/nccl.conf", "NCCL_IB_TC=8\n")
    second.set("sys/class/infiniband/roceP2p1s0f0/ports/1/state", "1: DOWN\n")
    second.gid("rocep1s0f0", 3, EMPTY_GID, "", "")
    second.listen(6380, 4242, "redis-server *:6380")
    return folder


@pytest.fixture
def screens(trees: Path, monkeypatch: pytest.MonkeyPatch) -> Screens:
    prepare(trees, monkeypatch)
    return Screens(trees, REVIEWED, monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_screen_is_as_reviewed(name: str, screens: Screens) -> None:
    args, code = CASES[name]
    screens.check(name, args, code, SECONDS)


def test_every_reviewed_screen_is_of_a_case() -> None:
    assert reviewed_names(REVIEWED) == set(CASES)
