"""ClusterPlan -> what each node is told: one `NodeSpec` per node, for containers and for plain processes.

Knows: where things lie on a node in either runtime. Refuses to know: YAML, ssh, Docker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from engine.config import BUNDLED_MODELS, EngineConfig
from launcher.errors import PreflightError
from launcher.plan.cluster_plan import ClusterPlan, NodePlan
from launcher.plan.weights import is_repository
from launcher.registry.values import holds_secret
from launcher.supervise.node_fabric import NodeFabric
from launcher.supervise.node_spec import NodeSpec, Peer

JOIN_TIMEOUT_SECONDS = 300.0
NOT_SECRET = frozenset({"RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"})
"""A path and a word, although their names sound like secrets."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a node's files lie. `model_root` empty: the node's own model caches. Paths are absolute on the node."""

    run_folder: str
    ray_folder: str
    node_file: str
    engine_file: str
    token_file: str
    api_key_file: str
    model_root: str = ""


CONTAINER = Layout(
    run_folder="/tmp/hlaunch",
    ray_folder="/tmp/ray",
    node_file="/etc/hlaunch/node.json",
    engine_file="/etc/hlaunch/engine.json",
    token_file="/run/secrets/ray_token",
    api_key_file="/run/secrets/api_key",
    model_root="/models",
)


def node_spec(plan: ClusterPlan, node: NodePlan, layout: Layout) -> NodeSpec:
    """Build one node's spec. Pure."""
    entry = plan.entry
    return NodeSpec(
        launch=plan.name,
        cluster=plan.cluster.name,
        node=node.name,
        role=node.role,
        ip=node.node.ip,
        plan=plan.digest,
        peers=tuple(Peer(item.name, item.node.ip, item.role, item.node.gpus) for item in plan.nodes),
        model=model_of(plan, layout),
        revision=entry.text_or_none("revision"),
        run_folder=layout.run_folder,
        engine_config=layout.engine_file if node.is_head else "",
        ray=plan.cluster.ray,
        ray_folder=layout.ray_folder,
        token_file=layout.token_file if plan.cluster.ray is not None else "",
        api_key_file=layout.api_key_file if node.is_head and entry.secret("api-key") is not None else "",
        model_root=layout.model_root if needs_model_folder(plan) else "",
        load_format=node.config.load_format,
        gpus=node.node.gpus,
        cpus=node.node.cpus,
        num_ranks=len(node.ranks),
        join_timeout_seconds=JOIN_TIMEOUT_SECONDS,
        ready_timeout_seconds=plan.ready_timeout_seconds,
        drain_timeout_seconds=node.config.server.drain_timeout_seconds,
        fabric=NodeFabric.of(plan.cluster, node.node),
    )


def needs_model_folder(plan: ClusterPlan) -> bool:
    """Whether the weights come from outside the package."""
    return plan.entry.model not in BUNDLED_MODELS


def model_of(plan: ClusterPlan, layout: Layout) -> str:
    """Name the model as the node finds it: a bundled name, a repository id, or a folder."""
    model = plan.entry.model
    if model in BUNDLED_MODELS or is_repository(model):
        return model
    return layout.model_root or plan.head.config.model


def engine_config(plan: ClusterPlan, node: NodePlan, layout: Layout) -> EngineConfig:
    """The engine's configuration as it travels: without key digests, the model by the name that the node resolves."""
    server = replace(node.config.server, api_key_sha256=())
    return replace(node.config, model=model_of(plan, layout), server=server)


def node_environment(node: NodePlan) -> Mapping[str, str]:
    """The variables that a node is given, in name order; what this host's shell had stays here.

    Raises: PreflightError for the Ray token as a value: every process of the node could read it.
    """
    chosen: dict[str, str] = {}
    for variable in node.environment:
        if variable.value is None or variable.origin == "inherited":
            continue
        if variable.name == "RAY_AUTH_TOKEN":
            raise PreflightError(
                f"{node.name}: RAY_AUTH_TOKEN would put the token into the environment",
                hint="remove it; the token travels as a file of mode 0600",
            )
        chosen[variable.name] = variable.value
    return dict(sorted(chosen.items()))


def is_secret(name: str, value: str) -> bool:
    """Whether a variable's value must not stand in a file."""
    return holds_secret(name, value) and name not in NOT_SECRET
