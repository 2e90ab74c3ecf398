"""Loads that fail in one of several KV groups: recomputed or a visible error, never a wrong token with success."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kvferry import LLM, SamplingParams
from kvferry.contract import LoadFailure
from kvferry.engine.outputs import RequestOutput
from kvferry.testing.faulty import Medium, forget_media, media
from kvferry.testing.stub_model import StubModel

BLOCK = 4
WINDOW = 10
MODEL = StubModel(windows=(WINDOW, None, WINDOW))
PROMPT = [(i * 31 + i * i) % 1000 for i in range(50)]
NUM_LOADED = 48
"""Behind 48 tokens the next one sees 39 to 47: of the windows blocks 9 to 11 are loaded, of the full group all 12."""
PARTS = [(0, 9), (0, 10), (0, 11), (1, 9), (1, 11), (2, 0), (2, 5), (2, 11)]
"""(group, position) of blocks to break; groups 0 and 1 have windows."""


@pytest.fixture
def make_llm() -> Iterator[Callable[..., LLM]]:
    engines: list[LLM] = []
    torch.set_num_threads(1)
    forget_media()

    def make(load_async: bool, policy: str = "recompute", model: StubModel = MODEL, **options: Any) -> LLM:
        transfer = {
            "kv_connector": "FaultyConnector",
            "kv_connector_module_path": "kvferry.testing.faulty",
            "kv_role": "kv_both",
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {"medium": "a", "load_async": load_async},
        }
        settings = {"block_size": BLOCK, "num_kv_blocks": 120, "max_num_batched_tokens": 32, **options}
        engines.append(LLM(model, kv_transfer_config=transfer, **settings))
        return engines[-1]

    yield make
    for llm in engines:
        llm.shutdown()
        llm.scheduler.check_integrity()


def run(llm: LLM, prompts: list[list[int]], max_tokens: int = 4) -> list[RequestOutput]:
    """Generate; whatever is called a success has the right tokens."""
    outputs = llm.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0))
    for output in outputs:
        if output.error is None:
            model: Any = llm._model
            assert output.outputs[0].token_ids == model.expected_tokens(output.prompt_token_ids, max_tokens)
    llm.scheduler.check_integrity()
    return outputs


def forget(llm: LLM) -> None:
    """What is not in the medium is nowhere, and what was free is spoiled."""
    while llm.has_requests():
        llm.step()
    assert llm.reset_prefix_cache()
    llm.runner._kv.storage[llm.runner._kv.storage.numel() // 120 :].fill_(0x55)


class Spoiler:
    """Makes the medium's loads write garbage into chosen blocks and tells of it in the chosen way."""

    def __init__(self, medium: Medium, parts: set[tuple[int, int]], way: str, times: int = 1) -> None:
        self.num_left = times
        self._parts, self._way = parts, way
        self._worker = medium.workers[-1]
        self._load = self._worker._load
        self._worker._load = self.load  # type: ignore[method-assign]

    def load(self, job: Any) -> None:
        self._load(job)
        if self.num_left == 0:
            return
        hit = [(key[0], index, block_id) for key, index, block_id in job.pages if (key[0], index) in self._parts]
        self.num_left -= bool(hit)
        for group, index, block_id in hit:
            for layer in self._worker._layers[group]:
                layer[block_id] = 7.0
            if self._way == "position":
                self._worker._results.failed_blocks.add(LoadFailure(job.request_id, group, index))
            else:
                self._worker._bad_blocks.add(block_id)


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("way", ["position", "block id"])
@pytest.mark.parametrize("load_async", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_one_bad_block_of_any_group(make_llm: Any, part: Any, way: str, load_async: bool, policy: str) -> None:
    llm = make_llm(load_async, policy)
    run(llm, [PROMPT])
    forget(llm)
    spoiler = Spoiler(media("a"), {part}, way)
    (output,) = run(llm, [PROMPT])
    assert spoiler.num_left == 0, "the block was never loaded"
    assert llm.counters.load_failures == 1
    if policy == "fail":
        assert output.outputs[0].finish_reason == "error"
        assert output.outputs[0].token_ids == []
    else:
        assert output.error is None
        assert output.num_external_tokens < NUM_LOADED
    assert llm.counters.contract_errors == {}
    (again,) = run(llm, [PROMPT])  # nothing bad can be found
    assert again.error is None
    forget(llm)
    assert run(llm, [[*PROMPT[:30], 1, 2, 3]])[0].error is None  # nor was it stored


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("load_async", [True, False], ids=["async", "sync"])
def test_others_go_on_beside_a_failed_load(make_llm: Any, part: Any, load_async: bool) -> None:
    llm = make_llm(load_async)
    other = [999 - token for token in PROMPT]
    run(llm, [PROMPT, other])
    forget(llm)
    Spoiler(media("a"), {part}, "position")
    outputs = run(llm, [PROMPT, other, PROMPT, PROMPT[:20]], max_tokens=12)
    assert [output.error for output in outputs] == [None] * 4
    assert llm.counters.load_failures == 1


@pytest.mark.parametrize("load_async", [True, False], ids=["async", "sync"])
def test_a_failure_behind_a_local_hit_falls_back_to_what_every_group_has(make_llm: Any, load_async: bool) -> None:
    llm = make_llm(load_async)
    run(llm, [PROMPT])
    forget(llm)
    run(llm, [PROMPT[:26]])  # six blocks are found by the engine itself (after a load)
    Spoiler(media("a"), {(2, 8)}, "position")
    (output,) = run(llm, [PROMPT])
    assert output.error is None
    assert llm.counters.load_failures == 1


@pytest.mark.parametrize("named", ["its block id", "its position"])
@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_a_failure_told_after_the_window_left_the_block_ends_those_who_read_it(
    make_llm: Any, named: str, policy: str
) -> None:
    """The block was loaded as good, read, and freed; only then its connector says that it was bad."""
    llm = make_llm(True, policy)
    run(llm, [PROMPT])
    forget(llm)
    params = SamplingParams(max_tokens=30, temperature=0)
    name = llm.add_request(PROMPT, params)
    manager, worker = llm.scheduler.manager, media("a").workers[-1]
    while not manager.get_block_ids(name)[0] or not manager.get_block_ids(name)[0][9]:
        llm.step()
    block_id = manager.get_block_ids(name)[0][9]
    while manager.get_block_ids(name)[0][9]:
        assert not any(output.finished for output in llm.step())
    if named == "its block id":
        worker._bad_blocks.add(block_id)
    else:
        worker._results.failed_blocks.add(LoadFailure(name, 0, 9))
    (output,) = llm.step()
    assert output.outputs[0].finish_reason == "error"
    assert output.error == "its KV cache was found bad after it had been used"
    assert manager.block_pool._cached == {}, "what was computed from it can still be found"
    assert run(llm, [PROMPT[:30]])[0].num_cached_tokens >= 0


def test_a_plan_that_breaks_leaves_nothing_half_loaded(make_llm: Any) -> None:
    """update_state_after_alloc raises: the window tails of the claim were taken, those of the local hit were not."""
    llm = make_llm(False)
    run(llm, [PROMPT])
    forget(llm)
    medium = media("a")
    medium.faults.raise_in["update_state_after_alloc"] = 1
    assert run(llm, [PROMPT])[0].error is None
    assert llm.counters.hook_errors == {"update_state_after_alloc": 1}


def test_sync_failures_of_the_offloading_connector_are_told_by_position(tmp_path: Any) -> None:
    """A slot that was given away while it was to be loaded: three groups, a synchronous load."""
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"weights_version": "1", "cpu_bytes_to_use": 1 << 20, "load_async": False},
    }
    prompt = [(i * 31 + i * i) % 1000 for i in range(200)]
    model = StubModel(windows=(40, None, 40))
    with LLM(model, kv_transfer_config=transfer, block_size=16, num_kv_blocks=120) as llm:
        run(llm, [prompt])
        forget(llm)
        worker: Any = llm._hosted.worker._guard.connector.side  # type: ignore[union-attr]
        load = worker._load
        worker._load = lambda order, part: 1 / 0 if part.group_id == 2 else load(order, part)
        (output,) = run(llm, [prompt])
        assert output.outputs[0].finish_reason == "error"
        worker._load = load
        forget(llm)
        assert run(llm, [prompt])[0].num_external_tokens == 192
        assert llm.counters.contract_errors == {}
