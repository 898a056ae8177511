"""What a look at a cluster, with the token and as a stranger, lets happen: only a refusal of the stranger will do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ray_nodes import ROOT, wait_for

from engine.executor import ray_access
from engine.executor.base import ExecutorError
from engine.executor.ray_access import Doors, RayRefused

NODES = {"nodes": [{"ip": "10.0.0.1", "is_alive": True}, {"ip": "10.0.0.2", "is_alive": False}]}
REFUSED = {"error": "refused", "message": "the head refused this node's Ray token"}
SILENT = {"error": "unreachable", "message": "no answer within 20 s"}


def doors(monkeypatch: pytest.MonkeyPatch, ours: Mapping[str, Any], strangers: Mapping[str, Any]) -> Doors:
    """Doors behind which somebody answers as told; a stranger is who has no token in its environment."""

    class View:
        def __init__(self, address: str, environ: Mapping[str, str]) -> None:
            assert address == "10.0.0.1:6379"
            self.said = ours if "RAY_AUTH_TOKEN_PATH" in environ else strangers

        def answer(self) -> Mapping[str, Any]:
            return self.said

        def close(self) -> None:
            pass

    monkeypatch.setattr(ray_access, "_View", View)
    return Doors("10.0.0.1:6379", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/token"})


def test_a_cluster_that_refuses_strangers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    doors(monkeypatch, NODES, REFUSED).check("10.0.0.1")


@pytest.mark.parametrize(
    ("ours", "strangers", "error", "message"),
    [
        (NODES, NODES, RayRefused, "lets in anyone"),
        (NODES, SILENT, ExecutorError, "lets in anyone cannot be told: no answer within 20 s"),
        (NODES, {"error": "failed", "message": "no module"}, ExecutorError, "cannot be told: no module"),
        (REFUSED, REFUSED, RayRefused, "refused this node's token"),
        (SILENT, REFUSED, ExecutorError, "cannot be reached: no answer"),
    ],
)
def test_anything_else_is_not(
    ours: Mapping[str, Any],
    strangers: Mapping[str, Any],
    error: type[ExecutorError],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(error, match=message):
        doors(monkeypatch, ours, strangers).check("10.0.0.1")


def test_an_engine_on_no_node_of_the_cluster_is_told_which_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExecutorError, match=r"runs at 10\.0\.0\.2, .* \(there: 10\.0\.0\.1\)"):
        doors(monkeypatch, NODES, REFUSED).check("10.0.0.2")


LOOKER = """\
import os, sys, time
from engine.executor.ray_access import Doors
doors = Doors(sys.argv[1], os.environ)
print(doors._ours._process.pid, doors._strangers._process.pid, flush=True)
time.sleep(60)
"""


def test_looks_end_with_who_sent_them() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        looker = subprocess.Popen([sys.executable, "-c", LOOKER, address], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert looker.stdout is not None
        children = [int(pid) for pid in looker.stdout.readline().split()]
        assert len(children) == 2
        looker.kill()
        looker.communicate()
        wait_for(lambda: not any(map(is_running, children)), 5)


def test_looks_that_nobody_asked_are_ended_as_well() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        doors = Doors(f"127.0.0.1:{silent.getsockname()[1]}", os.environ)
        doors.close()
        doors.close()
    assert not any(is_running(view._process.pid) for view in (doors._ours, doors._strangers))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
