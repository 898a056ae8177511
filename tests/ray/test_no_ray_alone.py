"""An engine on one node never loads Ray: seen in the memory maps of its processes, not in what they say."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ray_nodes import ROOT, wait_for

from engine.config import CacheConfig, EngineConfig, ServerConfig


def tree(root: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return sorted(found)


def test_a_server_with_two_ranks_on_one_node_has_no_ray_in_memory() -> None:
    config = EngineConfig(
        model="tiny-oss",
        tensor_parallel_size=2,
        cpu_threads=1,
        cache=CacheConfig(num_blocks=64),
        server=ServerConfig(port=0),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "engine.json"
        file.write_text(config.to_json())
        read, write = os.pipe()
        server = subprocess.Popen(
            [sys.executable, "-m", "engine.server", "--config", str(file), "--status-fd", str(write)],
            cwd=ROOT, pass_fds=(write,), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(write)
        try:
            with os.fdopen(read) as status:
                assert any('"kind":"ready"' in line.replace(" ", "") for line in status)
            pids = tree(server.pid)
            maps = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in pids}
            assert len(pids) == 4, "API, core and two ranks"
            assert sum("libtorch" in text for text in maps.values()) >= 2
            assert [pid for pid, text in maps.items() if "/ray/" in text] == []
        finally:
            server.terminate()
            server.wait(30)
    wait_for(lambda: len(tree(server.pid)) == 1, 5)
