"""The firewall lines do what they say, in the kernel of this machine: in a network namespace of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from launcher.fabric.firewall import Tool, firewall_lines
from launcher.registry.cluster import Cluster, Node, RaySettings

NAME = f"hlf{os.getpid()}"


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", "netns", "exec", NAME, *argv], capture_output=True, text=True, timeout=20, check=False)


@pytest.fixture
def namespace() -> Iterator[None]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    made = subprocess.run(["ip", "netns", "add", NAME], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no network namespaces: {made.stderr.strip()}")
    yield
    subprocess.run(["ip", "netns", "del", NAME], check=False)


@pytest.mark.parametrize("addresses", [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")], ids=["v4", "v6"])
@pytest.mark.parametrize("tool", ["iptables", "nft"])
def test_the_lines_are_taken_and_twice_is_once(namespace: None, tool: Tool, addresses: tuple[str, str]) -> None:
    head, worker = (Node(name, role, ip) for name, role, ip in zip("ab", ("head", "worker"), addresses, strict=True))
    program = "ip6tables" if tool == "iptables" and ":" in head.ip else tool
    if (
        shutil.which(program) is None
        or run(program, *(["-S"] if tool == "iptables" else ["list", "ruleset"])).returncode
    ):
        pytest.skip(f"no working {program} here")
    lines = firewall_lines(Cluster("pair", (head, worker), platform="cpu", ray=RaySettings()), head, tool)
    listing = [program, "-S"] if tool == "iptables" else ["nft", "list", "ruleset"]
    seen = []
    for _ in range(2):
        for line in lines:
            done = run("sh", "-c", line.replace("sudo ", ""))
            assert done.returncode == 0, (line, done.stderr)
        seen.append(run(*listing).stdout)
    assert seen[0] == seen[1]
    assert head.ip not in seen[0]
    assert worker.ip in seen[0]
    assert "DROP" in seen[0] or "drop" in seen[0]


def test_without_ray_the_head_lets_nodes_in_at_its_desk() -> None:
    nodes = (Node("a", "head", "10.0.0.1"), Node("b", "worker", "10.0.0.2"))
    pair = Cluster("pair", nodes, platform="cpu")
    opened = [line for line in firewall_lines(pair, nodes[0]) if "--dport" in line]
    assert [line.partition("--dport ")[2] for line in opened] == [
        "29540 -j ACCEPT  # nodes that join", "32768:60999 -j ACCEPT  # nccl, gloo, engine",
    ]  # fmt: skip
    assert not any("29540" in line for line in firewall_lines(pair, nodes[1]))
    alone = firewall_lines(Cluster("one", nodes[:1], platform="cpu"), nodes[0])
    assert all(line.startswith("# ") for line in alone)
    assert "port 29540 of the head" in alone[1]
    assert max(len(line) for line in alone) <= 80
