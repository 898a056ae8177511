"""All topologies of two nodes with eight ranks each say what one rank says, token for token; by hand, it takes long."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2")
def test_every_topology_of_two_nodes_with_eight_ranks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "bench/topologies.py", "--ranks", "8", "--json", str(tmp_path / "rows.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 10
    assert all(row["is_same"] for row in rows)
    assert [row["tensor"] * row["pipeline"] * row["data"] for row in rows[:7]] == [16] * 7
    # Every engine of a topology answered.
    assert all(row["engines"] == row["data"] for row in rows)
