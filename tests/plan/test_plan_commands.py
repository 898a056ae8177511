"""plan, fit, topo and inventory as a user runs them: exit codes, screens, JSON, files, and nothing heavy loaded."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import resource
import struct
import subprocess
import sys
import termios
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
REGISTRY = """\
version: 1
clusters:
  pair:
    platform: hopper
    fabric: {rdma: required, hcas: [mlx5_0]}
    ray: {}
    nodes:
      - {name: node-a, role: head, ip: 10.0.0.1, gpus: 8, gpu-memory: 80GiB, ifname: eth1}
      - {name: node-b, role: worker, ip: 10.0.0.2, gpus: 8, gpu-memory: 80GiB, ifname: eth2}
models:
  tiny: {model: tiny-oss}
  big: {model: openai/gpt-oss-120b, max-num-seqs: 16, max-model-len: 128k}
  split: {model: openai/gpt-oss-120b, cluster: pair, tp: 8, dp: 2, max-num-seqs: 16}
  tied: {model: tiny-oss, cluster: pair}
"""
HEAVY = ("torch", "numpy", "ray", "fastapi", "rich", "psutil", "pynvml", "cupy")


class Hlaunch:
    """The product in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "model_registry.yml").write_text(REGISTRY)

    def __call__(self, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launcher.cli", *args],
            cwd=self.folder,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.folder),
                "PYTHONPATH": str(ROOT),
                "PYTHONIOENCODING": "utf-8",
                **environ,
            },
            text=True,
            encoding="utf-8",
            capture_output=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def hlaunch(tmp_path: Path) -> Hlaunch:
    return Hlaunch(tmp_path)


def test_a_plan_on_this_host(hlaunch: Hlaunch) -> None:
    result = hlaunch("plan", "tiny", "--set", "max-num-seqs=4", "--set", "device=cpu")
    assert result.returncode == 0, result.stderr
    for part in ("what is set", "placement: tp 1 pp 1 dp 1, 1 rank", "topology", "memory", "ports", "what would run"):
        assert part in result.stdout
    assert "engine.server --config" in result.stdout
    assert not (hlaunch.folder / ".local").exists(), "a plan writes nothing"


def test_a_plan_on_a_cluster(hlaunch: Hlaunch) -> None:
    result = hlaunch("plan", "split")
    assert result.returncode == 0, result.stderr
    assert "tp 8 pp 1 dp 2, 16 ranks" in result.stdout
    assert "node-b: python -m launcher.node worker, 8 ranks" in result.stdout
    assert "10002-19999" in result.stdout
    assert "no tensor crosses here" in result.stdout
    assert "up would stop here" not in result.stderr
    data = json.loads(hlaunch("plan", "split", "--json").stdout)
    assert len(data["placement"]["ranks"]) == 16
    assert len(data["memory"]) == 16
    assert [node["name"] for node in data["nodes"]] == ["node-a", "node-b"]
    assert data["digest"] == json.loads(hlaunch("plan", "split", "--json").stdout)["digest"]


def test_another_cluster_is_named_on_the_command_line(hlaunch: Hlaunch) -> None:
    assert "node-a" in hlaunch("plan", "tiny", "--cluster", "pair").stdout
    unknown = hlaunch("plan", "tiny", "--cluster", "pear")
    assert unknown.returncode == 4
    assert "pair" in unknown.stderr


def test_no_placement_exits_6_and_names_what_is_possible(hlaunch: Hlaunch) -> None:
    # The declaration promises eight GPUs, the host itself has two.
    real = json.loads(hlaunch("inventory", "--cluster", "pair", "--json").stdout)["node-a"]
    real["gpus"] = real["gpus"][:2]
    (hlaunch.folder / "a.json").write_text(json.dumps(real))
    result = hlaunch("plan", "split", "--inventory", "a.json")
    assert result.returncode == 6, result.stderr
    *_, hint, error = result.stderr.splitlines()
    said = "error: no placement: tp 8 pp 1 dp 2 needs 16 GPUs, there are 2 on node-a, 8 on node-b"
    assert error == said
    assert hint.startswith("hint: possible: --set dp=1")
    assert "no placement: the problem stands below" in result.stdout


@pytest.mark.parametrize("command", [("fit",), ("plan",), ("up", "--dry-run"), ("topo",)])
def test_a_model_that_nobody_knows_exits_5_and_says_what_is_missing(hlaunch: Hlaunch, command: tuple[str, ...]) -> None:
    for name, said, way in (
        ("nosuch", "the files of nosuch are not on this machine", "hint: write a folder with config.json"),
        ("org/name-7b", "the files of org/name-7b are not", "hint: run: huggingface-cli download org/name-7b"),
    ):
        result = hlaunch(command[0], "tiny", *command[1:], "--set", f"model={name}")
        assert result.returncode == 5, result.stdout + result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: ") or command == ("topo",)
        assert f"error: {said}" in result.stderr
        assert "sizes come from the shape" not in result.stderr
        assert way in result.stderr
        assert f"looked in {hlaunch.folder / name}" in result.stderr
        assert "engine.server" not in result.stdout, "no command is shown that cannot run"
    assert hlaunch(command[0], "big", *command[1:], "--set", "device=cpu").returncode in (0, 6), "shapes are enough"


def test_hardware_that_nobody_declared_is_said_in_plan_fit_and_topo(hlaunch: Hlaunch) -> None:
    registry = hlaunch.folder / "model_registry.yml"
    registry.write_text(REGISTRY.replace(", gpu-memory: 80GiB", ""))
    said = "gpu-memory of node-a, node-b is not declared: 80 GiB assumed"
    assert said in json.loads(hlaunch("fit", "split", "--json").stdout)["notes"]
    for command in ("fit", "plan"):
        assert f"note: {said}\n" in hlaunch(command, "split").stderr
    assert json.loads(hlaunch("topo", "split", "--json").stdout)["assumptions"]["hardware"] == said
    # A saved inventory leaves nothing to assume of its node.
    saved = json.loads(hlaunch("inventory", "--cluster", "pair", "--json").stdout)
    (hlaunch.folder / "a.json").write_text(json.dumps(saved["node-a"]))
    assert "gpu-memory of node-b is not declared" in hlaunch("fit", "split", "--inventory", "a.json").stderr


def test_no_more_context_is_proposed_than_the_model_takes(hlaunch: Hlaunch) -> None:
    result = hlaunch("plan", "tiny", "--set", "max-model-len=100000000")
    assert result.returncode == 6
    hints = [line for line in result.stderr.splitlines() if line.startswith("hint: ")]
    assert hints == [
        "hint: would fit: --set max-model-len=2048",
        "hint: add --set max-model-len=2048, or leave it at auto",
    ]


def test_what_does_not_fit_exits_6_with_the_way_out_last_but_one(hlaunch: Hlaunch) -> None:
    result = hlaunch("fit", "split", "--set", "tp=1", "--set", "gpu-memory-utilization=0.5")
    assert result.returncode == 6
    assert "hint: would fit: " in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: does not fit: ")
    assert "DOES NOT FIT" in result.stdout
    assert "!" in result.stdout
    good = hlaunch("fit", "split", "--json")
    assert good.returncode == 0
    assert len(json.loads(good.stdout)["memory"]) == 16


def test_svg_is_written(hlaunch: Hlaunch) -> None:
    target = hlaunch.folder / "out.svg"
    assert hlaunch("plan", "split", "--svg", str(target)).returncode == 0
    assert ElementTree.fromstring(target.read_text()).tag.endswith("svg")
    missing = hlaunch("plan", "split", "--svg", str(hlaunch.folder / "no/such/out.svg"))
    assert missing.returncode == 5
    assert "cannot write" in missing.stderr


# Inventories.


def test_an_inventory_goes_through_a_file_and_back(hlaunch: Hlaunch) -> None:
    saved = hlaunch("inventory", "--json")
    assert saved.returncode == 0
    (hlaunch.folder / "host.json").write_text(saved.stdout)
    again = hlaunch("inventory", "--inventory", "host.json", "--json")
    first, second = json.loads(saved.stdout), json.loads(again.stdout)
    assert second.pop("source") == "saved in host.json"
    assert first.pop("source") == "this host"
    assert first == second
    shown = hlaunch("inventory", "--inventory", "host.json")
    assert "saved in host.json" in shown.stdout
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())


def test_a_plan_for_another_machine(hlaunch: Hlaunch) -> None:
    data = json.loads(hlaunch("inventory", "--json").stdout)
    gpu = {"index": 0, "name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 << 30, "free_bytes": 80 << 30}
    gpu["capability"] = [9, 0]
    data |= {"node": "far", "gpus": [gpu], "driver_version": "580.65.06", "torch_cuda": "13.0"}
    (hlaunch.folder / "far.json").write_text(json.dumps(data))
    result = hlaunch("plan", "big", "--inventory", "far.json")
    assert result.returncode == 0, result.stderr
    assert "cuda:0" in result.stdout
    assert "H100" in result.stdout
    wrong = hlaunch("plan", "split", "--inventory", "far.json")
    assert wrong.returncode == 2
    assert "node far is not in cluster pair" in wrong.stderr
    (hlaunch.folder / "bad.json").write_text("{}")
    assert hlaunch("plan", "tiny", "--inventory", "bad.json").returncode == 5
    assert hlaunch("plan", "tiny", "--inventory", "none.json").returncode == 2


def test_a_declared_cluster_and_measuring(hlaunch: Hlaunch) -> None:
    shown = hlaunch("inventory", "--cluster", "pair")
    assert "node-b (declared in cluster pair)" in shown.stdout
    assert set(json.loads(hlaunch("inventory", "--cluster", "pair", "--json").stdout)) == {"node-a", "node-b"}
    assert "not measured" in hlaunch("inventory").stdout
    assert "GB/s read, measured" in hlaunch("inventory", "--measure").stdout
    assert "GB/s read, measured" in hlaunch("inventory").stdout, "kept for later"
    assert hlaunch("inventory", "--measure", "--cluster", "pair").returncode == 2


# Topologies.


def test_the_seven_are_explained_and_fit_80_columns(hlaunch: Hlaunch) -> None:
    result = hlaunch("topo", "big", "--cases")
    assert result.returncode == 0, result.stderr
    for number in range(1, 8):
        assert any(line.startswith(f"{number}. ") for line in result.stdout.splitlines())
    assert result.stdout.count("crosses nodes  ") == 7
    assert result.stdout.count("expected       ") == 7
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    data = json.loads(hlaunch("topo", "big", "--cases", "--json").stdout)
    assert [case["case"] for case in data["cases"]] == list(range(1, 8))
    one = json.loads(hlaunch("topo", "big", "--case", "7", "--json").stdout)["cases"]
    assert one[0]["pipeline"] == 16
    assert hlaunch("topo", "big", "--case", "8").returncode == 2


def test_ranking_a_cluster(hlaunch: Hlaunch) -> None:
    result = hlaunch("topo", "big", "--cluster", "pair", "--requests", "128", "--svg", "best.svg")
    assert result.returncode == 0, result.stderr
    assert "splits over pair, by throughput" in result.stdout
    assert "assumptions" in result.stdout
    assert "tp 16 pp 1 dp 1: tensor groups cross nodes: 72 all-reduces per step go over RDMA" in result.stderr
    assert "better: tp 8 pp 1 dp 2 at " in result.stderr
    assert (hlaunch.folder / "best.svg").is_file()
    data = json.loads(hlaunch("topo", "big", "--cluster", "pair", "--by", "latency", "--json").stdout)
    latencies = [split["latency_ms"] for split in data["splits"] if split["fits"]]
    assert latencies == sorted(latencies)
    assert data["assumptions"]
    assert hlaunch("topo", "big", "--by", "luck").returncode == 2
    ep = json.loads(hlaunch("topo", "big", "--cluster", "pair", "--expert-parallel", "--json").stdout)
    assert all(split["expert_parallel"] for split in ep["splits"])


def test_without_a_cluster_the_reference_stands_in(hlaunch: Hlaunch) -> None:
    result = hlaunch("topo", "big")
    assert "two nodes of 8 H100 stand in" in result.stderr


def test_a_full_plan_has_what_can_be_pasted_in_the_handbooks_order(hlaunch: Hlaunch) -> None:
    secrets = ("--set", "env.HF_TOKEN=canary-of-mine", "--set", "env.NCCL_DEBUG=WARN")
    brief = hlaunch("plan", "split")
    assert brief.returncode == 0, brief.stderr
    assert "hlaunch plan split --full" in brief.stderr
    count = re.search(r"^environment: (\d+) variables a node, no finding$", brief.stdout, re.MULTILINE)
    assert count is not None
    assert "iptables" not in brief.stdout
    full = hlaunch("plan", "split", "--full")
    assert full.returncode == 0, full.stderr
    assert "--full" not in full.stderr
    marks = [
        "memory\n",
        "environment: ",
        "NCCL_SOCKET_IFNAME",
        "ports\n",
        "firewall\n",
        "what would run",
        "engine.json\n",
    ]
    places = [full.stdout.index(mark) for mark in marks]
    assert places == sorted(places)
    assert re.search(r"NCCL_SOCKET_IFNAME +node-a +=eth1 .*\n.*NCCL_SOCKET_IFNAME +node-b +=eth2", full.stdout)
    assert "# on node-b (10.0.0.2): from 10.0.0.1" in full.stdout
    config = json.loads(full.stdout.partition("\nengine.json\n")[2])
    assert (config["tensor_parallel_size"], config["data_parallel_size"]) == (8, 2)
    named = {
        line.split()[0]
        for line in full.stdout.partition("environment: ")[2].partition("ports\n")[0].splitlines()[2:]
        if line
    }
    assert len(named) == int(count[1])
    hidden = hlaunch("plan", "tiny", "--full", *secrets)
    assert "canary" not in hidden.stdout + hidden.stderr
    assert re.search(r"NCCL_DEBUG +WARN", hidden.stdout), hidden.stdout


def test_on_a_terminal_of_80_columns_every_line_fits(hlaunch: Hlaunch) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "launcher.cli", "plan", "split", "--set", "tp=16", "--set", "dp=1"]
    environ = {"PATH": os.environ["PATH"], "HOME": str(hlaunch.folder), "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    environ |= {"NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(command, cwd=hlaunch.folder, env=environ, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal is gone with its last writer
        while part := os.read(master, 1 << 16):
            shown += part
    os.close(master)
    assert process.wait(timeout=60) == 0
    lines = shown.decode().splitlines()
    assert any("tensor groups cross nodes" in line for line in lines)
    assert [line for line in lines if len(line) > 80] == []


# Differences.


def test_a_local_plan_against_what_runs(hlaunch: Hlaunch) -> None:
    state = hlaunch.folder / "state"
    first = hlaunch("plan", "tiny", "--diff", "--detailed-exitcode", HLAUNCH_STATE_DIR=str(state))
    assert first.returncode == 10, first.stderr
    assert "create" in first.stdout
    config = state / "instances/tiny/engine.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps(json.loads(hlaunch("plan", "tiny", "--json").stdout)["engine_config"], indent=2))
    assert json.loads(hlaunch("plan", "tiny", "--diff", "--json", HLAUNCH_STATE_DIR=str(state)).stdout)[0]["path"]
    same = hlaunch("plan", "tiny", "--diff", "--detailed-exitcode", HLAUNCH_STATE_DIR=str(state))
    assert same.returncode == 0, same.stdout
    other = hlaunch(
        "plan", "tiny", "--set", "max-num-seqs=3", "--diff", "--detailed-exitcode", HLAUNCH_STATE_DIR=str(state)
    )
    assert other.returncode == 10
    assert "max_num_seqs" in other.stdout
    assert hlaunch("plan", "tiny", "--detailed-exitcode").returncode == 2
    assert hlaunch("plan", "tiny", "--diff", "--against", ".").returncode == 2


def test_a_cluster_plan_against_rendered_files(hlaunch: Hlaunch) -> None:
    out = hlaunch.folder / "out"
    out.mkdir()
    new = hlaunch("plan", "tied", "--diff", "--against", "out", "--detailed-exitcode")
    assert new.returncode == 10, new.stderr
    assert "head/docker-compose.yml" in new.stdout
    _render(hlaunch, out)
    same = hlaunch("plan", "tied", "--diff", "--against", "out", "--detailed-exitcode")
    assert same.returncode == 0, same.stdout
    changed = hlaunch("plan", "tied", "--set", "port=8765", "--diff", "--against", "out", "--detailed-exitcode")
    assert changed.returncode == 10
    assert "recreate" in changed.stdout
    nothing_runs = hlaunch("plan", "tied", "--diff", "--detailed-exitcode")
    assert nothing_runs.returncode == 10
    assert "create  head/docker-compose.yml" in nothing_runs.stdout
    assert "tied does not run: all is new" in nothing_runs.stderr
    assert hlaunch("plan", "tied", "--diff", "--against", "nowhere").returncode == 2


def test_a_dry_run_of_a_cluster_is_its_plan(hlaunch: Hlaunch) -> None:
    dry, plan = hlaunch("up", "tied", "--dry-run"), hlaunch("plan", "tied")
    assert (dry.returncode, dry.stdout, dry.stderr) == (plan.returncode, plan.stdout, plan.stderr)
    assert "what would run" in dry.stdout
    assert json.loads(hlaunch("up", "split", "--dry-run", "--json").stdout)["executor"] == "ray"


def _render(hlaunch: Hlaunch, out: Path) -> None:
    from launcher.compose.render import render
    from launcher.plan.cluster_plan import make_cluster_plan
    from launcher.registry import load_registry, resolve, resolve_cluster

    registry = load_registry(hlaunch.folder / "model_registry.yml")
    entry = resolve(registry, "tied", {})
    plan = make_cluster_plan(entry, resolve_cluster(registry, "pair", {}, entry), {})
    for name, content in render(plan).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)


# What it costs.


@pytest.mark.parametrize(
    "args",
    [["plan", "split", "--svg", "x.svg"], ["topo", "big"], ["fit", "tiny"], ["inventory"], ["plan", "tied", "--json"]],
    ids=" ".join,
)
def test_nothing_heavy_is_loaded_and_it_takes_less_than_a_second(hlaunch: Hlaunch, args: list[str]) -> None:
    code = (
        "import sys\nfrom launcher.cli import run\n"
        f"run({args!r})\nprint([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        began = _seconds_of_children()
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=hlaunch.folder,
            env={"PATH": os.environ["PATH"], "HOME": str(hlaunch.folder), "PYTHONPATH": str(ROOT)},
            text=True,
            capture_output=True,
            check=True,
        )
        seconds.append(_seconds_of_children() - began)
        assert result.stderr.splitlines()[-1] == "[]"
    assert min(seconds) < 1.0


def _seconds_of_children() -> float:
    """The processor's time, which other work on the machine does not lengthen as it does the clock's."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_an_ascii_terminal_gets_ascii(hlaunch: Hlaunch) -> None:
    result = hlaunch("plan", "split", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii()
    assert "?" not in result.stdout.split("topology")[1].split("ports")[0]
