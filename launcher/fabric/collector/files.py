"""Small readers under a root: text, numbers, links, commands. What cannot be read counts as absent; nothing raises."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

COMMAND_SECONDS = 5.0


def read_text(path: Path) -> str:
    """Return a file's text without the newline at its end; empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").rstrip("\n")
    except OSError:  # absent, or sysfs answers EINVAL for a GID that is not populated
        return ""


def read_int(path: Path, default: int = -1) -> int:
    text = read_text(path).strip()
    return int(text) if re.match(r"^-?\d+$", text) else default


def entries(path: Path) -> list[str]:
    """Return the sorted names in a folder, none when there is none."""
    try:
        return sorted(os.listdir(str(path)))
    except OSError:
        return []


def leaf_number(name: str) -> int:
    """Return the number at the end of a name, for sorting `2` before `10`; 0 without one."""
    match = re.search(r"(\d+)$", name)
    return int(match.group(1)) if match else 0


def under(root: Path, path: str) -> Path:
    """Put an absolute path under the root."""
    return root / path.lstrip("/")


def bdf_of(path: Path) -> str:
    """Return the PCI address (`0000:01:00.0`) that a device link leads to, empty for a virtual device."""
    name = os.path.basename(os.path.realpath(str(path)))
    return name if re.match(r"^[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$", name) else ""


def bridges_of(path: Path) -> list[str]:
    """Return the PCI addresses from the root complex down to a device, the device last."""
    parts = os.path.realpath(str(path)).split(os.sep)
    return [part for part in parts if re.match(r"^[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$", part)]


def command_output(root: Path, *argv: str) -> str:
    """Run a command of the host under `root` and return its first line; empty when it is absent, fails or hangs.

    Under a fixture's root only the programs of that tree are seen.
    """
    folders = ("usr/local/bin", "usr/bin", "bin")
    path = None if str(root) == "/" else os.pathsep.join(str(root / folder) for folder in folders)
    program = shutil.which(argv[0], path=path)
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program] + list(argv[1:]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else ""
