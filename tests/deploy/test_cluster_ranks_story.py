"""What a head's engine says becomes its node's story: the wait for ranks under its own name, restarts, last words."""

from __future__ import annotations

import json

from launcher.supervise.node_engine import EngineStory
from launcher.supervise.node_report import NodeReport
from launcher.supervise.node_spec import NodeSpec, Peer

SPEC = NodeSpec(
    launch="m", cluster="c", node="one", role="head", ip="10.0.0.1", plan="0" * 64,
    peers=(Peer("one", "10.0.0.1", "head"),), model="tiny-oss", revision=None, run_folder="/tmp/x", engine_config="",
)  # fmt: skip


def phase(name: str, state: str, detail: str = "") -> bytes:
    return json.dumps({"kind": "phase", "phase": name, "state": state, "detail": detail}).encode()


def test_the_wait_for_ranks_ends_with_what_ray_took_of_it() -> None:
    report, told = NodeReport(SPEC), []
    story = EngineStory(report, told.append)
    report.begin("nodes")
    report.end("nodes", "2 of 2")
    story.take(phase("nodes", "begin"))
    story.take(phase("nodes", "progress", "Ray: 1.9 s (checked and connected 1.2, placed 0.03, actors 0.6)"))
    story.take(phase("nodes", "progress", "two came from host-b"))
    story.take(phase("nodes", "end"))
    shown = {item["name"]: (item["state"], item["detail"]) for item in report.to_data()["phases"]}
    assert shown == {
        "nodes": ("end", "2 of 2"),
        "placement": ("end", "Ray: 1.9 s (checked and connected 1.2, placed 0.03, actors 0.6)"),
    }
    assert told == []


def test_a_restart_is_told_and_lasts_until_the_engine_serves_again() -> None:
    report, told = NodeReport(SPEC), []
    story = EngineStory(report, told.append)
    story.take(phase("restart", "begin", "node two is lost; it is started again in 1 s"))
    assert story.is_restarting
    story.take(phase("load", "progress"))
    assert story.is_restarting
    story.take(phase("restart", "end", "serves again"))
    assert not story.is_restarting
    assert told == ["engine: node two is lost; it is started again in 1 s", "engine: serves again"]


def test_the_first_cause_of_an_end_counts_and_noise_is_dropped() -> None:
    report = NodeReport(SPEC)
    story = EngineStory(report, lambda _: None)
    story.take(b"not a record")
    story.take(json.dumps({"kind": "ready", "url": "http://x", "model": "m", "facts": {"a": 1}}).encode())
    assert (story.is_ready, report.url, report.facts) == (True, "http://x", {"a": 1})
    for message in ("the first", "what followed"):
        story.take(json.dumps({"kind": "fatal", "message": message, "exit_code": 6}).encode())
    assert story.fatal is not None
    assert (story.fatal.message, story.fatal.exit_code) == ("the first", 6)
    assert story.fatal_deadline is not None
