"""NCCL's variables as data: those that are set or linted, then every other name of 2.30.7.

Source: NCCL 2.28.9 and 2.30.7, read in their source. Knows rows only.
"""

# ruff: noqa: E501 - one row a line reads as a table
from __future__ import annotations

from types import MappingProxyType

from launcher.fabric.kinds import DebugFile, Kind, Level, Names, NcclInt, Network, Pattern, Text, WordList, Words
from launcher.fabric.spec import Dead, Scope, Spec

SOURCE = "NCCL 2.28.9 and 2.30.7, source"
NEWEST_BEFORE = "2.28.9"
"""The release beside torch 2.11 with CUDA; names that only later ones know are `too-new`."""

_BOOL = NcclInt(0, 1)
_THREE = NcclInt(0, 2)
_FAMILY = Words(("AF_INET", "AF_INET6"))
_GDR_LEVELS = ("LOC", "NVL", "NVB", "C2C", "PIX", "PXB", "P2C", "PXN", "PHB", "SYS")
_MERGE = ("LOC", "PORT", "PIX", "PXB", "P2C", "PXN", "PHB", "SYS")
_ALGOS = ("Ring", "Tree", "CollnetChain", "CollnetDirect", "NVLS", "NVLSTree", "PAT")
_SUBSYSTEMS = "INIT COLL P2P SHM NET GRAPH TUNING ENV ALLOC CALL PROXY NVLS BOOTSTRAP REG PROFILE RAS ALL"
N, C, R, F = Scope.NODE, Scope.CLUSTER, Scope.RANK, Scope.FREE


def _row(
    name: str, kind: Kind, default: str, since: str, scope: Scope, effect: str, until: str = "", is_debug: bool = False
) -> Spec:
    return Spec("NCCL_" + name, "NCCL", kind, default, scope, effect, since, until, SOURCE, is_debug)


NCCL: tuple[Spec, ...] = (
    _row("NET", Words(("IB", "Socket"), False, True), "auto", "2.10", C, "the only net that is tried: no fallback"),
    _row("NET_PLUGIN", Text("a library, a suffix, a list, or none"), "libnccl-net.so if present", "2.11", C, "loads an external net; equal on every node"),
    _row("IB_DISABLE", _BOOL, "0", "", C, "1 switches RDMA off"),
    _row("IB_HCA", Names("HCA", 32, has_ports=True), "every ACTIVE HCA", "", N, "which HCAs carry data; '=' makes names exact"),
    _row("IB_GID_INDEX", NcclInt(-1, 255), "-1, automatic", "2.1.4", N, "one GID index for all HCAs of the node, unchecked"),
    _row("IB_ROCE_VERSION_NUM", NcclInt(1, 2), "2", "2.21", C, "RoCE version that the automatic GID choice wants"),
    _row("IB_ADDR_FAMILY", _FAMILY, "AF_INET", "2.21", C, "address family that the automatic GID choice wants"),
    _row("IB_ADDR_RANGE", Network(), "unset", "2.21", C, "subnet that the automatic GID choice wants, for every HCA"),
    _row("IB_TC", NcclInt(0, 255, MappingProxyType({-1: "is 0"})), "0", "2.1.15", C, "traffic class: DSCP * 4 + ECN of RoCE v2"),
    _row("IB_FIFO_TC", NcclInt(0, 255, MappingProxyType({-1: "is IB_TC"})), "IB_TC", "2.22", C, "traffic class of control messages"),
    _row("IB_SL", NcclInt(0, 15, MappingProxyType({-1: "is 0"})), "0", "2.1.4", C, "InfiniBand service level, VLAN priority on RoCE"),
    _row("IB_TIMEOUT", NcclInt(1, 31, MappingProxyType({0: "infinite"})), "20", "", C, "4.096 us * 2^n, times the retries, before an error"),
    _row("IB_RETRY_CNT", NcclInt(0, 7), "7", "2.1.15", C, "retries of the transport before an error"),
    _row("IB_QPS_PER_CONNECTION", NcclInt(1, 128), "1", "2.10", C, "queue pairs per connection; 2-4 on ECMP or LAG"),
    _row("IB_SPLIT_DATA_ON_QPS", _BOOL, "0", "2.18", C, "splits each message over the queue pairs"),
    _row("IB_PCI_RELAXED_ORDERING", _THREE, "2, automatic", "2.12", F, "relaxed PCI ordering; 1 fails where there is none"),
    _row("IB_ADAPTIVE_ROUTING", _BOOL, "1 on InfiniBand, 0 on RoCE", "2.16", C, "lets switches reorder packets"),
    _row("IB_AR_THRESHOLD", NcclInt(0), "8192", "2.6", C, "bytes from which adaptive routing is used"),
    _row("IB_MERGE_NICS", _BOOL, "1", "2.20", C, "uses the ports of one card as one NIC; 0 on ring cabling"),
    _row("NET_MERGE_LEVEL", Level(_MERGE, is_prefix_match=True), "PORT", "2.24", C, "how far apart NICs may be to be fused; LOC: never"),
    _row("NET_MERGE_POLICY", Words(("ALL", "RAIL")), "ALL", "2.30.5", C, "which NICs are fused"),
    _row("NET_FORCE_MERGE", Text("a,b;c,d"), "unset", "2.24", C, "fuses exactly these NICs"),
    _row("IB_SUBNET_AWARE_ROUTING", _BOOL, "0", "2.30.5", C, "one subnet per cable"),
    _row("IB_SUBNET_PREFIX_LEN", NcclInt(1, 32), "24", "2.30.5", C, "prefix length of a cable's subnet"),
    _row("NET_GDR_LEVEL", Level(_GDR_LEVELS), "PXB; P2C with C2C", "2.4", C, "how far a NIC may be for GPUDirect; LOC: never"),
    _row("NET_GDR_C2C", _BOOL, "1", "2.26", C, "GPUDirect through C2C, overrides the level"),
    _row("NET_GDR_READ", _BOOL, "1 from Ampere on", "", F, "the NIC also reads GPU memory"),
    _row("DMABUF_ENABLE", _BOOL, "1", "2.13", C, "registers GPU memory through dma-buf"),
    _row("SOCKET_IFNAME", Names("interface", 16), "ib*, else not docker, lo, virbr", "", N, "interfaces of bootstrap and TCP; none found is an error"),
    _row("SOCKET_FAMILY", _FAMILY, "any", "", C, "address family of bootstrap and TCP"),
    _row("SOCKET_NTHREADS", NcclInt(1, 16), "1, 2-8 in clouds", "2.4.8", C, "threads per TCP connection"),
    _row("NSOCKS_PERTHREAD", NcclInt(1, 64), "1", "2.4.8", C, "sockets per thread; with the threads at most 64"),
    _row("SOCKET_RETRY_CNT", NcclInt(1), "34", "2.24", C, "attempts of the bootstrap; the n-th waits n sleeps"),
    _row("SOCKET_RETRY_SLEEP_MSEC", NcclInt(1), "100", "2.24", C, "unit of the bootstrap's waits"),
    _row("CROSS_NIC", _THREE, "2", "2.5", C, "0: rails, a ring stays on one NIC number; nothing with one NIC"),
    _row("P2P_LEVEL", Level(("LOC", "NVL", "PIX", "PXB", "PHB", "SYS")), "automatic", "", F, "how far GPUs may be to copy directly", is_debug=True),
    _row("P2P_DISABLE", _BOOL, "0", "", F, "1 forbids direct copies between GPUs", is_debug=True),
    _row("SHM_DISABLE", _BOOL, "0", "", F, "1 forbids shared memory between ranks of a host", is_debug=True),
    _row("CUMEM_ENABLE", _BOOL, "automatic", "2.18", C, "allocates through CUDA's virtual memory API"),
    _row("CUMEM_HOST_ENABLE", _BOOL, "automatic", "2.23", C, "the same for host memory; needs SYS_NICE in a container"),
    _row("NVLS_ENABLE", _THREE, "2", "2.17", C, "NVLink multicast; hlaunch keeps it off, a partial failure hangs"),
    _row("MNNVL_ENABLE", _THREE, "2", "2.21", C, "NVLink between hosts; needs IMEX"),
    _row("IGNORE_CPU_AFFINITY", _BOOL, "0", "2.4.6", C, "1 places threads by the GPU, not by the process"),
    _row("ALGO", WordList(_ALGOS), "automatic", "2.5", C, "restricts the algorithms", is_debug=True),
    _row("PROTO", WordList(("LL", "LL128", "Simple")), "automatic", "2.5", C, "restricts the protocols; forced LL128 can corrupt", is_debug=True),
    _row("MAX_CTAS", NcclInt(1, 64), "automatic", "2.17", C, "upper limit of thread blocks per collective"),
    _row("MIN_CTAS", NcclInt(1, 64), "automatic", "2.17", C, "lower limit of thread blocks per collective"),
    _row("BUFFSIZE", NcclInt(1), "4194304", "", C, "bytes of buffer per channel; counts in the memory fit"),
    _row("IPC_USE_ABSTRACT_SOCKET", _BOOL, "1", "2.29", C, "0 when ranks of a host have different network namespaces"),
    _row("IB_RETURN_ASYNC_EVENTS", _BOOL, "1", "2.23", C, "keeps the line 'GID table changed'"),
    _row("RAS_ENABLE", _BOOL, "1", "2.24", C, "the status service of a job"),
    _row("RAS_ADDR", Pattern("host:port", r"\S+:\d+", "localhost:28028", "28028"), "localhost:28028", "2.24", N, "where the status service listens; one port per job"),
    _row("DEBUG", Words(("VERSION", "WARN", "INFO", "ABORT", "TRACE"), False), "unset", "", F, "how much NCCL logs"),
    _row("DEBUG_SUBSYS", WordList(tuple(_SUBSYSTEMS.split())), "INIT,BOOTSTRAP,ENV", "", F, "which parts log"),
    _row("DEBUG_FILE", DebugFile(), "stdout", "", F, "where the log goes"),
    _row("COMM_ID", Pattern("ip:port", r"\S+:\d+", "10.0.0.1:4000", "4000"), "unset", "", R, "rendezvous of a job; never in a file"),
    _row("HOSTID", Text(), "unset", "2.5", N, "overrides the host's identity: equal on two hosts, they are one"),
)  # fmt: skip

_INTEGERS = """
ALLOC_P2P_NET_LL_BUFFERS CGA_CLUSTER_SIZE CHUNK_SIZE COLLNET_ENABLE COLLNET_NODE_THRESHOLD COMM_BLOCKING
COMM_SHRINK_SHARE_RESOURCES COMM_SPLIT_SHARE_RESOURCES CONNECT_ROUND_MAX_PEERS GDRCOPY_ENABLE GDRCOPY_FIFO_ENABLE
GDRCOPY_FLUSH_ENABLE GDRCOPY_SYNC_ENABLE GDR_FLUSH_DISABLE GIN_ENABLE GIN_ERROR_QUERY_SEC GIN_GDAKI_NIC_HANDLER
GIN_GDAKI_QP_DEPTH GIN_PROXY_QUEUE_SIZE GIN_TYPE GRAPH_DUMP_FILE_RANK GRAPH_HELPER_DISABLE GRAPH_MIXING_SUPPORT
GRAPH_REGISTER GROUP_CUDA_STREAM IB_DATA_DIRECT IB_ECE_ENABLE IB_MERGE_VFS IB_MQP_RETRY_ALL IB_MQP_RETRY_CNT
IB_MQP_RETRY_SLEEP_MSEC IB_PKEY IB_ROUTABLE_FLID_GID_INDEX IB_USE_INLINE IB_WARN_RAIL_LOCAL IGNORE_DISABLED_P2P
L1_SHARED_MEMORY_CARVEOUT LAUNCH_ORDER_IMPLICIT LAUNCH_RACE_FATAL LEGACY_CUDA_REGISTER LL128_BUFFSIZE LL128_C2C
LL128_NTHREADS LL_BUFFSIZE LOCAL_REGISTER MAX_NCHANNELS MAX_NRINGS MAX_P2P_NCHANNELS MEM_SYNC_DOMAIN MIN_NCHANNELS
MIN_NRINGS MIN_P2P_NCHANNELS MNNVL_CLIQUE_ID MNNVL_RAIL_PER_HOST MNNVL_SCATTER_NETS_ENABLE MNNVL_UUID
NCHANNELS_PER_NET_PEER NET_DISABLE_INTRA NET_FORCE_FLUSH NET_OPTIONAL_RECV_COMPLETION NET_OVERHEAD NET_PLUGIN_REF_COUNT
NET_SHARED_BUFFERS NET_SHARED_COMMS NTHREADS NVB_DISABLE NVB_PRECONNECT NVLINK_UTIL_CENTRIC_SCHED_ENABLE
NVLSTREE_MAX_CHUNKSIZE NVLS_CHUNKSIZE NVLS_NCHANNELS NVTX_DISABLE OOB_NET_ENABLE P2P_DIRECT_DISABLE P2P_LL_THRESHOLD
P2P_NET_CHUNKSIZE P2P_NVL_CHUNKSIZE P2P_PCI_CHUNKSIZE P2P_PXN_LEVEL P2P_READ_ENABLE P2P_SCHEDULE_GROUP_SIZE
P2P_USE_CUDA_MEMCPY PAT_ENABLE PROGRESS_APPENDOP_FREQ PROXY_APPEND_BATCH_SIZE PROXY_DUMP_SIGNAL PXN_C2C PXN_DISABLE
RAS_TIMEOUT_FACTOR REPORT_CONNECT_PROGRESS RUNTIME_CONNECT SET_CPU_STACK_SIZE SET_STACK_SIZE SET_THREAD_NAME SHM_LOCALITY
SINGLE_PROC_MEM_REG_ENABLE SOCKET_INLINE SOCKET_MIN_TASKSIZE SOCKET_RCVBUF SOCKET_SNDBUF SYM_CTAS TOPO_DUMP_FILE_RANK
UID_STAGGER_RATE UID_STAGGER_THRESHOLD UNPACK_DOUBLE_NCHANNELS WARN_ENABLE_DEBUG_INFO WIN_ENABLE WIN_STRIDE
WORK_ARGS_BYTES WORK_FIFO_BYTES
"""

_STRINGS = """
CONF_FILE CTA_POLICY DEBUG_TIMESTAMP_FORMAT DEBUG_TIMESTAMP_LEVELS ENV_PLUGIN GRAPH_DUMP_FILE GRAPH_FILE LAUNCH_MODE
NETDEVS_POLICY OOB_NET_IFNAME PROFILER_PLUGIN PROXY_CPUSET SYM_KERNEL THREAD_THRESHOLDS TOPO_DUMP_FILE TOPO_FILE
TUNER_PLUGIN
"""

_NEW_INTEGERS = """
ALLGATHERV_ENABLE DEV_API_JIT DISABLE_MEM_MANAGER ELASTIC_BUFFER_REGISTER ENABLE_VERSION_CHECK GDAKI_USE_RELIABLE_DB
GIN_GDAKI_MAX_DEST_RD_ATOMIC GIN_GDAKI_MAX_QP_RD_ATOMIC GIN_IB_TC GIN_NCONNECTIONS GIN_PLUGIN_REF_COUNT
GRAPH_STREAM_ORDERING IB_DEVICE_PCI_ORDER IB_OOO_RQ IB_PREPOST_RECEIVE_WORK_REQUESTS IB_QUERY_PORT_SPEED
IB_RECEIVER_SIDE_MATCHING_SCHEME IB_RESILIENCY_PORT_FAILOVER IB_RESILIENCY_PORT_FAILOVER_MAX_ATTEMPTS
IB_RESILIENCY_PORT_FAILOVER_PROBE_DELAY IB_RESILIENCY_PORT_RECOVERY IB_RESILIENCY_PORT_RECOVERY_ACK_TIMEOUT
IB_RESILIENCY_PORT_RECOVERY_ATTEMPTS_MAX IB_RESILIENCY_PORT_RECOVERY_START_DELAY
IB_RESILIENCY_PORT_RECOVERY_ALIVE_MSG_BATCH_INTERVAL IB_RESILIENCY_PORT_RECOVERY_ALIVE_MSG_BATCH_SIZE
IB_RESILIENCY_PORT_RECOVERY_ALIVE_MSG_SEQUENCE_SIZE IB_RESILIENCY_PORT_RECOVERY_ALIVE_MSG_TIMEOUT IGNORE_COLLNET_MISMATCH
IGNORE_NET_MISMATCH LSA_TEAM_SIZE MLOPART_RDMA_ENABLE MNNVL_CROSS_CLIQUE MULTI_RANK_GPU_ENABLE MULTI_SEGMENT_REGISTER
NET_GDR_MLOPART NUM_RMA_CTX P2P_EPOCH_ENABLE P2P_MAX_PEERS P2P_PER_CHANNEL_NET_BW PARAM_DUMP_ALL RMA_DISABLE
RMA_PLUGIN_REF_COUNT RMA_PROXY_DUMP_SIGNAL RMA_PROXY_QUEUE_SIZE SHADOW_MEMPOOL_MAX_SIZE SOCKET_POLL_TIMEOUT_MSEC
SYM_CE_THRESHOLD SYM_GIN_KERNELS_ENABLE SYM_NOWIN_ENABLE SYM_REUSE_SYSMEM_HANDLES SYM_RS_GIN_CHUNK_SIZE SYM_TMA_ENABLE
TOPO_SPLIT_MLOPART
"""

_NEW_STRINGS = "CHECK_MODE GIN_PLUGIN IBVERBS_LIB NO_CACHE RMA_PLUGIN SOCKET_MAGIC"

_GONE = {
    "SHM_USE_CUDA_MEMCPY": "2.30.4",
    "SHM_MEMCPY_MODE": "2.30.4",
    "CREATE_THREAD_CONTEXT": "2.30.4",
    "GIN_NCONTEXTS": "2.29.7",
    "GIN_SIGNAL_POOL_SIZE": "2.29.7",
    "GIN_COUNTER_POOL_SIZE": "2.29.7",
}
"""Still in 2.28.9, no more in 2.30.7: the last release that knows them."""


def _others(names: str, kind: Kind, since: str) -> tuple[Spec, ...]:
    return tuple(_row(name, kind, "", since, F, "known to NCCL; hlaunch leaves it alone") for name in names.split())


NCCL_OTHERS: tuple[Spec, ...] = (
    *_others(_INTEGERS, NcclInt(), ""),
    *_others(_STRINGS, Text(), ""),
    *_others(_NEW_INTEGERS, NcclInt(), "2.29"),
    *_others(_NEW_STRINGS, Text(), "2.29"),
    *(_row(name, NcclInt(), "", "", F, f"known to NCCL up to {until}", until) for name, until in _GONE.items()),
    _row(
        "CHECK_POINTERS",
        NcclInt(),
        "0",
        "",
        F,
        "checks pointers; deprecated, say NCCL_CHECK_MODE=DEBUG_LOCAL",
        "2.29.6",
    ),
)


def _dead(name: str, truth: str, instead: str = "", code: str = "removed-name") -> Dead:
    return Dead("NCCL_" + name, truth, instead, code)


NCCL_DEAD: tuple[Dead, ...] = (
    _dead("IB_GDR_DMABUF_ENABLE", "never existed", "NCCL_DMABUF_ENABLE", "dead-name"),
    _dead("TIMEOUT", "never existed: NCCL has no timeout for collectives", "NCCL_IB_TIMEOUT for the link", "dead-name"),
    _dead("MERGE_LEVEL", "never existed", "NCCL_NET_MERGE_LEVEL", "dead-name"),
    _dead("IB_GDR_LEVEL", "removed in 2.4", "NCCL_NET_GDR_LEVEL"),
    _dead("IB_CUDA_SUPPORT", "removed in 2.4", "NCCL_NET_GDR_LEVEL"),
    _dead("LL_THRESHOLD", "removed by 2.5", "NCCL_PROTO"),
    _dead("TREE_THRESHOLD", "removed by 2.5", "NCCL_ALGO"),
    _dead("SINGLE_RING_THRESHOLD", "removed by 2.5", "NCCL_MAX_CTAS"),
    _dead("RINGS", "removed by 2.5", "NCCL_ALGO"),
    _dead("THREAD_THRESHOLD", "removed by 2.5", "NCCL_THREAD_THRESHOLDS"),
    _dead("CHECKS_DISABLE", "gone"),
    _dead("WORK_FIFO_DEPTH", "last seen in 2.21", "NCCL_WORK_FIFO_BYTES"),
    _dead("PROXY_PROFILE", "last seen in 2.22", "a profiler plugin (NCCL_PROFILER_PLUGIN)"),
    _dead("AGG_CHANNEL_SIZE", "last seen in 2.19"),
    _dead("GDRCOPY_TAIL_ENABLE", "last seen in 2.11"),
)
