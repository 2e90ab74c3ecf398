"""The host's configuration, read once into frozen types, so that no other code touches host configs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.contract.numerics import (
    FOLDER_FORMATS,
    adapter_settings,
    chosen_by,
    hf_maker,
    load_format,
    named_paths,
    numerics_of,
    rope_by_batch,
)
from kvferry.errors import ConfigError
from kvferry.types import AttentionKind, GroupInfo

if TYPE_CHECKING:
    from kvferry.contract.kv_cache import KVCacheConfig
    from kvferry.contract.views import RequestView

_FILES_OF_MODELS = ("model.safetensors.index.json", "model.safetensors", "config.json", "params.json")
HIDDEN_STATE_LAYER = "cache_only_layers."
"""In the name of the layer by which both hosts hand hidden states on."""


@dataclass(frozen=True, slots=True)
class HostInfo:
    """All that built-in connectors know of the engine they serve."""

    engine_id: str
    model: str
    """Folder (or hub name) of the model, as the user gave it."""
    weights_are_random: bool
    """True when the host was told to make weights up."""
    max_model_len: int
    num_blocks: int
    groups: tuple[GroupInfo, ...]
    tp_size: int
    pp_size: int
    rank: int
    """Rank of this worker within the engine (tp rank while pp_size is 1)."""
    load_failure_policy: str
    extra_config: Mapping[str, Any]
    numerics: Mapping[str, str]
    """All of the host's settings beside the weights on which KV bytes depend (`kvferry.contract.numerics`)."""
    config_maker: str = ""
    """Class and version that resolved the model's configuration."""
    adapter_settings: str = ""
    """How the host applies LoRA adapters, where that is not as their files say."""
    foreign_load_format: str | None = None
    """The `load_format`, where that takes weights from elsewhere than the files of the model's folder."""
    hub_commit: str | None = None
    """Of a model given by hub name: the commit of which the hub's cache holds the files; None where that is unknown."""
    named_paths: tuple[str, ...] = ()
    """What settings may mean as a file or folder, beside those of model, draft and adapters."""
    wants_kv_events: bool = False
    """True when the host publishes KV events, so that `take_events` is worth its work."""
    kv_role: str = "kv_both"
    """kv_producer, kv_consumer or kv_both."""
    total_kv_heads: Mapping[str, int] = field(default_factory=dict)
    """By attention layer: KV heads of the whole model, over all workers."""
    key_elements: Mapping[str, int] = field(default_factory=dict)
    """By attention layer: elements of K per token and head; V follows."""
    page_bytes: Mapping[str, int] = field(default_factory=dict)
    """By attention layer: bytes of one block in this worker, before the KV cache is registered."""
    hidden_state_layers: tuple[int, ...] = ()
    """Hidden states that the host hands on: 0 is the embeddings, i what layer i gives, counted from 1."""
    page_form: Callable[[str], str] = lambda name: "content"
    """Attention layer -> how its kernels place tokens and elements within a page (`kvferry.p2p.geometry.PageForm`).
    The host knows it when the KV cache is registered."""
    draft_model: str | None = None
    """Folder or hub name of the draft model, or None: its KV lies in the cache too."""
    is_converted_at_start: bool = False
    """True where the model is a file of which the host's start makes a folder; known before that start alone."""
    weights_stamp: Any = None
    """What `kvferry.kv.fingerprint.stamp_folder` said of the model's folder before its weights were read, or None."""
    loaded_after_s: float | None = None
    """Else: a time before the weights were read (seconds since the epoch), or None when there is no telling."""
    reads_failed_blocks: bool = False
    """True when the host reads `LoadFailure` records, of synchronous loads too; vLLM does not."""
    chosen_by: str = ""
    """What all of the host's tokens are chosen by, beside each request's settings: logits processors, for example."""
    takes_first_tokens: bool = False
    """True when the host takes a prefill engine's first tokens over; vLLM computes the last prompt token again."""
    media_read_after_s: float | None = None
    """A time before the host read any file of a media processor, in seconds since the epoch. None: it has no media."""
    numbers_media: bool = False
    """True when the host names media by a number that begins anew with each process, not by what they show."""
    no_hits_reason: str | None = None
    """Why no request may use KV from elsewhere: the model's output needs every token in one forward. None: it may."""
    steps_for_held_blocks: bool = False
    """True when the host steps while blocks of ended requests are held, without being told to; vLLM does not."""
    keeps_nan_apart: bool = False
    """True when a NaN in one request's KV never spoils another's; in vLLM (its CPU kernels) what an earlier owner of a
    block left behind the last token does."""
    redraws_alike: bool = False
    """True when a token drawn once more, since its step's load failed, comes out the same. vLLM's generator of a seeded
    request goes on."""

    def must_load_early(self, request: RequestView) -> bool:
        """True when a load of this request must have ended before the step that needs it, else its failure is seen when
        a token was drawn, and the next one drawn in its place is another."""
        return request.draws_from_seed and not self.redraws_alike

    @property
    def has_named_weights(self) -> bool:
        """True when the files of a local folder say which weights the host has."""
        return not self.weights_are_random and self.foreign_load_format is None and Path(self.model).is_dir()

    @property
    def hidden_state_group(self) -> GroupInfo | None:
        """The KV cache group in which hidden states are paged, where the host does that."""
        return next((y for y in self.groups if any(HIDDEN_STATE_LAYER in name for name in y.layer_names)), None)

    @property
    def world_size(self) -> int:
        """Number of workers that each hold a shard of every block."""
        return self.tp_size * self.pp_size


def host_info(vllm_config: Any, kv_cache_config: KVCacheConfig) -> HostInfo:
    """Read a host's configuration objects (vLLM's or the embedded engine's: the attributes are named alike)."""
    transfer = vllm_config.kv_transfer_config
    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if int(getattr(parallel, name, 1) or 1) > 1:
            raise ConfigError(f"{name}={getattr(parallel, name)} is not supported: blocks would be spread over ranks")
    chosen = load_format(vllm_config)
    return HostInfo(
        engine_id=str(transfer.engine_id),
        model=str(model.model),
        weights_are_random=chosen == "dummy",
        foreign_load_format=None if chosen in FOLDER_FORMATS or chosen == "dummy" else chosen,
        max_model_len=int(model.max_model_len),
        num_blocks=int(kv_cache_config.num_blocks),
        groups=groups_of(kv_cache_config),
        tp_size=int(parallel.tensor_parallel_size),
        pp_size=int(parallel.pipeline_parallel_size),
        rank=int(getattr(parallel, "rank", 0)),
        load_failure_policy=str(transfer.kv_load_failure_policy),
        extra_config=dict(transfer.kv_connector_extra_config),
        numerics=numerics_of(vllm_config),
        config_maker=hf_maker(vllm_config),
        adapter_settings=adapter_settings(vllm_config),
        hub_commit=_hub_commit(vllm_config),
        named_paths=named_paths(vllm_config),
        wants_kv_events=bool(getattr(getattr(vllm_config, "kv_events_config", None), "enable_kv_cache_events", False)),
        kv_role=str(transfer.kv_role),
        total_kv_heads=_total_kv_heads(vllm_config, kv_cache_config),
        key_elements={name: int(spec.head_size) for name, spec in _attention_specs(kv_cache_config)},
        page_bytes={name: int(spec.page_size_bytes) for name, spec in _attention_specs(kv_cache_config)},
        hidden_state_layers=_hidden_state_layers(vllm_config),
        page_form=partial(_page_form, vllm_config),
        draft_model=_draft_model(vllm_config),
        is_converted_at_start=bool(getattr(model, "is_converted_at_start", False)),
        weights_stamp=getattr(model, "weights_stamp", None),
        loaded_after_s=None if hasattr(model, "weights_stamp") else _process_started_s(),
        reads_failed_blocks=bool(getattr(vllm_config, "reads_failed_blocks", False)),
        chosen_by=chosen_by(vllm_config),
        takes_first_tokens=bool(getattr(vllm_config, "takes_first_tokens", False)),
        media_read_after_s=_media_read_after_s(vllm_config),
        numbers_media=_numbers_media(vllm_config),
        no_hits_reason=_no_hits_reason(vllm_config),
        steps_for_held_blocks=bool(getattr(vllm_config, "steps_for_held_blocks", False)),
        keeps_nan_apart=bool(getattr(vllm_config, "keeps_nan_apart", False)),
        redraws_alike=bool(getattr(vllm_config, "redraws_alike", False)),
    )


def _attention_specs(kv_cache_config: KVCacheConfig) -> Iterator[tuple[str, Any]]:
    for group in kv_cache_config.kv_cache_groups:
        by_layer = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        for name in group.layer_names:
            spec = by_layer.get(name, group.kv_cache_spec)
            if hasattr(spec, "num_kv_heads"):
                yield name, spec


def _total_kv_heads(vllm_config: Any, kv_cache_config: KVCacheConfig) -> dict[str, int]:
    """With one worker, its own; with several, what the model says, for they may share heads. Latent KV has one head."""
    tp_size = int(vllm_config.parallel_config.tensor_parallel_size)
    ask = getattr(vllm_config.model_config, "get_total_num_kv_heads", None)
    total = int(ask()) if tp_size > 1 and ask is not None else None
    return {
        name: 1 if "MLA" in type(spec).__name__ else total or int(spec.num_kv_heads) * tp_size
        for name, spec in _attention_specs(kv_cache_config)
    }


def groups_of(kv_cache_config: KVCacheConfig) -> tuple[GroupInfo, ...]:
    """The KV cache groups. ConfigError when there are none, or one of them mixes kinds of attention."""
    if not any(group.layer_names for group in kv_cache_config.kv_cache_groups):
        raise ConfigError(
            "the model has no KV cache (encoders, whose tokens see those behind them, have none), so there is nothing "
            "to save or load: start it without kv_transfer_config"
        )
    return tuple(_group_info(i, group) for i, group in enumerate(kv_cache_config.kv_cache_groups))


def _numbers_media(vllm_config: Any) -> bool:
    """vLLM hashes media for its own two caches alone; without these it numbers them ("renderer0-mm-1-image-0")."""
    media = getattr(vllm_config.model_config, "multimodal_config", None)
    is_prefix_cached = getattr(getattr(vllm_config, "cache_config", None), "enable_prefix_caching", True)
    return media is not None and not is_prefix_cached and getattr(media, "mm_processor_cache_gb", None) == 0


def _media_read_after_s(vllm_config: Any) -> float | None:
    """vLLM reads processors in the process that starts the engine's, before it starts that, and again for requests with
    processor settings of their own.
    """
    if getattr(vllm_config.model_config, "multimodal_config", None) is None:
        return None
    parent = parent_process()
    return _started_s(os.getpid() if parent is None or parent.pid is None else parent.pid) or 0.0


def _no_hits_reason(vllm_config: Any) -> str | None:
    """Models that take no prefix from vLLM's own cache take none from elsewhere either. Connectors vLLM never asks.

    These are pooling models (MEAN, CLS, STEP), where a hit ends the engine ("partial prefill is not supported"), and
    MLA on CPUs (CPU_MLA), for which vLLM turns prefix caching and chunked prefill off: answers after a hit are others.
    In vLLM's Transformers backend some ropes make a token's KV depend on its batch; there vLLM's own cache errs too.
    Where vLLM returns each token's routed experts, it keeps those of its own cache's blocks beside it, and its engine
    ends at a block that came from elsewhere (`BlockObjectStoreError`).
    """
    if bool(getattr(getattr(vllm_config, "aux_output_config", None), "enabled", False)):
        return "vLLM returns each prompt token's routed experts (--enable-return-routed-experts), which loaded KV lacks"
    model = vllm_config.model_config
    is_transformers: Callable[[], bool] = getattr(model, "using_transformers_backend", bool)
    if is_transformers() and (kind := rope_by_batch(getattr(model, "hf_config", None))) is not None:
        return f"with rope_type {kind!r} vLLM's Transformers backend makes a token's KV depend on its batch"
    settings = ("cache_config", "enable_prefix_caching"), ("scheduler_config", "enable_chunked_prefill")
    is_whole = all(getattr(getattr(vllm_config, config, None), name, True) is False for config, name in settings)
    device = getattr(getattr(vllm_config, "device_config", None), "device_type", None)
    if is_whole and device == "cpu" and bool(getattr(model, "use_mla", False)):
        return "vLLM computes prompts of models with MLA whole on this CPU, without its own prefix cache"
    pooler = getattr(model, "pooler_config", None)
    if pooler is None or bool(getattr(model, "is_prefix_caching_supported", False)):
        return None
    kinds = [str(getattr(pooler, name, None)) for name in ("seq_pooling_type", "tok_pooling_type")]
    return f"the model pools the whole prompt ({'/'.join(kind for kind in kinds if kind != 'None') or 'pooling'})"


def _hidden_state_layers(vllm_config: Any) -> tuple[int, ...]:
    """Our engine's setting; in vLLM that of the speculative method which only passes hidden states on."""
    speculative: Any = getattr(vllm_config, "speculative_config", None)
    if getattr(speculative, "method", None) == "extract_hidden_states":
        return tuple(sorted(set(speculative.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids)))
    return tuple(getattr(vllm_config, "hidden_state_layers", ()))


def _draft_model(vllm_config: Any) -> str | None:
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if draft is None or draft is getattr(speculative, "target_model_config", None):  # vLLM's for drafts without a model
        return None
    name = getattr(draft, "model", None)
    return None if name is None else str(name)


def _hub_commit(vllm_config: Any) -> str | None:
    """What a hub's name stands for changes. vLLM takes the files by way of a cache, in a folder for each commit."""
    hub: Any = sys.modules.get("huggingface_hub")  # our engine loads folders alone
    model = vllm_config.model_config
    name, revision = str(model.model), getattr(model, "revision", None)
    if hub is None or Path(name).exists():
        return None
    for cache in (getattr(getattr(vllm_config, "load_config", None), "download_dir", None), None):
        for file in _FILES_OF_MODELS:
            try:
                found = hub.try_to_load_from_cache(name, file, cache_dir=cache, revision=revision)
            except ValueError:  # no hub's name
                return None
            if isinstance(found, str):
                return Path(found).parent.name
    return None


def _process_started_s() -> float | None:
    """When this process began, where it was made for an engine. One that its user runs may have written the weights."""
    return None if parent_process() is None else _started_s(os.getpid())


def _started_s(process_id: int) -> float | None:
    """When a process began, in seconds since the epoch."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since the machine's start
    return time.time() - (uptime_s - started_s)


def _page_form(vllm_config: Any, name: str) -> str:
    """vLLM's attention on CPU takes the registered [H, N, C] for what its instruction set likes, and notes which."""
    context = getattr(getattr(vllm_config, "compilation_config", None), "static_forward_context", {})
    isa = getattr(context.get(name), "isa", None)
    if isa is None:
        return "content"
    return "k by element" if isa in ("vec", "vec16") else f"of vLLM's {isa} kernels"


def _group_info(group_id: int, group: Any) -> GroupInfo:
    spec = group.kv_cache_spec
    kinds = {_kind(s) for s in getattr(spec, "kv_cache_specs", {"": spec}).values()}
    if len(kinds) != 1:
        raise ConfigError(
            f"KV cache group {group_id} mixes kinds of attention layers: {sorted(k.value for k in kinds)}"
        )
    kind = kinds.pop()
    window = None
    if kind is AttentionKind.SLIDING_WINDOW:
        window = max(int(s.sliding_window) for s in getattr(spec, "kv_cache_specs", {"": spec}).values())
    return GroupInfo(group_id, tuple(group.layer_names), int(spec.block_size), kind, window)


def _kind(spec: Any) -> AttentionKind:
    # By class name along the MRO: hosts have their own spec classes, and ours must not import theirs.
    names = [cls.__name__ for cls in type(spec).__mro__]
    if "SlidingWindowSpec" in names:
        return AttentionKind.SLIDING_WINDOW
    if "FullAttentionSpec" in names:
        return AttentionKind.FULL
    return AttentionKind.OTHER
