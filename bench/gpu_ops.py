"""Time every Triton op at gpt-oss-20b's true shape, and a chain of them as one decode step or one prefill.

    python bench/gpu_ops.py [--rows 16 32 …] [--tokens 1024 8192 …] [--context 1152] [--kernels] [--json FILE]

Decode is timed by graph replay, prefill by events; medians. Weights are random and rotate over several layers, more
than the L2 cache holds. A floor is max(bytes / 3.0 TB/s, FLOP / 798 TFLOP/s): copy bandwidth and GEMM rate of one H100.
The chain runs all ops in their order, 24 layers, lm_head and greedy sampling, in one graph for decode; it is the figure
to trust, since it has the launch gaps too. It starts from the same random rows each time, and the mean number of
distinct experts that its routers chose is printed (uniform routing gives 32·(1 - (7/8)^n)). `--kernels` also lists the
kernels of a chain as the profiler saw them, and what is left for gaps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LAYERS, HIDDEN, INTER, EXPERTS, TOP_K, VOCAB = 24, 2880, 2880, 32, 4, 201088
HEADS, KV_HEADS, DIM, WINDOW, BLOCK = 64, 8, 64, 128, 64
QKV = (HEADS + 2 * KV_HEADS) * DIM
COPY_BYTES, GEMM_FLOP = 3.0e12, 798e12
SETS = 4  # layers of weights that rotate
DEVICE = "cuda"


def rand(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).bfloat16()


class Weights:
    """One layer."""

    def __init__(self) -> None:
        from kernels.triton.moe_gluon import prepare_scales

        def experts(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            shape = (EXPERTS, rows, columns // 32)
            scales = torch.randint(115, 119, shape, device=DEVICE, dtype=torch.uint8)
            blocks = torch.randint(0, 256, (*shape, 16), device=DEVICE, dtype=torch.uint8)
            return blocks, scales, prepare_scales(scales), rand(EXPERTS, rows, scale=0.02)

        # Small biases: large ones would make all rows alike, and all choose the same experts.
        self.qkv, self.qkv_bias = rand(QKV, HIDDEN, scale=0.02), rand(QKV, scale=0.02)
        self.out, self.out_bias = rand(HIDDEN, HEADS * DIM, scale=0.02), rand(HIDDEN, scale=0.02)
        self.router, self.router_bias = rand(EXPERTS, HIDDEN, scale=0.05), rand(EXPERTS, scale=0.02)
        self.norm = torch.rand(HIDDEN, device=DEVICE) + 0.5
        self.sinks = torch.randn(HEADS, device=DEVICE)
        self.gate_up, self.gate_up_raw, self.gate_up_scales, self.gate_up_bias = experts(2 * INTER, HIDDEN)
        self.down, self.down_raw, self.down_scales, self.down_bias = experts(HIDDEN, INTER)


@dataclass
class Case:
    """The tensors of one batch: decode rows of `context` keys, or prefill rows of `context` tokens each."""

    tokens: int
    context: int
    is_decode: bool
    moe: str = "experts"
    caches: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        from kernels.triton import attention_decode, moe_dense, permute, router

        rows = self.tokens if self.is_decode else max(1, self.tokens // self.context)
        self.rows = rows
        blocks = -(-self.context // BLOCK)
        self.tables = (torch.randperm(rows * blocks, device=DEVICE) + 1).int().view(rows, blocks)
        self.lens = torch.full((rows,), self.context, device=DEVICE, dtype=torch.int32)
        self.starts = (torch.arange(rows + 1, device=DEVICE) * (self.tokens // rows)).int()
        inside = torch.arange(self.tokens, device=DEVICE) % self.context
        self.positions = (self.lens - 1 if self.is_decode else inside).int()
        row = torch.arange(self.tokens, device=DEVICE) // (1 if self.is_decode else self.context)
        block = self.tables[row, self.positions.long() // BLOCK]
        self.slots = block * BLOCK + self.positions % BLOCK
        self.caches = [rand((rows * blocks + 1) * BLOCK, 2, KV_HEADS, DIM) for _ in range(2 if self.is_decode else 1)]
        self.cos_sin = torch.rand(self.context + 1, DIM // 2, 2, device=DEVICE)
        self.x = torch.randn(self.tokens, HIDDEN, device=DEVICE)
        self.first_x = self.x.clone()
        self.normed, self.deltas = rand(self.tokens, HIDDEN), rand(self.tokens, TOP_K, HIDDEN, scale=0.1)
        self.delta = rand(self.tokens, HIDDEN, scale=0.1)
        wide = permute.expert_width(HIDDEN)
        self.expert_x = torch.zeros(self.tokens, wide, device=DEVICE, dtype=torch.bfloat16)
        self.expert_x[:, :HIDDEN] = rand(self.tokens, HIDDEN)
        self.act = torch.zeros(self.tokens * TOP_K, wide, device=DEVICE, dtype=torch.bfloat16)
        self.qkv, self.attended = rand(self.tokens, QKV), rand(self.tokens, HEADS * DIM)
        self.query = rand(self.tokens, HEADS, DIM)
        self.ids = torch.rand(self.tokens, EXPERTS, device=DEVICE).topk(TOP_K).indices.int()
        self.weights = torch.full((self.tokens, TOP_K), 1 / TOP_K, device=DEVICE)
        self.index = router.expert_index(self.ids, EXPERTS)
        self.scratch = moe_dense.DenseScratch.allocate(EXPERTS, HIDDEN, INTER, DEVICE) if self.moe == "dense" else None
        self.work = attention_decode.DecodeWorkspace.allocate(rows, KV_HEADS, DIM, DEVICE) if self.is_decode else None

    def ops(self, layer: Weights, cache: Tensor) -> list[tuple[str, Callable[[], Any], float, float]]:
        """Give (name, function, bytes, FLOP) of each op of a layer; attention comes as full, then window."""
        from kernels.triton import attention_decode, attention_prefill, moe, moe_dense, norm, rope, router

        tokens, context = self.tokens, self.context
        real = self.lens if self.is_decode else None

        def attend(window: int | None) -> Tensor:
            if self.is_decode:
                return attention_decode.paged_decode_attention(
                    self.query, cache, self.tables, self.lens, layer.sinks, DIM**-0.5,
                    block_size=BLOCK, window=window, workspace=self.work, out=self.attended,
                )  # fmt: skip
            return attention_prefill.paged_prefill_attention(
                self.query, cache, self.tables, self.starts, self.lens, layer.sinks, DIM**-0.5,
                block_size=BLOCK, window=window, out=self.attended,
            )  # fmt: skip

        def pairs(window: int | None) -> float:
            if self.is_decode:
                return float(tokens * min(context, window or context))
            return tokens * (min(window, context) if window else (context + 1) / 2)

        def keys(window: int | None) -> float:
            return 2048.0 * (pairs(window) if self.is_decode else tokens)

        deltas = self.deltas if self.moe == "experts" else self.delta
        touched = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** tokens)
        expert = HIDDEN * INTER * 17 / 32
        slots = tokens * TOP_K
        row = tokens * HIDDEN
        ops: list[tuple[str, Callable[[], Any], float, float]] = [
            ("norm", lambda: norm.add_rms_norm(deltas, None, self.x, layer.norm, 1e-5, out=self.normed),
             row * 10 + deltas.numel() * 2, 0),
            ("qkv", lambda: torch.mm(self.normed, layer.qkv.t(), out=self.qkv),
             QKV * HIDDEN * 2 + row * 2 + tokens * QKV * 2, 2.0 * row * QKV),
            ("rope", lambda: rope.rope_kv_write(
                self.qkv, layer.qkv_bias, self.cos_sin, self.positions, self.slots, cache, out=self.query),
             tokens * QKV * 4, 0),
            ("attention_full", lambda: attend(None), keys(None) + tokens * 16384, 4.0 * HEADS * DIM * pairs(None)),
            ("attention_window", lambda: attend(WINDOW), keys(WINDOW) + tokens * 16384,
             4.0 * HEADS * DIM * pairs(WINDOW)),
            ("out", lambda: torch.mm(self.attended, layer.out.t(), out=self.delta),
             HEADS * DIM * HIDDEN * 2 + tokens * HEADS * DIM * 2 + row * 2, 2.0 * row * HEADS * DIM),
            ("norm_expert", lambda: norm.add_rms_norm(
                self.delta, layer.out_bias, self.x, layer.norm, 1e-5, out=self.normed, expert_out=self.expert_x),
             row * 14, 0),
            ("router", lambda: router.router_topk(
                self.normed, layer.router, layer.router_bias, TOP_K, real=real, out=(self.ids, self.weights)),
             row * 2, 2.0 * row * EXPERTS),
            ("index", lambda: router.expert_index(self.ids, EXPERTS, out=self.index), slots * 8, 0),
        ]  # fmt: skip
        if self.moe == "experts" and self.index.block_t < moe.PREFILL_BLOCK_T:
            ops.append(
                ("experts", lambda: moe.run_experts(
                    self.expert_x, self.weights, self.index, (layer.gate_up, layer.gate_up_scales, layer.gate_up_bias),
                    (layer.down, layer.down_scales, layer.down_bias), 7.0, act=self.act, out=self.deltas),
                 3 * expert * touched + slots * HIDDEN * 8, 6.0 * slots * HIDDEN * INTER)
            )  # fmt: skip
        elif self.moe == "experts":
            ops.append(
                ("moe_prefill", lambda: moe.run_experts(
                    self.expert_x, self.weights, self.index, (layer.gate_up, layer.gate_up_scales, layer.gate_up_bias),
                    (layer.down, layer.down_scales, layer.down_bias), 7.0),
                 3 * expert * EXPERTS, 6.0 * slots * HIDDEN * INTER)
            )  # fmt: skip
        elif self.scratch is not None:
            scratch = self.scratch
            ops.append(
                ("moe_dense", lambda: moe_dense.moe_dense(
                    self.normed, self.ids, self.weights, self.index, layer.gate_up, layer.gate_up_raw,
                    layer.gate_up_bias, layer.down, layer.down_raw, layer.down_bias, 7.0, scratch),
                 3 * expert * EXPERTS, 6.0 * slots * HIDDEN * INTER)
            )  # fmt: skip
        return ops


def median_ms(function: Callable[[], Any], repeats: int) -> float:
    function()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def graph_of(functions: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    for function in functions:
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    return graph


def count_experts(case: Case, chain: list[tuple[str, Callable[[], Any]]]) -> float:
    """Run a chain eagerly; give the mean number of distinct experts a layer."""
    counts: list[int] = []
    for name, function in chain:
        function()
        if name == "router":
            counts.append(int(torch.unique(case.ids[case.ids >= 0]).numel()))
    return sum(counts) / len(counts)


def list_kernels(run: Callable[[], Any], step_ms: float) -> dict[str, Any]:
    """Time the kernels of one run by the profiler: name, count, mean and total in microseconds, longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_time > 0:
            found.setdefault(event.name[:60], []).append(event.device_time)
    rows = sorted(((sum(t), len(t), name) for name, t in found.items()), reverse=True)
    for total, count, name in rows[:24]:
        print(f"    {total:9.1f} us = {count:4} x {total / count:7.2f}  {name}", flush=True)
    busy = sum(total for total, _, _ in rows) / 1e3
    print(f"    kernels {busy:.3f} ms of {step_ms:.3f}", flush=True)
    return {name: {"count": count, "total_us": round(total, 1)} for total, count, name in rows}


def measure(case: Case, layers: list[Weights], lm_head: Tensor, *, with_kernels: bool) -> dict[str, Any]:
    from kernels.triton import sampling

    rows = case.rows
    work = sampling.SampleWorkspace.allocate(rows, VOCAB, DEVICE)
    logits = torch.empty(rows, VOCAB, device=DEVICE)
    picked = (torch.empty(rows, device=DEVICE, dtype=torch.int32), torch.empty(rows, device=DEVICE, dtype=torch.int32))
    last = case.normed[:rows]
    tail: list[tuple[str, Callable[[], Any], float, float]] = [
        ("lm_head", lambda: torch.mm(last, lm_head.t(), out_dtype=torch.float32, out=logits),
         VOCAB * HIDDEN * 2 + rows * VOCAB * 4, 2.0 * rows * VOCAB * HIDDEN),
        ("greedy", lambda: sampling.greedy(logits, out=picked, workspace=work), rows * VOCAB * 4, 0),
    ]  # fmt: skip
    sets = [case.ops(layer, case.caches[i % len(case.caches)]) for i, layer in enumerate(layers)]
    result: dict[str, Any] = {"tokens": case.tokens, "context": case.context, "moe": case.moe, "ops": {}}
    total, floor_total = 0.0, 0.0
    for i, (name, function, size, flop) in enumerate(sets[0] + tail):
        is_tail = i >= len(sets[0])
        rotated = [function] if is_tail else [ops[i][1] for ops in sets]
        if case.is_decode:
            ms = median_ms(graph_of(rotated).replay, 9) / len(rotated)
        else:
            ms = median_ms(rotated[0], 5)
        floor = max(size / COPY_BYTES, flop / GEMM_FLOP) * 1e3
        count = 1 if is_tail else LAYERS // 2 if name.startswith("attention") else LAYERS
        total += ms * count
        floor_total += floor * count
        result["ops"][name] = {
            "us": round(ms * 1e3, 1), "floor_us": round(floor * 1e3, 1), "count": count,
            "TB/s": round(size / ms / 1e9, 2), "TFLOP/s": round(flop / ms / 1e9, 1),
        }  # fmt: skip
        print(f"  {name:17}{ms * 1e3:9.1f} us  floor {floor * 1e3:8.1f}  {result['ops'][name]['TB/s']:5.2f} TB/s "
              f"{result['ops'][name]['TFLOP/s']:7.1f} TFLOP/s  x{count}", flush=True)  # fmt: skip
    chain: list[tuple[str, Callable[[], Any]]] = [("reset", lambda: case.x.copy_(case.first_x))]
    for layer in range(LAYERS):
        skipped = "attention_full" if layer % 2 == 0 else "attention_window"
        chain += [(op[0], op[1]) for op in sets[layer % len(sets)] if op[0] != skipped]
    layers_only = [function for _, function in chain]
    whole = layers_only + [op[1] for op in tail]

    def time_chain(functions: list[Callable[[], Any]]) -> tuple[float, Callable[[], Any]]:
        run = graph_of(functions).replay if case.is_decode else lambda: [function() for function in functions]
        return median_ms(run, 9 if case.is_decode else 3), run

    experts = count_experts(case, chain)
    per_layer = time_chain(layers_only)[0] / LAYERS
    step, run = time_chain(whole)
    result |= {
        "sum_ms": round(total, 3), "floor_ms": round(floor_total, 3), "chain_ms": round(step, 3),
        "layer_us": round(per_layer * 1e3, 1), "distinct_experts": round(experts, 1),
        "tokens_per_second": round(case.tokens / step * 1e3),
    }  # fmt: skip
    kind = "rows" if case.is_decode else "tokens"
    print(
        f"{case.tokens} {kind}, {case.moe}: sum {total:.2f} ms, chain {step:.2f} ms, {per_layer * 1e3:.1f} us a layer,"
        f" floor {floor_total:.2f} ms, {experts:.1f} experts, {case.tokens / step * 1e3:.0f} tok/s",
        flush=True,
    )
    if with_kernels:
        result["kernels"] = list_kernels(run, step)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[16, 32, 64, 128, 256])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1024, 8192, 16384])
    parser.add_argument("--context", type=int, default=1152)
    parser.add_argument("--moe", nargs="*", default=["experts"], help="ways through the experts for prefill")
    parser.add_argument("--kernels", action="store_true", help="list the kernels of each chain")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    layers, lm_head = [Weights() for _ in range(SETS)], rand(VOCAB, HIDDEN, scale=0.02)
    results = []
    for rows in options.rows:
        case = Case(rows, options.context, True)
        results.append(measure(case, layers, lm_head, with_kernels=options.kernels))
    for tokens in options.tokens:
        for moe in options.moe:
            case = Case(tokens, min(tokens, 8192), False, moe)
            results.append(measure(case, layers, lm_head, with_kernels=options.kernels))
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
