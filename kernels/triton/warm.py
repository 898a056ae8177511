"""Compile every Triton kernel that a model's runner will launch, in parallel, before the first request needs one.

Each variant is compiled by launching it, through the very functions that the runner calls, on inputs that hold nothing
but padding: rows of length 0, tokens of no expert. So no list of variants can fall out of step with the kernels, and
the module is loaded and known to fit the device, too. Threads suffice: Triton spends its time in code that frees the
interpreter's lock (LLVM, ptxas, the C compiler that builds launchers).

Knows: which calls the runner makes. Refuses to know: weights (a few bytes stand in for them), requests, graphs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from kernels.build import cache_folder
from kernels.cuda.decode import DecodeShape
from kernels.triton import attention_decode, attention_prefill, moe, norm, rope, router, sampling
from kernels.triton.permute import expert_width

_WINDOW = 128  # any: only whether there is one makes a difference


@dataclass(frozen=True, slots=True)
class WarmReport:
    """How long it took, in seconds, each task's share (they overlap), and whether anything had to be compiled."""

    seconds: float
    tasks: dict[str, float]
    compiled: int


def use_cache() -> Path:
    """Point Triton's disk cache at ours, beside the cubins; call it before the first launch. An explicit
    TRITON_CACHE_DIR wins. Returns the folder."""
    named = os.environ.get("TRITON_CACHE_DIR")
    folder = Path(named) if named else cache_folder() / f"triton-{triton.__version__}"
    triton.knobs.cache.dir = str(folder)
    return folder


def compile_all(
    shape: DecodeShape,
    *,
    decode_rows: Sequence[int],
    max_tokens: int = 16384,
    device: torch.device | str = "cuda",
    workers: int | None = None,
) -> WarmReport:
    """Compile, load and launch once all that `shape` needs, or read it from the disk cache; waits for the device.

    Safe beside other threads that use the device, so it may run while weights load. `decode_rows`: batch sizes of the
    decode graphs beyond the CUDA kernels'; `max_tokens`: the largest step.
    Raises: what Triton raises when a kernel cannot be compiled or does not fit the device.
    """
    use_cache()
    started = time.perf_counter()
    before = _count_cubins()
    tasks = _tasks(shape, decode_rows, max_tokens, torch.device(device))
    spent: dict[str, float] = {}

    def run(name: str, task: Callable[[], object]) -> None:
        begin = time.perf_counter()
        # What the caller's thread has set does not reach this one.
        with torch.cuda.device(device), torch.inference_mode():
            task()
        spent[name] = time.perf_counter() - begin

    workers = workers or min(len(tasks), max(2, os.cpu_count() or 2))
    with ThreadPoolExecutor(workers, thread_name_prefix="compile") as pool:
        for future in [pool.submit(run, name, task) for name, task in tasks]:
            future.result()
    torch.cuda.synchronize(device)
    return WarmReport(time.perf_counter() - started, spent, _count_cubins() - before)


def _count_cubins() -> int:
    return sum(1 for _ in Path(triton.knobs.cache.dir).glob("*/*.cubin"))


def _tasks(
    shape: DecodeShape, decode_rows: Sequence[int], max_tokens: int, device: torch.device
) -> list[tuple[str, Callable[[], object]]]:
    """List the launches, the slowest to compile first."""
    bf16, f32, i32 = torch.bfloat16, torch.float32, torch.int32
    hidden, inter, k, experts = shape.hidden, shape.intermediate, shape.top_k, shape.experts
    heads, kv_heads, dim, block_size = shape.heads, shape.kv_heads, shape.head_dim, shape.block_size
    eps, scale = shape.epsilon, shape.head_dim**-0.5

    def zeros(*sizes: int, dtype: torch.dtype = bf16) -> Tensor:
        return torch.zeros(sizes, dtype=dtype, device=device)

    def unread(*sizes: int, dtype: torch.dtype = bf16) -> Tensor:
        """Stand in for a tensor that padding never reads: its shape, over a few bytes."""
        return zeros(sizes[-1], dtype=dtype).as_strided(sizes, (0,) * (len(sizes) - 1) + (1,))

    def expert_weights(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        return (
            unread(experts, rows, columns // 32, 16, dtype=torch.uint8),
            unread(experts, -(-columns // 128), rows, 4, dtype=torch.uint8),
            unread(experts, rows),
        )

    weight, sinks = zeros(hidden, dtype=f32), zeros(heads, dtype=f32)
    cache = zeros(block_size, 2, kv_heads, dim)
    logits, floats, seeds = zeros(1, shape.vocab, dtype=f32), zeros(1, dtype=f32), zeros(1, dtype=torch.int64)
    ints, table, starts = zeros(1, dtype=i32), zeros(1, 1, dtype=i32), zeros(2, dtype=i32)

    def run_experts(tokens: int) -> None:
        index = router.expert_index(torch.full((tokens, k), -1, dtype=i32, device=device), experts)
        x, shares = zeros(tokens, expert_width(hidden)), zeros(tokens, k, dtype=f32)
        deltas, slot_weights = moe.run_experts(
            x, shares, index, expert_weights(2 * inter, hidden), expert_weights(hidden, inter), shape.swiglu_limit
        )
        residual = zeros(tokens, hidden, dtype=f32)
        norm.add_rms_norm(deltas, None, residual, weight, eps, slot_weights=slot_weights)

    def attend(window: int | None) -> None:
        query = zeros(1, heads, dim)
        attention_decode.paged_decode_attention(
            query, cache, table, ints, sinks, scale, block_size=block_size, window=window
        )

    def attend_many(window: int | None) -> None:
        query = zeros(1, heads, dim)
        attention_prefill.paged_prefill_attention(
            query, cache, table, starts, ints, sinks, scale, block_size=block_size, window=window
        )

    def route(tokens: int, real: Tensor | None) -> None:
        router.router_topk(zeros(tokens, hidden), zeros(experts, hidden), zeros(experts), k, real=real)

    def rotate() -> None:
        width = (heads + 2 * kv_heads) * dim
        rope.rope_kv_write(
            zeros(1, width), zeros(width), zeros(1, dim // 2, 2, dtype=f32), ints, torch.full_like(ints, -1), cache
        )

    def norm_both() -> None:
        residual, delta, expert_x = zeros(1, hidden, dtype=f32), zeros(1, hidden), zeros(1, expert_width(hidden))
        norm.rms_norm(residual, weight, eps)
        norm.add_rms_norm(delta, zeros(hidden), residual, weight, eps, expert_out=expert_x)

    # One number of tokens for each tile of tokens that a step may take.
    means = (1, 16, 32, 512)
    tokens = [count for mean in means if (count := -(-mean * experts // k)) <= max_tokens]
    tiles = {router.choose_block_t(count, k, experts): count for count in (*tokens, *decode_rows)}
    return [
        *(
            (f"experts, {count} tokens", partial(run_experts, count))
            for _, count in sorted(tiles.items(), reverse=True)
        ),
        *((f"prefill attention, window {window}", partial(attend_many, window)) for window in (None, _WINDOW)),
        ("sampling thresholds", partial(sampling.sampling_thresholds, logits, floats, ints, floats, floats)),
        *((f"decode attention, window {window}", partial(attend, window)) for window in (None, _WINDOW)),
        ("greedy", partial(sampling.greedy, logits)),
        ("sample", partial(sampling.sample, logits, floats, seeds, ints)),
        ("sample above thresholds", partial(sampling.sample, logits, floats, seeds, ints, thresholds=floats)),
        ("router, padded", partial(route, 1, ints)),
        *((f"router, {count} tokens", partial(route, count, None)) for count in (1, max_tokens)),
        ("rope", rotate),
        ("slots", partial(rope.decode_slots, table, ints, ints, block_size, torch.zeros_like(ints))),
        ("norms", norm_both),
    ]
