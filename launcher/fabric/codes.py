"""Every code that lint and doctor can say: how bad it is, why it matters, what mends it. The documentation is made
from these rows.

Knows: stable codes. Refuses to know: how a fault is detected. A code, once released, keeps its meaning.
"""

# ruff: noqa: E501 - one row a line reads as a table
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True)
class Code:
    """`fix` may name a command with `<…>` where only the finding knows the word."""

    code: str
    group: Literal["environment", "host", "cluster", "active"]
    severity: Literal["error", "warning", "info"]
    cause: str
    fix: str


def _env(code: str, severity: Literal["error", "warning", "info"], cause: str, fix: str) -> Code:
    return Code(code, "environment", severity, cause, fix)


def _host(code: str, severity: Literal["error", "warning", "info"], cause: str, fix: str) -> Code:
    return Code(code, "host", severity, cause, fix)


_LIST: tuple[Code, ...] = (
    _env("bool-word", "error", "NCCL reads words as 0, so the switch says the opposite", "write 0 or 1"),
    _env("trailing-text", "error", "NCCL reads the digits and ignores what follows them", "write the number alone"),
    _env("out-of-range", "error", "the value is not legal, its reader ignores or refuses it", "write a legal value"),
    _env("list-order", "error", "'^' has to stand before '='; this list matches nothing", "write ^=name"),
    _env("list-space", "error", "a space is part of a name, so the name matches nothing", "remove the spaces"),
    _env("quoted-value", "error", "docker's raw format keeps the quotes, so the value is another one", "remove the quotes"),
    _env("bad-line", "error", "docker refuses a file with such a line", "write NAME=value, or # before a comment"),
    _env("gloo-pattern", "error", "Gloo knows exact names only: Unable to find address for", "write the exact name"),
    _env("ifname-absent", "error", "the interface is not there, not running, or has no address", "name the interface that carries the node's ip"),
    _env("hca-absent", "error", "the HCA is not there or its port is not ACTIVE", "name an ACTIVE HCA: rdma link show"),
    _env("gid-on-cluster", "error", "a fact of one node is said for all of them; GID tables and names differ", "move it into the node's own block, or leave it out"),
    _env("addr-range-misses-hca", "error", "an HCA outside the range keeps GID 0, link-local RoCE v1, and cannot connect", "leave NCCL_IB_ADDR_RANGE out, or give every HCA an address in it"),
    _env("net-conflict", "error", "two variables contradict each other about RDMA", "keep one of them"),
    _env("env-contradicts-fabric", "error", "a variable and a field of the fabric disagree; the variable wins silently", "remove the variable, the fabric's field renders it"),
    _env("gdr-on-gb10", "error", "GPUDirect RDMA does not work on GB10 and may hang", "NCCL_NET_GDR_LEVEL=LOC NCCL_NET_GDR_C2C=0 NCCL_DMABUF_ENABLE=0"),
    _env("nvls-on", "error", "NVLink multicast: when an allocation fails on some ranks, all of them hang", "remove it; hlaunch sets NCCL_NVLS_ENABLE=0"),
    _env("rank-env-leak", "error", "the value reaches every process, so all ranks believe to be the same one", "remove it; the engine sets it per rank"),
    _env("ray-parse", "error", "Ray reads it as something else, or ends with exit 139 and no message", "write a value that Ray parses whole"),
    _env("token-in-env", "error", "a secret in the environment is visible to every process and in every dump", "put it in a file of mode 0600 and name that: RAY_AUTH_TOKEN_PATH"),
    _env("c-scope-differs", "error", "the value must be equal on every node; ranks wait for each other for ever", "move it into the cluster's env block"),
    _env("dead-name", "warning", "nobody has ever read this name", "remove it"),
    _env("removed-name", "warning", "the release in use no longer reads this name", "remove it"),
    _env("unknown-name", "warning", "no known release reads this name", "correct or remove it"),
    _env("too-new", "warning", "only a later release reads this name", "remove it, or use a newer image"),
    _env("octal", "warning", "a leading zero makes the number octal", "remove the zero"),
    _env("empty-value", "warning", "an empty value is not the same as none", "remove the line"),
    _env("level-word", "warning", "the word is not understood and has no effect", "write one of the words in upper case"),
    _env("level-int", "warning", "the digit's meaning changed between releases", "write the word"),
    _env("list-prefix", "warning", "without '=' every name that begins so is taken: mlx5_1 is also mlx5_10", "write = before the names"),
    _env("gid-pinned", "warning", "an index is used for all HCAs of the node, unchecked; it moves when addresses do", "remove it: automatic since NCCL 2.21"),
    _env("tc-on-v1", "warning", "RoCE v1 has no IP header, so the traffic class has nowhere to live", "use RoCE v2: remove NCCL_IB_GID_INDEX"),
    _env("timeout-silence", "warning", "a dead link is reported only after this long", "NCCL_IB_TIMEOUT=20"),
    _env("plugin-skew", "warning", "a plugin must be the same file on every node, else status 10 or 5", "NCCL_NET_PLUGIN=none"),
    _env("twin-idle", "warning", "one port of this card is two PCI functions; with one of them half the bandwidth is idle", "name both functions"),
    _env("ucx-tcp", "warning", "an interface instead of an HCA makes UCX use TCP", "UCX_NET_DEVICES=<hca>:1"),
    _env("conf-file", "warning", "the file sets values that no environment shows", "unset it, and put the values into the registry"),
    _env("image-env", "warning", "the image sets a fabric variable behind the registry's back", "remove the ENV line from the image, or set the name in the registry"),
    _env("torch-alias", "warning", "the old name is PyTorch's, not NCCL's, and is going away", "write the TORCH_ name"),
    _env("debug-left-on", "warning", "debug output costs time or is overwritten", "remove it, or use %h and %p in the file's name"),
    _env("debug-only", "warning", "right while looking for a fault, slow or unsafe in production", "remove it"),
    _env("default-restated", "info", "the value is the default already", "remove the line"),
    _env("foreign-name", "info", "another program reads this name", "remove it"),
    _env("sl-untagged", "info", "on RoCE the service level lives in a VLAN tag; without one it does nothing", "remove it, or tag the VLAN"),
    _env("tc-decoded", "info", "lossless only when the switch and the card pause this priority", "mlnx_qos -i <interface> --trust dscp --pfc 0,0,0,1,0,0,0,0"),
    _env("no-effect", "info", "the value has nothing to act on here", "remove the line"),

    _host("rdma-absent", "error", "the fabric requires RDMA and this host shows no RDMA device", "sudo modprobe mlx5_ib ib_uverbs rdma_ucm; rdma link show"),
    _host("dev-node-missing", "error", "the HCA's verbs device is not in /dev/infiniband, so no process can open it", "sudo modprobe ib_uverbs rdma_ucm; in a container: --device /dev/infiniband"),
    _host("verbs-lib-missing", "error", "NCCL loads libibverbs.so.1 at run time and silently uses TCP without it", "sudo apt-get install libibverbs1 ibverbs-providers"),
    _host("port-not-active", "error", "the port carries no data", "sudo ip link set <interface> up; ibv_devinfo -d <hca>"),
    _host("gid-missing", "error", "the HCA has no RoCE v2 GID for an address of the fabric, so it cannot connect", "sudo ip addr add <ip>/<prefix> dev <interface>"),
    _host("gid-linklocal", "error", "the chosen GID is link-local: peers of another subnet or version never answer", "remove NCCL_IB_GID_INDEX"),
    _host("gid-index-empty", "error", "the pinned index has no GID on this node", "remove NCCL_IB_GID_INDEX"),
    _host("twin-port-idle", "warning", "half of the cable's bandwidth is unused: 12.8 instead of 20.9 GB/s", "sudo ip link set <twin> up, and give it an address of its own subnet"),
    _host("mtu-small", "error", "the interface sends smaller packets than the fabric declares", "sudo ip link set <interface> mtu <mtu>"),
    _host("link-down", "error", "the fabric's interface is down", "sudo ip link set <interface> up"),
    _host("node-ip-absent", "error", "no interface of this host carries the node's address", "sudo ip addr add <ip>/<prefix> dev <interface>"),
    _host("same-subnet-rails", "warning", "two interfaces in one subnet: replies leave by the wrong one (ARP flux)", "give each its own subnet, or: sudo sysctl net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2"),
    _host("hostname-loopback", "error", "the host's name resolves to 127/8, so Gloo offers an address nobody else can reach", "name the interface: GLOO_SOCKET_IFNAME=<interface>"),
    _host("nccl-conf-file", "warning", "NCCL reads this file in every process; no environment shows its values", "move the lines into the registry's env and delete the file"),
    _host("memlock-low", "error", "RDMA pins memory; ibv_reg_mr fails with Cannot allocate memory", "ulimits: {memlock: -1} in the container, or LimitMEMLOCK=infinity in the unit"),
    _host("nofile-low", "warning", "sockets of Ray, NCCL and clients need open files", "ulimits: {nofile: 1048576}, or: ulimit -n 1048576"),
    _host("stack-unlimited", "warning", "an unlimited stack moves the layout of memory and every thread's stack grows", "ulimits: {stack: 67108864}, or: ulimit -s 65536"),
    _host("shm-small", "warning", "NCCL, Ray and the engine share memory here: failed to extend /dev/shm", "shm_size: 16gb in the container, or: sudo mount -o remount,size=16G /dev/shm"),
    _host("uma-memory", "error", "GPU and programs share this memory, and less of it is free than the model is to take", "sync; echo 1 | sudo tee /proc/sys/vm/drop_caches, or lower gpu-memory-utilization"),
    _host("gpu-missing", "error", "the registry declares more GPUs than the driver shows", "nvidia-smi; correct 'gpus' of the node in the registry"),
    _host("gdr-none", "warning", "the NIC cannot reach GPU memory, so every byte is copied through the host", "sudo modprobe nvidia_peermem"),
    _host("gdr-forbidden", "warning", "GPUDirect RDMA does not work on GB10, so nothing should offer it", "sudo rmmod nvidia_peermem"),
    _host("numa-far", "warning", "NIC and GPU hang on different CPU sockets", "choose the HCA of the GPU's node: nvidia-smi topo -m"),
    _host("pcie-narrow", "warning", "the link trained below what the card can do", "reseat the card, or choose another slot"),
    _host("acs-on", "warning", "ACS sends GPU-to-NIC traffic up to the CPU: status 4, or a fraction of the speed", "switch ACS off in the firmware, or: sudo setpci -s <bridge> ECAP_ACS+6.w=0"),
    _host("port-busy", "error", "another process has a port that this cluster pins", "kill <pid>, or choose another port in the registry"),
    _host("ephemeral-overlap", "warning", "the kernel hands out these ports to outgoing connections, so a start can fail at random", "sudo sysctl net.ipv4.ip_local_reserved_ports=<ports>"),
    _host("docker-old", "warning", "health checks use start_interval, which needs Engine 25", "update Docker Engine to 25 or newer"),
    _host("compose-old", "warning", "CVE-2025-62725: a compose file can write outside its folder", "update Docker Compose to 2.40.2 or newer"),
    _host("toolkit-old", "warning", "CVE-2025-23266: a container can become root of its host", "update nvidia-container-toolkit to 1.17.8 or newer"),
    _host("cdi-stale", "error", "the CDI specification names files of an older driver, so containers fail at create", "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"),
    _host("removeipc", "warning", "logind removes shared memory of a user who logs out, under a running engine", "RemoveIPC=no in /etc/systemd/logind.conf; sudo systemctl restart systemd-logind"),
    _host("counters", "warning", "the HCA counted errors of the transport since it came up", "look at cable and switch: ethtool -S <interface>"),
    _host("oom-kills", "warning", "the kernel has killed processes of this group for memory", "raise the container's memory limit, or lower gpu-memory-utilization"),

    Code("node-unreachable", "cluster", "error", "the node could not be read", "ssh <destination> true"),
    Code("mtu-mismatch", "cluster", "error", "small packets arrive, full-size ones do not: transfers stall, status 12", "sudo ip link set <interface> mtu <mtu> on both nodes, and on the switch"),
    Code("peer-unreachable", "cluster", "error", "no packet reaches the other node over the fabric", "ip -br link; ip route get <ip>"),
    Code("path-untested", "cluster", "info", "this process may not send pings, so the path's packet size is unknown", "run as root, or install ping"),
    Code("rate-differs", "cluster", "warning", "the slower port sets the speed of every collective", "compare cables and ports: ibv_devinfo -v"),
    Code("link-layer-differs", "cluster", "error", "InfiniBand and Ethernet HCAs cannot talk: Attempted to connect incompatible devices", "select HCAs of one link layer in the registry"),
    Code("clock-skew", "cluster", "warning", "logs cannot be merged, and tokens may look expired", "sudo chronyc makestep"),
    Code("version-skew", "cluster", "warning", "parts of one engine of different versions: refused joins, wrong results, hangs", "use one image digest on every node"),
    Code("port-ours", "cluster", "info", "the port is held by Ray or hlaunch: a cluster runs here already", "hlaunch ps"),

    Code("all-reduce-hang", "active", "error", "two ranks found no way to each other within the deadline", "hlaunch doctor --print-firewall"),
    Code("all-reduce-failed", "active", "error", "a rank of the two-rank check ended with an error", "correct what the message names; hlaunch env shows what the ranks were given"),
    Code("all-reduce-wrong", "active", "error", "the sum that came back is not the sum of what was sent", "take this node out; run a memory test"),
    Code("probe-missing", "active", "error", "the far Python has no torch, so no rank can run there", "run inside the image: hlaunch doctor --container <name> --active"),
    Code("transport-fallback", "active", "error", "RDMA is required, and the data went over TCP", "hlaunch doctor shows why RDMA was not found; then NCCL_NET=IB forbids the fallback"),
    Code("all-reduce-ok", "active", "info", "the two-rank check passed", "nothing to do"),
)  # fmt: skip

CODES: Mapping[str, Code] = MappingProxyType({row.code: row for row in _LIST})
