"""Of a host's configuration, all that the numbers in the KV cache depend on, field by field.

Whatever a configuration object bears is part of it unless it stands in `HARMLESS` with the reason, so that a setting
which a later host adds costs a miss at first, and never a wrong answer. `tests/vllm/test_identity.py` fails when vLLM
has a field that nobody has judged yet.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kvferry.config import environment_matching
from kvferry.contract.plugins import read_offers

_ROUNDING = "changes the order of additions only, as batching does"
_MEMORY = "says how much memory is taken, not what stands in it"
_TEXT = "acts on text and media before they are tokens, and keys are made of tokens"
_SAMPLING = "acts on logits, thus after the KV"
_RESOLVED = "what it leads to is read from the resolved configuration"
_WEIGHTS = "the weights' fingerprint says which model it is"
_LAYOUT = "where bytes lie is compared with the layout"
_STATE = "layers without KV by tokens are neither stored nor handed over"
_ADAPTERS = "capacity for adapters; each adapter's own files are part of a request's key"
_EMBEDDED = "prompts that are not tokens are never cached"
_SPEED = "changes when things run, not what they compute"

HARMLESS: Mapping[str, Mapping[str, str]] = {
    "ModelConfig": {
        "model": _WEIGHTS, "model_weights": "what stands there is read (named_paths)", "served_model_name": _TEXT,
        "seed": _SAMPLING, "runner": "runner_type is read", "convert": "convert_type is read",
        "hf_config": "each of its keys is read",
        "hf_text_config": "part of hf_config", "hf_config_path": _RESOLVED, "hf_overrides": _RESOLVED,
        "config_format": _RESOLVED, "max_model_len": "read where positions depend on it (_reads_length)",
        "spec_target_max_model_len": "of drafts, whose max_model_len is the target's",
        "tokenizer": _TEXT, "tokenizer_mode": _TEXT, "tokenizer_revision": _TEXT, "skip_tokenizer_init": _TEXT,
        "allowed_local_media_path": _TEXT, "allowed_media_domains": _TEXT, "renderer_num_workers": _SPEED,
        "io_processor_plugin": _TEXT, "hf_token": _TEXT, "allow_deprecated_quantization": "only permits",
        "enforce_eager": _ROUNDING, "disable_cascade_attn": _ROUNDING, "return_sampling_mask": _SAMPLING,
        "max_logprobs": _SAMPLING, "logprobs_mode": _SAMPLING, "use_fp64_gumbel": _SAMPLING,
        "enable_trace_replay": _SAMPLING, "generation_config": _SAMPLING, "override_generation_config": _SAMPLING,
        "logits_processors": _SAMPLING, "pooler_config": _SAMPLING, "enable_prompt_embeds": _EMBEDDED,
        "word_embeddings_untied_by_checkpoint": _SAMPLING, "enable_sleep_mode": _MEMORY,
        "sleep_preserve_parameter_names": _MEMORY, "sleep_mode_backend": _MEMORY,
        "sleep_mode_offload_cudagraph": _MEMORY, "enable_nccl_comm_suspend": _MEMORY,
        "enable_cumem_allocator": _MEMORY, "multimodal_config": "each of its fields is read", "use_mla": _LAYOUT,
        "weights_stamp": _WEIGHTS,
    },
    "CacheConfig": {
        "cache_dtype": "read with auto resolved", "block_size": _LAYOUT, "user_specified_block_size": _LAYOUT,
        "_block_size_resolved": _LAYOUT, "kernel_block_size": _LAYOUT, "kv_cache_layout": _LAYOUT,
        "prefix_match_unit": _LAYOUT, "mamba_page_size_padded": _STATE, "skip_page_size_padded": _LAYOUT,
        "effective_attention_block_size": _LAYOUT, "hash_block_size": _LAYOUT, "cache_hit_alignment_tokens": _LAYOUT,
        "gpu_memory_utilization": _MEMORY, "num_gpu_blocks_override": _MEMORY, "num_gpu_blocks": _MEMORY,
        "num_cpu_blocks": _MEMORY, "kv_cache_size_tokens": _MEMORY, "kv_cache_max_concurrency": _MEMORY,
        "kv_cache_memory_bytes": _MEMORY, "kv_offloading_size": _MEMORY, "kv_offloading_backend": _MEMORY,
        "swap_space": _MEMORY, "cpu_offload_gb": _MEMORY, "swap_space_bytes": _MEMORY,
        "is_attention_free": _STATE, "sliding_window": "each group's window is compared with the layout",
        "enable_prefix_caching": _MEMORY, "prefix_caching_hash_algo": _MEMORY,
        "prefix_cache_retention_interval": _MEMORY, "mamba_block_size": _STATE, "mamba_cache_dtype": _STATE,
        "mamba_ssm_cache_dtype": _STATE, "mamba_cache_mode": _STATE, "enable_mamba_shared_prefix_checkpoint": _STATE,
        "replayssm_buffer_len": _STATE, "use_replayssm": _STATE, "use_kda_recoverssm": _STATE,
    },
    "AttentionConfig": {
        "backend": _ROUNDING, "backend_per_kind": _ROUNDING, "minimax_m3_msa_decode_backend": _ROUNDING,
        "flash_attn_version": _ROUNDING, "flash_attn_max_num_splits_for_cuda_graph": _ROUNDING,
        "tokenspeed_mla_min_split_kv": _ROUNDING, "tq_max_kv_splits_for_cuda_graph": _ROUNDING,
        "mla_prefill_backend": _ROUNDING, "sparse_mla_force_mqa": _ROUNDING,
        "sparse_mla_prefill_workspace_factor": _MEMORY, "flex_attn_block_m": _ROUNDING,
        "flex_attn_block_n": _ROUNDING, "flex_attn_q_block_size": _ROUNDING, "flex_attn_kv_block_size": _ROUNDING,
    },
    "MultiModalConfig": {
        "limit_per_prompt": "only permits", "enable_mm_embeds": "only permits", "mm_processor_cache_gb": _MEMORY,
        "mm_processor_cache_type": _MEMORY, "mm_shm_cache_max_object_size_mb": _MEMORY,
        "mm_encoder_tp_mode": _ROUNDING, "mm_encoder_attn_backend": _ROUNDING,
        "mm_encoder_fp8_scale_save_path": "where to write", "mm_encoder_fp8_scale_save_margin": "what to write",
        "interleave_mm_strings": _TEXT, "skip_mm_profiling": _MEMORY, "mm_tensor_ipc": _SPEED,
        "allow_missing_mm_embeddings": "only permits", "mm_ipc_gpu_memory_gb": _MEMORY,
    },
    "LoRAConfig": {
        "max_lora_rank": _ADAPTERS, "max_loras": _ADAPTERS, "max_cpu_loras": _ADAPTERS,
        "fully_sharded_loras": _ROUNDING, "specialize_active_lora": _ROUNDING, "max_lora_cls_labels": _SAMPLING,
        "default_mm_loras": "the request itself names the adapter that is used",
        "enable_mixed_moe_lora_format": "says how files are laid out", "enable_moe_shared_loras": _ADAPTERS,
        "lora_extra_vocab_size": _ADAPTERS, "bias_enabled": _ADAPTERS,
    },
    "LoadConfig": {
        "load_format": "read as the files that it means (_load_format)", "download_dir": "where to put downloads",
        "safetensors_load_strategy": _SPEED, "safetensors_prefetch_num_threads": _SPEED,
        "safetensors_prefetch_block_size": _SPEED, "device": "where weights lie while they are loaded",
        "use_tqdm_on_load": "what is shown", "pt_load_map_location": "where weights lie while they are loaded",
    },
    "KernelConfig": {
        "ir_op_priority": _ROUNDING, "enable_flashinfer_autotune": _SPEED, "enable_cutedsl_warmup": _SPEED,
        "enable_rocm_segmented_attn_autotune": _SPEED, "enable_jit_warmup": _SPEED,
    },
    "VllmConfig": {
        "parallel_config": _LAYOUT, "scheduler_config": _SPEED, "device_config": _ROUNDING, "offload_config": _MEMORY,
        "aux_output_config": "content of a step's reports", "mamba_config": _STATE, "watermark_config": _SAMPLING,
        "structured_outputs_config": _SAMPLING, "observability_config": "content of a step's reports",
        "logging_config": "what is logged", "quant_config": "made from the model's configuration and files",
        "compilation_config": _ROUNDING, "profiler_config": _SPEED, "kv_transfer_config": "how KV moves",
        "kv_events_config": "how KV moves", "ec_transfer_config": "media's part of a key says which media",
        "ec_manager_config": _MEMORY, "reasoning_config": _SAMPLING, "optimization_level": _SPEED,
        "performance_mode": _SPEED, "instance_id": "a name", "shutdown_timeout": _SPEED,
        "weight_transfer_config": "a change of weights in a running engine stops its caching",
    },
}  # fmt: skip
"""By class and field of a host's configuration: why KV of engines that differ in it may be shared."""

HARMLESS_ENVIRONMENT: Mapping[str, tuple[str, ...]] = {
    "acts when vLLM is built, or names a build": (
        "VLLM_TARGET_DEVICE", "VLLM_MAIN_CUDA_VERSION", "VLLM_USE_PRECOMPILED*", "VLLM_SKIP_PRECOMPILED_VERSION_SUFFIX",
        "VLLM_DOCKER_BUILD_CONTEXT", "VLLM_BUILD_*", "VLLM_IMAGE_TAG", "VLLM_SKIP_VERSION_SUFFIX",
    ),
    "says where files lie": (
        "VLLM_CONFIG_ROOT", "VLLM_CACHE_ROOT", "VLLM_RPC_BASE_PATH", "VLLM_NCCL_SO_PATH", "VLLM_NCCL_INCLUDE_PATH",
        "VLLM_ASSETS_CACHE*", "VLLM_XLA_CACHE_PATH", "VLLM_CUDART_SO_PATH", "VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR",
        "VLLM_CUDA_COMPATIBILITY_PATH", "VLLM_ENABLE_CUDA_COMPATIBILITY", "VLLM_HAS_FLASHINFER_CUBIN",
    ),
    "says how processes and machines find each other": (
        "VLLM_HOST_IP", "VLLM_PORT", "VLLM_LOOPBACK_IP", "VLLM_NIXL_*", "VLLM_P2P_*", "VLLM_EC_*", "VLLM_MOONCAKE_*",
        "VLLM_DP_*", "VLLM_RAY_*", "VLLM_USE_RAY_*", "VLLM_PROCESS_NAME_PREFIX", "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME",
        "VLLM_GPU_NIC_PCIE_MAPPING", "VLLM_NIC_SELECTION_VARS", "VLLM_ELASTIC_EP_*", "VLLM_WORKER_MULTIPROC_METHOD",
        "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_DISTRIBUTED_USE_SPLIT_GROUP", "VLLM_SKIP_P2P_CHECK",
        "VLLM_MQ_MAX_CHUNK_BYTES_MB", "VLLM_MSGPACK_ZERO_COPY_THRESHOLD", "VLLM_ALLOW_INSECURE_SERIALIZATION",
    ),
    "what is logged, counted, checked or dumped": (
        "VLLM_LOGGING_*", "VLLM_CONFIGURE_LOGGING", "VLLM_LOG_*", "VLLM_DEBUG_*", "VLLM_TRACE_FUNCTION", "VLLM_USAGE_*",
        "VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK", "VLLM_DISABLE_LOG_LOGO", "VLLM_GC_DEBUG", "VLLM_*_FOR_PROFILING",
        "VLLM_PATTERN_MATCH_DEBUG", "VLLM_GPU_SYNC_CHECK", "VLLM_COMPUTE_NANS_IN_LOGITS", "VLLM_RAISE_ON_LOGIT_NANS",
        "VLLM_XLA_CHECK_RECOMPILATION", "VLLM_RINGBUFFER_WARNING_INTERVAL", "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES",
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION",
    ),
    "acts on requests and replies, and keys are made of tokens": (
        "VLLM_HTTP_*", "VLLM_API_KEY", "VLLM_SERVER_DEV_MODE", "VLLM_USE_RUST_*", "VLLM_RUST_*", "VLLM_MAX_N_SEQUENCES",
        "VLLM_MAX_COMPLETION_PROMPTS", "VLLM_MAX_STOP_STRINGS", "VLLM_MAX_NUM_BAD_WORDS", "VLLM_TOOL_*",
        "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS", "VLLM_ENFORCE_STRICT_TOOL_CALLING", "VLLM_GPT_OSS_*",
        "VLLM_SYSTEM_START_DATE", "VLLM_ENABLE_RESPONSES_API_STORE", "VLLM_ENABLE_COHERE_API",
        "VLLM_USE_EXPERIMENTAL_PARSER_CONTEXT", "VLLM_SKIP_MODEL_NAME_VALIDATION", "VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT",
        "VLLM_USE_FASTOKENS", "VLLM_XGRAMMAR_CACHE_MB", "VLLM_REGEX_*", "VLLM_V1_USE_OUTLINES_CACHE",
        "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE", "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "VLLM_ALLOW_LONG_MAX_MODEL_LEN",
    ),
    "acts on logits, thus after the KV": ("VLLM_USE_FLASHINFER_SAMPLER", "VLLM_XPU_USE_SAMPLER_KERNEL"),
    "the adapter's own files are part of a request's key": (
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_LORA_RESOLVER_*", "VLLM_LORA_DISABLE_PDL",
        "VLLM_LORA_ENABLE_DUAL_STREAM",
    ),
    "says how media are fetched, and the media's part of a key says what came": (
        "VLLM_*_FETCH_TIMEOUT", "VLLM_MEDIA_CACHE*", "VLLM_MEDIA_FETCH_MAX_RETRIES", "VLLM_MAX_MEDIA_*",
        "VLLM_MEDIA_URL_*", "VLLM_MEDIA_LOADING_*", "VLLM_MAX_AUDIO_*", "VLLM_MAX_EMBED_*", "VLLM_MAX_IMAGE_PIXELS",
    ),
    "says how much time, memory or how many threads are taken": (
        "VLLM_ENGINE_READY_TIMEOUT_S", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS",
        "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_CI_ENV",
        "VLLM_ROCM_SLEEP_MEM_CHUNK_SIZE", "VLLM_ENABLE_STARTUP_PLAN", "VLLM_ENABLE_CUDAGRAPH_GC",
        "VLLM_MEMORY_PROFILER_*", "VLLM_WEIGHT_OFFLOADING_*", "VLLM_KV_OFFLOAD_*", "VLLM_USE_SIMPLE_KV_OFFLOAD",
        "VLLM_WSL2_*", "VLLM_USE_SPINLOOP_EXT", "VLLM_FASTSAFETENSORS_QUEUE_SIZE", "VLLM_RANDOMIZE_DP_DUMMY_INPUTS",
        "VLLM_TRITON_JIT_WARMUP_NUM_THREADS", "VLLM_DEEP_GEMM_WARMUP", "VLLM_DBO_COMM_SMS",
        "VLLM_DISABLE_SHARED_EXPERTS_STREAM", "VLLM_*_STREAM_*TOKEN_THRESHOLD", "VLLM_SPARSE_INDEXER_MAX_LOGITS_MB",
    ),
    "says how one and the same model is compiled": (
        "VLLM_USE_STANDALONE_COMPILE", "VLLM_ENABLE_PREGRAD_PASSES", "VLLM_USE_BREAKABLE_CUDAGRAPH",
        "VLLM_USE_AOT_COMPILE", "VLLM_USE_BYTECODE_HOOK", "VLLM_FORCE_AOT_LOAD", "VLLM_USE_MEGA_AOT_ARTIFACT",
        "VLLM_DISABLE_COMPILE_CACHE", "VLLM_COMPILE_CACHE_SAVE_FORMAT", "VLLM_USE_LAYERNAME",
        "VLLM_ENABLE_INDUCTOR_*", "VLLM_TUNED_CONFIG_FOLDER", "VLLM_FLASHINFER_AUTOTUNE_SKIP_OPS",
    ),
    "where bytes lie is compared with the layout": (
        "VLLM_KV_CACHE_LAYOUT", "VLLM_SSM_CONV_STATE_LAYOUT", "VLLM_MLA_DISABLE", "VLLM_USE_V2_MODEL_RUNNER",
    ),
}  # fmt: skip
"""Reason -> variables that vLLM reads, with wildcards, in which engines may differ that share KV. Others count."""

_ARITHMETIC = "(ONEDNN|DNNL)_DEFAULT_FPMATH_MODE|NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
"""By which PyTorch computes with fewer bits than the tensors have."""

_UNDECLARED = "VLLM_CUSTOM_ALLREDUCE_ALGO"
"""What vLLM computes by and does not declare in its table of variables."""

_HARMLESS_HF_KEYS = frozenset(
    ("transformers_version", "torch_dtype", "dtype", "id2label", "label2id", "problem_type", "return_dict",
     "output_hidden_states", "output_attentions", "use_cache", "chunk_size_feed_forward", "pretraining_tp",
     "tie_word_embeddings", "finetuning_task", "task_specific_params", "use_bfloat16", "unsloth_version",
     "unsloth_fixed")
)  # fmt: skip
"""Keys of a model's configuration that act on training, loading or output alone, or are named elsewhere (dtype).

Numbers of special tokens and `initializer_range` are none of them: vLLM computes embeddings of some models by them.
"""

_SAFETENSORS_FORMATS = frozenset(("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer"))
"""`load_format`s that read one and the same files of a folder, unless it has Mistral's own beside them."""

FOLDER_FORMATS = _SAFETENSORS_FORMATS | {"pt", "mistral", "sharded_state", "runai_streamer_sharded", "bitsandbytes"}
"""`load_format`s whose weights are those of the folder's files as they are now.

Others are not: npcache reads copies that vLLM made of the files once, ipc_cache what another process has loaded, of
which vLLM compares the names and shapes alone.
"""

_LENGTHLESS_ROPE = frozenset(("default", "linear", "llama3", "yarn", "deepseek_yarn", "mrope", "proportional", "None"))
"""Kinds of rope scaling whose factors depend on the model's configuration alone, not on the longest request."""

_LONGROPES = ("longrope", "su")

_MAX_CHARACTERS = 480


def numerics_of(vllm_config: Any) -> dict[str, str]:
    """Field -> value as text, of a host's whole configuration. Equal settings give equal texts in every process."""
    model = vllm_config.model_config
    cache = getattr(vllm_config, "cache_config", None)
    model_dtype = str(getattr(model, "dtype", None)).removeprefix("torch.")
    cache_dtype = str(getattr(cache, "cache_dtype", "auto"))
    hf_config = hf_keys(getattr(model, "hf_config", None))
    out = {
        "model_dtype": model_dtype,
        "cache_dtype": model_dtype if cache_dtype == "auto" else cache_dtype,
        "quantization": str(getattr(model, "quantization", None)),
        "convert_type": str(getattr(model, "convert_type", "none")),
        "pooling": str(getattr(model, "runner_type", "generate") == "pooling"),
        **{f"hf_config.{key}": value for key, value in hf_config.items()},
    }
    if _reads_length(getattr(model, "hf_config", None)) or getattr(model, "trust_remote_code", False):
        out["max_model_len"] = str(model.max_model_len)
    out["load_format"] = _load_format(vllm_config)
    out["attn_temperature_tuning"] = _attn_temperature_tuning(model)
    # Beside what they resolve to: a model may read keys that do not count above, or none in place of a default.
    out["hf_overrides"] = _text(getattr(model, "hf_overrides", None) or None)
    out["environment"] = _text(_environment(model) or None)
    # Of vLLM alone, and named where there is none too, so that peers of other hosts compare it.
    out["model_class_overrides"] = _text(getattr(model, "model_class_overrides", None) or {})
    out["plugins"] = _text(_plugins(model) or None)
    for where, config in (
        ("", model),
        ("cache.", cache),
        ("attention.", getattr(vllm_config, "attention_config", None)),
        ("multimodal.", getattr(model, "multimodal_config", None)),
        ("load.", getattr(vllm_config, "load_config", None)),
        ("kernel.", getattr(vllm_config, "kernel_config", None)),
    ):
        out.update((where + name, text) for name, text in _fields(config) if where + name not in out)
    for name in ("additional_config", "engram_config", "diffusion_config"):
        if hasattr(vllm_config, name):  # named where it is empty too, so that peers compare it
            out[name] = _text(getattr(vllm_config, name) or None)
    return out


def named_paths(vllm_config: Any) -> tuple[str, ...]:
    """What settings may mean as a file or folder beside the model's: what stands there counts too.

    So do the model's subfolders that hold weights, which some of vLLM's models load beside those of the folder itself
    (Kimi-Audio its encoder, Jina the adapter of a task).
    """
    model, load = vllm_config.model_config, getattr(vllm_config, "load_config", None)
    hf_config: Any = getattr(model, "hf_config", None)
    settings = (
        hf_config.to_dict() if hasattr(hf_config, "to_dict") else None,  # of other models (Ultravox), of code
        getattr(model, "model_weights", None),  # read in the model's place by some loaders
        getattr(model, "hf_overrides", None),
        getattr(model, "quantization_config", None),
        getattr(load, "model_loader_extra_config", None),
        getattr(getattr(model, "multimodal_config", None), "mm_encoder_fp8_scale_path", None),
        getattr(vllm_config, "additional_config", None),
    )
    found = _paths_in(json.loads(json.dumps(settings, default=_plain)))
    return tuple(sorted({*found, *(_weight_folders(Path(str(model.model))) if _is_vllms(model) else ())}))


def _weight_folders(folder: Path) -> Iterator[str]:
    """Subfolders with weights, two levels deep; those of a training's earlier steps are not read by any model."""
    for place in (*folder.glob("*/"), *folder.glob("*/*/")):
        is_other = any(name.startswith((".", "checkpoint-")) for name in place.relative_to(folder).parts)
        if not is_other and any(file.suffix in (".safetensors", ".bin", ".pt") for file in place.glob("*")):
            yield str(place)


def _paths_in(value: Any) -> Iterator[str]:
    """Every text that may be one, at any depth; single words are not taken for files of the working folder.

    `auto_map` names code as "FOLDER--module.Class". Names that begin with "_" say where a configuration came from.
    """
    if isinstance(value, str):
        if "/" in value or value.endswith((".json", ".safetensors", ".pt", ".tensors")):
            yield value.partition("--")[0] if re.fullmatch(r".+--\w+\.\w+", value) else value
    elif isinstance(value, list):
        for inner in value:
            yield from _paths_in(inner)
    elif isinstance(value, dict):
        yield from _paths_in([inner for name, inner in value.items() if not str(name).startswith("_")])


def adapter_settings(vllm_config: Any) -> str:
    """How the host applies adapters, beside their files; empty when it does so as it stands in the files."""
    lora_config = getattr(vllm_config, "lora_config", None)
    settings = dict(_fields(lora_config))
    if settings.get("lora_dtype") in (_text(getattr(vllm_config.model_config, "dtype", None)), _text("auto")):
        del settings["lora_dtype"]
    return " ".join(f"{name}={text}" for name, text in sorted(settings.items()) if text not in ("null", "false"))


def hf_maker(vllm_config: Any) -> str:
    """Who made the model's configuration: of equal makers, a key that only one side has is a difference too."""
    hf_config: Any = getattr(vllm_config.model_config, "hf_config", None)
    if not hasattr(hf_config, "to_dict"):
        return ""
    return f"{type(hf_config).__name__}, transformers {hf_config.to_dict().get('transformers_version')}"


def hf_keys(hf_config: Any) -> dict[str, str]:
    """The resolved configuration of transformers, nested ones by dotted names. None is as if it were not there."""
    if not hasattr(hf_config, "to_dict"):
        return {}
    return {name: _text(value) for name, value in _flat(hf_config.to_dict()) if value is not None}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = str(key)
        if name in _HARMLESS_HF_KEYS or name.startswith("_") or name.endswith(("dropout", "_implementation")):
            continue
        if isinstance(value, Mapping) and name.endswith("_config"):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _reads_length(hf_config: Any) -> bool:
    """True when KV may depend on the longest request that the engine was started for.

    So does longrope, which picks its factors by that, and Llama 4, which scales its queries by position in engines for
    long requests; what is not known is taken to do so.
    """
    if not hasattr(hf_config, "to_dict"):
        return False
    for name, value in _flat(hf_config.to_dict()):
        key = name.rpartition(".")[2]
        if key.startswith("dual_chunk") or key == "attn_temperature_tuning":
            return True
        if key == "model_type" and str(value).startswith("llama4"):
            return True
        if key.startswith("rope_") and any(kind not in _LENGTHLESS_ROPE for kind in _rope_kinds(value)):
            return True
    return False


def rope_by_batch(hf_config: Any) -> str | None:
    """The kind of rope, where transformers' code picks the factors of every token by the longest request of its batch.

    vLLM's own code picks them once, by the longest request that the engine may be sent.
    """
    if not hasattr(hf_config, "to_dict"):
        return None
    ropes = (value for name, value in _flat(hf_config.to_dict()) if name.rpartition(".")[2].startswith("rope_"))
    kinds = (kind for rope in ropes for kind in _rope_kinds(rope))
    return next((kind for kind in kinds if "dynamic" in kind or kind in _LONGROPES), None)


def _attn_temperature_tuning(model: Any) -> str:
    """vLLM's Llama 4 reads it from the generation config, whose file is no part of the weights' fingerprint."""
    ask = getattr(model, "try_get_generation_config", dict)
    settings = {**ask(), **(getattr(model, "override_generation_config", None) or {})}
    return str(settings.get("attn_temperature_tuning"))


def _is_vllms(model: Any) -> bool:
    return not hasattr(model, "weights_stamp")


def _environment(model: Any) -> dict[str, str]:
    """Those that PyTorch computes by; of those that vLLM declares, and it alone reads, all but the harmless.

    Others that begin with VLLM_ are no settings: Kubernetes names its services' addresses so (VLLM_SERVICE_HOST), and
    vLLM hands on what is of one process (VLLM_DIST_IDENT).
    """
    if not _is_vllms(model):
        return environment_matching(_ARITHMETIC)
    declared = getattr(sys.modules.get("vllm.envs"), "environment_variables", {})
    harmless = [pattern for patterns in HARMLESS_ENVIRONMENT.values() for pattern in patterns]
    return environment_matching(f"{_ARITHMETIC}|{_UNDECLARED}") | {
        name: text
        for name, text in environment_matching("VLLM_.*").items()
        if name in declared and not any(fnmatchcase(name, known) for known in harmless)
    }


def chosen_by(vllm_config: Any) -> str:
    """What all tokens of an engine are chosen by, beside each request's own settings; empty where there is nothing."""
    model = vllm_config.model_config
    if not _is_vllms(model):
        return ""
    generation: Mapping[str, Any] = getattr(model, "try_get_generation_config", dict)()
    found = {
        "logits_processors": getattr(model, "logits_processors", None),
        "plugins": _plugins(model, "vllm.logits_processors"),
        "watermark": getattr(vllm_config, "watermark_config", None),
        "suppress_tokens": generation.get("suppress_tokens"),
    }
    found = {name: value for name, value in found.items() if value}
    return _text(found) if found else ""


def _plugins(model: Any, group: str = "vllm.general_plugins") -> list[str]:
    """Code of others that vLLM calls at its start: it may put its own in the place of any model, layer or quantisation.

    Which of it `VLLM_PLUGINS` leaves out, the environment says.
    """
    if not _is_vllms(model):
        return []
    others = [offer for offer in read_offers(group) if not offer.module.startswith(("vllm.", "kvferry."))]
    return sorted({f"{offer.name}={offer.module}:{offer.attribute} of {offer.origin}" for offer in others})


def _rope_kinds(value: Any) -> Iterator[str]:
    """Every `rope_type` and `type` at any depth."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key in ("rope_type", "type") and not isinstance(inner, Mapping):
                yield str(inner)
            else:
                yield from _rope_kinds(inner)


def load_format(vllm_config: Any) -> str:
    """As configured in the host."""
    chosen = getattr(getattr(vllm_config, "load_config", None), "load_format", "auto")
    return str(chosen.name if isinstance(chosen, enum.Enum) else chosen).lower()


def _load_format(vllm_config: Any) -> str:
    """Which of a folder's weights are read. vLLM's `auto` takes Mistral's files where there are any."""
    model = vllm_config.model_config
    name = load_format(vllm_config)
    if name not in _SAFETENSORS_FORMATS:
        return name
    is_vllms_auto = name == "auto" and _is_vllms(model)
    has_mistrals = is_vllms_auto and any(Path(str(model.model)).glob("consolidated*.safetensors"))
    return "mistral" if has_mistrals else "safetensors"


def _fields(config: Any) -> Iterable[tuple[str, str]]:
    if config is None:
        return
    harmless = HARMLESS.get(type(config).__name__, {})
    names = [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else [*harmless]
    for name in names:
        if name not in harmless:
            yield name, _text(getattr(config, name, None))


def _text(value: Any) -> str:
    """Canonical; long ones end in a digest of the whole."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)
    if len(text) <= _MAX_CHARACTERS:
        return text
    return f"{text[: _MAX_CHARACTERS - 80]}... sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _plain(value: Any) -> Any:
    """What JSON does not know. Addresses and the order of sets are no part of what a value says."""
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return re.sub(r" at 0x[0-9a-f]+", "", str(value)).removeprefix("torch.")
