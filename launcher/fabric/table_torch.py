"""PyTorch's, Gloo's, UCX's, CUDA's and Hugging Face's variables as data, and the names of others. Knows rows only."""

# ruff: noqa: E501 - one row a line reads as a table
from __future__ import annotations

from launcher.fabric.kinds import GlooNames, Kind, NcclInt, Pattern, Text, TorchValue, Words
from launcher.fabric.spec import Dead, Scope, Spec

N, C, R, F = Scope.NODE, Scope.CLUSTER, Scope.RANK, Scope.FREE
_TORCH, _GLOO, _UCX = "PyTorch 2.13, source", "Gloo of torch 2.13, measured", "UCX 1.22, documentation"
_BOOL = TorchValue(is_bool=True)
_YES_NO = Words(("y", "n", "yes", "no", "on", "off", "1", "0"), False, ignored_code="out-of-range")


def _row(name: str, owner: str, kind: Kind, default: str, scope: Scope, effect: str, source: str = "") -> Spec:
    return Spec(name, owner, kind, default, scope, effect, source=source)


GLOO: tuple[Spec, ...] = (
    _row("GLOO_SOCKET_IFNAME", "Gloo", GlooNames(), "address of the hostname, often 127.0.0.1", N, "interfaces of CPU collectives", _GLOO),
    _row("GLOO_DEVICE_TRANSPORT", "Gloo", Words(("TCP",), ignored_code="out-of-range"), "TCP", C, "the transport; leave unset", _GLOO),
    _row("TORCH_GLOO_LAZY_INIT", "Gloo", _BOOL, "false", F, "connects pairs on first use", _GLOO),
    _row("GLOO_LOG_LEVEL", "Gloo", Text(), "WARN", F, "how much Gloo logs", _GLOO),
    _row("GLOO_DISABLE_CONNECTION_RETRIES", "Gloo", Text(), "unset", F, "fails at the first refused connection", _GLOO),
    _row("GLOO_ENABLE_RANK_AS_SEQUENCE_NUMBER", "Gloo", Text(), "unset", F, "numbers connections by rank", _GLOO),
    _row("GLOO_ENABLE_STORE_V2_API", "Gloo", Text(), "unset", F, "newer calls of the store", _GLOO),
)  # fmt: skip

_TORCH_BOOLS = """
AVOID_RECORD_STREAMS BCAST_UNIQUEID BLOCKING_WAIT CUDA_EVENT_CACHE DESYNC_DEBUG ENABLE_TIMING EXTRA_DUMP_ON_EXEC
HIGH_PRIORITY LOG_CPP_STACK_ON_UNCLEAN_SHUTDOWN NAN_CHECK PROPAGATE_ERROR RETHROW_CUDA_ERRORS TRACE_CPP_STACK
USE_TENSOR_REGISTER_ALLOCATOR_HOOK
"""

TORCH: tuple[Spec, ...] = (
    _row("TORCH_NCCL_ASYNC_ERROR_HANDLING", "PyTorch", TorchValue(low=0, high=3), "3, tears down", C, "what a failed collective does", _TORCH),
    _row("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "PyTorch", TorchValue(low=1), "480", C, "silence of the watchdog before the process ends", _TORCH),
    _row("TORCH_NCCL_ENABLE_MONITORING", "PyTorch", _BOOL, "1", C, "watches the watchdog", _TORCH),
    _row("TORCH_NCCL_DUMP_ON_TIMEOUT", "PyTorch", _BOOL, "true", C, "writes the flight recorder at a timeout", _TORCH),
    _row("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "PyTorch", TorchValue(low=0), "15000", C, "how long to wait for that file", _TORCH),
    _row("TORCH_NCCL_COORD_CHECK_MILSEC", "PyTorch", TorchValue(low=1), "1000", C, "how often ranks look for a peer's timeout", _TORCH),
    _row("TORCH_NCCL_TRACE_BUFFER_SIZE", "PyTorch", TorchValue(low=0), "0", C, "entries of the flight recorder; 0 is off", _TORCH),
    _row("TORCH_FR_BUFFER_SIZE", "PyTorch", TorchValue(low=0), "0", C, "entries of the flight recorder; 0 is off", _TORCH),
    _row("TORCH_SYMM_MEM_DISABLE_MULTICAST", "PyTorch", _BOOL, "0", C, "1 keeps NVLink multicast off", _TORCH),
    _row("NVSHMEM_DISABLE_NVLS", "NVSHMEM", NcclInt(0, 1), "0", C, "1 keeps NVLink multicast off", "NVSHMEM, documentation"),
    *(_row(f"TORCH_NCCL_{name}", "PyTorch", _BOOL, "", F, "known to PyTorch; hlaunch leaves it alone", _TORCH) for name in _TORCH_BOOLS.split()),
    *(_row(f"TORCH_NCCL_{name}", "PyTorch", Text(), "", F, "known to PyTorch; hlaunch leaves it alone", _TORCH)
      for name in ("DEBUG_INFO_PIPE_FILE", "DEBUG_INFO_TEMP_FILE", "RANKS_PER_ROOT")),
)  # fmt: skip

TORCH_ALIASES = {
    f"NCCL_{name}": f"TORCH_NCCL_{name}"
    for name in ("BLOCKING_WAIT", "ASYNC_ERROR_HANDLING", "DESYNC_DEBUG", "ENABLE_TIMING", "USE_TENSOR_REGISTER_ALLOCATOR_HOOK")
}  # fmt: skip
"""Old names that PyTorch, not NCCL, still reads with a warning."""

UCX: tuple[Spec, ...] = (
    _row("UCX_NET_DEVICES", "UCX", Text("all, mlx5_0:1, or an interface (TCP only)"), "all", N, "devices of UCX-based KV transfer", _UCX),
    _row("UCX_TLS", "UCX", Text("all, or [^]rc,ud,tcp,sm,self,cuda_copy,cuda_ipc"), "all", C, "transports; leave unset", _UCX),
    _row("UCX_MAX_RNDV_RAILS", "UCX", Pattern("a whole number", r"\d+", "2", "many"), "2", C, "NICs per large message", _UCX),
    _row("UCX_RNDV_THRESH", "UCX", Text(), "intra:auto,inter:auto", C, "size from which a message is large", _UCX),
    _row("UCX_RNDV_SCHEME", "UCX", Text(), "auto", C, "who reads or writes a large message", _UCX),
    _row("UCX_PROTO_ENABLE", "UCX", _YES_NO, "y", C, "the newer protocol selection", _UCX),
    _row("UCX_IB_GID_INDEX", "UCX", Pattern("a whole number or auto", r"\d+|auto", "auto", "v2"), "auto", N, "as NCCL_IB_GID_INDEX", _UCX),
    _row("UCX_IB_TRAFFIC_CLASS", "UCX", Pattern("0..255 or auto", r"\d{1,3}|auto", "106", "high"), "auto", C, "as NCCL_IB_TC", _UCX),
    _row("UCX_IB_SL", "UCX", Pattern("0..15 or auto", r"\d{1,2}|auto", "3", "high"), "auto", C, "as NCCL_IB_SL", _UCX),
    _row("UCX_WARN_UNUSED_ENV_VARS", "UCX", _YES_NO, "y", F, "names misspelled variables; keep it on", _UCX),
)  # fmt: skip

_RUN = "container runtime, documentation"
CUDA: tuple[Spec, ...] = (
    _row("CUDA_VISIBLE_DEVICES", "CUDA", Text("GPU numbers or UUIDs"), "all", R, "GPUs of one rank; set by the engine", "CUDA, documentation"),
    _row("CUDA_DEVICE_ORDER", "CUDA", Words(("PCI_BUS_ID", "FASTEST_FIRST")), "FASTEST_FIRST", C, "PCI_BUS_ID keeps the map of GPUs and NICs true", "CUDA, documentation"),
    _row("NVIDIA_VISIBLE_DEVICES", "container runtime", Text("all, none, numbers or UUIDs"), "unset", N, "GPUs of a container; never beside a reservation", _RUN),
    _row("NVIDIA_DRIVER_CAPABILITIES", "container runtime", Text("compute,utility"), "compute,utility", C, "parts of the driver in a container", _RUN),
)  # fmt: skip

HUB: tuple[Spec, ...] = (
    _row("HF_HOME", "Hugging Face", Text("a path in the container"), "~/.cache/huggingface", F, "where models are kept", "huggingface_hub"),
    _row("HF_HUB_OFFLINE", "Hugging Face", _YES_NO, "0", C, "1: never ask the network", "huggingface_hub"),
    _row("HF_TOKEN", "Hugging Face", Text("a secret"), "unset", F, "secret for gated models; by file, never in a registry", "huggingface_hub"),
)  # fmt: skip

_COUNT = Pattern("a whole number", r"[1-9]\d*", "4", "all")
THREADS: tuple[Spec, ...] = (
    _row("OMP_NUM_THREADS", "OpenMP", _COUNT, "all cores", F, "threads of PyTorch on a CPU; hlaunch gives each CPU rank its part of the cores", "OpenMP 5.2"),
    _row("MKL_NUM_THREADS", "oneMKL", _COUNT, "all cores", F, "as OMP_NUM_THREADS, for matrix products", "oneMKL, documentation"),
)  # fmt: skip

RANKS: tuple[Spec, ...] = tuple(
    _row(name, "engine", Text(), "unset", R, "set per rank by the engine", "torch.distributed")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
)

OURS: tuple[Spec, ...] = (
    _row("HLAUNCH_NODE_IP", "hlaunch", Text("an address of this node"), "the node's ip", N, "drives Ray, Gloo and NCCL alike", "hlaunch"),
    _row("HLAUNCH_MODEL_DIR", "hlaunch", Text("a folder of the host"), "unset", N, "the host's folder of models", "hlaunch"),
)  # fmt: skip

FOREIGN: tuple[Dead, ...] = (
    Dead("TP_SOCKET_IFNAME", "is read by TensorPipe RPC only", "", "foreign-name"),
    Dead("MN_IF_NAME", "is nobody's here", "", "foreign-name"),
    Dead("OMPI_MCA_btl_tcp_if_include", "is read by Open MPI only", "", "foreign-name"),
    Dead("VLLM_HOST_IP", "is read by vLLM only", "the node's 'ip' in the registry", "foreign-name"),
    Dead("VLLM_RAY_WORKER_ENV_VARS", "does not exist in vLLM either", "nothing: every node has its own environment"),
)
