"""A scriptable connector in this process, and an engine over the stub model that is checked after every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kvferry import LLM, SamplingParams
from kvferry.clock import FakeClock
from kvferry.contract import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    LoadFailure,
    SupportsHMA,
)
from kvferry.engine.outputs import RequestOutput
from kvferry.testing.stub_model import StubModel

BLOCK_SIZE = 4
Key = tuple[int, ...]


@dataclass
class Script:
    """What the fake connector does, what it holds, and what was asked of it."""

    is_async: bool = False
    load_steps: int = 3
    num_none_answers: int = 0
    match_override: Callable[[Any, int], Any] | None = None
    bad_block_indexes: set[int] = field(default_factory=set)
    num_failures_left: int = 1
    fails_recving: bool = False
    hold_loads: bool = False
    delay_free: bool = False
    release_sends: bool = False
    extra_sent: set[str] = field(default_factory=set)
    extra_received: set[str] = field(default_factory=set)
    extra_failed: set[str] = field(default_factory=set)
    extra_failed_blocks: set[LoadFailure] = field(default_factory=set)
    extra_bad_ids: set[Any] = field(default_factory=set)
    by_position: bool = False
    store_steps: int = 0
    finish_params: dict[str, Any] | None = None
    pending_push_steps: int = 0
    pending_frees: bool = False
    raise_in: dict[str, int] = field(default_factory=dict)
    store: dict[Key, list[torch.Tensor]] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)
    asked: list[tuple[str, int]] = field(default_factory=list)
    allocs: list[tuple[str, int, int, str]] = field(default_factory=list)
    finished: dict[str, tuple[str, tuple[list[int], ...]]] = field(default_factory=dict)
    block_ids_loaded: list[int] = field(default_factory=list)
    scheduler: Any = None
    worker: Any = None


CURRENT: list[Script] = []


@dataclass
class Meta(KVConnectorMetadata):
    saves: list[tuple[Key, int]] = field(default_factory=list)
    loads: dict[str, list[tuple[Key, int, int]]] = field(default_factory=dict)
    is_async: bool = False


class FakeConnector(KVConnectorBase_V1, SupportsHMA):
    """Stores each full block after the step that computed it; loads as the script says."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.script = CURRENT[-1]
        self.block_size = vllm_config.cache_config.block_size
        self.requests: dict[str, Any] = {}
        self.local: dict[str, int] = {}
        self.loads: dict[str, list[tuple[Key, int, int]]] = {}  # content, block, tokens of it that are loaded
        self.in_flight: dict[str, tuple[int, list[tuple[Key, int, int]]]] = {}
        self.sending: set[str] = set()
        self.errors: set[int] = set()
        self.failures: set[LoadFailure] = set()
        self.slow_stores: list[tuple[int, Key, int]] = []
        setattr(self.script, role.name.lower(), self)
        self.note("__init__")

    def note(self, hook: str) -> None:
        self.script.log.append((self.role.name.lower(), hook))
        if self.script.raise_in.get(hook, 0) > 0:
            self.script.raise_in[hook] -= 1
            raise RuntimeError(f"boom in {hook}")

    # ---- scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        self.note("bind_kv_cache_manager")
        super().bind_kv_cache_manager(kv_cache_manager)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self.pool = gpu_block_pool

    def get_finished_count(self) -> int | None:
        self.note("get_finished_count")
        return None

    def set_xfer_handshake_metadata(self, metadata: Any) -> None:
        self.note("set_xfer_handshake_metadata")

    def on_new_request(self, request: Any) -> None:
        self.requests[request.request_id] = request
        self.note("on_new_request")

    def stored_tokens(self, tokens: list[int]) -> int:
        size, num = self.block_size, 0
        while num + size <= len(tokens) and tuple(tokens[: num + size]) in self.script.store:
            num += size
        return num

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        self.note("get_num_new_matched_tokens")
        self.script.asked.append((request.request_id, num_computed_tokens))
        if self.script.num_none_answers > 0:
            self.script.num_none_answers -= 1
            return None, False
        self.local[request.request_id] = num_computed_tokens
        if self.script.match_override is not None:
            return self.script.match_override(request, num_computed_tokens)
        num = self.stored_tokens(request.all_token_ids)
        if not self.script.is_async:
            num = min(num, (request.num_tokens - 1) // self.block_size * self.block_size)
        num = max(0, num - num_computed_tokens)
        return num, self.script.is_async and num > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.note("update_state_after_alloc")
        self.script.allocs.append(
            (request.request_id, num_external_tokens, request.num_computed_tokens, request.status.name)
        )
        if num_external_tokens:
            table, size = blocks.get_block_ids()[0], self.block_size
            first = self.local[request.request_id] // size
            end = self.local[request.request_id] + num_external_tokens
            tokens = request.all_token_ids
            self.loads[request.request_id] = [
                (tuple(tokens[: (i + 1) * size]), table[i], min(size, end - i * size))
                for i in range(first, -(-end // size))
            ]

    def build_connector_meta(self, scheduler_output: Any) -> Meta:
        self.note("build_connector_meta")
        meta = Meta(loads=self.loads, is_async=self.script.is_async)
        self.loads = {}
        computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        cached = scheduler_output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        assert set(computed) == set(scheduler_output.num_scheduled_tokens)
        for req_id, num in scheduler_output.num_scheduled_tokens.items():
            tokens = self.requests[req_id].all_token_ids
            table = scheduler_output.kv_connector_block_state.get_block_ids(req_id)[0]
            for i in range(computed[req_id] // self.block_size, (computed[req_id] + num) // self.block_size):
                meta.saves.append((tuple(tokens[: (i + 1) * self.block_size]), table[i]))
        if self.script.store_steps:
            self.pool.touch(self.pool.blocks[block_id] for _, block_id in meta.saves)
        return meta

    def update_connector_output(self, connector_output: Any) -> None:
        self.note("update_connector_output")

    def request_finished(self, request: Any, block_ids: list[int]) -> Any:
        raise AssertionError("an HMA connector is asked for all groups")

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> Any:
        self.note("request_finished_all_groups")
        self.script.finished[request.request_id] = (request.status.name, block_ids)
        if self.script.delay_free:
            self.script.worker.sending.add(request.request_id)
        return self.script.delay_free, self.script.finish_params

    def has_pending_push_work(self) -> bool:
        self.script.pending_push_steps -= 1
        return self.script.pending_push_steps >= 0

    def has_pending_block_frees(self) -> bool:
        return self.script.pending_frees

    # ---- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.note("register_kv_caches")
        self.kv_caches = list(kv_caches.values())

    def get_handshake_metadata(self) -> Any:
        self.note("get_handshake_metadata")

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        self.note("handle_preemptions")

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.note("bind_connector_metadata")

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        self.note("clear_connector_metadata")

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.note("start_load_kv")
        meta = self._get_connector_metadata()
        assert isinstance(meta, Meta)
        for req_id, items in meta.loads.items():
            if meta.is_async:
                self.in_flight[req_id] = (self.script.load_steps, items)
            else:
                self.load(req_id, items)

    def load(self, req_id: str, items: list[tuple[Key, int, int]]) -> None:
        any_bad = False
        for key, block_id, num_tokens in items:
            index = len(key) // self.block_size - 1
            is_bad = index in self.script.bad_block_indexes and self.script.num_failures_left > 0
            self.script.block_ids_loaded.append(block_id)
            for layer, saved in zip(self.kv_caches, self.script.store[key], strict=True):
                layer[block_id] = 7.0
                if not is_bad:
                    layer[block_id, :, :num_tokens] = saved[:, :num_tokens]
            if is_bad and self.script.by_position:
                self.failures.add(LoadFailure(req_id, 0, index))
            elif is_bad:
                self.errors.add(block_id)
            any_bad |= is_bad
        if any_bad:
            self.script.num_failures_left -= 1

    def wait_for_layer_load(self, layer_name: str) -> None:
        self.note("wait_for_layer_load")

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        self.note("save_kv_layer")

    def wait_for_save(self) -> None:
        self.note("wait_for_save")
        pool, is_bad = self.script.scheduler.pool, bool(self.errors or self.failures)
        for key, block_id in self._get_connector_metadata().saves:
            if self.script.store_steps and is_bad:
                pool.free_blocks([pool.blocks[block_id]])
            elif self.script.store_steps:
                self.slow_stores.append((self.script.store_steps, key, block_id))
            elif not is_bad:
                self.script.store[key] = [layer[block_id].clone() for layer in self.kv_caches]

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        self.note("get_transfer_results")
        self.run_slow_stores()
        results = KVConnectorTransferResults(
            set(self.script.extra_sent), set(self.script.extra_received), set(self.script.extra_failed)
        )
        for req_id, (steps, items) in list(self.in_flight.items()):
            if self.script.hold_loads:
                continue
            self.in_flight[req_id] = (steps - 1, items)
            if steps <= 0:
                del self.in_flight[req_id]
                self.load(req_id, items)
                results.finished_recving.add(req_id)
                if self.script.fails_recving and self.script.num_failures_left > 0:
                    self.script.num_failures_left -= 1
                    results.failed_recving.add(req_id)
        if self.script.release_sends:
            results.finished_sending |= self.sending
            self.sending = set()
        results.failed_blocks = self.failures | self.script.extra_failed_blocks
        self.failures = set()
        return results

    def run_slow_stores(self) -> None:
        """Copy what was saved `store_steps` steps ago, out of blocks that were pinned so long."""
        self.slow_stores = [(steps - 1, key, block_id) for steps, key, block_id in self.slow_stores]
        pool = self.script.scheduler.pool
        for _, key, block_id in [store for store in self.slow_stores if store[0] <= 0]:
            self.script.store[key] = [layer[block_id].clone() for layer in self.kv_caches]
            pool.free_blocks([pool.blocks[block_id]])
        self.slow_stores = [store for store in self.slow_stores if store[0] > 0]

    def get_block_ids_with_load_errors(self) -> set[int]:
        self.note("get_block_ids_with_load_errors")
        errors, self.errors = self.errors, set()
        return errors | self.script.extra_bad_ids

    def build_connector_worker_meta(self) -> None:
        self.note("build_connector_worker_meta")

    def shutdown(self) -> None:
        self.note("shutdown")


@dataclass
class Engine:
    """An LLM over the stub model, its script and its clock."""

    llm: LLM
    model: StubModel
    script: Script
    clock: FakeClock

    def add(self, tokens: list[int], max_tokens: int = 4, **params: Any) -> str:
        return self.llm.add_request(tokens, SamplingParams(max_tokens=max_tokens, temperature=0, **params))

    def step(self) -> list[RequestOutput]:
        """One step, then all invariants."""
        outputs = self.llm.step()
        self.llm.check_integrity()
        self.clock.advance(0.001)
        return outputs

    def finish(self, limit_steps: int = 500) -> dict[str, RequestOutput]:
        """Step until every request has finished."""
        outputs = {}
        for _ in range(limit_steps):
            if not self.llm.has_unfinished_requests():
                return outputs
            outputs.update((output.request_id, output) for output in self.step())
        raise AssertionError(f"requests unfinished after {limit_steps} steps")

    def run(self, tokens: list[int], max_tokens: int = 4) -> RequestOutput:
        """Complete one prompt and check its tokens against the model's definition."""
        request_id = self.add(tokens, max_tokens)
        output = self.finish()[request_id]
        self.check(output)
        return output

    def check(self, output: RequestOutput) -> None:
        """The completion is the right one."""
        tokens = output.outputs[0].token_ids
        assert output.error is None
        assert tokens == self.model.expected_tokens(output.prompt_token_ids, len(tokens))

    def forget(self) -> None:
        """Empty the engine's prefix cache and poison its blocks."""
        assert self.llm.scheduler.manager.reset_prefix_cache()
        self.llm.runner._kv.storage.fill_(0x55)

    def poison(self) -> None:
        """From now on overwrite the KV of blocks nobody holds or can find, as soon as that is so."""
        pool = self.llm.scheduler.manager.block_pool
        pattern = torch.tensor([0x7F7F7F7F], dtype=torch.int32).view(torch.float32).item()
        free, take, evict = pool.free_blocks, pool.get_new_blocks, pool.evict_blocks

        def spoil(blocks: Any) -> None:
            for block in blocks:
                if block.ref_cnt == 0 and block.block_hash is None and not block.is_null:
                    for view in self.llm.kv_caches.values():
                        view[block.block_id] = pattern

        def free_blocks(blocks: Any) -> None:
            blocks = list(blocks)
            free(blocks)
            spoil(blocks)

        def get_new_blocks(num_blocks: int) -> Any:
            blocks = take(num_blocks)
            for view in self.llm.kv_caches.values():
                view[[block.block_id for block in blocks]] = pattern
            return blocks

        def evict_blocks(block_ids: Any) -> None:
            block_ids = list(block_ids)
            evict(block_ids)
            spoil(pool.blocks[block_id] for block_id in block_ids)

        pool.free_blocks, pool.get_new_blocks, pool.evict_blocks = free_blocks, get_new_blocks, evict_blocks

    @property
    def num_free_blocks(self) -> int:
        return self.llm.scheduler.manager.block_pool.get_num_free_blocks()


@pytest.fixture(params=["V1", "V2"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on both model runners: all engines of it, in whatever process."""
    monkeypatch.setenv("KVFERRY_USE_V2_MODEL_RUNNER", str(int(request.param == "V2")))
    return str(request.param)


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """Makes engines with the fake connector; keyword `script`, the failure policy, and LLM settings."""
    engines = []
    torch.set_num_threads(1)

    def make(
        script: Script | None = None, policy: str = "recompute", connector: bool = True, **settings: Any
    ) -> Engine:
        script = script or Script()
        CURRENT.append(script)
        model, clock = StubModel(), FakeClock()
        transfer = {
            "kv_connector": "FakeConnector",
            "kv_connector_module_path": __name__,
            "kv_role": "kv_both",
            "kv_load_failure_policy": policy,
        }
        settings = {"num_kv_blocks": 33, "block_size": BLOCK_SIZE, "max_num_batched_tokens": 16} | settings
        llm = LLM(model, kv_transfer_config=transfer if connector else None, clock=clock, **settings)
        engines.append(llm)
        return Engine(llm, model, script, clock)

    yield make
    for llm in engines:
        llm.shutdown()
        llm.check_integrity()


@pytest.fixture
def script() -> type[Script]:
    """The Script class."""
    return Script


@pytest.fixture
def tokens() -> Callable[[int, int], list[int]]:
    """`tokens(n, seed)`: n token ids, different for each seed."""

    def make(num_tokens: int, seed: int = 0) -> list[int]:
        return [(seed * 7919 + i * 31 + i * i) % 1000 for i in range(num_tokens)]

    return make
