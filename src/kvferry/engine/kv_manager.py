"""Block tables of requests over the block pool, one table per KV group, and the prefix cache on top.

    tokens         0 ................................. computed
    full group     [b4][b5][b6][b7][b8][b9]
    window group   [ 0][ 0][ 0][ 0][b2][b3]     null blocks, then the tail that the window still reaches

What a group needs is asked of its `GroupInfo`; nulls stand only at the beginning of a table.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, overload

from kvferry.engine.block_pool import Block, BlockPool
from kvferry.engine.request import Request
from kvferry.types import NULL_BLOCK_ID, GroupInfo

BlockIds = tuple[list[int], ...]
"""Block ids per group; index i of a list covers tokens [i * block_size, (i + 1) * block_size)."""


@dataclass(frozen=True, slots=True)
class KVCacheBlocks:
    """Blocks per group, position indexed. What connectors get in `update_state_after_alloc`."""

    blocks: tuple[list[Block], ...]

    @overload
    def get_block_ids(
        self, allow_none: Literal[False] = False, *, group_ids: Sequence[int] | None = None
    ) -> BlockIds: ...

    @overload
    def get_block_ids(self, allow_none: bool, *, group_ids: Sequence[int] | None = None) -> BlockIds | None: ...

    def get_block_ids(self, allow_none: bool = False, *, group_ids: Sequence[int] | None = None) -> BlockIds | None:
        """Block ids per group, of all groups or of some. With `allow_none`, None when none of them has any."""
        groups = self.blocks if group_ids is None else tuple(self.blocks[group] for group in group_ids)
        if allow_none and not any(groups):
            return None
        return tuple([block.block_id for block in group] for group in groups)

    def get_unhashed_block_ids(self) -> list[int]:
        """Ids of the only group's blocks whose content cannot be found yet."""
        return self.get_unhashed_block_ids_all_groups()[0]

    def get_unhashed_block_ids_all_groups(self) -> BlockIds:
        """Ids of blocks whose content cannot be found yet, per group."""
        return tuple([b.block_id for b in group if b.block_hash is None and not b.is_null] for group in self.blocks)


def longest_hit(groups: Sequence[GroupInfo], num: int, has: Callable[[int, int], bool]) -> int:
    """Blocks, at most `num`, of the longest prefix of which every group has all that it needs.

    `has(group id, position)` tells of one block. A full group needs all blocks, a window group those its window still
    reaches. A needed block that is missing is needed by every shorter hit that ends behind it, so the search goes on
    before the first such block, until nobody misses anything.
    """
    while True:
        needed = ((g.group_id, i) for g in groups for i in range(g.first_needed_block(num * g.block_tokens), num))
        missing = next((i for group, i in needed if not has(group, i)), None)
        if missing is None:
            return num
        num = missing


def _num_nulls(table: list[Block]) -> int:
    return bisect(table, False, key=lambda block: not block.is_null)


class KVManager:
    """Gives requests their blocks. Content is entered in the prefix cache only once it is proved (`cache_blocks`)."""

    def __init__(
        self, num_blocks: int, groups: Sequence[GroupInfo], enable_prefix_caching: bool, max_step_tokens: int
    ) -> None:
        """All groups have one block size. No step adds more than `max_step_tokens` tokens to a request."""
        self.block_size = groups[0].block_tokens
        self.block_pool = BlockPool(num_blocks, self.block_size)
        self.groups = tuple(groups)
        self.num_groups = len(groups)
        self.enable_prefix_caching = enable_prefix_caching
        self._max_step_tokens = max_step_tokens
        self._tables: dict[str, tuple[list[Block], ...]] = {}
        self._num_cached: dict[str, int] = {}  # full blocks of each request that have been entered in the prefix cache
        self.on_cached: Callable[[Request, int, int], None] | None = None
        """Called with (request, group, index of the block) when a content can be found from now on."""

    def get_computed_blocks(self, request: Request) -> KVCacheBlocks:
        """The longest cached prefix that leaves one token to compute; pure, nothing is held yet."""
        hashes: list[bytes] = []
        if self.enable_prefix_caching and not request.get_skip_reading_prefix_cache():
            hashes = request.block_hashes[: (request.num_tokens - 1) // self.block_size]
        find = self.block_pool.get_cached_block
        num = longest_hit(self.groups, len(hashes), lambda group, i: find((group, hashes[i])) is not None)
        blocks: list[list[Block]] = []
        for group in self.groups:
            first = group.first_needed_block(num * self.block_size)
            found = [find((group.group_id, block_hash)) for block_hash in hashes[first:num]]
            blocks.append([self.block_pool.null_block] * first + [block for block in found if block is not None])
        return KVCacheBlocks(tuple(blocks))

    def num_missing_blocks(self, request: Request, num_tokens: int) -> int:
        """New blocks, over all groups, that the request's next step up to `num_tokens` tokens takes."""
        target = -(-num_tokens // self.block_size)
        return sum(max(0, target - len(table)) for table in self._table(request.request_id))

    def num_blocks_to_come(self, request: Request) -> int:
        """The most blocks, over all groups, that the request may hold beyond those it has until all its tokens are in.

        A window group takes new blocks while it frees others, so these are fewer than its tokens would fill.
        """
        num_computed, num_tokens = request.num_computed_tokens, request.num_tokens
        return sum(
            max(0, group.most_blocks(num_computed, num_tokens, self._max_step_tokens) - len(table) + _num_nulls(table))
            for group, table in zip(self.groups, self._table(request.request_id), strict=True)
        )

    def can_admit(self, request: Request, computed: KVCacheBlocks, num_present: int, reserved_blocks: int = 0) -> bool:
        """True when a request without blocks fits with all its tokens and leaves `reserved_blocks` free.

        `num_present` tokens need not be computed: the `computed` hits, and what will be loaded behind them.
        """
        needed = reserved_blocks
        for group, hits in zip(self.groups, computed.blocks, strict=True):
            needed += group.most_blocks(num_present, request.num_tokens, self._max_step_tokens)
            # Hits on free blocks leave the free queue as well; hits on held ones cost nothing.
            needed -= sum(block.ref_cnt > 0 for block in hits[group.first_needed_block(num_present) :])
        return needed <= self.block_pool.get_num_free_blocks()

    def can_allocate(self, request: Request, num_tokens: int) -> bool:
        """True when `allocate` with the same arguments succeeds."""
        return self.num_missing_blocks(request, num_tokens) <= self.block_pool.get_num_free_blocks()

    def begin(self, request: Request, computed: KVCacheBlocks, num_present: int) -> None:
        """Start the request's tables with the `computed` hits, as far as they are needed behind `num_present` tokens.

        Only after `can_admit` said yes.
        """
        assert not any(self._table(request.request_id)), f"{request.request_id} has blocks already"
        tables = []
        for group, hits in zip(self.groups, computed.blocks, strict=True):
            first = group.first_needed_block(num_present)
            self.block_pool.touch(hits[first:])
            tables.append([self.block_pool.null_block] * first + hits[first:])
        self._tables[request.request_id] = tuple(tables)

    def allocate(self, request: Request, num_tokens: int) -> BlockIds:
        """Extend the tables to hold `num_tokens`. Returns the new ids. Only after `can_allocate` said yes."""
        tables = self._tables.setdefault(request.request_id, tuple([] for _ in range(self.num_groups)))
        target = -(-num_tokens // self.block_size)
        new_ids = []
        for table in tables:
            new = self.block_pool.get_new_blocks(max(0, target - len(table)))
            table.extend(new)
            new_ids.append([block.block_id for block in new])
        return tuple(new_ids)

    def free_unneeded(self, request_id: str, num_tokens: int) -> None:
        """Free what no token from `num_tokens` on reads: null blocks stand there from now on."""
        for group, table in zip(self.groups, self._table(request_id), strict=True):
            end = min(group.first_needed_block(num_tokens), len(table))
            if end and not table[end - 1].is_null:
                first = _num_nulls(table)
                self.block_pool.free_blocks(table[first:end])
                table[first:end] = [self.block_pool.null_block] * (end - first)

    def can_continue(self, request_id: str, num_tokens: int) -> bool:
        """True when every group still has its blocks for going on (anew) behind the first `num_tokens` tokens."""
        return all(
            _num_nulls(table) <= group.first_needed_block(num_tokens)
            for group, table in zip(self.groups, self._table(request_id), strict=True)
        )

    def has_freed(self, request_id: str) -> bool:
        """True when some of the request's positions have no block of their own (any more)."""
        return any(_num_nulls(table) for table in self._table(request_id))

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """Enter the full blocks among the first `num_tokens` tokens, now proved, in the prefix cache.

        Each block once: what a connector takes out of the cache (`BlockPool.evict_blocks`) stays out.
        """
        if not self.enable_prefix_caching:
            return
        first, end = self._num_cached.get(request.request_id, 0), num_tokens // self.block_size
        for group, table in enumerate(self._table(request.request_id)):
            for index in range(first, end):
                is_new = self.block_pool.cache_block(table[index], (group, request.block_hashes[index]))
                if is_new and self.on_cached is not None:
                    self.on_cached(request, group, index)
        self._num_cached[request.request_id] = max(first, end)

    def get_blocks(self, request_id: str) -> KVCacheBlocks:
        """All blocks of a request (a copy of its table)."""
        return KVCacheBlocks(tuple(list(table) for table in self._table(request_id)))

    def get_block_ids(self, request_id: str) -> BlockIds:
        """All block ids of a request, per group."""
        return self.get_blocks(request_id).get_block_ids()

    def detach(self, request_id: str) -> list[Block]:
        """End the request's table without freeing: the caller now holds the blocks, in the order to free them."""
        tables = self._tables.pop(request_id, ())
        self._num_cached.pop(request_id, None)
        return [block for table in tables for block in reversed(table) if not block.is_null]

    def free(self, request_id: str) -> None:
        """Give the request's blocks back; its last block is reused first, so that prefixes live longest."""
        self.block_pool.free_blocks(self.detach(request_id))

    def first_bad_token(self, request_id: str, bad_block_ids: set[int]) -> int | None:
        """Position of the first token that lies in one of these blocks, or None."""
        return min(
            (
                index * self.block_size
                for table in self._table(request_id)
                for index, block in enumerate(table)
                if block.block_id in bad_block_ids
            ),
            default=None,
        )

    def share_block(self, first_id: str, second_id: str, index: int) -> bool:
        """True when two requests have the same block at a position, in every group."""
        pairs = list(zip(self._table(first_id), self._table(second_id), strict=True))
        return all(index < min(len(a), len(b)) and a[index] is b[index] for a, b in pairs)

    def withdraw(self, bad_block_ids: set[int], *, all_content: bool = False) -> None:
        """Make bad blocks unfindable, until they are computed again.

        If one could be found until now, anything may have been computed from it, also by requests long gone: then
        all content is forgotten, as it is with `all_content`.
        """
        blocks = self.block_pool.blocks
        forget_all = all_content or any(blocks[block_id].block_hash is not None for block_id in bad_block_ids)
        self.block_pool.evict_blocks(range(len(blocks)) if forget_all else bad_block_ids)
        for request_id, num_cached in self._num_cached.items():
            first_bad = self.first_bad_token(request_id, bad_block_ids)
            if first_bad is not None:
                self._num_cached[request_id] = min(num_cached, first_bad // self.block_size)

    def drop_pins(self, also_held: Iterable[Block] = ()) -> int:
        """Let go of every hold on a block beyond those of tables and `also_held`; returns how many there were."""
        pins = [
            block
            for block, expected in zip(self.block_pool.blocks, self._expected_refs(also_held), strict=True)
            for _ in range(block.ref_cnt - expected)
        ]
        self.block_pool.free_blocks(pins)
        return len(pins)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content; False while any block is held."""
        return self.block_pool.reset_prefix_cache()

    def check_integrity(self, also_held: Iterable[Block] = ()) -> None:
        """Assert that tables and pool agree; `also_held` are detached blocks."""
        for tables in self._tables.values():
            assert len(tables) == self.num_groups and len({len(table) for table in tables}) == 1
            for group, table in zip(self.groups, tables, strict=True):
                ids = [block.block_id for block in table[_num_nulls(table) :]]
                assert len(ids) == len(set(ids)), "a block stands twice in one table"
                assert NULL_BLOCK_ID not in ids, "a null block stands behind a real one"
                assert group.window_tokens is not None or len(ids) == len(table), "a full group lacks blocks"
        self._check_owners()
        self.block_pool.check_integrity(self._expected_refs(also_held))

    def _check_owners(self) -> None:
        """Assert that no block belongs to two groups: they overlay each other in memory."""
        seen: set[int] = set()
        for tables in zip(*self._tables.values(), strict=True):
            ids = {block.block_id for block in chain(*tables)} - {NULL_BLOCK_ID}
            assert seen.isdisjoint(ids), "a block stands in tables of two groups"
            seen |= ids

    def _expected_refs(self, also_held: Iterable[Block]) -> list[int]:
        """Per block id, the holds of tables and of `also_held`."""
        refs = [0] * len(self.block_pool.blocks)
        tables = (block for tables in self._tables.values() for table in tables for block in table)
        for block in chain(tables, also_held):
            refs[block.block_id] += not block.is_null
        return refs

    def _table(self, request_id: str) -> tuple[list[Block], ...]:
        return self._tables.get(request_id) or tuple([] for _ in range(self.num_groups))
