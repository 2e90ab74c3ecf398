from __future__ import annotations

import logging
import time
from collections.abc import Callable

import pytest

from kvferry.clock import FakeClock
from kvferry.errors import ConfigError, TierBusy, TierCorrupt, TierUnavailable
from kvferry.offloading.store.tiered import HOST, TieredStore
from kvferry.testing.tiers import BlockingTier, FailingTier, MemoryTier
from kvferry.types import Presence, SlotRef

HOST_HIT, PENDING, TIER, MISS = Presence.HOST, Presence.PENDING, Presence.TIER, Presence.MISS


@pytest.fixture
def make_store(make_arena) -> Callable[..., TieredStore]:
    def make(*tiers, num_slots: int = 4, **settings) -> TieredStore:
        arena = make_arena(num_slots)
        store = TieredStore(arena, tiers, payload_bytes=8192, **settings)
        store.arena = arena
        return store

    return make


# -- host ------------------------------------------------------------------------------------------------------------


def test_reserve_commit_pin_unpin(make_store, kit) -> None:
    store = make_store()
    key = kit.key(1)
    assert store.lookup(key) is MISS
    ref = store.reserve(key)
    assert store.lookup(key) is PENDING
    assert store.reserve(key) is None
    assert store.pin(key) is None
    store.arena.slot_view(ref.slot)[:] = kit.payload(key)
    store.commit(ref, kit.digest(kit.payload(key)), 8192)
    assert store.lookup(key) is HOST_HIT
    assert store.reserve(key) is None
    assert store.promote(key, 8192) is HOST_HIT
    assert store.pin(key) == store.pin(key) == ref
    store.unpin(ref)
    store.unpin(ref)
    store.check_integrity()
    stats = store.stats()
    assert (stats.num_host_chunks, stats.num_host_hits, stats.committed_bytes) == (1, 2, 8192)


def test_abort_gives_the_slot_back_and_is_idempotent(make_store, kit) -> None:
    store = make_store(num_slots=1)
    ref = store.reserve(kit.key(1))
    store.abort(ref)
    store.abort(ref)
    assert store.lookup(kit.key(1)) is MISS
    other = store.reserve(kit.key(2))
    store.abort(ref)
    assert store.lookup(kit.key(2)) is PENDING
    assert (other.slot, other.generation) == (ref.slot, ref.generation + 1)
    store.commit(other, b"d" * 16, 8192)
    store.abort(other)
    assert store.lookup(kit.key(2)) is HOST_HIT


def test_misuse_is_an_error_and_changes_nothing(make_store, kit) -> None:
    store = make_store()
    ref = store.reserve(kit.key(1))
    for bad in (0, 8193):
        with pytest.raises(ValueError, match="do not fit"):
            store.commit(ref, b"d" * 16, bad)
        with pytest.raises(ValueError, match="do not fit"):
            store.promote(kit.key(9), bad)
    with pytest.raises(ValueError, match="not reserved"):
        store.commit(SlotRef(ref.slot, ref.generation + 1), b"d" * 16, 8192)
    with pytest.raises(ValueError, match="not pinned"):
        store.unpin(ref)
    store.commit(ref, b"d" * 16, 8192)
    with pytest.raises(ValueError, match="not reserved"):
        store.commit(ref, b"d" * 16, 8192)
    store.check_integrity()


def test_eviction_takes_the_least_recently_used_that_nobody_holds(make_store, kit) -> None:
    store = make_store(num_slots=3)
    for i in range(3):
        kit.put(store, store.arena, i)
    pinned = store.pin(kit.key(0))
    store.touch([kit.key(1)])
    assert kit.put(store, store.arena, 3)
    assert [store.lookup(kit.key(i)) for i in range(4)] == [HOST_HIT, HOST_HIT, MISS, HOST_HIT]
    also = [store.pin(kit.key(1)), store.pin(kit.key(3))]
    assert store.reserve(kit.key(4)) is None
    assert store.stats().num_refused == 1
    store.unpin(also[0])
    assert kit.put(store, store.arena, 4)
    assert store.lookup(kit.key(1)) is MISS
    assert bytes(store.arena.slot_view(pinned.slot)) == kit.payload(kit.key(0))
    assert store.stats().num_evicted == 2
    store.check_integrity()


def test_the_tail_of_a_prefix_goes_before_its_head(make_store, kit) -> None:
    store = make_store(num_slots=3)
    for i in range(3):
        kit.put(store, store.arena, i)
    store.touch([kit.key(i) for i in range(3)])
    kit.put(store, store.arena, 3)
    assert [store.lookup(kit.key(i)) for i in range(3)] == [HOST_HIT, HOST_HIT, MISS]


def test_a_slot_changes_generation_with_its_key(make_store, kit) -> None:
    store = make_store(num_slots=1)
    kit.put(store, store.arena, 1)
    old = store.pin(kit.key(1))
    store.unpin(old)
    kit.put(store, store.arena, 2)
    new = store.pin(kit.key(2))
    assert new.slot == old.slot
    assert store.arena.generation(old.slot) == new.generation != old.generation
    with pytest.raises(ValueError, match="not pinned"):
        store.unpin(old)


def test_invalidating_what_is_in_use_waits_for_the_users(make_store, kit) -> None:
    store = make_store(num_slots=2)
    kit.put(store, store.arena, 1)
    pinned = store.pin(kit.key(1))
    reserved = store.reserve(kit.key(2))
    for i in (1, 2):
        store.invalidate(kit.key(i), "load failed")
        assert store.lookup(kit.key(i)) is MISS
    assert store.reserve(kit.key(3)) is None  # both slots still in use
    store.commit(reserved, b"d" * 16, 8192)
    assert store.lookup(kit.key(2)) is MISS
    assert kit.put(store, store.arena, 1)  # the key may come back, in the other slot
    store.unpin(pinned)
    assert kit.put(store, store.arena, 3)
    assert store.stats().invalidated == {"load failed": 2}
    store.check_integrity()


def test_scrub_finds_changed_bytes_goes_round_and_leaves_open_slots_alone(make_store, kit, caplog) -> None:
    store = make_store(num_slots=4)
    for i in range(3):
        kit.put(store, store.arena, i)
    store.reserve(kit.key(3))
    assert store.scrub(100) == []
    ref = store.pin(kit.key(1))
    store.unpin(ref)
    store.arena.slot_view(ref.slot)[100] ^= 1
    found = [key for _ in range(3) for key in store.scrub(1)]
    assert found == [kit.key(1)]
    assert store.lookup(kit.key(1)) is MISS
    assert store.lookup(kit.key(3)) is PENDING
    assert kit.key(1).hex() in caplog.text
    assert store.scrub(0) == []
    store.check_integrity()


# -- with tiers ------------------------------------------------------------------------------------------------------


def test_written_through_evicted_promoted(make_store, kit) -> None:
    tier = MemoryTier()
    durable = []
    store = make_store(tier, num_slots=2, on_durable=lambda *ack: durable.append(ack))
    for i in range(4):
        kit.put(store, store.arena, i)
        assert store.flush(60)
    assert durable == [(kit.key(i), kit.digest(kit.payload(kit.key(i))), "memory") for i in range(4)]
    assert store.lookup(kit.key(0)) is TIER
    assert store.pin(kit.key(0)) is None
    assert store.promote(kit.key(0), 8192) is PENDING
    assert store.promote(kit.key(0), 8192) is PENDING
    assert store.lookup(kit.key(0)) is PENDING
    assert store.reserve(kit.key(0)) is None
    store.poll()
    assert store.lookup(kit.key(0)) is HOST_HIT
    for i in range(4):
        assert kit.get(store, store.arena, i) == kit.payload(kit.key(i))
        store.check_integrity()
    assert len(durable) == 4  # what was promoted is not written again
    traffic = store.stats().traffic["memory"]
    assert (traffic.num_stored, traffic.stored_bytes) == (4, 4 * 8192)
    assert traffic.num_loaded >= 4


def test_a_chunk_the_host_has_is_not_copied_when_the_tier_has_it(make_store, kit) -> None:
    tier = MemoryTier()
    tier.chunks[kit.key(1)] = (kit.payload(kit.key(1)), kit.digest(kit.payload(kit.key(1))))
    store = make_store(tier)
    kit.put(store, store.arena, 1)
    assert store.stats().num_backlog == 0
    assert tier.stats().num_queued == 0


def test_a_stuck_tier_costs_no_time_few_slots_and_no_other_tier(make_store, kit) -> None:
    stuck, good = BlockingTier(), MemoryTier()
    store = make_store(stuck, good, num_slots=8)
    started_s = time.monotonic()
    for i in range(100):
        assert kit.put(store, store.arena, i)
        store.poll()
        store.check_integrity()
    stats = store.stats()
    assert store.num_pinned_chunks() <= 4
    assert stats.traffic["blocking"].num_dropped == 100 - 8
    assert stats.num_backlog == 6
    assert len(good.chunks) >= 99
    assert not store.flush(0.05)
    assert time.monotonic() - started_s < 60
    stuck.release()
    assert store.flush(60)
    assert len(stuck.chunks) == 8
    assert store.num_pinned_chunks() == 0


def test_slots_of_writes_under_way_are_not_given_away(make_store, kit) -> None:
    tier = BlockingTier()
    store = make_store(tier, num_slots=2, max_tier_writes=1)
    kit.put(store, store.arena, 0)
    for i in range(1, 5):
        assert kit.put(store, store.arena, i)
    assert store.lookup(kit.key(0)) is HOST_HIT
    tier.release()
    store.flush(60)
    assert sorted(tier.chunks) == sorted([kit.key(0), kit.key(4)])
    assert all(payload == kit.payload(key) for key, (payload, _) in tier.chunks.items())


def test_a_busy_tier_is_fed_later_in_order(make_store, kit) -> None:
    tier = FailingTier(submit_error=TierBusy("full"))
    durable = []
    store = make_store(tier, num_slots=6, on_durable=lambda key, *_: durable.append(key))
    for i in range(4):
        kit.put(store, store.arena, i)
    store.poll()
    assert store.stats().num_backlog == 4
    assert not store.flush(0.02)
    tier.submit_error = None
    assert store.flush(60)
    assert durable == [kit.key(i) for i in range(4)]
    assert store.stats().traffic["failing"].failures == {}


@pytest.mark.parametrize("where", ["submit_error", "store_error"])
def test_a_failed_write_leaves_the_chunk_in_host_and_is_counted(make_store, kit, where: str) -> None:
    tier = FailingTier(**{where: TierUnavailable("disk full")})
    durable = []
    store = make_store(tier, on_durable=lambda *ack: durable.append(ack))
    kit.put(store, store.arena, 1)
    assert store.flush(60)
    assert store.lookup(kit.key(1)) is HOST_HIT
    assert durable == []
    assert store.stats().traffic["failing"].failures == {"store TierUnavailable": 1}
    store.check_integrity()


def test_a_host_copy_that_changed_is_not_written_and_dropped(make_store, kit, caplog) -> None:
    tier = MemoryTier()
    store = make_store(tier)
    kit.put(store, store.arena, 1)
    ref = store.pin(kit.key(1))
    store.arena.slot_view(ref.slot)[5] ^= 1
    store.flush(60)
    assert store.lookup(kit.key(1)) is MISS
    assert tier.chunks == {}
    assert kit.key(1).hex() in caplog.text
    store.unpin(ref)
    store.check_integrity()
    assert store.stats().num_free_slots == 4


def test_a_chunk_that_changed_before_it_was_written_is_dropped_once(make_store, kit) -> None:
    """Its slot was given back twice: KeyError out of `poll`, and the other results of that call were lost."""
    tier = FailingTier(store_error=TierCorrupt("its bytes do not match their digest"))
    store = make_store(tier)
    for i in range(3):
        kit.put(store, store.arena, i)
    assert store.flush(60)
    store.check_integrity()
    assert [store.lookup(kit.key(i)) for i in range(3)] == [MISS, MISS, MISS]
    assert store.stats().num_free_slots == 4
    for i in range(4):
        kit.put(store, store.arena, i)


@pytest.mark.parametrize("error", [TierCorrupt("bad bytes"), TierUnavailable("gone")])
def test_a_failed_promotion_is_a_miss_until_stored_anew(make_store, kit, error) -> None:
    tier = FailingTier(load_error=error)
    store = make_store(tier, num_slots=1)
    for i in (1, 2):
        kit.put(store, store.arena, i)
        store.flush(60)
    assert store.lookup(kit.key(1)) is TIER
    assert kit.get(store, store.arena, 1) is None
    for _ in range(2):
        assert store.lookup(kit.key(1)) is MISS
        assert store.promote(kit.key(1), 8192) is MISS
    assert store.stats().traffic["failing"].failures == {f"load {type(error).__name__}": 1}
    store.check_integrity()
    tier.load_error = None
    for i in (1, 2):
        kit.put(store, store.arena, i)
        store.flush(60)
    assert store.lookup(kit.key(1)) is TIER
    assert kit.get(store, store.arena, 1) == kit.payload(kit.key(1))


def test_a_failed_promotion_falls_to_the_next_tier(make_store, kit) -> None:
    first, second = FailingTier("first", load_error=TierCorrupt("bad")), MemoryTier("second")
    store = make_store(first, second, num_slots=2)
    for i in (1, 2, 3):
        kit.put(store, store.arena, i)
        store.flush(60)
    assert kit.get(store, store.arena, 1) == kit.payload(kit.key(1))
    first.submit_error = TierBusy("full")
    assert kit.get(store, store.arena, 2) == kit.payload(kit.key(2))
    store.check_integrity()


def test_promotion_without_a_free_slot_is_a_miss_that_may_be_repeated(make_store, kit) -> None:
    store = make_store(MemoryTier(), num_slots=1)
    for i in (1, 2):
        kit.put(store, store.arena, i)
        store.flush(60)
    ref = store.pin(kit.key(2))
    assert store.promote(kit.key(1), 8192) is MISS
    assert store.lookup(kit.key(1)) is TIER
    store.unpin(ref)
    assert kit.get(store, store.arena, 1) == kit.payload(kit.key(1))


def test_invalidate_and_clear_reach_every_place_also_while_under_way(make_store, kit) -> None:
    tier = BlockingTier()
    store = make_store(tier, num_slots=4)
    tier.chunks[kit.key(9)] = (kit.payload(kit.key(9)), kit.digest(kit.payload(kit.key(9))))
    for i in range(3):
        kit.put(store, store.arena, i)
    store.promote(kit.key(9), 8192)
    store.invalidate(kit.key(0), "test")
    receipts = store.clear()
    assert [receipt.tier for receipt in receipts] == [HOST, "blocking"]
    assert (receipts[0].num_chunks, receipts[0].payload_bytes) == (3, 2 * 8192)
    tier.release()
    assert store.flush(60)
    assert all(store.lookup(kit.key(i)) is MISS for i in range(10))
    assert store.stats().num_free_slots == 4
    assert tier.chunks == {}
    store.check_integrity()
    assert kit.put(store, store.arena, 0)
    assert store.flush(60)
    assert list(tier.chunks) == [kit.key(0)]


def test_a_disk_below_a_small_arena_end_to_end(make_store, make_disk, kit) -> None:
    disk = make_disk()
    store = make_store(disk, num_slots=2)
    for i in range(20):
        kit.put(store, store.arena, i)
        assert store.flush(60)
    store.close(60)
    store.close(60)
    assert store.lookup(kit.key(0)) is MISS
    store = make_store(make_disk(), num_slots=2)
    for i in range(20):
        assert store.lookup(kit.key(i)) is TIER
        assert kit.get(store, store.arena, i) == kit.payload(kit.key(i))
        store.check_integrity()


def test_a_damaged_file_is_a_logged_miss(make_store, make_disk, kit, tmp_path, caplog) -> None:
    store = make_store(make_disk(), num_slots=1)
    for i in (1, 2):
        kit.put(store, store.arena, i)
        store.flush(60)
    path = next((tmp_path / "disk").rglob(f"{kit.key(1).hex()}.kv"))
    data = bytearray(path.read_bytes())
    data[7777] ^= 8
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert kit.get(store, store.arena, 1) is None
    assert kit.key(1).hex() in caplog.text
    assert store.lookup(kit.key(1)) is MISS
    stats = store.stats()
    assert stats.tiers["fs"].num_corrupt == 1
    assert stats.traffic["fs"].failures == {"load TierCorrupt": 1}
    kit.put(store, store.arena, 1)
    kit.put(store, store.arena, 3)
    assert store.flush(60)


def test_close_with_a_stuck_tier_returns_and_says_what_is_lost(make_store, kit, caplog) -> None:
    store = make_store(BlockingTier(), num_slots=4)
    kit.put(store, store.arena, 1)
    started_s = time.monotonic()
    store.close(0.05)
    assert time.monotonic() - started_s < 60
    assert "1 chunk(s)" in caplog.text
    assert store.reserve(kit.key(2)) is None
    assert store.promote(kit.key(2), 8192) is MISS
    store.check_integrity()


def test_failures_are_logged_once_in_a_while_damage_always(make_store, kit, caplog) -> None:
    clock = FakeClock()
    tier = FailingTier(store_error=TierUnavailable("disk full"))
    store = make_store(tier, clock=clock)
    for i in range(10):
        kit.put(store, store.arena, i)
        store.flush(60)
    assert caplog.text.count("disk full") == 1
    clock.advance(60)
    kit.put(store, store.arena, 11)
    store.flush(60)
    assert caplog.text.count("disk full") == 2


def test_settings_that_cannot_work(make_arena, make_disk, kit) -> None:
    with pytest.raises(ConfigError, match="does not fit a slot"):
        TieredStore(make_arena(), [], payload_bytes=8193)
    with pytest.raises(ConfigError, match="name of its own"):
        TieredStore(make_arena(), [MemoryTier(), MemoryTier()], payload_bytes=8192)
    with pytest.raises(ConfigError, match="'host'"):
        TieredStore(make_arena(), [MemoryTier(HOST)], payload_bytes=8192)
    tier = make_disk(max_bytes=8192 + 4096 + 4096 + 80)
    TieredStore(make_arena(), [tier], payload_bytes=4096)
    for payload_bytes in (8192, lambda key: 4096):
        with pytest.raises(ConfigError, match="smaller than one chunk"):
            TieredStore(make_arena(), [tier], payload_bytes=payload_bytes)
