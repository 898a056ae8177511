"""How much a node's RDMA ports have carried, as the kernel counts it.

Knows: sysfs (https://docs.kernel.org/admin-guide/abi-stable.html, `port_xmit_data`). Refuses to know: whose bytes they
are: the counters are the port's, and count what any process sends.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import msgspec

WORD_BYTES = 4
"""The counters count words of four bytes, per lane, whatever the number of lanes."""


class RdmaTraffic(msgspec.Struct, frozen=True, array_like=True):
    """Bytes since the ports came up, read at `seconds` of the node's monotonic clock."""

    seconds: float
    sent_bytes: int
    received_bytes: int


def read_traffic(root: Path = Path("/")) -> RdmaTraffic | None:
    """Add up what all ports have carried; None where there is no port that counts."""
    totals = [0, 0]
    is_there = False
    for counters in root.glob("sys/class/infiniband/*/ports/*/counters"):
        for index, name in enumerate(("port_xmit_data", "port_rcv_data")):
            with contextlib.suppress(OSError, ValueError):
                totals[index] += WORD_BYTES * int((counters / name).read_text())
                is_there = True
    return RdmaTraffic(time.monotonic(), *totals) if is_there else None
