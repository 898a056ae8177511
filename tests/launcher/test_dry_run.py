"""`up --dry-run` as a user runs it, and the live view on a terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time

from launcher_support import RUN_UP, Launcher


def test_the_sections_and_nothing_started(hlaunch: Launcher) -> None:
    result = hlaunch.cli("up", "tiny-oss", "--dry-run", "--set", "max-num-seqs=4")
    assert result.returncode == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert any(line.startswith("max-num-seqs 4 flag (--set") for line in lines)
    assert any(line.startswith("model tiny-oss model (model_registry.yml:2:") for line in lines)
    for heading in ("memory", "placement: tp 1 pp 1 dp 1, 1 rank", "topology", "environment of the engine", "fits"):
        assert heading in lines
    assert "HF_HUB_OFFLINE 1 built-in" in lines
    begin = result.stdout.index("{\n")
    config, _ = json.JSONDecoder().raw_decode(result.stdout[begin:])
    assert config["scheduler"]["max_num_seqs"] == 4
    assert f"{hlaunch.state}/instances/tiny-oss/engine.json --status-fd N" in result.stdout
    assert not hlaunch.state.exists(), "a dry run writes nothing"


def test_json_is_the_same_as_data(hlaunch: Launcher) -> None:
    result = hlaunch.cli("up", "tiny-oss", "--dry-run", "--json")
    data = json.loads(result.stdout)
    assert data["values"]["model"]["origin"].startswith("model (model_registry.yml:2:")
    assert data["fit"]["fits"]
    assert data["argv"][-2:] == ["--status-fd", "N"]
    assert data["engine_config"]["server"]["served_model_names"] == ["tiny-oss", "tiny"]
    assert data["placement"][0]["device"] == "cpu"
    assert hlaunch.cli("up", "tiny-oss", "--json").returncode == 2


def test_the_seeds_form(hlaunch: Launcher) -> None:
    hlaunch.environ["MODEL_NAME"] = "tiny-oss"
    result = hlaunch.cli("--dry-run")
    assert result.returncode == 0
    assert "engine.server" in result.stdout
    hlaunch.environ["MODEL_NAME"] = "tiny-os"
    unknown = hlaunch.cli("--dry-run")
    assert unknown.returncode == 4
    assert "gpt-oss-20b" in unknown.stderr


def test_a_model_without_files_is_planned_and_a_too_large_one_exits_6(hlaunch: Launcher) -> None:
    data = json.loads(hlaunch.cli("up", "gpt-oss-20b", "--dry-run", "--json").stdout)
    assert data["fit"]["checkpoint_bytes"] == 13761264768
    assert data["blockers"][0]["exit_code"] == 5
    refused = hlaunch.cli("up", "parallel", "--dry-run", "--set", "tp=3")
    assert refused.returncode == 6
    assert refused.stderr.splitlines()[-1] == "error: no placement: tp 3: 16 attention heads do not divide by it"
    assert "engine.json" in refused.stdout, "the plan is shown all the same"


def test_ranks_their_memory_and_the_engines_placement_are_shown(hlaunch: Launcher) -> None:
    result = hlaunch.cli("up", "parallel", "--dry-run", "--set", "device=cpu")
    assert result.returncode == 0, result.stderr
    for part in ("placement: tp 2 pp 1 dp 1, 2 ranks", "[0]═[1]", " in 2 ranks", '"tensor_parallel_size": 2'):
        assert part in result.stdout
    assert " ranks share " in result.stderr
    data = json.loads(hlaunch.cli("up", "parallel", "--dry-run", "--json", "--set", "device=cpu").stdout)
    assert [memory["device"] for memory in data["memory"]] == ["cpu:0", "cpu:1"]
    ranks = json.loads(data["engine_config"]["placement"])["ranks"]
    assert [rank["device"] for rank in ranks] == ["cpu:0", "cpu:1"]


def test_a_dry_run_loads_nothing_heavy(hlaunch: Launcher) -> None:
    code = (
        "import sys\nfrom launcher.cli import run\nrun(['up', 'tiny-oss', '--dry-run', '--json'])\n"
        "print([m for m in ('torch', 'numpy', 'rich', 'fastapi', 'psutil') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=hlaunch.folder,
        env=hlaunch.environ,
        text=True,
        capture_output=True,
        check=True,
    )
    assert result.stderr.splitlines()[-1] == "[]"


def test_a_terminal_sees_live_phases_and_a_clean_end(hlaunch: Launcher) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(RUN_UP), "slow"],
        cwd=hlaunch.folder,
        env=hlaunch.environ | {"TERM": "xterm-256color", "COLUMNS": "100"},
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    seen = b""
    deadline = time.monotonic() + 20
    while b"Ctrl-C stops" not in seen and time.monotonic() < deadline:
        seen += os.read(leader, 4096)
    process.send_signal(signal.SIGINT)
    while time.monotonic() < deadline:
        try:
            data = os.read(leader, 4096)
        except OSError:
            break
        if not data:
            break
        seen += data
    os.close(leader)
    assert process.wait(timeout=5) == 0
    text = seen.decode()
    assert "load" in text
    assert "\x1b[?25h" in text, "the cursor is shown again"
    assert text.rstrip().endswith("stopped")
