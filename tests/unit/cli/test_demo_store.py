"""The demo's own reading of the disk tier's files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kvferry.cli.demo_store import StoredChunks


def chunk(folder: Path, key: str, payload: bytes) -> Path:
    path = folder / "ab" / f"{key}.kv"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\0" * 4096 + payload)
    return path


def test_find_stops_at_the_first_missing_key(tmp_path: Path) -> None:
    first, second = chunk(tmp_path, "k1", b"a"), chunk(tmp_path, "k2", b"b")
    chunk(tmp_path, "k4", b"d")
    assert StoredChunks.find(tmp_path, ["k1", "k2", "k3", "k4"]).files == [first, second]


def test_block_digests_are_in_prompt_order(tmp_path: Path) -> None:
    chunk(tmp_path, "k2", b"ccdd")
    chunk(tmp_path, "k1", b"aabb")
    digests = StoredChunks.find(tmp_path, ["k1", "k2"]).block_digests(blocks_per_chunk=2)
    assert digests == [hashlib.sha256(block).hexdigest() for block in (b"aa", b"bb", b"cc", b"dd")]


def test_flip_byte_changes_one_byte_of_the_payload(tmp_path: Path) -> None:
    path = chunk(tmp_path, "k1", bytes(range(10)))
    before = path.read_bytes()
    StoredChunks.find(tmp_path, ["k1"]).flip_byte(0)
    after = path.read_bytes()
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert changed == [4096 + 5]
    assert after[changed[0]] == 5 ^ 0xFF


def test_read_rate_reads_every_byte(tmp_path: Path) -> None:
    for i in range(3):
        chunk(tmp_path, f"k{i}", b"x" * 1000)
    assert StoredChunks.find(tmp_path, ["k0", "k1", "k2"]).read_rate() > 0
