"""The collector as the far side gets it: one program, standard library only, odd files no reason to fail."""

from __future__ import annotations

import ast
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from trees import healthy

from launcher.fabric.collector.main import collect
from launcher.fabric.collector.network import paths, probe_path
from launcher.fabric.facts import BadFacts, NodeFacts, node_facts, parse_facts
from launcher.fabric.remote import Reach, collector_source, program, read_tree
from launcher.registry.cluster import Node

FOLDER = Path(__file__).parents[2] / "launcher/fabric/collector"


def test_the_joined_program_reads_what_the_modules_read(tmp_path: Path) -> None:
    tree = healthy(tmp_path / "host", 1)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-"],
        input=program(collector_source(), {"root": str(tree.root)}),
        capture_output=True,
        timeout=30,
        check=True,
        cwd=tmp_path,
    )
    there, here = parse_facts(done.stdout), collect(tree.root)
    there.pop("time")
    here.pop("time")
    assert there == json.loads(json.dumps(here))


def test_it_needs_nothing_but_the_standard_library() -> None:
    names = {
        name.partition(".")[0]
        for path in FOLDER.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert names - set(sys.stdlib_module_names) == {"launcher"}
    assert "launcher" not in collector_source()


def test_joining_hides_no_name() -> None:
    """Two modules that define the same name would silently use the later one."""
    seen: dict[str, str] = {}
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                assert name not in seen, f"{name} is in {seen[name]} and {path.name}"
                seen[name] = path.name


def test_it_is_python_3_8() -> None:
    """DGX and older servers have old Pythons; syntax is checked here, names by keeping to old ones."""
    ast.parse(collector_source(), feature_version=(3, 8))
    for word in (".removeprefix(", ".removesuffix(", "zip(strict", "bit_count("):
        assert word not in collector_source()


def test_a_healthy_host_as_typed_facts(tmp_path: Path) -> None:
    facts = read_tree(healthy(tmp_path / "host", 1).root)
    assert isinstance(facts, NodeFacts)
    assert [hca.name for hca in facts.hcas] == ["roceP2p1s0f0", "rocep1s0f0"]
    hca = facts.hca("rocep1s0f0")
    assert hca is not None
    assert hca.addresses == ("192.168.100.1",)
    assert [twin.name for twin in facts.twins(hca)] == ["roceP2p1s0f0"]
    assert facts.limits["memlock"] == (-1, -1)
    assert facts.verbs == {"rocep1s0f0": "uverbs0", "roceP2p1s0f0": "uverbs1"}
    assert facts.versions["ray"] == "2.60.0"
    assert facts.tools == {"docker": "28.1.1", "compose": "2.40.3", "toolkit": "1.17.9"}
    assert facts.is_unified_memory
    assert facts.shm_bytes == facts.memory_total_bytes // 2


def test_spoilt_trees_never_raise(tmp_path: Path) -> None:
    """Every file of a host, one at a time and at random: emptied, turned into bytes, into a folder, or gone."""
    tree = healthy(tmp_path / "host", 1)
    files = sorted(path for path in tree.root.rglob("*") if path.is_file() and not path.is_symlink())
    chooser = random.Random(7)
    for path in chooser.sample(files, 35):
        kept, mode = path.read_bytes(), path.stat().st_mode
        for spoilt in (b"", b"\xff\xfe\x00\x9f", b"-1\n" * 3, b"99999999999999999999999\n"):
            path.write_bytes(spoilt)
            assert isinstance(read_tree(tree.root), NodeFacts), path
        path.unlink()
        assert isinstance(read_tree(tree.root), NodeFacts), path
        path.write_bytes(kept)
        path.chmod(mode)


@pytest.mark.parametrize(
    "text",
    ["", "no json", "{", '{"facts_version": 2}', "[1]", '{"facts_version": 1', "Last login: today\n"],
)
def test_answers_that_are_no_facts(text: str) -> None:
    with pytest.raises(BadFacts):
        parse_facts(text)


def test_facts_of_another_machine_are_read_field_by_field() -> None:
    raw = parse_facts(
        'banner\n{"facts_version": 1, "hcas": [3, {"name": 5, "ports": [{"gids": "x"}]}], "limits": []}\n'
    )
    facts = node_facts(raw)
    assert facts.hcas[0].name == "?"
    hostile = node_facts(
        {"netdevs": [{"name": "eth0; reboot"}], "hcas": [{"name": "$(id)", "netdevs": ["`id`", "eth0"]}]}
    )
    assert (hostile.netdevs[0].name, hostile.hcas[0].name, hostile.hcas[0].netdevs) == ("?", "?", ("eth0",))
    assert facts.limits == {}
    assert node_facts({"memory_total_bytes": "all", "time": True}).memory_total_bytes == 0


def test_settings_reach_the_far_side_without_a_shell() -> None:
    hostile = {"root": "/x'; rm -rf ~ #\"$(id)`id`\n\u2028"}
    text = program("def run(settings): print(settings['root'])", hostile)
    done = subprocess.run([sys.executable, "-"], input=text, capture_output=True, check=True, timeout=20)
    assert done.stdout.decode() == hostile["root"] + "\n"


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1"])
def test_packets_of_both_families_and_of_two_sizes(peer: str) -> None:
    small, large = paths(Path("/"), [peer], 9000)
    if small["verdict"] == "unknown":
        pytest.skip(f"no pings from here: {small['detail']}")
    assert (small["verdict"], small["bytes"]) == ("ok", 56)
    assert (large["verdict"], large["bytes"]) == ("ok", 8952 if ":" in peer else 8972)
    assert probe_path(Path("/"), peer, 70_000)["verdict"] == "too-long"


def test_a_destination_is_never_an_option() -> None:
    node = Node("n", "worker", "10.0.0.2", ssh="-oProxyCommand=touch /tmp/x")
    argv = Reach().argv(node)
    assert argv[argv.index("--") + 1] == node.ssh
    assert Reach(container="hl-node-1").argv(Node("n", "head", "10.0.0.1"))[:4] == ["docker", "exec", "-i", "hl-node-1"]
    # ssh hands one text to a shell there: what stands in it is quoted.
    assert Reach(container="c; id").argv(node)[-1] == "docker exec -i 'c; id' python3 -"


def test_the_container_of_a_launch_is_found_by_its_labels(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\n[ "$1" = ps ] && { echo "$@" >> said; cat number; exit; }\necho "$@" >> said\n')
    docker.chmod(0o755)
    (tmp_path / "number").write_text("f00d\n")
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    argv = Reach(launch="tiny $(id)").argv(Node("one", "head", "10.0.0.1"))
    subprocess.run(argv, env=environ, cwd=tmp_path, check=True, timeout=20)
    asked, ran = (tmp_path / "said").read_text().splitlines()
    assert asked == "ps -q --filter label=dev.hlaunch.model=tiny $(id) --filter label=dev.hlaunch.node=one"
    assert ran == "exec -i f00d python3 -"
    (tmp_path / "number").write_text("")
    lost = subprocess.run(argv, env=environ, cwd=tmp_path, check=False, timeout=20, capture_output=True, text=True)
    assert (lost.returncode, lost.stderr) == (1, "No such container: tiny $(id) does not run in one on one\n")
