"""What is read of a host's configuration, and what is refused."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry.config import KVTransferConfig
from kvferry.contract import FullAttentionSpec, SlidingWindowSpec, make_kv_cache_config
from kvferry.contract.host import host_info
from kvferry.contract.views import request_view
from kvferry.errors import ConfigError
from kvferry.types import AttentionKind

SHAPE: dict[str, Any] = {"block_size": 16, "num_kv_heads": 1, "head_size": 4, "dtype": torch.uint8}


def host(model: dict[str, Any] | None = None, cache_dtype: str = "auto", **parallel: int) -> Any:
    return SimpleNamespace(
        kv_transfer_config=KVTransferConfig("C", kv_role="kv_both"),
        parallel_config=SimpleNamespace(**{"tensor_parallel_size": 1, "pipeline_parallel_size": 1, **parallel}),
        model_config=SimpleNamespace(model="m", max_model_len=128, dtype=torch.bfloat16, **(model or {})),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
    )


def caches() -> Any:
    return make_kv_cache_config(4, {"layer": FullAttentionSpec(**SHAPE)})


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallelism_is_refused_by_name(name: str) -> None:
    assert host_info(host(**{name: 1}), caches()).world_size == 1
    with pytest.raises(ConfigError, match=f"{name}=2"):
        host_info(host(**{name: 2}), caches())


def test_settings_that_change_kv_bytes_are_told_apart() -> None:
    variants = [
        host(),
        host(cache_dtype="fp8_e4m3"),
        host(cache_dtype="fp8_e5m2"),
        host({"quantization": "awq"}),
        host({"hf_config": SimpleNamespace(to_dict=lambda: {"rope_theta": 1})}),
        host({"hf_config": SimpleNamespace(to_dict=lambda: {"rope_theta": 2})}),
        host({"hf_config": SimpleNamespace(to_dict=lambda: {"text_config": {"rope_theta": 2}})}),
        host({"trust_remote_code": True}),
        host({"convert_type": "embed"}),
    ]
    numerics = [str(sorted(host_info(variant, caches()).numerics.items())) for variant in variants]
    assert len(set(numerics)) == len(variants)


def test_a_group_of_windowed_layers_with_specs_of_their_own() -> None:
    specs = {"a": SlidingWindowSpec(**SHAPE, sliding_window=32), "b": SlidingWindowSpec(**SHAPE, sliding_window=32)}
    config = caches()
    uniform = SimpleNamespace(kv_cache_specs=specs, block_size=16)
    config.kv_cache_groups[0] = SimpleNamespace(layer_names=["a", "b"], kv_cache_spec=uniform)
    (group,) = host_info(host(), config).groups
    assert (group.kind, group.window_tokens) == (AttentionKind.SLIDING_WINDOW, 32)


@pytest.mark.parametrize("kind", ["MEAN", "CLS"])
def test_a_model_that_pools_the_whole_prompt_is_given_no_hits(kind: str) -> None:
    pooler = SimpleNamespace(seq_pooling_type=kind, tok_pooling_type=None)
    reason = host_info(host({"pooler_config": pooler, "is_prefix_caching_supported": False}), caches()).no_hits_reason
    assert reason is not None
    assert kind in reason
    for allowed in ({"pooler_config": pooler, "is_prefix_caching_supported": True}, {"pooler_config": None}, {}):
        assert host_info(host(allowed), caches()).no_hits_reason is None


@pytest.mark.parametrize("other", [None, "enable_prefix_caching", "enable_chunked_prefill", "use_mla", "device_type"])
def test_mla_that_vllm_computes_whole_is_given_no_hits(other: str | None) -> None:
    """vLLM's CPU_MLA: it forces both settings off, and a hit from a store gave other tokens than no connector did."""
    config = host({"use_mla": other != "use_mla"})
    config.cache_config.enable_prefix_caching = other == "enable_prefix_caching"
    config.scheduler_config = SimpleNamespace(enable_chunked_prefill=other == "enable_chunked_prefill")
    config.device_config = SimpleNamespace(device_type="cuda" if other == "device_type" else "cpu")
    reason = host_info(config, caches()).no_hits_reason
    assert (reason is None) is (other is not None)


@pytest.mark.parametrize("is_enabled", [True, False])
def test_an_engine_that_tells_routed_experts_is_given_no_hits(is_enabled: bool) -> None:
    """vLLM finds those of a hit in a store of its own, and ends where it has none, as after a restart."""
    config = host()
    config.aux_output_config = SimpleNamespace(enabled=is_enabled)
    reason = host_info(config, caches()).no_hits_reason
    assert ("routed experts" in (reason or "")) is is_enabled


ROPES: list[tuple[dict[str, Any], bool]] = [
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, True),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, True),
    ({"text_config": {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}}, True),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, False),
    ({"rope_theta": 10000.0}, False),
]


@pytest.mark.parametrize(("settings", "is_by_batch"), ROPES, ids=str)
def test_a_rope_that_a_batch_decides_is_given_no_hits(settings: dict[str, Any], is_by_batch: bool) -> None:
    """In vLLM's Transformers backend: a store filled by prompts of 330 tokens gave one of 900 other tokens."""
    for is_transformers in (True, False):
        answer = partial(bool, is_transformers)
        model = {"hf_config": SimpleNamespace(to_dict=lambda: settings), "using_transformers_backend": answer}
        reason = host_info(host(model), caches()).no_hits_reason
        assert ("depend on its batch" in (reason or "")) is (is_by_batch and is_transformers)


@pytest.mark.parametrize(
    "asked",
    [
        {"sampling_params": SimpleNamespace(prompt_logprobs=0)},
        {"sampling_params": SimpleNamespace(prompt_logprobs=None, prompt_logprob_token_ids=[5])},
        {"pooling_params": SimpleNamespace(task="token_embed")},
        {"pooling_params": SimpleNamespace(task="token_classify"), "sampling_params": None},
    ],
    ids=str,
)
def test_a_request_for_an_output_of_each_prompt_token_is_given_no_hits(asked: dict[str, Any]) -> None:
    """Also where it was sent with `skip_reading_prefix_cache=False`: with hits vLLM fails it (OverflowError)."""
    assert request_view(SimpleNamespace(**asked, get_skip_reading_prefix_cache=lambda: False)).skip_reading_prefix_cache
    plain = SimpleNamespace(
        sampling_params=SimpleNamespace(prompt_logprobs=None, logprobs=3), pooling_params=SimpleNamespace(task="embed"),
        get_skip_reading_prefix_cache=lambda: False,
    )  # fmt: skip
    assert not request_view(plain).skip_reading_prefix_cache


@pytest.mark.parametrize("layers", [None, []])
def test_a_model_without_a_kv_cache_is_refused_with_what_to_do(layers: list[str] | None) -> None:
    config = caches()
    config.kv_cache_groups[:] = [] if layers is None else [SimpleNamespace(layer_names=layers, kv_cache_spec=None)]
    with pytest.raises(ConfigError, match=r"the model has no KV cache .* start it without kv_transfer_config"):
        host_info(host(), config)
