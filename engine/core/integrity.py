"""What must always be true of the core's books. Run after every test step and whenever the engine is idle.

Knows everything the scheduler's parts know and changes nothing. Costs as much as the pool is large: never per step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from engine.core.block_pool import NULL_BLOCK, BlockPool
from engine.core.kv_cache import KVCache
from engine.core.request import Request, RequestStatus


class IntegrityError(Exception):
    """The books contradict themselves: a fault of the core, with the numbers that disagree."""


def check_pool(pool: BlockPool) -> None:
    """Hold `free + cached + used + null = total`, reference counts, and the index against each other."""
    free, cached = pool.free_blocks()
    _check(len(free) == len(set(free)), "a block is free twice")
    _check(not set(free) & set(cached), "a block is both free and cached")
    _check(NULL_BLOCK not in free and NULL_BLOCK not in cached, "the null block is in a free list")
    _check(pool.ref_counts[NULL_BLOCK] == 0 and pool.hashes[NULL_BLOCK] is None, "the null block is in use")
    used = [block for block, count in enumerate(pool.ref_counts) if count > 0]
    _check(min(pool.ref_counts) >= 0, "a reference count is negative")
    total = len(free) + len(cached) + len(used) + 1
    _check(
        total == pool.num_blocks,
        f"free {len(free)} + cached {len(cached)} + used {len(used)} + null 1 is not {pool.num_blocks}",
    )
    for block in free:
        _check(pool.ref_counts[block] == 0, f"free block {block} is referenced")
        _check(pool.hashes[block] is None and pool.contents[block] is None, f"free block {block} is hashed")
    for block in cached:
        _check(pool.ref_counts[block] == 0, f"cached block {block} is referenced")
        key = pool.hashes[block]
        _check(
            key is not None and pool.index[pool.groups[block]].get(key) == block, f"cached block {block} is unfindable"
        )
    for group, index in enumerate(pool.index):
        for key, block in index.items():
            _check(pool.hashes[block] == key and pool.groups[block] == group, f"the index misplaces block {block}")


def check_tables(kv: KVCache, requests: Sequence[Request]) -> None:
    """Hold block tables against the pool: `requests` are all that may own blocks."""
    holders: Counter[int] = Counter()
    for request in requests:
        if not request.tables:
            continue
        name = request.request_id
        length = len(request.tables[0])
        _check(len(request.tables) == len(kv.windows), f"{name}: {len(request.tables)} tables")
        _check(request.capacity == length * kv.block_size, f"{name}: capacity {request.capacity} of {length} blocks")
        _check(request.num_computed <= request.capacity, f"{name}: computed beyond its blocks")
        full = min(request.num_computed, len(request.token_ids)) // kv.block_size
        for group, (table, window) in enumerate(zip(request.tables, kv.windows, strict=True)):
            start = request.window_starts[group]
            _check(len(table) == length, f"{name}: tables of unequal length")
            _check(not any(table[:start]) and all(table[start:]), f"{name}: group {group} has misplaced null blocks")
            visible = 0 if window is None else max(0, request.num_computed - window + 1) // kv.block_size
            _check(start <= visible, f"{name}: group {group} dropped a block inside its window")
            holders.update(table[start:])
            for i in range(start, length):
                block = table[i]
                if kv.pool.hashes[block] is None:
                    _check(kv.pool.ref_counts[block] == 1, f"block {block} is shared but not hashed")
                    continue
                _check(i < full, f"{name}: block {block} is hashed but not full of final tokens")
                _check(kv.pool.groups[block] == group, f"{name}: block {block} belongs to another group")
                if request.is_hashable:
                    _check(
                        kv.pool.contents[block] == request.block_contents[i]
                        and kv.pool.hashes[block] == request.block_hashes[i],
                        f"{name}: tokens of block {block} differ from its key",
                    )
    found = {block: count for block, count in enumerate(kv.pool.ref_counts) if count}
    _check(found == dict(holders), f"reference counts {found} differ from tables {dict(holders)}")


def check_requests(requests: Sequence[Request], running: Sequence[Request], waiting: Sequence[Request]) -> None:
    """Hold counts, rows and queues against each other."""
    rows = [request.row for request in running]
    _check(len(rows) == len(set(rows)) and min(rows, default=0) >= 0, f"rows {rows} are not distinct")
    orders = [request.order for request in waiting]
    _check(orders == sorted(orders), "the waiting queue is out of order")
    for request in requests:
        name = request.request_id
        _check(not request.status.is_finished, f"{name}: finished but kept")
        _check(len(request.token_ids) <= request.num_tokens <= request.end, f"{name}: token counts")
        _check(request.num_computed < request.num_tokens, f"{name}: computed ahead of its tokens")
        is_waiting = any(request is other for other in waiting)
        _check(
            is_waiting == (request.status != RequestStatus.RUNNING), f"{name}: {request.status!r} in the wrong queue"
        )
        _check((request.row >= 0) == any(request is other for other in running), f"{name}: row {request.row}")
        _check((request.row >= 0) == bool(request.tables), f"{name}: row and blocks are not held together")
        if request.row < 0 and request.status == RequestStatus.RUNNING:
            _check(request.num_tokens == request.end, f"{name}: has no row but is not ending")


def _check(is_true: bool, message: str) -> None:
    if not is_true:
        raise IntegrityError(message)
