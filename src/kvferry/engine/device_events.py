"""KV events of the engine's own blocks."""

from __future__ import annotations

from kvferry.engine.block_pool import BlockKey
from kvferry.engine.request import Request
from kvferry.kv_events import MEDIUM_GPU, BlockRemoved, BlockStored, KVCacheEvent


class DeviceEvents:
    """Collects what comes into the prefix cache and goes from it, in order; runs of one kind become one event.

    An event may grow until it is taken.
    """

    def __init__(self, block_size: int, include_token_ids: bool) -> None:
        self._block_size = block_size
        self._include_token_ids = include_token_ids
        self._events: list[KVCacheEvent] = []

    def stored(self, request: Request, group_id: int, index: int) -> None:
        """Block `index` of the request can be found from now on."""
        block_hash = request.block_hashes[index]
        parent = request.block_hashes[index - 1] if index else None
        tokens: list[int] = []
        if self._include_token_ids:
            tokens = request.all_token_ids[index * self._block_size : (index + 1) * self._block_size]
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockStored) and last.group_idx == group_id and last.block_hashes[-1] == parent:
            last.block_hashes.append(block_hash)
            last.token_ids.extend(tokens)
            return
        self._events.append(
            BlockStored([block_hash], parent, tokens, self._block_size, None, MEDIUM_GPU, None, group_id)
        )

    def removed(self, key: BlockKey) -> None:
        """The block of this content can no longer be found."""
        group_id, block_hash = key
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved) and last.group_idx == group_id:
            last.block_hashes.append(block_hash)
            return
        self._events.append(BlockRemoved([block_hash], MEDIUM_GPU, group_id))

    def take(self) -> list[KVCacheEvent]:
        """All since the last call; not to be changed any more."""
        taken, self._events = self._events, []
        return taken
