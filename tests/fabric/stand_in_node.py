"""Stands in for ssh and the nodes behind it: `stand_in_node.py [options] -- NODE COMMAND`.

Every command is noted in `commands` of the given folder, and while `<NODE>.gone` is there that node does not answer.
`launcher.node start` leaves `<NODE>.log` as the node's log, `launcher.probe` reports a node that is ready,
`launcher.node stop` notes that it was asked; a look at the host is answered with `<NODE>.facts`, one line each time;
everything else is run by a shell, as ssh would. With `together` no log is given before all nodes were asked for theirs,
and that of a node with `<NODE>.slow` a second later.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[1])
    node, command = sys.argv[sys.argv.index("--") + 1 :]
    with (folder / "commands").open("a") as file:
        file.write(f"{node}: {command}\n")
    if (folder / f"{node}.gone").exists():
        sys.exit(255)
    words = shlex.split(command)
    module = words[words.index("-m") + 1] if "-m" in words else ""
    if module == "launcher.node" and "start" in words:
        shutil.copyfile(folder / f"{node}.log", words[words.index("--log") + 1])
    elif module == "launcher.node":
        with (folder / "stopped").open("a") as file:
            file.write(f"{node}\n")
    elif module == "launcher.probe":
        url = "http://10.9.0.1:8000" if node == "one" else ""
        report = {"state": "ready", "url": url, "phases": [], "events": [], **json.loads(_said(folder, node))}
        print(json.dumps(report), flush=True)
        if "watch" in words:
            time.sleep(60)
    elif words == ["python3", "-"] and (facts := folder / f"{node}.facts").exists():
        line, _, rest = facts.read_text().partition("\n")
        facts.write_text(rest)
        print(line)
    else:
        if "node.log" in command and (folder / "together").exists():
            _meet(folder, node)
        os.execvp("sh", ["sh", "-c", command])


def _meet(folder: Path, node: str) -> None:
    """Give no log before every node was asked for its own."""
    (folder / f"{node}.asked").touch()
    deadline = time.monotonic() + 20
    while not all((folder / f"{name}.asked").exists() for name in ("one", "two")):
        if time.monotonic() > deadline:
            sys.exit(1)
        time.sleep(0.02)
    if (folder / f"{node}.slow").exists():
        time.sleep(1.0)


def _said(folder: Path, node: str) -> str:
    path = folder / f"{node}.json"
    return path.read_text() if path.exists() else "{}"


if __name__ == "__main__":
    main()
