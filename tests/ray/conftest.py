"""One pair of Ray nodes for all tests of this folder that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ray_engine import ALONE, requests, run
from ray_nodes import RayPair, ray_pair

from engine.engine_core import EngineCore


@pytest.fixture(scope="session")
def pair() -> Iterator[RayPair]:
    with ray_pair(gpus=2) as made:
        yield made


@pytest.fixture
def ray_environ(pair: RayPair, monkeypatch: pytest.MonkeyPatch) -> RayPair:
    """The pair, with this process's environment leading to it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    for name, value in pair.variables.items():
        monkeypatch.setenv(name, value)
    return pair


@pytest.fixture(scope="session")
def alone() -> dict[str, list[int]]:
    """What one rank says to `requests()`."""
    core = EngineCore.start(ALONE)
    try:
        return run(core, requests())
    finally:
        core.stop()
