"""Run one plan on this rank's device: rows to tensors, tensors through the model, logits to tokens.

Knows: the KV storage and which layer reads which part of it. Refuses to know: scheduling, files, processes.

KV storage: all groups have equally many layers, so one pool of blocks serves them all. Tensor i holds, for a block of
group g, layer `groups[g].layers[i]`:

    storage[i]  [num_blocks · block_size, 2, K, D]      slot = block · block_size + offset; block 0 stays zero
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from engine.comm.ranks import RankLinks
from engine.core.plan import ExecutionPlan, StepResult
from engine.memory import KVCacheGroup
from engine.models.gpt_oss import GptOss
from engine.sampling.sampler import sample
from engine.worker.input_batch import InputBatch
from kernels.ops import Ops, Platform


class ModelRunner:
    """Everything on the device happens here. One plan at a time, in order."""

    def __init__(
        self,
        model: GptOss,
        platform: Platform,
        groups: Sequence[KVCacheGroup],
        storage: list[torch.Tensor],
        block_size: int,
        vocab_size: int,
        links: RankLinks | None = None,
    ) -> None:
        self._model = model
        links = links or RankLinks()
        self._receiver, self._sender = links.receiver, links.sender
        self._bare = Ops(platform)
        self._checked = self._bare.checked()
        # Shapes that have passed the contracts: (tokens, single-token rows, sampling rows).
        self._passed: set[tuple[int, int, int]] = set()
        by_layer = {layer: (g, i) for g, group in enumerate(groups) for i, layer in enumerate(group.layers)}
        order = [by_layer[layer] for layer in sorted(by_layer)]
        self._group_of_layer = [g for g, _ in order]
        self._caches = [storage[i] for _, i in order]
        self._batch = InputBatch(block_size, [group.window for group in groups], vocab_size)

    @property
    def num_rows(self) -> int:
        return len(self._batch)

    @torch.inference_mode()
    def append_tokens(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Append what a later stage sampled, (row, token) pairs; the last stage has done so itself."""
        if self._sender is not None:
            self._batch.append_tokens(pairs)

    @torch.inference_mode()
    def execute(self, plan: ExecutionPlan) -> StepResult:
        """Apply the plan's deltas, compute its tokens, sample where it says so, append what was sampled."""
        started = time.perf_counter()
        self._batch.apply(plan)
        if not plan.rows:
            return StepResult(plan.step_id, [], [], [])
        inputs = self._batch.prepare(plan)
        shape = (len(inputs.input_ids), len(inputs.group_batches[0].decode_rows), len(inputs.sampling_rows))
        ops = self._bare if shape in self._passed else self._checked
        batches = [inputs.group_batches[group] for group in self._group_of_layer]
        if self._receiver is None:
            hidden = self._model.forward(ops, inputs.input_ids, inputs.positions, self._caches, batches)
        else:
            hidden = torch.empty(len(inputs.input_ids), self._model.norm.shape[0], dtype=self._model.norm.dtype)
            self._receiver.receive(hidden)
            hidden = self._model.run_layers(ops, hidden, inputs.positions, self._caches, batches)
        if self._sender is not None:
            self._sender.send(hidden)
            self._passed.add(shape)
            return StepResult(plan.step_id, [], [], [], device_seconds=time.perf_counter() - started)
        result = StepResult(plan.step_id, inputs.result_rows, [], [])
        if inputs.sampling_rows:
            if inputs.sample_index is not None:
                hidden = hidden.index_select(0, inputs.sample_index)
            rows = inputs.sampling_rows
            sampled = sample(self._model.logits(ops, hidden), [row.sampling for row in rows])
            for row, token in zip(rows, sampled.token_ids, strict=True):
                row.append(token)
            result.token_ids, result.flags, result.logprobs = sampled.token_ids, sampled.flags, sampled.logprobs
            if inputs.order is not None:
                result.token_ids = [sampled.token_ids[j] for j in inputs.order]
                result.flags = [sampled.flags[j] for j in inputs.order]
                if sampled.logprobs is not None:
                    result.logprobs = [sampled.logprobs[j] for j in inputs.order]
        self._passed.add(shape)
        result.device_seconds = time.perf_counter() - started
        return result
