"""KV events of the OffloadingConnector: which chunks came to or went from host memory and each tier below."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from kvferry.contract.identity import KeyMaker
from kvferry.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, BlockRemoved, BlockStored, KVCacheEvent
from kvferry.offloading.store.tiered import HOST, TieredStore
from kvferry.types import StoreKey

_ChunkId = tuple[bytes, int]
"""Chain value and group."""


class ChunkEvents:
    """Tells changes once. A chunk is in a place when every worker's shard of it is.

    Hashes are the keys' chain values (docs/keys.md), so that whoever knows the tokens can compute them.
    """

    def __init__(self, store: TieredStore, keys: KeyMaker, chunk_tokens: int) -> None:
        self._store = store
        self._keys = keys
        self._chunk_tokens = chunk_tokens
        self._told: defaultdict[str, set[_ChunkId]] = defaultdict(set)
        store.track_moves()

    def take(self) -> Iterator[KVCacheEvent]:
        """Changes since the last call. O(chunks that changed)."""
        for place, moved in self._store.take_moved().items():
            told, gone = self._told[place], defaultdict(list)
            for value, group_id in dict.fromkeys(map(_chunk_id, moved)):
                is_there = all(self._store.has(place, shard) for shard in self._keys.shards(value, group_id))
                if is_there and (value, group_id) not in told:
                    told.add((value, group_id))
                    yield self._stored(place, value, group_id)
                elif not is_there and (value, group_id) in told:
                    told.remove((value, group_id))
                    gone[group_id].append(value)
            medium, tier = _medium(place)
            for group_id, values in gone.items():
                yield BlockRemoved(values, medium, group_id, tier)

    def _stored(self, place: str, value: bytes, group_id: int) -> BlockStored:
        medium, tier = _medium(place)
        return BlockStored(
            block_hashes=[value],
            parent_block_hash=None,
            token_ids=[],
            block_size=self._chunk_tokens,
            lora_id=None,
            medium=medium,
            lora_name=None,
            group_idx=group_id,
            ownership=tier,
        )


def _medium(place: str) -> tuple[str, str | None]:
    return (MEDIUM_CPU, None) if place == HOST else (MEDIUM_STORAGE, place)


def _chunk_id(key: StoreKey) -> _ChunkId:
    return key[:32], int.from_bytes(key[32:34], "little")
