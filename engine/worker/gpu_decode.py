"""The decode step of a GPU rank: one token for each of up to 256 rows, as one CUDA graph per batch size.

A graph holds the whole step: embedding, layers, logits, sampling, and moving the inputs on by one, so that the next
step of the same rows needs nothing from the host. Batch sizes are padded to the next captured one; padding rows have
length 0, reach no expert, write no cache. Graphs are captured by `prepare`, ahead or on first use. Of several ranks
each runs its own graph, with the sums over ranks and the way from stage to stage inside; all of the last stage sample
the same tokens.

Knows: the static inputs and the graphs over them. Refuses to know: plans, requests, what a row means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.gpt_oss_gpu import ExpertBuffers, GptOssGpu, decode_shape
from engine.worker.gpu_rows import GpuRows
from kernels import gpu

SMALL = gpu.BATCH_SIZES  # batch sizes of the CUDA kernels
LARGE = (24, 32, 48, 64, 96, 128, 192, 256)
MAX_ROWS = LARGE[-1]


def batch_sizes(max_rows: int, *, has_small: bool = True) -> tuple[int, ...]:
    """List the batch sizes of a rank that decodes up to `max_rows` rows; more than the largest take other steps.

    `has_small`: the CUDA kernels serve this rank's share of the model.
    """
    every = (*SMALL, *LARGE) if has_small else LARGE
    largest = next(size for size in every if size >= min(max_rows, MAX_ROWS))
    return tuple(size for size in every if size <= largest)


@dataclass(slots=True)
class DecodeInputs:
    """What a decode step reads, at fixed addresses; the first B entries count for a graph of size B.

    rows int64; input_ids, positions, seq_lens, top_ks int32; temperatures, top_ps, min_ps float32; seeds int64, all
    [N]; tables[g] int32 [N, M].
    """

    rows: Tensor
    input_ids: Tensor
    positions: Tensor
    seq_lens: Tensor
    temperatures: Tensor
    top_ps: Tensor
    min_ps: Tensor
    top_ks: Tensor
    seeds: Tensor
    tables: list[Tensor]

    @classmethod
    def allocate(cls, size: int, num_groups: int, max_blocks: int, device: torch.device) -> DecodeInputs:
        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        ints, floats = torch.int32, torch.float32
        return cls(
            rows=zeros(torch.int64),
            input_ids=zeros(ints),
            positions=zeros(ints),
            seq_lens=zeros(ints),
            temperatures=zeros(floats),
            top_ps=torch.ones(size, device=device),
            min_ps=zeros(floats),
            top_ks=zeros(ints),
            seeds=zeros(torch.int64),
            tables=[torch.zeros((size, max_blocks), dtype=ints, device=device) for _ in range(num_groups)],
        )


@dataclass(slots=True)
class DecodeGraph:
    """One captured step, or the function that does it where graphs are off.

    tokens int32 [B], below 0 where a row's logits are not finite; logits float32 [B, V], of a group each rank's own.
    Before the last stage neither means anything.
    """

    graph: torch.cuda.CUDAGraph | Callable[[], None]
    tokens: Tensor
    logits: Tensor


class DecodeGraphs:
    """The decode steps of one rank. `max_rows` bounds the batch; memory is shared by all sizes."""

    def __init__(
        self,
        model: GptOssGpu,
        rows: GpuRows,
        caches: Sequence[Tensor],
        group_of_layer: Sequence[int],
        max_rows: int,
        *,
        is_eager: bool = False,
    ) -> None:
        config, device = model.config, model.norm.device
        self.sizes = batch_sizes(max_rows, has_small=model.has_small_kernels)
        largest = self.sizes[-1]
        self._model, self._rows, self._caches, self._groups = model, rows, list(caches), list(group_of_layer)
        self._is_eager = is_eager
        self.inputs = DecodeInputs.allocate(largest, len(rows.tables), rows.max_blocks, device)
        self._state = gpu.DecodeState(
            input_ids=self.inputs.input_ids,
            positions=self.inputs.positions,
            seq_lens=self.inputs.seq_lens,
            rotations=model.rotations,
            temperatures=self.inputs.temperatures,
            seeds=self.inputs.seeds,
        )
        self._shape = decode_shape(config, rows.block_size)
        self._calls = model.layer_calls(self._caches, [self.inputs.tables[group] for group in self._groups])
        self._kernels: dict[int, gpu.DecodeKernels] = {}
        self._plans: dict[int, gpu.LayerPlan] = {}
        self._graphs: dict[tuple[int, bool], DecodeGraph] = {}
        self._pool = None if is_eager else torch.cuda.graph_pool_handle()
        self._buffers = ExpertBuffers.allocate(config, largest, device) if largest > SMALL[-1] else None
        group = config.num_attention_heads // config.num_kv_heads
        self._attention = gpu.DecodeWorkspace.allocate(largest, config.num_kv_heads, config.head_dim, device, group)
        self._sampling = gpu.SampleWorkspace.allocate(largest, model.vocab_size, device)
        self._samples = model.sender is None
        exchange = self._exchange = None if model.group is None else model.group.exchange
        self._tokens_of_ranks = None
        if exchange is not None and self._samples and largest > SMALL[-1]:
            self._tokens_of_ranks = gpu.TokenExchange(self._shape, largest, exchange, device)
        self._slots = [torch.zeros(largest, dtype=torch.int32, device=device) for _ in rows.tables]
        # The CUDA kernels have their own.
        large = largest if largest > SMALL[-1] and self._samples else 0
        self._logits = torch.empty((large, config.vocab_size), dtype=torch.float32, device=device)
        self._tokens = torch.zeros(large, dtype=torch.int32, device=device)
        # The rows that the inputs describe, once a step has moved them on; None when they must be filled again.
        self._current: tuple[int, ...] | None = None

    def size_for(self, num_rows: int) -> int:
        """Give the smallest batch size that holds `num_rows`."""
        return next(size for size in self.sizes if size >= num_rows)

    def is_current(self, rows: Sequence[int]) -> bool:
        """Whether the inputs stand right for the next token of these rows."""
        return self._current == tuple(rows)

    def forget(self) -> None:
        """Have the inputs filled before the next step."""
        self._current = None

    def fill(self, rows: Sequence[int], positions: Sequence[int]) -> None:
        """Set the inputs: the last token of each row, at these positions; padding up to the batch size."""
        count, size = len(rows), self.size_for(len(rows))
        padding = size - count
        row_index, places = self._rows.send(
            [[*rows, *[self._rows.dummy] * padding], [*[p + 1 for p in positions], *[0] * padding]]
        )
        inputs, state = self.inputs, self._rows
        inputs.rows[:size].copy_(row_index)
        inputs.seq_lens[:size].copy_(places)
        torch.clamp(inputs.seq_lens[:size] - 1, min=0, out=inputs.positions[:size])
        for target, source in (
            (inputs.input_ids, state.last_tokens),
            (inputs.temperatures, state.temperatures),
            (inputs.top_ps, state.top_ps),
            (inputs.min_ps, state.min_ps),
            (inputs.top_ks, state.top_ks),
            (inputs.seeds, state.seeds),
        ):
            torch.index_select(source, 0, row_index, out=target[:size])
        self.refresh_tables(size)
        self._current = tuple(rows)

    def correct(self, places: Tensor, tokens: Tensor) -> None:
        """Replace the tokens that the last step chose for some of its rows: both int64 [n], places in the batch."""
        if self._current is not None:
            self.inputs.input_ids.index_copy_(0, places, tokens.int())

    def refresh_tables(self, size: int) -> None:
        """Take the rows' block tables over into the inputs."""
        for target, source in zip(self.inputs.tables, self._rows.tables, strict=True):
            torch.index_select(source, 0, self.inputs.rows[:size], out=target[:size])

    def run(self, num_rows: int, has_filters: bool) -> DecodeGraph:
        """Run the step on the inputs as they stand. `has_filters`: some row cuts by top-k, top-p or min-p."""
        size = self.size_for(num_rows)
        step = self._graphs[size, self._has_two(size) and has_filters]
        if isinstance(step.graph, torch.cuda.CUDAGraph):
            step.graph.replay()
        else:
            step.graph()
        return step

    def prepare(self, num_rows: int, has_filters: bool) -> None:
        """Capture the graph that `run` will need, unless it is there; the inputs are lost then."""
        size = self.size_for(num_rows)
        has_filters = self._has_two(size) and has_filters
        if (size, has_filters) in self._graphs:
            return
        body = self._body(size, has_filters)
        self.forget()
        self.inputs.rows[:size].fill_(self._rows.dummy)
        self.inputs.seq_lens[:size].zero_()
        self.inputs.positions[:size].zero_()
        self.inputs.input_ids[:size].zero_()
        graph = None
        body()  # compiles what is not compiled yet, and lets libraries take their buffers
        if not self._is_eager:
            torch.cuda.current_stream().synchronize()
            graph = torch.cuda.CUDAGraph()
            # Another thread may be waiting for a step meanwhile: what it asks of CUDA is not the capture's business.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                body()
        tokens, logits = self._outputs(size, has_filters)
        self._graphs[size, has_filters] = DecodeGraph(graph or body, tokens, logits)

    def _has_two(self, size: int) -> bool:
        """Whether rows that cut by top-k, top-p or min-p take another graph than rows that do not.

        Above the CUDA kernels' sizes one serves both, since rows that cut nothing cost nothing there; but of several
        ranks each looks at its own tokens only while nothing is cut. Stages before the last, for which it makes no
        difference, answer alike: all ranks run the same steps, those before a capture too.
        """
        return size <= SMALL[-1] or self._exchange is not None

    @torch.inference_mode()
    def count_experts(self, num_rows: int) -> list[int]:
        """Count the experts that each layer touches for the inputs as they stand, by a step outside the graphs."""
        size = self.size_for(num_rows)
        counts: list[Tensor] = []
        if size <= SMALL[-1]:
            kernels = self._kernels[size]
            self._decode_small(size, lambda: counts.append(kernels.active_experts().clone()))
            if size in self._plans:
                return self._plans[size].active_experts.tolist()
            return [int(count) for count in counts]
        self._decode_large(size, lambda ids: counts.append(ids.clone()))
        return [int(torch.unique(ids[ids >= 0]).numel()) for ids in counts]

    def _outputs(self, size: int, has_filters: bool) -> tuple[Tensor, Tensor]:
        if size <= SMALL[-1]:
            return self._kernels[size].tokens, self._kernels[size].logits
        if self._tokens_of_ranks is not None and not has_filters:
            return self._tokens_of_ranks.tokens[:size], self._logits[:size]
        return self._tokens[:size], self._logits[:size]

    def _body(self, size: int, has_filters: bool) -> Callable[[], None]:
        """Give the whole step of one batch size as a function without arguments."""
        last_tokens, inputs = self._rows.last_tokens, self.inputs
        if size > SMALL[-1]:
            of_ranks = None if has_filters else self._tokens_of_ranks

            def large() -> None:
                self._decode_large(size)
                if not self._samples:
                    return
                if of_ranks is not None:
                    of_ranks.sample_advance(self._state, self._logits[:size])
                else:
                    self._sample(self._logits[:size], self._tokens[:size])
                last_tokens.index_copy_(0, inputs.rows[:size], inputs.input_ids[:size])

            return large
        kernels = self._kernels.get(size)
        if kernels is None:
            kernels = self._kernels[size] = gpu.DecodeKernels(
                self._shape, size, self._logits.device, exchange=self._exchange
            )
            if kernels.has_layers:
                self._plans[size] = kernels.plan_layers(self._calls)

        def small() -> None:
            self._decode_small(size)
            if not self._samples:
                return
            if has_filters:
                self._sample(kernels.logits, kernels.tokens)
            else:
                kernels.sample_advance(self._state)
            last_tokens.index_copy_(0, inputs.rows[:size], inputs.input_ids[:size])

        return small

    def _decode_small(self, size: int, after_router: Callable[[], None] | None = None) -> None:
        calls = self._plans.get(size, self._calls)
        self._model.decode_small(self._kernels[size], self._state, calls, after_router)

    def _decode_large(self, size: int, after_router: Callable[[Tensor], None] | None = None) -> None:
        inputs, config = self.inputs, self._model.config
        positions, seq_lens = inputs.positions[:size], inputs.seq_lens[:size]
        tables = [table[:size] for table in inputs.tables]
        slots = [slot[:size] for slot in self._slots]
        for table, slot in zip(tables, slots, strict=True):
            gpu.decode_slots(table, positions, seq_lens, self._rows.block_size, slot)

        def attend(layer: int, query: Tensor) -> Tensor:
            return gpu.paged_decode_attention(
                query,
                self._caches[layer],
                tables[self._groups[layer]],
                seq_lens,
                self._model.layers[layer].weights.sinks,
                config.head_dim**-0.5,
                block_size=self._rows.block_size,
                window=self._model.layers[layer].window,
                workspace=self._attention,
            )

        normed = self._model.forward(
            inputs.input_ids[:size],
            positions,
            [slots[group] for group in self._groups],
            self._caches,
            attend,
            real=seq_lens,
            buffers=self._buffers,
            after_router=after_router,
        )
        if self._samples:
            self._model.logits(normed, out=self._logits[:size])

    def _sample(self, logits: Tensor, tokens: Tensor) -> None:
        """Sample with filters, and move the inputs on by one."""
        size = len(tokens)
        logits = self._model.whole_logits(logits)
        inputs = self.inputs
        temperatures, positions, seq_lens = inputs.temperatures[:size], inputs.positions[:size], inputs.seq_lens[:size]
        thresholds = gpu.sampling_thresholds(
            logits, temperatures, inputs.top_ks[:size], inputs.top_ps[:size], inputs.min_ps[:size]
        )
        ids, is_bad = gpu.sample(
            logits, temperatures, inputs.seeds[:size], positions, thresholds=thresholds, workspace=self._sampling
        )
        inputs.input_ids[:size].copy_(ids)
        tokens.copy_(torch.where(is_bad > 0, -1, ids))
        is_real = (seq_lens > 0).int()
        positions.add_(is_real)
        seq_lens.add_(is_real)
