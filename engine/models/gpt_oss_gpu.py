"""gpt-oss on one GPU: its weights there, and the two ways through its layers.

`decode_small` runs up to 16 rows, one token each, on the CUDA kernels: all layers in one launch for the smallest
batches, six launches a layer for the others. `forward` runs any number of tokens on the Triton kernels. Both can be
captured. Refuses to know: plans, rows, where weights come from.

Of several ranks each holds a share, and `group` sums what they add to the residual stream: inside the small kernels,
after attention and after the experts of the large ones. A stage begins and ends with the residual stream, in float32,
so that stages give the bits of one rank.

Layouts: residual stream float32, activations bfloat16, experts MXFP4 as in the checkpoint with a second copy of their
scales in the order the Triton kernels read (6 % of the experts' bytes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from engine.comm.custom_all_reduce import DeviceGroup
from engine.comm.link import Receiver, Sender
from engine.config import ModelConfig
from kernels import gpu

Attend = Callable[[int, Tensor], Tensor]


@dataclass(slots=True)
class GpuLayer:
    """One layer; `weights` as the CUDA kernels take them, scales once more as the Triton kernels do."""

    weights: gpu.LayerWeights
    gate_up_scales: Tensor
    down_scales: Tensor
    window: int | None

    @property
    def gate_up(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weights.gate_up_blocks, self.gate_up_scales, self.weights.gate_up_bias

    @property
    def down(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weights.down_blocks, self.down_scales, self.weights.down_bias


@dataclass(slots=True)
class ExpertBuffers:
    """Scratch of the experts for up to `rows` decoding rows: zeroed once, since padding is never written."""

    activations: Tensor
    deltas: Tensor

    @classmethod
    def allocate(cls, model: ModelConfig, rows: int, device: torch.device) -> ExpertBuffers:
        pairs = rows * model.num_experts_per_token
        width = gpu.expert_width(model.intermediate_size)
        return cls(
            torch.zeros((pairs, width), dtype=torch.bfloat16, device=device),
            torch.zeros((rows, model.num_experts_per_token, model.hidden_size), dtype=torch.bfloat16, device=device),
        )


@dataclass(slots=True)
class GptOssGpu:
    """One rank's model. Shapes: embedding and lm_head bf16 [V, H], norm float32 [H], rotations float32 [P, D/2, 2].

    `config` is the shape of what this rank holds; `vocab_rows` are the rows of lm_head on each rank of the `group`, all
    of them together `vocab_size`. A stage that is not the first has no rows of the embedding, one that is not the last
    none of lm_head. The router scores all experts; those from `first_expert` on are here.
    """

    config: ModelConfig
    embedding: Tensor
    layers: list[GpuLayer]
    norm: Tensor
    lm_head: Tensor
    rotations: Tensor
    vocab_rows: tuple[int, ...]
    first_expert: int = 0
    group: DeviceGroup | None = None
    receiver: Receiver | None = None
    sender: Sender | None = None

    @property
    def vocab_size(self) -> int:
        return sum(self.vocab_rows)

    @property
    def has_all_experts(self) -> bool:
        return self.layers[0].weights.router.shape[0] == self.config.num_experts

    @property
    def has_small_kernels(self) -> bool:
        """Whether `decode_small` serves this share: not a part of the experts, nor sums that go by NCCL alone."""
        return self.has_all_experts and (self.group is None or self.group.exchange is not None)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights as held, the second copy of the scales and the rotary table included."""
        tensors = {t.data_ptr(): t.nbytes for t in (self.embedding, self.norm, self.lm_head, self.rotations)}
        for layer in self.layers:
            held = [getattr(layer.weights, item.name) for item in fields(layer.weights)]
            tensors |= {t.data_ptr(): t.nbytes for t in (*held, layer.gate_up_scales, layer.down_scales)}
        return sum(tensors.values())

    def layer_calls(self, caches: Sequence[Tensor], tables: Sequence[Tensor]) -> list[gpu.LayerCall]:
        """Pair each layer with its cache bf16 [S, 2, K, D] and its block table int32 [>= rows, M]."""
        return [
            gpu.LayerCall(layer.weights, cache, table, layer.window, self._norm_after(i))
            for i, (layer, cache, table) in enumerate(zip(self.layers, caches, tables, strict=True))
        ]

    def decode_small(
        self,
        kernels: gpu.DecodeKernels,
        state: gpu.DecodeState,
        calls: Sequence[gpu.LayerCall] | gpu.LayerPlan,
        after_router: Callable[[], None] | None = None,
    ) -> None:
        """Compute the logits of one token for each row of `kernels`, into `kernels.logits`; this rank's, of a group.

        A stage before the last sends the residual stream on instead.
        `calls` are of `layer_calls`, or the plan that `kernels` made of them. `after_router` is called once a layer's
        experts are chosen; a plan calls nobody, it counts by itself.
        """
        first_norm = self.layers[0].weights.input_norm
        if self.receiver is None:
            kernels.embed(state, self.embedding, first_norm)
        else:
            stream = torch.empty_like(kernels.residual)
            self.receiver.receive(stream)
            kernels.take_over(stream, first_norm)
        if isinstance(calls, gpu.LayerPlan):
            kernels.run_layers(state, calls)
        else:
            for call in calls:
                kernels.norm_qkv_rope(state, call.weights, call.cache, call.table)
                kernels.paged_decode_attention(state, call.weights.sinks, call.cache, call.table, call.window)
                kernels.out_proj_add(call.weights)
                kernels.norm_router_topk(state, call.weights)
                if after_router is not None:
                    after_router()
                kernels.moe_gate_up(call.weights)
                kernels.moe_down_add(state, call.weights, call.next_norm)
        if self.sender is None:
            kernels.norm_logits(self.lm_head)
        else:
            self.sender.send(kernels.residual)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        slots: Sequence[Tensor],
        caches: Sequence[Tensor],
        attend: Attend,
        *,
        real: Tensor | None = None,
        buffers: ExpertBuffers | None = None,
        after_router: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Compute the normed hidden states of a step's tokens, bf16 [T, H]: what `logits` takes.

        A stage before the last sends the residual stream on, and what it returns is of no use.
        input_ids and positions integer [T]; slots[l] integer [T] and caches[l] are layer l's; `attend(l, query)` gives
        [T, Hq · D] from queries [T, Hq, D] once layer l's keys are written. Tokens where `real` is 0 are padding.
        `after_router` is handed each layer's expert ids int32 [T, k].
        """
        config, eps = self.config, self.config.rms_norm_eps
        tokens, k = input_ids.shape[0], config.num_experts_per_token
        if self.receiver is None:
            residual = self.embedding.index_select(0, input_ids).float()
        else:
            residual = torch.empty((tokens, config.hidden_size), dtype=torch.float32, device=self.norm.device)
            self.receiver.receive(residual)
        expert_x = residual.new_empty((tokens, gpu.expert_width(config.hidden_size)), dtype=torch.bfloat16)
        activations = deltas_out = None
        if buffers is not None:
            activations, deltas_out = buffers.activations[: tokens * k], buffers.deltas[:tokens]
        normed = gpu.rms_norm(residual, self.layers[0].weights.input_norm, eps)
        for i, layer in enumerate(self.layers):
            weights = layer.weights
            qkv = torch.nn.functional.linear(normed, weights.qkv)
            query = gpu.rope_kv_write(qkv, weights.qkv_bias, self.rotations, positions, slots[i], caches[i])
            projected = torch.nn.functional.linear(attend(i, query), weights.out)
            self._add(projected, weights.out_bias, residual, weights.post_norm, normed, expert_out=expert_x)
            ids, shares = gpu.router_topk(normed, weights.router, weights.router_bias, k, real=real)
            if after_router is not None:
                after_router(ids)
            if not self.has_all_experts:
                ids, shares = self._own_experts(ids, shares)
            index = gpu.expert_index(ids, config.num_experts)
            deltas, slot_weights = gpu.run_experts(
                expert_x, shares, index, layer.gate_up, layer.down, config.swiglu_limit, act=activations, out=deltas_out
            )
            if slot_weights is None and not self.has_all_experts:
                slot_weights = (ids >= 0).float()  # slots of other ranks' experts were not written
            self._add(deltas, None, residual, self._norm_after(i), normed, slot_weights=slot_weights)
        if self.sender is not None:
            self.sender.send(residual)
        return normed

    def logits(self, normed: Tensor, out: Tensor | None = None) -> Tensor:
        """Project normed states bf16 [B, H] on this rank's rows of the vocabulary: float32 [B, V of this rank]."""
        return gpu.widening_linear(normed, self.lm_head, out)

    def whole_logits(self, logits: Tensor) -> Tensor:
        """Join all ranks' logits to float32 [B, V]; what is whole comes back as it is."""
        if self.group is None or logits.shape[1] == self.vocab_size:
            return logits
        return self.group.all_gather(logits, self.vocab_rows)

    def _add(
        self,
        deltas: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        norm: Tensor,
        out: Tensor,
        *,
        slot_weights: Tensor | None = None,
        expert_out: Tensor | None = None,
    ) -> None:
        """Add what all ranks computed to the residual stream, and norm it to `out`; see `gpu.add_rms_norm`."""
        group, eps = self.group, self.config.rms_norm_eps
        add = gpu.add_rms_norm
        if group is not None:
            if group.takes_tokens(len(residual)):
                add = group.add_rms_norm
            else:
                if deltas.dim() == 3:
                    deltas, slot_weights = gpu.sum_slots(deltas, slot_weights), None
                deltas = group.all_reduce(deltas)
        add(deltas, bias, residual, norm, eps, slot_weights=slot_weights, out=out, expert_out=expert_out)

    def _own_experts(self, ids: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Number the experts as this rank holds them, -1 and a share of 0 for those of others."""
        own = ids - self.first_expert
        is_own = (own >= 0) & (own < self.config.num_experts)
        return torch.where(is_own, own, -1), torch.where(is_own, shares, 0.0)

    def _norm_after(self, layer: int) -> Tensor:
        """Give the norm that the stream meets after a layer; after a stage's last, any."""
        return self.layers[layer + 1].weights.input_norm if layer + 1 < len(self.layers) else self.norm


def decode_shape(config: ModelConfig, block_size: int) -> gpu.DecodeShape:
    """Describe a model and its cache blocks to the kernels."""
    return gpu.DecodeShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        experts=config.num_experts,
        top_k=config.num_experts_per_token,
        vocab=max(1, config.vocab_size),  # a stage before the last has none, and compiles nothing that reads it
        block_size=block_size,
        epsilon=config.rms_norm_eps,
        swiglu_limit=config.swiglu_limit,
    )
