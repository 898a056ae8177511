"""The KV cache of all requests: one block table per request and group over one pool.

Groups are layers of one kind of attention. All groups have equal blocks, so the tables of a request are equally long;
a sliding group's table starts with null blocks where the window has passed:

    full     [ 7, 8, 9, 12, 15 ]
    sliding  [ 0, 0, 10, 13, 16 ]      blocks 0 and 1 lie wholly below the window

Knows: tables, windows, what a request will need at most. Refuses to know: budgets, queues, who is preempted.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.core.block_pool import NULL_BLOCK, BlockPool
from engine.core.prefix_cache import PrefixCache
from engine.core.request import Request


class KVCache:
    """Block tables over one `BlockPool`. `windows[g]` is group g's window in tokens, None for full attention."""

    def __init__(
        self, *, num_blocks: int, block_size: int, windows: tuple[int | None, ...], prefix_seed: bytes | None
    ) -> None:
        self.block_size = block_size
        self.windows = windows
        self.pool = BlockPool(num_blocks, len(windows))
        self.prefix_cache = None if prefix_seed is None else PrefixCache(self.pool, block_size, windows, prefix_seed)
        self._num_groups = len(windows)
        self._sliding = [(g, w) for g, w in enumerate(windows) if w is not None]

    def peak_blocks(self, num_tokens: int, chunk: int) -> list[int]:
        """Blocks per group that a request holds at most while its first `num_tokens` are computed in such chunks.

        A sliding group holds the window of the chunk's first query, the chunk, and a misaligned block.
        """
        total = -(-num_tokens // self.block_size)
        return [total if w is None else min(total, -(-(w - 1 + chunk) // self.block_size) + 1) for w in self.windows]

    def find_prefix(self, request: Request) -> tuple[int, tuple[list[int], ...]]:
        """Find what the cache holds of a request: length in blocks and per group the blocks. Takes nothing yet."""
        if self.prefix_cache is None:
            return 0, tuple([] for _ in range(self._num_groups))
        return self.prefix_cache.find(request)

    def blocks_to_admit(self, request: Request, prefix: tuple[list[int], ...], chunk: int) -> int:
        """Free blocks that a request needs for all its tokens, given the prefix found: new ones and revived ones."""
        ref_counts = self.pool.ref_counts
        needed = 0
        for peak, table in zip(self.peak_blocks(request.num_tokens, chunk), prefix, strict=True):
            held = [block for block in table if block]
            needed += max(0, peak - len(held)) + sum(not ref_counts[block] for block in held)
        return needed

    def outstanding_blocks(self, request: Request, chunk: int) -> int:
        """Blocks that a running request still lacks for the tokens it has: what admission must leave to it."""
        outstanding = 0
        for g, peak in enumerate(self.peak_blocks(request.num_tokens, chunk)):
            outstanding += max(0, peak - (len(request.tables[g]) - request.window_starts[g]))
        return outstanding

    def admit(self, request: Request, prefix: tuple[list[int], ...], num_prefix_blocks: int) -> None:
        """Give a request the prefix that was found for it."""
        for table in prefix:
            for block in table:
                if block:
                    self.pool.share(block)
        request.tables = prefix
        request.window_starts = [table.count(NULL_BLOCK) for table in prefix]
        request.num_computed = request.capacity = num_prefix_blocks * self.block_size
        request.num_hashed_blocks = num_prefix_blocks
        request.is_hashable = self.prefix_cache is not None

    def extend(self, request: Request, num_tokens: int) -> Sequence[list[int]] | None:
        """Make the tables cover `num_tokens` positions: the new blocks per group, or None when the pool is short.

        What the window has passed is freed first, also when no block is needed or the pool turns out short.
        """
        # Blocks filled by earlier plans become findable before the window may drop them.
        if request.is_hashable and self.prefix_cache is not None:
            self.prefix_cache.register(request)
        tables = request.tables
        pool = self.pool
        for group, window in self._sliding:
            start = request.window_starts[group]
            visible = (request.num_computed - window + 1) // self.block_size
            if visible > start:
                table = tables[group]
                for i in range(start, visible):
                    pool.release(table[i])
                    table[i] = NULL_BLOCK
                request.window_starts[group] = visible
        count = -(-num_tokens // self.block_size) - len(tables[0])
        if count <= 0:
            return ()
        blocks = pool.take(count * self._num_groups)
        if blocks is None:
            return None
        if count == 1:
            added = [[block] for block in blocks]
        else:
            added = [blocks[g * count : (g + 1) * count] for g in range(self._num_groups)]
        for table, ids in zip(tables, added, strict=True):
            table += ids
        request.capacity = len(tables[0]) * self.block_size
        return added

    def register(self, request: Request) -> None:
        """Make the full blocks of a request findable. To be called when the plans that fill them are made."""
        if request.is_hashable and self.prefix_cache is not None:
            self.prefix_cache.register(request)

    def release(self, request: Request) -> None:
        """Take all blocks back; what is full stays findable."""
        if not request.tables:
            return
        self.register(request)
        self.pool.release_tables(request.tables)
        request.tables = ()
        request.capacity = 0
        request.num_computed = 0
        request.num_hashed_blocks = 0

    def forget(self, request: Request) -> None:
        """Make what a request computed or used unfindable, because it cannot be trusted. To be called after `release`.

        Blocks that others hold stay: those will find out by themselves, and forget them then.
        """
        for key in request.block_hashes:
            for index in self.pool.index:
                block = index.get(key)
                if block is not None:
                    self.pool.forget(block)

    def reset_prefix_cache(self, requests: Sequence[Request]) -> None:
        """Forget all prefixes; `requests` are all unfinished ones."""
        self.pool.forget_all()
        for request in requests:
            # What it computed so far, and what follows from that, is never found again; a later admission starts clean.
            request.is_hashable = False
