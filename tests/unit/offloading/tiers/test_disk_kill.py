"""A process that stores is killed in the middle of a chunk, of a rename, of an index record, or anywhere. The next one
finds every chunk that was acknowledged, right to the byte, and nothing else of what was being done."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

MAX_BYTES = 8192 + 40 * (4096 + 8192 + 80)
CHILD = """
import hashlib, os, signal, sys, xxhash
from pathlib import Path
from kvferry.kv.arena import Arena
from kvferry.offloading.store.tiered import TieredStore
from kvferry.offloading.tiers.disk import DiskTier
from kvferry.types import Namespace, StoreKey

folder, step_to_die_at, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
left = [count]

def on_step(step):
    if step == step_to_die_at:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def acknowledge(key, digest, tier):
    os.write(1, f"{key.hex()} {digest.hex()} {tier}\\n".encode())

tier = DiskTier(folder / "disk", Namespace("c0ffee00", {}), on_step=on_step, max_bytes=int(sys.argv[4]) or None)
arena = Arena.create(engine_id="kill", num_slots=8, slot_bytes=8192, directory=folder / "arena")
store = TieredStore(arena, [tier], payload_bytes=8192, on_durable=acknowledge)
i = int(sys.argv[5])
while True:
    i += 1
    key = StoreKey(hashlib.sha256(b"key%d" % i).digest() + bytes(4))
    ref = store.reserve(key)
    if ref is not None:
        data = hashlib.shake_128(key).digest(8192)
        arena.slot_view(ref.slot)[:] = data
        store.commit(ref, xxhash.xxh3_128(data).digest(), 8192)
    store.touch([key])
    store.flush(30)
"""


def check_after(kit, make_disk, folder: Path, acknowledged: dict[str, str], max_bytes: int | None) -> None:
    assert max_bytes is None or kit.folder_bytes(folder / "disk") <= max_bytes
    tier = make_disk(max_bytes=max_bytes)
    assert not list((folder / "disk/tmp").iterdir())
    tier.check_integrity()
    for key_hex, digest_hex in acknowledged.items():
        key = bytes.fromhex(key_hex)
        if max_bytes is not None and not tier.contains([key])[0]:
            continue  # evicted: the quota is reached on purpose
        assert tier.contains([key]) == [True], f"{key_hex} was acknowledged and is lost"
        assert digest_hex == kit.digest(kit.payload(key)).hex()
    for path in (folder / "disk").rglob("*.kv"):
        assert path.read_bytes()[4096:] == kit.payload(bytes.fromhex(path.stem)), "half a chunk has a name"
    tier.close()


def read_acknowledged(child, num_lines: int | None = None) -> dict[str, str]:
    """Whole lines only: the last one may be torn by the kill."""
    lines = []
    while num_lines is None or len(lines) < num_lines:
        line = child.stdout.readline()
        if not line.endswith(" fs\n"):
            break
        lines.append(line)
    return dict(tuple(line.split()[:2]) for line in lines)


@pytest.mark.parametrize(
    ("step", "count"),
    [
        ("chunk-write", 1),
        ("chunk-write", 30),
        ("chunk-rename", 20),
        ("chunk-written", 20),
        ("index-write", 1),
        ("index-write", 25),
        ("index-rewrite", 1),
        ("index-rewrite", 2),
    ],
)
def test_killed_in_the_middle_of(step: str, count: int, kit, make_disk, tmp_path: Path) -> None:
    acknowledged: dict[str, str] = {}
    for start in (0, 100_000):  # the second round starts from what the first left behind
        child = kit.spawn(CHILD, tmp_path, step, count, 0, start)
        acknowledged |= read_acknowledged(child)
        child.communicate(timeout=30)
        assert child.returncode == -signal.SIGKILL
        check_after(kit, make_disk, tmp_path, acknowledged, None)
    assert len(acknowledged) >= 2 * (count - 2) or step.startswith("index-re")


@pytest.mark.parametrize("max_bytes", [0, MAX_BYTES])
def test_killed_anywhere(max_bytes: int, kit, make_disk, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    acknowledged: dict[str, str] = {}
    for round_number in range(3):
        child = kit.spawn(CHILD, tmp_path, "never", 0, max_bytes, round_number * 100_000)
        acknowledged |= read_acknowledged(child, rng.randrange(20, 120))
        os.kill(child.pid, signal.SIGKILL)
        acknowledged |= read_acknowledged(child)
        child.communicate(timeout=30)
        check_after(kit, make_disk, tmp_path, acknowledged, max_bytes or None)
    assert len(acknowledged) >= 60
