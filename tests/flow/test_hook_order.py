"""The order in which the embedded engine calls hooks, against literal lists, and that no row of the table is forgotten.

The lists are those of vLLM 0.32's first model runner (measured: facts/contract.md, sections 0 and 1c), plus the hooks
that run inside others (bind_gpu_block_pool, get_finished) and the gate around each layer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry import LLM, SamplingParams
from kvferry.clock import FakeClock
from kvferry.contract import KVConnectorBase_V1, base
from kvferry.contract.hooks import HOOKS
from kvferry.testing.recorder import RECORDS, Record, RecorderMetadata, Script, new_record, recorder_classes
from kvferry.testing.stub_model import StubModel

NOT_CALLED = {
    "supports_divergent_local_hybrid_hits": "asks about recurrent state; this engine runs attention layers only",
    "register_finished_partial_tail": "recurrent producers only",
    "finish_forward": "the second model runner only",
    "reset_capture_state": "the second model runner only",
    "explain_prefix": "asked when a user wants to know",
    "requires_piecewise_for_cudagraph": "asked when CUDA graphs are configured; this engine has none",
    "supports_hma_config": "asked when the configuration is made",
    "supports_v2_model_runner_config": "asked when the configuration is made",
    "build_kv_connector_stats": "asked in the process that exports metrics",
    "build_prom_metrics": "asked in the process that exports metrics",
}
W, S = "worker", "scheduler"
STARTUP = [
    ("class", "get_required_kvcache_layout"),
    (W, "__init__"),
    (W, "get_mem_pool_context"),
    (W, "register_kv_caches"),
    (W, "set_host_xfer_buffer_ops"),
    (S, "__init__"),
    (S, "requires_kv_delivery"),
    (S, "bind_kv_cache_manager"),
    (S, "bind_gpu_block_pool"),
    (S, "get_finished_count"),
    (W, "get_handshake_metadata"),
    (S, "set_xfer_handshake_metadata_pp_aware"),
    (S, "set_xfer_handshake_metadata"),
]
LAYERS = [(W, "has_connector_metadata"), (W, "wait_for_layer_load"), (W, "save_kv_layer")] * 2
HEAD = [(S, "build_connector_meta"), (W, "handle_preemptions"), (W, "bind_connector_metadata")]
TAIL = [
    (W, "wait_for_save"),
    (W, "get_transfer_results"),
    (W, "get_finished"),
    (W, "get_block_ids_with_load_errors"),
    (W, "get_kv_connector_stats"),
    (W, "get_kv_connector_kv_cache_events"),
    (W, "build_connector_worker_meta"),
    (W, "clear_connector_metadata"),
]
END = [(S, "get_kv_connector_stats"), (S, "take_events")]
LOAD = [(W, "start_load_kv")]
LOOKUP = [(S, "get_num_new_matched_tokens")]
ALLOC = [(S, "update_state_after_alloc")]
SOURCES = [(S, "get_external_cache_hit_sources")]
REPORT = [(S, "update_connector_output")]


Recorder, HmaRecorder = recorder_classes(base)


@pytest.fixture
def start():
    """Makes (engine, its record); the record still holds the calls of the start."""
    engines = []

    def make(name: str = "Recorder", **settings: Any) -> tuple[LLM, Record]:
        record = new_record()
        transfer = {"kv_connector": name, "kv_connector_module_path": __name__, "kv_role": "kv_both"}
        transfer["kv_load_failure_policy"] = "recompute"
        settings = {"num_kv_blocks": 33, "block_size": 4, **settings}
        engines.append(LLM(StubModel(), kv_transfer_config=transfer, clock=FakeClock(), **settings))
        return engines[-1], record

    yield make
    for llm in engines:
        llm.shutdown()
        assert llm.counters.hook_errors == llm.counters.contract_errors == {}


def add(llm: LLM, num_tokens: int, max_tokens: int = 1, seed: int = 0) -> str:
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    return llm.add_request([seed * 100 + i for i in range(num_tokens)], params)


def step(llm: LLM, record: Record) -> list[tuple[str, str]]:
    record.calls.clear()
    llm.step()
    return record.names()


def test_startup_and_shutdown(start):
    llm, record = start()
    assert record.names() == STARTUP
    assert record.args("get_required_kvcache_layout") == [(llm.config,)]
    assert list(record.args("register_kv_caches")[0][0]) == list(llm.kv_caches)
    assert record.args("bind_gpu_block_pool") == [(llm.scheduler.manager.block_pool,)]
    assert record.args("set_xfer_handshake_metadata_pp_aware") == [({},)]
    record.calls.clear()
    llm.shutdown()
    llm.shutdown()
    assert record.names() == [(W, "shutdown"), (S, "shutdown")]


@pytest.mark.parametrize(
    ("name", "finish"), [("Recorder", "request_finished"), ("HmaRecorder", "request_finished_all_groups")]
)
def test_step_without_a_load_that_finishes_a_request(start, name, finish):
    llm, record = start(name)
    record.calls.clear()
    request_id = add(llm, 6)
    assert record.names() == [(S, "on_new_request")]
    admission = [*LOOKUP, *ALLOC]
    assert step(llm, record) == [*admission, *HEAD, *LAYERS, *LOAD, *TAIL, (S, finish), *REPORT, *END]
    request, block_ids = record.args(finish)[0]
    assert request.request_id == request_id
    assert len(block_ids[0] if finish.endswith("groups") else block_ids) == 2
    assert record.args("get_transfer_results") == [(set(),)]
    assert step(llm, record) == [*HEAD, *LOAD, *TAIL, *END]
    assert record.args("get_transfer_results") == [({request_id},)], "its end is told in the next step"


def test_step_with_a_sync_load(start):
    llm, record = start()
    record.script.hit_tokens = 4
    add(llm, 6, max_tokens=2)
    assert step(llm, record) == [*LOOKUP, *ALLOC, *SOURCES, *HEAD, *LOAD, *LAYERS, *TAIL, *REPORT, *END]
    context = record.args("start_load_kv")[0][0]
    assert set(context.attn_metadata) == set(context.no_compile_layers) == set(llm.kv_caches)
    _, blocks, num_external = record.args("update_state_after_alloc")[0]
    assert [len(group) for group in blocks.get_block_ids()] == [2]
    assert num_external == 4
    assert step(llm, record) == [*HEAD, *LAYERS, *LOAD, *TAIL, (S, "request_finished"), *REPORT, *END]


def test_steps_of_an_async_load(start):
    llm, record = start()
    record.script = Script(hit_tokens=4, is_async=True, load_steps=2)
    add(llm, 6)
    groups = [(S, "get_loaded_kv_cache_group_ids")]
    assert step(llm, record) == [*LOOKUP, *groups, *ALLOC, *SOURCES, *HEAD, *LOAD, *TAIL, *END]
    assert step(llm, record) == [*HEAD, *LOAD, *TAIL, *END], "an empty step, and nothing to report"
    assert step(llm, record) == [*HEAD, *LOAD, *TAIL, *REPORT, *END]
    promoted = step(llm, record)
    assert promoted == [*ALLOC, *HEAD, *LAYERS, *LOAD, *TAIL, (S, "request_finished"), *REPORT, *END]
    assert record.args("update_state_after_alloc")[0][2] == 0


def test_empty_step(start):
    llm, record = start()
    assert step(llm, record) == [*HEAD, *LOAD, *TAIL, *END]
    context = record.args("start_load_kv")[0][0]
    assert context.attn_metadata is None
    assert set(context.no_compile_layers) == set(llm.kv_caches)


def test_metadata_is_bound_between_bind_and_clear(start):
    llm, record = start()
    add(llm, 6)
    step(llm, record)
    meta = record.args("bind_connector_metadata")[0][0]
    assert isinstance(meta, RecorderMetadata)
    assert record.args("handle_preemptions") == [(meta,)]
    assert not KVConnectorBase_V1.has_connector_metadata(record.worker)


def test_pending_frees_are_asked_before_a_preemption(start):
    llm, record = start(num_kv_blocks=5, enable_prefix_caching=False)
    for seed in (1, 2):
        add(llm, 7, max_tokens=8, seed=seed)
    for _ in range(2):
        step(llm, record)
        assert record.args("has_pending_block_frees") == []
    assert (S, "has_pending_block_frees") in step(llm, record)
    assert llm.scheduler.num_preemptions == 1
    while llm.has_unfinished_requests():
        llm.step()


def test_asked_between_steps(start):
    llm, record = start()
    record.calls.clear()
    assert not llm.has_requests()
    assert record.names() == [(S, "has_pending_push_work")]
    record.calls.clear()
    assert llm.scheduler.manager.reset_prefix_cache()
    assert llm.reset_prefix_cache(reset_connector=True)
    assert (S, "reset_cache") in record.names()


def test_the_block_copy_function_copies_both_ways(start):
    llm, record = start()
    caches = llm.kv_caches
    for index, tensor in enumerate(caches.values()):
        tensor[7] = 1.0 + index
        tensor[9] = 5.0 + index
    copy_blocks = record.args("set_host_xfer_buffer_ops")[0][0]
    host = {name: torch.zeros_like(tensor) for name, tensor in caches.items()}
    copy_blocks(caches, host, [7, 9], [2, 1], "d2h")
    copy_blocks(host, caches, [1, 2], [20, 21], "h2d")
    for index, (name, tensor) in enumerate(caches.items()):
        assert float(host[name].sum()) == (6.0 + 2 * index) * tensor[7].numel()
        assert bool((tensor[20] == 5.0 + index).all() and (tensor[21] == 1.0 + index).all())


def test_every_row_is_called_or_has_a_reason(start):
    called = set()
    for name in ("Recorder", "HmaRecorder"):
        llm, record = start(name, num_kv_blocks=5, enable_prefix_caching=False)
        called |= {hook for _, hook in record.names()}
        for is_async in (False, True):
            record.script = Script(hit_tokens=4, is_async=is_async)
            for seed in (1, 2):
                add(llm, 7, max_tokens=8, seed=seed)
            called |= {hook for _, hook in record.names()}
            for _ in range(60):
                called |= {hook for _, hook in step(llm, record)}
            assert not llm.has_unfinished_requests()
        record.calls.clear()
        llm.has_requests()
        llm.reset_prefix_cache(reset_connector=True)
        llm.shutdown()
        called |= {hook for _, hook in record.names()}
    rows = {hook.name for hook in HOOKS}
    assert called - {"__init__"} <= rows
    assert NOT_CALLED.keys() <= rows
    assert rows - called == NOT_CALLED.keys()


def test_a_finished_count_this_engine_cannot_keep_is_refused(start, monkeypatch):
    from kvferry.errors import ContractError

    monkeypatch.setattr(KVConnectorBase_V1, "get_finished_count", lambda self: 2)
    with pytest.raises(ContractError, match=r"Recorder.get_finished_count answered 2: this engine has one worker"):
        start()
    assert RECORDS[-1].names()[-2:] == [(W, "shutdown"), (S, "shutdown")]


def test_handshake_metadata_reaches_the_scheduler_by_rank(start, monkeypatch):
    shake = SimpleNamespace()
    monkeypatch.setattr(KVConnectorBase_V1, "get_handshake_metadata", lambda self: shake)
    _, record = start()
    assert record.args("set_xfer_handshake_metadata_pp_aware") == [({(0, 0): shake},)]
    assert record.args("set_xfer_handshake_metadata") == [({0: shake},)]
