"""Settings are refused early, by name."""

from __future__ import annotations

import pytest

from kvferry.engine.config import EngineOptions, SamplingParams, resolve_kv_budget
from kvferry.errors import ConfigError


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 0},
        {"max_num_seqs": True},
        {"max_num_batched_tokens": 1.5},
        {"num_kv_blocks": 0},
        {"kv_cache_bytes": -1},
        {"num_kv_blocks": 9, "kv_cache_bytes": 9},
        {"dtype": "float64"},
    ],
)
def test_bad_engine_options(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        EngineOptions(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 0},
        {"max_tokens": 2.0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "1"},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"min_p": -0.1},
        {"min_p": True},
        {"repetition_penalty": 0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"seed": 1.5},
        {"logprobs": -1},
        {"logprobs": 21},
        {"stop": ["a", ""]},
        {"stop": [1]},
        {"stop_token_ids": [-1]},
        {"extra_args": {"kv_transfer_params": 3}},
    ],
    ids=repr,
)
def test_bad_sampling_params(settings):
    with pytest.raises(ConfigError, match=f"^{next(iter(settings))}"):
        SamplingParams(**settings)


def test_stop_may_be_one_text_or_several():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == SamplingParams().stop == ()


def one_group(num_tokens: int) -> int:
    return -(-num_tokens // 16)


def test_budget():
    budget = resolve_kv_budget(EngineOptions(num_kv_blocks=11), 100, 4096, one_group)
    assert (budget.num_blocks, budget.max_model_len) == (11, 160)
    budget = resolve_kv_budget(EngineOptions(kv_cache_bytes=1099), 100, 64, one_group)
    assert (budget.num_blocks, budget.max_model_len) == (10, 64)
    budget = resolve_kv_budget(EngineOptions(max_num_seqs=2), 100, 64, one_group)
    assert (budget.num_blocks, budget.max_model_len) == (9, 64)  # never more than all sequences can use
    for options in (EngineOptions(num_kv_blocks=1), EngineOptions(num_kv_blocks=4, max_model_len=64)):
        with pytest.raises(ConfigError, match="too small"):
            resolve_kv_budget(options, 100, 64, one_group)
