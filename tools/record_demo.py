"""Draw docs/demo.svg: what a terminal shows while `hlaunch up tiny-oss` starts and answers. Needs tmux.

It runs the real commands in a real terminal and keeps the colours of the last screen.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "demo.svg"
COLUMNS, ROWS = 112, 44
SESSION = "hlaunch-demo"


def tmux(*args: str) -> str:
    return subprocess.run(["tmux", *args], check=True, capture_output=True, text=True).stdout


def wait_for(text: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while text not in tmux("capture-pane", "-p", "-t", SESSION):
        if time.monotonic() > deadline:
            sys.exit(f"error: {text!r} did not appear within {seconds:.0f} s")
        time.sleep(0.2)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        setup = f"cd {ROOT} && export PATH={path} HLAUNCH_STATE_DIR={folder} PS1='$ ' && clear"
        tmux("new-session", "-d", "-s", SESSION, "-x", str(COLUMNS), "-y", str(ROWS), "bash --norc --noprofile")
        try:
            tmux("send-keys", "-t", SESSION, setup, "Enter")
            time.sleep(0.5)
            for line, marker, seconds in (
                ("hlaunch up tiny-oss --detach", "stop with", 60.0),
                ("hlaunch ps", "UPTIME", 10.0),
                ("hlaunch chat tiny-oss --temperature 0 -m 'What is 3 + 4?'", "", 8.0),
            ):
                tmux("send-keys", "-t", SESSION, "-l", line)
                tmux("send-keys", "-t", SESSION, "Enter")
                wait_for(marker, seconds)
                time.sleep(4.0 if not marker else 0.5)
            screen = tmux("capture-pane", "-e", "-p", "-t", SESSION).rstrip().replace(str(ROOT), "~/hlaunch")
        finally:
            tmux("send-keys", "-t", SESSION, "clear; hlaunch down --all", "Enter")
            time.sleep(3.0)
            tmux("kill-session", "-t", SESSION)
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text.from_ansi(screen))
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(console.export_svg(title="hlaunch up tiny-oss"))
    print(f"{OUT.relative_to(ROOT)}: {len(screen.splitlines())} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
