"""The two model runners: what a connector sees of each, that both give the same batches and tokens, and V2's rows.

The lists of hooks are those of vLLM 0.32's second runner (facts/contract.md, section 1c); test_hook_order.py has the
first one's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kvferry import LLM, SamplingParams
from kvferry.clock import FakeClock
from kvferry.contract import base
from kvferry.engine import runner as runner_module
from kvferry.engine.layout_choice import LAYOUTS
from kvferry.engine.outputs import RequestOutput
from kvferry.testing.recorder import HookCall, Record, Script, new_record, recorder_classes
from kvferry.testing.stub_model import StubModel

Recorder, HmaRecorder = recorder_classes(base)
LAYERS = ["wait_for_layer_load", "save_kv_layer"] * 2
HEAD = ["handle_preemptions", "bind_connector_metadata"]
TAIL = [
    "wait_for_save", "get_transfer_results", "get_block_ids_with_load_errors", "get_kv_connector_stats",
    "get_kv_connector_kv_cache_events", "build_connector_worker_meta", "clear_connector_metadata",
]  # fmt: skip
LOAD, SAMPLE, FINISH = ["start_load_kv"], ["SAMPLE"], ["finish_forward"]
V1 = {
    "plain": [*HEAD, *LAYERS, *LOAD, *TAIL, *SAMPLE],
    "sync": [*HEAD, *LOAD, *LAYERS, *TAIL, *SAMPLE],
    "empty": [*HEAD, *LOAD, *TAIL],
}
V2 = {
    "plain": [*HEAD, *LAYERS, *FINISH, *SAMPLE, *LOAD, *TAIL],
    "sync": [*HEAD, *LOAD, *LAYERS, *FINISH, *SAMPLE, *TAIL],
    "empty": [*HEAD, *FINISH, *LOAD, *TAIL],
}
Start = Callable[..., tuple[LLM, Record]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Makes (engine, its record); the choice of tokens stands in the record too."""
    engines, sample = [], runner_module.sample

    def make(use_v2: bool, **settings: Any) -> tuple[LLM, Record]:
        record = new_record()
        transfer = {"kv_connector": "Recorder", "kv_connector_module_path": __name__, "kv_role": "kv_both"}
        settings = {"num_kv_blocks": 33, "block_size": 4, **settings}
        llm = LLM(StubModel(), kv_transfer_config=transfer, clock=FakeClock(), use_v2_model_runner=use_v2, **settings)
        engines.append(llm)

        def noted(*args: Any) -> Any:
            record.calls.append(HookCall("worker", "SAMPLE", (), ""))
            return sample(*args)

        monkeypatch.setattr(runner_module, "sample", noted)
        return llm, record

    yield make
    for llm in engines:
        llm.shutdown()
        assert llm.counters.hook_errors == llm.counters.contract_errors == {}


def worker_hooks(llm: LLM, record: Record) -> list[str]:
    """What the worker's instance was called in one step, without the gate and the hook inside another."""
    record.calls.clear()
    llm.step()
    llm.check_integrity()
    hidden = ("has_connector_metadata", "get_finished")
    return [hook for role, hook in record.names() if role == "worker" and hook not in hidden]


def steps_of(llm: LLM, record: Record) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """A step of each kind: (worker hooks, keyword arguments of start_load_kv)."""

    def step() -> tuple[list[str], dict[str, Any]]:
        hooks = worker_hooks(llm, record)
        (load,) = [call for call in record.calls if call.hook == "start_load_kv"]
        return hooks, load.kwargs

    params = SamplingParams(max_tokens=2, temperature=0)
    seen = {}
    llm.add_request([7, 8, 9, 10, 11, 12], params, request_id="a")
    seen["plain"] = step()
    record.script = Script(hit_tokens=4)
    llm.add_request([50 + i for i in range(6)], params, request_id="b")
    seen["sync"] = step()
    while llm.has_unfinished_requests():
        llm.step()
    seen["empty"] = step()
    return seen


def test_order_and_arguments_are_those_of_each_runner(start: Start) -> None:
    first, second = steps_of(*start(False)), steps_of(*start(True))
    for kind in ("plain", "sync", "empty"):
        assert first[kind][0] == V1[kind], kind
        assert second[kind][0] == V2[kind], kind
        assert first[kind][0] != second[kind][0]
        assert first[kind][1] == {}
    assert second["empty"][1] == {}
    for kind, ids, num_tokens in (("plain", ["a"], 6), ("sync", ["a", "b"], 1 + 2)):
        kwargs = second[kind][1]
        assert set(kwargs) == {"scheduler_output", "request_state_indices", "request_ids", "num_tokens"}
        assert kwargs["request_ids"] == ids == list(kwargs["scheduler_output"].num_scheduled_tokens)
        assert kwargs["num_tokens"] == num_tokens
        rows = kwargs["request_state_indices"]
        assert rows.dtype == torch.int64
        assert len(set(rows.tolist())) == len(ids)
    before, after = second["plain"][1]["request_state_indices"], second["sync"][1]["request_state_indices"]
    assert before[0] == after[0], "a request keeps its row"


@pytest.mark.parametrize(("block_size", "v2_tokens"), [(128, 32), (48, 16), (64, 32), (32, 32), (4, 4), (20, 20)])
def test_registered_shapes_are_those_of_each_runner(start: Start, block_size: int, v2_tokens: int) -> None:
    for use_v2, tokens in ((False, block_size), (True, v2_tokens)):
        llm, record = start(use_v2, block_size=block_size, num_kv_blocks=5)
        registered = record.args("register_kv_caches")[0][0]
        assert {tuple(t.shape) for t in registered.values()} == {(5 * block_size // tokens, 2, tokens, 8)}
        assert llm.config.cache_config.kernel_block_size == tokens


def test_a_failed_forward_ends_the_binding(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    for use_v2 in (False, True):
        llm, record = start(use_v2)
        llm.add_request([1, 2, 3], SamplingParams(max_tokens=1))
        with monkeypatch.context() as patch:
            patch.setattr(StubModel, "forward", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                llm.step()
        assert record.names()[-1] == ("worker", "clear_connector_metadata")


# ---- kernel blocks of every size ----------------------------------------------------------------------------------


def workload(llm: LLM, seed: int, longest: int, shortest: int = 1) -> None:
    """Prompts that share prefixes come, go and are aborted; every token is checked, and the books after each step."""
    print(f"seed {seed}")
    rng, model = random.Random(seed), StubModel()
    outputs: dict[str, RequestOutput] = {}
    wanted: dict[str, list[int]] = {}

    def step() -> None:
        outputs.update((output.request_id, output) for output in llm.step())
        llm.check_integrity()

    for _ in range(40):
        tokens = [rng.randrange(2)] * rng.randrange(shortest, longest) + [rng.randrange(1000)]
        params = SamplingParams(max_tokens=rng.randrange(1, 40), temperature=0)
        wanted[llm.add_request(tokens, params)] = tokens
        for _ in range(rng.randrange(6)):
            step()
        if rng.random() < 0.2:
            llm.abort_request(rng.choice(list(wanted)))
    while llm.has_requests():
        step()
    for request_id, tokens in wanted.items():
        got = outputs[request_id].outputs[0].token_ids
        assert got == model.expected_tokens(tokens, len(got))
    assert outputs.keys() == wanted.keys()


def offloading(load_async: bool = True) -> dict[str, Any]:
    extra = {"weights_version": "1", "cpu_bytes_to_use": 1 << 20, "load_async": load_async}
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


@pytest.mark.parametrize(("block_size", "kernel_tokens"), [(4, 4), (4, 1), (16, 2), (128, 32), (128, 16)])
def test_every_token_is_right_with_every_kernel_block(block_size: int, kernel_tokens: int) -> None:
    seed, is_large = random.randrange(1 << 30), block_size == 128
    with LLM(
        StubModel(),
        block_size=block_size,
        kernel_block_size=kernel_tokens,
        num_kv_blocks=5 if is_large else 11,
        max_num_seqs=5,
        max_num_batched_tokens=24,
        use_v2_model_runner=True,
    ) as llm:
        workload(llm, seed, 128 if is_large else 6 * block_size, 112 if is_large else 1)
        assert llm.scheduler.num_preemptions > 0


# ---- every layout, both runners ---------------------------------------------------------------------------------

RUNNERS = [(False, None), (True, None), (True, 4), (True, 32)]


@pytest.mark.parametrize(("use_v2", "kernel_tokens"), RUNNERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_is_right_in_every_layout(layout: str, use_v2: bool, kernel_tokens: int | None) -> None:
    """With an offloading connector beside it that stores and loads all the time."""
    with LLM(
        StubModel(),
        block_size=32,
        kernel_block_size=kernel_tokens,
        num_kv_blocks=9,
        max_num_batched_tokens=48,
        kv_cache_layout=layout,
        use_v2_model_runner=use_v2,
        kv_transfer_config=offloading(),
    ) as llm:
        assert llm.kv_cache_config.kv_cache_layout == layout
        workload(llm, random.randrange(1 << 30), 180)
        stats = llm.connector_stats
        assert stats is not None


def test_stored_chunks_are_found_across_what_does_not_change_a_page(tmp_path: Any) -> None:
    """Layer-major and block-first pages are alike, and kernel blocks of whole tokens; another order of heads is not."""
    tokens = [(i * 31 + i * i) % 1000 for i in range(300)]
    stub = StubModel()

    def num_loaded(layout: str, kernel_tokens: int | None = None) -> int:
        transfer = offloading()
        disk = {"type": "fs", "path": str(tmp_path / "kv")}
        transfer["kv_connector_extra_config"] |= {"secondary_tiers": [disk], "chunk_tokens": 64}
        with LLM(
            StubModel(),
            block_size=64,
            kernel_block_size=kernel_tokens,
            num_kv_blocks=9,
            kv_cache_layout=layout,
            use_v2_model_runner=kernel_tokens is not None,
            kv_transfer_config=transfer,
        ) as llm:
            output = llm.generate(tokens, SamplingParams(max_tokens=3, temperature=0))[0]
        assert output.outputs[0].token_ids == stub.expected_tokens(tokens, 3)
        return output.num_external_tokens

    assert num_loaded("LBNHC") == 0
    assert num_loaded("BLNHC") == num_loaded("NHD") == 256
    assert num_loaded("BLNHC", 16) == num_loaded("LBNHC", 32) == 256
    assert num_loaded("HND") == 0
    assert num_loaded("BLHNC") == 256
    assert num_loaded("BLHNC", 16) == 0
    assert num_loaded("LBHNC", 16) == 256
    assert num_loaded("LBHNC", 32) == 0
    assert num_loaded("BLNHC") == 256


CACHES: dict[str, dict[str, Any]] = {
    "OffloadingConnector": {"weights_version": "1", "cpu_bytes_to_use": 1 << 20},
    "ExampleConnector": {"weights_version": "1"},
    "LoadRecoveryExampleConnector": {},
}
"""The built-in connectors that bring KV back; tests/model/test_hidden_states.py has the one that brings none."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CACHES)
def test_kernel_blocks_come_back_through_every_connector(name: str, layout: str, tmp_path: Any) -> None:
    folder = {"shared_storage_path": str(tmp_path / "kv")} if name == "ExampleConnector" else {}
    transfer = {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": CACHES[name] | folder}
    model, tokens = StubModel(), [(i * 31 + i * i) % 1000 for i in range(300)]
    settings = {"block_size": 64, "kernel_block_size": 16, "kv_cache_layout": layout, "num_kv_blocks": 9}
    with LLM(model, kv_transfer_config=transfer, use_v2_model_runner=True, **settings) as llm:
        for num_loaded in (0, 256):
            output = llm.generate(tokens, SamplingParams(max_tokens=5, temperature=0))[0]
            assert output.outputs[0].token_ids == model.expected_tokens(tokens, 5)
            assert output.num_external_tokens == num_loaded
            while llm.has_requests():
                llm.step()
            assert llm.reset_prefix_cache()
            llm._hosted.kv.storage.fill_(0x55)
        assert llm.counters.hook_errors == llm.counters.contract_errors == {}
