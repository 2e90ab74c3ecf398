"""The store and the disk tier against plain dicts, under random orders of calls. Hypothesis prints the failing one."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

import xxhash
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvferry.clock import FakeClock
from kvferry.errors import TierBusy, TierError, TierUnavailable
from kvferry.kv.arena import Arena
from kvferry.offloading.store.tier import TierJob
from kvferry.offloading.store.tiered import TieredStore
from kvferry.offloading.tiers.disk import DiskTier
from kvferry.testing.tiers import BlockingTier, FailingTier
from kvferry.types import Namespace, Presence, SlotRef, StoreKey

KEYS = [StoreKey(hashlib.sha256(b"%d" % i).digest() + bytes(4)) for i in range(6)]
PAYLOAD_BYTES = 4096
seldom = strategies.sampled_from([False, False, False, False, False, True])
keys = strategies.sampled_from(KEYS)
BOUNDED = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def payload_of(key: bytes) -> bytes:
    return hashlib.shake_128(key).digest(PAYLOAD_BYTES)


def digest_of(data: bytes) -> bytes:
    return xxhash.xxh3_128(data).digest()


class StoreMachine(RuleBasedStateMachine):
    """Three slots over a slow tier and one that fails at times."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = FakeClock()
        self.reserved: dict[StoreKey, SlotRef] = {}
        self.pinned: list[tuple[StoreKey, SlotRef]] = []
        self.allowed: set[StoreKey] = set()  # committed and not invalidated since: may be found
        self.durable: set[tuple[StoreKey, str]] = set()  # acknowledged, not removed or damaged since: must be found
        self.open({}, {})

    def open(self, slow_chunks: dict, flaky_chunks: dict) -> None:
        self.arena = Arena.create(engine_id="model", num_slots=3, slot_bytes=PAYLOAD_BYTES, directory=self.folder)
        self.slow = BlockingTier("slow", block_s=1.0, clock=self.clock)
        self.flaky = FailingTier("flaky")
        self.slow.chunks, self.flaky.chunks = slow_chunks, flaky_chunks
        self.store = TieredStore(
            self.arena,
            [self.slow, self.flaky],
            payload_bytes=PAYLOAD_BYTES,
            clock=self.clock,
            on_durable=self.acknowledge,
        )

    def acknowledge(self, key: StoreKey, digest: bytes, tier: str) -> None:
        assert digest == digest_of(payload_of(key))
        self.durable.add((key, tier))

    def forget(self, key: StoreKey) -> None:
        self.allowed.discard(key)
        self.durable -= {(key, "slow"), (key, "flaky")}

    @rule(key=keys)
    def reserve(self, key: StoreKey) -> None:
        before = self.store.lookup(key)
        ref = self.store.reserve(key)
        if before in (Presence.HOST, Presence.PENDING):
            assert ref is None
        if ref is not None:
            assert ref.slot not in [held.slot for _, held in self.pinned]
            assert ref.slot not in [held.slot for held in self.reserved.values()]
            self.reserved[key] = ref

    @precondition(lambda self: self.reserved)
    @rule(data=strategies.data(), is_kept=strategies.booleans())
    def end_reservation(self, data, is_kept: bool) -> None:
        key = data.draw(strategies.sampled_from(sorted(self.reserved)))
        ref = self.reserved.pop(key)
        if is_kept:
            self.arena.slot_view(ref.slot)[:] = payload_of(key)
            self.store.commit(ref, digest_of(payload_of(key)), PAYLOAD_BYTES)
            self.allowed.add(key)
            assert self.store.lookup(key) is Presence.HOST
        else:
            self.store.abort(ref)

    @rule(chosen=strategies.lists(keys, min_size=1, max_size=3), seconds=strategies.sampled_from([0.0, 2.0]))
    def save(self, chosen: list[StoreKey], seconds: float) -> None:
        for key in chosen:
            if (ref := self.store.reserve(key)) is not None:
                self.arena.slot_view(ref.slot)[:] = payload_of(key)
                self.store.commit(ref, digest_of(payload_of(key)), PAYLOAD_BYTES)
                self.allowed.add(key)
        self.poll(seconds)

    @rule(key=keys)
    def fetch(self, key: StoreKey) -> None:
        if self.store.promote(key, PAYLOAD_BYTES) is Presence.PENDING:
            self.poll(2.0)
            self.poll(2.0)
            assert key in self.reserved or self.store.lookup(key) is not Presence.PENDING

    @rule(key=keys)
    def pin(self, key: StoreKey) -> None:
        is_host = self.store.lookup(key) is Presence.HOST
        ref = self.store.pin(key)
        assert (ref is not None) == is_host
        if ref is not None:
            self.pinned.append((key, ref))

    @precondition(lambda self: self.pinned)
    @rule(data=strategies.data())
    def unpin(self, data) -> None:
        self.store.unpin(self.pinned.pop(data.draw(strategies.integers(0, len(self.pinned) - 1)))[1])

    @rule(key=keys)
    def promote(self, key: StoreKey) -> None:
        before = self.store.lookup(key)
        presence = self.store.promote(key, PAYLOAD_BYTES)
        assert presence is not Presence.TIER
        if before is not Presence.TIER:
            assert presence is before
        elif presence is Presence.PENDING:
            assert self.store.lookup(key) is Presence.PENDING

    @rule(seconds=strategies.sampled_from([0.0, 0.5, 2.0]))
    def poll(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.store.poll()

    @rule(chosen=strategies.lists(keys, unique=True))
    def touch(self, chosen: list[StoreKey]) -> None:
        self.store.touch(chosen)

    @rule(key=keys)
    def invalidate(self, key: StoreKey) -> None:
        self.store.invalidate(key, "test")
        self.reserved_is_void(key)
        self.forget(key)
        assert self.store.lookup(key) is Presence.MISS

    def reserved_is_void(self, key: StoreKey) -> None:
        if key in self.reserved:
            ref = self.reserved.pop(key)
            self.store.commit(ref, b"d" * 16, PAYLOAD_BYTES)  # the worker's late answer

    @rule(is_sure=seldom)
    def clear(self, is_sure: bool) -> None:
        if not is_sure:
            return
        self.store.clear()
        for key in KEYS:
            self.reserved_is_void(key)
            self.forget(key)
            assert self.store.lookup(key) is Presence.MISS

    @rule(error=strategies.sampled_from([None, TierBusy("busy"), TierUnavailable("gone")]), where=strategies.booleans())
    def let_fail(self, error: TierError | None, where: bool) -> None:
        self.flaky.submit_error = error if where else None
        self.flaky.store_error = None if where else error

    @rule(key=keys)
    def damage(self, key: StoreKey) -> None:
        if key in self.slow.chunks:
            data, digest = self.slow.chunks[key]
            self.slow.chunks[key] = (b"x" + data[1:], digest)
            self.durable.discard((key, "slow"))

    @rule()
    def scrub(self) -> None:
        assert self.store.scrub(2) == []

    @rule(is_sure=seldom)
    def restart(self, is_sure: bool) -> None:
        """All that was in memory is gone, as after a kill."""
        if not is_sure:
            return
        self.arena.close()
        self.reserved.clear()
        self.pinned.clear()
        self.open(self.slow.chunks, self.flaky.chunks)

    @invariant()
    def books_add_up(self) -> None:
        self.store.check_integrity()
        stats = self.store.stats()
        assert stats.num_free_slots + stats.num_host_chunks + stats.num_pending_chunks <= 3

    @invariant()
    def nothing_lies_and_nothing_acknowledged_is_lost(self) -> None:
        for key in KEYS:
            presence = self.store.lookup(key)
            assert presence is self.store.lookup(key)
            if key in self.reserved:
                assert presence is Presence.PENDING
            elif presence is not Presence.MISS:
                assert key in self.allowed
            elif (key, "slow") in self.durable:
                raise AssertionError("an acknowledged chunk is a miss")
        for key, ref in self.pinned:
            assert bytes(self.arena.slot_view(ref.slot)) == payload_of(key)
            assert self.arena.generation(ref.slot) == ref.generation

    def teardown(self) -> None:
        self.arena.close()
        shutil.rmtree(self.folder)


class DiskMachine(RuleBasedStateMachine):
    """The disk tier without quota is a dict that survives restarts; damage is a miss."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.model: dict[StoreKey, bytes] = {}
        self.next_id = 0
        self.tier = self.open()

    def open(self) -> DiskTier:
        return DiskTier(self.folder, Namespace("00", {}), num_threads=1)

    @rule()
    def restart(self) -> None:
        self.tier.close()
        self.tier = self.open()

    def run(self, submit, key: StoreKey, buffer: bytearray, digest: bytes | None):
        self.next_id += 1
        submit(TierJob(self.next_id, key, memoryview(buffer), digest))
        assert self.tier.drain(20)
        (result,) = self.tier.poll()
        assert (result.job_id, result.key) == (self.next_id, key)
        return result

    @rule(key=keys, version=strategies.integers(0, 9))
    def save(self, key: StoreKey, version: int) -> None:
        data = payload_of(key + bytes([version]))
        assert self.run(self.tier.submit_store, key, bytearray(data), digest_of(data)).ok
        self.model[key] = data

    @rule(key=keys)
    def load(self, key: StoreKey) -> None:
        buffer = bytearray(PAYLOAD_BYTES)
        if key in self.model:
            assert self.run(self.tier.submit_load, key, buffer, None).digest == digest_of(self.model[key])
            assert buffer == self.model[key]

    @rule(key=keys, place=strategies.integers(0, 4096 + PAYLOAD_BYTES - 1))
    def damage(self, key: StoreKey, place: int) -> None:
        for path in self.folder.glob(f"00/*/{key.hex()}.kv"):
            data = bytearray(path.read_bytes())
            data[place] ^= 1
            path.write_bytes(data)
            assert not self.run(self.tier.submit_load, key, bytearray(PAYLOAD_BYTES), None).ok
            del self.model[key]

    @rule(chosen=strategies.lists(keys, max_size=3))
    def remove(self, chosen: list[StoreKey]) -> None:
        self.tier.remove(chosen)
        for key in chosen:
            self.model.pop(key, None)
        self.settle()

    @rule(is_sure=seldom)
    def clear(self, is_sure: bool) -> None:
        if is_sure:
            assert self.tier.clear().num_chunks == len(self.model)
            self.model.clear()
            self.settle()

    @rule(chosen=strategies.lists(keys, max_size=40))
    def touch(self, chosen: list[StoreKey]) -> None:
        self.tier.touch(chosen)

    def settle(self) -> None:
        assert self.tier.drain(20)
        assert self.tier.poll() == []

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert self.tier.contains(KEYS) == [key in self.model for key in KEYS]
        assert {path.stem for path in self.folder.glob("00/*/*.kv")} == {key.hex() for key in self.model}
        self.tier.check_integrity()

    def teardown(self) -> None:
        self.tier.close()
        shutil.rmtree(self.folder)


TestStore = StoreMachine.TestCase
TestStore.settings = BOUNDED
TestDisk = DiskMachine.TestCase
TestDisk.settings = settings(BOUNDED, max_examples=15)
