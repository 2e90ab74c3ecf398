"""LoadRecoveryExampleConnector: whatever it drops and however it says so, tokens are right and counts are true."""

from __future__ import annotations

import pytest

from kvferry import LLM, SamplingParams
from kvferry.errors import ConfigError
from kvferry.testing.stub_model import StubModel

pytestmark = pytest.mark.usefixtures("runner")

BLOCK = 16
POLICIES = ["recompute", "fail"]
REPORTS = ["block_ids", "positions", "request"]


@pytest.fixture
def make_llm():
    engines = []

    def make(policy="recompute", block_size=BLOCK, num_kv_blocks=64, max_num_batched_tokens=512, **extra):
        transfer = {
            "kv_connector": "LoadRecoveryExampleConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": extra,
        }
        settings = {"block_size": block_size, "num_kv_blocks": num_kv_blocks}
        settings["max_num_batched_tokens"] = max_num_batched_tokens
        engines.append(LLM(StubModel(), kv_transfer_config=transfer, **settings))
        return engines[-1]

    yield make
    for llm in engines:
        llm.check_integrity()
        assert llm.counters.hook_errors == {}
        assert llm.counters.contract_errors == {}
        llm.shutdown()


def prompt(num_tokens, seed=0):
    return [(seed * 7919 + i * 31 + i * i) % 1000 for i in range(num_tokens)]


def run(llm, tokens, max_tokens=3, **kwargs):
    output = llm.generate(tokens, SamplingParams(max_tokens=max_tokens, temperature=0), **kwargs)[0]
    if output.error is None:
        assert output.outputs[0].token_ids == StubModel().expected_tokens(tokens, max_tokens)
    return output


def warm(llm, tokens, **kwargs):
    """Have the connector store the prompt, then empty the engine's own cache and spoil its blocks."""
    run(llm, tokens, **kwargs)
    forget(llm)


def forget(llm):
    assert llm.reset_prefix_cache()
    llm.runner._kv.storage.fill_(0x55)


@pytest.mark.parametrize("load_async", [False, True])
def test_without_drops_it_is_a_cache(make_llm, load_async):
    llm = make_llm(load_async=load_async)
    tokens = prompt(80)
    warm(llm, tokens)
    expected = 80 if load_async else 64  # a synchronous load leaves a token to compute
    output = run(llm, tokens)
    assert (output.num_cached_tokens, output.num_external_tokens) == (expected, expected)
    assert llm.counters.load_failures == 0


@pytest.mark.parametrize("load_async", [False, True])
@pytest.mark.parametrize("report_by", REPORTS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dropped", [[0], [2], [3, 1]])
def test_dropped_blocks(make_llm, load_async, report_by, policy, dropped):
    llm = make_llm(policy, load_async=load_async, report_by=report_by, fail_block_indexes=dropped)
    tokens = prompt(90)
    warm(llm, tokens)
    output = run(llm, tokens)
    assert llm.counters.load_failures == 1
    if policy == "fail":
        assert output.outputs[0].finish_reason == "error"
        assert output.outputs[0].token_ids == []
        return
    # What is before the first dropped block counts as cached, or nothing when the whole load counts as failed. An
    # asynchronous load that brought nothing is asked for again: by then the dropped keys are no hits any more.
    kept = 0 if report_by == "request" else min(dropped) * BLOCK
    if load_async and report_by == "request" and dropped == [2]:
        kept = 2 * BLOCK
    if load_async and report_by == "request" and dropped == [3, 1]:
        kept = 1 * BLOCK
    assert (output.num_cached_tokens, output.num_external_tokens) == (kept, kept)
    assert sum(output.external_hit_sources.values()) == kept


@pytest.mark.parametrize("report_by", REPORTS)
@pytest.mark.parametrize("load_async", [False, True])
def test_persistent_failure_never_loops(make_llm, report_by, load_async):
    llm = make_llm(load_async=load_async, report_by=report_by, fail_block_indexes=list(range(8)))
    tokens = prompt(90)
    warm(llm, tokens)
    for _ in range(4):
        output = run(llm, tokens)
        assert output.num_cached_tokens == 0
        forget(llm)
    assert llm.counters.load_failures == 4, "a failed key is a hit again only once it is stored again"


def test_every_nth_load_fails(make_llm):
    llm = make_llm(fail_block_indexes=[1], fail_every_nth_load=3)
    tokens = prompt(70)
    warm(llm, tokens)
    cached = []
    for _ in range(6):
        cached.append(run(llm, tokens).num_external_tokens)
        forget(llm)
    assert cached == [64, 64, 16, 64, 64, 16]


@pytest.mark.parametrize("load_async", [False, True])
def test_the_local_hit_before_the_load_stays(make_llm, load_async):
    llm = make_llm(load_async=load_async, fail_block_indexes=[3])
    tokens = prompt(90)
    warm(llm, tokens)
    run(llm, tokens[:33])  # two blocks are local again
    output = run(llm, tokens)
    assert output.num_cached_tokens == 48
    assert output.num_external_tokens == 16


@pytest.mark.parametrize("report_by", REPORTS)
def test_what_was_computed_beside_a_failed_load_is_not_stored(make_llm, report_by):
    llm = make_llm(report_by=report_by, fail_block_indexes=[3], fail_every_nth_load=2)
    first, longer = prompt(70), [*prompt(64), *prompt(50, seed=1)]
    warm(llm, first)
    run(llm, first)  # the first load works
    forget(llm)
    run(llm, longer)  # the second fails, and blocks 4 to 6 are computed in the same step
    forget(llm)
    assert run(llm, longer).num_external_tokens == 112, "they were stored when they were computed again"


def test_salts_are_kept_apart(make_llm):
    llm = make_llm()
    tokens = prompt(90)
    warm(llm, tokens, cache_salt="a")
    assert run(llm, tokens, cache_salt="b").num_external_tokens == 0
    forget(llm)
    assert run(llm, tokens, cache_salt="a").num_external_tokens == 80
    assert run(llm, tokens).num_external_tokens == 0


@pytest.mark.parametrize("load_async", [False, True])
@pytest.mark.parametrize("report_by", REPORTS)
def test_many_requests_under_pressure(make_llm, load_async, report_by):
    llm = make_llm(
        num_kv_blocks=16, max_num_batched_tokens=24, load_async=load_async, report_by=report_by,
        fail_block_indexes=[1, 2], fail_every_nth_load=2,
    )  # fmt: skip
    prompts = [prompt(40 + 9 * i, seed=i % 3) for i in range(6)]
    for _ in range(3):
        outputs = llm.generate(prompts, SamplingParams(max_tokens=20, temperature=0))
        for tokens, output in zip(prompts, outputs, strict=True):
            assert output.outputs[0].token_ids == StubModel().expected_tokens(tokens, 20)
        forget(llm)
    assert llm.scheduler.num_preemptions > 0
    assert llm.counters.load_failures > 3


def test_reset_forgets_and_capacity_bounds(make_llm):
    llm = make_llm(capacity_blocks=3)
    tokens = prompt(90)
    warm(llm, tokens)
    assert run(llm, tokens).num_external_tokens == 48
    assert llm.reset_prefix_cache(reset_connector=True)
    assert run(llm, tokens).num_external_tokens == 0


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"report_by": "positionz"}, "did you mean 'positions'"),
        ({"fail_block_indexes": 3}, "fail_block_indexes=3 must be a list of whole numbers"),
        ({"fail_block_indexes": [1, "x"]}, r"fail_block_indexes\[1\]='x' must be int"),
        ({"fail_block_indexes": [-1]}, r"fail_block_indexes\[0\]=-1 must be at least 0"),
        ({"fail_block_indexs": [1]}, "did you mean 'fail_block_indexes'"),
        ({"fail_every_nth_load": 0}, "fail_every_nth_load=0 must be at least 1"),
        ({"load_async": "yes"}, "load_async='yes' must be bool"),
        ({"block_size": 4}, "block_size=4"),
    ],
)
def test_bad_settings(make_llm, extra, text):
    with pytest.raises(ConfigError, match=text):
        make_llm(**extra)
