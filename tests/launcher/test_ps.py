"""What `ps` says of a launch: who computes, how much it holds, and the same columns wherever it runs."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from stub_server import Stub, serving

from engine.placement import single_rank
from launcher.commands.ps import print_launches, state_now
from launcher.console import Console
from launcher.footprint import cpu_share, rank_memory_bytes
from launcher.supervise.instance import InstanceState
from launcher.supervise.procfs import ProcessIdentity
from launcher.supervise.status import Ready

ONE = single_rank(node="a", device="cuda:0", num_layers=24, num_kv_heads=8, intermediate_size=2880, num_experts=32)
HERE = {
    "name": "tiny", "model": "tiny-oss", "state": "ready", "url": "http://127.0.0.1:8000", "memory_bytes": 1 << 28,
    "uptime_seconds": 42.0, "num_nodes": 1, "cpu_share": 1.0, "context_tokens": 2048, "rank_memory_bytes": None,
    "head_addr": None,
}  # fmt: skip
FAR = {
    "name": "gpt-oss-20b", "model": "openai/gpt-oss-20b", "state": "restarting", "url": "http://192.168.100.1:8000",
    "uptime_seconds": None, "num_nodes": 2, "cpu_share": 0.375, "context_tokens": None, "rank_memory_bytes": 13 << 30,
    "head_addr": None,
}  # fmt: skip


def two_ranks(**second: Any) -> str:
    """A model on a GPU and, as said, on a CPU."""
    (gpu,) = ONE.ranks
    cpu = replace(gpu, rank=1, device="cpu:0", **second)
    tensor, pipeline = (2, 1) if cpu.tp_rank else (1, 2)
    return replace(ONE, ranks=(gpu, cpu), tensor_parallel_size=tensor, pipeline_parallel_size=pipeline).to_json()


@pytest.mark.parametrize(
    ("placement", "device", "share"),
    [
        ("", "cpu", 1.0),
        ("", "cuda:3", 0.0),
        ("", "", None),
        ("{}", "", None),
        (ONE.to_json(), "", 0.0),
        (two_ranks(layers=(0, 8), pp_rank=1), "", 8 / 32),
        (two_ranks(mlp_units=(0, 30), tp_rank=1), "", 30 / 120),
        (two_ranks(experts=(0, 4), tp_rank=1), "", 4 / 36),
    ],
)
def test_the_cpus_share_is_that_of_the_placement(placement: str, device: str, share: float | None) -> None:
    assert cpu_share(placement, device) == (None if share is None else pytest.approx(share))


def shown(facts: list[dict[str, Any]], width: int, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    out = io.StringIO()
    monkeypatch.setattr(Console, "width", width)
    monkeypatch.setattr("launcher.console.PIPE_WIDTH", width)
    print_launches(Console(is_plain=True, stdout=out), facts)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return [line.split() for line in lines]


def test_all_launches_have_the_same_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    header, here, far = shown([HERE, FAR], 140, monkeypatch)
    assert header == ["NAME", "MODEL", "STATE", "NODES", "PROCESSOR", "MEM", "CONTEXT", "ENDPOINT", "UPTIME"]
    assert " ".join(here) == "tiny tiny-oss ready 1 100% CPU 256.0 MiB 2048 http://127.0.0.1:8000 42s"
    assert " ".join(far[3:]) == "2 38%/62% CPU/GPU 13.0 GiB - http://192.168.100.1:8000 -"


def test_a_narrow_terminal_breaks_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown([HERE, FAR], 80, monkeypatch)
    assert lines[0] == ["NAME", "MODEL", "STATE", "ENDPOINT", "UPTIME"]
    assert lines[2] == ["gpt-oss-20b", "openai/gpt-oss-20b", "restarting", "http://192.168.100.1:8000", "-"]
    assert lines[3:5] == [[], ["NAME", "NODES", "PROCESSOR", "MEM", "CONTEXT"]]


def test_a_node_that_joins_names_its_head_instead_of_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    _, line = shown([{**HERE, "state": "serving", "url": "", "head_addr": "10.0.0.1:29540"}], 140, monkeypatch)
    assert " ".join(line[-4:]) == "2048 head 10.0.0.1:29540 42s"


@pytest.mark.parametrize(
    ("stage", "phase", "word"),
    [
        ("starting", "", "starting"),
        ("starting", "join", "waiting"),
        ("starting", "wait", "waiting"),
        ("starting", "load", "starting"),
        ("ready", "serve", "serving"),
        ("ready", "join", "waiting"),
        ("ready", "spawn", "starting"),
        ("stopping", "serve", "stopping"),
    ],
)
def test_a_node_that_joins_tells_its_state_itself_and_no_server_is_asked(stage: str, phase: str, word: str) -> None:
    with serving(Stub({"/health": (200, b'{"status": "draining"}')})) as stub:
        nobody = ProcessIdentity(1, 2, "b")
        state = InstanceState("tiny", "tiny-oss", stage, stub.url, nobody, None, 0.0, 1.0, is_detached=True)
        assert state_now(replace(state, head_addr="10.0.0.1:29540", phase=phase)) == word


@pytest.mark.parametrize(("share", "word"), [(0.0, "100% GPU"), (0.001, "1%/99% CPU/GPU"), (0.999, "99%/1% CPU/GPU")])
def test_no_share_is_rounded_away(share: float, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, line = shown([{**HERE, "cpu_share": share}], 140, monkeypatch)
    assert word in " ".join(line)


METRICS = """\
hlaunch_rank_state{device="cuda:0",engine="0",node="a",rank="0",state="idle"} 1.0
hlaunch_rank_state{device="cuda:0",engine="1",node="a",rank="0",state="idle"} 1.0
hlaunch_rank_state{device="cpu",engine="0",node="a",rank="1",state="idle"} 1.0
hlaunch_rank_state{device="cpu",engine="0",node="a",rank="2",state="idle"} 1.0
hlaunch_rank_memory_bytes{device="cuda:0",engine="0",node="a",rank="0"} 100
hlaunch_rank_memory_bytes{device="cuda:0",engine="1",node="a",rank="0"} 100
hlaunch_rank_memory_bytes{device="cpu",engine="0",node="a",rank="1"} 20
hlaunch_rank_memory_bytes{device="cpu",engine="0",node="a",rank="2"} 3
"""


def test_memory_is_what_the_ranks_tell_and_a_gpu_counts_once() -> None:
    with serving(Stub({"/metrics": (200, METRICS.encode())}, key="k")) as stub:
        assert rank_memory_bytes(stub.url, "k") == 123
        assert rank_memory_bytes(stub.url, None) is None, "the key is missing"
    assert rank_memory_bytes(stub.url, "k") is None, "it has ended"


@pytest.mark.parametrize("told", [None, "2048", 0, 2.5])
def test_a_context_that_is_no_count_is_none(told: object) -> None:
    assert Ready("u", "m", 0.0, {"max_model_len": told}).context_tokens is None
