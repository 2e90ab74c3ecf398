"""What the OffloadingConnector says of itself: figures computed here by hand from what was moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.unit.offloading.mini_host import (
    BLOCK,
    CONTENT,
    HEADS,
    LAYERS,
    OTHER_TABLE,
    TABLE,
    TOKENS,
    MiniHost,
    chain_of,
)

from kvferry.contract.stats import ConnectorStats, MediumStats
from kvferry.contract.stats_rows import connector_rows
from kvferry.contract.views import RequestView, ScheduledRequest, StepView
from kvferry.kv.keys import store_key
from kvferry.metrics import FAILURE_REASONS, FALLBACK_REASONS
from kvferry.offloading.store.memory import HostIndex
from kvferry.offloading.tiers.disk import DiskTier

CHUNK_BYTES = 64 * LAYERS * HEADS * CONTENT * 4  # of one worker; also the slot's size
SLOTS = (1 << 20) // CHUNK_BYTES


def fs(folder: Path) -> dict[str, Any]:
    return {"secondary_tiers": [{"type": "fs", "path": str(folder), "max_bytes": 1 << 20}]}


@pytest.mark.parametrize("tp", [1, 2])
def test_bytes_counts_and_tokens_of_a_store_and_a_load(make_host: Any, tmp_path: Path, tp: int) -> None:
    host: MiniHost = make_host(fs(tmp_path / "kv"), tp=tp)
    at_start = host.side.get_kv_connector_stats()
    assert {name: (medium.num_stores, medium.used_bytes > 0) for name, medium in at_start.media.items()} == {
        "host": (0, False),
        "fs": (0, True),  # the folder's own books
    }
    host.run_and_store("a", TOKENS, TABLE)
    assert host.side.store.flush(20)
    view, claim, _ = host.lookup("b", TOKENS)
    host.load(view, OTHER_TABLE, claim)
    stats = host.side.get_kv_connector_stats()
    memory, disk = stats.media["host"], stats.media["fs"]
    for medium in (memory, disk):
        assert (medium.num_stores, medium.stored_bytes) == (3 * tp, 3 * tp * CHUNK_BYTES)
        assert medium.store_s > 0
        assert medium.failures == {}
    assert (memory.num_loads, memory.loaded_bytes) == (3 * tp, 3 * tp * CHUNK_BYTES)
    assert memory.load_s > 0
    assert (memory.used_bytes, memory.capacity_bytes) == (3 * tp * CHUNK_BYTES, SLOTS * CHUNK_BYTES)
    assert (disk.num_loads, disk.capacity_bytes) == (0, 1 << 20)
    assert stats.hit_tokens == {"host": 192, "fs": 0}
    assert (stats.held_blocks, stats.oldest_held_s) == (0, 0)


def test_tokens_found_on_disk_are_counted_there(make_host: Any, tmp_path: Path) -> None:
    first: MiniHost = make_host(fs(tmp_path / "kv"))
    first.run_and_store("a", TOKENS[:128], TABLE)
    first.close()
    host: MiniHost = make_host(fs(tmp_path / "kv"))
    for name, found in (("b", {"host": 0, "fs": 128}), ("c", {"host": 128, "fs": 128})):
        view, claim, _ = host.lookup(name, TOKENS)
        host.load(view, OTHER_TABLE, claim)
        assert claim == 128
        stats = host.side.get_kv_connector_stats()
        assert stats.hit_tokens == found
    assert (stats.media["fs"].num_loads, stats.media["fs"].loaded_bytes) == (2, 2 * CHUNK_BYTES)


def test_part_of_a_block_table_counts_as_what_was_moved(make_host: Any) -> None:
    host: MiniHost = make_host()
    host.run_and_store("a", TOKENS, TABLE)
    view, claim, _ = host.lookup("b", TOKENS, num_local=32)
    assert claim == 160
    host.load(view, OTHER_TABLE, claim)
    assert host.side.get_kv_connector_stats().media["host"].loaded_bytes == 10 * CHUNK_BYTES * BLOCK // 64


def test_held_blocks_and_their_age(make_host: Any) -> None:
    host: MiniHost = make_host()
    for name, tokens, seconds in (("a", TOKENS[:128], 3), ("b", TOKENS[64:], 4)):
        view = RequestView(host.request(name, tokens))
        host.side.on_new_request(view)
        host.side.build_connector_meta(StepView([ScheduledRequest(name, 0, len(tokens), TABLE)]))
        host.clock.advance(seconds)
    stats = host.side.get_kv_connector_stats()
    assert (stats.held_blocks, stats.oldest_held_s) == (2 * 4 + 2 * 4, 7)


def test_fallbacks_and_failures_by_reason(make_host: Any) -> None:
    tier = {"type": "BlockingTier", "tier_module_path": "kvferry.testing.tiers"}
    host: MiniHost = make_host({"secondary_tiers": [tier], "shutdown_timeout_s": 0.1})
    host.run_and_store("a", TOKENS, TABLE)
    view, claim, _ = host.lookup("b", TOKENS)
    slot = next(iter(host.side._state(view).pins.values())).slot
    host.side._arena.bump(slot)  # as if the slot had been given away behind our back
    host.load(view, OTHER_TABLE, claim)
    other = [*range(64)]
    stuck = host.side.store._lanes[0].tier
    stuck.chunks[store_key(chain_of(host, other).value_at(64), 0, 0)] = (b"", b"")
    view = RequestView(host.request("c", other))
    for _ in range(2):
        host.side.get_num_new_matched_tokens(view, 0)
        host.clock.advance(60)
    stats = host.side.get_kv_connector_stats()
    assert stats.media["host"].failures == {"load TierCorrupt": 1}
    assert stats.fallbacks == {"stalled wait": 1, "failed load": 1, "failed store": 0, "dropped store": 0}
    assert set(stats.fallbacks) <= set(FALLBACK_REASONS)
    assert set(stats.media["host"].failures) <= set(FAILURE_REASONS)


def test_stores_without_room_are_dropped_and_counted(make_host: Any) -> None:
    host: MiniHost = make_host({"cpu_bytes_to_use": CHUNK_BYTES})
    view = RequestView(host.request("a", TOKENS))
    host.side.on_new_request(view)
    metadata = host.side.build_connector_meta(StepView([ScheduledRequest("a", 0, 200, TABLE)]))
    assert len(metadata.stores) == 1
    stats = host.side.get_kv_connector_stats()
    assert stats.fallbacks["dropped store"] == stats.media["host"].num_dropped == 2


def test_asking_in_every_step_does_not_walk_over_the_chunks(
    make_host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host: MiniHost = make_host(fs(tmp_path / "kv"))
    host.run_and_store("a", TOKENS, TABLE)

    def walk(*_: Any) -> Any:
        raise AssertionError("walks over all chunks")

    monkeypatch.setattr(HostIndex, "chunks", walk)
    monkeypatch.setattr(DiskTier, "_own_entries", walk)
    assert host.side.get_kv_connector_stats().media["host"].num_stores == 3


def test_a_tier_that_lost_its_folder_is_told_as_down_until_it_is_back(make_host: Any, tmp_path: Path) -> None:
    host: MiniHost = make_host(fs(tmp_path / "kv"))
    (tmp_path / "kv").rename(tmp_path / "away")
    (tmp_path / "kv").write_text("a file is in the way")
    host.run_and_store("a", TOKENS, TABLE)
    host.settle(lambda: host.side.get_kv_connector_stats().media_down() == ["fs"])
    rows = connector_rows("O", host.side.get_kv_connector_stats())
    assert {row.labels: row.value for row in rows if row.metric == "kvferry:tier_up"} == {
        ("O", "host"): 1,
        ("O", "fs"): 0,
    }
    (tmp_path / "kv").unlink()
    (tmp_path / "away").rename(tmp_path / "kv")

    def is_back() -> bool:
        host.clock.advance(60)  # each time: a write that was under way may be refused now, and begin the pause anew
        return host.side.get_kv_connector_stats().media_down() == []

    host.settle(is_back)
    assert ConnectorStats(children={"1:O": ConnectorStats(media={"fs": MediumStats(is_up=False)})}).media_down() == [
        "1:O/fs"
    ]
