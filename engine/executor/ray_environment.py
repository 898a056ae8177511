"""Whose word counts on a rank that Ray started: the node's own, then the driver's, name by name.

Knows: which variables may travel from the driver to another node, and that a value which the node has wins. Refuses to
know: what the variables mean (`launcher.fabric` lints them), Ray.

High to low: what the engine sets for a rank > the registry's block of the node, which is in the node's environment
already > the node's own environment > what the driver carries, set if absent. Older engines overwrote the interface
names of every node with the head's; those never travel here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

CARRIED_FAMILIES = (
    "NCCL_", "NVSHMEM_", "GLOO_", "UCX_", "TORCH_", "PYTORCH_", "CUDA_", "OMP_", "MKL_", "KMP_", "GOMP_", "HF_",
    "TOKENIZERS_", "HLAUNCH_",
)  # fmt: skip
"""What ranks read. Anything else, the driver's shell first of all, stays where it is."""

PER_NODE = frozenset(
    {
        "NCCL_IB_HCA", "NCCL_IB_GID_INDEX", "NCCL_SOCKET_IFNAME", "NCCL_OOB_NET_IFNAME", "NCCL_RAS_ADDR",
        "NCCL_TOPO_FILE", "NCCL_GRAPH_FILE", "NCCL_HOSTID", "NCCL_COMM_ID", "NCCL_CONF_FILE", "NCCL_NETDEVS_POLICY",
        "GLOO_SOCKET_IFNAME", "UCX_NET_DEVICES", "UCX_IB_GID_INDEX", "HF_HOME", "HLAUNCH_NODE_IP", "VLLM_HOST_IP",
        "CUDA_HOME", "CUDA_PATH", "CUDA_CACHE_PATH", "TORCH_HOME", "TORCH_EXTENSIONS_DIR",
        # Read as thread counts by libraries; ranks get theirs from the engine, by the cores of their own node.
        "OMP_NUM_THREADS", "MKL_NUM_THREADS",
    }
)  # fmt: skip
"""Different on every node, or a path on one: carried over they would be wrong."""

_LAUNCHER_OWN = re.compile(r"HLAUNCH_(?:REGISTRY|PROFILE|CLUSTER|MODEL_DIR|STATE_DIR|UID|GID|COMPOSE|SSH)")
_PER_RANK = re.compile(r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|.*_VISIBLE_DEVICES")
_SECRET = re.compile(r".*(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)(?:S|_PATH)?|.*_KEY(?:_ID|S)?", re.IGNORECASE)
_PATH_LIKE = re.compile(r".*(?:PATH|_DIR|_FOLDER|_CACHE|_FILE)")


def carried_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Choose what of the driver's environment travels to other nodes, in name order."""
    return {name: environ[name] for name in sorted(environ) if _travels(name)}


def _travels(name: str) -> bool:
    if not name.startswith(CARRIED_FAMILIES) or name in PER_NODE:
        return False
    return not any(pattern.fullmatch(name) for pattern in (_LAUNCHER_OWN, _PER_RANK, _SECRET, _PATH_LIKE))


def node_host_environment(node: Mapping[str, str], carried: Mapping[str, str]) -> dict[str, str]:
    """Join a node's own environment, as its Ray worker has it, with what was carried: the node's word wins.

    What Ray put there for its own workers goes, its token first: a rank does not speak to Ray. So do the variables
    that would make torch believe in a launcher of its own. An empty CUDA_VISIBLE_DEVICES is Ray's as well, given to
    every actor that was not given a GPU by itself.
    """
    own = {name: value for name, value in node.items() if not name.startswith("RAY_")}
    if own.get("CUDA_VISIBLE_DEVICES") == "":
        del own["CUDA_VISIBLE_DEVICES"]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        own.pop(name, None)
    return {**carried, **own}
