"""gpt-oss: alternating sliding-window and full attention with sinks, YaRN, a mixture of experts.

Source: `openai/gpt-oss` (reference code) and its model card. Loading is in `gpt_oss_weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass

from torch import Tensor

from engine.comm.group import Group
from engine.models.layers import Attention, MixtureOfExperts
from kernels.ops import Ops, PagedBatch


@dataclass(slots=True)
class GptOss:
    """One rank's model.

    Shapes: embedding [V, H], lm_head [rows, H], norm [H], rope complex64 [P, 1, D/2]. `vocab_rows` are the rows of
    lm_head on each rank of the `group`. A stage that is not the first has no embedding, one that is not the last no
    lm_head: both have no rows then.
    """

    embedding: Tensor
    layers: list[tuple[Attention, MixtureOfExperts]]
    norm: Tensor
    lm_head: Tensor
    rope: Tensor
    eps: float
    group: Group | None = None
    vocab_rows: tuple[int, ...] = ()

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
        return self.run_layers(ops, ops.embedding(input_ids, self.embedding), positions, caches, batches)

    def run_layers(
        self, ops: Ops, x: Tensor, positions: Tensor, caches: Sequence[Tensor], batches: Sequence[PagedBatch]
    ) -> Tensor:
        """Take hidden states [T, H] through this rank's layers; may overwrite x."""
        rotation = self.rope.index_select(0, positions)
        for (attention, experts), cache, batch in zip(self.layers, caches, batches, strict=True):
            x = attention.forward(ops, x, rotation, cache, batch)
            x = experts.forward(ops, x)
        return x

    def logits(self, ops: Ops, hidden: Tensor) -> Tensor:
        """Project hidden states [B, H] on the whole vocabulary; float32 [B, V], on every rank of the stage."""
        if self.lm_head.shape[0]:
            local = ops.logits(ops.rms_norm(hidden, self.norm, self.eps), self.lm_head)
        else:
            local = hidden.new_empty(hidden.shape[0], 0)
        return local if self.group is None else self.group.all_gather(local, self.vocab_rows)
