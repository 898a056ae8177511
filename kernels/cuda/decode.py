"""The decode step of gpt-oss at up to 16 rows: one method per kernel, on buffers allocated once.

Knows: the kernels' arguments, grids and scratch. Refuses to know: models, requests, graphs; it never synchronises, so
everything here can be captured. Each method's meaning is its twin in `kernels/reference/decode.py`.

Order of a step: embed; per layer norm_qkv_rope, paged_decode_attention, out_proj_add, norm_router_topk, moe_gate_up,
moe_down_add, or where `has_layers`, all layers at once by run_layers; norm_logits; sample_advance. A row whose length
is 0 is padding: no expert, no cache write, no read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import build
from kernels.contract import KernelError
from kernels.cuda.exchange import Exchange
from kernels.cuda.launch import Argument, Kernel, read_int
from kernels.cuda.layers import FASTEST_ROWS, GROUPS, LayerCall, LayerPlan, layers_unfit, step_type

BATCH_SIZES = (1, 2, 4, 8, 16)
TUNING = {  # measured on an H100: see docs/performance-log.md
    "BLOCKS_PER_SM": 2,  # of the expert kernels
    "QKV_DEPTH": 4,  # chunks of 32 k in flight per warp
    "QKV_ASKED": 5,  # chunks of activations asked for at once
    "QKV_BLOCKS": 3,  # register budget, in blocks per SM
    "OUT_DEPTH": 4,
    "OUT_ASKED": 4,
    "OUT_BLOCKS": 2,
    "LOGITS_TILES": 1,  # tiles of 16 rows per block
    "LOGITS_DEPTH": 4,
    "LOGITS_ASKED": 5,
    "LOGITS_BLOCKS": 3,
    "QKV_STAGES": 2,  # of the ring, that run_layers multiplies at a time: fewer are free sooner, more cost less work
    "IN_FLIGHT": 1,  # stages that run_layers asks for at once, of each group of warps
    "QKV_PREFETCHED": 2,  # rotary pairs of the next layer's qkv weights that each group brings to L2 before routing
}
H100_MULTIPROCESSORS = 132
LARGEST_SCALE = 128  # E8M0: a block scale of 2
SAMPLE_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """Sizes of a gpt-oss model and of its cache blocks, in elements and tokens."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    vocab: int
    block_size: int
    epsilon: float = 1e-5
    swiglu_limit: float = 7.0

    def unfit(self) -> str | None:
        """Say why the kernels do not serve this shape, or None."""
        if self.hidden % 32 or self.intermediate % 32:
            return "hidden and intermediate size must be multiples of 32"
        if self.head_dim % 32 or self.heads % self.kv_heads or self.heads // self.kv_heads > 8:
            return "head size must be a multiple of 32, with at most 8 query heads per KV head"
        if self.top_k > 32 or self.top_k > self.experts:
            return "at most 32 experts per token"
        return None


def modules_for(shape: DecodeShape, rows: int, multiprocessors: int = H100_MULTIPROCESSORS) -> tuple[str, ...]:
    """Name the sources that serve a shape and batch size."""
    return MODULES if layers_unfit(shape, rows, multiprocessors) is None else MODULES[:-1]


def defines_for(
    shape: DecodeShape,
    rows: int,
    tuning: Mapping[str, int] = TUNING,
    *,
    shared_bytes: int = 233_472,
    multiprocessors: int = H100_MULTIPROCESSORS,
    ranks: int = 1,
) -> dict[str, int]:
    """Give the macros of a compilation for a device: shared memory of a multiprocessor in bytes, and their number.

    `ranks` is how many sum inside the kernels, each with a share of the model: the shape is the share's.
    """
    return {
        "H": shape.hidden,
        "I": shape.intermediate,
        "HEADS": shape.heads,
        "KV_HEADS": shape.kv_heads,
        "HEAD_DIM": shape.head_dim,
        "EXPERTS": shape.experts,
        "TOP_K": shape.top_k,
        "VOCAB": shape.vocab,
        "BLOCK_SIZE": shape.block_size,
        "ROWS": rows,
        "RANKS": ranks,
        "GRID": multiprocessors,
        "STAGE_BYTES_BUDGET": shared_bytes // tuning["BLOCKS_PER_SM"] - 14 * 1024,
        **tuning,
    }


@dataclass(slots=True)
class LayerWeights:
    """One layer: projections bf16, norms and sinks float32, experts MXFP4 in checkpoint layout with bf16 biases."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    sinks: Tensor
    out: Tensor
    out_bias: Tensor
    post_norm: Tensor
    router: Tensor
    router_bias: Tensor
    gate_up_blocks: Tensor
    gate_up_scales: Tensor
    gate_up_bias: Tensor
    down_blocks: Tensor
    down_scales: Tensor
    down_bias: Tensor

    def check(self) -> None:
        """Refuse what the kernels would read wrongly, once, at load (synchronises). Raises: KernelError."""
        for name in ("gate_up_scales", "down_scales"):
            largest = int(getattr(self, name).max())
            if largest > LARGEST_SCALE:
                raise KernelError(f"{name}: block scale {largest} exceeds {LARGEST_SCALE}, the largest served here")
        for name in self.__dataclass_fields__:
            tensor: Tensor = getattr(self, name)
            if not tensor.is_contiguous() or tensor.data_ptr() % 16:
                raise KernelError(f"{name}: must be contiguous and aligned to 16 bytes")


@dataclass(slots=True)
class DecodeState:
    """What a step reads and moves on, shared by all batch sizes; the first `rows` entries count.

    input_ids, positions, seq_lens int32 [>= rows]; seq_lens includes the current token, 0 marks padding.
    rotations float32 [P, D/2, 2] (cos, sin, times the concentration); temperatures float32, seeds int64 [>= rows].
    """

    input_ids: Tensor
    positions: Tensor
    seq_lens: Tensor
    rotations: Tensor
    temperatures: Tensor
    seeds: Tensor


class DecodeKernels:
    """The kernels for exactly `rows` rows of one shape, with their buffers.

    Buffers worth reading: residual float32 [B, H]; query bf16 [B, Hq, D]; attended bf16 [B, Hq * D];
    expert_ids int32 [B, k] (-1 for padding); expert_weights float32 [B, k]; logits float32 [B, V]; tokens int32 [B];
    `active_experts()`. `tuning` overrides entries of TUNING; up to `layer_rows` rows
    there is `run_layers`.

    With an `exchange` the shape is this rank's share (heads, columns of every expert, rows of lm_head), and the ranks
    of the exchange run the same kernels in step: what they add to the residual stream is summed inside, and their best
    tokens are compared. Then out_bias is the same on all ranks, down_bias zero on all but one; `logits` are this
    rank's.
    Raises: KernelBuildError, or KernelError for a shape or batch size that is not served.
    """

    def __init__(
        self,
        shape: DecodeShape,
        rows: int,
        device: torch.device | str = "cuda",
        *,
        is_dependent: bool = True,
        tuning: Mapping[str, int] | None = None,
        layer_rows: int = FASTEST_ROWS,
        exchange: Exchange | None = None,
    ) -> None:
        if reason := shape.unfit():
            raise KernelError(f"decode kernels: {reason}")
        if not 1 <= rows <= BATCH_SIZES[-1]:
            raise KernelError(f"decode kernels: {rows} rows, at most {BATCH_SIZES[-1]}")
        self.shape, self.rows = shape, rows
        tuned = {**TUNING, **(tuning or {})}
        self.splits = max(8, 32 // rows)
        ranks = exchange.num_ranks if exchange else 1
        jobs = jobs_for(shape, rows, device, tuned, layer_rows=layer_rows, ranks=ranks)
        # One argument more for every kernel that sums or counts.
        self._exchange: tuple[Argument, ...] = (exchange.arguments,) if exchange else ()
        self._first_token: tuple[Argument, ...] = (exchange.first_token,) if exchange else ()
        self._step_type = step_type(ranks)
        multiprocessors = self._multiprocessors = jobs[0][1]["GRID"]
        self._expert_grid = (multiprocessors * tuned["BLOCKS_PER_SM"], 1, 1)

        def kernel(module: Any, name: str, threads: int, shared_bytes: int = 0) -> Kernel:
            return Kernel(module, name, threads, shared_bytes=shared_bytes, is_dependent=is_dependent)

        loaded = {source.removesuffix(".cu"): build.load(source, defines) for source, defines in jobs}
        qkv, out, logits = (loaded[name] for name in ("qkv", "out_proj", "logits"))
        attention, experts = loaded["attention"], loaded["experts"]
        self._embed = kernel(loaded["embed"], "embed", 256)
        self._take_over = kernel(loaded["embed"], "take_over", 256)
        self._qkv = kernel(qkv, "norm_qkv_rope", read_int(qkv, "qkv_threads"))
        self._attention = kernel(attention, "paged_decode_attention", 128)
        self._out = kernel(out, "out_proj_add", read_int(out, "out_proj_threads"))
        self._router = kernel(loaded["router"], "norm_router_topk", 512)
        self._gate_up = kernel(experts, "moe_gate_up", 256, read_int(experts, "moe_gate_up_shared"))
        self._down = kernel(experts, "moe_down_add", 256, read_int(experts, "moe_down_add_shared"))
        self._logits = kernel(logits, "norm_logits", read_int(logits, "logits_threads"))
        self._logits_rows = read_int(logits, "logits_rows")
        self._sample = kernel(loaded["sample"], "sample_advance", 512)
        self._layers: Kernel | None = None
        if layers := loaded.get("layers"):
            self._layers = kernel(
                layers, "decode_layers", read_int(layers, "layers_threads"), read_int(layers, "layers_shared")
            )
            self._counters_per_layer = read_int(layers, "layers_counters")
            layout = read_int(layers, "layers_step_bytes"), read_int(layers, "layers_words")
            assert layout == (ctypes.sizeof(self._step_type), 19), layout

        def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(sizes, dtype=dtype, device=device)

        hidden, pairs = shape.hidden, rows * shape.top_k
        self.residual = empty(rows, hidden)
        self.query = empty(rows, shape.heads, shape.head_dim, dtype=torch.bfloat16)
        self.attended = empty(rows, shape.heads * shape.head_dim, dtype=torch.bfloat16)
        self.expert_ids = empty(rows, shape.top_k, dtype=torch.int32)
        self.expert_weights = empty(rows, shape.top_k)
        self.logits = empty(rows, shape.vocab)
        self.tokens = empty(rows, dtype=torch.int32)
        self._scaled = empty(rows, hidden, dtype=torch.bfloat16)
        self._squares = empty(rows, hidden // 16)
        self._inverse = empty(rows)
        self._routing = empty(2 + 2 * shape.experts + pairs, dtype=torch.int32)
        self._act = empty(pairs, shape.intermediate, dtype=torch.bfloat16)
        self._partial = empty(pairs, hidden)
        self._parts = empty(
            rows * shape.kv_heads * self.splits * read_int(attention, "attention_part_bytes"), dtype=torch.uint8
        )
        self._best = empty(rows * SAMPLE_BLOCKS, dtype=torch.int64)
        self._tile_tickets = empty(hidden // 16, dtype=torch.int32)
        self._head_tickets = empty(rows * shape.kv_heads, dtype=torch.int32)
        self._row_tickets = empty(rows, dtype=torch.int32)
        self._final_squares = self._squares
        if layers:
            groups = GROUPS * multiprocessors
            self._expert_input = empty(rows, hidden, dtype=torch.bfloat16)
            self._group_squares = empty(rows, groups)
            self._expert_squares = empty(rows, groups)
            self._router_parts = empty(rows, multiprocessors, shape.experts)
            self._range_parts = empty(read_int(layers, "layers_parts_bytes"), dtype=torch.uint8)

    def active_experts(self) -> Tensor:
        """Count the experts that the last routing touched: int32 [], on the GPU."""
        return self._routing[0]

    def embed(self, state: DecodeState, table: Tensor, norm: Tensor) -> None:
        """Start the residual stream from table bf16 [V, H]; `norm` is the first layer's input norm."""
        grid = ((self.shape.hidden + 255) // 256, self.rows, 1)
        self._embed(grid, state.input_ids, table, norm, self.residual, self._scaled, self._squares)
        self._final_squares = self._squares

    def take_over(self, stream: Tensor, norm: Tensor) -> None:
        """Start from the residual stream float32 [B, H] of the stage before; `norm` is the next layer's input norm."""
        grid = ((self.shape.hidden + 255) // 256, self.rows, 1)
        self._take_over(grid, stream, norm, self.residual, self._scaled, self._squares)
        self._final_squares = self._squares

    def norm_qkv_rope(self, state: DecodeState, weights: LayerWeights, cache: Tensor, table: Tensor) -> None:
        """A: project the normed stream; queries to `query`, keys and values to cache bf16 [slots, 2, K, D].

        `table` int32 [B, max_blocks] is the block table of the layer's KV group.
        """
        shape = self.shape
        grid = ((shape.heads + 2 * shape.kv_heads) * (shape.head_dim // 16), 1, 1)
        self._qkv(
            grid,
            weights.qkv,
            weights.qkv_bias,
            self._scaled,
            self._squares,
            shape.epsilon,
            state.rotations,
            state.positions,
            state.seq_lens,
            table,
            table.stride(0),
            self.query,
            cache,
            *self._exchange,
        )

    def paged_decode_attention(
        self, state: DecodeState, sinks: Tensor, cache: Tensor, table: Tensor, window: int | None
    ) -> None:
        """B: attend from `query` to the cached keys, the last `window` of them or all; fills `attended`."""
        shape = self.shape
        self._attention(
            (shape.kv_heads, self.splits, self.rows),
            self.query,
            cache,
            sinks,
            state.seq_lens,
            table,
            table.stride(0),
            window or 0,
            shape.head_dim**-0.5,
            self._parts,
            self._head_tickets,
            self.attended,
        )

    def out_proj_add(self, weights: LayerWeights) -> None:
        """C: add the output projection of `attended` to the residual stream."""
        self._out(
            (self.shape.hidden // 16, 1, 1),
            weights.out,
            weights.out_bias,
            self.attended,
            weights.post_norm,
            self.residual,
            self._scaled,
            self._squares,
            *self._exchange,
        )

    def norm_router_topk(self, state: DecodeState, weights: LayerWeights) -> None:
        """D: choose experts; fills `expert_ids`, `expert_weights` and the experts' work list."""
        self._router(
            (1, 1, 1),
            weights.router,
            weights.router_bias,
            self._scaled,
            self._squares,
            self.shape.epsilon,
            state.seq_lens,
            self._inverse,
            self.expert_ids,
            self.expert_weights,
            self._routing,
        )

    def moe_gate_up(self, weights: LayerWeights) -> None:
        """E: gate_up of the chosen experts with bias and clamped SwiGLU; see `activations`."""
        self._gate_up(
            self._expert_grid,
            weights.gate_up_blocks,
            weights.gate_up_scales,
            weights.gate_up_bias,
            self._scaled,
            self._inverse,
            self._routing,
            self.shape.swiglu_limit,
            self._act,
        )

    def activations(self) -> Tensor:
        """Give E's result in natural order: bf16 [B, k, I]. For tests: the kernels keep it in expert order."""
        grouped = self._act.view(self.rows, self.shape.top_k, -1, 4, 2)
        return grouped.transpose(-1, -2).reshape(self.rows, self.shape.top_k, -1)

    def moe_down_add(self, state: DecodeState, weights: LayerWeights, next_norm: Tensor) -> None:
        """F: add the weighted experts to the residual stream; `next_norm` is what the stream meets next."""
        self._down(
            self._expert_grid,
            weights.down_blocks,
            weights.down_scales,
            weights.down_bias,
            self._act,
            self.expert_weights,
            self._routing,
            self._partial,
            self._tile_tickets,
            state.seq_lens,
            next_norm,
            self.residual,
            self._scaled,
            self._squares,
            *self._exchange,
        )
        self._final_squares = self._squares

    @property
    def has_layers(self) -> bool:
        """Whether `run_layers` serves this shape, batch size and device."""
        return self._layers is not None

    def plan_layers(self, calls: Sequence[LayerCall]) -> LayerPlan:
        """Lay out layers for `run_layers`, once and outside captures. Their tensors must stay where they are."""
        if self._layers is None:
            raise KernelError("decode kernels: this shape or batch size has no persistent kernel")
        return LayerPlan.create(calls, self._counters_per_layer, self.residual.device)

    def run_layers(self, state: DecodeState, plan: LayerPlan) -> None:
        """A to F of all layers of a plan, in one launch of a block for each multiprocessor.

        The blocks wait for each other, so nothing may hold a multiprocessor for ever meanwhile, and a plan runs on one
        stream at a time. Fills every buffer as its last layer leaves it.
        """
        assert self._layers is not None
        shape, first = self.shape, self._final_squares
        buffers = (
            plan.table,
            state.rotations,
            state.positions,
            state.seq_lens,
            self.residual,
            self._scaled,
            first,
            self._group_squares,
            self.query,
            self._range_parts,
            self._head_tickets,
            self.attended,
            self._expert_input,
            self._expert_squares,
            self._router_parts,
            self._inverse,
            self.expert_ids,
            self.expert_weights,
            self._act,
            plan.active_experts,
            plan.counters,
        )
        pointers = [buffer.data_ptr() for buffer in buffers]
        numbers = len(plan.calls), first.shape[1], shape.epsilon, shape.swiglu_limit, shape.head_dim**-0.5
        self._layers((self._multiprocessors, 1, 1), self._step_type(*pointers, *numbers, *self._exchange))
        self._final_squares = self._group_squares

    def norm_logits(self, lm_head: Tensor) -> None:
        """G: fill `logits` from lm_head bf16 [V, H]; the last layer's `next_norm` must have been the final norm."""
        grid = ((self.shape.vocab + self._logits_rows - 1) // self._logits_rows, 1, 1)
        squares = self._final_squares
        self._logits(grid, lm_head, self._scaled, squares, squares.shape[1], self.shape.epsilon, self.logits)

    def sample_advance(self, state: DecodeState) -> None:
        """H: sample `tokens` from `logits`; tokens become input_ids, positions and seq_lens grow by one."""
        self._sample(
            (SAMPLE_BLOCKS, self.rows, 1),
            self.logits,
            state.temperatures,
            state.seeds,
            self._best,
            self._row_tickets,
            self.tokens,
            state.input_ids,
            state.positions,
            state.seq_lens,
            *self._exchange,
            *self._first_token,
        )


MODULES = ("embed", "qkv", "attention", "out_proj", "router", "experts", "logits", "sample", "layers")


def prebuild(
    shape: DecodeShape,
    rows: Iterable[int],
    device: torch.device | str = "cuda",
    *,
    layer_rows: int = FASTEST_ROWS,
    ranks: int = 1,
) -> float:
    """Compile what `DecodeKernels` of these batch sizes will load, in parallel; returns the seconds it took.

    A compiled kernel stays on disk: the next call looks files up. Raises: KernelBuildError.
    """
    jobs = [job for size in rows for job in jobs_for(shape, size, device, layer_rows=layer_rows, ranks=ranks)]
    if ranks > 1:  # `TokenExchange`, whatever the batch sizes
        jobs += [job for job in jobs_for(shape, BATCH_SIZES[-1], device, ranks=ranks) if job[0] == "sample.cu"]
    return build.build_all(jobs, build.device_arch(device))


def jobs_for(
    shape: DecodeShape,
    rows: int,
    device: torch.device | str,
    tuning: Mapping[str, int] = TUNING,
    *,
    layer_rows: int = 0,
    ranks: int = 1,
) -> list[tuple[str, dict[str, int]]]:
    """Name the sources and macros that a batch size takes on a device."""
    properties = torch.cuda.get_device_properties(device)
    number = properties.multi_processor_count
    has_layers = properties.major >= 9 and rows <= layer_rows
    names = modules_for(shape, rows, number) if has_layers else MODULES[:-1]
    shared = properties.shared_memory_per_multiprocessor
    defines = defines_for(shape, rows, tuning, shared_bytes=shared, multiprocessors=number, ranks=ranks)
    return [(f"{name}.cu", defines) for name in names]
