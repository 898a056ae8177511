"""The CUDA decode kernels against their float32 twins: true shapes, tiny shapes, padding, neighbours.

Runs under pytest with marker `gpu`, or as a script where pytest is missing.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kernels.cuda.decode import DecodeKernels, DecodeShape, DecodeState, LayerWeights
from kernels.reference import decode as reference
from kernels.triton.reference_sampling import sample as reference_sample

HAS_GPU = torch.cuda.is_available() and importlib.util.find_spec("cupy") is not None
TRUE = DecodeShape(2880, 2880, 64, 8, 64, 32, 4, 20_011, 32)  # vocabulary cut: only its tiles repeat
TINY = DecodeShape(224, 288, 16, 2, 32, 8, 2, 2_603, 16)

try:
    import pytest

    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device and CuPy")]
except ModuleNotFoundError:
    pytest = None  # type: ignore[assignment]


F = TypeVar("F", bound=Callable[..., None])


def each(names: tuple[str, ...], values: list[object]) -> Callable[[F], F]:
    """Parametrise a test, and keep the table for runs as a script."""

    def keep(function: F) -> F:
        function.table = values  # type: ignore[attr-defined]
        return pytest.mark.parametrize(names, values)(function) if pytest else function

    return keep


def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


@cache
def random_layer(shape: DecodeShape) -> LayerWeights:
    torch.manual_seed(7)
    h, i, e = shape.hidden, shape.intermediate, shape.experts
    attention = shape.heads * shape.head_dim

    def experts(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        blocks = torch.randint(0, 256, (e, rows, width // 32, 16), dtype=torch.uint8, device="cuda")
        scales = torch.randint(116, 122, (e, rows, width // 32), dtype=torch.uint8, device="cuda")
        return blocks, scales, randn(e, rows, scale=0.1)

    return LayerWeights(
        1 + randn(h, scale=0.1).float(),
        randn((shape.heads + 2 * shape.kv_heads) * shape.head_dim, h, scale=h**-0.5),
        randn((shape.heads + 2 * shape.kv_heads) * shape.head_dim, scale=0.1),
        randn(shape.heads, dtype=torch.float32),
        randn(h, attention, scale=attention**-0.5),
        randn(h, scale=0.1),
        1 + randn(h, scale=0.1).float(),
        randn(e, h, scale=2 * h**-0.5),
        randn(e, scale=0.1),
        *experts(2 * i, h),
        *experts(h, i),
    )


@dataclass
class Scene:
    """A batch with its cache: rows of mixed lengths, the third one padding when there are so many."""

    kernels: DecodeKernels
    state: DecodeState
    cache: Tensor
    table: Tensor
    layer: LayerWeights
    embedding: Tensor


def scene(shape: DecodeShape, rows: int, *, lengths: list[int] | None = None) -> Scene:
    torch.manual_seed(rows)
    lengths = lengths or [(1, 200, 0, 33, 1153, 64, 500, 128)[(i + rows) % 8] for i in range(rows)]
    if not any(lengths):
        lengths[0] = 77
    blocks = -(-max(lengths) // shape.block_size) + 1
    table = (torch.randperm(rows * blocks, device="cuda") + 1).int().view(rows, blocks)
    cache = randn((rows * blocks + 1) * shape.block_size, 2, shape.kv_heads, shape.head_dim)
    angle = torch.rand(max(lengths) + 16, shape.head_dim // 2, device="cuda") * 6
    state = DecodeState(
        torch.randint(0, shape.vocab, (rows,), device="cuda", dtype=torch.int32),
        torch.tensor([max(0, length - 1) for length in lengths], device="cuda", dtype=torch.int32),
        torch.tensor(lengths, device="cuda", dtype=torch.int32),
        torch.stack((angle.cos(), angle.sin()), -1) * 1.2,
        torch.tensor([0.0, 0.8] * 8, device="cuda")[:rows].contiguous(),
        torch.arange(rows, device="cuda") * 0x1234567890 - 5,
    )
    kernels = DecodeKernels(shape, rows)
    return Scene(kernels, state, cache, table, random_layer(shape), randn(shape.vocab, shape.hidden))


def close(out: Tensor, expected: Tensor, tolerance: float = 5e-3) -> None:
    out, expected = out.float(), expected.float()
    assert out.shape == expected.shape, (out.shape, expected.shape)
    assert bool(out.isfinite().all()), "not finite"
    error = float((out - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


CASES = [(shape, rows) for shape in (TINY, TRUE) for rows in (1, 2, 3, 4, 8, 16)]


@each(("shape", "rows"), CASES)
def test_each_step_matches_its_twin(shape: DecodeShape, rows: int) -> None:
    at = scene(shape, rows)
    kernels, state, layer = at.kernels, at.state, at.layer
    real = state.seq_lens > 0
    embedded = at.embedding[state.input_ids.long()].float()
    kernels.embed(state, at.embedding, layer.input_norm)
    assert torch.equal(kernels.residual, embedded)

    for window in (None, 128):
        expected_cache = at.cache.clone()
        query = reference.norm_qkv_rope(
            embedded,
            layer.input_norm,
            layer.qkv,
            layer.qkv_bias,
            shape.epsilon,
            state.rotations,
            state.positions,
            state.seq_lens,
            at.table,
            shape.block_size,
            expected_cache,
        )
        kernels.norm_qkv_rope(state, layer, at.cache, at.table)
        close(kernels.query[real], query[real])
        close(at.cache, expected_cache, 2e-3)
        written = at.cache != expected_cache
        assert int(written.flatten(1).any(1).sum()) <= int(real.sum()), "wrote beyond the rows' slots"
        at.cache.copy_(expected_cache)

        expected = reference.paged_decode_attention(
            kernels.query,
            at.cache,
            layer.sinks,
            state.seq_lens,
            at.table,
            shape.block_size,
            window,
            shape.head_dim**-0.5,
        )
        for _ in range(2):  # the tickets must be as before
            kernels.attended.fill_(7)
            kernels.paged_decode_attention(state, layer.sinks, at.cache, at.table, window)
            close(kernels.attended[real], expected[real])

    residual = reference.out_proj_add(kernels.attended, layer.out, layer.out_bias, kernels.residual)
    kernels.out_proj_add(layer)
    close(kernels.residual[real], residual[real], 1e-3)

    residual = kernels.residual.clone()
    ids, shares = reference.norm_router_topk(
        residual, layer.post_norm, layer.router, layer.router_bias, shape.epsilon, shape.top_k, state.seq_lens
    )
    kernels.norm_router_topk(state, layer)
    same = (kernels.expert_ids == ids).all(1)
    normed = residual * torch.rsqrt(residual.pow(2).mean(1, keepdim=True) + shape.epsilon) * layer.post_norm
    scores = normed @ layer.router.float().T + layer.router_bias.float()
    gaps = (scores.gather(1, kernels.expert_ids.long().clamp(min=0)) - scores.gather(1, ids.long().clamp(min=0))).abs()
    assert float(gaps[real].max()) < 0.03, (kernels.expert_ids, ids)  # only a near-tie may flip
    assert torch.equal(kernels.expert_ids[~real], ids[~real])
    close(kernels.expert_weights[same], shares[same], 1e-2)
    ids = kernels.expert_ids
    assert int(kernels.active_experts()) == len(set(ids.flatten().tolist()) - {-1})

    act = reference.moe_gate_up(
        residual,
        layer.post_norm,
        shape.epsilon,
        ids,
        layer.gate_up_blocks,
        layer.gate_up_scales,
        layer.gate_up_bias,
        shape.swiglu_limit,
    )
    kernels.moe_gate_up(layer)
    close(kernels.activations()[real], act[real])
    for _ in range(2):
        before = kernels.residual.clone()
        expected = reference.moe_down_add(
            kernels.activations(),
            ids,
            kernels.expert_weights,
            layer.down_blocks,
            layer.down_scales,
            layer.down_bias,
            before,
        )
        kernels.moe_down_add(state, layer, layer.input_norm)
        close(kernels.residual[real] - before[real], expected[real] - before[real])

    kernels.norm_logits(at.embedding)
    logits = reference.norm_logits(kernels.residual, layer.input_norm, at.embedding, shape.epsilon)
    close(kernels.logits[real], logits[real])

    tokens, _ = reference_sample(kernels.logits, state.temperatures, state.seeds, state.positions)
    positions, lengths = state.positions.clone(), state.seq_lens.clone()
    kernels.sample_advance(state)
    assert torch.equal(kernels.tokens[real], tokens[real])
    assert torch.equal(state.input_ids[real], tokens[real])
    assert torch.equal(state.positions, positions + real.int())
    assert torch.equal(state.seq_lens, lengths + real.int())


def whole_step(at: Scene) -> None:
    kernels, state, layer = at.kernels, at.state, at.layer
    kernels.embed(state, at.embedding, layer.input_norm)
    for window in (128, None):
        kernels.norm_qkv_rope(state, layer, at.cache, at.table)
        kernels.paged_decode_attention(state, layer.sinks, at.cache, at.table, window)
        kernels.out_proj_add(layer)
        kernels.norm_router_topk(state, layer)
        kernels.moe_gate_up(layer)
        kernels.moe_down_add(state, layer, layer.input_norm)
    kernels.norm_logits(at.embedding)
    kernels.sample_advance(state)


@each(("shape", "rows"), [(TINY, 1), (TINY, 8), (TRUE, 2), (TRUE, 16)])
def test_a_captured_step_equals_single_launches(shape: DecodeShape, rows: int) -> None:
    eager, captured = (scene(shape, rows, lengths=[90 + i for i in range(rows)]) for _ in range(2))
    for at in (eager, captured):
        whole_step(at)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole_step(captured)
    for _ in range(3):
        whole_step(eager)
        graph.replay()
        assert torch.equal(eager.kernels.tokens, captured.kernels.tokens)
        assert torch.equal(eager.kernels.logits, captured.kernels.logits)
    assert torch.equal(eager.cache, captured.cache)


@each(("shape", "rows"), [(TINY, 4), (TRUE, 4), (TRUE, 16)])
def test_a_row_does_not_see_its_neighbours(shape: DecodeShape, rows: int) -> None:
    at = scene(shape, rows, lengths=[150] * rows)
    twin = scene(shape, rows, lengths=[150] * rows)
    twin.state.seq_lens[1:] = 0
    for one in (at, twin):
        whole_step(one)
    assert torch.equal(at.kernels.logits[0], twin.kernels.logits[0])
    assert torch.equal(at.kernels.tokens[0], twin.kernels.tokens[0])


def main() -> int:
    failed = 0
    for name, function in [(n, f) for n, f in globals().items() if n.startswith("test_")]:
        for arguments in function.table:
            begin = time.monotonic()
            try:
                function(*arguments)
                torch.cuda.synchronize()
                outcome = "ok"
            except Exception:  # noqa: BLE001 - a script reports and goes on, as a test runner does
                failed += 1
                outcome = traceback.format_exc(limit=-2)
            hidden, rows = arguments[0].hidden, arguments[1]
            print(f"{name}[H={hidden}, B={rows}] {time.monotonic() - begin:.1f}s {outcome}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
