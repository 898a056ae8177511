"""gpt-oss checkpoints to the GPU: which tensor goes where, and the few that change their form on the way.

Projections, embedding and experts lie on the GPU as in the checkpoint; q, k and v become one matrix; norms and sinks
become float32; expert scales get a second copy in the order the Triton kernels read. All of it happens on the GPU.
Knows: names, shapes, dtypes. Refuses to know: threads and streams (`gpu_staging`), kernels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.models.checkpoint import DTYPES, Checkpoint, CheckpointError
from engine.models.gpt_oss_gpu import GptOssGpu, GpuLayer
from engine.models.gpt_oss_weights import expected_tensors, original_name, original_tensors, rotations
from engine.models.gpu_staging import Copy, copy_to_gpu
from engine.models.synthetic import synthetic_rule
from kernels import gpu

_NORM = torch.float32
_WEIGHT = torch.bfloat16


@dataclass(frozen=True, slots=True)
class _Wish:
    """A checkpoint tensor and where it ends up: `target` is on the GPU, in the dtype that is wanted there."""

    name: str
    target: Tensor


def load_gpt_oss_gpu(
    model: ModelConfig,
    checkpoint: Checkpoint | None,
    device: torch.device,
    *,
    num_positions: int,
    num_threads: int,
    seed: int,
    progress: Callable[[float, str], None],
) -> GptOssGpu:
    """Put the weights on a GPU; without a checkpoint, made-up ones from `seed`.

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
    built = _allocate(model, device, num_positions, wishes)
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


def _allocate(model: ModelConfig, device: torch.device, num_positions: int, wishes: list[_Wish]) -> GptOssGpu:
    """Make room for every tensor, and note in `wishes` what belongs there."""
    hidden, inter, experts = model.hidden_size, model.intermediate_size, model.num_experts
    query, key = model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim

    def want(name: str, *shape: int, dtype: torch.dtype = _WEIGHT) -> Tensor:
        target = torch.empty(shape, dtype=dtype, device=device)
        wishes.append(_Wish(name, target))
        return target

    def want_qkv(at: str, kind: str, *columns: int) -> Tensor:
        target = torch.empty((query + 2 * key, *columns), dtype=_WEIGHT, device=device)
        for name, part in zip("qkv", torch.split(target, [query, key, key]), strict=True):
            wishes.append(_Wish(f"{at}self_attn.{name}_proj.{kind}", part))
        return target

    def want_experts(at: str, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        blocks = want(at + "_blocks", experts, rows, columns // 32, 16, dtype=torch.uint8)
        scales = want(at + "_scales", experts, rows, columns // 32, dtype=torch.uint8)
        return blocks, scales, want(at + "_bias", experts, rows)

    def layer(number: int) -> GpuLayer:
        at = f"model.layers.{number}."
        gate_up = want_experts(at + "mlp.experts.gate_up_proj", 2 * inter, hidden)
        down = want_experts(at + "mlp.experts.down_proj", hidden, inter)
        weights = gpu.LayerWeights(
            input_norm=want(at + "input_layernorm.weight", hidden, dtype=_NORM),
            qkv=want_qkv(at, "weight", hidden),
            qkv_bias=want_qkv(at, "bias"),
            sinks=want(at + "self_attn.sinks", model.num_attention_heads, dtype=_NORM),
            out=want(at + "self_attn.o_proj.weight", hidden, query),
            out_bias=want(at + "self_attn.o_proj.bias", hidden),
            post_norm=want(at + "post_attention_layernorm.weight", hidden, dtype=_NORM),
            router=want(at + "mlp.router.weight", experts, hidden),
            router_bias=want(at + "mlp.router.bias", experts),
            gate_up_blocks=gate_up[0],
            gate_up_scales=gate_up[1],
            gate_up_bias=gate_up[2],
            down_blocks=down[0],
            down_scales=down[1],
            down_bias=down[2],
        )
        return GpuLayer(weights, gate_up[1], down[1], model.layer_windows[number])

    layers = [layer(number) for number in range(model.num_layers)]
    embedding = want("model.embed_tokens.weight", model.vocab_size, hidden)
    norm = want("model.norm.weight", hidden, dtype=_NORM)
    head = embedding if model.tie_word_embeddings else want("lm_head.weight", model.vocab_size, hidden)
    table = torch.view_as_real(rotations(model, num_positions)[:, 0]).contiguous()
    return GptOssGpu(model, embedding, layers, norm, head, table.to(device))


def _copy(
    checkpoint: Checkpoint,
    is_original: bool,
    wishes: list[_Wish],
    device: torch.device,
    num_threads: int,
    progress: Callable[[float, str], None],
) -> None:
    copies: list[Copy] = []
    converted: list[tuple[Tensor, Tensor]] = []
    fused_at: dict[str, int] = {}  # where the next of q, k and v begins in the original naming's one tensor
    for wish in wishes:
        name = original_name(wish.name) if is_original else wish.name
        info = checkpoint.tensors[name]
        source_dtype, target = DTYPES[info.dtype], wish.target
        if source_dtype != target.dtype:
            target = torch.empty(target.shape, dtype=source_dtype, device=device)
            converted.append((target, wish.target))
        begin = info.begin + fused_at.get(name, 0)
        if is_original and ".qkv." in name:
            fused_at[name] = fused_at.get(name, 0) + target.nbytes
        copies.append(Copy(info.file, begin, target))
    # Files are read from front to back.
    copies.sort(key=lambda copy: (str(copy.file), copy.begin))
    gib = sum(copy.target.nbytes for copy in copies) / 2**30
    copy_to_gpu(
        copies, device, num_threads, lambda fraction: progress(fraction, f"{fraction * gib:.1f} of {gib:.1f} GiB")
    )
    for source, target in converted:
        target.copy_(source)


def _make_up(wish: _Wish, seed: int) -> None:
    """Draw a tensor's values on its device, keyed by (seed, name); not the bytes of `hlaunch synth`, but their kind."""
    rule, target = synthetic_rule(wish.name, wish.target.shape), wish.target
    generator = torch.Generator(target.device).manual_seed(zlib.crc32(f"{seed} {wish.name}".encode()))
    if rule.kind == "codes":
        target.random_(0, 256, generator=generator)
    elif rule.kind == "scales":
        target.random_(rule.centre - 1, rule.centre + 2, generator=generator)
    else:
        target.normal_(rule.mean, rule.std, generator=generator)
