"""gpt-oss checkpoints to the GPU: which tensor goes where, and the few that change their form on the way.

Projections, embedding and experts lie on the GPU as in the checkpoint; q, k and v become one matrix; norms and sinks
become float32; expert scales get a second copy in the order the Triton kernels read. All of it happens on the GPU.
A rank of several holds a part of each tensor: rows are read alone, columns are cut out of the tensor on the GPU.
Knows: names, shapes, dtypes. Refuses to know: threads and streams (`gpu_staging`), kernels.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.models.checkpoint import DTYPES, Checkpoint, CheckpointError
from engine.models.gpt_oss_gpu import GptOssGpu, GpuLayer
from engine.models.gpt_oss_weights import (
    expected_tensors,
    original_name,
    original_tensors,
    part_of_rank,
    rotations,
)
from engine.models.gpu_staging import Copy, copy_to_gpu
from engine.models.synthetic import synthetic_rule
from engine.placement import RankSpec, shard
from kernels import gpu

_NORM = torch.float32
_WEIGHT = torch.bfloat16
_MOST_CUT_BYTES = 1 << 30  # of whole tensors that wait on the GPU to be cut
_ALL = slice(None)


@dataclass(frozen=True, slots=True)
class _Wish:
    """A checkpoint tensor and where it ends up: `target` is on the GPU, in the dtype that is wanted there.

    Of a tensor of `shape` in the checkpoint, `parts` are wanted: all of it, rows, or any other cut.
    """

    name: str
    target: Tensor
    shape: tuple[int, ...]
    parts: tuple[slice, ...] = ()

    @property
    def are_rows(self) -> bool:
        """Whether what is wanted lies in one piece."""
        return self.parts[1:].count(_ALL) == len(self.parts[1:])

    @property
    def row_begin(self) -> int:
        return (self.parts[0].start or 0) if self.parts else 0


def load_gpt_oss_gpu(
    model: ModelConfig,
    checkpoint: Checkpoint | None,
    device: torch.device,
    *,
    num_positions: int,
    num_threads: int,
    seed: int,
    progress: Callable[[float, str], None],
    rank: RankSpec | None = None,
    stage: Sequence[RankSpec] = (),
) -> GptOssGpu:
    """Put the weights on a GPU; without a checkpoint, made-up ones from `seed`.

    With a `rank` its share of them, as one of the ranks of its `stage`; a share has the values it has in the whole.

    Raises: CheckpointError before anything is allocated for wrong headers, afterwards for scales above the kernels'
    range; torch.cuda.OutOfMemoryError.
    """
    if model.quantization != "mxfp4":
        raise CheckpointError(
            "config.json", "", "MXFP4 experts on a GPU", "unquantized ones", "serve this model with device cpu"
        )
    is_original = checkpoint is not None and "embedding.weight" in checkpoint.tensors
    if checkpoint is not None:
        checkpoint.check(original_tensors(model) if is_original else expected_tensors(model))
    wishes: list[_Wish] = []
    built = _allocate(model, device, num_positions, wishes, rank, stage)
    if checkpoint is None:
        for number, wish in enumerate(wishes):
            _make_up(wish, seed)
            progress(number / len(wishes), "made-up weights")
    else:
        _copy(checkpoint, is_original, wishes, device, num_threads, progress)
    largest = torch.zeros((), dtype=torch.int32, device=device)
    for layer in built.layers:
        weights = layer.weights
        for raw, target in ((weights.gate_up_scales, "gate_up_scales"), (weights.down_scales, "down_scales")):
            largest = torch.maximum(largest, raw.max().int())
            setattr(layer, target, gpu.prepare_scales(raw))
    if int(largest) > gpu.LARGEST_SCALE:
        raise CheckpointError(
            checkpoint.folder if checkpoint else "dummy",
            "*_scales",
            f"MXFP4 scales up to {gpu.LARGEST_SCALE} on a GPU",
            f"scale {int(largest)}",
            "serve this model with device cpu",
        )
    progress(1.0, "done")
    return built


def _allocate(
    model: ModelConfig,
    device: torch.device,
    num_positions: int,
    wishes: list[_Wish],
    rank: RankSpec | None,
    stage: Sequence[RankSpec],
) -> GptOssGpu:
    """Make room for every tensor, and note in `wishes` what belongs there."""
    hidden, inter, head_dim = model.hidden_size, model.intermediate_size, model.head_dim
    part = part_of_rank(model, rank)
    heads = (model.num_attention_heads, model.num_kv_heads, model.num_kv_heads)
    own_rows = [slice(head_dim * b, head_dim * e) for b, e in (part.query_heads, part.kv_heads, part.kv_heads)]
    experts, columns, vocab = slice(*part.experts), slice(*part.columns), slice(*part.vocab)
    gate_up_rows, down_blocks = (
        slice(2 * columns.start, 2 * columns.stop),
        slice(columns.start // 32, columns.stop // 32),
    )

    def want(name: str, *shape: int, parts: tuple[slice, ...] = (), dtype: torch.dtype = _WEIGHT) -> Tensor:
        sizes = [len(range(*cut.indices(size))) for cut, size in zip(parts, shape, strict=False)]
        target = torch.empty((*sizes, *shape[len(sizes) :]), dtype=dtype, device=device)
        if target.numel():
            # A part that is all is none.
            is_part = target.shape != torch.Size(shape)
            wishes.append(_Wish(name, target, shape, parts if is_part else ()))
        return target

    def want_qkv(at: str, kind: str, *sizes: int) -> Tensor:
        counts = [cut.stop - cut.start for cut in own_rows]
        target = torch.empty((sum(counts), *sizes), dtype=_WEIGHT, device=device)
        for name, count, cut, own in zip("qkv", heads, own_rows, torch.split(target, counts), strict=True):
            whole = (count * head_dim, *sizes)
            parts = (cut,) if own.shape[0] < whole[0] else ()
            wishes.append(_Wish(f"{at}self_attn.{name}_proj.{kind}", own, whole, parts))
        return target

    def want_experts(at: str, rows: int, width: int, cut: tuple[slice, slice]) -> tuple[Tensor, Tensor]:
        num_experts, parts = model.num_experts, (experts, *cut)
        blocks = want(at + "_blocks", num_experts, rows, width // 32, 16, parts=parts, dtype=torch.uint8)
        return blocks, want(at + "_scales", num_experts, rows, width // 32, parts=parts, dtype=torch.uint8)

    def layer(number: int) -> GpuLayer:
        at = f"model.layers.{number}."
        moe = at + "mlp.experts."
        gate_up = want_experts(moe + "gate_up_proj", 2 * inter, hidden, (gate_up_rows, _ALL))
        down = want_experts(moe + "down_proj", hidden, inter, (_ALL, down_blocks))
        if part.adds_down_bias:
            down_bias = want(moe + "down_proj_bias", model.num_experts, hidden, parts=(experts,))
        else:
            down_bias = torch.zeros((experts.stop - experts.start, hidden), dtype=_WEIGHT, device=device)
        width = model.num_attention_heads * head_dim
        weights = gpu.LayerWeights(
            input_norm=want(at + "input_layernorm.weight", hidden, dtype=_NORM),
            qkv=want_qkv(at, "weight", hidden),
            qkv_bias=want_qkv(at, "bias"),
            sinks=want(
                at + "self_attn.sinks", model.num_attention_heads, parts=(slice(*part.query_heads),), dtype=_NORM
            ),
            out=want(at + "self_attn.o_proj.weight", hidden, width, parts=(_ALL, own_rows[0])),
            # Added once the ranks' parts are summed, hence on all of them.
            out_bias=want(at + "self_attn.o_proj.bias", hidden),
            post_norm=want(at + "post_attention_layernorm.weight", hidden, dtype=_NORM),
            router=want(at + "mlp.router.weight", model.num_experts, hidden),
            router_bias=want(at + "mlp.router.bias", model.num_experts),
            gate_up_blocks=gate_up[0],
            gate_up_scales=gate_up[1],
            gate_up_bias=want(moe + "gate_up_proj_bias", model.num_experts, 2 * inter, parts=(experts, gate_up_rows)),
            down_blocks=down[0],
            down_scales=down[1],
            down_bias=down_bias,
        )
        return GpuLayer(weights, gate_up[1], down[1], model.layer_windows[number])

    layers = [layer(number) for number in range(*part.layers)]
    embedding = want(
        "model.embed_tokens.weight", model.vocab_size, hidden, parts=(_ALL if part.has_embedding else slice(0, 0),)
    )
    norm = want("model.norm.weight", hidden, dtype=_NORM)
    if model.tie_word_embeddings and part.has_embedding:
        head = embedding[vocab]
    else:
        name = "model.embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight"
        head = want(name, model.vocab_size, hidden, parts=(vocab,))
    rows = tuple(other.vocab[1] - other.vocab[0] for other in stage)
    table = torch.view_as_real(rotations(model, num_positions)[:, 0]).contiguous()
    return GptOssGpu(
        config=model if rank is None else shard(model, rank),
        embedding=embedding,
        layers=layers,
        norm=norm,
        lm_head=head,
        rotations=table.to(device),
        vocab_rows=rows if sum(rows) else (model.vocab_size,),
        first_expert=experts.start,
    )


def _copy(
    checkpoint: Checkpoint,
    is_original: bool,
    wishes: list[_Wish],
    device: torch.device,
    num_threads: int,
    progress: Callable[[float, str], None],
) -> None:
    sent = 0
    total = sum(_cut_bytes(wish) or wish.target.nbytes for wish in wishes)
    for batch in _batches(wishes):
        copies: list[Copy] = []
        converted: list[tuple[Tensor, _Wish]] = []
        for wish in batch:
            name = original_name(wish.name) if is_original else wish.name
            info = checkpoint.tensors[name]
            source_dtype, target = DTYPES[info.dtype], wish.target
            row_bytes = math.prod(wish.shape[1:]) * source_dtype.itemsize
            first_row = wish.row_begin if wish.are_rows else 0
            if is_original and ".qkv." in name:
                first_row += _first_fused_row(wish.name, checkpoint.tensors[name].shape[0], wish.shape[0])
            if not wish.are_rows:
                target = torch.empty(wish.shape, dtype=source_dtype, device=device)
            elif source_dtype != target.dtype:
                target = torch.empty(target.shape, dtype=source_dtype, device=device)
            if target is not wish.target:
                converted.append((target, wish))
            copies.append(Copy(info.file, info.begin + first_row * row_bytes, target))
        # Files are read from front to back.
        copies.sort(key=lambda copy: (str(copy.file), copy.begin))
        size, before = sum(copy.target.nbytes for copy in copies), sent

        def report(fraction: float, before: int = before, size: int = size) -> None:
            done = before + fraction * size
            progress(done / total, f"{done / 2**30:.1f} of {total / 2**30:.1f} GiB")

        copy_to_gpu(copies, device, num_threads, report)
        sent += size
        for source, wish in converted:
            wish.target.copy_(source if wish.are_rows else source[wish.parts])


def _cut_bytes(wish: _Wish) -> int:
    """Bytes of the whole tensor, where a part has to be cut out of it on the GPU; 0 where it need not."""
    return 0 if wish.are_rows else math.prod(wish.shape) * wish.target.element_size()


def _batches(wishes: Sequence[_Wish]) -> Iterator[list[_Wish]]:
    """Give wishes in portions, so that whole tensors do not pile up on the GPU."""
    batch: list[_Wish] = []
    cut_bytes = 0
    for wish in wishes:
        if batch and cut_bytes + _cut_bytes(wish) > _MOST_CUT_BYTES:
            yield batch
            batch, cut_bytes = [], 0
        batch.append(wish)
        cut_bytes += _cut_bytes(wish)
    yield batch


def _first_fused_row(name: str, num_rows: int, own_rows: int) -> int:
    """Tell where q, k or v begins in the original naming's one tensor of `num_rows`; k and v are equally tall."""
    if ".q_proj." in name:
        return 0
    return num_rows - own_rows * (2 if ".k_proj." in name else 1)


def _make_up(wish: _Wish, seed: int) -> None:
    """Draw a tensor's values on its device, keyed by (seed, name); not the bytes of `hlaunch synth`, but their kind."""
    rule = synthetic_rule(wish.name, wish.shape)
    target = torch.empty(wish.shape, dtype=wish.target.dtype, device=wish.target.device) if wish.parts else wish.target
    generator = torch.Generator(target.device).manual_seed(zlib.crc32(f"{seed} {wish.name}".encode()))
    if rule.kind == "codes":
        target.random_(0, 256, generator=generator)
    elif rule.kind == "scales":
        target.random_(rule.centre - 1, rule.centre + 2, generator=generator)
    else:
        target.normal_(rule.mean, rule.std, generator=generator)
    if wish.parts:
        wish.target.copy_(target[wish.parts])
