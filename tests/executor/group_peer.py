"""A rank of a group in a process of its own: sums and joins known tensors of many sizes and checks every number."""

from __future__ import annotations

import json
import random
import sys
import time

import torch

from engine.comm.ends import GroupEnd
from engine.comm.group import SharedGroup


def value(rank: int, round_: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * round_ + rank)
    return torch.randn(shape, generator=generator).to(dtype)


def main() -> int:
    torch.set_num_threads(1)
    rank, segment, bells, rounds = json.loads(sys.argv[1])
    group = SharedGroup(GroupEnd(rank, segment, tuple(bells)), timeout_seconds=30.0)
    pauses = random.Random(rank)
    for round_ in range(rounds):
        source = random.Random(round_)
        if pauses.random() < 0.02:
            time.sleep(pauses.random() * 2e-3)
        if source.random() < 0.7:
            shape = (source.choice([1, 3, 80]), source.choice([1, 224, 1000]))
            dtype = torch.bfloat16 if source.random() < 0.2 else torch.float32
            parts = [value(i, round_, shape, dtype).float() for i in range(group.size)]
            expected = parts[0].clone()
            for part in parts[1:]:
                expected += part
            found = group.all_reduce(value(rank, round_, shape, dtype))
            assert found.dtype == dtype
            assert torch.equal(found, expected.to(dtype)), (round_, shape)
        else:
            rows = source.choice([1, 2, 70])
            widths = [source.choice([0, 5, 300]) for _ in range(group.size - 1)] + [7]
            whole = torch.cat([value(i, round_, (rows, w), torch.float32) for i, w in enumerate(widths)], dim=1)
            found = group.all_gather(value(rank, round_, (rows, widths[rank]), torch.float32), widths)
            assert torch.equal(found, whole), (round_, widths)
    group.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
