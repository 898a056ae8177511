"""The twins of the GPUs' sums over ranks: against float64, against one rank's step, and against what CPU ranks do."""

from __future__ import annotations

import threading

import pytest
import torch

from engine.comm.ends import create_group
from engine.comm.group import SharedGroup
from kernels.reference import basic
from kernels.reference.all_reduce import all_reduce, all_reduce_add_norm


def parts(num_ranks: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_ranks)
    return [torch.randn(*shape, generator=generator).bfloat16() for _ in range(num_ranks)]


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_a_sum_rounds_once(num_ranks: int) -> None:
    given = parts(num_ranks, 5, 96)
    exact = sum(part.double() for part in given)
    assert isinstance(exact, torch.Tensor)
    # float32 between, so the one rounding is that to bfloat16: half a unit in its last place.
    assert bool(((all_reduce(given).double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all())


def test_cpu_ranks_sum_to_the_same_bits() -> None:
    given, found = parts(3, 4, 64), {}

    def be(rank: int, group: SharedGroup) -> None:
        found[rank] = group.all_reduce(given[rank].clone())
        group.close()

    groups = [SharedGroup(end, timeout_seconds=20) for end in create_group(3)]
    threads = [threading.Thread(target=be, args=item) for item in enumerate(groups)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for rank in range(3):
        assert torch.equal(found[rank], all_reduce(given))


def test_the_fused_sum_of_one_rank_is_add_and_norm() -> None:
    generator = torch.Generator().manual_seed(1)
    deltas, bias = parts(1, 6, 2, 64), torch.randn(64, generator=generator).bfloat16()
    residual, weight = torch.randn(6, 64, generator=generator), torch.rand(64, generator=generator) + 0.5
    stream, normed = all_reduce_add_norm(deltas, None, bias, residual, weight, 1e-5)
    wanted = residual + deltas[0].float().sum(1).bfloat16().float() + bias.float()
    assert torch.allclose(stream, wanted, atol=1e-6)
    assert torch.equal(normed, basic.rms_norm(stream, weight, 1e-5).bfloat16())


def test_a_slot_of_no_weight_is_not_read() -> None:
    deltas = parts(2, 3, 4, 32)
    weights = torch.ones(3, 4)
    weights[:, 1] = 0
    for own in deltas:
        own[:, 1] = float("nan")
    residual, weight = torch.zeros(3, 32), torch.ones(32)
    stream, normed = all_reduce_add_norm(deltas, weights, None, residual, weight, 1e-5)
    assert bool(stream.isfinite().all())
    kept = [0, 2, 3]
    without, _ = all_reduce_add_norm([own[:, kept] for own in deltas], weights[:, kept], None, residual, weight, 1e-5)
    assert torch.equal(stream, without)
    assert bool(normed.isfinite().all())
