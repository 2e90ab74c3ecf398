"""Both sides of the OffloadingConnector under a host of thirty lines: real pools, real arena, real disk tier."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.offloading.mini_host import (
    NUM_BLOCKS,
    OTHER_TABLE,
    TABLE,
    TOKENS,
    chain_of,
)

from kvferry.contract import CacheHitSource
from kvferry.contract.identity import KeyMaker
from kvferry.contract.views import RequestView, ScheduledRequest, StepView
from kvferry.errors import ConfigError
from kvferry.kv.keys import store_key
from kvferry.offloading.config import ChunkGeometry, OffloadingConfig
from kvferry.types import AttentionKind, GroupInfo, Presence


@pytest.mark.parametrize("load_async", [True, False])
@pytest.mark.parametrize("tp", [1, 2])
def test_stored_prefix_is_claimed_and_comes_back_byte_for_byte(make_host: Any, tp: int, load_async: bool) -> None:
    host = make_host({"load_async": load_async}, tp=tp)
    host.run_and_store("a", TOKENS, TABLE)
    view, claim, is_async = host.lookup("b", TOKENS)
    assert (claim, is_async) == (192, load_async)  # three chunks of 64 tokens
    sources = host.load(view, OTHER_TABLE, claim)
    assert sources == {CacheHitSource.HOST: 192}
    host.check(TOKENS, OTHER_TABLE, range(12))
    host.side.store.check_integrity()
    assert host.side.store.num_pinned_chunks() == 0


def test_sync_claim_leaves_a_token_to_compute_and_async_may_take_all(make_host: Any) -> None:
    tokens = TOKENS[:128]
    sync = make_host({"load_async": False})
    sync.run_and_store("a", tokens, TABLE)
    assert sync.lookup("b", tokens)[1] == 112  # whole blocks only, within the second chunk
    asynchronous = make_host({"load_async": True})
    asynchronous.run_and_store("a", tokens, TABLE)
    view, claim, _ = asynchronous.lookup("b", tokens)
    assert claim == 128
    asynchronous.load(view, OTHER_TABLE, claim)
    asynchronous.check(tokens, OTHER_TABLE, range(8))


@pytest.mark.parametrize(("sampling", "is_async"), [((1.0, 7), True), ((0.0, 7), False), ((1.0, None), False)])
def test_seeded_requests_load_before_the_step_that_draws(make_host: Any, sampling: Any, is_async: bool) -> None:
    host = make_host({"load_async": False})
    host.run_and_store("a", TOKENS, TABLE)
    params = SimpleNamespace(temperature=sampling[0], seed=sampling[1])
    view, claim, told = host.lookup("b", TOKENS, sampling_params=params)
    assert (claim, told) == (192, is_async)
    host.load(view, OTHER_TABLE, claim)
    host.check(TOKENS, OTHER_TABLE, range(12))


def test_local_prefix_within_a_chunk_is_not_loaded_again(make_host: Any) -> None:
    host = make_host()
    host.run_and_store("a", TOKENS, TABLE)
    view, claim, _ = host.lookup("b", TOKENS, num_local=80)
    assert claim == 192 - 80
    host.load(view, OTHER_TABLE, claim)
    host.check(TOKENS, OTHER_TABLE, range(5, 12))
    assert all(not host.raw[0][OTHER_TABLE[0][i]].any() for i in range(5)), "local blocks must not be touched"
    assert host.lookup("c", TOKENS, num_local=192)[1] == 0
    assert host.lookup("d", TOKENS, num_local=196)[1] == 0, "never a negative claim"


@pytest.mark.parametrize("fields", [{"cache_salt": "tenant"}, {"lora_request": SimpleNamespace(lora_path="/none")}])
def test_another_identity_never_hits(make_host: Any, fields: dict[str, Any]) -> None:
    host = make_host()
    host.run_and_store("a", TOKENS, TABLE)
    assert host.lookup("b", TOKENS, **fields)[1] == 0
    assert host.lookup("c", [*TOKENS[:70], 5, *TOKENS[71:]])[1] == 64
    assert host.lookup("d", TOKENS, prompt_embeds=object())[1] == 0


def test_disk_survives_the_engine_and_is_told_apart(make_host: Any, tmp_path: Path) -> None:
    tier = {"type": "fs", "path": str(tmp_path / "kv"), "max_bytes": 1 << 24}
    first = make_host({"secondary_tiers": [tier]}, tp=2)
    first.run_and_store("a", TOKENS, TABLE)
    first.close()
    second = make_host({"secondary_tiers": [tier]}, tp=2)
    view, claim, _ = second.lookup("b", TOKENS)
    assert claim == 192
    assert second.load(view, OTHER_TABLE, claim) == {CacheHitSource.DISK: 192}
    second.check(TOKENS, OTHER_TABLE, range(12))
    view, claim, _ = second.lookup("c", TOKENS)
    assert second.load(view, TABLE, claim) == {CacheHitSource.HOST: 192}


def test_one_missing_shard_ends_the_hit_and_is_stored_again(make_host: Any, tmp_path: Path) -> None:
    tier = {"type": "fs", "path": str(tmp_path / "kv")}
    first = make_host({"secondary_tiers": [tier]}, tp=2)
    first.run_and_store("a", TOKENS, TABLE)
    key = store_key(chain_of(first, TOKENS).value_at(128), 0, 1)
    first.close()
    lost = [p for p in (tmp_path / "kv").rglob("*.kv") if p.name == key.hex() + ".kv"]
    assert len(lost) == 1
    lost[0].unlink()
    second = make_host({"secondary_tiers": [tier]}, tp=2)
    view, claim, _ = second.lookup("b", TOKENS)
    assert claim == 64
    second.load(view, OTHER_TABLE, claim)
    second.check(TOKENS, OTHER_TABLE, range(4))
    second.compute(TOKENS, OTHER_TABLE, range(4, 12))
    second.step([ScheduledRequest("b", 64, 136, OTHER_TABLE)])
    second.settle(lambda: not second.side.has_pending_push_work())
    assert second.lookup("c", TOKENS)[1] == 192
    assert lost[0].exists() or second.side.store.flush(10)
    assert lost[0].exists()


def test_everything_reaches_the_disk_though_the_engine_goes_idle(make_host: Any, tmp_path: Path) -> None:
    tokens = [(i * 13 + i // 640) % 1000 for i in range(800)]
    host = make_host({"secondary_tiers": [{"type": "fs", "path": str(tmp_path / "kv")}], "chunk_tokens": 16})
    host.run_and_store("a", tokens, (list(range(1, 51)),))
    num_chunks = NUM_BLOCKS * 3 // 4  # what one step may pin
    deadline = time.monotonic() + 20
    while len(list((tmp_path / "kv").rglob("*.kv"))) < num_chunks and time.monotonic() < deadline:
        time.sleep(0.01)  # nobody steps or polls any more
    assert len(list((tmp_path / "kv").rglob("*.kv"))) == num_chunks


def test_sliding_window_groups_need_only_the_tail(make_host: Any) -> None:
    """Window 40: of 192 tokens the windowed group needs the tokens from 153 on, that is the third chunk only."""
    host = make_host(window=40)
    tables = (list(range(1, 14)), list(range(14, 27)))
    host.run_and_store("a", TOKENS, tables)
    for num_tokens in (64, 128):
        host.side.store.invalidate(store_key(chain_of(host, TOKENS).value_at(num_tokens), 1, 0), "test")
    view, claim, is_async = host.lookup("b", TOKENS)
    assert (claim, is_async) == (192, True)
    fresh = (list(range(30, 43)), [0] * 9 + list(range(43, 47)))
    host.load(view, fresh, claim)
    host.check(TOKENS, fresh, range(12))


def test_nothing_is_fetched_for_a_prefix_whose_window_tails_are_gone(make_host: Any, tmp_path: Path) -> None:
    tier = {"type": "fs", "path": str(tmp_path / "kv")}
    first = make_host({"secondary_tiers": [tier]}, window=40)
    first.run_and_store("a", TOKENS, (list(range(1, 14)), list(range(14, 27))))
    chain = chain_of(first, TOKENS)
    first.close()
    for num_tokens in (64, 128, 192):
        (file,) = (tmp_path / "kv").rglob(store_key(chain.value_at(num_tokens), 1, 0).hex() + ".kv")
        file.unlink()
    second = make_host({"secondary_tiers": [tier]}, window=40)
    view, claim, _ = second.lookup("b", TOKENS)
    assert claim == 0
    stats = second.side.store.stats()
    assert stats.num_host_chunks == stats.num_pending_chunks == stats.tiers["fs"].num_queued == 0
    assert not second.side._state(view).pins


def test_blocks_that_only_a_store_holds_are_soon_free(make_host: Any) -> None:
    host = make_host()
    assert not host.side.has_pending_block_frees()
    view = RequestView(host.request("a", TOKENS))
    host.side.on_new_request(view)
    host.side.update_state_after_alloc(view, TABLE, 0)
    blocks = [host.pool.blocks[i] for i in TABLE[0]]
    host.pool.touch(blocks)
    host.side.build_connector_meta(StepView([ScheduledRequest("a", 0, 200, TABLE)]))  # which no worker ever gets
    assert not host.side.has_pending_block_frees(), "its request has them as well"
    host.pool.free_blocks(blocks[:1])
    assert host.side.has_pending_block_frees()
    host.clock.advance(1.1)
    assert not host.side.has_pending_block_frees(), "who knows when that store ends"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_kv_that_is_not_finite_is_not_stored(make_host: Any, value: float) -> None:
    """It may be left over from another request, as in vLLM: stored, it would spoil this prompt for ever."""
    host = make_host({"block_size": 16})
    compute = host.compute

    def spoil(*args: Any) -> None:
        compute(*args)
        host.raw[0][TABLE[0][2], 1, 3, 0, 5] = value

    host.compute = spoil
    host.run_and_store("a", TOKENS, TABLE)
    assert host.side.counters.failed_stores == 1
    assert host.lookup("b", TOKENS)[1] == 32, "the two blocks before it"


def test_failed_load_is_reported_dropped_and_not_claimed_again(make_host: Any) -> None:
    host = make_host()
    host.run_and_store("a", TOKENS, TABLE)
    view, claim, _ = host.lookup("b", TOKENS)
    slot = next(iter(host.side._state(view).pins.values())).slot
    host.side._arena.bump(slot)  # as if the slot had been given away behind our back
    host.load(view, OTHER_TABLE, claim)
    assert host.bad_blocks == set(OTHER_TABLE[0][:4])
    assert host.side.counters.failed_loads == 1
    assert host.side.get_num_new_matched_tokens(view, 0) == (0, False)
    assert host.lookup("c", TOKENS)[1] == 192, "nothing says that the stored bytes are bad"


def test_what_a_step_computed_over_a_failed_sync_load_is_not_stored(make_host: Any) -> None:
    host = make_host({"load_async": False})
    host.run_and_store("a", TOKENS[:128], TABLE)
    view, claim, _ = host.lookup("b", TOKENS)
    assert claim == 128
    host.side._arena.bump(next(iter(host.side._state(view).pins.values())).slot)
    host.side.update_state_after_alloc(view, OTHER_TABLE, claim)
    for raw in host.raw:
        raw[OTHER_TABLE[0][8] : OTHER_TABLE[0][12]] = 666.0  # the forward ran over KV that never came
    host.step([ScheduledRequest("b", 128, 72, OTHER_TABLE)])
    host.settle(lambda: not host.side.has_pending_push_work())
    assert host.bad_blocks
    chain = chain_of(host, TOKENS)
    assert host.side.store.lookup(store_key(chain.value_at(192), 0, 0)) is Presence.MISS
    host.compute(TOKENS, OTHER_TABLE, range(12))
    host.step([ScheduledRequest("b", 0, 200, OTHER_TABLE)])
    host.settle(lambda: not host.side.has_pending_push_work())
    assert host.side.store.lookup(store_key(chain.value_at(192), 0, 0)) is Presence.HOST, "computed again, stored"
    assert all(block.ref_cnt == 0 for block in host.pool.blocks)


def test_reset_forgets_everything_also_copies_under_way(make_host: Any, tmp_path: Path) -> None:
    host = make_host({"secondary_tiers": [{"type": "fs", "path": str(tmp_path / "kv")}]})
    host.run_and_store("a", TOKENS, TABLE)
    tokens = [t + 1 for t in TOKENS]
    request = host.request("b", tokens)
    host.side.on_new_request(RequestView(request))
    host.compute(tokens, OTHER_TABLE, range(12))
    host.step([ScheduledRequest("b", 0, 200, OTHER_TABLE)])
    assert host.side.reset_cache() is True
    host.settle(lambda: not host.side.has_pending_push_work())
    assert host.lookup("c", TOKENS)[1] == 0
    assert host.lookup("d", tokens)[1] == 0
    host.side.store.check_integrity()


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights' file of an adapter, written before any engine starts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = tmp_path / "adapter" / "adapter.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(bytes(1000))
    wait_for_file_clock(weights)
    return weights


def wait_for_file_clock(file: Path) -> None:
    """Until files that are written now are younger than this one, by the file system's clock."""
    probe, deadline_s = file.parent.with_name("probe"), time.monotonic() + 10
    while not probe.exists() or probe.stat().st_ctime_ns <= file.stat().st_ctime_ns:
        assert time.monotonic() < deadline_s
        probe.write_text("")


def test_an_adapter_whose_files_changed_is_neither_stored_nor_loaded(
    make_host: Any, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = make_host()
    fields = {"lora_request": SimpleNamespace(lora_path=str(adapter.parent))}
    host.run_and_store("a", TOKENS, TABLE, **fields)
    assert host.lookup("b", TOKENS, **fields)[1] == 192
    status = adapter.stat()
    adapter.write_bytes(bytes(999) + b"x")
    os.utime(adapter, ns=(status.st_atime_ns, status.st_mtime_ns))  # as copying tools do; the size is the same too
    assert host.lookup("b", TOKENS, **fields)[1] == 0, "nobody knows what the host has loaded"
    other_tokens = [*reversed(TOKENS)]
    host.run_and_store("c", other_tokens, OTHER_TABLE, **fields)
    adapter.write_bytes(bytes(1000))
    os.utime(adapter, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert host.lookup("d", other_tokens, **fields)[1] == 0, "the files of old are back, and the host has others"
    assert caplog.text.count(f"KV of LoRA adapter {adapter.parent} is neither stored nor loaded") == 1


def test_files_that_change_between_the_forward_and_the_end_of_the_copy_end_the_store(
    make_host: Any, adapter: Path
) -> None:
    host = make_host()
    fields = {"lora_request": SimpleNamespace(lora_path=str(adapter.parent))}
    chain = host.side._keys.chain(RequestView(host.request("a", TOKENS, **fields)))
    chain.extend(TOKENS)
    host.compute(TOKENS, TABLE, range(12))
    host.lookup("a", TOKENS, **fields)
    host.side.update_state_after_alloc(RequestView(host.request("a", TOKENS, **fields)), TABLE, 0)
    host.step([ScheduledRequest("a", 0, 200, TABLE)])
    adapter.write_bytes(bytes(999) + b"x")
    host.settle(lambda: not host.side.has_pending_push_work())
    assert [host.side.store.lookup(store_key(chain.value_at(64 * n), 0, 0)) for n in (1, 2, 3)] == [Presence.MISS] * 3


def test_an_adapter_younger_than_the_engine_is_not_cached(make_host: Any, adapter: Path) -> None:
    host = make_host()
    adapter.write_bytes(bytes(999) + b"x")
    request = RequestView(host.request("a", TOKENS, lora_request=SimpleNamespace(lora_path=str(adapter.parent))))
    assert host.side._keys.chain(request) is None, "the host may have loaded the files of before"


def test_adapter_settings_are_part_of_its_identity(adapter: Path) -> None:
    view = RequestView(SimpleNamespace(lora_request=SimpleNamespace(lora_path=str(adapter.parent))))
    plain, fewer = (KeyMaker("m", (), 1, settings).chain(view) for settings in ("", 'target_modules=["q"]'))
    assert plain.root != fewer.root


def test_media_that_join_a_running_request_end_its_caching(make_host: Any) -> None:
    host = make_host()
    request = host.request("a", TOKENS, mm_features=[])
    view = RequestView(request)
    assert host.side.get_num_new_matched_tokens(view, 0) == (0, False)
    position = SimpleNamespace(offset=10, length=5)
    request.mm_features.append(SimpleNamespace(identifier="image", mm_position=position))
    host.side.update_state_after_alloc(view, TABLE, 0)
    assert host.side.build_connector_meta(StepView([ScheduledRequest("a", 0, 200, TABLE)])).stores == []
    assert host.side.get_num_new_matched_tokens(view, 0) == (0, False)


def test_abort_before_the_load_is_planned_releases_the_pins(make_host: Any) -> None:
    host = make_host()
    host.run_and_store("a", TOKENS, TABLE)
    view, claim, _ = host.lookup("b", TOKENS)
    assert claim == 192
    assert host.side.store.num_pinned_chunks() == 3
    host.side.request_finished(view, ([],))
    assert host.side.store.num_pinned_chunks() == 0


def test_an_idle_step_leaves_the_interpreter_to_tiers_that_read(
    make_host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    tier = {"type": "BlockingTier", "tier_module_path": "kvferry.testing.tiers"}
    host = make_host({"secondary_tiers": [tier], "shutdown_timeout_s": 0.1})
    monkeypatch.setattr("kvferry.offloading.scheduler_side.time.sleep", slept.append)
    host.side.build_connector_meta(StepView())
    assert slept == [], "nothing is read"
    stuck = host.side.store._lanes[0].tier
    stuck.chunks[store_key(chain_of(host, TOKENS).value_at(64), 0, 0)] = (b"", b"")
    assert host.side.get_num_new_matched_tokens(RequestView(host.request("b", TOKENS)), 0) == (None, False)
    host.side.build_connector_meta(StepView())
    assert len(slept) == 1
    assert 0 < slept[0] < 0.001
    host.side.build_connector_meta(StepView([ScheduledRequest("c", 0, 16, TABLE)]))
    assert len(slept) == 1, "a step that computes is not held up"


def test_a_stuck_tier_costs_a_request_no_more_than_the_stall_timeout(make_host: Any) -> None:
    tier = {"type": "BlockingTier", "tier_module_path": "kvferry.testing.tiers"}
    host = make_host({"secondary_tiers": [tier], "stall_timeout_s": 2.0, "shutdown_timeout_s": 0.1})
    stuck = host.side.store._lanes[0].tier
    stuck.chunks[store_key(chain_of(host, TOKENS).value_at(64), 0, 0)] = (b"", b"")
    view = RequestView(host.request("b", TOKENS))
    assert host.side.get_num_new_matched_tokens(view, 0) == (None, False)
    host.clock.advance(1.9)
    assert host.side.get_num_new_matched_tokens(view, 0) == (None, False)
    host.clock.advance(0.2)
    assert host.side.get_num_new_matched_tokens(view, 0) == (0, False)
    assert host.side.counters.stalled_waits == 1


@pytest.mark.parametrize(
    ("extra", "texts"),
    [
        ({}, ["cpu_bytes_to_use", "missing"]),
        ({"cpu_bytes_to_use": "1 pound"}, ["cpu_bytes_to_use", "'1 pound'", "8GB"]),
        ({"cpu_bytes_to_use": 0}, ["cpu_bytes_to_use=0", "at least 1"]),
        ({"cpu_bytes_to_use": 1e9, "load_asynch": True}, ["load_asynch", "'load_async'"]),
        ({"cpu_bytes_to_use": 1, "load_async": "false"}, ["load_async", "bool", "'false'"]),
        ({"cpu_bytes_to_use": 1, "secondary_tiers": {}}, ["secondary_tiers", "list"]),
        ({"cpu_bytes_to_use": 1, "chunk_tokens": 8}, ["chunk_tokens=8", "at least 16"]),
        ({"cpu_bytes_to_use": 1, "stall_timeout_s": -1}, ["stall_timeout_s=-1"]),
    ],
)
def test_settings_are_checked_by_name(extra: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        OffloadingConfig.parse(extra)
    for text in texts:
        assert text in str(caught.value)


def test_sizes_follow_from_the_groups() -> None:
    config = OffloadingConfig.parse({"cpu_bytes_to_use": 1 << 20})
    groups = [GroupInfo(0, ("a",), 32, AttentionKind.FULL), GroupInfo(1, ("b",), 48, AttentionKind.FULL)]
    geometry = ChunkGeometry.of(config, groups, (1000, 500), 2)
    assert geometry.chunk_tokens == 96
    assert geometry.block_alignment_tokens == 96
    assert geometry.payload_bytes == (3000, 1000)
    assert geometry.slot_bytes == 4096
    assert geometry.num_slots == 256
    with pytest.raises(ConfigError, match="at least 16384"):
        ChunkGeometry.of(OffloadingConfig.parse({"cpu_bytes_to_use": 4096}), groups, (1000, 500), 2)
    with pytest.raises(ConfigError, match="multiple of 96"):
        ChunkGeometry.of(OffloadingConfig.parse({"cpu_bytes_to_use": 1, "chunk_tokens": 64}), groups, (1, 1), 1)


def test_random_weights_need_a_version(make_host: Any) -> None:
    with pytest.raises(ConfigError, match="weights_version"):
        make_host({"weights_version": None})
