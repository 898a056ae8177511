"""What a line of an engine's log says about the fabric or the host: its class, its cause, what to do.

Pure. Knows: the lines of NCCL 2.28 and 2.30, Gloo, Ray, UCX, CUDA and the system that matter, as one table. Refuses to
know: where a log is, how it is shown. A line that speaks of a net and fits no row is `net-unknown`: reported, never
dropped.
"""

# ruff: noqa: E501 - one row a line reads as a table
from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from launcher.fabric.finding import Severity


@dataclass(frozen=True, slots=True)
class LogClass:
    """One kind of line. `pattern` may name groups that the cause uses as `{name}`."""

    code: str
    severity: Severity
    pattern: re.Pattern[str]
    cause: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class LogFinding:
    """One line that says something: its class, and the cause with the line's own words in it."""

    code: str
    severity: Severity
    cause: str
    fix: str
    line: str


def _row(code: str, severity: Literal["error", "warning", "info"], pattern: str, cause: str, fix: str = "") -> LogClass:
    return LogClass(code, severity, re.compile(pattern), cause, fix)


MAX_CHARACTERS = 4096
"""NCCL's lines are shorter; what follows is somebody else's."""

_MODIFY = {
    "22": "the GID is wrong for the peer: EINVAL",
    "110": "no route between the rails: timed out",
    "61": "the peer refused the connection",
    "101": "the network is unreachable",
    "113": "there is no route to the host",
}
_STATUS = {
    "12": "the peer is unreachable: the link, the packet size, or ACS",
    "4": "ACS breaks GPUDirect: local protection",
    "5": "the peer's queue was flushed: it died, or the plugins differ",
    "10": "remote access: the plugins differ, or the peer died",
    "13": "the receiver was not ready",
}

CLASSES: tuple[LogClass, ...] = (
    _row("rdma-found", "info", r"NET/IB : Using (?P<what>\[0\]\S+:\d+.*/(?:RoCE|IB).*)", "RDMA was found: {what}"),
    _row("rdma-not-found", "warning", r"NET/IB : (?:No device found|Using \[RO\])", "NCCL found no RDMA device and goes on with TCP", "hlaunch doctor; NCCL_NET=IB forbids the fallback"),
    _row("net-chosen", "info", r"Using network (?P<what>\S+)|Assigned NET plugin (?P<also>\S+) to comm", "the net in use is {what}{also}"),
    _row("net-refused", "error", r"Failed to initialize any NET plugin", "NCCL_NET names a net that is not here: better than a silent fallback", "hlaunch doctor"),
    _row("verbs-missing", "error", r"(?:Failed to|Count not|Could not) open libibverbs", "libibverbs.so.1 is not in the image", "add libibverbs1 and ibverbs-providers to the image"),
    _row("no-interface", "error", r"Bootstrap : no socket interface found", "NCCL_SOCKET_IFNAME matches no running interface", "hlaunch env --explain NCCL_SOCKET_IFNAME"),
    _row("qp-failed", "error", r"Call to ibv_modify_qp failed with (?:error )?(?P<modify>\d+)?", "a queue pair could not connect: {modify}", "hlaunch doctor; remove NCCL_IB_GID_INDEX"),
    _row("memlock", "error", r"Call to ibv_(?:reg_mr\S*|create_qp|create_cq) failed.*Cannot allocate memory", "memory could not be pinned", "ulimits: {{memlock: -1}}"),
    _row("completion-error", "error", r"Got completion from peer \S+ with status=(?:\w+\()?(?P<status>\d+)\)?.*vendor[_ ]err[= ](?P<vendor>\d+)", "{status} (vendor error {vendor})", "hlaunch doctor"),
    _row("link-flapped", "warning", r"GID table changed|async fatal event|speed change detected", "the link went down and up; GIDs may have moved", "look at the cable; hlaunch doctor"),
    _row("link-layers-mixed", "error", r"Attempted to connect incompatible devices", "InfiniBand and Ethernet HCAs are mixed", "name HCAs of one link layer in the registry"),
    _row("shm-small", "error", r"failed to extend \S+ to \d+ bytes|Error while (?:creating|attaching to) shared memory segment", "/dev/shm is too small", "container: {{shm-size: 16gb}}"),
    _row("multicast", "error", r"Failed to bind NVLink SHARP", "NVLink multicast was not off", "NCCL_NVLS_ENABLE=0"),
    _row("gloo-interface", "error", r"Unable to find address for: ?(?P<what>\S*)", "Gloo finds no address of '{what}'", "GLOO_SOCKET_IFNAME takes exact names: ip -br addr"),
    _row("gloo-loopback", "warning", r"Using the loopback address as fallback", "Gloo is on loopback; nobody else can reach it", "set 'ifname' of the node in the registry"),
    _row("gpudirect", "info", r"GPU Direct RDMA (?P<what>Enabled|Disabled) for HCA \d+ '(?P<also>\S+)'", "GPUDirect RDMA is {what} for {also}"),
    _row("rings", "info", r"Connected all rings, use ring PXN (?P<what>\d) GDR (?P<also>\d)", "all rings are connected, GPUDirect {also}"),
    _row("edge-tcp", "warning", r"(?P<what>\d+\[\w+\] -> \d+\[\w+\]).* via NET/Socket/\d+", "{what} uses TCP", "hlaunch doctor, when the fabric has RDMA"),
    _row("edge-gloo", "info", r"(?P<what>\d+\[\w+\] -> \d+\[\w+\]) via NET/Gloo/(?P<also>\S+)", "{what} uses TCP by Gloo, from {also}"),
    _row("edge-rdma", "info", r"(?P<what>\d+\[\w+\] -> \d+\[\w+\]).* via NET/IB\w*/\d+", "{what} uses RDMA"),
    _row("edge-local", "info", r"(?P<what>\d+\[\w+\] -> \d+\[\w+\]).* via (?:P2P/|SHM/)", "{what} stays within the host"),
    _row("port-taken", "error", r"[Aa]ddress already in use|EADDRINUSE", "a port that is needed is in use", "hlaunch doctor names who has it"),
    _row("disk-full", "error", r"No space left on device|\bENOSPC\b", "a disk, or /dev/shm, is full", "df -h; df -h /dev/shm"),
    _row("open-files", "error", r"[Tt]oo many open files|\bEMFILE\b", "the limit of open files is too low", "ulimit -n 1048576; container: {{nofile: 1048576}}"),
    _row("gpu-memory", "error", r"CUDA out of memory|torch\.OutOfMemoryError|CUDA_ERROR_OUT_OF_MEMORY", "the GPU's memory is full", "hlaunch fit NAME; lower gpu-memory-utilization or max-model-len"),
    _row("gpu-driver", "error", r"CUDA driver version is insufficient|driver on your system is too old|CUDA_ERROR_NO_DEVICE|no CUDA-capable device", "the GPU's driver is missing or too old for this CUDA", "nvidia-smi; update the driver, or use a build for its CUDA"),
    _row("gpu-lost", "error", r"GPU has fallen off the bus|CUDA_ERROR_ECC_UNCORRECTABLE|uncorrectable ECC error|\bXid\b.{0,40}\b(?:48|79|94|95)\b", "the GPU is broken or lost until a reset", "nvidia-smi -q -d ECC; take the node out"),
    _row("oom-killed", "error", r"[Oo]ut of memory: Killed process|oom-kill|Memory cgroup out of memory", "the kernel killed a process for memory", "hlaunch doctor; raise the container's memory limit"),
    _row("name-unknown", "error", r"Name or service not known|Temporary failure in name resolution", "a host name cannot be resolved", "write addresses into the registry; getent hosts NAME"),
    _row("peer-refused", "warning", r"Connection refused", "nobody listens at the other end, or a firewall says so", "is the node up? hlaunch doctor --print-firewall"),
    _row("ray-versions", "error", r"The cluster was started with:", "Ray or Python differs between nodes", "use one image digest on every node"),
    _row("ray-open", "error", r"Token authentication is disabled", "the Ray cluster is open to everybody who reaches it", "RAY_AUTH_MODE=token"),
    _row("ucx-unused", "warning", r"unused environment variable", "UCX does not know a variable: a misspelt name", "hlaunch env --lint"),
    _row("net-socket", "warning", r"NET/Socket : Using", "NCCL's TCP net is ready; it is used where RDMA is not"),
    _row("net-unknown", "warning", r"\bNET/(?P<what>[A-Za-z]\S*)", "an unknown line about NET/{what}"),
)  # fmt: skip


def worst(lines: Iterable[str]) -> list[LogFinding]:
    """List what is wrong by the lines of a log, errors first, each class once with its first line; infos are left out."""
    found: dict[str, LogFinding] = {}
    for line in lines:
        told = classify(line)
        if told is not None and told.severity != "info":
            found.setdefault(told.code, told)
    return sorted(found.values(), key=lambda item: item.severity != "error")


def classify(line: str) -> LogFinding | None:
    """Return what a line says about the fabric; None for a line about something else."""
    for row in CLASSES:
        match = row.pattern.search(line, 0, MAX_CHARACTERS)
        if match is None:
            continue
        words = {name: value or "" for name, value in match.groupdict().items()}
        if "modify" in words:
            words["modify"] = _MODIFY.get(words["modify"], f"error {words['modify'] or 'unknown'}")
        if "status" in words:
            words["status"] = _STATUS.get(words["status"], f"completion status {words['status']}")
        return LogFinding(row.code, row.severity, row.cause.format(**words), row.fix.format(), line)
    return None
