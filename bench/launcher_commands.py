"""Time the commands that people wait for before anything starts: `python bench/launcher_commands.py [--runs N]`.

Each figure is the median of whole processes, wall clock and processor time; the first run of each warms the file cache
and is not counted. It also says which heavy modules a command loaded: none may appear.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "ray", "numpy", "fastapi", "cupy", "transformers")
LIMITS = {"--help": 0.5, "list": 1.0, "validate of 1,000 models": 1.5, "plan": 1.0, "plan of a cluster": 1.0}
CHILD = """
import sys
from launcher.cli import run
code = run(sys.argv[1:])
heavy = sorted({name.partition(".")[0] for name in sys.modules} & set({HEAVY}))
sys.stderr.write("\\nHEAVY " + " ".join(heavy) + "\\n")
sys.exit(code or 0)
""".replace("{HEAVY}", repr(HEAVY))


@dataclass(frozen=True, slots=True)
class Figure:
    """Medians in seconds; `limit` is what the command promises on two cores."""

    command: str
    wall_seconds: float
    cpu_seconds: float
    limit: float
    heavy: str


def measure(name: str, arguments: list[str], folder: Path, runs: int) -> Figure:
    """Run one command `runs` times and once before. Raises: RuntimeError when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    walls, cpus, heavy = [], [], ""
    for run in range(runs + 1):
        before, began = os.times(), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments], cwd=folder, env=environment, capture_output=True, text=True
        )
        wall, after = time.perf_counter() - began, os.times()
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-1000:]}")
        heavy = done.stderr.rpartition("HEAVY ")[2].strip()
        if run:
            walls.append(wall)
            used = after.children_user + after.children_system
            cpus.append(used - before.children_user - before.children_system)
    return Figure(name, statistics.median(walls), statistics.median(cpus), LIMITS[name], heavy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hlaunch-bench-") as name:
        folder = Path(name)
        models = "".join(f"  m{i}: {{model: org/model-{i}, max-num-seqs: {1 + i % 64}, tp: 1}}\n" for i in range(1000))
        (folder / "thousand.yml").write_text(f"version: 1\nmodels:\n{models}")
        nodes = str(ROOT / "examples" / "two-nodes.yml")
        commands = {
            "--help": ["--help"],
            "list": ["list"],
            "validate of 1,000 models": ["validate", "thousand.yml"],
            "plan": ["plan", "tiny-oss"],
            "plan of a cluster": ["--file", nodes, "plan", "gpt-oss-20b"],
        }
        figures = [measure(name, given, folder, arguments.runs) for name, given in commands.items()]
    if arguments.json:
        print(json.dumps([asdict(figure) for figure in figures], indent=2))
        return
    print(f"{'COMMAND':<26}{'WALL s':>8}{'CPU s':>8}{'LIMIT s':>9}  HEAVY MODULES")
    for figure in figures:
        print(
            f"{figure.command:<26}{figure.wall_seconds:8.2f}{figure.cpu_seconds:8.2f}{figure.limit:9.1f}"
            f"  {figure.heavy or 'none'}"
        )


if __name__ == "__main__":
    main()
