"""What one rank owns, as a model of its own: so that every arithmetic of shapes serves ranks and whole models alike.

Knows: which counts a share changes. Refuses to know: bytes (`engine.memory` does them, on the shape given here).
"""

from __future__ import annotations

from dataclasses import replace

from engine.config import ModelConfig
from engine.placement.shares import MLP_UNIT
from engine.placement.values import RankSpec


def shard(model: ModelConfig, rank: RankSpec) -> ModelConfig:
    """Return the shape of a rank's share: its layers with their windows, heads, columns, experts.

    `vocab_size` counts the rank's rows of lm_head, 0 on all but the last stage. Two things have no place in a shape:
    `embedding_rows` tells the first, and routers score all experts everywhere, also where the shape has fewer.
    """
    begin, end = rank.layers
    columns = (rank.mlp_units[1] - rank.mlp_units[0]) * MLP_UNIT
    # The last unit of a width that 32 does not divide is a short one.
    is_last = rank.mlp_units[1] * MLP_UNIT >= model.intermediate_size
    short = rank.mlp_units[1] * MLP_UNIT - model.intermediate_size if is_last and columns else 0
    return replace(
        model,
        num_layers=end - begin,
        layer_windows=model.layer_windows[begin:end],
        num_attention_heads=rank.query_heads[1] - rank.query_heads[0],
        num_kv_heads=rank.kv_heads[1] - rank.kv_heads[0],
        intermediate_size=columns - short,
        num_experts=rank.experts[1] - rank.experts[0] + len(rank.copied_experts),
        vocab_size=rank.vocab[1] - rank.vocab[0],
    )


def embedding_rows(model: ModelConfig, rank: RankSpec) -> int:
    """Rows of the embedding that a rank holds: all of them on every rank of the first stage, else none.

    A tied embedding is held by the last stage too, as its lm_head; a rank that is both holds it once.
    """
    is_shared = model.tie_word_embeddings and rank.vocab == (0, model.vocab_size)
    return model.vocab_size if rank.has_embedding and not is_shared else 0
