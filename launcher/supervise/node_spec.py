"""What one node of a cluster is told to run: plain values that travel as JSON, in a compose file or over ssh.

Knows: role, addresses, pinned ports, deadlines, where secrets lie. Refuses to know: registries, plans, secrets
themselves. The engine's own configuration is a second file beside this one, exactly as the dry run prints it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from engine.model_digest import digest_of
from launcher.addresses import host_and_port
from launcher.errors import PreflightError
from launcher.plan.weights import ModelFiles, find_model_files
from launcher.registry.cluster import RaySettings
from launcher.supervise.node_fabric import NodeFabric

HEAD = "head"
WORKER = "worker"
MAX_SPEC_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Peer:
    """A node as the others see it."""

    name: str
    ip: str
    role: str
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One node's part of a launch. Folders and files are paths on that node.

    `run_folder` holds the control socket and the final engine.json (mode 0700, made here). `ray_folder` is Ray's
    session folder; the kernel limits socket paths to 107 bytes, so it must be short. `model_root` is searched first
    for weights, empty: the node's own caches; `load_format` is the engine's. `ray` None: this node joins nobody.
    `fabric` is what the node fills in from its own hardware; None: nothing. Units: seconds, bytes, counts; `cpus` 0:
    all.
    """

    launch: str
    cluster: str
    node: str
    role: str
    ip: str
    plan: str
    peers: tuple[Peer, ...]
    model: str
    revision: str | None
    run_folder: str
    engine_config: str
    ray: RaySettings | None = None
    ray_folder: str = "/tmp/ray"
    token_file: str = ""
    api_key_file: str = ""
    model_root: str = ""
    load_format: str = "auto"
    gpus: int = 0
    cpus: int = 0
    num_ranks: int = 0
    join_timeout_seconds: float = 300.0
    ready_timeout_seconds: float = 900.0
    drain_timeout_seconds: float = 30.0
    fabric: NodeFabric | None = None

    @property
    def is_head(self) -> bool:
        return self.role == HEAD

    @property
    def head(self) -> Peer:
        return next(peer for peer in self.peers if peer.role == HEAD)

    @property
    def head_address(self) -> str:
        """`ip:port` of Ray's control store; an IPv6 address in brackets."""
        return host_and_port(self.head.ip, self.ray.port if self.ray is not None else 0)

    def model_files(self, environ: Mapping[str, str]) -> ModelFiles:
        """Find the model on this node; call it there."""
        searched = {**environ, **({"HLAUNCH_MODEL_DIR": self.model_root} if self.model_root else {})}
        return find_model_files(self.model, self.revision, searched, Path("/"))

    def model_digest(self, environ: Mapping[str, str]) -> str:
        """Take the model's digest on this node, as ranks do when they join; empty without files. Reads samples."""
        folder = self.model_files(environ).folder
        return "" if folder is None else digest_of(str(folder), self.load_format)

    def to_json(self) -> str:
        """Write it as indented ASCII, keys in order: the same spec gives the same bytes."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str) -> NodeSpec:
        """Read what `to_json` wrote.

        Raises: PreflightError naming `where` for anything else: image and launcher may be of two versions.
        """
        try:
            data = json.loads(text)
            _check_keys(cls, data)
            peers = tuple(_build(Peer, peer) for peer in data["peers"])
            ray = None if data.get("ray") is None else _ray(data["ray"])
            fabric = None if data.get("fabric") is None else NodeFabric.from_data(data["fabric"])
            spec = cls(**{**data, "peers": peers, "ray": ray, "fabric": fabric})
            if spec.role not in (HEAD, WORKER) or sum(peer.role == HEAD for peer in peers) != 1:
                raise ValueError("a cluster has one head, and every node is head or worker")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise PreflightError(
                f"{where} is not a node plan of this version: {error}", hint="render it again: hlaunch render"
            ) from error
        return spec


def _ray(data: Any) -> RaySettings:
    _check_keys(RaySettings, data)
    first, last = data["worker_ports"]
    return RaySettings(**{**data, "worker_ports": (int(first), int(last))})


def _build(cls: type[Peer], data: Any) -> Peer:
    _check_keys(cls, data)
    return cls(**data)


def _check_keys(cls: type[Any], data: Any) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__}: expected an object")
    unknown = set(data) - {item.name for item in fields(cls)}
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown {', '.join(sorted(unknown))}")
