"""The host tier's index: which chunk is in which slot of the arena, who holds it, and which one makes room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from kvferry.kv.arena import Arena
from kvferry.offloading.store.policy import EvictionPolicy
from kvferry.types import SlotRef, StoreKey


class ChunkState(Enum):
    """What the bytes in the slot are."""

    COPYING = "copying"  # a worker copies KV into it: reserved, not committed yet
    LOADING = "loading"  # a tier reads into it
    READY = "ready"  # whole and proved


@dataclass(slots=True, eq=False)
class Chunk:
    """A slot in use."""

    key: StoreKey
    ref: SlotRef
    state: ChunkState
    digest: bytes = b""
    payload_bytes: int = 0
    num_pins: int = 0  # of callers who copy out of it
    num_writes: int = 0  # of tiers that read it
    origin: str = ""  # the tier it was read from; empty: a worker copied it in
    is_dropped: bool = False  # no longer found by its key; the slot is freed when nobody uses it

    @property
    def is_idle(self) -> bool:
        """Nobody reads or writes the slot."""
        return self.state is ChunkState.READY and not self.num_pins and not self.num_writes


class HostIndex:
    """Keys and slots of one arena. Single-threaded; no call waits.

    A slot in use is never given away: a dropped chunk vanishes from the index at once, but its slot becomes free only
    when its last user lets go (`release`).
    """

    def __init__(self, arena: Arena, policy: EvictionPolicy[StoreKey], on_evict: Callable[[Chunk], None]) -> None:
        self._arena = arena
        self._policy = policy  # knows exactly the READY chunks
        self._on_evict = on_evict
        self._by_key: dict[StoreKey, Chunk] = {}
        self._by_slot: dict[int, Chunk] = {}
        self._free = list(range(arena.info.num_slots - 1, -1, -1))
        self._scrub_order: Iterator[Chunk] = iter(())

    def get(self, key: StoreKey) -> Chunk | None:
        """The chunk of this key, in whatever state."""
        return self._by_key.get(key)

    def held(self, ref: SlotRef) -> Chunk | None:
        """The chunk this ref stands for (also a dropped one), or None when the slot has moved on."""
        chunk = self._by_slot.get(ref.slot)
        return chunk if chunk is not None and chunk.ref == ref else None

    def acquire(self, key: StoreKey, state: ChunkState) -> Chunk | None:
        """Give `key` a slot, evicting an idle chunk if none is free; None when every slot is in use."""
        assert key not in self._by_key and state is not ChunkState.READY
        if not self._free:
            victim = next(self._policy.victims(self._is_evictable), None)
            if victim is None:
                return None
            chunk = self._by_key[victim]
            self._on_evict(chunk)
            self.drop(chunk)
        slot = self._free.pop()
        chunk = Chunk(key, SlotRef(slot, self._arena.bump(slot)), state)
        self._by_key[key] = self._by_slot[slot] = chunk
        return chunk

    def make_ready(self, chunk: Chunk, digest: bytes, payload_bytes: int) -> None:
        """The bytes are in the slot. A chunk dropped meanwhile is freed instead."""
        chunk.state, chunk.digest, chunk.payload_bytes = ChunkState.READY, digest, payload_bytes
        if chunk.is_dropped:
            self.release(chunk)
        else:
            self._policy.insert(chunk.key)

    def give_up(self, chunk: Chunk) -> None:
        """What was to come into the slot does not come; the slot is free again."""
        self.drop(chunk)
        chunk.state = ChunkState.READY
        self.release(chunk)

    def drop(self, chunk: Chunk) -> None:
        """Forget the key now, free the slot as soon as nobody uses it."""
        if chunk.is_dropped:
            return
        chunk.is_dropped = True
        del self._by_key[chunk.key]
        if chunk.state is ChunkState.READY:
            self._policy.remove(chunk.key)
        self.release(chunk)

    def release(self, chunk: Chunk) -> None:
        """To be called after a user let go: frees the slot of a dropped chunk that nobody uses any more. Idempotent."""
        if chunk.is_dropped and chunk.is_idle and self._by_slot.get(chunk.ref.slot) is chunk:
            del self._by_slot[chunk.ref.slot]
            self._free.append(chunk.ref.slot)

    def touch(self, key: StoreKey) -> None:
        """The chunk was used."""
        self._policy.touch(key)

    def view(self, chunk: Chunk, payload_bytes: int) -> memoryview:
        """The first `payload_bytes` of its slot."""
        return self._arena.slot_view(chunk.ref.slot)[:payload_bytes]

    def chunks(self) -> list[Chunk]:
        """All that can be found by key."""
        return list(self._by_key.values())

    def take_for_scrub(self, max_slots: int) -> list[Chunk]:
        """The next READY chunks of an endless round over the arena."""
        taken: dict[Chunk, None] = {}
        was_restarted = False
        while len(taken) < max_slots:
            chunk = next(self._scrub_order, None)
            if chunk is None:
                if was_restarted:
                    break
                was_restarted = True
                self._scrub_order = iter(self.chunks())
            elif chunk.state is ChunkState.READY and not chunk.is_dropped:
                taken[chunk] = None
        return list(taken)

    @property
    def num_ready(self) -> int:
        """READY chunks that can be found by key."""
        return len(self._policy)

    @property
    def num_pending(self) -> int:
        """Other chunks that can be found by key."""
        return len(self._by_key) - len(self._policy)

    @property
    def num_free(self) -> int:
        """Slots nobody uses."""
        return len(self._free)

    def check_integrity(self) -> None:
        """AssertionError when the books do not add up."""
        slots = [*self._free, *self._by_slot]
        assert sorted(slots) == list(range(self._arena.info.num_slots)), "a slot is lost or used twice"
        found = [chunk for chunk in self._by_slot.values() if not chunk.is_dropped]
        assert set(found) == set(self._by_key.values()), "keys and slots disagree"
        ready = [chunk.key for chunk in found if chunk.state is ChunkState.READY]
        assert len(self._policy) == len(ready), "the policy does not know exactly the ready chunks"
        assert all(key in self._policy for key in ready), "the policy does not know a ready chunk"
        for slot, chunk in self._by_slot.items():
            assert chunk.ref == SlotRef(slot, self._arena.generation(slot)), "a slot in use changed its generation"
            assert chunk.num_pins >= 0 and chunk.num_writes >= 0, "let go more often than held"
            assert not (chunk.is_dropped and chunk.is_idle), "a dropped chunk nobody uses keeps its slot"

    def _is_evictable(self, key: StoreKey) -> bool:
        return self._by_key[key].is_idle
