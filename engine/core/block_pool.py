"""Ownership of KV blocks: who may write which block, and which freed blocks still hold something worth finding again.

    block 0            the null block: stands in tables for positions nobody reads; never written, never freed
    used   (ref > 0)   in at least one block table; in two only when full and hashed
    cached (ref == 0)  freed but hashed: still findable, oldest first to be evicted
    free   (ref == 0)  nothing in it

Knows: block ids, reference counts, hashes. Refuses to know: requests, windows, what a hash is made of.
Nothing here raises for want of blocks: `take` returns None when short.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

NULL_BLOCK = 0


class BlockPool:
    """Equal blocks shared by all KV groups.

    `num_blocks` counts the null block; `num_groups` is the number of indexes, since equal tokens fill different
    blocks in different groups.
    """

    def __init__(self, num_blocks: int, num_groups: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        # Of hashed blocks. A used block keeps these after `forget_all`, which is how it stays recognisably shared.
        self.hashes: list[bytes | None] = [None] * num_blocks
        self.contents: list[bytes | None] = [None] * num_blocks
        self.groups = [0] * num_blocks
        self.index: list[dict[bytes, int]] = [{} for _ in range(num_groups)]
        # Descending, so that pop() hands out ascending runs.
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that `take` can hand out: the free ones and the cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - len(self._free) - len(self._cached)

    def take(self, count: int) -> list[int] | None:
        """Hand out `count` blocks with one reference each, evicting the oldest cached ones; None when short."""
        free = self._free
        if count == 1 and free:
            block = free.pop()
            self.ref_counts[block] = 1
            return [block]
        if count > len(free) + len(self._cached):
            return None
        blocks = free[-count:][::-1] if count else []
        del free[len(free) - len(blocks) :]
        while len(blocks) < count:
            block, _ = self._cached.popitem(last=False)
            self._unhash(block)
            blocks.append(block)
        for block in blocks:
            self.ref_counts[block] = 1
        return blocks

    def share(self, block: int) -> None:
        """Add a reference to a hashed block found in the index."""
        if not self.ref_counts[block]:
            del self._cached[block]
        self.ref_counts[block] += 1

    def release(self, block: int) -> None:
        """Drop one reference; a hashed block that nobody holds becomes the youngest cached one."""
        left = self.ref_counts[block] - 1
        self.ref_counts[block] = left
        if left:
            return
        key = self.hashes[block]
        if key is None:
            self._free.append(block)
        elif self.index[self.groups[block]].get(key) == block:
            self._cached[block] = None
        else:
            self._unhash(block)
            self._free.append(block)

    def release_tables(self, tables: Sequence[list[int]]) -> None:
        """Drop the references of one request's tables, last blocks first, so that tails are evicted before prefixes.

        All groups together, depth by depth: a prefix is only worth keeping where every group still has it.
        """
        for i in range(len(tables[0]) - 1, -1, -1):
            for table in tables:
                if table[i]:
                    self.release(table[i])
        for table in tables:
            table.clear()

    def register(self, group: int, block: int, key: bytes, content: bytes) -> None:
        """Make a full block findable. The first block of a key stays; a later equal one remains private."""
        index = self.index[group]
        if key in index or self.hashes[block] is not None:
            return
        index[key] = block
        self.hashes[block] = key
        self.contents[block] = content
        self.groups[block] = group

    def forget(self, block: int) -> None:
        """Make a block unfindable, unless somebody holds it."""
        if block in self._cached:
            del self._cached[block]
            self._unhash(block)
            self._free.append(block)

    def forget_all(self) -> None:
        """Make every block unfindable; blocks in use go on serving their holders."""
        for index in self.index:
            index.clear()
        while self._cached:
            block, _ = self._cached.popitem()
            self._unhash(block)
            self._free.append(block)

    def free_blocks(self) -> tuple[list[int], list[int]]:
        """Copy the free and the cached block ids, for checks."""
        return list(self._free), list(self._cached)

    def _unhash(self, block: int) -> None:
        key = self.hashes[block]
        index = self.index[self.groups[block]]
        if key is not None and index.get(key) == block:
            del index[key]
        self.hashes[block] = None
        self.contents[block] = None
