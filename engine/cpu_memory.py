"""What a CPU rank takes beside its weights and its KV pool: second layouts, tables, and the buffers of a step.

Knows: the rules of `kernels.cpu` and `kernels.reference` as arithmetic: what is laid out again, what is alive at once.
Refuses to know: torch, the device, which weights a run has used by now; it counts what traffic at the limits leads to.
`bench/memory_estimate.py` and a test hold it against what real processes take.

Two paths: float32 runs on `kernels.cpu`; bfloat16, and experts that are packed or too large to lay out again, on the
references.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import MXFP4_BLOCK, ModelConfig

MAX_PACKED_BYTES = 64 << 20
"""Float32 weights beyond this are used as they are; a layer's experts count together."""
SERIAL_WORK = 4 << 20
"""Multiplications up to which a product has a layout for one thread as well."""
PACK_DEPTH, PACK_ROWS = 512, 16
"""FBGEMM's blocks: input columns and output rows of a packed weight are padded to whole ones."""
MAX_GATHERED_BYTES = 4 << 20
"""Keys and values that several decoding rows gather at once; beyond this they go one after the other."""
SINGLE_ROWS = 4
"""Decoding rows up to which each gathers for itself."""
QUERY_TILE = 64
TILE_TOKENS = 1024
"""Tokens whose experts are computed together."""
PRIMITIVE_BYTES = 650 << 10
"""What oneDNN keeps for every shape of a product that it has met; measured alike for 640 x 224 and 5120 x 2880."""
PRIMITIVE_ROWS = 16
"""Numbers of rows that each weight is taken to meet; a server of many different prompts meets more."""
MANY_THREADS = 2
"""Stands for "more than one": what a rank holds depends on no more than that."""

_FLOAT = 4
_MAX_MAPPED_BYTES = 4 << 20
# Knuth's fifty-percent rule: a heap in use has half as many holes as blocks that are alive.
_HOLES = 0.5
# Buffers of a step that are alive at once: stream, normed, projected and their like.
_ALIVE = 8
# Bytes per value while MXFP4 is expanded: nibbles, int32 indices, float32 values.
_EXPANSION = 1 + 4 + 4
# Bytes per logit while tokens are drawn: logits, then float64 scaled, sorted with ids, summed and cut off.
_DRAWING = 4 + 6 * 8


@dataclass(frozen=True, slots=True)
class CpuMemory:
    """Bytes of one CPU rank. `held` ones stay once traffic has called for them; `load` ones are gone after loading.

    `packed`: second layouts of weights; `primitive`: what oneDNN keeps of its products; `table`: slots of every
    position; `gathered`: buffers of a decoding row.
    """

    packed_bytes: int = 0
    primitive_bytes: int = 0
    table_bytes: int = 0
    gathered_bytes: int = 0
    activation_bytes: int = 0
    load_bytes: int = 0

    @property
    def held_bytes(self) -> int:
        return self.packed_bytes + self.primitive_bytes + self.table_bytes + self.gathered_bytes


@dataclass(frozen=True, slots=True)
class HalfExact:
    """Which weights float16 holds exactly, see `kernels.cpu.packing.half_is_exact`; experts of MXFP4 always are."""

    qkv: bool = False
    out: bool = False
    head: bool = False
    experts: bool = False


@dataclass(frozen=True, slots=True)
class CpuLimits:
    """What decides those bytes beside the shape."""

    dtype: str
    kv_dtype: str
    is_expanded: bool
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    threads: int = MANY_THREADS
    half_exact: HalfExact = HalfExact()


def cpu_memory(model: ModelConfig, limits: CpuLimits) -> CpuMemory:
    """Count what a CPU rank takes beside weights and KV; `model` is the shape of its share."""
    is_fast = limits.dtype == "float32"
    return CpuMemory(
        packed_bytes=_packed_bytes(model, limits) if is_fast else 0,
        primitive_bytes=PRIMITIVE_BYTES * PRIMITIVE_ROWS * _num_primitive_weights(model, limits),
        table_bytes=slot_table_bytes(model, limits.block_size, limits.max_model_len, limits.max_num_seqs),
        gathered_bytes=_gathered_bytes(model, limits) if is_fast else 0,
        activation_bytes=_activation_bytes(model, limits),
        load_bytes=_load_bytes(model, limits),
    )


def has_fast_experts(model: ModelConfig, dtype: str, is_expanded: bool) -> bool:
    """Whether a layer's experts are laid out again: float32, expanded, and small enough together."""
    weights = _FLOAT * model.num_experts * sum(rows * columns for rows, columns in _expert_shapes(model))
    return dtype == "float32" and (is_expanded or model.quantization == "none") and 0 < weights <= MAX_PACKED_BYTES


def half_layout_bytes(rows: int, columns: int, threads: int) -> int:
    """Bytes of all float16 layouts of one weight: for one thread if it is small, for several if there are."""
    has_serial = rows * columns <= SERIAL_WORK
    copies = int(has_serial) + int(threads > 1 or not has_serial)
    padded = -(-rows // PACK_ROWS) * PACK_ROWS * (-(-columns // PACK_DEPTH) * PACK_DEPTH)
    return 2 * copies * padded


def mapped_bytes(hidden_size: int) -> int:
    """Bytes from which the allocator maps a buffer by itself, where it leaves no hole; see `engine.worker.cpu`.

    A mapped page is a page fault, which is little beside the product that fills it if the model is wide: each value
    takes twice the width in operations. Measured at a width of 224: prefills take twice as long where all above 256 KiB
    is mapped, no longer where all above 4 MiB is. At 2880, by the same reckoning, one part in a hundred: not measured.
    """
    return min(_MAX_MAPPED_BYTES, (1 << 30) // max(1, hidden_size))


def slot_table_bytes(model: ModelConfig, block_size: int, max_model_len: int, max_num_seqs: int) -> int:
    """Bytes of the slot tables once a row of full length was there: rows by powers of two, columns by doubling."""
    rows = max(4, 1 << (max_num_seqs - 1).bit_length())
    columns = max(1 + 16 * block_size, 2 * (-(-max_model_len // block_size) * block_size))
    return _num_groups(model) * rows * columns * 8


def _num_groups(model: ModelConfig) -> int:
    counts = [model.layer_windows.count(window) for window in dict.fromkeys(model.layer_windows)]
    size = min(counts, default=1)
    while any(count % size for count in counts):
        size -= 1
    return sum(count // size for count in counts)


def _expert_shapes(model: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """(output rows, input columns) of one expert's two weights."""
    hidden, inter = model.hidden_size, model.intermediate_size
    return (2 * inter, hidden), (hidden, inter)


def _widths(model: ModelConfig) -> tuple[int, int]:
    return model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim


def _packed_bytes(model: ModelConfig, limits: CpuLimits) -> int:
    query, key = _widths(model)
    hidden, exact = model.hidden_size, limits.half_exact
    layer = [(query + 2 * key, hidden, exact.qkv), (hidden, query, exact.out)]
    total = 0
    for rows, columns, is_exact in [*layer * model.num_layers, (model.vocab_size, hidden, exact.head)]:
        if 0 < _FLOAT * rows * columns <= MAX_PACKED_BYTES:
            # What float16 does not hold gets oneDNN's float32 layout; the plain one is column by column already.
            total += half_layout_bytes(rows, columns, limits.threads) if is_exact else _FLOAT * rows * columns
    if has_fast_experts(model, limits.dtype, limits.is_expanded):
        is_exact = exact.experts or model.quantization == "mxfp4"
        for rows, columns in _expert_shapes(model) * (model.num_layers * model.num_experts):
            total += half_layout_bytes(rows, columns, limits.threads) if is_exact else 2 * _FLOAT * rows * columns
        biases = model.num_experts * (2 * model.intermediate_size + hidden)
        total += model.num_layers * _FLOAT * biases
    return total


def _num_primitive_weights(model: ModelConfig, limits: CpuLimits) -> int:
    """Count the shapes of weights that oneDNN multiplies: all in bfloat16; in float32 what float16 does not hold."""
    exact = limits.half_exact
    if not model.num_layers:
        return 0
    if limits.dtype != "float32":
        return 5
    query, key = _widths(model)
    hidden = model.hidden_size
    dense = ((query + 2 * key, exact.qkv), (query, exact.out), (model.vocab_size, exact.head))
    count = sum(not is_exact and 0 < _FLOAT * rows * hidden <= MAX_PACKED_BYTES for rows, is_exact in dense)
    if has_fast_experts(model, limits.dtype, limits.is_expanded) and model.quantization != "mxfp4":
        count += 0 if exact.experts else 2
    return count


def _gathered_bytes(model: ModelConfig, limits: CpuLimits) -> int:
    """Keys and values of one row of full length, and each layer's bias with its sinks: both made for twice that."""
    _, key = _widths(model)
    biases = sum(min(limits.max_model_len, window or limits.max_model_len) + 1 for window in model.layer_windows)
    gathered = 2 * key * 2 * (limits.max_model_len + 1) if model.layer_windows else 0
    return _FLOAT * (gathered + 2 * model.num_attention_heads * biases)


def _activation_bytes(model: ModelConfig, limits: CpuLimits) -> int:
    """The most that is alive at once in a step, of attention, experts or sampling, with what they share; and holes.

    Holes are in the heap alone: among buffers too small to be mapped.
    """
    unit = _FLOAT if limits.dtype == "float32" else 2
    tokens = limits.max_num_batched_tokens
    rotation = tokens * model.head_dim * _FLOAT
    stream = 2 * tokens * model.hidden_size * unit
    layers = max(_attention_bytes(model, limits, unit), _experts_bytes(model, limits, unit)) if model.num_layers else 0
    logits = limits.max_num_seqs * (_DRAWING * model.vocab_size + 2 * unit * model.hidden_size)
    alive = max(rotation + stream + layers + _mask_bytes(model, limits), logits)
    return alive + int(_HOLES * min(alive, _ALIVE * mapped_bytes(model.hidden_size)))


def _attention_bytes(model: ModelConfig, limits: CpuLimits, unit: int) -> int:
    """Projections of all tokens; then one row of full length whose last tokens are a whole step, or many rows."""
    query, key = _widths(model)
    tokens, context = limits.max_num_batched_tokens, limits.max_model_len
    kv_unit = _FLOAT if limits.kv_dtype == "float32" else 2
    projected = tokens * unit * (query + 2 * key + query)
    row = min(tokens, context)
    gathered = context * 2 * key * (kv_unit + (_FLOAT if limits.dtype != limits.kv_dtype else 0))
    if limits.dtype == "float32":
        prefill = gathered + row * query * unit
        kept = limits.max_num_seqs * context * 2 * key * _FLOAT if limits.max_num_seqs > SINGLE_ROWS else 0
        per_value = 2 + (3 * model.num_attention_heads + 4) / max(1, 2 * key)
        return projected + max(prefill, int(min(kept, MAX_GATHERED_BYTES) * per_value))
    # The reference: keys and values repeated for every head, then scores, masked, joined by sinks, and their softmax.
    repeated = context * query * 2 * _FLOAT + context * 2 * key * kv_unit
    return projected + repeated + 3 * model.num_attention_heads * row * context * _FLOAT


def _mask_bytes(model: ModelConfig, limits: CpuLimits) -> int:
    """Masks of a prefill's tiles, alive for the whole step: one band of full layers, a tile each of sliding ones."""
    if limits.dtype != "float32":
        return 0
    tokens = limits.max_num_batched_tokens
    total = 0
    for window in dict.fromkeys(model.layer_windows):
        if window is None:
            total += QUERY_TILE * limits.max_model_len * _FLOAT
        else:
            total += tokens * min(limits.max_model_len, window + QUERY_TILE) * _FLOAT
    return total


def _experts_bytes(model: ModelConfig, limits: CpuLimits, unit: int) -> int:
    hidden, inter = model.hidden_size, model.intermediate_size
    pairs = limits.max_num_batched_tokens * model.num_experts_per_token
    if has_fast_experts(model, limits.dtype, limits.is_expanded):
        # Rows by expert, then gate_up or what follows it: parts, and the same joined.
        tiled = min(pairs, TILE_TOKENS * model.num_experts_per_token)
        return _FLOAT * tiled * (hidden + max(4 * inter, 3 * inter + 2 * hidden))
    # One expert after the other: twice an even share of the tokens go to the busiest.
    busiest = min(limits.max_num_batched_tokens, -(-2 * pairs // max(1, model.num_experts)))
    outputs = pairs * hidden * _FLOAT
    tokens = unit * busiest * (8 * inter + hidden)
    if limits.is_expanded or model.quantization == "none":
        return outputs + tokens
    # The weights of the last expert are still there while those of the next are expanded.
    gate_up, down = (rows * columns for rows, columns in _expert_shapes(model))
    previous = unit * (gate_up + down) + unit * busiest * (inter + hidden)
    return outputs + max(previous + _EXPANSION * gate_up, unit * (gate_up + down) + tokens)


def _load_bytes(model: ModelConfig, limits: CpuLimits) -> int:
    """What loading takes beyond the weights at its worst: lm_head in two layouts, or an expert expanded."""
    unit = _FLOAT if limits.dtype == "float32" else 2
    head = unit * model.vocab_size * model.hidden_size
    if model.quantization != "mxfp4" or not limits.is_expanded or not model.num_layers:
        return head
    gate_up, down = (rows * columns for rows, columns in _expert_shapes(model))
    packed = model.num_experts * (gate_up + down) * 17 // MXFP4_BLOCK
    # Embedding and lm_head come after the layers.
    later = head * (1 if model.tie_word_embeddings else 2)
    return max(head, packed + (_EXPANSION + unit) * gate_up - later)
