"""What groups need and how they are found, against brute force over single tokens."""

from __future__ import annotations

import random

import pytest
from tests.unit.engine.test_kv_manager import filled, manager_of, request

from kvferry.engine.kv_manager import longest_hit
from kvferry.types import AttentionKind, GroupInfo

SEED = 7


def group_of(window: int | None, block_tokens: int = 4, group_id: int = 0) -> GroupInfo:
    kind = AttentionKind.FULL if window is None else AttentionKind.SLIDING_WINDOW
    return GroupInfo(group_id, ("layer",), block_tokens, kind, window)


def blocks_read(window: int | None, first_token: int, block_tokens: int) -> set[int]:
    """Blocks with tokens before `first_token` that it or a later token sees."""
    seen = range(0 if window is None else max(0, first_token - window + 1), first_token)
    return {token // block_tokens for token in seen}


@pytest.mark.parametrize("window", [None, 1, 2, 4, 5, 6, 16, 17, 40])
@pytest.mark.parametrize("block_tokens", [1, 4, 16])
def test_needed_blocks_are_those_that_later_tokens_see(window: int | None, block_tokens: int) -> None:
    group = group_of(window, block_tokens)
    for num_tokens in range(100):
        read = blocks_read(window, num_tokens, block_tokens)
        first = group.first_needed_block(num_tokens)
        assert read == set(range(first, -(-num_tokens // block_tokens))) or not read
        assert not read or min(read) == first


@pytest.mark.parametrize("window", [None, 1, 4, 5, 17])
@pytest.mark.parametrize("step_tokens", [1, 3, 16, 50])
def test_no_way_of_stepping_holds_more_than_the_most(window: int | None, step_tokens: int) -> None:
    rng = random.Random(SEED)
    group, num_tokens = group_of(window), 90
    for num_present in range(0, num_tokens, 7):
        most = group.most_blocks(num_present, num_tokens, step_tokens)
        at, held = num_present, 0
        while at < num_tokens:
            after = min(num_tokens, at + rng.randint(1, step_tokens))
            held = max(held, -(-after // 4) - group.first_needed_block(at))
            at = after
        assert held <= most
        assert most <= -(-num_tokens // 4)


def test_longest_hit_is_that_of_trying_all() -> None:
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    num_hits = 0
    for _ in range(3000):
        windows = rng.choices([None, 2, 4, 5, 9, 30], k=rng.randint(1, 4))
        groups = [group_of(window, group_id=i) for i, window in enumerate(windows)]
        num_blocks, share = rng.randint(0, 9), rng.choice([0.5, 0.9, 0.97])
        cached = {(i, b) for i in range(len(groups)) for b in range(num_blocks) if rng.random() < share}
        good = [
            num
            for num in range(num_blocks + 1)
            if all((i, b) in cached for i, window in enumerate(windows) for b in blocks_read(window, num * 4, 4))
        ]
        assert longest_hit(groups, num_blocks, lambda group, b, cached=cached: (group, b) in cached) == max(good)
        num_hits += max(good) > 0
    assert num_hits > 500


def test_a_window_group_gives_back_what_it_left() -> None:
    manager = manager_of(40, 6)
    made = filled(manager, "a", list(range(30)))
    num_free = manager.block_pool.get_num_free_blocks()
    manager.free_unneeded("a", 30)  # token 30 sees 25 to 29, which begin in block 6
    assert [bool(block) for block in manager.get_block_ids("a")[1]] == [False] * 6 + [True] * 2
    assert all(manager.get_block_ids("a")[0])
    assert manager.block_pool.get_num_free_blocks() == num_free + 6
    manager.free_unneeded("a", 30)
    manager.check_integrity()
    assert manager.can_continue("a", 30)
    assert manager.can_continue("a", 29)
    assert not manager.can_continue("a", 28)
    assert not manager.can_continue("a", 0)
    assert manager.has_freed("a")
    # What left the window can still be found, so the same prompt hits again.
    assert manager.get_computed_blocks(request("b", made.all_token_ids)).get_block_ids()[1][:5] == [0] * 5
    manager.free("a")
    manager.check_integrity()
    assert manager.block_pool.get_num_free_blocks() == 39


def test_a_start_behind_a_load_takes_no_more_of_the_hits_than_it_needs() -> None:
    manager = manager_of(60, 6)
    filled(manager, "a", list(range(40)))
    later = request("b", list(range(40)) + [7] * 20)
    hit = manager.get_computed_blocks(later)
    assert [len(table) for table in hit.blocks] == [10, 10]
    manager.begin(later, hit, 56)  # 40 were found, 16 are loaded behind them
    manager.allocate(later, 56)
    full, window = manager.get_block_ids("b")
    assert full[:10] == manager.get_block_ids("a")[0]
    assert [bool(block) for block in window] == [False] * 12 + [True] * 2
    manager.check_integrity()
