"""What a CPU rank holds beside weights and KV: second layouts of small weights, and the tables of slots.

Knows: the rules of `kernels.cpu.packing` and `engine.worker.input_batch.SlotTable`, as arithmetic; tests hold the two
together. Refuses to know: which weights a run has used by now; it counts what steady traffic leads to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.config import ModelConfig
from engine.memory import kv_cache_groups

MAX_PACKED_BYTES = 64 << 20
"""Float32 weights beyond this are used as they are; a layer's experts count together."""
SERIAL_WORK = 4 << 20
"""Multiplications up to which a product has a layout for one thread as well."""
PACK_DEPTH, PACK_ROWS = 512, 16
"""FBGEMM's blocks: input columns and output rows of a packed weight are padded to whole ones."""


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes beside weights and KV."""

    packed_bytes: int = 0
    table_bytes: int = 0

    @property
    def total(self) -> int:
        return self.packed_bytes + self.table_bytes


def cpu_held(
    model: ModelConfig,
    *,
    dtype: str,
    is_expanded: bool,
    threads: int,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
) -> Held:
    """Count what a CPU rank holds beside weights and KV.

    Weights are taken to be exact in float16, as trained bfloat16 and MXFP4 ones mostly are; of one that is not,
    float32 copies are made, four times as large.
    """
    packed = sum(packed_bytes(rows, columns, threads) for rows, columns in _packed_weights(model, is_expanded))
    tables = slot_table_bytes(model, block_size, max_model_len, max_num_seqs)
    return Held(packed if dtype == "float32" else 0, tables)


def _packed_weights(model: ModelConfig, is_expanded: bool) -> Iterator[tuple[int, int]]:
    """(output rows, input columns) of every weight that gets a second layout."""
    query, key = model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim
    hidden, inter = model.hidden_size, model.intermediate_size
    layer = [(query + 2 * key, hidden), (hidden, query)]
    experts = [(2 * inter, hidden), (hidden, inter)] * model.num_experts
    if is_expanded and 4 * sum(rows * columns for rows, columns in experts) <= MAX_PACKED_BYTES:
        layer += experts
    single = [(model.vocab_size, hidden)]
    for rows, columns in [*layer * model.num_layers, *single]:
        if 4 * rows * columns <= MAX_PACKED_BYTES:
            yield rows, columns


def packed_bytes(rows: int, columns: int, threads: int) -> int:
    """Bytes of all float16 layouts of one weight: for one thread if it is small, for several if there are."""
    has_serial = rows * columns <= SERIAL_WORK
    copies = int(has_serial) + int(threads > 1 or not has_serial)
    padded = -(-rows // PACK_ROWS) * PACK_ROWS * (-(-columns // PACK_DEPTH) * PACK_DEPTH)
    return 2 * copies * padded


def slot_table_bytes(model: ModelConfig, block_size: int, max_model_len: int, max_num_seqs: int) -> int:
    """Bytes of the slot tables once a row of full length was there: rows by powers of two, columns by doubling."""
    rows = max(4, 1 << (max_num_seqs - 1).bit_length())
    columns = max(1 + 16 * block_size, 2 * (-(-max_model_len // block_size) * block_size))
    return len(kv_cache_groups(model)) * rows * columns * 8
