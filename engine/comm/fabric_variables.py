"""The variables of NCCL and Gloo that ranks on several nodes must read alike, and where two nodes differ.

Knows: their names, of the scope C of the fabric's catalogue (a test holds the two together). Refuses to know: what a
value means. None of them is a secret.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

_TABLE = """
NCCL_NET NCCL_NET_PLUGIN NCCL_NET_MERGE_LEVEL NCCL_NET_MERGE_POLICY NCCL_NET_FORCE_MERGE NCCL_NET_GDR_LEVEL
NCCL_NET_GDR_C2C NCCL_DMABUF_ENABLE NCCL_IB_DISABLE NCCL_IB_ROCE_VERSION_NUM NCCL_IB_ADDR_FAMILY
NCCL_IB_ADDR_RANGE NCCL_IB_TC NCCL_IB_FIFO_TC NCCL_IB_SL NCCL_IB_TIMEOUT NCCL_IB_RETRY_CNT
NCCL_IB_QPS_PER_CONNECTION NCCL_IB_SPLIT_DATA_ON_QPS NCCL_IB_ADAPTIVE_ROUTING NCCL_IB_AR_THRESHOLD
NCCL_IB_MERGE_NICS NCCL_IB_SUBNET_AWARE_ROUTING NCCL_IB_SUBNET_PREFIX_LEN NCCL_IB_RETURN_ASYNC_EVENTS
NCCL_SOCKET_FAMILY NCCL_SOCKET_NTHREADS NCCL_NSOCKS_PERTHREAD NCCL_SOCKET_RETRY_CNT
NCCL_SOCKET_RETRY_SLEEP_MSEC NCCL_CROSS_NIC NCCL_CUMEM_ENABLE NCCL_CUMEM_HOST_ENABLE NCCL_NVLS_ENABLE
NCCL_MNNVL_ENABLE NCCL_IGNORE_CPU_AFFINITY NCCL_ALGO NCCL_PROTO NCCL_MAX_CTAS NCCL_MIN_CTAS NCCL_BUFFSIZE
NCCL_IPC_USE_ABSTRACT_SOCKET NCCL_RAS_ENABLE GLOO_DEVICE_TRANSPORT
"""
NAMES = tuple(_TABLE.split())
MAX_VALUE_CHARS = 100
_DRIVER = Path("/proc/driver/nvidia/version")


def own_values(environ: Mapping[str, str]) -> dict[str, str]:
    """Read those that are set; a long or unprintable value is told by its digest, which differs as the values do."""
    return {name: _told(environ[name]) for name in NAMES if name in environ}


def has_gpus() -> bool:
    """Whether NVIDIA's driver runs here: without it a node lacks most of these variables by right."""
    return _DRIVER.exists()


def first_difference(
    ours: Mapping[str, str], theirs: Mapping[str, str], *, both_have_gpus: bool
) -> tuple[str, str | None, str | None] | None:
    """Find a variable of which two nodes have different values: its name, our value, theirs; None is unset.

    Where a node has no GPU, only what is set on both can contradict.
    """
    for name in NAMES:
        one, other = ours.get(name), theirs.get(name)
        needs_both = name.startswith("NCCL_") and not both_have_gpus
        if one != other and not (needs_both and None in (one, other)):
            return name, one, other
    return None


def _told(value: str) -> str:
    if len(value) <= MAX_VALUE_CHARS and value.isprintable():
        return value
    return f"sha256:{hashlib.sha256(value.encode(errors='surrogateescape')).hexdigest()[:16]}"
