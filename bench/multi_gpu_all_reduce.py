"""Time sums over the GPUs of one host by size, ours beside NCCL's, inside CUDA graphs as a decode step runs them.

    python bench/multi_gpu_all_reduce.py [--gpus 2 4] [--json FILE]

Microseconds a sum: a graph of 40 of them, replayed; the median of 15 replays on the slowest rank. `fused` adds the sum
to the residual stream and norms it; `apart` does the same by NCCL's sum and the kernel for one GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.multi_gpu_peers import Peer, join, run_peers

HIDDEN, CALLS, REPLAYS = 2880, 40, 15
ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 1400, 2048, 8192)


def measure(peer: Peer) -> list[dict[str, Any]]:
    """Time every size on this rank."""
    import torch

    from kernels import gpu

    group = peer.open(HIDDEN, 201_088)
    custom, nccl = group._custom, group._nccl
    found = []
    for rows in ROWS:
        x = torch.zeros((rows, HIDDEN), dtype=torch.bfloat16, device="cuda")
        residual = torch.zeros((rows, HIDDEN), device="cuda")
        norm = torch.ones(HIDDEN, device="cuda")
        out = torch.empty_like(x)

        def apart(x: Any = x, residual: Any = residual, norm: Any = norm, out: Any = out) -> None:
            gpu.add_rms_norm(nccl.all_reduce(x), None, residual, norm, 1e-5, out=out)

        def fused(x: Any = x, residual: Any = residual, norm: Any = norm, out: Any = out) -> None:
            custom.add_rms_norm(x, None, residual, norm, 1e-5, out=out)

        ways: dict[str, Callable[[], Any]] = {"nccl": lambda x=x: nccl.all_reduce(x)}
        if x.nbytes <= custom.one_shot_bytes:
            ways["one_shot"] = lambda x=x: custom.one_shot(x)
        if x.nbytes <= custom.two_shot_bytes:
            ways["two_shot"] = lambda x=x: custom.two_shot(x)
        if custom.takes_tokens(rows):
            ways |= {"fused": fused, "apart": apart}
        line: dict[str, Any] = {"rows": rows, "bytes": x.nbytes}
        for name, way in ways.items():
            line[name] = round(microseconds(peer, way), 2)
        found.append(line)
    return found


def microseconds(peer: Peer, way: Callable[[], Any]) -> float:
    """Time one call within a graph of many; all ranks replay together."""
    import torch

    cuda: Any = torch.cuda
    way()
    peer.meet()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            way()
    times = []
    for _ in range(REPLAYS):
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        peer.meet()
        # What the ranks' hosts come apart by is not the sum's.
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / CALLS)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {}
    for size in options.gpus:
        status, texts = run_peers([sys.executable, __file__, "--peer"], size)
        if status:
            print("\n".join(texts))
            sys.exit(status)
        # NCCL may have the last word.
        ranks = [json.loads(next(line for line in text.splitlines()[::-1] if line.startswith("[{"))) for text in texts]
        lines = [{key: max(rank[i][key] for rank in ranks) for key in line} for i, line in enumerate(ranks[0])]
        report[str(size)] = lines
        for line in lines:
            print(f"{size} GPUs  " + "  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    if "--peer" in sys.argv:
        import torch

        with torch.inference_mode():
            print(json.dumps(measure(join())))
    else:
        main()
