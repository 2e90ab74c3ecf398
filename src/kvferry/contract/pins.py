"""Who pinned what: a host's block pool as one connector sees it, so that its pins can be taken back when it is gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any


class PinLedger:
    """A block pool that remembers which blocks were touched through it and not yet freed; else the pool itself."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._pins: Counter[int] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def touch(self, blocks: Iterable[Any]) -> None:
        """Pin blocks once more."""
        blocks = list(blocks)
        self._pool.touch(blocks)
        self._pins.update(block.block_id for block in blocks)

    def free_blocks(self, blocks: Iterable[Any]) -> None:
        """Let go of one pin per block."""
        blocks = list(blocks)
        self._pool.free_blocks(blocks)
        self._pins.subtract(block.block_id for block in blocks)

    def release_all(self) -> int:
        """Let go of all pins that are left; how many. Only when nothing reads or writes those blocks any more."""
        left = [self._pool.blocks[block_id] for block_id in self._pins.elements()]
        self._pool.free_blocks(left)
        self._pins.clear()
        return len(left)


class ManagerView:
    """A host's KV cache manager with a ledger in place of its block pool."""

    def __init__(self, manager: Any, ledger: PinLedger) -> None:
        self._manager = manager
        self.block_pool = ledger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)
