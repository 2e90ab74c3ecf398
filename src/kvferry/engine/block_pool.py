"""The pool of KV blocks: who holds which, and which can be found by content.

    free   ref_cnt 0, in the free queue; may still carry a hash (then a hit revives it, else it is reused last)
    held   ref_cnt > 0: in block tables of requests and/or pinned by a connector (`touch`)
    null   block 0: fills positions a request does not own, never handed out, never counted

Queue order: blocks without content first, then least recently freed. A held block is never handed out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvferry.errors import ContractError
from kvferry.types import NULL_BLOCK_ID

BlockKey = tuple[int, bytes]
"""(group id, chain hash at the block's last token)."""


@dataclass(slots=True, eq=False)
class Block:
    """One block id and its state."""

    block_id: int
    ref_cnt: int = 0
    block_hash: BlockKey | None = None
    is_null: bool = False


class BlockPool:
    """All blocks of one engine. Single-threaded: called by the scheduler's thread only."""

    def __init__(self, num_blocks: int, hash_block_size: int) -> None:
        self.hash_block_size = hash_block_size
        self.blocks = [Block(i) for i in range(num_blocks)]
        self.null_block = self.blocks[NULL_BLOCK_ID]
        self.null_block.is_null = True
        self._free = OrderedDict((b.block_id, b) for b in self.blocks if not b.is_null)
        self._cached: dict[BlockKey, Block] = {}
        self.on_removed: Callable[[BlockKey], None] | None = None
        """Called when a content can no longer be found."""

    def get_num_free_blocks(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free)

    def get_new_blocks(self, num_blocks: int) -> list[Block]:
        """Take free blocks; their old content can no longer be found. More than are free is a ContractError."""
        if num_blocks > len(self._free):
            raise ContractError(f"{num_blocks} blocks were asked for, {len(self._free)} are free")
        taken = [self._free.popitem(last=False)[1] for _ in range(num_blocks)]
        for block in taken:
            self._forget(block)
            block.ref_cnt = 1
        return taken

    def touch(self, blocks: Iterable[Block]) -> None:
        """Hold blocks once more (a pin). Each needs one `free_blocks`."""
        for block in blocks:
            if not block.is_null:
                self._free.pop(block.block_id, None)
                block.ref_cnt += 1

    def free_blocks(self, blocks: Iterable[Block]) -> None:
        """Let go of blocks, in the order in which they should be reused. Freeing an unheld block is a ContractError."""
        for block in blocks:
            if block.is_null:
                continue
            if block.ref_cnt <= 0:
                raise ContractError(f"block {block.block_id} is freed more often than it was taken or touched")
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                self._free[block.block_id] = block
                if block.block_hash is None:
                    self._free.move_to_end(block.block_id, last=False)

    def get_cached_block(self, key: BlockKey) -> Block | None:
        """The block that holds this content, or None."""
        return self._cached.get(key)

    def cache_block(self, block: Block, key: BlockKey) -> bool:
        """Let the block be found by its content. False: another block is found by it, and stays so."""
        if block.block_hash is not None or block.is_null or key in self._cached:
            return False
        block.block_hash = key
        self._cached[key] = block
        return True

    def evict_blocks(self, block_ids: Iterable[int]) -> None:
        """Make the content of these blocks unfindable; who holds them keeps them."""
        for block_id in block_ids:
            self._forget(self.blocks[block_id])

    def reset_prefix_cache(self) -> bool:
        """Forget all content. False, and nothing done, while any block is held."""
        if len(self._free) != len(self.blocks) - 1:
            return False
        self.evict_blocks(range(len(self.blocks)))
        return True

    def check_integrity(self, expected_refs: Sequence[int] | None = None) -> None:
        """Assert that every block is in exactly one state; `expected_refs[id]` are holders known to the caller."""
        null = self.null_block
        assert null.block_id == NULL_BLOCK_ID and null.is_null and null.ref_cnt == 0 and null.block_hash is None
        for block in self.blocks:
            assert block.ref_cnt >= 0, f"block {block.block_id}: ref_cnt {block.ref_cnt}"
            is_free = block.block_id in self._free
            assert is_free == (block.ref_cnt == 0 and not block.is_null), f"block {block.block_id}: free and held"
            if block.block_hash is not None:
                assert self._cached.get(block.block_hash) is block, f"block {block.block_id}: hash not its own"
            if expected_refs is not None:
                assert block.ref_cnt >= expected_refs[block.block_id], f"block {block.block_id}: holder without a ref"
        assert all(block.block_hash == key for key, block in self._cached.items())

    def _forget(self, block: Block) -> None:
        if block.block_hash is not None:
            del self._cached[block.block_hash]
            if self.on_removed is not None:
                self.on_removed(block.block_hash)
            block.block_hash = None
