"""Blocks and prefixes: who owns a block, what is found again, what is evicted first, what the checks catch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from core_support import Loop, make_request

from engine.core import prefix_cache
from engine.core.block_pool import BlockPool
from engine.core.integrity import IntegrityError, check_pool
from engine.core.request import Request


def prompt(length: int, first: int = 0) -> list[int]:
    return [(first + i) % 10 for i in range(length)]


def serve(loop: Loop, name: str, tokens: list[int], max_tokens: int = 2, salt: str = "") -> int:
    """Run one request to its end; returns how many prompt tokens were found in the cache."""
    loop.add(make_request(name, tokens, max_tokens, salt=salt))
    loop.run()
    loop.check_outputs()
    found = loop.outputs[name][0].num_cached_tokens
    assert found is not None
    assert all(output.num_cached_tokens is None for output in loop.outputs[name][1:])
    return found


def running(loop: Loop, name: str) -> Request:
    return loop.scheduler._requests[name]


def test_pool_hands_out_runs_and_returns_none_when_short() -> None:
    pool = BlockPool(6, 1)
    assert pool.take(3) == [1, 2, 3]
    assert pool.take(3) is None
    assert pool.take(0) == []
    assert (pool.num_free, pool.num_used) == (2, 3)
    assert pool.take(2) == [4, 5]
    assert pool.take(1) is None
    check_pool(pool)


def test_pool_evicts_the_oldest_cached_block_and_free_ones_first() -> None:
    pool = BlockPool(5, 1)
    blocks = pool.take(4)
    assert blocks is not None
    for block in blocks[:3]:
        pool.register(0, block, bytes([block]), b"tokens")
    for block in (2, 1, 4, 3):
        pool.release(block)
    assert pool.num_cached == 3
    assert pool.take(1) == [4], "nothing worth keeping was in it"
    assert pool.take(1) == [2], "the oldest"
    assert list(pool.index[0].values()) == [1, 3]
    pool.share(1)
    assert pool.take(2) is None
    check_pool(pool)


def test_pool_keeps_the_first_block_of_a_key() -> None:
    pool = BlockPool(4, 2)
    assert pool.take(3) == [1, 2, 3]
    pool.register(0, 1, b"key", b"tokens")
    pool.register(0, 2, b"key", b"tokens")
    pool.register(1, 3, b"key", b"tokens")
    assert pool.index == [{b"key": 1}, {b"key": 3}]
    pool.release(2)
    assert pool.num_cached == 0, "the twin stays private and is free when released"


def test_tails_are_evicted_before_prefixes() -> None:
    loop = Loop(num_blocks=9, windows=(None,), max_num_batched_tokens=64)
    assert serve(loop, "a", prompt(20)) == 0
    assert serve(loop, "b", prompt(20, 5)) == 0
    # Of eight usable blocks "b" took three that were free and the last three of the five that "a" had filled.
    assert serve(loop, "c", prompt(20)) == 8


def test_hit_leaves_the_last_token_to_compute() -> None:
    loop = Loop(windows=(None,))
    assert serve(loop, "a", prompt(16)) == 0
    assert serve(loop, "b", prompt(16)) == 12
    assert serve(loop, "c", prompt(17)) == 16
    assert serve(loop, "d", prompt(15)) == 12


def test_outputs_are_found_as_prefix_of_the_next_turn() -> None:
    loop = Loop(windows=(8, None))
    serve(loop, "turn 1", prompt(10), 9)
    assert serve(loop, "turn 2", prompt(10) + loop.tokens("turn 1") + [1, 2]) == 16


def test_salt_and_switch_keep_prefixes_apart() -> None:
    loop = Loop(windows=(None,))
    assert serve(loop, "a", prompt(16), salt="x") == 0
    assert serve(loop, "b", prompt(16), salt="y") == 0
    assert serve(loop, "c", prompt(16)) == 0
    assert serve(loop, "d", prompt(16), salt="x") == 12
    loop = Loop(windows=(None,), enable_prefix_caching=False)
    assert serve(loop, "a", prompt(16)) == serve(loop, "b", prompt(16)) == 0
    assert loop.scheduler.stats().num_cached_blocks == 0


def test_equal_hashes_are_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant:
        def __init__(self, data: bytes, digest_size: int) -> None:
            self.size = digest_size

        def digest(self) -> bytes:
            return bytes(self.size)

    monkeypatch.setattr(prefix_cache, "blake2b", Constant)
    loop = Loop(windows=(None,))
    serve(loop, "a", prompt(12))
    assert serve(loop, "b", prompt(12, 5)) == 0
    assert serve(loop, "c", prompt(6)) == 4


def test_sliding_group_holds_its_window_and_no_more() -> None:
    loop = Loop(windows=(8, None), block_size=4, num_blocks=200, max_num_batched_tokens=8)
    loop.add(make_request("a", prompt(30), 30))
    while loop.scheduler.has_unfinished:
        loop.step()
        if loop.scheduler.has_unfinished and running(loop, "a").tables:
            sliding, full = running(loop, "a").tables
            assert len(sliding) == len(full)
            chunk = loop.plans[-1].num_scheduled[0]
            assert sum(block > 0 for block in sliding) <= -(-(8 - 1 + chunk) // 4) + 1
    loop.check_outputs()


def test_sliding_hit_needs_only_the_window_before_it() -> None:
    loop = Loop(windows=(8, None), block_size=4, num_blocks=200, max_num_batched_tokens=64)
    serve(loop, "a", prompt(40))
    pool = loop.scheduler._kv.pool
    # Forget the sliding group's blocks that a hit of 36 tokens does not see: 7 tokens before it are in 2 blocks.
    for key, block in list(pool.index[0].items())[:7]:
        pool.forget(block)
        assert key not in pool.index[0]
    loop.add(make_request("b", prompt(40), 2))
    loop.step()
    admitted = loop.plans[-1].admits[0]
    assert admitted.num_computed_tokens == 36
    assert admitted.block_ids[0][:7] == [0] * 7
    assert all(admitted.block_ids[0][7:])
    assert all(admitted.block_ids[1])
    loop.run()
    loop.check_outputs()


def test_sliding_hit_falls_back_to_an_earlier_run() -> None:
    loop = Loop(windows=(8, None), block_size=4, num_blocks=200, max_num_batched_tokens=64)
    serve(loop, "a", prompt(40))
    pool = loop.scheduler._kv.pool
    pool.forget(list(pool.index[0].values())[5])
    assert serve(loop, "b", prompt(40)) == 36
    for block in list(pool.index[0].values())[-3:]:
        pool.forget(block)
    assert serve(loop, "c", prompt(32)) in (20, 24, 28)
    pool.forget(list(pool.index[1].values())[2])
    assert serve(loop, "d", prompt(40)) == 8, "the full group's third block is gone"


def test_two_sliding_groups_agree_on_one_length() -> None:
    loop = Loop(windows=(9, None, 5), block_size=4, num_blocks=300, max_num_batched_tokens=64)
    serve(loop, "a", prompt(40))
    pool = loop.scheduler._kv.pool
    pool.forget(list(pool.index[0].values())[8])
    pool.forget(list(pool.index[2].values())[7])
    # Group 0 ends before its ninth block, group 2 before its eighth: both agree on seven.
    assert serve(loop, "b", prompt(40)) == 28


def test_requests_of_one_step_do_not_read_what_that_step_writes() -> None:
    loop = Loop(windows=(8, None), max_num_batched_tokens=64)
    loop.add(make_request("a", prompt(20), 4))
    loop.add(make_request("b", prompt(20), 4))
    loop.step()
    assert [row.num_computed_tokens for row in loop.plans[0].admits] == [0, 0]
    loop.add(make_request("c", prompt(20), 4))
    loop.step()
    assert [row.num_computed_tokens for row in loop.plans[1].admits] == [16]
    loop.run()
    loop.check_outputs()


def test_shared_blocks_are_held_by_all_their_readers() -> None:
    loop = Loop(windows=(None,), max_num_batched_tokens=64)
    loop.add(make_request("a", prompt(20), 30))
    loop.step()
    loop.add(make_request("b", prompt(20), 30))
    loop.step()
    a, b = running(loop, "a"), running(loop, "b")
    assert a.tables[0][:4] == b.tables[0][:4]
    assert [loop.scheduler._kv.pool.ref_counts[block] for block in a.tables[0][:5]] == [2, 2, 2, 2, 1]
    loop.scheduler.abort("a")
    loop.run()
    loop.check_outputs(["a"])
    loop.check_idle()


def test_reset_forgets_what_is_cached_and_what_is_in_use() -> None:
    loop = Loop(windows=(8, None), max_num_batched_tokens=64)
    serve(loop, "a", prompt(20))
    loop.add(make_request("b", prompt(20), 20))
    loop.add(make_request("c", prompt(20), 20))
    loop.step()
    loop.scheduler.reset_prefix_cache()
    assert loop.scheduler.stats().num_cached_blocks == 0
    loop.scheduler.check_integrity()
    loop.run()
    loop.check_outputs()
    assert serve(loop, "d", prompt(20)) == 0
    assert serve(loop, "e", prompt(20) + loop.tokens("b")) == 20, (
        "what b computed after follows from what it did before"
    )
    assert serve(loop, "f", prompt(20) + loop.tokens("b")) > 20


def test_waiting_for_room_is_retried_when_a_prefix_appears() -> None:
    loop = Loop(windows=(None,), num_blocks=12, max_num_batched_tokens=64)
    loop.add(make_request("a", prompt(24), 8))
    loop.add(make_request("b", prompt(24), 8))
    loop.step()
    assert len(loop.plans[0].admits) == 1, "eleven blocks do not hold twice six and a reserve"
    loop.step()
    assert loop.plans[1].admits[0].num_computed_tokens == 20
    loop.run()
    loop.check_outputs()


def _null_in_use(loop: Loop) -> None:
    loop.scheduler._kv.pool.ref_counts[0] = 1


def _negative_count(loop: Loop) -> None:
    loop.scheduler._kv.pool.ref_counts[-1] -= 1


def _leaked_block(loop: Loop) -> None:
    running(loop, "a").tables[0].pop()


def _doubly_free(loop: Loop) -> None:
    loop.scheduler._kv.pool._free.append(loop.scheduler._kv.pool._free[0])


def _shared_unhashed(loop: Loop) -> None:
    running(loop, "b").tables[0][-1] = running(loop, "a").tables[0][-1]


def _wrong_tokens(loop: Loop) -> None:
    pool = loop.scheduler._kv.pool
    pool.contents[running(loop, "a").tables[1][0]] = b"other"


def _lost_row(loop: Loop) -> None:
    loop.scheduler._rows._free.pop()


def _computed_ahead(loop: Loop) -> None:
    running(loop, "a").num_computed = running(loop, "a").num_tokens


@pytest.mark.parametrize(
    "corrupt",
    [
        _null_in_use,
        _negative_count,
        _leaked_block,
        _doubly_free,
        _shared_unhashed,
        _wrong_tokens,
        _lost_row,
        _computed_ahead,
    ],
)
def test_integrity_check_sees_corruption(corrupt: Callable[[Loop], None]) -> None:
    loop = Loop(windows=(8, None), max_num_batched_tokens=64)
    loop.add(make_request("a", prompt(20), 9))
    loop.add(make_request("b", prompt(20, 3), 9))
    loop.step()
    loop.scheduler.check_integrity()
    corrupt(loop)
    with pytest.raises(IntegrityError):
        loop.scheduler.check_integrity()
