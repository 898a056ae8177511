"""Time the CUDA decode step at gpt-oss-20b's true shape, with random weights and a captured graph of the whole step.

    python bench/gpu_decode_step.py [--rows 1 2 4 8 16] [--context 1152] [--no-kernels] [--launches]
        [--layer-rows N] [--tune NAME=VALUE …] [--json FILE]

Needs one GPU with 16 GB free. Weights are random, so is routing: it touches more experts than a trained router's.
Times are medians of 7 runs of 20 graph replays. "floor" is bytes / 3.35 TB/s (one H100's specified bandwidth).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels.cuda.decode import DecodeKernels, DecodeShape, DecodeState, LayerWeights
from kernels.cuda.layers import FASTEST_ROWS, LayerCall

SHAPE = DecodeShape(2880, 2880, 64, 8, 64, 32, 4, 201_088, 32)
LAYERS = 24
WINDOW = 128
SPECIFIED = 3.35e12  # bytes/s
RUNS, REPLAYS = 7, 20


def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype).mul_(scale)


def random_layer() -> LayerWeights:
    h, i, e, attention = SHAPE.hidden, SHAPE.intermediate, SHAPE.experts, SHAPE.heads * SHAPE.head_dim

    def experts(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        blocks = torch.randint(0, 256, (e, rows, width // 32, 16), dtype=torch.uint8, device="cuda")
        scales = torch.randint(116, 121, (e, rows, width // 32), dtype=torch.uint8, device="cuda")
        return blocks, scales, randn(e, rows, scale=0.1)

    qkv = attention + 2 * SHAPE.kv_heads * SHAPE.head_dim
    return LayerWeights(
        torch.ones(h, device="cuda"),
        randn(qkv, h, scale=h**-0.5),
        randn(qkv, scale=0.1),
        randn(SHAPE.heads, dtype=torch.float32),
        randn(h, attention, scale=attention**-0.5),
        randn(h, scale=0.1),
        torch.ones(h, device="cuda"),
        randn(e, h, scale=2 * h**-0.5),
        randn(e, scale=0.1),
        *experts(2 * i, h),
        *experts(h, i),
    )


@dataclass
class Model:
    layers: list[LayerWeights]
    norm: Tensor
    embedding: Tensor
    lm_head: Tensor


class Step:
    """The whole step of one batch size over a model, with its cache."""

    def __init__(self, model: Model, kernels: DecodeKernels, context: int) -> None:
        self.model, self.kernels, self.rows = model, kernels, kernels.rows
        self.start = context - (RUNS * REPLAYS + 6) // 2  # so that the mean length is `context`
        most = context + RUNS * REPLAYS + 64
        blocks = most // SHAPE.block_size + 1
        self.table = (torch.randperm(self.rows * blocks, device="cuda") + 1).int().view(self.rows, blocks)
        slots = (self.rows * blocks + 1) * SHAPE.block_size
        self.caches = [randn(slots, 2, SHAPE.kv_heads, SHAPE.head_dim) for _ in model.layers]
        angle = torch.rand(most, SHAPE.head_dim // 2, device="cuda") * 6
        self.state = DecodeState(
            torch.zeros(self.rows, dtype=torch.int32, device="cuda"),
            torch.zeros(self.rows, dtype=torch.int32, device="cuda"),
            torch.zeros(self.rows, dtype=torch.int32, device="cuda"),
            torch.stack((angle.cos(), angle.sin()), -1) * 1.3,
            torch.zeros(self.rows, device="cuda"),
            torch.arange(self.rows, device="cuda"),
        )
        self.norms = [layer.input_norm for layer in model.layers[1:]] + [model.norm]
        self.plan = None
        if kernels.has_layers:
            windows = [None if index % 2 else WINDOW for index in range(LAYERS)]
            calls = zip(model.layers, self.caches, [self.table] * LAYERS, windows, self.norms, strict=True)
            self.plan = kernels.plan_layers([LayerCall(*call) for call in calls])
        self.reset()

    def reset(self) -> None:
        self.state.input_ids.copy_(torch.randint(0, SHAPE.vocab, (self.rows,), device="cuda"))
        self.state.positions.fill_(self.start - 1)
        self.state.seq_lens.fill_(self.start)

    def names(self) -> list[str]:
        """Name the kernels that this step launches."""
        if self.plan is not None:
            return ["embed", "run_layers", "norm_logits", "sample_advance"]
        return [name for name in bytes_of(1, 1, 1) if name != "run_layers"]

    def run(self, only: str | None = None, after_router: Callable[[], None] | None = None) -> None:
        kernels, state, layers = self.kernels, self.state, self.model.layers

        def wanted(name: str) -> bool:
            return only in (None, name)

        if wanted("embed"):
            kernels.embed(state, self.model.embedding, layers[0].input_norm)
        if self.plan is not None:
            if wanted("run_layers"):
                kernels.run_layers(state, self.plan)
            layers = []
        for index, (layer, cache, norm) in enumerate(zip(layers, self.caches, self.norms, strict=False)):
            if wanted("norm_qkv_rope"):
                kernels.norm_qkv_rope(state, layer, cache, self.table)
            if wanted("paged_decode_attention"):
                window = None if index % 2 else WINDOW
                kernels.paged_decode_attention(state, layer.sinks, cache, self.table, window)
            if wanted("out_proj_add"):
                kernels.out_proj_add(layer)
            if wanted("norm_router_topk"):
                kernels.norm_router_topk(state, layer)
                if after_router is not None:
                    after_router()
            if wanted("moe_gate_up"):
                kernels.moe_gate_up(layer)
            if wanted("moe_down_add"):
                kernels.moe_down_add(state, layer, norm)
        if wanted("norm_logits"):
            kernels.norm_logits(self.model.lm_head)
        if wanted("sample_advance"):
            kernels.sample_advance(state)

    def seconds(self, only: str | None = None) -> float:
        """Median time of one replay of the captured step, or of one kind of kernel in it."""
        self.reset()
        if only:  # leave a real routing behind
            self.run()
        self.run(only)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(only)
        self.reset()
        for _ in range(3):
            graph.replay()
        times: list[float] = []
        event: Any = torch.cuda.Event
        for _ in range(RUNS):
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / REPLAYS)
        return statistics.median(times)

    def distinct_experts(self) -> list[int]:
        """Count the experts that each layer of one step touches."""
        counts: list[Tensor] = []
        self.reset()
        if self.plan is not None:
            self.run()
            return [int(count) for count in self.plan.active_experts]
        self.run(after_router=lambda: counts.append(self.kernels.active_experts().clone()))
        return [int(count) for count in counts]


def bytes_of(rows: int, context: int, experts: float) -> dict[str, tuple[int, float]]:
    """Launches per step and bytes per launch of each kernel; `experts` are touched per layer."""
    h, i = SHAPE.hidden, SHAPE.intermediate
    attention, kv = SHAPE.heads * SHAPE.head_dim, SHAPE.kv_heads * SHAPE.head_dim
    keys = rows * (context + WINDOW) / 2
    sizes = {
        "embed": (1, rows * h * 2),
        "norm_qkv_rope": (LAYERS, (attention + 2 * kv) * h * 2),
        "paged_decode_attention": (LAYERS, keys * kv * 4),
        "out_proj_add": (LAYERS, attention * h * 2),
        "norm_router_topk": (LAYERS, SHAPE.experts * h * 2),
        "moe_gate_up": (LAYERS, experts * 2 * i * (h / 32 * 17 + 2)),
        "moe_down_add": (LAYERS, experts * h * (i / 32 * 17 + 2)),
        "norm_logits": (1, SHAPE.vocab * h * 2),
        "sample_advance": (1, rows * SHAPE.vocab * 4),
    }
    return {"run_layers": (1, sum(size for count, size in sizes.values() if count == LAYERS) * LAYERS), **sizes}


def measure(model: Model, rows: int, options: argparse.Namespace, tuning: dict[str, int]) -> dict[str, object]:
    layer_rows = 0 if options.launches else options.layer_rows
    step = Step(model, DecodeKernels(SHAPE, rows, tuning=tuning, layer_rows=layer_rows), options.context)
    names = step.names()
    experts = step.distinct_experts()
    mean_experts = statistics.mean(experts)
    sizes = bytes_of(rows, options.context, mean_experts)
    floor = sum(count * size for name, (count, size) in sizes.items() if name in names) / SPECIFIED
    seconds = step.seconds()
    print(
        f"B={rows}: {seconds * 1e3:.4f} ms = {rows / seconds:,.0f} tok/s, {floor / seconds:.0%} of floor, "
        f"{mean_experts:.2f} experts/layer {'one launch' if step.plan else 'six launches a layer'} {tuning or ''}",
        flush=True,
    )
    report: dict[str, object] = {
        "rows": rows,
        "context": options.context,
        "tuning": tuning,
        "milliseconds": seconds * 1e3,
        "tokens_per_second": rows / seconds,
        "fraction_of_floor": floor / seconds,
        "distinct_experts_per_layer": mean_experts,
    }
    if not options.no_kernels:
        last = bytes_of(rows, options.context, mean_experts if step.plan else experts[-1])
        table = {}
        for name in names:
            count, size = last[name]
            each = step.seconds(name) / count
            table[name] = {"microseconds": each * 1e6, "bytes": size, "gigabytes_per_second": size / each / 1e9}
            print(
                f"  {name:24}{each * 1e6:9.2f} us x {count:2}{size / 1e6:10.2f} MB{size / each / 1e9:8.0f} GB/s"
                f"{size / SPECIFIED / each:6.0%}",
                flush=True,
            )
        report["kernels"] = table
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--context", type=int, default=1152)
    parser.add_argument("--launches", action="store_true", help="six launches a layer for every batch size")
    parser.add_argument(
        "--layer-rows", type=int, default=FASTEST_ROWS, help="one launch of all layers up to so many rows"
    )
    parser.add_argument("--no-kernels", action="store_true", help="time the whole step only")
    parser.add_argument("--tune", nargs="*", default=[""], help="variants, each NAME=VALUE[,NAME=VALUE…]")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    table = randn(SHAPE.vocab, SHAPE.hidden)
    lm_head = randn(SHAPE.vocab, SHAPE.hidden, scale=SHAPE.hidden**-0.5)
    model = Model([random_layer() for _ in range(LAYERS)], torch.ones(SHAPE.hidden, device="cuda"), table, lm_head)
    results = []
    for variant in options.tune:
        pairs = (item.split("=") for item in variant.split(",") if item)
        tuning = {name: int(value) for name, value in pairs}
        results += [measure(model, rows, options, tuning) for rows in options.rows]
    if options.json:
        facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        options.json.write_text(json.dumps({**facts, "synthetic_weights": True, "results": results}, indent=1))


if __name__ == "__main__":
    main()
