"""Run one plan on a GPU without waiting for it: the host runs ahead, results are collected later.

A step in which every row computes one token and samples is a decode step, one graph launch (`gpu_decode`). Any other
step runs layer by layer on the Triton kernels, decoding rows first. Sampled tokens stay on the device, where the next
step finds them, and travel to the host by themselves. Rows with penalties, bias, banned stops or log-probabilities are
sampled once more beside the graph, from its logits, still without waiting.

Of several ranks all run the same plans in the same order; those of the last stage hold the same tokens, and stages
before it are told what was sampled by the host (`append_tokens`).

KV storage: tensor i, bf16 [num_blocks · block_size, 2, K, D], holds layer `groups[g].layers[i]` for a block of group g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.core.plan import FLAG_NAN, ExecutionPlan, StepResult
from engine.core.request import TokenLogprobs
from engine.device import Event, new_event, pinned_buffer
from engine.memory import KVCacheGroup
from engine.models.gpt_oss_gpu import GptOssGpu
from engine.sampling.sampler import LOGPROB_FLOOR
from engine.worker.gpu_decode import MAX_ROWS, DecodeGraphs
from engine.worker.gpu_rows import GpuRow, GpuRows
from engine.worker.input_batch import RowError
from kernels import gpu

NUM_RESULTS = 8  # pinned result buffers: more than steps in flight


@dataclass(slots=True)
class PendingLogprobs:
    """Log-probabilities on their way: `chosen` float32 [n], `values` float32 and `ids` int64 [n, k], pinned.

    Row i of them belongs to place `places[i]` of the result and wants `counts[i]` of the k.
    """

    places: list[int]
    counts: list[int]
    chosen: Tensor
    values: Tensor
    ids: Tensor

    def read(self, num_rows: int) -> list[TokenLogprobs | None]:
        """Give them in the order of the result; the copies must have arrived."""
        result: list[TokenLogprobs | None] = [None] * num_rows
        for i, (place, count) in enumerate(zip(self.places, self.counts, strict=True)):
            result[place] = TokenLogprobs(
                float(self.chosen[i]), self.ids[i, :count].tolist(), self.values[i, :count].tolist()
            )
        return result


@dataclass(slots=True)
class PendingStep:
    """A step on its way; `wait` blocks for its tokens."""

    step_id: int
    rows: list[int]
    started: Event | None = None
    ended: Event | None = None
    tokens: Tensor | None = None
    logprobs: PendingLogprobs | None = None

    def wait(self) -> StepResult:
        """Wait for the device, and give the result."""
        if self.started is None or self.ended is None:
            return StepResult(self.step_id, [], [], [])
        self.ended.synchronize()
        seconds = self.started.elapsed_time(self.ended) / 1e3
        if self.tokens is None:
            return StepResult(self.step_id, [], [], [], device_seconds=seconds)
        ids: list[int] = self.tokens.tolist()
        flags = [FLAG_NAN if token < 0 else 0 for token in ids]
        ids = [max(0, token) for token in ids]
        logprobs = self.logprobs.read(len(ids)) if self.logprobs else None
        return StepResult(self.step_id, self.rows, ids, flags, logprobs, seconds)


class GpuModelRunner:
    """Everything on the device happens here, on one stream, in the order of the plans."""

    def __init__(
        self,
        model: GptOssGpu,
        groups: Sequence[KVCacheGroup],
        storage: Sequence[Tensor],
        *,
        num_rows: int,
        block_size: int,
        max_model_len: int,
        is_eager: bool = False,
    ) -> None:
        config, device = model.config, model.norm.device
        self._model, self._device = model, device
        by_layer = {layer: (g, i) for g, group in enumerate(groups) for i, layer in enumerate(group.layers)}
        order = [by_layer[layer] for layer in sorted(by_layer)]
        self._group_of_layer = [group for group, _ in order]
        self._caches = [storage[i] for _, i in order]
        self._rows = GpuRows(
            num_rows=num_rows,
            num_groups=len(groups),
            max_blocks=-(-max_model_len // block_size),
            block_size=block_size,
            vocab_size=model.vocab_size,
            device=device,
        )
        self._is_last = model.sender is None
        self.decode = DecodeGraphs(
            model, self._rows, self._caches, self._group_of_layer, min(num_rows, MAX_ROWS), is_eager=is_eager
        )
        self._sampling = gpu.SampleWorkspace.allocate(num_rows, model.vocab_size, device)
        self._attention = gpu.DecodeWorkspace.allocate(
            min(num_rows, MAX_ROWS),
            config.num_kv_heads,
            config.head_dim,
            device,
            config.num_attention_heads // config.num_kv_heads,
        )
        self._results = [pinned_buffer(num_rows, torch.int32, device) for _ in range(NUM_RESULTS)]
        self._turn = 0

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @torch.inference_mode()
    def append_tokens(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Take (row, token) pairs that the last stage sampled, which has them already."""
        if pairs and not self._is_last:
            at, tokens = self._rows.send([[row for row, _ in pairs], [token for _, token in pairs]])
            self._rows.last_tokens.index_copy_(0, at, tokens.int())

    @torch.inference_mode()
    def launch(self, plan: ExecutionPlan) -> PendingStep:
        """Apply the plan's deltas and start its step. Raises: RowError when the plan does not fit the rows."""
        tables_changed = self._rows.apply(plan)
        if not plan.rows:
            if plan.released or plan.admits:
                self.decode.forget()
            return PendingStep(plan.step_id, [])
        started, ended = (new_event(self._device, is_timed=True) for _ in range(2))
        started.record()
        rows = [self._rows[index] for index in plan.rows]
        if self._is_decode(plan):
            pending = self._launch_decode(plan, rows, tables_changed)
        else:
            pending = self._launch_mixed(plan, rows)
        ended.record()
        pending.started, pending.ended = started, ended
        return pending

    def _is_decode(self, plan: ExecutionPlan) -> bool:
        return len(plan.rows) <= MAX_ROWS and all(plan.samples) and max(plan.num_scheduled) == 1

    def _launch_decode(self, plan: ExecutionPlan, rows: list[GpuRow], tables_changed: bool) -> PendingStep:
        decode, count = self.decode, len(rows)
        has_filters = any(row.has_filters for row in rows)
        decode.prepare(count, has_filters)
        if plan.admits or plan.released or not decode.is_current(plan.rows):
            self._send_known_tokens(plan.rows, rows)
            decode.fill(plan.rows, [self._rows.advance(index, 1) for index in plan.rows])
        else:
            if tables_changed:
                decode.refresh_tables(decode.size_for(count))
            for index in plan.rows:
                self._rows.advance(index, 1)
        step = decode.run(count, has_filters)
        if not self._is_last:
            decode.forget()  # the next tokens come from the host
            return PendingStep(plan.step_id, [])
        return self._finish(plan, rows, step.tokens[:count], step.logits, list(range(count)))

    def _send_known_tokens(self, indices: Sequence[int], rows: Sequence[GpuRow]) -> None:
        """Put the next token of rows whose next token the host knows (the last of a prompt) where steps look for it."""
        known = [
            (index, row.tokens[row.num_computed])
            for index, row in zip(indices, rows, strict=True)
            if row.num_computed < len(row.tokens)
        ]
        if known:
            at, tokens = self._rows.send([[index for index, _ in known], [token for _, token in known]])
            self._rows.last_tokens.index_copy_(0, at, tokens.int())

    def _launch_mixed(self, plan: ExecutionPlan, rows: list[GpuRow]) -> PendingStep:
        self.decode.forget()
        order = sorted(range(len(rows)), key=lambda i: plan.num_scheduled[i] > 1)
        counts = [plan.num_scheduled[i] for i in order]
        num_decode = sum(count == 1 for count in counts)
        self._send_known_tokens([plan.rows[i] for i in order[:num_decode]], [rows[i] for i in order[:num_decode]])
        begins = [self._rows.advance(plan.rows[i], plan.num_scheduled[i]) for i in order]
        prompt: list[int] = []
        for i, begin, count in zip(order[num_decode:], begins[num_decode:], counts[num_decode:], strict=True):
            known = rows[i].tokens
            if begin + count > len(known):
                raise RowError(f"row {plan.rows[i]} has {len(known)} tokens, the plan computes up to {begin + count}")
            prompt += known[begin : begin + count]
        ends = np.cumsum(counts)
        sampling = [j for j, i in enumerate(order) if plan.samples[i]]
        # Results go back in the order of the plan.
        sampling.sort(key=lambda j: order[j])
        places = np.arange(len(counts)).repeat(counts)
        positions = np.arange(int(ends[-1])) - (ends - counts)[places] + np.array(begins)[places]
        lengths = [begin + count for begin, count in zip(begins, counts, strict=True)]
        starts = [0, *(ends[num_decode:] - num_decode).tolist()]
        sent = self._rows.send(
            [
                [plan.rows[i] for i in order],
                [plan.rows[i] for i in order[num_decode:]],
                prompt,
                positions,
                places,
                lengths[:num_decode],
                lengths[num_decode:],
                starts,
                [int(ends[j]) - 1 for j in sampling],
                [plan.rows[order[j]] for j in sampling],
                [lengths[j] - 1 for j in sampling],
            ]
        )
        row_index, prefill_index, prompt_ids, at, place = sent[:5]
        decode_lens, prefill_lens, query_starts = (tensor.int() for tensor in sent[5:8])
        sample_index, sample_rows, sample_positions = sent[8:]
        ids = torch.cat((self._rows.last_tokens.index_select(0, row_index[:num_decode]).long(), prompt_ids))
        hidden = self._forward(
            ids, at, row_index[place], row_index[:num_decode], decode_lens, prefill_index, prefill_lens, query_starts
        )
        if not sampling or not self._is_last:
            return PendingStep(plan.step_id, [])
        logits = self._model.whole_logits(self._model.logits(hidden.index_select(0, sample_index)))
        chosen_rows = [rows[order[j]] for j in sampling]
        tokens = self._sample(logits, sample_rows, sample_positions, chosen_rows)
        self._rows.last_tokens.index_copy_(0, sample_rows, tokens.clamp(min=0))
        return self._finish(plan, chosen_rows, tokens, logits, [order[j] for j in sampling])

    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        row_of_token: Tensor,
        decode_rows: Tensor,
        decode_lens: Tensor,
        prefill_rows: Tensor,
        prefill_lens: Tensor,
        query_starts: Tensor,
    ) -> Tensor:
        """Run the layers over a mixed step's tokens: `decode_rows` with one each, then those of `prefill_rows`."""
        model, config, size = self._model, self._model.config, self._rows.block_size
        num_decode = len(decode_rows)
        block, offset = positions // size, positions % size
        slots, decode_tables, prefill_tables = [], [], []
        for table in self._rows.tables:
            slots.append((table[row_of_token, block] * size + offset).int())
            decode_tables.append(table.index_select(0, decode_rows))
            prefill_tables.append(table.index_select(0, prefill_rows))
        positions = positions.int()

        def attend(layer: int, query: Tensor) -> Tensor:
            group, cache = self._group_of_layer[layer], self._caches[layer]
            sinks, window = model.layers[layer].weights.sinks, model.layers[layer].window
            out = torch.empty((len(query), query.shape[1] * query.shape[2]), dtype=query.dtype, device=query.device)
            for first in range(0, num_decode, MAX_ROWS):
                part = slice(first, min(first + MAX_ROWS, num_decode))
                gpu.paged_decode_attention(
                    query[part],
                    cache,
                    decode_tables[group][part],
                    decode_lens[part],
                    sinks,
                    config.head_dim**-0.5,
                    block_size=size,
                    window=window,
                    workspace=self._attention,
                    out=out[part],
                )
            if len(prefill_rows):
                gpu.paged_prefill_attention(
                    query[num_decode:],
                    cache,
                    prefill_tables[group],
                    query_starts,
                    prefill_lens,
                    sinks,
                    config.head_dim**-0.5,
                    block_size=size,
                    window=window,
                    out=out[num_decode:],
                )
            return out

        layer_slots = [slots[group] for group in self._group_of_layer]
        return model.forward(ids, positions, layer_slots, self._caches, attend)

    def _sample(self, logits: Tensor, at: Tensor, positions: Tensor, rows: Sequence[GpuRow]) -> Tensor:
        """Sample one token per row of logits; below 0 where they are not finite. Shapes: int32 [B]."""
        state = self._rows
        temperatures = state.temperatures.index_select(0, at)
        thresholds = None
        if any(row.has_filters for row in rows):
            thresholds = gpu.sampling_thresholds(
                logits,
                temperatures,
                state.top_ks.index_select(0, at),
                state.top_ps.index_select(0, at),
                state.min_ps.index_select(0, at),
            )
        seeds = state.seeds.index_select(0, at)
        ids, is_bad = gpu.sample(
            logits, temperatures, seeds, positions.int(), thresholds=thresholds, workspace=self._sampling
        )
        return torch.where(is_bad > 0, -1, ids)

    def _finish(
        self, plan: ExecutionPlan, rows: Sequence[GpuRow], tokens: Tensor, logits: Tensor, places: list[int]
    ) -> PendingStep:
        """Send the tokens to the host, after sampling some rows anew. `places`: where the rows stand in the plan."""
        pending = PendingStep(plan.step_id, [plan.rows[i] for i in places])
        asked = [j for j, row in enumerate(rows) if row.sampling is not None]
        if asked:
            tokens = self._sample_adjusted(pending, asked, rows, tokens, logits)
        turn = self._turn = (self._turn + 1) % NUM_RESULTS
        pending.tokens = self._results[turn][: len(rows)]
        pending.tokens.copy_(tokens, non_blocking=True)
        return pending

    def _sample_adjusted(
        self, pending: PendingStep, asked: list[int], rows: Sequence[GpuRow], tokens: Tensor, logits: Tensor
    ) -> Tensor:
        """Change the logits of the rows at `asked` as they want, choose their tokens, put these in their places."""
        chosen_rows = [rows[j] for j in asked]
        samplings = [row.sampling for row in chosen_rows if row.sampling is not None]
        wanting = [i for i, sampling in enumerate(samplings) if sampling.params.logprobs is not None]
        at, row_index, positions, wanting_at = self._rows.send(
            [asked, [pending.rows[j] for j in asked], [row.num_computed - 1 for row in chosen_rows], wanting]
        )
        own = self._model.whole_logits(logits.index_select(0, at))
        # Before the logits change.
        raw = (
            own.index_select(0, wanting_at).log_softmax(-1).nan_to_num_(nan=LOGPROB_FLOOR).clamp_(min=LOGPROB_FLOOR)
            if wanting
            else None
        )
        for i, sampling in enumerate(samplings):
            if sampling.adjusts:
                sampling.adjust_(own[i])
        chosen = self._sample(own, row_index, positions, chosen_rows)
        ids = chosen.clamp(min=0).long()
        for i, sampling in enumerate(samplings):
            sampling.append_on_device(ids[i : i + 1])
        if raw is not None:
            counts = [samplings[i].params.logprobs or 0 for i in wanting]
            best = raw.topk(max(counts), dim=-1)
            picked = raw.gather(1, ids.index_select(0, wanting_at)[:, None])[:, 0]
            pending.logprobs = PendingLogprobs(
                [asked[i] for i in wanting], counts, *(self._to_host(part) for part in (picked, *best))
            )
        self._rows.last_tokens.index_copy_(0, row_index, ids.int())
        self.decode.correct(at, ids)
        return tokens.index_copy(0, at, chosen)

    def _to_host(self, tensor: Tensor) -> Tensor:
        """Start copying a tensor into pinned memory."""
        host = pinned_buffer(tensor.numel(), tensor.dtype, self._device).view(tensor.shape)
        return host.copy_(tensor, non_blocking=True)
