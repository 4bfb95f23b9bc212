import pytest

from flexllm.config import CacheConfig
from flexllm.memory.block_pool import BlockPool, NoFreeBlocks
from flexllm.memory.budget import ByteBudget, size_caches


def test_blocks_are_a_run_with_the_lowest_ids():
    pool = BlockPool(8, 16)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(2) == [3, 4]
    pool.free([1, 2])
    assert pool.allocate(3) == [5, 6, 7]  # a run rather than the hole
    assert pool.allocate(1) == [1]
    assert (pool.num_free, pool.num_used) == (1, 7)
    pool.check_integrity()


def test_a_run_goes_on_where_it_ended_while_there_is_room():
    pool = BlockPool(8, 16)
    first = pool.allocate(1, room=3)
    second = pool.allocate(1, room=3)
    assert (first, second) == ([0], [3])
    assert pool.allocate(2, after=0) == [1, 2]
    assert pool.allocate(2) == [6, 7]
    assert pool.allocate(2, after=2) == [4, 5]  # others' earmarks go when nothing else is left
    pool.check_integrity()


def test_extending_is_allocating_one_more_at_the_end():
    pools = [BlockPool(6, 16), BlockPool(6, 16)]
    for pool in pools:
        pool.allocate(1, room=3)
        pool.allocate(1)
    extended, appended = [0], [0]
    for _ in range(4):
        pools[0].extend([extended])
        appended += pools[1].allocate(1, after=appended[-1])
        assert extended == appended
        for pool in pools:
            pool.check_integrity()
    with pytest.raises(NoFreeBlocks):
        pools[0].extend([extended])


def test_earmarks_end_with_the_run_they_follow():
    pool = BlockPool(4, 16)
    blocks = pool.allocate(1, room=4)
    pool.free(blocks)
    assert pool.allocate(2, room=2) == [0, 1]
    assert pool.allocate(2, room=2) == [2, 3]


def test_scattered_blocks_are_better_than_none():
    pool = BlockPool(5, 16)
    pool.allocate(5)
    pool.free([0, 2, 4])
    assert sorted(pool.allocate(3)) == [0, 2, 4]
    pool.check_integrity()


def test_asking_for_too_much_takes_nothing():
    pool = BlockPool(2, 16)
    with pytest.raises(NoFreeBlocks, match="3 blocks asked for, 2 of 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_shared_block_is_free_after_its_last_reference():
    pool = BlockPool(2, 16)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.free(blocks)
    assert pool.num_free == 1
    pool.free(blocks)
    assert pool.num_free == 2
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


def test_blocks_for_rounds_up():
    pool = BlockPool(10, 16)
    assert [pool.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert pool.capacity == 160


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_an_empty_pool_is_refused(num_blocks, block_size):
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(num_blocks, block_size)


def test_budget_keeps_account_of_owners():
    budget = ByteBudget(100)
    assert budget.reserve("a", 60)
    assert not budget.reserve("b", 41)
    assert budget.reserve("a", 40)
    assert (budget.held_by("a"), budget.held_by("b"), budget.free) == (100, 0, 0)
    assert budget.release("a") == 100
    assert budget.release("a") == 0
    assert budget.used == 0
    budget.check_integrity()


def test_caches_are_what_the_config_says():
    assert size_caches(10**9, CacheConfig(num_blocks=7, finetune_bytes=5), 1000, 2048) == (7, 5)
    assert size_caches(10**9, CacheConfig(kv_bytes=160_000, finetune_bytes=5), 1000, 2048) == (10, 5)


def test_caches_share_free_memory_when_the_config_is_silent():
    num_blocks, finetune_bytes = size_caches(10**9, CacheConfig(), 1000, 2048)
    assert num_blocks * 16 * 1000 + finetune_bytes <= 0.7 * 10**9
    assert size_caches(10**12, CacheConfig(), 1000, 2048)[0] == 64 * 2048 // 16  # not more than can be of use


def test_no_room_for_one_block_is_an_error():
    with pytest.raises(ValueError, match="no room for the K/V cache: a block takes 16000 bytes"):
        size_caches(1000, CacheConfig(), 1000, 2048)
