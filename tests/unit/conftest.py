"""What the tests of memory and store share. Bytes are a pure function of the key, digests are made by xxhash itself."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash

from kvferry.kv.arena import Arena
from kvferry.offloading.store.tier import Tier, TierJob, TierResult
from kvferry.offloading.store.tiered import TieredStore
from kvferry.offloading.tiers.disk import DiskTier
from kvferry.types import Namespace, StoreKey

SRC = Path(__file__).parents[2] / "src"
PAYLOAD_BYTES = 8192
DEADLINE_S = 60.0


class Kit:
    """Keys, bytes, and moving one chunk at a time through a tier or a store."""

    payload_bytes = PAYLOAD_BYTES
    namespace = Namespace("c0ffee00", {"format": 1, "dtype": "float32"})

    @staticmethod
    def key(i: int) -> StoreKey:
        return StoreKey(hashlib.sha256(b"key%d" % i).digest() + b"\0\0\0\0")

    @staticmethod
    def payload(key: bytes, num_bytes: int = PAYLOAD_BYTES) -> bytes:
        return hashlib.shake_128(key).digest(num_bytes)

    @staticmethod
    def digest(data: bytes) -> bytes:
        return xxhash.xxh3_128(data).digest()

    @staticmethod
    def wait_for(condition: Callable[[], object], what: str = "condition") -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline_s, f"{what} did not come true within {DEADLINE_S} s"
            time.sleep(0.001)

    def finish(self, tier: Tier, num_results: int = 1) -> list[TierResult]:
        results: list[TierResult] = []

        def enough() -> bool:
            results.extend(tier.poll())
            return len(results) >= num_results

        self.wait_for(enough, f"{num_results} result(s)")
        assert len(results) == num_results
        return results

    def store(self, tier: Tier, i: int, num_bytes: int = PAYLOAD_BYTES) -> TierResult:
        data = self.payload(self.key(i), num_bytes)
        tier.submit_store(TierJob(i, self.key(i), memoryview(bytearray(data)), self.digest(data)))
        return self.finish(tier)[0]

    def load(self, tier: Tier, i: int, num_bytes: int = PAYLOAD_BYTES) -> tuple[TierResult, bytes]:
        buffer = bytearray(num_bytes)
        tier.submit_load(TierJob(i, self.key(i), memoryview(buffer)))
        return self.finish(tier)[0], bytes(buffer)

    def put(self, store: TieredStore, arena: Arena, i: int) -> bool:
        """Reserve, copy in, commit."""
        ref = store.reserve(self.key(i))
        if ref is None:
            return False
        data = self.payload(self.key(i))
        arena.slot_view(ref.slot)[:] = data
        store.commit(ref, self.digest(data), len(data))
        return True

    def get(self, store: TieredStore, arena: Arena, i: int) -> bytes | None:
        """What a reader gets who promotes, pins and copies out."""
        store.promote(self.key(i), PAYLOAD_BYTES)
        store.flush(DEADLINE_S)
        ref = store.pin(self.key(i))
        if ref is None:
            return None
        data = bytes(arena.slot_view(ref.slot))
        assert arena.generation(ref.slot) == ref.generation
        store.unpin(ref)
        return data

    @staticmethod
    def folder_bytes(path: Path) -> int:
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

    @staticmethod
    def spawn(code: str, *arguments: object) -> subprocess.Popen[str]:
        """A Python process of its own."""
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(SRC)},
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def kit() -> Kit:
    return Kit()


@pytest.fixture
def make_arena(tmp_path: Path) -> Iterator[Callable[..., Arena]]:
    """Arenas in a folder of this test, closed at the end."""
    made: list[Arena] = []

    def make(num_slots: int = 4, slot_bytes: int = PAYLOAD_BYTES) -> Arena:
        made.append(
            Arena.create(engine_id="test", num_slots=num_slots, slot_bytes=slot_bytes, directory=tmp_path / "arena")
        )
        return made[-1]

    yield make
    for arena in made:
        arena.close()


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[..., DiskTier]]:
    """Disk tiers on one folder, closed at the end."""
    made: list[DiskTier] = []

    def make(namespace: Namespace = Kit.namespace, **settings: object) -> DiskTier:
        made.append(DiskTier(tmp_path / "disk", namespace, **settings))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for tier in made:
        tier.close()
