"""The block pool: reference counts, reuse order, content lookup."""

from __future__ import annotations

import random

import pytest

from kvferry.engine.block_pool import BlockPool
from kvferry.errors import ContractError

HASH = [bytes([i]) * 32 for i in range(50)]


def test_null_block_is_never_handed_out():
    pool = BlockPool(4, 16)
    assert sorted(block.block_id for block in pool.get_new_blocks(3)) == [1, 2, 3]
    with pytest.raises(ContractError):
        pool.get_new_blocks(1)
    pool.touch([pool.null_block])
    pool.free_blocks([pool.null_block])
    pool.check_integrity()


def test_blocks_without_content_are_reused_first_then_oldest():
    pool = BlockPool(6, 16)
    blocks = pool.get_new_blocks(5)
    pool.cache_block(blocks[0], (0, HASH[0]))
    pool.cache_block(blocks[3], (0, HASH[3]))
    pool.free_blocks([blocks[3], blocks[0], blocks[1]])
    assert pool.get_new_blocks(3) == [blocks[1], blocks[3], blocks[0]]
    assert pool.get_cached_block((0, HASH[0])) is None
    pool.check_integrity()


def test_hit_revives_a_free_block_and_pins_count():
    pool = BlockPool(3, 16)
    (block,) = pool.get_new_blocks(1)
    pool.cache_block(block, (0, HASH[0]))
    pool.free_blocks([block])
    pool.touch([block])
    pool.touch([block])
    assert pool.get_num_free_blocks() == 1
    pool.free_blocks([block])
    assert pool.get_num_free_blocks() == 1
    pool.free_blocks([block])
    assert pool.get_num_free_blocks() == 2
    with pytest.raises(ContractError, match="more often"):
        pool.free_blocks([block])
    pool.check_integrity()


def test_first_block_of_a_content_stays_the_one_found():
    pool = BlockPool(4, 16)
    first, second = pool.get_new_blocks(2)
    pool.cache_block(first, (0, HASH[0]))
    pool.cache_block(second, (0, HASH[0]))
    pool.cache_block(second, (1, HASH[0]))
    assert pool.get_cached_block((0, HASH[0])) is first
    assert pool.get_cached_block((1, HASH[0])) is second
    pool.evict_blocks([first.block_id])
    assert pool.get_cached_block((0, HASH[0])) is None
    pool.check_integrity()


def test_reset_only_while_nothing_is_held():
    pool = BlockPool(4, 16)
    (block,) = pool.get_new_blocks(1)
    pool.cache_block(block, (0, HASH[0]))
    assert not pool.reset_prefix_cache()
    assert pool.get_cached_block((0, HASH[0])) is block
    pool.free_blocks([block])
    assert pool.reset_prefix_cache()
    assert pool.get_cached_block((0, HASH[0])) is None
    pool.check_integrity()


@pytest.mark.parametrize("seed", range(5))
def test_random_use_against_a_plain_model(seed):
    print("seed", seed)
    rng = random.Random(seed)
    pool = BlockPool(12, 16)
    held = []  # one entry per reference
    for _ in range(400):
        action = rng.random()
        if action < 0.4 and pool.get_num_free_blocks():
            new = pool.get_new_blocks(rng.randint(1, pool.get_num_free_blocks()))
            assert all(block not in held for block in new)
            held += new
        elif action < 0.6 and held:
            block = rng.choice(held)
            pool.touch([block])
            held.append(block)
        elif action < 0.7 and held:
            pool.cache_block(rng.choice(held), (0, rng.choice(HASH)))
        elif held:
            pool.free_blocks([held.pop(rng.randrange(len(held)))])
        pool.check_integrity([sum(1 for b in held if b.block_id == i) for i in range(12)])
        assert pool.get_num_free_blocks() == 11 - len({b.block_id for b in held})
