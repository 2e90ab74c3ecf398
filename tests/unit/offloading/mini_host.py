"""A host of thirty lines for both sides of the OffloadingConnector: real pools, real arena, real tiers.

KV bytes of a block are a function of (tokens up to its end, layer, rank), written here by hand, so that any misplaced,
stale or foreign byte shows.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from kvferry.clock import FakeClock
from kvferry.config import KVTransferConfig
from kvferry.contract import CacheHitSource, FullAttentionSpec, SlidingWindowSpec, make_kv_cache_config
from kvferry.contract.host import host_info
from kvferry.contract.kv_cache import KVConnectorOutput
from kvferry.contract.views import RequestView, ScheduledRequest, StepView
from kvferry.kv.keys import KeyChain
from kvferry.offloading.scheduler_side import OffloadingSchedulerSide
from kvferry.offloading.worker_side import OffloadingWorkerSide

BLOCK = 16
NUM_BLOCKS = 64
LAYERS = 2
HEADS, CONTENT = 2, 8


class Pool:
    """As much of a host's block pool as connectors may use."""

    def __init__(self) -> None:
        self.blocks = [SimpleNamespace(block_id=i, ref_cnt=0) for i in range(NUM_BLOCKS)]

    def touch(self, blocks: list[Any]) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            block.ref_cnt -= 1
            assert block.ref_cnt >= 0


class MiniHost:
    """One scheduler side, `tp` worker sides with pools of their own, and KV written by hand."""

    def __init__(
        self, extra: dict[str, Any], *, tp: int = 1, window: int | None = None, wants_kv_events: bool = False
    ) -> None:
        full = FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=CONTENT // 2, dtype=torch.float32)
        groups: list[dict[str, Any]] = [{f"full{i}": full for i in range(LAYERS)}]
        if window is not None:
            swa = SlidingWindowSpec(
                block_size=BLOCK,
                num_kv_heads=HEADS,
                head_size=CONTENT // 2,
                dtype=torch.float32,
                sliding_window=window,
            )
            groups.append({f"swa{i}": swa for i in range(LAYERS)})
        self.num_groups = len(groups)
        self.tp = tp
        self.clock = FakeClock()
        self.pool = Pool()
        self.raw: list[torch.Tensor] = []
        self.workers: list[OffloadingWorkerSide] = []
        cache_config = make_kv_cache_config(NUM_BLOCKS, groups)  # type: ignore[arg-type]
        transfer = KVTransferConfig(
            "OffloadingConnector",
            engine_id="test",
            kv_role="kv_both",
            kv_connector_extra_config={"weights_version": "w1", "cpu_bytes_to_use": 1 << 20, **extra},
        )
        for rank in range(tp):
            config = SimpleNamespace(
                kv_transfer_config=transfer,
                parallel_config=SimpleNamespace(tensor_parallel_size=tp, pipeline_parallel_size=1, rank=rank),
                model_config=SimpleNamespace(model="m", max_model_len=4096),
                kv_events_config=SimpleNamespace(enable_kv_cache_events=wants_kv_events),
            )
            info = host_info(config, cache_config)
            worker = OffloadingWorkerSide(info)
            raw = torch.zeros(NUM_BLOCKS, LAYERS, BLOCK, HEADS, CONTENT)
            caches = {f"{kind}{i}": raw[:, i].permute(0, 2, 1, 3) for kind in ("full", "swa") for i in range(LAYERS)}
            worker.register_kv_caches(caches)
            self.raw.append(raw)
            self.workers.append(worker)
            if rank == 0:
                self.side = OffloadingSchedulerSide(info, self.clock)
        self.side.bind_gpu_block_pool(self.pool)
        self.side.set_xfer_handshake_metadata({w.host.rank: w.get_handshake_metadata() for w in self.workers})
        self.failed_requests: set[str] = set()
        self.bad_blocks: set[int] = set()

    def request(self, name: str, tokens: list[int], **fields: Any) -> Any:
        return SimpleNamespace(
            request_id=name, all_token_ids=tokens, num_tokens=len(tokens), num_computed_tokens=0, **fields
        )

    @staticmethod
    def content(tokens: list[int], block: int, layer: int, rank: int, group: int) -> torch.Tensor:
        text = repr((tokens[: (block + 1) * BLOCK], layer, rank, group))
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")
        return torch.rand(BLOCK, HEADS, CONTENT, generator=torch.Generator().manual_seed(seed))

    def compute(self, tokens: list[int], tables: tuple[list[int], ...], positions: range) -> None:
        """What a forward would write: the KV of these block positions."""
        for rank, raw in enumerate(self.raw):
            for group, table in enumerate(tables):
                for position in positions:
                    if table[position]:
                        for layer in range(LAYERS):
                            raw[table[position], layer] = self.content(tokens, position, layer, rank, group)

    def check(self, tokens: list[int], tables: tuple[list[int], ...], positions: range) -> None:
        for rank, raw in enumerate(self.raw):
            for group, table in enumerate(tables):
                for position in positions:
                    if table[position]:
                        for layer in range(LAYERS):
                            expected = self.content(tokens, position, layer, rank, group)
                            assert torch.equal(raw[table[position], layer], expected), (rank, group, position, layer)

    def step(self, scheduled: list[ScheduledRequest]) -> set[str]:
        """One engine step around a forward that has been done by hand; returns requests whose loads ended."""
        metadata = self.side.build_connector_meta(StepView(scheduled))
        ended: list[set[str]] = []
        report = None
        for worker in self.workers:
            worker.handle_preemptions(metadata)
            worker.start_load_kv(metadata)
            worker.wait_for_save(metadata)
            results = worker.get_transfer_results(set())
            ended.append(results.finished_recving)
            self.failed_requests |= results.failed_recving
            self.bad_blocks |= worker.get_block_ids_with_load_errors()
            part = worker.build_connector_worker_meta()
            if part is not None:
                report = part if report is None else report.aggregate(part)
        if report is not None:
            self.side.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=report))
        return set.union(*ended)

    def settle(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not until():
            assert time.monotonic() < deadline, "the copies never ended"
            self.step([])

    def run_and_store(self, name: str, tokens: list[int], tables: tuple[list[int], ...], **fields: Any) -> None:
        """Prefill in one step, store, finish."""
        request = self.request(name, tokens, **fields)
        view = RequestView(request)
        self.side.on_new_request(view)
        assert self.side.get_num_new_matched_tokens(view, 0)[0] == 0
        self.side.update_state_after_alloc(view, tables, 0)
        num_blocks = len(tokens) // BLOCK
        self.compute(tokens, tables, range(num_blocks))
        self.step([ScheduledRequest(name, 0, len(tokens), tables)])
        self.side.request_finished(view, tables)
        self.settle(lambda: not self.side.has_pending_push_work())
        assert all(block.ref_cnt == 0 for block in self.pool.blocks)

    def lookup(self, name: str, tokens: list[int], num_local: int = 0, **fields: Any) -> tuple[Any, int | None, bool]:
        """Ask until there is an answer (promotions run in the background)."""
        view = RequestView(self.request(name, tokens, **fields))
        deadline = time.monotonic() + 20
        while True:
            claim, is_async = self.side.get_num_new_matched_tokens(view, num_local)
            if claim is not None:
                return view, claim, is_async
            assert time.monotonic() < deadline, "the lookup never answered"
            time.sleep(0.0005)

    def load(self, view: Any, tables: tuple[list[int], ...], claim: int) -> dict[CacheHitSource, int]:
        self.side.update_state_after_alloc(view, tables, claim)
        sources = self.side.get_external_cache_hit_sources(view, claim)
        self.settle(lambda: not self.side.has_pending_push_work())
        return sources

    def close(self) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.side.shutdown()


TOKENS = [(i * 37) % 1000 for i in range(200)]
TABLE = ([*range(1, 14)],)
OTHER_TABLE = ([*range(30, 43)],)


def chain_of(host: MiniHost, tokens: list[int]) -> KeyChain:
    """The keys of a prompt."""
    chain = host.side._keys.chain(RequestView(host.request("probe", tokens)))
    assert chain is not None
    chain.extend(tokens)
    return chain
