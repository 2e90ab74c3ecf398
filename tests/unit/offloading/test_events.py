"""Whoever folds the events of a store knows exactly what is in each of its places, whatever happened."""

from __future__ import annotations

import hashlib
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
import xxhash
from tests.kv_event_client import Fold
from tests.unit.offloading.mini_host import OTHER_TABLE, TABLE, TOKENS, MiniHost, chain_of

from kvferry.contract.identity import KeyMaker
from kvferry.errors import TierUnavailable
from kvferry.kv.arena import Arena
from kvferry.kv.keys import store_key
from kvferry.kv_events import encode
from kvferry.offloading.events import ChunkEvents
from kvferry.offloading.store.tiered import TieredStore
from kvferry.offloading.tiers.disk import DiskTier
from kvferry.offloading.tiers.disk_index import FOLDER_BYTES, chunk_cost_bytes
from kvferry.testing.tiers import FailingTier
from kvferry.types import AttentionKind, GroupInfo, Namespace, Presence

PAYLOAD = 4096
NUM_CHUNKS, NUM_STEPS = 12, 600
GROUPS = tuple(GroupInfo(i, (f"g{i}",), 16, AttentionKind.FULL) for i in range(2))


class World:
    """A store over a flaky tier and a small disk, and what a listener believes."""

    def __init__(self, folder: Path, world_size: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.ranks = range(world_size)
        self.arena = Arena.create(engine_id="t", num_slots=6 * world_size, slot_bytes=PAYLOAD, directory=folder / "a")
        self.flaky = FailingTier()
        self.disk = DiskTier(
            folder / "d",
            Namespace("c0ffee00", {}),
            max_bytes=FOLDER_BYTES + 5 * world_size * chunk_cost_bytes(PAYLOAD + 4096),
        )
        self.store = TieredStore(self.arena, [self.flaky, self.disk], payload_bytes=PAYLOAD)
        self.events = ChunkEvents(self.store, KeyMaker("m", GROUPS, world_size), 64)
        self.fold = Fold()
        self.pinned: list[Any] = []
        self.seen = 0

    def key(self, i: int, rank: int) -> Any:
        return store_key(hashlib.sha256(b"%d" % i).digest(), i % 2, rank)

    def act(self) -> None:
        i, rank = self.random.randrange(NUM_CHUNKS), self.random.choice(self.ranks)
        self.flaky.load_error = TierUnavailable("flaky") if self.random.random() < 0.2 else None
        self.flaky.store_error = TierUnavailable("flaky") if self.random.random() < 0.2 else None
        actions = [self.put] * 8 + [self.promote] * 4 + [self.pin, self.invalidate, self.flip] + [self.poll] * 4
        self.random.choice(actions)(self.key(i, rank))
        if self.random.random() < 0.005:
            self.store.clear()

    def put(self, key: Any) -> None:
        ref = self.store.reserve(key)
        if ref is None:
            return
        if self.random.random() < 0.1:
            self.store.abort(ref)
            return
        data = hashlib.shake_128(key).digest(PAYLOAD)
        self.arena.slot_view(ref.slot)[:] = data
        self.store.commit(ref, xxhash.xxh3_128_digest(data), PAYLOAD)

    def promote(self, key: Any) -> None:
        if self.store.lookup(key) is Presence.TIER:
            self.store.promote(key, PAYLOAD)

    def pin(self, key: Any) -> None:
        if (ref := self.store.pin(key)) is not None:
            self.pinned.append(ref)
        while len(self.pinned) > self.random.randrange(3):
            self.store.unpin(self.pinned.pop(0))

    def invalidate(self, key: Any) -> None:
        self.store.invalidate(key, "test")

    def flip(self, key: Any) -> None:
        """Rot: on the disk, or in host memory with a scrubber after it."""
        for file in (self.disk._folder.path).rglob(f"*{key.hex()}*"):
            with suppress(FileNotFoundError), file.open("r+b") as stored:  # evicted meanwhile
                last = stored.seek(-1, os.SEEK_END)
                flipped = stored.read(1)[0] ^ 1
                stored.seek(last)
                stored.write(bytes((flipped,)))
        self.store.scrub(2)

    def poll(self, _: Any) -> None:
        self.store.flush(20) if self.random.random() < 0.5 else self.store.poll()

    def listen(self) -> None:
        events = msgpack.unpackb(encode(list(self.events.take()), 0.0))[1]
        self.seen += len(events)
        self.fold.take(events)

    def check(self) -> None:
        for place, medium, tier in (("host", "CPU", None), ("failing", "STORAGE", "failing"), ("fs", "STORAGE", "fs")):
            for group in range(2):
                whole = {
                    self.key(i, 0)[:32]
                    for i in range(group, NUM_CHUNKS, 2)
                    if all(self.store.has(place, self.key(i, rank)) for rank in self.ranks)
                }
                assert self.fold.at(medium, tier, group) == whole, place

    def close(self) -> None:
        for ref in self.pinned:
            self.store.unpin(ref)
        self.store.close(20)
        self.arena.close()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_fold_of_all_events_is_what_is_there(tmp_path: Path, world_size: int, seed: int) -> None:
    world = World(tmp_path, world_size, seed)
    try:
        for _ in range(NUM_STEPS):
            world.act()
            if world.random.random() < 0.3:
                world.listen()  # while writes are under way
            if world.random.random() < 0.2:
                assert world.store.flush(20)  # a tier has a chunk before the store tells of it
                world.listen()
                world.check()
        assert world.seen > 100
        stats = world.disk.stats()
        assert stats.num_evicted
        world.store.clear()
        world.listen()
        assert not any(world.fold.known.values())
    finally:
        world.close()


def test_what_a_tier_held_before_is_told_at_the_start(make_host: Any, tmp_path: Path) -> None:
    tier = {"secondary_tiers": [{"type": "fs", "path": str(tmp_path / "kv")}]}
    first: MiniHost = make_host(tier, wants_kv_events=True)
    first.run_and_store("a", TOKENS[:128], TABLE)
    assert first.side.store.flush(20)
    values = {chain_of(first, TOKENS).value_at(tokens) for tokens in (64, 128)}
    fold = Fold()
    fold.take(msgpack.unpackb(encode(list(first.side.take_events()), 0.0))[1])
    assert fold.at("CPU") == fold.at("STORAGE", "fs") == values
    first.close()
    second: MiniHost = make_host(tier, wants_kv_events=True)
    events = list(second.side.take_events())
    assert {(event.medium, event.ownership, event.block_size) for event in events} == {("STORAGE", "fs", 64)}
    assert {value for event in events for value in event.block_hashes} == values
    assert list(second.side.take_events()) == []
    view, claim, _ = second.lookup("b", TOKENS)
    second.load(view, OTHER_TABLE, claim)
    assert {event.medium for event in second.side.take_events()} == {"CPU"}


def test_nobody_wants_events_and_none_are_kept(make_host: Any) -> None:
    host: MiniHost = make_host()
    host.run_and_store("a", TOKENS, TABLE)
    assert list(host.side.take_events()) == []
    assert host.side.store.take_moved() == {}
