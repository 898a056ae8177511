"""A real `hlaunch up tiny-oss`, detached, shared by the tests of one run: real processes, real sockets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest
from e2e_support import Running, free_port, is_running


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("hlaunch")
    port = free_port()
    environ = {**os.environ, "HLAUNCH_STATE_DIR": str(folder), "NO_COLOR": "1"}
    environ.pop("MODEL_NAME", None)
    server = Running(f"http://127.0.0.1:{port}", environ)
    up = server.hlaunch("up", "tiny-oss", "--detach", "--set", f"port={port}", check=False)
    assert up.returncode == 0, up.stderr
    listed = json.loads(server.hlaunch("ps", "--json").stdout)
    yield server
    down = server.hlaunch("down", "tiny-oss", check=False)
    assert down.returncode == 0, down.stderr
    pids = [pid for entry in listed for pid in (entry["pid"], entry["engine_pid"])]
    assert not any(is_running(pid) for pid in pids)
