"""Several GPUs of one host: sums against their twins bit for bit, in any order and under delays; split models' tokens.

Runs under pytest with marker `multi_gpu`, or as a script where pytest is missing. Every test is a process for each GPU.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.multi_gpu_peers import Peer, join, run_peers
from engine.comm.nccl import share_bytes
from engine.core.request import TokenLogprobs
from engine.core.sampling_params import SamplingParams
from engine.engine_core import EngineCore
from engine.executor.base import ExecutorError
from engine.executor.multinode import MultiNodeExecutor
from kernels.cuda.decode import (
    BATCH_SIZES,
    DecodeKernels,
    DecodeShape,
    DecodeState,
    LayerWeights,
    prebuild,
)
from kernels.cuda.layers import LayerCall
from kernels.cuda.tokens import TokenExchange
from kernels.reference.all_reduce import all_reduce, all_reduce_add_norm
from kernels.triton.reference_sampling import sample as reference_sample
from tests.gpu.test_gpu_engine import TINY, requests_of

NUM_GPUS = torch.cuda.device_count() if importlib.util.find_spec("cupy") is not None else 0
TRUE = DecodeShape(2880, 2880, 64, 8, 64, 32, 4, 20_032, 64)  # vocabulary cut: only its tiles repeat
SIZES = (8, 96, 2880, 8 * 2880, 33 * 2880, 128 * 2880, 700 * 2880 + 8)
MOST_ONE_SHOT = 4 << 20

try:
    import pytest

    pytestmark = [
        pytest.mark.multi_gpu,
        pytest.mark.skipif(NUM_GPUS < 2, reason="needs two CUDA devices and CuPy"),
    ]
except ModuleNotFoundError:
    pytest = None  # type: ignore[assignment]


def part_of(rank: int, size: int, seed: int = 0) -> Tensor:
    """Give a rank's part of a sum: every rank knows all of them."""
    generator = torch.Generator("cuda").manual_seed(1000 * seed + rank)
    return torch.randn(size, device="cuda", generator=generator).bfloat16()


def same_on_all(peer: Peer, x: Tensor) -> bool:
    """Whether all ranks hold the same bits, by two sums over them."""
    bits = x.contiguous().view(-1).view(torch.uint8).long()
    weights = torch.arange(1, len(bits) + 1, device=x.device)
    digest = f"{int(bits.sum())} {int((bits * weights).sum())}".ljust(64).encode()
    return len(set(share_bytes(peer.group, digest))) == 1


def check_sums(peer: Peer) -> None:
    """Plain sums are those of the twin, bit for bit; NCCL's are near, and the same on all ranks."""
    group = peer.open(2880, TRUE.vocab)
    custom, nccl = group._custom, group._nccl
    for size in SIZES:
        parts = [part_of(rank, size) for rank in range(peer.size)]
        wanted = all_reduce(parts)
        ways = {"two-shot": custom.two_shot, "nccl": nccl.all_reduce, "chosen": group.all_reduce}
        if 2 * size <= MOST_ONE_SHOT:
            ways["one-shot"] = custom.one_shot
        for name, way in ways.items():
            got = way(parts[peer.rank].clone())
            error = float((got.float() - wanted.float()).norm() / wanted.float().norm())
            assert error < 5e-3, (name, size, error)
            assert same_on_all(peer, got), (name, size)
            if name.endswith("shot"):
                assert torch.equal(got, wanted), (name, size)
    whole = group.all_gather(
        part_of(peer.rank, 4 * (3 + peer.rank)).view(4, -1).float(), [3 + r for r in range(peer.size)]
    )
    for rank, column in enumerate(whole.split([3 + r for r in range(peer.size)], 1)):
        assert torch.equal(column, part_of(rank, 4 * (3 + rank)).view(4, -1).float())


def check_races(peer: Peer) -> None:
    """Hundreds of sums one after another, ranks late by turns, none waited for, all exact; then within a graph."""
    custom = peer.open(2880, TRUE.vocab)._custom
    late = random.Random(peer.rank)
    common = random.Random(7)
    results = []
    for turn in range(400):
        size = 8 * common.choice((1, 12, 360, 3000, 20_000, 60_000))
        way = common.choice((custom.one_shot, custom.two_shot))
        if late.random() < 0.2:
            torch.cuda._sleep(late.randrange(1, 400_000))
        results.append((turn, size, way(part_of(peer.rank, size, turn))))
    for turn, size, got in results:
        wanted = all_reduce([part_of(rank, size, turn) for rank in range(peer.size)])
        assert torch.equal(got, wanted), (turn, size)

    buffers = [torch.zeros(2880 * rows, dtype=torch.bfloat16, device="cuda") for rows in (1, 8, 40)]
    sums = [torch.zeros_like(buffer) for buffer in buffers]

    def body() -> None:
        for buffer, total in zip(buffers, sums, strict=True):
            total.copy_(buffer)
            custom.one_shot(total)
            custom.two_shot(total)  # every rank has the sum: as many times as there are ranks

    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    for turn in range(60):
        parts = [[part_of(rank, len(b), turn) for rank in range(peer.size)] for b in buffers]
        for buffer, own in zip(buffers, parts, strict=True):
            buffer.copy_(own[peer.rank])
        if late.random() < 0.3:
            torch.cuda._sleep(late.randrange(1, 400_000))
        graph.replay()
        for total, own in zip(sums, parts, strict=True):
            assert torch.equal(total, all_reduce([all_reduce(own)] * peer.size)), turn


def check_fused(peer: Peer) -> None:
    """The sum over slots and ranks with residual and norm is its twin's, and the same on all ranks."""
    group = peer.open(2880, TRUE.vocab)
    for tokens, slots, has_weights, has_bias in ((1, 4, False, False), (24, 1, False, True), (300, 4, True, False)):
        generator = torch.Generator("cuda").manual_seed(tokens)

        def randn(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, device="cuda", generator=generator)

        deltas = [randn(tokens, slots, 2880).bfloat16() for _ in range(peer.size)]
        weights = torch.where(randn(tokens, slots) > 1, 0.0, randn(tokens, slots).abs()) if has_weights else None
        bias = randn(2880).bfloat16() if has_bias else None
        residual, norm = randn(tokens, 2880), 1 + 0.1 * randn(2880)
        stream, normed = all_reduce_add_norm(deltas, weights, bias, residual, norm, 1e-5)
        expert_out = torch.full((tokens, 2944), 7.0, dtype=torch.bfloat16, device="cuda")
        own = deltas[peer.rank] if slots > 1 else deltas[peer.rank][:, 0]
        for _ in range(3):
            got = residual.clone()
            out = group.add_rms_norm(own, bias, got, norm, 1e-5, slot_weights=weights, expert_out=expert_out)
            assert float((got - stream).norm() / stream.norm()) < 2e-3
            assert float((out.float() - normed.float()).norm() / normed.float().norm()) < 5e-3
            assert same_on_all(peer, got)
            assert same_on_all(peer, out)
        from kernels.triton.permute import to_expert_order

        assert torch.equal(expert_out, to_expert_order(out)), tokens


def share_of(weights: LayerWeights, shape: DecodeShape, rank: int, size: int) -> LayerWeights:
    """Cut a rank's part out of a layer's weights, as the loader does."""
    heads, kv_heads, dim = shape.heads // size, shape.kv_heads // size, shape.head_dim
    units = shape.intermediate // 32
    first, last = units * rank // size, units * (rank + 1) // size
    query, key, value = weights.qkv.split([shape.heads * dim, shape.kv_heads * dim, shape.kv_heads * dim])
    biases = weights.qkv_bias.split([shape.heads * dim, shape.kv_heads * dim, shape.kv_heads * dim])

    def rows(x: Tensor, count: int) -> Tensor:
        return x[rank * count * dim : (rank + 1) * count * dim]

    counts = (heads, kv_heads, kv_heads)
    return replace(
        weights,
        qkv=torch.cat([rows(x, n) for x, n in zip((query, key, value), counts, strict=True)]),
        qkv_bias=torch.cat([rows(x, n) for x, n in zip(biases, counts, strict=True)]),
        sinks=weights.sinks[rank * heads : (rank + 1) * heads].clone(),
        out=rows(weights.out.t(), heads).t().contiguous(),
        gate_up_blocks=weights.gate_up_blocks[:, 64 * first : 64 * last].contiguous(),
        gate_up_scales=weights.gate_up_scales[:, 64 * first : 64 * last].contiguous(),
        gate_up_bias=weights.gate_up_bias[:, 64 * first : 64 * last].contiguous(),
        down_blocks=weights.down_blocks[:, :, first:last].contiguous(),
        down_scales=weights.down_scales[:, :, first:last].contiguous(),
        down_bias=weights.down_bias if rank == 0 else torch.zeros_like(weights.down_bias),
    )


def check_decode_kernels(peer: Peer) -> None:
    """Decode kernels that sum inside themselves leave what whole ones leave: stream, tokens; and the same on all ranks.

    Batch sizes take turns, since they share mailboxes and count their exchanges together.
    """
    from tests.gpu.test_decode_kernels import random_layer

    group = peer.open(TRUE.hidden, TRUE.vocab)
    units = TRUE.intermediate // 32
    own_units = units * (peer.rank + 1) // peer.size - units * peer.rank // peer.size
    own = replace(
        TRUE, intermediate=32 * own_units, heads=TRUE.heads // peer.size, kv_heads=TRUE.kv_heads // peer.size,
        vocab=TRUE.vocab // peer.size,
    )  # fmt: skip
    layers = [random_layer(TRUE, seed) for seed in (7, 8, 9)]
    torch.manual_seed(1)
    embedding = torch.randn(TRUE.vocab, TRUE.hidden, device="cuda").bfloat16()
    head = (torch.randn(TRUE.vocab, TRUE.hidden, device="cuda") * TRUE.hidden**-0.5).bfloat16()
    angle = torch.rand(512, TRUE.head_dim // 2, device="cuda") * 6
    rotations = torch.stack((angle.cos(), angle.sin()), -1)
    prebuild(TRUE, BATCH_SIZES)
    prebuild(own, BATCH_SIZES, ranks=peer.size)
    made: dict[int, tuple[DecodeKernels, DecodeKernels]] = {}
    for turn, rows in enumerate((1, 2, 1, 4, 8, 1, 16, 8, 2, 4)):
        if rows not in made:
            made[rows] = DecodeKernels(TRUE, rows), DecodeKernels(own, rows, exchange=group.exchange)
        torch.manual_seed(turn)
        lengths = [1 + (37 * i + turn) % 300 for i in range(rows)]
        if rows > 2:
            lengths[1] = 0
        blocks = 6
        table = (torch.randperm(rows * blocks, device="cuda") + 1).int().view(rows, blocks)
        caches = [torch.randn((rows * blocks + 1) * 64, 2, TRUE.kv_heads, 64, device="cuda").bfloat16() for _ in layers]
        ids = torch.randint(0, TRUE.vocab, (rows,), device="cuda", dtype=torch.int32)
        streams = []
        for kernels, is_whole in zip(made[rows], (True, False), strict=True):
            state = DecodeState(
                ids.clone(),
                torch.tensor([max(0, n - 1) for n in lengths], device="cuda", dtype=torch.int32),
                torch.tensor(lengths, device="cuda", dtype=torch.int32),
                rotations,
                torch.tensor([0.0, 0.8] * 8, device="cuda")[:rows].contiguous(),
                torch.arange(rows, device="cuda") * 0x1234567890 - 5,
            )
            heads = slice(peer.rank * own.kv_heads, (peer.rank + 1) * own.kv_heads)
            calls = [
                LayerCall(
                    layer if is_whole else share_of(layer, TRUE, peer.rank, peer.size),
                    cache.clone() if is_whole else cache[:, :, heads].contiguous(),
                    table, 128 if number % 2 else None, layers[(number + 1) % 3].input_norm,
                )
                for number, (layer, cache) in enumerate(zip(layers, caches, strict=True))
            ]  # fmt: skip
            kernels.embed(state, embedding, layers[0].input_norm)
            if kernels.has_layers:
                kernels.run_layers(state, kernels.plan_layers(calls))
            else:
                for call in calls:
                    kernels.norm_qkv_rope(state, call.weights, call.cache, call.table)
                    kernels.paged_decode_attention(state, call.weights.sinks, call.cache, call.table, call.window)
                    kernels.out_proj_add(call.weights)
                    kernels.norm_router_topk(state, call.weights)
                    kernels.moe_gate_up(call.weights)
                    kernels.moe_down_add(state, call.weights, call.next_norm)
            rows_of_head = slice(None) if is_whole else slice(own.vocab * peer.rank, own.vocab * (peer.rank + 1))
            kernels.norm_logits(head[rows_of_head].contiguous())
            logits = kernels.logits
            if not is_whole:
                logits = group.all_gather(logits, [own.vocab] * peer.size)
                wanted, _ = reference_sample(logits, state.temperatures, state.seeds, state.positions)
                kernels.sample_advance(state)
                real = torch.tensor(lengths, device="cuda") > 0
                assert torch.equal(kernels.tokens[real], wanted[real]), (rows, kernels.tokens, wanted)
                assert same_on_all(peer, kernels.residual[real]), rows
            streams.append((kernels.residual.clone(), logits.clone()))
        real = [i for i, length in enumerate(lengths) if length]
        for name, whole, split in zip(("stream", "logits"), *streams, strict=True):
            errors = (split - whole)[real].norm(dim=1) / whole[real].norm(dim=1)
            # A near-tie of the router may turn in one row of many.
            assert float(errors.median()) < 1e-2, (name, rows, errors)


def check_tokens(peer: Peer) -> None:
    """Tokens chosen over ranks are those chosen from whole logits, for many rows."""
    group = peer.open(TRUE.hidden, TRUE.vocab)
    shape = replace(TRUE, vocab=TRUE.vocab // peer.size)
    choose = TokenExchange(shape, 256, group.exchange)
    for rows in (256, 24, 100, 256):
        torch.manual_seed(rows)
        logits = torch.randn(rows, TRUE.vocab, device="cuda")
        heat = torch.rand(rows, device="cuda").round()
        state = DecodeState(
            torch.zeros(rows, dtype=torch.int32, device="cuda"), torch.arange(rows, device="cuda").int(),
            torch.arange(1, rows + 1, device="cuda").int(), torch.zeros(1, device="cuda"), heat,
            torch.arange(rows, device="cuda") * 77,
        )  # fmt: skip
        wanted, _ = reference_sample(logits, heat, state.seeds, state.positions)
        choose.sample_advance(state, logits[:, shape.vocab * peer.rank : shape.vocab * (peer.rank + 1)].contiguous())
        assert torch.equal(choose.tokens[:rows], wanted), rows
        assert torch.equal(state.input_ids, wanted)


CHECKS = {
    check.__name__.removeprefix("check_"): check
    for check in (check_sums, check_races, check_fused, check_decode_kernels, check_tokens)
}


def run_check(name: str, size: int) -> None:
    status, texts = run_peers([sys.executable, __file__, "--peer", name], size, 60.0)
    report = "\n".join(f"rank {rank}:\n{text}" for rank, text in enumerate(texts))
    assert status == 0, report


if pytest is not None:

    @pytest.mark.parametrize("size", [2, 4, 8])
    @pytest.mark.parametrize("name", CHECKS)
    def test_ranks_agree_with_the_twins(name: str, size: int) -> None:
        if size > NUM_GPUS:
            pytest.skip(f"needs {size} CUDA devices")
        run_check(name, size)


def splits(num_gpus: int) -> dict[str, dict[str, object]]:
    """Name the ways to split a model that a host of so many GPUs can show."""
    every: dict[str, tuple[int, dict[str, object]]] = {
        "tp2": (2, {"tensor_parallel_size": 2}),
        "ep2": (2, {"tensor_parallel_size": 2, "enable_expert_parallel": True}),
        "pp2": (2, {"pipeline_parallel_size": 2}),
        "tp4": (4, {"tensor_parallel_size": 4}),
        "tp2 pp2": (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
    }
    return {name: sizes for name, (needed, sizes) in every.items() if needed <= num_gpus}


Said = dict[str, tuple[list[int], list[TokenLogprobs]]]


def what_is_said(sizes: dict[str, object]) -> Said:
    """Let tiny-oss answer requests, few at a time and many: their tokens, and log-probabilities of the greedy ones."""
    greedy = SamplingParams(temperature=0.0, logprobs=2)
    mixed = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.0, frequency_penalty=0.5),
    ]
    core = EngineCore.start(replace(TINY, **sizes))  # type: ignore[arg-type]
    found: Said = {}
    try:
        for name, params in (("few", [greedy] * 4), ("mixed", mixed), ("many", [*mixed, greedy, greedy] * 6)):
            for made in requests_of(params):
                request = replace(made, request_id=f"{name} {made.request_id}")
                found[request.request_id] = ([], [])
                assert core.add(request) is None
            while core.has_work:
                for output in core.step():
                    assert output.error is None, output.error
                    found[output.request_id][0].extend(output.new_token_ids)
                    found[output.request_id][1].extend(output.new_logprobs or [])
        assert core.stats().num_used_blocks == 0
    finally:
        core.stop()
    return found


def gaps_at_first_difference(got: Said, wanted: Said) -> list[float]:
    """Tell by how much one GPU preferred its token where a greedy answer first differs, in log-probability."""
    gaps = []
    for name, (tokens, chances) in wanted.items():
        if chances and tokens != got[name][0]:
            at = next(i for i, pair in enumerate(zip(tokens, got[name][0], strict=True)) if pair[0] != pair[1])
            best, second = chances[at].top_logprobs[:2]
            gaps.append(best - second)
    return gaps


def test_split_models_say_what_one_gpu_says() -> None:
    wanted = what_is_said({})
    for name, sizes in splits(NUM_GPUS).items():
        got = what_is_said(sizes)
        share = sum(got[key][0] == wanted[key][0] for key in wanted) / len(wanted)
        gaps = gaps_at_first_difference(got, wanted)
        print(f"{name}: {share:.3f} of the requests have equal tokens; the others turn at near-ties of", flush=True)
        print("   " + " ".join(f"{gap:.3f}" for gap in sorted(gaps)), flush=True)
        # bfloat16 turns near-ties, and a batch of another size alone turns some: stages have one GPU's arithmetic.
        assert share >= 0.75, name
        assert max(gaps, default=0.0) < 0.05, name


def test_a_killed_rank_is_named_at_once_and_nothing_is_left() -> None:
    free = [torch.cuda.mem_get_info(index)[0] for index in range(2)]
    core = EngineCore.start(replace(TINY, tensor_parallel_size=2))
    executor = core.executor
    assert isinstance(executor, MultiNodeExecutor)
    pids = executor.pids
    for request in requests_of([SamplingParams(temperature=0.0)] * 4, max_tokens=600):
        core.add(request)
    for _ in range(50):
        core.step()
    os.kill(pids[1], signal.SIGKILL)
    begun = time.monotonic()
    message = ""
    while not message:
        try:
            core.step()
        except ExecutorError as error:
            message = str(error)
    named = time.monotonic() - begun
    core.stop()
    gone = time.monotonic() - begun
    print(f"named after {named:.2f} s, gone after {gone:.2f} s: {message}", flush=True)
    assert "rank 1" in message
    assert "cuda:1" in message
    assert named < 5
    assert gone < 10
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    for index, before in enumerate(free):
        assert torch.cuda.mem_get_info(index)[0] > before - (64 << 20), index


if __name__ == "__main__":
    if "--peer" in sys.argv:
        with torch.inference_mode():
            CHECKS[sys.argv[-1]](join())
        sys.exit(0)
    failures = 0
    for size in () if "--only-engines" in sys.argv else (2, 4, 8):
        for name in sys.argv[1:] or CHECKS if size <= NUM_GPUS else ():
            try:
                run_check(name, size)
                print(f"ok   {name}, {size} GPUs", flush=True)
            except Exception:  # noqa: BLE001 - a script's report of each test
                failures += 1
                print(f"FAIL {name}, {size} GPUs", flush=True)
                traceback.print_exc()
    for test in (
        test_split_models_say_what_one_gpu_says,
        test_a_killed_rank_is_named_at_once_and_nothing_is_left,
    ):
        if "--only-engines" not in sys.argv:
            break
        try:
            test()
            print(f"ok   {test.__name__}", flush=True)
        except Exception:  # noqa: BLE001 - as above
            failures += 1
            print(f"FAIL {test.__name__}", flush=True)
            traceback.print_exc()
    sys.exit(1 if failures else 0)
