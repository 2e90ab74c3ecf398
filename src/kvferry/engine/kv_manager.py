"""Block tables of requests over the block pool, one table per KV group, and the prefix cache on top."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, overload

from kvferry.engine.block_pool import Block, BlockPool
from kvferry.engine.request import Request

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


class KVManager:
    """Gives requests their blocks. Content is entered in the prefix cache only once it is proved (`cache_blocks`)."""

    def __init__(self, num_blocks: int, block_size: int, num_groups: int, enable_prefix_caching: bool) -> None:
        self.block_pool = BlockPool(num_blocks, block_size)
        self.block_size = block_size
        self.num_groups = num_groups
        self.enable_prefix_caching = enable_prefix_caching
        self._tables: dict[str, tuple[list[Block], ...]] = {}
        self._num_cached: dict[str, int] = {}  # full blocks of each request that have been entered in the prefix cache
        self.on_cached: Callable[[Request, int, int], None] | None = None
        """Called with (request, group, index of the block) when a content can be found from now on."""

    def get_computed_blocks(self, request: Request) -> KVCacheBlocks:
        """The longest cached prefix that leaves one token to compute; pure, nothing is held yet."""
        found: list[tuple[Block, ...]] = []
        if self.enable_prefix_caching and not request.get_skip_reading_prefix_cache():
            for block_hash in request.block_hashes[: (request.num_tokens - 1) // self.block_size]:
                blocks = [self.block_pool.get_cached_block((group, block_hash)) for group in range(self.num_groups)]
                hit = tuple(block for block in blocks if block is not None)
                if len(hit) < self.num_groups:
                    break
                found.append(hit)
        return KVCacheBlocks(tuple([hit[group] for hit in found] for group in range(self.num_groups)))

    def num_missing_blocks(self, request: Request, num_tokens: int) -> int:
        """New blocks, over all groups, that the request needs to hold `num_tokens` tokens."""
        target = -(-num_tokens // self.block_size)
        return sum(max(0, target - len(table)) for table in self._table(request.request_id))

    def can_allocate(
        self, request: Request, num_tokens: int, computed: KVCacheBlocks | None = None, reserved_blocks: int = 0
    ) -> bool:
        """True when `allocate` with the same arguments succeeds and leaves `reserved_blocks` free."""
        needed = self.num_missing_blocks(request, num_tokens) + reserved_blocks
        if computed is not None:
            # Hits on free blocks leave the free queue as well; hits on held ones cost nothing.
            hits = [block for group in computed.blocks for block in group]
            needed -= sum(1 for block in hits if block.ref_cnt > 0)
        return needed <= self.block_pool.get_num_free_blocks()

    def allocate(self, request: Request, num_tokens: int, computed: KVCacheBlocks | None = None) -> BlockIds:
        """Extend the table to hold `num_tokens`, starting a new one with the `computed` hits. Returns the new ids.

        Only after `can_allocate` said yes.
        """
        tables = self._tables.setdefault(request.request_id, tuple([] for _ in range(self.num_groups)))
        if computed is not None:
            assert not any(tables), f"{request.request_id} has blocks already"
            for table, hits in zip(tables, computed.blocks, strict=True):
                self.block_pool.touch(hits)
                table.extend(hits)
        target = -(-num_tokens // self.block_size)
        new_ids = []
        for table in tables:
            new = self.block_pool.get_new_blocks(max(0, target - len(table)))
            table.extend(new)
            new_ids.append([block.block_id for block in new])
        return tuple(new_ids)

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
        return [block for table in tables for block in reversed(table)]

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

    def withdraw(self, bad_block_ids: set[int]) -> None:
        """Make bad blocks unfindable, until they are computed again.

        If one could be found until now, anything may have been computed from it, also by requests long gone: then
        all content is forgotten.
        """
        was_findable = any(self.block_pool.blocks[block_id].block_hash is not None for block_id in bad_block_ids)
        self.block_pool.evict_blocks(range(len(self.block_pool.blocks)) if was_findable else bad_block_ids)
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
            for table in tables:
                ids = [block.block_id for block in table if not block.is_null]
                assert len(ids) == len(set(ids)), "a block stands twice in one table"
        self.block_pool.check_integrity(self._expected_refs(also_held))

    def _expected_refs(self, also_held: Iterable[Block]) -> list[int]:
        """Per block id, the holds of tables and of `also_held`."""
        refs = [0] * len(self.block_pool.blocks)
        tables = (block for tables in self._tables.values() for table in tables for block in table)
        for block in chain(tables, also_held):
            refs[block.block_id] += not block.is_null
        return refs

    def _table(self, request_id: str) -> tuple[list[Block], ...]:
        return self._tables.get(request_id) or tuple([] for _ in range(self.num_groups))
