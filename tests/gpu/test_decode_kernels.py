"""The CUDA decode kernels against their float32 twins: true shapes, tiny shapes, padding, neighbours.

Runs under pytest with marker `gpu`, or as a script where pytest is missing.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kernels.cuda.decode import DecodeKernels, DecodeShape, DecodeState, LayerWeights
from kernels.cuda.layers import MAX_ROWS, LayerCall, LayerPlan
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


def each(names: tuple[str, ...], values: Sequence[object]) -> Callable[[F], F]:
    """Parametrise a test, and keep the table for runs as a script."""

    def keep(function: F) -> F:
        function.table = values  # type: ignore[attr-defined]
        return pytest.mark.parametrize(names, values)(function) if pytest else function

    return keep


def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


@cache
def random_layer(shape: DecodeShape, seed: int = 7) -> LayerWeights:
    torch.manual_seed(seed)
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
    kernels = DecodeKernels(shape, rows, layer_rows=MAX_ROWS)
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


@each(
    ("shape", "rows", "lengths"),
    [
        *((shape, rows, None) for shape in (TINY, TRUE) for rows in (1, 2, 3, 4, 8)),
        *((shape, 1, [length]) for shape in (TINY, TRUE) for length in (1, 128, 129, 1153, 9000)),
        (TRUE, 2, [9001, 5]),
        (TRUE, 8, [0, 0, 3, 0, 700, 0, 0, 0]),
    ],
)
def test_one_launch_of_a_layer_matches_the_twins(shape: DecodeShape, rows: int, lengths: list[int] | None) -> None:
    for window in (None, 128):
        at = scene(shape, rows, lengths=lengths)
        kernels, state, layer = at.kernels, at.state, at.layer
        assert kernels.has_layers
        real = state.seq_lens > 0
        plan = kernels.plan_layers([LayerCall(layer, at.cache, at.table, window, layer.input_norm)])
        before, expected_cache = at.cache.clone(), at.cache.clone()
        kept: list[Tensor] = []
        for _ in range(3):  # counters and tickets must be as before, and the result the same
            at.cache.copy_(before)
            for buffer in (kernels.query, kernels.attended, kernels.expert_weights, kernels._act):
                buffer.fill_(7)
            kernels.embed(state, at.embedding, layer.input_norm)
            kernels.run_layers(state, plan)
            kernels.norm_logits(at.embedding)
            now = [kernels.residual[real], kernels.logits[real], at.cache]
            assert not kept or all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))
            kept = [tensor.clone() for tensor in now]
        assert int(plan.counters.abs().max()) == 0

        embedded = at.embedding[state.input_ids.long()].float()
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
        close(kernels.query[real], query[real])
        close(at.cache, expected_cache, 2e-3)
        assert torch.equal((at.cache != before).flatten(1).any(1), (expected_cache != before).flatten(1).any(1))
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
        close(kernels.attended[real], expected[real])
        residual = reference.out_proj_add(kernels.attended, layer.out, layer.out_bias, embedded)
        ids, shares = reference.norm_router_topk(
            residual, layer.post_norm, layer.router, layer.router_bias, shape.epsilon, shape.top_k, state.seq_lens
        )
        normed = residual * torch.rsqrt(residual.pow(2).mean(1, keepdim=True) + shape.epsilon) * layer.post_norm
        scores = normed @ layer.router.float().T + layer.router_bias.float()
        chosen = kernels.expert_ids
        gaps = scores.gather(1, chosen.long().clamp(min=0)) - scores.gather(1, ids.long().clamp(min=0))
        assert float(gaps[real].abs().max()) < 0.01, (chosen, ids)  # only a near-tie may flip
        assert torch.equal(chosen[~real], ids[~real])
        same = (chosen == ids).all(1)
        close(kernels.expert_weights[same], shares[same], 2e-3)
        assert int(plan.active_experts[0]) == len(set(chosen.flatten().tolist()) - {-1})
        act = reference.moe_gate_up(
            residual,
            layer.post_norm,
            shape.epsilon,
            chosen,
            layer.gate_up_blocks,
            layer.gate_up_scales,
            layer.gate_up_bias,
            shape.swiglu_limit,
        )
        close(kernels.activations()[real], act[real])
        expected = reference.moe_down_add(
            kernels.activations(),
            chosen,
            kernels.expert_weights,
            layer.down_blocks,
            layer.down_scales,
            layer.down_bias,
            residual,
        )
        close(kernels.residual[real] - embedded[real], expected[real] - embedded[real])
        logits = reference.norm_logits(kernels.residual, layer.input_norm, at.embedding, shape.epsilon)
        close(kernels.logits[real], logits[real])


def layer_calls(at: Scene) -> list[LayerCall]:
    other = random_layer(at.kernels.shape, 8)
    caches = [at.cache, at.cache.clone(), at.cache.clone(), at.cache.clone()]
    weights = [at.layer, other, at.layer, other]
    norms = [other.input_norm, at.layer.input_norm, other.input_norm, at.layer.input_norm]
    windows = (128, None, 128, None)
    return [LayerCall(*call) for call in zip(weights, caches, [at.table] * 4, windows, norms, strict=True)]


@each(("shape", "rows"), [(shape, rows) for shape in (TINY, TRUE) for rows in (1, 2, 5, 8)])
def test_layers_in_one_launch_equal_launches_of_one_layer(shape: DecodeShape, rows: int) -> None:
    together, single = scene(shape, rows), scene(shape, rows)
    calls, single_calls = layer_calls(together), layer_calls(single)
    plan = together.kernels.plan_layers(calls)
    plans = [single.kernels.plan_layers([call]) for call in single_calls]
    real = together.state.seq_lens > 0
    for _ in range(3):
        together.kernels.embed(together.state, together.embedding, together.layer.input_norm)
        together.kernels.run_layers(together.state, plan)
        single.kernels.embed(single.state, single.embedding, single.layer.input_norm)
        for one in plans:
            single.kernels.run_layers(single.state, one)
        assert torch.equal(together.kernels.residual[real], single.kernels.residual[real])
        for a, b in zip(calls, single_calls, strict=True):
            assert torch.equal(a.cache, b.cache)
        assert [int(n) for n in plan.active_experts] == [int(one.active_experts[0]) for one in plans]
        for at in (together, single):
            at.kernels.norm_logits(at.embedding)
            at.kernels.sample_advance(at.state)
        assert torch.equal(together.kernels.tokens, single.kernels.tokens)


@each(("shape", "rows"), [(TINY, 1), (TINY, 8), (TRUE, 1), (TRUE, 8)])
def test_a_captured_launch_of_all_layers_equals_the_eager_one(shape: DecodeShape, rows: int) -> None:
    eager, captured = (scene(shape, rows, lengths=[90 + i for i in range(rows)]) for _ in range(2))
    plans = [at.kernels.plan_layers(layer_calls(at)) for at in (eager, captured)]

    def run(at: Scene, plan: LayerPlan) -> None:
        at.kernels.embed(at.state, at.embedding, at.layer.input_norm)
        at.kernels.run_layers(at.state, plan)
        at.kernels.norm_logits(at.embedding)
        at.kernels.sample_advance(at.state)

    for at, plan in zip((eager, captured), plans, strict=True):
        run(at, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(captured, plans[1])
    for _ in range(5):
        run(eager, plans[0])
        graph.replay()
        assert torch.equal(eager.kernels.tokens, captured.kernels.tokens)
        assert torch.equal(eager.kernels.logits, captured.kernels.logits)


@each(("shape", "temperature"), [(TINY, 0.7), (TINY, 1.0), (TINY, 1.6)])
def test_samples_follow_the_softmax(shape: DecodeShape, temperature: float) -> None:
    """Chi-square over the likely tokens and bins of the tail; false alarm 1e-6 a case."""
    rows, launches = 16, 2500
    at = scene(shape, rows, lengths=[1] * rows)
    logits = torch.linspace(8.0, -8.0, shape.vocab, device="cuda")[torch.randperm(shape.vocab, device="cuda")]
    at.state.temperatures.fill_(temperature)
    counts = torch.zeros(shape.vocab, dtype=torch.int64, device="cuda")
    ones = torch.ones(rows, dtype=torch.int64, device="cuda")
    for _ in range(launches):
        at.kernels.logits.copy_(logits.expand(rows, -1))
        at.kernels.sample_advance(at.state)
        counts.index_add_(0, at.kernels.tokens.long(), ones)
    samples = rows * launches
    order = logits.argsort(descending=True)
    share = torch.softmax(logits.double() / temperature, 0)[order].cpu()
    seen = counts[order].cpu().double()
    # Bins of at least 40 expected samples, in falling order of probability; the far tail is the last.
    bin_of = ((share.cumsum(0) - share) * samples / 40).floor().long()
    bins = int(bin_of.max()) + 1
    expected = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, share * samples)
    found = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, seen)
    keep = expected >= 10
    expected = torch.cat((expected[keep], expected[~keep].sum()[None]))
    found = torch.cat((found[keep], found[~keep].sum()[None]))
    if float(expected[-1]) < 10:
        expected = torch.cat((expected[:-2], expected[-2:].sum()[None]))
        found = torch.cat((found[:-2], found[-2:].sum()[None]))
    statistic = float(((found - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson and Hilferty
    assert freedom > 50, freedom
    assert statistic < limit, (statistic, limit, freedom)


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
    """Run all tests, or those whose name contains the first argument."""
    failed = 0
    wanted = sys.argv[1] if len(sys.argv) > 1 else "test_"
    for name, function in [(n, f) for n, f in globals().items() if n.startswith("test_") and wanted in n]:
        for arguments in function.table:
            begin = time.monotonic()
            try:
                function(*arguments)
                torch.cuda.synchronize()
                outcome = "ok"
            except Exception:  # noqa: BLE001 - a script reports and goes on, as a test runner does
                failed += 1
                outcome = traceback.format_exc(limit=-2)
            case = ", ".join(str(argument) for argument in arguments[1:])
            print(f"{name}[H={arguments[0].hidden}, {case}] {time.monotonic() - begin:.1f}s {outcome}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
