"""Fixtures of the server tests."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from server_support import RunningServer, running


@pytest.fixture(scope="session")
def shared_server() -> Iterator[RunningServer]:
    """One server with the default script, for tests that change nothing about it."""
    with running() as server:
        yield server


@pytest.fixture
def http(shared_server: RunningServer) -> Iterator[httpx.Client]:
    with shared_server.http() as client:
        yield client
