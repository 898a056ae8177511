"""One line per class, in the spelling of each NCCL release where they differ; other lines are nobody's."""

# ruff: noqa: E501 - one line of a log is one line
from __future__ import annotations

import pytest

from launcher.fabric.log_lines import CLASSES, classify, worst

P = "spark-01:4711:4790 [0] NCCL INFO "

LINES = [
    ("rdma-found", f"{P}NET/IB : Using [0]rocep1s0f0:1/RoCE [RO]; OOB enP2p1s0f0np0:192.168.100.1<0>", "rocep1s0f0"),
    ("rdma-not-found", f"{P}NET/IB : No device found.", "TCP"),
    ("rdma-not-found", f"{P}NET/IB : Using [RO]; OOB lo:127.0.0.1<0>", "TCP"),
    ("net-chosen", f"{P}Using network IB", "in use is IB"),
    ("net-chosen", f"{P}Assigned NET plugin Socket to comm", "in use is Socket"),
    ("net-refused", f"{P}Failed to initialize any NET plugin", "silent fallback"),
    ("verbs-missing", f"{P}Failed to open libibverbs.so[.1]", "image"),
    ("verbs-missing", f"{P}Count not open libibverbs.so[.1]", "image"),
    ("no-interface", f"{P}Bootstrap : no socket interface found", "NCCL_SOCKET_IFNAME"),
    ("qp-failed", "NCCL WARN Call to ibv_modify_qp failed with 22 Invalid argument", "GID is wrong"),
    ("qp-failed", "NCCL WARN Call to ibv_modify_qp failed with 110 Connection timed out", "between the rails"),
    ("qp-failed", "NCCL WARN Call to ibv_modify_qp failed with 7 other", "error 7"),
    ("memlock", "NCCL WARN Call to ibv_reg_mr_iova2 failed with error Cannot allocate memory", "pinned"),
    ("completion-error", "NET/IB : Got completion from peer 10.0.0.2<4711> with status=12 opcode=0 len=0 vendor err 129", "unreachable"),
    ("completion-error", "NET/IB: Got completion from peer 10.0.0.2<1> with status=IBV_WC_RETRY_EXC_ERR(12) vendor_err=129", "vendor error 129"),
    ("link-flapped", f"{P}NET/IB : mlx5_0:1 GID table changed", "GIDs"),
    ("link-layers-mixed", "NCCL WARN Attempted to connect incompatible devices", "mixed"),
    ("shm-small", "NCCL WARN Error: failed to extend /dev/shm/nccl-x to 9637892 bytes", "shm"),
    ("shm-small", "Error while creating shared memory segment /dev/shm/nccl-x (size 9637888)", "shm"),
    ("multicast", "NCCL WARN Failed to bind NVLink SHARP (NVLS) Multicast memory", "multicast"),
    ("gloo-interface", "ifa != nullptr. Unable to find address for: eth7", "'eth7'"),
    ("gloo-loopback", "Unable to resolve hostname to a (local) address. Using the loopback address as fallback.", "loopback"),
    ("gpudirect", f"{P}NET/IB : GPU Direct RDMA Disabled for HCA 0 'rocep1s0f0'", "Disabled for rocep1s0f0"),
    ("rings", f"{P}Connected all rings, use ring PXN 0 GDR 1", "GPUDirect 1"),
    ("edge-tcp", f"{P}Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0", "0[0] -> 1[0] uses TCP"),
    ("edge-gloo", "0[0] -> 1[0] via NET/Gloo/10.0.0.1", "TCP by Gloo, from 10.0.0.1"),
    ("edge-rdma", f"{P}Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/0/GDRDMA", "RDMA"),
    ("edge-local", f"{P}Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read", "within the host"),
    ("port-taken", "OSError: [Errno 98] Address already in use", "in use"),
    ("disk-full", "OSError: [Errno 28] No space left on device: '/dev/shm/x'", "full"),
    ("open-files", "OSError: [Errno 24] Too many open files", "open files"),
    ("gpu-memory", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "GPU's memory"),
    ("gpu-driver", "RuntimeError: The NVIDIA driver on your system is too old (found version 11040).", "driver"),
    ("gpu-lost", "NVRM: Xid (PCI:0000:41:00): 79, pid=1, GPU has fallen off the bus.", "broken or lost"),
    ("oom-killed", "Memory cgroup out of memory: Killed process 4711 (python)", "killed a process"),
    ("name-unknown", "socket.gaierror: [Errno -2] Name or service not known", "resolved"),
    ("peer-refused", "RuntimeError: [10.0.0.2]:29500: Connection refused", "nobody listens"),
    ("ray-versions", "RuntimeError: Version mismatch: The cluster was started with:", "differs"),
    ("ray-open", "Token authentication is disabled", "open"),
    ("ucx-unused", "UCX  WARN  unused environment variable: UCX_NET_DEVICE (maybe: UCX_NET_DEVICES?)", "misspelt"),
    ("net-socket", f"{P}NET/Socket : Using [0]eth0:10.0.0.1<0>", "ready"),
    ("net-unknown", f"{P}NET/Quantum : Entangled", "NET/Quantum"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "line", "words"), LINES, ids=[f"{i}-{row[0]}" for i, row in enumerate(LINES)])
def test_line_has_its_class(code: str, line: str, words: str) -> None:
    found = classify(line)
    assert found is not None
    assert found.code == code
    assert words in found.cause
    assert "{" not in found.cause
    assert found.fix or found.severity == "info" or code in ("net-socket", "net-unknown")


def test_every_class_has_a_line() -> None:
    assert {row.code for row in CLASSES} == {code for code, _, _ in LINES}


@pytest.mark.parametrize(
    "line",
    [
        "",
        f"{P}  0 : NET/0-0 GPU/0-60 NET/0-0",
        "INFO: 127.0.0.1 - GET /health",
        "Loading weights 40%",
        "\x00\xff",
        "a" * 100_000,
    ],
)
def test_other_lines_are_nobodys(line: str) -> None:
    assert classify(line) is None


def test_the_worst_of_a_log_comes_first_and_once() -> None:
    lines = [
        "x",
        f"{P}NET/IB : No device found.",
        f"{P}Using network Socket",
        "a: Too many open files",
        "b: Too many open files",
    ]
    found = worst(lines)
    assert [(item.severity, item.code) for item in found] == [("error", "open-files"), ("warning", "rdma-not-found")]
    assert found[0].line == "a: Too many open files"
    assert worst(["all is well"]) == []
