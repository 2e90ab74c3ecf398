"""The embedded engine's objects as connectors written for vLLM expect them (`kvferry.vllm.foreign`).

Configurations, KV specs, step plans and request states are vLLM's own classes with the engine's values; model
configuration and requests are views of the engine's, which bear vLLM's attribute names. What this engine lacks is an
AttributeError that says so, so a connector that asks with `hasattr` or `getattr(..., default)` goes on.
tests/vllm/test_foreign_reads.py compares all this with what vLLM's own connectors read.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vllm.config import (
    AttentionConfig,
    CacheConfig,
    CompilationConfig,
    KVEventsConfig,
    KVTransferConfig,
    ObservabilityConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.v1 import kv_cache_interface as vllm_kv
from vllm.v1.core.sched.output import CachedRequestData, KVConnectorBlockState, NewRequestData, SchedulerOutput
from vllm.v1.request import RequestStatus

from kvferry.contract import KVCacheConfig

_OWN_TRANSFER_KEYS = {"on_shadow"}

LACKS = {
    "vllm_config.model_config.hf_text_config": "this model has no Hugging Face configuration",
    "vllm_config.model_config.get_vocab_size": "this model has no Hugging Face configuration",
}
"""Why what vLLM's own connectors read is sometimes not offered."""


def _refusal(path: str) -> AttributeError:
    reason = LACKS.get(path)
    return AttributeError(
        f"{path} is not offered by kvferry's embedded engine{f': {reason}' if reason else ''}; "
        "run this connector in vLLM"
    )


class _View:
    """One of the engine's objects, `path` in messages, with a few attributes of its own. What is written stays here."""

    def __init__(self, shown: Any, path: str, **own: Any) -> None:
        vars(self).update(own, _shown=shown, _path=path)

    def __getattr__(self, name: str) -> Any:
        if "_shown" not in vars(self):  # asked by copy, before the copy has anything
            raise AttributeError(name)
        try:
            return getattr(self._shown, name)
        except AttributeError:
            raise _refusal(f"{self._path}.{name}") from None


class ShownRequest(_View):
    """A request under all the names that vLLM's has for what there is in both engines."""

    kv_hints = None
    pooling_params = None
    prompt_is_token_ids = None
    priority = 0
    replay_start = 0
    num_output_placeholders = 0

    @property
    def status(self) -> Any:
        return RequestStatus[self._shown.status.name]

    @property
    def _all_token_ids(self) -> list[int]:
        return self._shown.all_token_ids  # type: ignore[no-any-return]

    @property
    def _output_token_ids(self) -> list[int]:
        return self._shown.output_token_ids  # type: ignore[no-any-return]


class _ShownConfig(VllmConfig):
    """vLLM's class, whose properties connectors read, but not its constructor, which wants a model that vLLM runs."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else _refusal(f"vllm_config.{name}")


def show_config(config: Any, kv_cache_config: KVCacheConfig | None) -> Any:
    """The engine's configuration as a VllmConfig to the extent connectors read it.

    Without `kv_cache_config` (asked of a class, before there is one) the model's shape is not offered.
    """
    shown: Any = object.__new__(_ShownConfig)
    vars(shown).update(
        kv_transfer_config=show_transfer_config(config.kv_transfer_config),
        cache_config=_cache_config(config),
        parallel_config=ParallelConfig(),
        model_config=_model_config(config, kv_cache_config),
        scheduler_config=_scheduler_config(config),
        kv_events_config=KVEventsConfig(enable_kv_cache_events=config.kv_events_config.enable_kv_cache_events),
        load_config=config.load_config,
        attention_config=AttentionConfig(),
        compilation_config=CompilationConfig(),
        observability_config=ObservabilityConfig(),
        speculative_config=None,
        diffusion_config=None,
        lora_config=None,
        instance_id=config.instance_id,
        additional_config={},
        use_v2_model_runner=config.use_v2_model_runner,
    )
    return shown


def show_transfer_config(transfer: Any) -> Any:
    """Our transfer configuration in vLLM's class."""
    kept = (f.name for f in fields(transfer) if f.name not in _OWN_TRANSFER_KEYS)
    return KVTransferConfig(**{name: getattr(transfer, name) for name in kept})


def _cache_config(config: Any) -> Any:
    cache = CacheConfig(
        block_size=config.cache_config.block_size,
        enable_prefix_caching=config.cache_config.enable_prefix_caching,
        cache_dtype=config.cache_config.cache_dtype,
    )
    cache.num_gpu_blocks = config.cache_config.num_gpu_blocks
    cache.kv_cache_layout = config.cache_config.kv_cache_layout
    return cache


def _scheduler_config(config: Any) -> Any:
    own = config.scheduler_config
    return SchedulerConfig(
        max_model_len=config.model_config.max_model_len,
        is_encoder_decoder=False,
        max_num_seqs=own.max_num_seqs,
        max_num_batched_tokens=own.max_num_batched_tokens,
        disable_hybrid_kv_cache_manager=own.disable_hybrid_kv_cache_manager,
        async_scheduling=False,
    )


def _model_config(config: Any, kv_cache_config: KVCacheConfig | None) -> Any:
    own: dict[str, Any] = {
        "is_multimodal_model": False,
        "is_hybrid": False,
        "is_attention_free": False,
        "enable_sleep_mode": False,
        "enable_cumem_allocator": False,
        "quantization": None,
        "rswa_window": None,
    }
    if kv_cache_config is not None:
        own |= _shape(kv_cache_config)
    hf_config = config.model_config.hf_config
    shown = _View(config.model_config, "vllm_config.model_config", **own)
    if hf_config is not None:
        text_config = hf_config.get_text_config()
        vars(shown).update(hf_text_config=text_config, get_vocab_size=lambda: int(text_config.vocab_size))
    return shown


def _shape(kv_cache_config: KVCacheConfig) -> dict[str, Any]:
    """What vLLM's ModelConfig answers about the model's shape, from the KV cache."""
    spec: Any = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    num_layers = sum(len(group.layer_names) for group in kv_cache_config.kv_cache_groups)
    return {
        "get_num_layers": lambda parallel_config: num_layers,
        "get_total_num_hidden_layers": lambda: num_layers,
        "get_layers_start_end_indices": lambda parallel_config: (0, num_layers),
        "get_num_kv_heads": lambda parallel_config: int(spec.num_kv_heads),
        "get_total_num_kv_heads": lambda: int(spec.num_kv_heads),
        "get_head_size": lambda: int(spec.head_size),
    }


def show_kv_cache_config(config: KVCacheConfig) -> Any:
    """The engine's KVCacheConfig in vLLM's classes: groups, specs by class name, tensors."""
    tensors = [
        vllm_kv.KVCacheTensor(t.size, list(t.layers), t.layer_stride, t.block_stride, t.offset)
        for t in config.kv_cache_tensors
    ]
    groups = [
        vllm_kv.KVCacheGroupSpec(list(group.layer_names), _spec(group.kv_cache_spec))
        for group in config.kv_cache_groups
    ]
    shown = vllm_kv.KVCacheConfig(config.num_blocks, tensors, groups)
    for name in ("kv_cache_layout", "hash_block_size", "cache_hit_alignment_tokens"):
        setattr(shown, name, getattr(config, name))
    return shown


def _spec(spec: Any) -> Any:
    kind = getattr(vllm_kv, type(spec).__name__)
    return kind(**{f.name: getattr(spec, f.name) for f in fields(spec)})


def show_scheduler_output(output: Any) -> Any:
    """A step's plan in vLLM's classes."""
    return SchedulerOutput(
        scheduled_new_reqs=[_new_request(new) for new in output.scheduled_new_reqs],
        scheduled_cached_reqs=_cached_requests(output.scheduled_cached_reqs),
        num_scheduled_tokens=output.num_scheduled_tokens,
        total_num_scheduled_tokens=output.total_num_scheduled_tokens,
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        finished_req_ids=output.finished_req_ids,
        free_encoder_mm_hashes=[],
        preempted_req_ids=output.preempted_req_ids,
        has_sync_kv_loads=output.has_sync_kv_loads,
        kv_connector_block_state=KVConnectorBlockState(
            set(output.num_scheduled_tokens), output.kv_connector_block_state.get_block_ids, {}
        ),
    )


def _new_request(new: Any) -> Any:
    return NewRequestData(
        req_id=new.req_id,
        prompt_token_ids=new.prompt_token_ids,
        mm_features=list(new.mm_features),
        sampling_params=new.sampling_params,
        pooling_params=None,
        block_ids=new.block_ids,
        num_computed_tokens=new.num_computed_tokens,
        lora_request=new.lora_request,
        prefill_token_ids=new.prompt_token_ids,
    )


def _cached_requests(cached: Any) -> Any:
    return CachedRequestData(
        req_ids=cached.req_ids,
        resumed_req_ids=cached.resumed_req_ids,
        new_token_ids=[],
        all_token_ids=cached.all_token_ids,
        new_block_ids=cached.new_block_ids,
        num_computed_tokens=cached.num_computed_tokens,
        num_output_tokens=cached.num_output_tokens,
    )
