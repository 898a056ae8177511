"""Draw docs/demo.svg, plan.svg and top.svg: what a terminal shows while models are planned, started and watched. Needs
tmux.

It runs the real commands in a real terminal and keeps the colours of the last screen. `record_demo.py top` draws one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
SESSION = "hlaunch-demo"


@dataclass(frozen=True)
class Scene:
    """Lines to type, each with the text to wait for, the seconds it may take, and how long to look on afterwards."""

    title: str
    columns: int
    rows: int
    lines: tuple[tuple[str, str, float, float], ...]


SCENES = {
    "demo": Scene(
        "hlaunch up tiny-oss",
        112,
        44,
        (
            ("hlaunch up tiny-oss --detach", "stop with", 60.0, 0.5),
            ("hlaunch ps", "UPTIME", 10.0, 0.5),
            ("hlaunch chat tiny-oss --temperature 0 -m 'What is 3 + 4?'", "", 8.0, 4.0),
        ),
    ),
    "plan": Scene(
        "hlaunch plan",
        100,
        78,
        (("hlaunch --file examples/two-nodes.yml plan gpt-oss-20b", "what would run", 10.0, 1.5),),
    ),
    "top": Scene(
        "hlaunch top",
        80,
        23,
        (
            ("hlaunch up tiny-oss --detach > /dev/null 2>&1; clear; echo up", "up", 60.0, 5.0),
            ("(hlaunch bench tiny-oss -c 8 --output 512 -r 4 --runs 9 > /dev/null 2>&1 &) && clear", "$", 5.0, 4.0),
            ("hlaunch top --interval 0.5", "first token", 10.0, 16.0),
        ),
    ),
}


def tmux(*args: str) -> str:
    return subprocess.run(["tmux", *args], check=True, capture_output=True, text=True).stdout


def wait_for(text: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while text not in tmux("capture-pane", "-p", "-t", SESSION):
        if time.monotonic() > deadline:
            sys.exit(f"error: {text!r} did not appear within {seconds:.0f} s")
        time.sleep(0.2)


def main() -> int:
    for name in sys.argv[1:] or SCENES:
        record(SCENES[name], ROOT / "docs" / f"{name}.svg")
    return 0


def record(scene: Scene, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        setup = f"cd {ROOT} && export PATH={path} HLAUNCH_STATE_DIR={folder} PS1='$ ' && clear"
        tmux(
            "new-session",
            "-d",
            "-s",
            SESSION,
            "-x",
            str(scene.columns),
            "-y",
            str(scene.rows),
            "bash --norc --noprofile",
        )
        try:
            tmux("send-keys", "-t", SESSION, setup, "Enter")
            time.sleep(0.5)
            for line, marker, seconds, look_on in scene.lines:
                tmux("send-keys", "-t", SESSION, "-l", line)
                tmux("send-keys", "-t", SESSION, "Enter")
                wait_for(marker, seconds)
                time.sleep(look_on)
            screen = tmux("capture-pane", "-e", "-p", "-t", SESSION).rstrip().replace(str(ROOT), "~/hlaunch")
        finally:
            tmux("send-keys", "-t", SESSION, "C-c", "")
            tmux("send-keys", "-t", SESSION, "clear; hlaunch down --all", "Enter")
            time.sleep(3.0)
            tmux("kill-session", "-t", SESSION)
    console = Console(record=True, width=scene.columns, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text.from_ansi(screen))
    out.parent.mkdir(exist_ok=True)
    out.write_text(console.export_svg(title=scene.title))
    print(f"{out.relative_to(ROOT)}: {len(screen.splitlines())} lines")


if __name__ == "__main__":
    sys.exit(main())
