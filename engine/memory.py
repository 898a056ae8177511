"""One arithmetic of memory for the launcher's fit preview and for the engine's own sizing.

Knows: bytes of weights (from safetensors headers, or from the shape when no file is at hand), bytes of KV per block and
group, the activation arena of a GPU; a CPU's is in `engine.cpu_memory`. Refuses to know: torch, the device; budgets
come in as numbers.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from engine.config import MXFP4_BLOCK, ConfigError, EngineConfig, ModelConfig, resolve_model_folder
from engine.cpu_memory import MANY_THREADS, CpuLimits, CpuMemory, HalfExact, cpu_memory
from engine.exactness import half_exact_of

MAX_HEADER_BYTES = 64 << 20
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
# Interpreter, torch and its libraries in one CPU rank: 240 MiB once imported, then code pages that come with the first
# steps; `bench/memory_estimate.py` holds it to the whole.
CPU_RUNTIME_BYTES = 262 << 20
CPU_KV_CAP_BYTES = 4 << 30
# CUDA context, compiled kernels, library workspaces, captured graphs and the allocator's slack of one GPU rank;
# measured on an H100 at 2.2 GiB with gpt-oss-20b, steps of 16,384 tokens and 128 rows.
GPU_RUNTIME_BYTES = 9 << 28
# Batch sizes whose kernels keep logits of their own: 1, 2, 4, 8 and 16 rows; see `engine.worker.gpu_decode`.
_GPU_SMALL_ROWS = 31


@dataclass(frozen=True, slots=True)
class KVCacheGroup:
    """Layers that share one block table: one kind of attention, one window."""

    window: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """Bytes of one rank. `budget_bytes` is what the device may give; the pool gets what is left of it.

    `held_bytes` stay beside the weights: second layouts and tables of a CPU rank. `load_bytes` are needed beyond the
    weights while those are read, before anything else is there.
    """

    budget_bytes: int
    weight_bytes: int
    activation_bytes: int
    runtime_bytes: int
    kv_block_bytes: int
    num_blocks: int
    block_size: int
    blocks_per_full_request: int
    held_bytes: int = 0
    load_bytes: int = 0

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.kv_block_bytes

    @property
    def fixed_bytes(self) -> int:
        """Everything but the KV pool."""
        return self.weight_bytes + self.held_bytes + self.activation_bytes + self.runtime_bytes

    @property
    def required_bytes(self) -> int:
        """The most that the rank takes: while it serves, or while it loads."""
        return max(self.fixed_bytes + self.kv_bytes, self.weight_bytes + self.load_bytes + self.runtime_bytes)

    @property
    def max_full_requests(self) -> float:
        """Requests of full context length that the pool holds at once."""
        return (self.num_blocks - 1) / self.blocks_per_full_request

    @property
    def fits(self) -> bool:
        return self.required_bytes <= self.budget_bytes and self.max_full_requests >= 1.0


def kv_cache_groups(model: ModelConfig) -> tuple[KVCacheGroup, ...]:
    """Group layers by window, split so that every group has equally many layers.

    Equal groups make all blocks equally large, so that one pool serves them all. Order: by first layer.
    """
    by_window: dict[int | None, list[int]] = {}
    for layer, window in enumerate(model.layer_windows):
        by_window.setdefault(window, []).append(layer)
    size = min(len(layers) for layers in by_window.values())
    while any(len(layers) % size for layers in by_window.values()):
        size -= 1
    groups = [
        KVCacheGroup(window, tuple(layers[i : i + size]))
        for window, layers in by_window.items()
        for i in range(0, len(layers), size)
    ]
    return tuple(sorted(groups, key=lambda group: group.layers[0]))


def kv_block_bytes(model: ModelConfig, block_size: int, kv_dtype: str) -> int:
    """Bytes of one block: keys and values of `block_size` tokens in the layers of one group."""
    layers = len(kv_cache_groups(model)[0].layers)
    return layers * 2 * model.num_kv_heads * model.head_dim * DTYPE_BYTES[kv_dtype] * block_size


def share_block_bytes(
    model: ModelConfig, layers: tuple[int, int], num_kv_heads: int, block_size: int, kv_dtype: str
) -> int:
    """Bytes of one block on a rank with `num_kv_heads` in `layers` [begin, end): its share of the largest group.

    Groups are the whole model's: all ranks of an engine follow the same block tables.
    """
    begin, end = layers
    held = max(sum(begin <= layer < end for layer in group.layers) for group in kv_cache_groups(model))
    return held * 2 * num_kv_heads * model.head_dim * DTYPE_BYTES[kv_dtype] * block_size


def blocks_per_request(model: ModelConfig, num_tokens: int, block_size: int, chunk: int) -> int:
    """Blocks that one request of `num_tokens` holds at most, over all groups.

    A sliding group keeps its window plus the chunk being computed, in whole blocks, plus one for the misaligned start.
    """
    full = -(-num_tokens // block_size)
    total = 0
    for group in kv_cache_groups(model):
        if group.window is None:
            total += full
        else:
            total += min(full, -(-(group.window - 1 + chunk) // block_size) + 1)
    return total


def checkpoint_bytes(folder: Path) -> dict[str, int]:
    """Bytes of every tensor in the safetensors files of a folder, from their headers alone.

    Raises: ConfigError naming the file when a header is malformed.
    """
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > MAX_HEADER_BYTES or length > path.stat().st_size:
                    raise ConfigError(str(path), f"header of {length} bytes is larger than the file or the limit")
                header = json.loads(file.read(length))
            for name, info in header.items():
                if name != "__metadata__":
                    begin, end = info["data_offsets"]
                    sizes[name] = int(end) - int(begin)
        except (
            OSError,
            struct.error,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(str(path), f"not a safetensors file: {error}") from error
    return sizes


def model_bytes(model: ModelConfig) -> int:
    """Bytes of a checkpoint of this shape: MXFP4 experts (17 bytes for 32 values) when quantized, bf16 for the rest."""
    rest = _non_expert_parameters(model) * 2
    weights = _expert_weights(model)
    biases = model.num_layers * model.num_experts * (2 * model.intermediate_size + model.hidden_size) * 2
    if model.quantization == "mxfp4":
        return rest + biases + weights * 17 // MXFP4_BLOCK
    return rest + biases + weights * 2


def loaded_weight_bytes(model: ModelConfig, dtype: str, expand_experts: bool) -> int:
    """Bytes of the weights once a rank holds them in `dtype`; MXFP4 experts stay packed unless expanded."""
    unit = DTYPE_BYTES[dtype]
    rest = _non_expert_parameters(model) * unit
    biases = model.num_layers * model.num_experts * (2 * model.intermediate_size + model.hidden_size) * unit
    weights = _expert_weights(model)
    if model.quantization == "mxfp4" and not expand_experts:
        return rest + biases + weights * 17 // MXFP4_BLOCK
    return rest + biases + weights * unit


def should_expand_experts(model: ModelConfig, dtype: str, budget_bytes: int) -> bool:
    """Whether a CPU rank expands MXFP4 experts once at load: when that takes at most a quarter of its budget."""
    return _expert_weights(model) * DTYPE_BYTES[dtype] <= budget_bytes // 4


def gpu_weight_bytes(model: ModelConfig, num_positions: int) -> int:
    """Bytes of the weights on a GPU: MXFP4 experts packed with a second copy of their scales, the rest bf16.

    Norms and sinks are float32, and so is the rotary table of `num_positions`. See `engine.models.gpt_oss_gpu`.
    """
    hidden, inter, block = model.hidden_size, model.intermediate_size, MXFP4_BLOCK

    def prepared(rows: int, columns: int) -> int:
        return model.num_experts * rows * -(-columns // (4 * block)) * 4

    scales = model.num_layers * (prepared(2 * inter, hidden) + prepared(hidden, inter))
    widened = 2 * (model.num_layers * (2 * hidden + model.num_attention_heads) + hidden)
    return model_bytes(model) + scales + widened + num_positions * model.head_dim * 4


def gpu_activation_bytes(model: ModelConfig, max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """Arena of one step on a GPU: a layer's buffers for every token, and logits for every row.

    The residual stream and logits are float32, the rest bf16; rows of experts are padded to 128 columns. Rows with
    penalties keep counts and marks of every token; with log-probabilities too, three more copies of their logits.
    """

    def padded(width: int) -> int:
        return -(-width // 128) * 128

    hidden, query = model.hidden_size, model.num_attention_heads * model.head_dim
    width = 2 * hidden + 4 * hidden + padded(hidden) + 3 * query + 2 * model.num_kv_heads * model.head_dim
    experts = padded(hidden) + padded(model.intermediate_size) + hidden
    tokens = 2 * max_num_batched_tokens * (width + model.num_experts_per_token * experts)
    logits = 4 * (2 * max_num_seqs + _GPU_SMALL_ROWS)
    sampling = max_num_seqs * (3 * 4 + 4 + 1)
    return tokens + model.vocab_size * (logits + sampling)


def fit(
    model: ModelConfig,
    *,
    budget_bytes: int,
    weight_bytes: int,
    kv_dtype: str,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    kv_cache_bytes: int = 0,
    num_blocks: int = 0,
    cpu: CpuMemory | None = None,
    block_bytes: int | None = None,
    share: ModelConfig | None = None,
) -> MemoryFit:
    """Size the block pool of one rank.

    `num_blocks` or `kv_cache_bytes` fix the pool; otherwise it gets what the budget leaves, at most what
    `max_num_seqs` requests of full length can use and, on a CPU, at most 4 GiB. Block 0 is the null block.
    `cpu` is what a CPU rank takes beside weights and pool; without it the rank is a GPU's. On a rank that holds a share
    of the model, `share` is its shape and `block_bytes` what a block takes there, 0 where it holds no KV.
    """
    if block_bytes is None:
        block_bytes = kv_block_bytes(model, block_size, kv_dtype)
    if cpu is None:
        activations = gpu_activation_bytes(share or model, max_num_batched_tokens, max_num_seqs)
        runtime_bytes = GPU_RUNTIME_BYTES
    else:
        activations, runtime_bytes = cpu.activation_bytes, CPU_RUNTIME_BYTES
    held_bytes = cpu.held_bytes if cpu is not None else 0
    per_request = blocks_per_request(model, max_model_len, block_size, max_num_batched_tokens)
    if not num_blocks:
        if not block_bytes:
            num_blocks = max_num_seqs * per_request + 1
        elif kv_cache_bytes:
            num_blocks = kv_cache_bytes // block_bytes
        else:
            left = max(0, budget_bytes - weight_bytes - held_bytes - activations - runtime_bytes)
            cap = left if cpu is None else min(left, CPU_KV_CAP_BYTES)
            num_blocks = min(cap // block_bytes, max_num_seqs * per_request + 1)
    return MemoryFit(
        budget_bytes=budget_bytes,
        weight_bytes=weight_bytes,
        activation_bytes=activations,
        runtime_bytes=runtime_bytes,
        kv_block_bytes=block_bytes,
        num_blocks=num_blocks,
        block_size=block_size,
        blocks_per_full_request=per_request,
        held_bytes=held_bytes,
        load_bytes=cpu.load_bytes if cpu is not None else 0,
    )


def fit_engine(
    config: EngineConfig,
    model: ModelConfig,
    max_model_len: int,
    *,
    budget_bytes: int,
    weight_bytes: int,
    kv_dtype: str,
    is_gpu: bool = False,
    block_bytes: int | None = None,
    share: ModelConfig | None = None,
    is_expanded: bool | None = None,
) -> MemoryFit:
    """Size the block pool of one rank under a configuration's limits; the rest as in `fit`.

    Of a CPU rank that does not tell, the budget says whether its experts are expanded.
    """
    cache, scheduler = config.cache, config.scheduler
    cpu = None
    if not is_gpu:
        own = share or model
        dtype = cpu_dtype(config.dtype)
        if is_expanded is None:
            is_expanded = should_expand_experts(own, dtype, budget_bytes)
        half_exact = half_exact_of(config, model, resolve_model_folder(config.model))
        cpu = cpu_memory(own, cpu_limits(config, max_model_len, kv_dtype, is_expanded, half_exact))
    return fit(
        model,
        budget_bytes=budget_bytes,
        weight_bytes=weight_bytes,
        kv_dtype=kv_dtype,
        block_size=cache.block_size,
        max_model_len=max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        kv_cache_bytes=cache.kv_cache_bytes,
        num_blocks=cache.num_blocks,
        cpu=cpu,
        block_bytes=block_bytes,
        share=share,
    )


def cpu_dtype(dtype: str) -> str:
    """The type that a CPU rank computes in, and keeps its KV in, when the configuration says `auto`.

    float32: bfloat16 products of CPUs without matrix units are slower and no smaller in cache.
    """
    return "float32" if dtype == "auto" else dtype


def cpu_limits(
    config: EngineConfig, max_model_len: int, kv_dtype: str, is_expanded: bool, half_exact: HalfExact
) -> CpuLimits:
    """Read what decides a CPU rank's memory out of a configuration."""
    return CpuLimits(
        dtype=cpu_dtype(config.dtype),
        kv_dtype=kv_dtype,
        is_expanded=is_expanded,
        block_size=config.cache.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        threads=config.cpu_threads or MANY_THREADS,
        half_exact=half_exact,
    )


def _expert_weights(model: ModelConfig) -> int:
    return model.num_layers * model.num_experts * 3 * model.intermediate_size * model.hidden_size


def _non_expert_parameters(model: ModelConfig) -> int:
    query = model.num_attention_heads * model.head_dim
    key = model.num_kv_heads * model.head_dim
    attention = model.hidden_size * (query + 2 * key) + query + 2 * key
    attention += query * model.hidden_size + model.hidden_size + model.num_attention_heads
    router = model.num_experts * (model.hidden_size + 1)
    norms = 2 * model.hidden_size
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return model.num_layers * (attention + router + norms) + embeddings + model.hidden_size
