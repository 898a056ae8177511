"""From a checkpoint's tensors to a gpt-oss model in memory: names, checks, and the layout that the kernels want.

Three layouts are read: Hugging Face with MXFP4 experts (as gpt-oss ships), Hugging Face with expanded experts (as
transformers saves), and the authors' original names.

What changes on the way, all of it exact:
- q and k rows are permuted so that rotation pairs lie side by side (`kernels.reference.rope.pair_order`);
- gates and ups are taken apart, except in packed experts, which stay as they are.

Norm weights are not multiplied into the layers that follow: one call less, but the checkpoint's values would be lost,
and with them the float16 copies that CPU kernels make (`kernels.cpu.packing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.comm.ranks import RankLinks
from engine.config import MXFP4_BLOCK, ModelConfig
from engine.models.checkpoint import FLOATS, Checkpoint, CheckpointError, ExpectedTensor, TensorSource
from engine.models.gpt_oss import GptOss
from engine.models.layers import Attention, MixtureOfExperts
from engine.placement import MLP_UNIT, RankSpec
from kernels.ops import (
    MAX_SCALE,
    ExpertWeights,
    YarnScaling,
    gates_first,
    inverse_frequencies,
    mxfp4_expand,
    pair_order,
    rope_table,
)

_ORIGINAL_LAYER_NAMES = {
    "input_layernorm.weight": "attn.norm.scale",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "self_attn.sinks": "attn.sinks",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_proj_blocks": "mlp.mlp1_weight.blocks",
    "mlp.experts.gate_up_proj_scales": "mlp.mlp1_weight.scales",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_blocks": "mlp.mlp2_weight.blocks",
    "mlp.experts.down_proj_scales": "mlp.mlp2_weight.scales",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
}
_ORIGINAL_TOP_NAMES = {
    "model.embed_tokens.weight": "embedding.weight",
    "lm_head.weight": "unembedding.weight",
    "model.norm.weight": "norm.scale",
}


def expected_tensors(model: ModelConfig) -> dict[str, ExpectedTensor]:
    """List the tensors of a Hugging Face checkpoint of this model, in file order."""
    return dict(_expected(model))


def _expected(model: ModelConfig) -> Iterator[tuple[str, ExpectedTensor]]:
    hidden, inter, experts = model.hidden_size, model.intermediate_size, model.num_experts
    query, key = model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim
    yield "model.embed_tokens.weight", ExpectedTensor((model.vocab_size, hidden))
    for layer in range(model.num_layers):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", ExpectedTensor((hidden,))
        for name, rows in (("q", query), ("k", key), ("v", key)):
            yield f"{at}self_attn.{name}_proj.weight", ExpectedTensor((rows, hidden))
            yield f"{at}self_attn.{name}_proj.bias", ExpectedTensor((rows,))
        yield at + "self_attn.o_proj.weight", ExpectedTensor((hidden, query))
        yield at + "self_attn.o_proj.bias", ExpectedTensor((hidden,))
        yield at + "self_attn.sinks", ExpectedTensor((model.num_attention_heads,))
        yield at + "post_attention_layernorm.weight", ExpectedTensor((hidden,))
        yield at + "mlp.router.weight", ExpectedTensor((experts, hidden))
        yield at + "mlp.router.bias", ExpectedTensor((experts,))
        for name, rows, columns in (("gate_up", 2 * inter, hidden), ("down", hidden, inter)):
            base = f"{at}mlp.experts.{name}_proj"
            if model.quantization == "mxfp4":
                blocks = columns // MXFP4_BLOCK
                yield f"{base}_blocks", ExpectedTensor((experts, rows, blocks, MXFP4_BLOCK // 2), ("U8",))
                yield f"{base}_scales", ExpectedTensor((experts, rows, blocks), ("U8",))
            else:
                yield base, ExpectedTensor((experts, columns, rows))
            yield f"{base}_bias", ExpectedTensor((experts, rows))
    yield "model.norm.weight", ExpectedTensor((hidden,))
    if not model.tie_word_embeddings:
        yield "lm_head.weight", ExpectedTensor((model.vocab_size, hidden))


def original_tensors(model: ModelConfig) -> dict[str, ExpectedTensor]:
    """List the tensors of a checkpoint in the authors' original naming, where q, k and v are one tensor."""
    expected: dict[str, ExpectedTensor] = {}
    rows = (model.num_attention_heads + 2 * model.num_kv_heads) * model.head_dim
    for name, want in _expected(model):
        if "k_proj" in name or "v_proj" in name:
            continue
        shape = (rows, *want.shape[1:]) if "q_proj" in name else want.shape
        expected[original_name(name)] = ExpectedTensor(shape, want.dtypes)
    return expected


def original_name(name: str) -> str:
    """Translate a Hugging Face tensor name; q, k and v all become the fused `attn.qkv`."""
    if name in _ORIGINAL_TOP_NAMES:
        return _ORIGINAL_TOP_NAMES[name]
    _, _, layer, part = name.split(".", 3)
    if part.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
        return f"block.{layer}.attn.qkv.{part.rsplit('.', 1)[1]}"
    return f"block.{layer}.{_ORIGINAL_LAYER_NAMES[part]}"


class _OriginalNames:
    """A checkpoint in original naming, seen under Hugging Face names."""

    def __init__(self, source: TensorSource, model: ModelConfig) -> None:
        self._source = source
        query, key = model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self._rows = {"q_proj": (0, query), "k_proj": (query, query + key), "v_proj": (query + key, query + 2 * key)}

    def get(self, name: str) -> Tensor:
        tensor = self._source.get(original_name(name))
        for projection, (begin, end) in self._rows.items():
            if projection in name:
                return tensor[begin:end]
        return tensor


def open_source(checkpoint: Checkpoint, model: ModelConfig) -> TensorSource:
    """Check all headers against the model and give its tensors under Hugging Face names. Raises: CheckpointError."""
    if "embedding.weight" in checkpoint.tensors:
        checkpoint.check(original_tensors(model))
        return _OriginalNames(checkpoint, model)
    checkpoint.check(expected_tensors(model))
    return checkpoint


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How weights are held: `dtype`, MXFP4 experts expanded once or kept packed, positions of the rotary table."""

    dtype: torch.dtype
    expand_experts: bool
    num_positions: int
    where: str = "checkpoint"


def load_gpt_oss(
    source: TensorSource,
    model: ModelConfig,
    options: LoadOptions,
    progress: Callable[[float, str], None],
    links: RankLinks | None = None,
    rank: RankSpec | None = None,
) -> GptOss:
    """Build a rank's share of the model from tensors that have passed the header checks; without `rank`, all of it.

    Only what the share holds is read. Raises: CheckpointError on scales above 252.
    """
    loader = _Loader(source, model, options, rank, links or RankLinks())
    part = loader.part
    layers = []
    begin, end = part.layers
    for layer in range(begin, end):
        progress((layer - begin) / (end - begin + 1), f"layer {layer + 1} of {model.num_layers}")
        layers.append((loader.attention(layer), loader.experts(layer)))
    progress((end - begin) / (end - begin + 1), "embedding and lm_head")
    embedding = loader.dense("model.embed_tokens.weight", slice(None) if part.has_embedding else slice(0))
    norm = loader.dense("model.norm.weight")
    is_whole_head = part.vocab == (0, model.vocab_size)
    if model.tie_word_embeddings and part.has_embedding and is_whole_head:
        head = embedding
    else:
        name = "model.embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight"
        head = loader.dense(name, slice(*part.vocab))
    progress(1.0, "done")
    return GptOss(
        embedding=embedding,
        layers=layers,
        norm=norm,
        lm_head=_columns(head),
        rope=rotations(model, options.num_positions),
        eps=model.rms_norm_eps,
        group=loader.group,
        vocab_rows=tuple(other.vocab[1] - other.vocab[0] for other in loader.stage),
    )


@dataclass(frozen=True, slots=True)
class ModelPart:
    """Which part of each tensor a rank holds; half-open ranges. `columns` are intermediate columns of every expert.

    What all ranks of a stage would add alike is added by one: `adds_out_bias` after attention, `adds_down_bias` after
    the experts (columns of one expert lie on several ranks; whole experts each keep their own).
    """

    layers: tuple[int, int]
    query_heads: tuple[int, int]
    kv_heads: tuple[int, int]
    columns: tuple[int, int]
    experts: tuple[int, int]
    vocab: tuple[int, int]
    has_embedding: bool
    adds_out_bias: bool
    adds_down_bias: bool


def part_of_rank(model: ModelConfig, rank: RankSpec | None) -> ModelPart:
    """Tell which part of each tensor a rank holds; without a rank, all."""
    if rank is None:
        heads, kv_heads = (0, model.num_attention_heads), (0, model.num_kv_heads)
        columns, vocab = (0, model.intermediate_size), (0, model.vocab_size)
        return ModelPart(
            (0, model.num_layers), heads, kv_heads, columns, (0, model.num_experts), vocab, True, True, True
        )
    first, last = (min(unit * MLP_UNIT, model.intermediate_size) for unit in rank.mlp_units)
    return ModelPart(
        layers=rank.layers,
        query_heads=rank.query_heads,
        kv_heads=rank.kv_heads,
        columns=(first, last),
        experts=rank.experts,
        vocab=rank.vocab,
        has_embedding=rank.has_embedding,
        adds_out_bias=rank.tp_rank == 0,
        adds_down_bias=first == 0,
    )


def rotations(model: ModelConfig, num_positions: int) -> Tensor:
    """Tabulate the rotary embedding as the model's configuration scales it: complex64 [P, 1, D/2]."""
    rope = model.rope
    # A factor of 1 is "no scaling" in the configuration; YaRN would then leave the frequencies alone too.
    scaling = (
        YarnScaling(rope.factor, rope.original_max_position_embeddings, rope.beta_fast, rope.beta_slow, rope.truncate)
        if rope.factor != 1.0
        else None
    )
    inverse, concentration = inverse_frequencies(model.head_dim, rope.theta, scaling)
    return rope_table(inverse, concentration, num_positions)


class _Loader:
    def __init__(
        self, source: TensorSource, model: ModelConfig, options: LoadOptions, rank: RankSpec | None, links: RankLinks
    ) -> None:
        self._source = source
        self._model = model
        self._options = options
        self.part = part_of_rank(model, rank)
        self.group = links.group
        self.stage = links.stage

    def dense(self, name: str, *parts: slice) -> Tensor:
        """Copy one float tensor, or a part of it, into memory of our own, in the chosen dtype."""
        return self._source.get(name)[parts].to(self._options.dtype, copy=True).contiguous()

    def attention(self, layer: int) -> Attention:
        model, at = self._model, f"model.layers.{layer}."
        order = pair_order(model.head_dim)
        query_heads, kv_heads = slice(*self.part.query_heads), slice(*self.part.kv_heads)
        query_rows, kv_rows = (
            slice(s.start * model.head_dim, s.stop * model.head_dim) for s in (query_heads, kv_heads)
        )

        def stacked(kind: str) -> Tensor:
            parts = []
            for name in ("q", "k", "v"):
                part = self.dense(f"{at}self_attn.{name}_proj.{kind}", query_rows if name == "q" else kv_rows)
                heads = part.view(-1, model.head_dim, *part.shape[1:])
                parts.append(part if name == "v" else heads[:, order].flatten(0, 1))
            return torch.cat(parts)

        return Attention(
            norm=self.dense(at + "input_layernorm.weight"),
            qkv=_columns(stacked("weight")),
            qkv_bias=stacked("bias"),
            out=_columns(self.dense(at + "self_attn.o_proj.weight", slice(None), query_rows)),
            out_bias=self.dense(at + "self_attn.o_proj.bias").mul_(self.part.adds_out_bias),
            sinks=self.dense(at + "self_attn.sinks", query_heads).float(),
            num_heads=query_heads.stop - query_heads.start,
            num_kv_heads=kv_heads.stop - kv_heads.start,
            scale=model.head_dim**-0.5,
            eps=model.rms_norm_eps,
            group=self.group,
        )

    def experts(self, layer: int) -> MixtureOfExperts:
        model, at = self._model, f"model.layers.{layer}."
        return MixtureOfExperts(
            norm=self.dense(at + "post_attention_layernorm.weight"),
            router=self._source.get(at + "mlp.router.weight").to(torch.float32, copy=True),
            router_bias=self._source.get(at + "mlp.router.bias").to(torch.float32, copy=True),
            experts=self._expert_weights(at + "mlp.experts."),
            top_k=model.num_experts_per_token,
            limit=model.swiglu_limit,
            eps=model.rms_norm_eps,
            group=self.group,
        )

    def _expert_weights(self, at: str) -> ExpertWeights:
        part = self.part
        experts, columns = slice(*part.experts), slice(*part.columns)
        # Gates and ups are interleaved in the checkpoint: a range of columns is one range of rows there.
        rows, blocks = slice(2 * columns.start, 2 * columns.stop), slice(columns.start // 32, -(-columns.stop // 32))
        gate_up_bias = self.dense(at + "gate_up_proj_bias", experts, rows)
        weights = ExpertWeights(
            gate_up_bias=gates_first(gate_up_bias.t()).t().contiguous(),
            down_bias=self.dense(at + "down_proj_bias", experts).mul_(part.adds_down_bias),
            first=experts.start,
        )
        if self._model.quantization == "none":
            gate_up = self.dense(at + "gate_up_proj", experts, slice(None), rows).transpose(1, 2)
            weights.gate_up = gates_first(gate_up.transpose(0, 1)).transpose(0, 1).contiguous()
            weights.down = self.dense(at + "down_proj", experts, columns).transpose(1, 2).contiguous()
            return weights
        gate_up_blocks, gate_up_scales = self._packed(at + "gate_up_proj", experts, rows)
        down_blocks, down_scales = self._packed(at + "down_proj", experts, slice(None), blocks)
        if self._options.expand_experts:
            weights.gate_up = self._expanded(gate_up_blocks, gate_up_scales, gates_first)
            weights.down = self._expanded(down_blocks, down_scales, lambda weight: weight)
        else:
            weights.gate_up_blocks, weights.gate_up_scales = gate_up_blocks.clone(), gate_up_scales.clone()
            weights.down_blocks, weights.down_scales = down_blocks.clone(), down_scales.clone()
        return weights

    def _expanded(self, blocks: Tensor, scales: Tensor, arrange: Callable[[Tensor], Tensor]) -> Tensor:
        """Expand MXFP4 expert by expert: on the way a value takes 9 bytes more, too many for a whole layer at once."""
        experts, rows, columns = blocks.shape[0], blocks.shape[1], blocks.shape[2] * MXFP4_BLOCK
        out = torch.empty(experts, rows, columns, dtype=self._options.dtype)
        for index in range(experts):
            one = slice(index, index + 1)
            out[index] = arrange(mxfp4_expand(blocks[one], scales[one], self._options.dtype)[0])
        return out

    def _packed(self, base: str, *parts: slice) -> tuple[Tensor, Tensor]:
        scales = self._source.get(base + "_scales")[parts].contiguous()
        largest = int(scales.max()) if scales.numel() else 0
        if largest > MAX_SCALE:
            file = self._options.where
            raise CheckpointError(file, base + "_scales", f"MXFP4 scales up to {MAX_SCALE}", f"scale {largest}")
        return self._source.get(base + "_blocks")[parts].contiguous(), scales


def _columns(weight: Tensor) -> Tensor:
    """Lay a [M, N] matrix out column by column: a product with one row then reads memory forwards (15 % on CPU)."""
    return weight.t().contiguous().t()


__all__ = ["FLOATS", "LoadOptions", "expected_tensors", "load_gpt_oss", "open_source", "original_tensors"]
