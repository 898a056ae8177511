"""What a rank's connections are made of, told in the log in NCCL's own form, so that one reader understands both:

    0[0] -> 1[0] via SHM/group
    0[0] -> 2[0] via NET/Gloo/10.0.0.1

Knows: who is at the other end of each of a rank's links, and the addresses of its TCP connections, which are asked of
the kernel, not taken from the configuration. Refuses to know: torch, who reads the lines. Ranks are those of the
placement; NCCL counts within its communicator, so `members_line` says who its ranks are.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Iterable, MutableMapping, Sequence
from pathlib import Path

from engine.comm.ranks import RankLinks
from engine.placement import Placement, RankSpec
from engine.process import say

_ESTABLISHED = "01"


def tell_edges(placement: Placement, spec: RankSpec, links: RankLinks) -> None:
    """Write one line per connection of this rank to stderr."""
    for line in edge_lines(placement, spec, links):
        say(line)


def tell_members(members: Sequence[int]) -> None:
    """Say before NCCL makes a communicator which ranks it has, in its order."""
    say(members_line(members))


def ask_nccl(environ: MutableMapping[str, str]) -> None:
    """Have NCCL say what it connects, unless its log was set by somebody; before this process first uses it.

    `INIT` alone holds the lines about connections: some fifty at the start, nothing while it serves.
    """
    if "NCCL_DEBUG" not in environ:
        environ["NCCL_DEBUG"] = "INFO"
        environ.setdefault("NCCL_DEBUG_SUBSYS", "INIT")


def members_line(members: Sequence[int]) -> str:
    """The line that turns the ranks of this process's next NCCL lines into those of the placement.

    It begins as NCCL's lines do: logs of several nodes may flow into one, and processes of two nodes share numbers.
    """
    host = socket.gethostname().partition(".")[0]
    return f"{host}:{os.getpid()}: NCCL's ranks are {' '.join(map(str, members))}"


def edge_lines(placement: Placement, spec: RankSpec, links: RankLinks) -> list[str]:
    """List this rank's connections; one whose kind does not say what it is made of is left out.

    What two ranks share in memory is listed by the lower one.
    """
    found: list[tuple[RankSpec, object]] = [(peer, links.group) for peer in links.stage if peer.rank != spec.rank]
    if links.receiver is not None:
        found.append((placement.stage(spec.dp_rank, spec.pp_rank - 1)[spec.tp_rank], links.receiver))
    if links.sender is not None:
        found.append((placement.stage(spec.dp_rank, spec.pp_rank + 1)[spec.tp_rank], links.sender))
    ways = [(peer, _way(link)) for peer, link in found]
    return [f"{_name(spec)} -> {_name(peer)} via {way}" for peer, way in ways if way and not _is_said(spec, peer, way)]


def _is_said(spec: RankSpec, peer: RankSpec, way: str) -> bool:
    """Whether the other end says it: shared memory is the same from both sides, a TCP connection has two addresses."""
    return way.startswith("SHM/") and peer.rank < spec.rank


def _name(spec: RankSpec) -> str:
    index = spec.device.partition(":")[2]
    return f"{spec.rank}[{index if index.isdecimal() else 0}]"


def _way(link: object) -> str:
    way: str = getattr(link, "way", "")
    return f"{way}/{','.join(own_addresses()) or 'unknown'}" if way == "NET/Gloo" else way


def own_addresses(proc: Path = Path("/proc/self")) -> list[str]:
    """List the local addresses of this process's established TCP connections."""
    mine = set()
    for entry in (proc / "fd").iterdir():
        with contextlib.suppress(OSError):
            mine.add(os.readlink(entry))
    found: set[str] = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            found |= _addresses((proc / "net" / table).read_text().splitlines()[1:], mine)
    return sorted(found)


def _addresses(lines: Iterable[str], mine: set[str]) -> set[str]:
    """Read rows of the kernel's table: number, local, remote, state, ..., inode as the tenth word."""
    found = set()
    for line in lines:
        words = line.split()
        if len(words) > 9 and words[3] == _ESTABLISHED and f"socket:[{words[9]}]" in mine:
            # Words of 32 bits, each in the machine's byte order.
            raw = bytes.fromhex(words[1].partition(":")[0])
            pieces = [raw[at : at + 4] for at in range(0, len(raw), 4)]
            packed = b"".join(piece[::-1] if sys.byteorder == "little" else piece for piece in pieces)
            address = ipaddress.ip_address(packed)
            mapped = getattr(address, "ipv4_mapped", None)
            found.add(str(mapped or address))
    return found
