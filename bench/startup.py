"""Time from `hlaunch up tiny-oss` to ready, as a user waits for it: `python bench/startup.py [--runs N] [--json]`.

Each run starts the real command with `--detach`, which returns when the server is ready, and stops it again. The first
run warms the file cache and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HLAUNCH = (sys.executable, "-m", "launcher.cli")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "HLAUNCH_STATE_DIR": folder}
        seconds = [_start_once(environ) for _ in range(arguments.runs + 1)][1:]
    figures = {
        "cores": os.cpu_count(),
        "runs": arguments.runs,
        "seconds_min": min(seconds),
        "seconds_median": statistics.median(seconds),
        "seconds_max": max(seconds),
    }
    if arguments.json:
        print(json.dumps(figures, indent=2))
    else:
        print(
            f"hlaunch up tiny-oss to ready: median {figures['seconds_median']:.2f} s, "
            f"min {figures['seconds_min']:.2f}, max {figures['seconds_max']:.2f} ({arguments.runs} runs)"
        )
    return 0


def _start_once(environ: dict[str, str]) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begin = time.perf_counter()
    command = [*HLAUNCH, "up", "tiny-oss", "--detach", "--set", f"port={port}"]
    subprocess.run(command, env=environ, check=True, capture_output=True)
    seconds = time.perf_counter() - begin
    subprocess.run([*HLAUNCH, "down", "tiny-oss"], env=environ, check=True, capture_output=True)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
