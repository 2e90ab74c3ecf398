"""Loads from host memory are proved: one flipped bit anywhere in a chunk's slot is never loaded as if it were KV."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from tests.unit.offloading.mini_host import OTHER_TABLE, TABLE, TOKENS, MiniHost, chain_of

from kvferry.contract.views import ScheduledRequest
from kvferry.kv.keys import Digest, store_key
from kvferry.kv.layout import ByteRange
from kvferry.offloading.copier import HostCopier
from kvferry.types import Presence

CHUNK_BYTES = 4 * 2 * 16 * 2 * 8 * 4
"""Of one chunk of one group: blocks, layers, tokens, heads, content, bytes of a float32."""


def flip(host: MiniHost, key: Any, offset: int) -> None:
    """One bit of the chunk's bytes in the arena."""
    ref = host.side.store.pin(key)
    assert ref is not None
    host.side.store.unpin(ref)
    assert host.side._arena is not None
    host.side._arena.slot_view(ref.slot)[offset] ^= 0x10


@pytest.mark.parametrize("load_async", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("offset", [0, CHUNK_BYTES // 2, CHUNK_BYTES - 1])
def test_one_flipped_bit_fails_its_chunk_alone(make_host: Any, offset: int, rank: int, load_async: bool) -> None:
    host: MiniHost = make_host({"load_async": load_async}, tp=2)
    host.run_and_store("a", TOKENS, TABLE)
    key = store_key(chain_of(host, TOKENS).value_at(128), 0, rank)
    flip(host, key, offset)
    view, claim, _ = host.lookup("b", TOKENS)
    assert claim == 192
    host.load(view, OTHER_TABLE, claim)
    assert host.bad_blocks == set(OTHER_TABLE[0][4:8]), "the second chunk, no other"
    host.check(TOKENS, OTHER_TABLE, range(4))
    host.check(TOKENS, OTHER_TABLE, range(8, 12))
    stats = host.side.get_kv_connector_stats()
    assert stats is not None
    assert stats.media["host"].failures == {"load TierCorrupt": 1}
    assert host.side.store.stats().invalidated == {"load": 1}
    assert host.side.store.lookup(key) is Presence.MISS
    assert host.lookup("c", TOKENS)[1] == 64
    host.side.store.check_integrity()


@pytest.mark.parametrize("offset", [0, CHUNK_BYTES - 1])
@pytest.mark.parametrize("load_async", [True, False])
def test_a_load_of_a_part_is_proved_by_the_whole_chunk(make_host: Any, offset: int, load_async: bool) -> None:
    host: MiniHost = make_host({"load_async": load_async})
    host.run_and_store("a", TOKENS, TABLE)
    flip(host, store_key(chain_of(host, TOKENS).value_at(128), 0, 0), offset)
    view, claim, _ = host.lookup("b", TOKENS, num_local=80)  # from the second chunk's second block on
    host.load(view, OTHER_TABLE, claim)
    assert host.bad_blocks == set(OTHER_TABLE[0][5:8])
    host.check(TOKENS, OTHER_TABLE, range(8, 12))


@pytest.mark.parametrize("group", [0, 1])
def test_every_group_is_proved(make_host: Any, group: int) -> None:
    tables = (TABLE[0], [*range(15, 28)])
    others = (OTHER_TABLE[0], [*range(45, 58)])
    host: MiniHost = make_host(window=40)
    host.run_and_store("a", TOKENS, tables)
    flip(host, store_key(chain_of(host, TOKENS).value_at(192), group, 0), CHUNK_BYTES // 2)
    view, claim, _ = host.lookup("b", TOKENS)
    host.load(view, others, claim)
    assert host.failed_requests == {"b"} or host.bad_blocks
    assert host.side.store.stats().invalidated == {"load": 1}


def test_the_copy_on_disk_serves_the_next_request(make_host: Any, tmp_path: Path) -> None:
    host: MiniHost = make_host({"secondary_tiers": [{"type": "fs", "path": str(tmp_path / "kv")}]})
    host.run_and_store("a", TOKENS, TABLE)
    assert host.side.store.flush(20)
    flip(host, store_key(chain_of(host, TOKENS).value_at(64), 0, 0), 7)
    view, claim, _ = host.lookup("b", TOKENS)
    host.load(view, OTHER_TABLE, claim)
    assert host.bad_blocks == set(OTHER_TABLE[0][:4])
    host.bad_blocks.clear()
    view, claim, _ = host.lookup("c", TOKENS)
    assert claim == 192
    host.load(view, OTHER_TABLE, claim)
    assert not host.bad_blocks
    host.check(TOKENS, OTHER_TABLE, range(12))


def test_a_chunk_brought_up_from_disk_is_proved_too(make_host: Any, tmp_path: Path) -> None:
    tier = {"type": "fs", "path": str(tmp_path / "kv")}
    first: MiniHost = make_host({"secondary_tiers": [tier]})
    first.run_and_store("a", TOKENS, TABLE)
    first.close()
    second: MiniHost = make_host({"secondary_tiers": [tier]})
    view, claim, _ = second.lookup("b", TOKENS)  # promoted and pinned
    flip(second, store_key(chain_of(second, TOKENS).value_at(128), 0, 0), 100)
    second.load(view, OTHER_TABLE, claim)
    assert second.bad_blocks == set(OTHER_TABLE[0][4:8])


def test_what_the_request_computes_again_is_stored_again(make_host: Any) -> None:
    host: MiniHost = make_host()
    host.run_and_store("a", TOKENS, TABLE)
    flip(host, store_key(chain_of(host, TOKENS).value_at(64), 0, 0), 0)
    view, claim, _ = host.lookup("b", TOKENS)
    host.load(view, OTHER_TABLE, claim)
    host.compute(TOKENS, OTHER_TABLE, range(12))
    host.step([ScheduledRequest("b", 0, 200, OTHER_TABLE)])
    host.settle(lambda: not host.side.has_pending_push_work())
    host.side.request_finished(view, OTHER_TABLE)
    view, claim, _ = host.lookup("c", TOKENS)
    assert claim == 192
    host.load(view, TABLE, claim)
    host.check(TOKENS, TABLE, range(12))


@pytest.mark.parametrize("load_async", [True, False])
def test_a_byte_that_the_copy_itself_spoils_is_found(
    make_host: Any, load_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest of a load is of what lies in the pool afterwards; the slot is as good as before."""
    host: MiniHost = make_host({"load_async": load_async})
    host.run_and_store("a", TOKENS, TABLE)
    copy, num_copies = ctypes.memmove, 0

    def spoil_first(destination: Any, source: Any, num_bytes: int) -> Any:
        nonlocal num_copies
        answer = copy(destination, source, num_bytes)
        num_copies += 1
        if num_copies == 1:
            ctypes.c_uint8.from_address(destination + num_bytes - 1).value ^= 1
        return answer

    view, claim, _ = host.lookup("b", TOKENS)
    monkeypatch.setattr(ctypes, "memmove", spoil_first)
    host.load(view, OTHER_TABLE, claim)
    assert host.bad_blocks == set(OTHER_TABLE[0][:4])
    host.check(TOKENS, OTHER_TABLE, range(4, 12))


def test_a_digest_made_while_copying_is_that_of_the_bytes() -> None:
    """Both ways, of ranges below and far above the size of a piece, in the order of the ranges."""
    pool, host = torch.randint(0, 256, (4 << 20,), dtype=torch.uint8), torch.zeros(4 << 20, dtype=torch.uint8)
    before = bytes(pool.numpy())
    copier, places = HostCopier([pool]), random.Random(5)
    for sizes in ([1], [700_001, 3, 1 << 20], [places.randrange(1, 900_000) for _ in range(4)]):
        ranges, start = [], 0
        for size in sizes:
            ranges.append(ByteRange(0, start, size))
            start += size + 7
        places.shuffle(ranges)
        expected = b"".join(before[r.offset : r.offset + r.length] for r in ranges)
        stored, loaded = Digest(), Digest()
        copier.gather(None, ranges, host.data_ptr(), stored)
        assert bytes(host[: len(expected)].numpy()) == expected
        pool.zero_()
        copier.scatter(None, host.data_ptr(), ranges, loaded)
        assert all(
            bytes(pool[r.offset : r.offset + r.length].numpy()) == before[r.offset :][: r.length] for r in ranges
        )
        pool.copy_(torch.frombuffer(bytearray(before), dtype=torch.uint8))
        assert stored.digest() == loaded.digest() == xxhash.xxh3_128(expected).digest()


def test_without_proof_the_flipped_bit_is_loaded(make_host: Any) -> None:
    """What the setting costs: that these tests can fail is seen here."""
    host: MiniHost = make_host({"verify_host_loads": False})
    host.run_and_store("a", TOKENS, TABLE)
    flip(host, store_key(chain_of(host, TOKENS).value_at(64), 0, 0), 0)
    view, claim, _ = host.lookup("b", TOKENS)
    host.load(view, OTHER_TABLE, claim)
    assert not host.bad_blocks
    with pytest.raises(AssertionError):
        host.check(TOKENS, OTHER_TABLE, range(4))
