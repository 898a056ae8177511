"""Finding computed prefixes again: a hash chain over full blocks, confirmed by comparing tokens.

    h_0 = H(seed | salt | tokens of block 0)      h_i = H(h_{i-1} | tokens of block i)      H = BLAKE2b-128

The seed is secret and per process, so that no client can aim for a collision; the salt keeps tenants apart, so that
none can probe by timing what another has sent. Only tokens that are final are hashed: never a placeholder.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from engine.core.block_pool import NULL_BLOCK, BlockPool
from engine.core.request import Request

DIGEST_BYTES = 16


class PrefixCache:
    """Looks up and registers full blocks. `windows[g]` is group g's window in tokens, None for full attention."""

    def __init__(self, pool: BlockPool, block_size: int, windows: tuple[int | None, ...], seed: bytes) -> None:
        self._pool = pool
        self._block_size = block_size
        self._seed = seed
        self._full_groups = [g for g, window in enumerate(windows) if window is None]
        # Blocks that a query at a block border still sees: ceil((window - 1) / block_size).
        self._sliding_groups = [(g, -(-(w - 1) // block_size)) for g, w in enumerate(windows) if w is not None]
        self._num_groups = len(windows)

    def find(self, request: Request) -> tuple[int, tuple[list[int], ...]]:
        """Find the longest usable prefix: its length in blocks, and per group its blocks, null where not needed.

        At most `num_tokens - 1` tokens: the last one is always computed, for its logits.
        """
        limit = (request.num_tokens - 1) // self._block_size
        tables: list[list[int]] = [[] for _ in range(self._num_groups)]
        length = limit
        for group in self._full_groups:
            length = self._find_prefix(request, group, length, tables[group])
        # A full group has every shorter prefix too, so only the sliding groups can still disagree.
        agreed = -1
        while agreed != length:
            agreed = length
            for group, run in self._sliding_groups:
                length, tables[group] = self._find_run(request, group, length, run)
        for group in self._full_groups:
            del tables[group][length:]
        return length, tuple(tables)

    def register(self, request: Request) -> None:
        """Hash the blocks of a request that are full of final tokens and planned to be computed."""
        first = request.num_hashed_blocks
        last = min(request.num_computed, len(request.token_ids)) // self._block_size
        if last <= first:
            return
        self._extend_hashes(request, last)
        register = self._pool.register
        for group, table in enumerate(request.tables):
            for i in range(first, last):
                block = table[i]
                if block:
                    register(group, block, request.block_hashes[i], request.block_contents[i])
        request.num_hashed_blocks = last

    def _find_prefix(self, request: Request, group: int, limit: int, table: list[int]) -> int:
        for i in range(limit):
            block = self._lookup(request, group, i)
            if not block:
                return i
            table.append(block)
        return limit

    def _find_run(self, request: Request, group: int, limit: int, run: int) -> tuple[int, list[int]]:
        """Find the rightmost end <= `limit` whose `run` blocks before it (or all, near the start) are there."""
        found: list[int] = []
        end = limit
        for i in range(limit - 1, -1, -1):
            if len(found) == run:
                break
            block = self._lookup(request, group, i)
            if block:
                found.append(block)
            else:
                found.clear()
                end = i
        return end, [NULL_BLOCK] * (end - len(found)) + found[::-1]

    def _lookup(self, request: Request, group: int, i: int) -> int:
        if i >= len(request.block_hashes):
            self._extend_hashes(request, i + 1)
        block = self._pool.index[group].get(request.block_hashes[i], NULL_BLOCK)
        if block and self._pool.contents[block] != request.block_contents[i]:
            return NULL_BLOCK
        return block

    def _extend_hashes(self, request: Request, count: int) -> None:
        size = self._block_size
        hashes = request.block_hashes
        contents = request.block_contents
        parent = hashes[-1] if hashes else self._root(request.source.cache_salt)
        for i in range(len(hashes), count):
            content = array("i", request.token_ids[i * size : i * size + size]).tobytes()
            parent = blake2b(parent + content, digest_size=DIGEST_BYTES).digest()
            hashes.append(parent)
            contents.append(content)

    def _root(self, salt: str) -> bytes:
        return blake2b(self._seed + salt.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()
