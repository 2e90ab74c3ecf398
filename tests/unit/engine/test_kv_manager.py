"""Block tables and prefix hits, also with several groups."""

from __future__ import annotations

from kvferry.engine.config import SamplingParams
from kvferry.engine.kv_manager import KVManager
from kvferry.engine.request import Request, SampledToken
from kvferry.types import AttentionKind, GroupInfo


def request(name: str, tokens: list[int], salt: str | None = None) -> Request:
    return Request(name, tokens, SamplingParams(), block_size=4, cache_salt=salt)


def manager_of(num_blocks: int, *windows: int, num_groups: int = 1) -> KVManager:
    """Full groups, then one of each window; blocks of 4 tokens, at most 16 tokens in a step."""
    groups = [GroupInfo(i, (f"full{i}",), 4, AttentionKind.FULL) for i in range(num_groups)]
    for window in windows:
        groups.append(GroupInfo(len(groups), (f"w{len(groups)}",), 4, AttentionKind.SLIDING_WINDOW, window))
    return KVManager(num_blocks, groups, enable_prefix_caching=True, max_step_tokens=16)


def filled(manager: KVManager, name: str, tokens: list[int]) -> Request:
    made = request(name, tokens)
    hit = manager.get_computed_blocks(made)
    num_hit = len(hit.blocks[0]) * 4
    assert manager.can_admit(made, hit, num_hit)
    manager.begin(made, hit, num_hit)
    manager.allocate(made, len(tokens))
    manager.cache_blocks(made, len(tokens))
    return made


def test_hashes_name_whole_prefixes_and_salts():
    first, second = request("a", [1, 2, 3, 4, 5, 6, 7, 8]), request("b", [9, 2, 3, 4, 5, 6, 7, 8])
    assert len(first.block_hashes) == 2
    assert not set(first.block_hashes) & set(second.block_hashes)
    assert not set(first.block_hashes) & set(request("c", first.all_token_ids, "salt").block_hashes)
    grown = request("d", [1, 2, 3, 4, 5, 6, 7])
    grown.append_token(SampledToken(8))
    assert grown.block_hashes == first.block_hashes


def test_groups_have_tables_of_their_own_and_hit_together():
    manager = manager_of(20, num_groups=2)
    first = filled(manager, "a", list(range(10)))
    tables = manager.get_block_ids("a")
    assert [len(table) for table in tables] == [3, 3]
    assert len(set(tables[0]) | set(tables[1])) == 6
    second = request("b", list(range(12)))
    hit = manager.get_computed_blocks(second)
    assert hit.get_block_ids() == (tables[0][:2], tables[1][:2])
    assert manager.num_missing_blocks(second, 12) == 6
    manager.begin(second, hit, 8)
    new = manager.allocate(second, 12)
    assert [len(ids) for ids in new] == [1, 1]
    manager.check_integrity()
    manager.block_pool.evict_blocks([tables[1][1]])
    assert [len(ids) for ids in manager.get_computed_blocks(request("c", list(range(12)))).blocks] == [1, 1]
    manager.free("a")
    manager.free("b")
    manager.free("never seen")
    manager.check_integrity()
    assert manager.block_pool.get_num_free_blocks() == 19
    assert first.num_tokens == 10


def test_hits_on_free_blocks_count_as_needed():
    manager = manager_of(5, num_groups=1)
    filled(manager, "a", list(range(8)))
    manager.free("a")
    again = request("b", list(range(16)))
    hit = manager.get_computed_blocks(again)
    assert len(hit.blocks[0]) == 2
    assert manager.can_admit(again, hit, 8)
    assert not manager.can_admit(again, hit, 8, reserved_blocks=1)
    assert not manager.can_admit(request("c", list(range(17))), hit, 8)


def test_tail_is_reused_before_head():
    manager = manager_of(5, num_groups=1)
    first = filled(manager, "a", list(range(16)))
    manager.free("a")
    filled(manager, "b", [100] * 8)
    assert len(manager.get_computed_blocks(request("c", first.all_token_ids)).blocks[0]) == 2


def test_only_proved_full_blocks_are_findable():
    manager = manager_of(9, num_groups=1)
    made = request("a", list(range(12)))
    manager.allocate(made, 12)
    manager.cache_blocks(made, 7)
    assert manager.get_blocks("a").get_unhashed_block_ids() == manager.get_block_ids("a")[0][1:]
    assert manager.first_bad_token("a", set(manager.get_block_ids("a")[0][1:])) == 4
    assert manager.first_bad_token("a", {99}) is None


def test_what_a_connector_takes_out_of_the_prefix_cache_stays_out():
    manager = manager_of(9, num_groups=1)
    first = filled(manager, "a", list(range(8)))
    manager.block_pool.evict_blocks(manager.get_block_ids("a")[0][:1])
    for token in range(8, 12):
        first.append_token(SampledToken(token))
    manager.allocate(first, 12)
    manager.cache_blocks(first, 12)
    assert manager.get_computed_blocks(request("b", list(range(12)))).blocks == ([],)
    hashed = [manager.block_pool.blocks[i].block_hash is not None for i in manager.get_block_ids("a")[0]]
    assert hashed == [False, True, True]


def test_a_bad_block_can_be_found_again_once_it_is_computed_again():
    manager = manager_of(9, num_groups=1)
    first = filled(manager, "a", list(range(12)))
    table = manager.get_block_ids("a")[0]
    manager.block_pool.evict_blocks(table[:2])  # by a connector
    manager.withdraw({table[1]})
    manager.cache_blocks(first, 8)
    hashed = [manager.block_pool.blocks[i].block_hash is not None for i in table]
    assert hashed == [False, True, True]


def test_block_ids_of_some_groups_and_of_none():
    manager = manager_of(9, num_groups=2)
    filled(manager, "a", [1, 2, 3])
    blocks = manager.get_blocks("a")
    first, second = blocks.get_block_ids()
    assert blocks.get_block_ids(True, group_ids=(1,)) == (second,)
    assert blocks.get_block_ids(group_ids=(1, 0)) == (second, first)
    nothing = manager.get_computed_blocks(request("b", [1, 2, 3]))
    assert nothing.get_block_ids() == ([], [])
    assert nothing.get_block_ids(allow_none=True) is None
