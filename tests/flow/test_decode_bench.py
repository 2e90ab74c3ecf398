"""DecodeBenchConnector: all but the last token of a prompt is claimed, and the noise lands in the right blocks."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from kvferry import LLM, SamplingParams
from kvferry.config import KVTransferConfig
from kvferry.contract import FullAttentionSpec, KVCacheSpec, KVConnectorFactory, SlidingWindowSpec, make_kv_cache_config
from kvferry.contract.clauses import broken_match
from kvferry.contract.host import host_info
from kvferry.contract.views import RequestView, StepView
from kvferry.errors import ConfigError
from kvferry.examples.decode_bench import DecodeBenchSchedulerSide, DecodeBenchWorkerSide
from kvferry.testing.stub_model import StubModel

pytestmark = pytest.mark.usefixtures("runner")

BLOCK = 4


@pytest.fixture
def make_llm():
    engines = []

    def make(extra=None, model=None, **settings):
        transfer = {"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both"}
        transfer["kv_connector_extra_config"] = extra or {}
        settings = {"block_size": BLOCK, "num_kv_blocks": 64, **settings}
        engines.append(LLM(model or StubModel(), kv_transfer_config=transfer, **settings))
        return engines[-1]

    yield make
    for llm in engines:
        llm.check_integrity()
        assert llm.counters.hook_errors == {}
        assert llm.counters.contract_errors == {}
        llm.shutdown()


NOISE = {"fill_mean": 0.0, "fill_std": 0.015}


def decode(llm, tokens, max_tokens=5):
    return llm.generate(tokens, SamplingParams(max_tokens=max_tokens, temperature=0))[0]


def spy_on_computed_tokens(monkeypatch):
    sizes = []
    forward = StubModel.forward

    def spy(self, batch, kv, hooks):
        sizes.append(len(batch.input_ids))
        return forward(self, batch, kv, hooks)

    monkeypatch.setattr(StubModel, "forward", spy)
    return sizes


@pytest.mark.parametrize(("num_tokens", "claim"), [(1, 0), (4, 3), (5, 4), (40, 39), (41, 40), (43, 42)])
def test_only_the_last_token_is_computed(make_llm, monkeypatch, num_tokens, claim):
    sizes = spy_on_computed_tokens(monkeypatch)
    output = decode(make_llm(), list(range(num_tokens)))
    assert output.num_external_tokens == claim
    assert len(output.outputs[0].token_ids) == 5
    assert sizes == [num_tokens - claim, 1, 1, 1, 1]


def test_local_blocks_are_not_claimed(make_llm, monkeypatch):
    llm = make_llm()
    decode(llm, list(range(40)))
    output = decode(llm, list(range(60)))
    assert (output.num_cached_tokens, output.num_external_tokens) == (59, 19)
    assert decode(llm, list(range(20))).num_external_tokens == 3


def test_hybrid_engine_and_preemptions(make_llm):
    llm = make_llm(model=StubModel(num_layers=2, windows=[None, 8]), num_kv_blocks=40)
    params = SamplingParams(max_tokens=20, temperature=0)
    outputs = llm.generate([[seed, *range(50)] for seed in range(4)], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [20] * 4
    assert llm.scheduler.num_preemptions > 0


def test_the_seed_decides_the_answers(make_llm):
    answers = [
        tuple(decode(make_llm({"seed": seed, **extra}), list(range(41))).outputs[0].token_ids)
        for seed, extra in [(1, NOISE), (1, NOISE), (2, NOISE), (1, {"fill_std": 0.5})]
    ]
    assert answers[0] == answers[1]
    assert len(set(answers)) == 3


FULL = FullAttentionSpec(block_size=4, num_kv_heads=2, head_size=64, dtype=torch.float32)
WINDOW = SlidingWindowSpec(block_size=8, num_kv_heads=2, head_size=32, dtype=torch.bfloat16, sliding_window=16)
GROUPS = [{"full0": FULL, "full1": FULL}, {"swa": WINDOW}]


def sides(groups=GROUPS, **extra):
    transfer = KVTransferConfig("DecodeBenchConnector", kv_role="kv_both", kv_connector_extra_config=extra)
    config = SimpleNamespace(
        kv_transfer_config=transfer,
        model_config=SimpleNamespace(model="m", max_model_len=512),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
    )
    info = host_info(config, make_kv_cache_config(32, groups))
    return DecodeBenchSchedulerSide(info), DecodeBenchWorkerSide(info)


def view(num_tokens):
    return RequestView(SimpleNamespace(request_id="r", num_tokens=num_tokens, all_token_ids=[0] * num_tokens))


@pytest.mark.parametrize("num_tokens", range(1, 40))
@pytest.mark.parametrize("num_local", [0, 8, 16])
def test_claims_keep_the_contract(num_tokens, num_local):
    side, _ = sides()
    if num_local < num_tokens:
        claim = side.get_num_new_matched_tokens(view(num_tokens), num_local)
        assert broken_match(claim, num_local, num_tokens) is None
        assert num_tokens - num_local - claim[0] == 1


@pytest.mark.parametrize(
    ("num_tokens", "full_blocks", "window_blocks"),
    [
        (41, range(11, 19), {21, 22}),
        (42, range(11, 20), {21, 22, 23}),  # one claimed token in the last block of each group
        (44, range(11, 20), {21, 22, 23}),
    ],
)
def test_only_owned_blocks_of_the_owning_group_are_filled(num_tokens, full_blocks, window_blocks):
    side, worker = sides(fill_mean=3.0, fill_std=0.5)
    kv = {
        "full0": torch.zeros(64, 2, 2, 128),  # two kernel blocks to a block
        "full1": torch.zeros(64, 2, 2, 128),
        "swa": torch.zeros(32, 2, 8, 64, dtype=torch.bfloat16),
    }
    worker.register_kv_caches(kv)
    request = view(num_tokens)
    assert side.get_num_new_matched_tokens(request, 8) == (num_tokens - 9, False)
    full = [1, 2, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    window = [4, 0, 0, 21, 22, 23]  # before its window the request has no blocks
    side.update_state_after_alloc(request, (full, window), num_tokens - 9)
    worker.start_load_kv(side.build_connector_meta(StepView()))
    for name, expected in (("full0", set(full_blocks)), ("full1", set(full_blocks)), ("swa", window_blocks)):
        blocks = kv[name].view(32, -1)
        assert {b for b in range(32) if blocks[b].any()} == expected, name
        filled = blocks[sorted(expected)].float()
        # Five standard errors of mean and deviation.
        assert abs(filled.mean() - 3.0) < 5 * 0.5 / math.sqrt(filled.numel())
        assert abs(filled.std() - 0.5) < 5 * 0.5 / math.sqrt(2 * filled.numel()) + 0.01
    assert side.build_connector_meta(StepView()).fills == {}, "once"


def test_a_claim_that_was_not_taken_fills_nothing():
    side, _ = sides()
    side.get_num_new_matched_tokens(view(41), 0)
    side.update_state_after_alloc(view(41), ([1] * 11, [2] * 6), 0)
    assert side.build_connector_meta(StepView()).fills == {}


def test_what_cannot_be_filled_is_refused():
    class OtherSpec(KVCacheSpec):
        page_size_bytes = 64

    with pytest.raises(ConfigError, match="mamba"):
        sides([{"mamba": OtherSpec(block_size=16)}])
    _, worker = sides([{"quantised": FULL}])
    with pytest.raises(ConfigError, match=r"torch\.uint8"):
        worker.register_kv_caches({"quantised": torch.zeros(32, 2, 4, 128, dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"fill_means": 1.0}, "did you mean 'fill_mean'"),
        ({"fill_mean": "0"}, "fill_mean='0' must be float"),
        ({"fill_std": -0.1}, "fill_std=-0.1 must be at least 0"),
        ({"fill_mean": float("nan")}, "fill_mean=nan must be a finite number"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": 1.5}, "seed=1.5 must be int"),
    ],
)
def test_bad_settings(make_llm, extra, text):
    with pytest.raises(ConfigError, match=text):
        make_llm(extra)


def test_it_supports_hybrid_caches():
    assert KVConnectorFactory.supports_hma_config(KVTransferConfig("DecodeBenchConnector", kv_role="kv_both"))
    assert not KVConnectorFactory.supports_hma_config(KVTransferConfig("ExampleConnector", kv_role="kv_both"))
