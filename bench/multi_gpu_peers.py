"""One process for each GPU of this host, joined by a group of their CPUs: for benchmarks and tests of GPU collectives.

    status, texts = run_peers([sys.executable, "script.py", "--peer"], 2)      the parent
    peer = join()                                                              each child, in the script

Knows: how peers find each other. Refuses to know: what they measure.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engine.comm.ends import GroupEnd, create_group

VARIABLE = "MULTI_GPU_PEER"


@dataclass(slots=True)
class Peer:
    """A child's place: its rank among `size`, the CPU group, and its device, which is the current one."""

    rank: int
    size: int
    group: Any
    device: Any

    def open(self, hidden: int, vocab: int) -> Any:
        """Make the GPU group that an engine's rank has: `engine.comm.custom_all_reduce.GpuGroup`."""
        from engine.comm.custom_all_reduce import open_gpu_group
        from engine.placement import RankSpec

        def spec(rank: int) -> RankSpec:
            rows = (vocab * rank // self.size, vocab * (rank + 1) // self.size)
            return RankSpec(rank, "here", f"cuda:{rank}", 0, 0, rank, (0, 1), (0, 1), (0, 1), (0, 1), vocab=rows)

        stage = [spec(rank) for rank in range(self.size)]
        return open_gpu_group(self.group, stage, stage[self.rank], hidden, self.device)

    def meet(self) -> None:
        """Wait until every peer's device has come here."""
        import torch

        torch.cuda.synchronize()
        self.group.all_reduce(torch.zeros(1))


def run_peers(command: Sequence[str], size: int, timeout_seconds: float = 120.0) -> tuple[int, list[str]]:
    """Run a command once for each of `size` GPUs; returns the first bad exit status, or 0, and what each printed."""
    ends = create_group(size)
    peers = []
    for end in ends:
        place = json.dumps({"size": size, **asdict(end)})
        peers.append(
            subprocess.Popen(
                command,
                pass_fds=end.fds,
                env={**os.environ, VARIABLE: place},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
        )
    for end in ends:
        end.close()
    deadline = time.monotonic() + timeout_seconds
    texts, status = [], 0
    for peer in peers:
        try:
            # One that failed lets the others wait for it.
            text, _ = peer.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            for other in peers:
                other.kill()
            text, _ = peer.communicate()
            text += f"\nstopped after {timeout_seconds:.0f} s"
        if peer.returncode:
            deadline = min(deadline, time.monotonic() + 5.0)
        texts.append(text)
        status = status or peer.returncode
    return status, texts


def join() -> Peer:
    """Take the place that `run_peers` made for this process."""
    import torch

    from engine.comm.group import SharedGroup

    place = json.loads(os.environ[VARIABLE])
    end = GroupEnd(place["rank"], place["segment"], tuple(place["bells"]))
    torch.cuda.set_device(end.rank)
    return Peer(end.rank, place["size"], SharedGroup(end, timeout_seconds=60), torch.device("cuda", end.rank))
