"""gpt-oss: alternating sliding-window and full attention with sinks, YaRN, a mixture of experts.

Source: `openai/gpt-oss` (reference code) and its model card. Loading is in `gpt_oss_weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass

from torch import Tensor

from engine.models.layers import Attention, MixtureOfExperts
from kernels.ops import Ops, PagedBatch


@dataclass(slots=True)
class GptOss:
    """One rank's model.

    Shapes: embedding and lm_head [V, H], norm [H], rope complex64 [P, 1, D/2].
    """

    embedding: Tensor
    layers: list[tuple[Attention, MixtureOfExperts]]
    norm: Tensor
    lm_head: Tensor
    rope: Tensor
    eps: float

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights as held, whatever was folded, expanded or laid out anew."""
        tensors: dict[int, int] = {}

        def visit(value: object) -> None:
            if isinstance(value, Tensor):
                tensors[value.data_ptr()] = value.nbytes
            elif isinstance(value, (list, tuple)):
                for item in value:
                    visit(item)
            elif isinstance(value, dict):
                for item in value.values():
                    visit(item)
            elif is_dataclass(value):
                for item in fields(value):
                    visit(getattr(value, item.name))

        visit(self)
        return sum(tensors.values())

    def forward(
        self,
        ops: Ops,
        input_ids: Tensor,
        positions: Tensor,
        caches: Sequence[Tensor],
        batches: Sequence[PagedBatch],
    ) -> Tensor:
        """Compute hidden states of a step's tokens before the final norm.

        Shapes: input_ids and positions int64 [T]; caches[l] [S, 2, K, D] and batches[l] are layer l's; returns [T, H].
        """
        x = ops.embedding(input_ids, self.embedding)
        rotation = self.rope.index_select(0, positions)
        for (attention, experts), cache, batch in zip(self.layers, caches, batches, strict=True):
            x = attention.forward(ops, x, rotation, cache, batch)
            x = experts.forward(ops, x)
        return x

    def logits(self, ops: Ops, hidden: Tensor) -> Tensor:
        """Project hidden states [B, H] on the vocabulary; float32 [B, V]."""
        return ops.logits(ops.rms_norm(hidden, self.norm, self.eps), self.lm_head)
