"""Docker as a command: what the daemon may do, containers by label.

Knows: argv and the JSON that Docker prints. Refuses to know: what is in the containers, ssh (a `Shell` is handed in).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

from launcher.compose.host import HostFacts

FACTS_SCRIPT = """\
pid=$(cat /var/run/docker.pid 2>/dev/null || pidof dockerd | tr ' ' '\\n' | tail -1)
grep CapEff /proc/$pid/status 2>/dev/null
grep 'Max open files' /proc/$pid/limits 2>/dev/null
docker version --format 'engine {{.Server.Version}}' 2>/dev/null
test -e /dev/infiniband && echo rdma
true
"""
"""POSIX sh without arguments: nothing of ours is ever put into it."""
_CAP_SYS_RESOURCE = 24


def read_host_facts(environ: Mapping[str, str]) -> HostFacts:
    """Ask this host what Docker may do on it."""
    done = subprocess.run(
        ["sh", "-c", FACTS_SCRIPT], env=dict(environ), capture_output=True, text=True, timeout=20, check=False
    )
    return parse_host_facts(done.stdout)


def parse_host_facts(text: str) -> HostFacts:
    """Read what the script printed; what is missing counts as able."""
    can_raise, engine, nofile, has_rdma = True, 0, 0, False
    for line in text.splitlines():
        words = line.split()
        if line.startswith("CapEff:") and len(words) == 2:
            can_raise = bool(int(words[1], 16) >> _CAP_SYS_RESOURCE & 1)
        elif line.startswith("Max open files") and len(words) >= 5 and words[4].isdigit():
            nofile = int(words[4])
        elif words[:1] == ["engine"] and len(words) == 2 and (major := words[1].split(".")[0]).isdecimal():
            # Without a daemon, Docker prints no version and says so by its exit status.
            engine = int(major)
        elif line == "rdma":
            has_rdma = True
    return HostFacts(can_raise, engine, nofile, has_rdma)


def parse_containers(text: str) -> list[dict[str, Any]]:
    """Read `docker ps --format '{{json .}}'`, one object a line."""
    found = []
    for line in text.splitlines():
        try:
            loaded = json.loads(line)
        except ValueError:
            continue
        if isinstance(loaded, dict):
            found.append(loaded)
    return found
