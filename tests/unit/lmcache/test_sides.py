"""Both sides of the built-in LMCacheMPConnector with two ranks, stepped by hand, against a stand-in server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from tests.fake_lmcache import CHUNK_TOKENS, FakeServer
from tests.unit.offloading.mini_host import BLOCK, NUM_BLOCKS, Pool

from kvferry.config import KVTransferConfig
from kvferry.contract import FullAttentionSpec, make_kv_cache_config
from kvferry.contract.host import host_info
from kvferry.contract.kv_cache import KVConnectorOutput
from kvferry.contract.views import RequestView, ScheduledRequest, StepView
from kvferry.errors import ConfigError
from kvferry.lmcache.connector import LMCacheSchedulerSide, LMCacheWorkerSide
from kvferry.lmcache.messages import LMCacheHandshake
from kvferry.lmcache.session import ServerChunks

TOKENS = [(i * 37) % 1000 for i in range(3 * CHUNK_TOKENS + 9)]
NUM_WHOLE = 3 * CHUNK_TOKENS // BLOCK
TABLE = (list(range(1, 14)),)
OTHER_TABLE = (list(range(30, 43)),)


class Host:
    """One scheduler side and the worker sides of `tp` ranks, each with a pool of random bytes."""

    def __init__(self, server: FakeServer, tp: int = 2) -> None:
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float32)
        extra = {
            "server_urls": server.url, "weights_version": "w", "staging_bytes": 1 << 16, "mq_timeout": 60.0,
            "lookup_timeout_s": 60.0,
        }  # fmt: skip
        transfer = KVTransferConfig("LMCacheMPConnector", kv_role="kv_both", kv_connector_extra_config=extra)
        self.pool, self.kv, self.workers = Pool(), [], []
        self.failed: set[str] = set()
        for rank in range(tp):
            config = SimpleNamespace(
                kv_transfer_config=transfer,
                parallel_config=SimpleNamespace(tensor_parallel_size=tp, pipeline_parallel_size=1, rank=rank),
                model_config=SimpleNamespace(model="m", max_model_len=4096),
            )
            info = host_info(config, make_kv_cache_config(NUM_BLOCKS, [{"a": spec}]))
            worker = LMCacheWorkerSide(info)
            self.kv.append(torch.rand(NUM_BLOCKS, 2, BLOCK, 16, generator=torch.Generator().manual_seed(rank)))
            worker.register_kv_caches({"a": self.kv[-1]})
            self.workers.append(worker)
        self.side = LMCacheSchedulerSide(info)
        self.side.bind_gpu_block_pool(self.pool)
        self.side.set_xfer_handshake_metadata({w.host.rank: w.get_handshake_metadata() for w in self.workers})

    def step(self, scheduled: list[ScheduledRequest], bad_blocks: set[int] | None = None) -> set[str]:
        metadata = self.side.build_connector_meta(StepView(scheduled))
        ended, report = [], None
        for worker in self.workers:
            worker.handle_preemptions(metadata)
            worker.start_load_kv(metadata)
            worker.wait_for_save(metadata)
            results = worker.get_transfer_results(set())
            ended.append(results.finished_recving)
            self.failed |= results.failed_recving
            part = worker.build_connector_worker_meta()
            if part is not None:
                report = part if report is None else report.aggregate(part)
        output = KVConnectorOutput(kv_connector_worker_meta=report, invalid_block_ids=bad_blocks or set())
        self.side.update_connector_output(output)
        return set.union(*ended)

    def settle(self) -> None:
        deadline = time.monotonic() + 20
        while self.side.has_pending_push_work():
            assert time.monotonic() < deadline, "transfers have not ended"
            self.step([])
            time.sleep(0.0005)

    def request(self, name: str) -> RequestView:
        fields = {"all_token_ids": TOKENS, "num_tokens": len(TOKENS), "num_computed_tokens": 0}
        return RequestView(SimpleNamespace(request_id=name, **fields))

    def claim(self, view: RequestView, num_local: int = 0) -> int:
        deadline = time.monotonic() + 20
        while (found := self.side.get_num_new_matched_tokens(view, num_local)[0]) is None:
            assert time.monotonic() < deadline, "the lookup never answered"
            time.sleep(0.0005)
        return found

    def prefill(self, name: str, bad_blocks: set[int] | None = None) -> None:
        view = self.request(name)
        self.side.on_new_request(view)
        assert self.claim(view) == 0
        self.side.update_state_after_alloc(view, TABLE, 0)
        self.step([ScheduledRequest(name, 0, len(TOKENS), TABLE)], bad_blocks)
        self.side.request_finished(view, TABLE)
        self.settle()
        assert all(block.ref_cnt == 0 for block in self.pool.blocks)

    def close(self) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.side.shutdown()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    made = FakeServer()
    yield made
    made.close()


@pytest.fixture
def host(server: FakeServer) -> Iterator[Host]:
    made = Host(server)
    yield made
    made.close()


def until_unlocked(server: FakeServer) -> None:
    deadline = time.monotonic() + 20
    while server.num_locked:
        assert time.monotonic() < deadline, "locks are left"
        time.sleep(0.01)


def test_each_rank_gets_its_own_shard_back(server: FakeServer, host: Host) -> None:
    before = [pool.clone() for pool in host.kv]
    host.prefill("first")
    assert len(server.chunks) == 3 * 2
    view = host.request("second")
    assert host.claim(view, num_local=CHUNK_TOKENS + BLOCK) == 2 * CHUNK_TOKENS - BLOCK
    first = CHUNK_TOKENS // BLOCK + 1
    host.side.update_state_after_alloc(view, OTHER_TABLE, 2 * CHUNK_TOKENS - BLOCK)
    host.settle()
    assert not host.failed
    loaded = OTHER_TABLE[0][first:NUM_WHOLE]
    for pool, was in zip(host.kv, before, strict=True):
        assert torch.equal(pool[loaded], was[TABLE[0][first:NUM_WHOLE]])
        untouched = [block for block in range(NUM_BLOCKS) if block not in loaded]
        assert torch.equal(pool[untouched], was[untouched])
    host.side.request_finished(view, OTHER_TABLE)
    until_unlocked(server)


def test_blocks_outside_a_window_are_not_loaded(server: FakeServer, host: Host) -> None:
    before = [pool.clone() for pool in host.kv]
    host.prefill("first")
    view = host.request("second")
    num_null = CHUNK_TOKENS // BLOCK + 1
    table = [0] * num_null + OTHER_TABLE[0][num_null:]
    host.side.update_state_after_alloc(view, (table,), host.claim(view))
    host.settle()
    assert not host.failed
    for pool, was in zip(host.kv, before, strict=True):
        assert torch.equal(pool[table[num_null:NUM_WHOLE]], was[TABLE[0][num_null:NUM_WHOLE]])
        assert torch.equal(pool[0], was[0])
    host.side.request_finished(view, (table,))
    until_unlocked(server)


def test_a_chunk_that_one_rank_lacks_is_no_hit(server: FakeServer, host: Host) -> None:
    host.prefill("first")
    del server.chunks[next(name for name in server.chunks if name[1] == 1 and len(name[3]) == 2 * CHUNK_TOKENS)]
    assert host.claim(host.request("second")) == CHUNK_TOKENS


def test_blocks_are_pinned_until_every_rank_has_stored_them(server: FakeServer, host: Host) -> None:
    view = host.request("first")
    assert host.claim(view) == 0
    host.side.update_state_after_alloc(view, TABLE, 0)
    host.step([ScheduledRequest("first", 0, len(TOKENS), TABLE)])
    assert [host.pool.blocks[block].ref_cnt for block in TABLE[0]] == [1] * NUM_WHOLE + [0]
    assert host.side.has_pending_push_work()
    assert "store" not in server.calls, "the outcome of the step was not known yet"
    host.settle()
    assert not any(block.ref_cnt for block in host.pool.blocks)


def test_what_was_computed_beside_a_failed_load_is_not_stored(server: FakeServer, host: Host) -> None:
    host.prefill("first", bad_blocks={50})
    assert "store" not in server.calls
    host.prefill("second")
    assert len(server.chunks) == 6


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_kv_that_is_not_finite_is_not_stored(server: FakeServer, host: Host, value: float) -> None:
    """It may be left over from another request, as in vLLM: stored, it would spoil this prompt for ever."""
    second_chunk = TABLE[0][CHUNK_TOKENS // BLOCK]
    host.kv[0][second_chunk, 1, 3, 5] = value
    host.prefill("first")
    assert len(server.chunks) == 1 + 3, "of the first rank what lies before it, of the second all"
    assert host.claim(host.request("second")) == CHUNK_TOKENS


def test_one_rank_failing_fails_the_load(server: FakeServer, host: Host) -> None:
    host.prefill("first")
    name = next(name for name in server.chunks if name[1] == 1)
    server.chunks[name] = bytes(len(server.chunks[name]))
    view = host.request("second")
    claim = host.claim(view)
    host.side.update_state_after_alloc(view, OTHER_TABLE, claim)
    host.settle()
    assert host.failed == {"second"}
    assert host.claim(view) == 0, "claimed again after a failure"


def test_workers_must_agree(server: FakeServer, host: Host) -> None:
    shake = host.workers[0].get_handshake_metadata()
    for told in ({0: shake}, {0: shake, 1: LMCacheHandshake(128, "m")}, {}):
        with pytest.raises(ConfigError, match="of 2 workers have found an LMCache server, and they must agree"):
            host.side.set_xfer_handshake_metadata(told)


@pytest.mark.parametrize(("chunk_tokens", "block_bytes"), [(64, 16), (256, 90_000), (48, 1000), (256, 256)])
def test_slots_hold_payload_and_proof_in_whole_pages_and_rows(chunk_tokens: int, block_bytes: int) -> None:
    geometry = ServerChunks.of(chunk_tokens, 16, block_bytes, 1 << 28)
    assert geometry.slot_bytes % 4096 == 0
    assert geometry.slot_bytes == chunk_tokens * geometry.row_bytes
    need = chunk_tokens // 16 * block_bytes + 16 + 32 + 2
    assert need <= geometry.slot_bytes < need + 4096 * chunk_tokens
    assert geometry.num_slots * geometry.slot_bytes <= 1 << 28
