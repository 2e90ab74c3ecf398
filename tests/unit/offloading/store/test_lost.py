"""Why chunks are not there: every way to go leaves its reason, in bounded memory."""

from __future__ import annotations

import pytest

from kvferry.errors import TierUnavailable
from kvferry.offloading.store.lost import LostKeys
from kvferry.testing.tiers import FailingTier, MemoryTier


def test_only_the_last_losses_are_remembered(kit) -> None:
    lost = LostKeys(max_keys=2)
    assert lost.reason(kit.key(0)) == "never stored"
    lost.note(kit.key(0), "evicted")
    lost.note(kit.key(1), "evicted")
    lost.note(kit.key(0), "corrupt")  # the last one counts, and makes it the youngest
    lost.note(kit.key(2), "evicted")
    assert [lost.reason(kit.key(i)) for i in (0, 2)] == ["corrupt", "evicted"]
    assert "too long ago" in lost.reason(kit.key(1))
    lost.note_all_gone("forgotten at a reset")
    assert lost.reason(kit.key(0)) == "never stored, or forgotten at a reset"


@pytest.fixture
def make_store(make_arena):
    stores = []

    def make(*tiers, num_slots=4):
        from kvferry.offloading.store.tiered import TieredStore

        arena = make_arena(num_slots)
        store = TieredStore(arena, tiers, payload_bytes=8192)
        store.arena = arena
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.close(1)


def test_a_chunk_on_its_way_through_its_life(make_store, kit) -> None:
    store = make_store(MemoryTier(), num_slots=1)
    key = kit.key(0)
    assert store.explain(key) == ("nowhere", "never stored")
    ref = store.reserve(key)
    assert store.explain(key) == ("pending", "being copied into host memory")
    store.abort(ref)
    assert kit.put(store, store.arena, 0)
    assert store.explain(key) == ("host", "in host memory")
    store.flush(5)
    assert kit.put(store, store.arena, 1)
    assert store.explain(key) == ("memory", "in memory, not in host memory")
    store.flush(5)
    store.promote(key, 8192)
    assert store.explain(key) == ("pending", "being read from memory")
    store.flush(5)
    assert store.explain(key)[0] == "host"
    store.clear()
    assert store.explain(key) == ("nowhere", "never stored, or forgotten at a reset")


def test_evicted_invalidated_changed_and_not_stored(make_store, kit) -> None:
    store = make_store(num_slots=2)
    for i in range(4):
        kit.put(store, store.arena, i)
    assert store.explain(kit.key(0)) == ("nowhere", "evicted (host)")
    store.invalidate(kit.key(2), "the user says so")
    assert store.explain(kit.key(2)) == ("nowhere", "invalidated: the user says so")
    ref = store.pin(kit.key(3))
    store.unpin(ref)
    store.arena.slot_view(ref.slot)[0] ^= 1
    assert store.scrub(2) == [kit.key(3)]
    assert store.explain(kit.key(3)) == ("nowhere", "it changed in host memory")
    store.note_missing(kit.key(9), "no room")
    assert store.explain(kit.key(9)) == ("nowhere", "no room")


def test_a_load_that_fails_says_from_where(make_store, kit) -> None:
    tier = FailingTier(load_error=TierUnavailable("gone fishing"))
    store = make_store(tier, num_slots=1)
    kit.put(store, store.arena, 0)
    store.flush(5)
    kit.put(store, store.arena, 1)
    store.flush(5)
    store.promote(kit.key(0), 8192)
    store.flush(5)
    assert store.explain(kit.key(0)) == ("nowhere", "failed to load from failing: TierUnavailable")


def test_what_the_disk_loses_by_itself(make_disk, make_store, kit, tmp_path) -> None:
    disk = make_disk(max_bytes=2 * 12288 + 16384)
    store = make_store(disk, num_slots=1)
    stored = 0
    while disk.stats().num_evicted == 0:
        assert kit.put(store, store.arena, stored)
        assert store.flush(20)
        stored += 1
        assert stored < 20
    assert store.explain(kit.key(0)) == ("nowhere", "evicted (fs)")
    victim = next(i for i in range(stored) if store.explain(kit.key(i))[0] == "fs")
    file = next(f for f in (tmp_path / "disk").rglob(f"*{kit.key(victim).hex()}*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    store.promote(kit.key(victim), 8192)
    assert store.flush(20)
    assert store.explain(kit.key(victim)) == ("nowhere", "corrupt (fs)")
