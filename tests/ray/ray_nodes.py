"""Two Ray nodes on one machine: two raylets on two loopback addresses, started as the node supervisor starts them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.registry.cluster import RaySettings
from launcher.supervise.node_spec import NodeSpec, Peer
from launcher.supervise.ray_process import ray_argv, ray_environment

ROOT = Path(__file__).resolve().parents[2]
# Not 127.0.0.1: Ray takes that for a slip and puts the machine's own address in its place.
ONE, TWO = "127.0.0.2", "127.0.0.3"
ADDRESSES = {"one": ONE, "two": TWO}


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
    return value


def descendants(ancestor: int) -> set[int]:
    """Find all processes below one."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return found - {ancestor}


def command_line(pid: int) -> str:
    """Read a process's command line; empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on, on any address, outside the range that the kernel hands out."""
    found: list[int] = []
    port = 20000 + secrets.randbelow(8000)
    while len(found) < count:
        port += 1
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::", port))
            found.append(port)
    return found


@dataclass
class RayPair:
    """The head is node one, with the cluster's control store; `stop` and `start` work on either node."""

    folder: Path
    cpus: int = 2
    gpus: int = 0
    has_token: bool = True
    addresses: Mapping[str, str] = field(default_factory=lambda: ADDRESSES)
    prefixes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What a node's commands begin with, such as `ip netns exec NAME`."""
    specs: dict[str, NodeSpec] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.token = self.folder / "ray_token"
        self.token.write_text(secrets.token_urlsafe(32))
        self.token.chmod(0o600)
        port = free_ports(1)[0]
        peers = (Peer("one", self.addresses["one"], "head"), Peer("two", self.addresses["two"], "worker"))
        for number, peer in enumerate(peers):
            ports = free_ports(6)
            first = 30000 + 200 * secrets.randbelow(10) + 100 * number
            settings = RaySettings(
                port=port, node_manager_port=ports[0], object_manager_port=ports[1], runtime_env_agent_port=ports[2],
                dashboard_agent_grpc_port=ports[3], metrics_export_port=ports[4], dashboard_agent_listen_port=ports[5],
                dashboard_port=0, worker_ports=(first, first + 99), object_store_bytes=100 << 20,
            )  # fmt: skip
            self.specs[peer.name] = NodeSpec(
                launch="pair", cluster="pair", node=peer.name, role=peer.role, ip=peer.ip, plan="0" * 64, peers=peers,
                model="tiny-oss", revision=None, run_folder=str(self.folder / peer.name), engine_config="",
                ray=settings, ray_folder=str(self.folder / f"r{number}"), token_file=str(self.token),
                cpus=self.cpus, gpus=self.gpus,
            )  # fmt: skip

    @property
    def address(self) -> str:
        return self.specs["one"].head_address

    @property
    def variables(self) -> Mapping[str, str]:
        """What the engine's environment says of this cluster."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token), "RAY_USAGE_STATS_ENABLED": "0"}

    def start(self, node: str, **environ: str) -> None:
        spec = self.specs[node]
        chosen = ray_environment(spec, {**os.environ, "PYTHONPATH": str(ROOT), **environ})
        if not self.has_token:
            chosen = {name: value for name, value in chosen.items() if not name.startswith("RAY_AUTH")}
            chosen |= {"RAY_AUTH_MODE": "disabled", "HOME": str(self.folder)}
        with (self.folder / f"{node}.log").open("ab") as log:
            self.processes[node] = subprocess.Popen(
                [*self.prefixes.get(node, ()), *ray_argv(spec)],
                env=chosen, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def stop(self, node: str, sig: signal.Signals = signal.SIGKILL) -> None:
        """End a whole node at once: everything that its Ray started, actors and ranks included."""
        process = self.processes.pop(node, None)
        if process is None:
            return
        for pid in self.pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sig)
        process.kill()
        process.wait()

    def pids(self, node: str) -> list[int]:
        """Every process of a node: those of its Ray's session, and those that name its folder or address."""
        session = self.processes[node].pid if node in self.processes else -1
        found = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError, IndexError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if entry.isdigit() and int(fields[3]) == session and fields[0] != "Z":
                    found.append(int(entry))
        return found

    def raylet(self, node: str) -> int:
        return next(pid for pid in self.pids(node) if "raylet/raylet " in command_line(pid))

    def alive(self) -> list[str]:
        view = [sys.executable, "-m", "engine.executor.ray_view", "--address", self.address]
        done = subprocess.run(
            [*self.prefixes.get("one", ()), *view],
            env={**os.environ, **self.variables, **({} if self.has_token else {"RAY_AUTH_MODE": "disabled"})},
            cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        nodes = json.loads(done.stdout or "{}").get("nodes", ())
        return [node["ip"] for node in nodes if node["is_alive"]]


@contextlib.contextmanager
def ray_pair(nodes: tuple[str, ...] = ("one", "two"), **options: Any) -> Iterator[RayPair]:
    """Start both nodes and wait until they have joined; at the end nothing of them is left."""
    # Short: Ray's sockets lie below it, and a socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="hlr-"))
    pair = RayPair(folder, **options)
    try:
        for node in nodes:
            pair.start(node)
            wait_for(lambda node=node: pair.addresses[node] in pair.alive(), 60)
        yield pair
    finally:
        for node in reversed(nodes):
            pair.stop(node)
        shutil.rmtree(folder, ignore_errors=True)
