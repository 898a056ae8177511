"""Reads nodes: the collector's source is piped into a Python there, over plain `ssh` or into a container.

Knows: how a node is reached, deadlines, why it was not. Refuses to know: what the facts mean. Nothing is installed or
left behind on the far side; it needs `python3` and nothing else.
"""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from launcher.compose.labels import LABEL
from launcher.fabric.bounded import Ended, run_bounded
from launcher.fabric.facts import BadFacts, NodeFacts, node_facts, parse_facts
from launcher.registry.cluster import Cluster, Node

NODE_SECONDS = 20.0
CONNECT_SECONDS = 8
_MODULES = ("files", "network", "infiniband", "host", "main")
_INSIDE = (
    f'id=$(docker ps -q --filter "label={LABEL}.model=$1" --filter "label={LABEL}.node=$2" | head -n 1); '
    '[ -n "$id" ] || { echo "No such container: $1 does not run in one on $2" >&2; exit 1; }; '
    'shift 2; exec docker exec -i "$id" "$@"'
)
"""Runs a program inside the node's container, whatever its number is by now."""
_WAYS_TO_FAIL = (
    ("Permission denied", "ssh-copy-id {ssh}"),
    ("Host key verification failed", "ssh {ssh} true, and accept the host key once"),
    ("Could not resolve hostname", "correct 'ssh' of the node in the registry, or add the name to /etc/hosts"),
    ("Connection refused", "start sshd there: sudo systemctl start ssh"),
    ("timed out", "ssh {ssh} true; is the host on, and the network up?"),
    ("No route to host", "ip route get the address of {ssh}"),
    ("python3: not found", "install Python there: sudo apt-get install python3"),
    ("python3: command not found", "install Python there: sudo apt-get install python3"),
    ("No such container", "start it first: hlaunch up; names: docker ps"),
)


@dataclass(frozen=True, slots=True)
class Unreachable:
    """Why a node was not read, and the command that shows or mends it."""

    reason: str
    fix: str


@dataclass(frozen=True, slots=True)
class Reach:
    """How commands get to nodes. `container`: run inside it. `launch`: inside the node's container of that launch.

    `python` is the interpreter's name there; `local_python` reads a node without `ssh`: this very host. `ssh` is a
    program with ssh's calling convention.
    """

    container: str | None = None
    launch: str | None = None
    python: str = "python3"
    local_python: str = "python3"
    ssh: str = "ssh"

    @classmethod
    def by(cls, environ: Mapping[str, str], **options: Any) -> Reach:
        """Reach nodes as `up` does: by HLAUNCH_SSH and HLAUNCH_REMOTE_PYTHON where they are set."""
        inside = options.get("container") or options.get("launch")
        python = "python3" if inside else environ.get("HLAUNCH_REMOTE_PYTHON", "python3")
        return cls(python=python, ssh=environ.get("HLAUNCH_SSH", "ssh"), **options)

    def argv(self, node: Node) -> list[str]:
        """Return the command that gives a node's Python a program on its standard input."""
        inner = [self.python, "-"]
        if self.launch is not None:
            inner = ["sh", "-c", _INSIDE, "sh", self.launch, node.name, *inner]
        elif self.container is not None:
            inner = ["docker", "exec", "-i", self.container, *inner]
        elif node.ssh is None:
            return [self.local_python, "-"]
        if node.ssh is None:
            return inner
        options = ["-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
        # ssh joins what follows with spaces for a shell there, so each word is quoted.
        return [self.ssh, *options, "--", node.ssh, shlex.join(inner)]


@cache
def collector_source() -> str:
    """Return the collector as one program: its modules joined, their imports of each other dropped."""
    folder = Path(__file__).with_name("collector")
    parts = ["from __future__ import annotations", "import sys", "sys.path[:] = [item for item in sys.path if item]"]
    for name in _MODULES:
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if not _is_ours(node)]
        parts.append(ast.unparse(tree))
    return "\n".join(parts) + "\n"


def _is_ours(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    return isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("launcher", "__future__"))


def program(source: str, settings: Mapping[str, Any]) -> bytes:
    """Append the call to a source. The settings travel as a quoted text inside it, so no shell ever sees them."""
    return f"{source}\nimport json\nrun(json.loads({json.dumps(json.dumps(settings))}))\n".encode()


def read_node(
    node: Node, settings: Mapping[str, Any], reach: Reach, seconds: float = NODE_SECONDS
) -> NodeFacts | Unreachable:
    """Read one node within `seconds`; never raises."""
    argv = reach.argv(node)
    try:
        ended = run_bounded(argv, program(collector_source(), settings), seconds=seconds)
    except OSError as error:
        return Unreachable(f"cannot run {argv[0]}: {error.strerror}", f"install {argv[0]}")
    if ended.code != 0:
        return _failure(node, ended, seconds)
    try:
        raw = parse_facts(ended.out)
    except BadFacts as error:
        return Unreachable(f"its answer is not understood: {error}", " ".join(argv))
    far = raw.get("time")
    return node_facts(raw, skew_seconds=_skew(float(far), ended) if isinstance(far, int | float) else None)


def _skew(far: float, ended: Ended) -> float:
    """Return the least difference of the clocks that explains the far time: 0 when it lies within the run."""
    if far > ended.ended:
        return far - ended.ended
    return far - ended.began if far < ended.began else 0.0


def _failure(node: Node, ended: Ended, seconds: float) -> Unreachable:
    destination = node.ssh or "this host"
    if ended.code is None:
        reason = f"no answer within {seconds:.0f} s"
        return Unreachable(reason, f"ssh {destination} true" if node.ssh else "run it again with --deadline 60")
    reason = ended.last_line or f"exit status {ended.code}"
    for words, fix in _WAYS_TO_FAIL:
        if words in ended.err:
            return Unreachable(reason, fix.format(ssh=destination))
    return Unreachable(reason, f"ssh {destination} true" if node.ssh else "hlaunch doctor --debug")


def read_tree(root: Path) -> NodeFacts | Unreachable:
    """Read a folder that holds a host's `sys`, `proc`, `dev` and `etc`; nothing is pinged."""
    from launcher.fabric.collector.main import collect

    if not root.is_dir():
        return Unreachable(f"there is no folder {root}", f"put the node's sys, proc, dev and etc under {root}")
    return node_facts(collect(root))


def read_cluster(
    cluster: Cluster,
    nodes: Sequence[Node],
    reach: Reach,
    *,
    seconds: float = NODE_SECONDS,
) -> dict[str, NodeFacts | Unreachable]:
    """Read nodes side by side, each within `seconds`; each pings all other nodes of the cluster."""

    def one(node: Node) -> NodeFacts | Unreachable:
        settings = {
            "peers": [other.ip for other in cluster.nodes if other.name != node.name],
            "mtu": cluster.fabric.mtu or 0,
            "address": node.ip,
        }
        return read_node(node, settings, reach, seconds)

    with ThreadPoolExecutor(max_workers=max(1, min(32, len(nodes)))) as pool:
        return dict(zip([node.name for node in nodes], pool.map(one, nodes), strict=True))
