"""What a look at a cluster, with the token and as a stranger, lets happen: only a refusal of the stranger will do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

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
