"""What a user may set on the embedded engine, checked once, and the frozen configuration connectors see.

`EngineOptions` is what the user said. `EngineConfig` is what the engine resolved from it and from the model; it bears
vLLM's attribute names as far as connectors read them, and nothing changes it later.
"""

from __future__ import annotations

import enum
import math
import sys
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from kvferry.config import KVTransferConfig, shown
from kvferry.engine.layout_choice import check_layout
from kvferry.errors import ConfigError
from kvferry.kv_events import KVEventsConfig

DEFAULT_KV_CACHE_BYTES = 1 << 30
MAX_LOGPROBS = 20
MAX_COMPLETIONS = 128
_LARGEST = (1 << 63) - 1
_SEEDS = -(1 << 63), _LARGEST
_GREEDY_BELOW = 1e-5
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")


class RequestOutputKind(enum.Enum):
    """Content of `step`'s outputs for a request that has not finished."""

    CUMULATIVE = "cumulative"  # after each token, the whole output so far
    DELTA = "delta"  # after each token, the new part of the output
    FINAL_ONLY = "final_only"  # no output


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends. Names and defaults are vLLM's. ConfigError names the field.

    Penalties change the logits first, then temperature, min_p, top_k and top_p in this order.
    """

    max_tokens: int = 16
    """Largest number of tokens to generate."""
    temperature: float = 1.0
    """Divisor of the logits; 0 chooses the likeliest token (greedy)."""
    top_p: float = 1.0
    """Share of the probability, likeliest tokens first, from which a token is drawn."""
    top_k: int = 0
    """Number of likeliest tokens from which a token is drawn; 0 or -1: no limit."""
    seed: int | None = None
    """Seed of this request's draws, which repeats them whatever else runs; None: the engine's seed and the request's
    number."""
    ignore_eos: bool = False
    """Continue after an end-of-sequence token."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the request; they stay in `token_ids`, their text is left out."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    extra_args: dict[str, Any] | None = None
    """`{"kv_transfer_params": {...}}` reaches the connector as `request.kv_transfer_params`."""
    stop: Sequence[str] = ()
    """Text, or several texts, that end the request as soon as one appears in the output; the reported text ends before
    the stop text."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the stop token's text, at the end of the text."""
    min_p: float = 0.0
    """Leave out tokens less likely than this part of the likeliest token's probability."""
    repetition_penalty: float = 1.0
    """Divisor of the logits of tokens in prompt and output (above 1: fewer repetitions)."""
    presence_penalty: float = 0.0
    """Amount subtracted once from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Amount subtracted from the logits of tokens in the output, for each occurrence."""
    logprobs: int | None = None
    """Number of likeliest tokens whose log-probabilities (of the unprocessed logits) are reported, beside that of the
    chosen token; None: no log-probabilities."""
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    """Content of the outputs before the request has finished."""
    n: int = 1
    """Number of completions of each prompt, at most 128. A seed repeats the completions, which still differ from each
    other."""

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, Iterable | None) or isinstance(value, Mapping):
                raise ConfigError(f"{name}={value!r} must be a list")
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value or ()))
        _require_int("n", self.n, 1)
        if self.n > MAX_COMPLETIONS:
            raise ConfigError(f"n={self.n} must be at most {MAX_COMPLETIONS}")
        _require_int("max_tokens", self.max_tokens, 1)
        _require_int("top_k", self.top_k, -1)
        _require_number("temperature", self.temperature, 0)
        _require_number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise ConfigError("top_p=0 must be above 0; temperature=0 chooses the likeliest token")
        _require_number("min_p", self.min_p, 0, 1)
        _require_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _require_number("presence_penalty", self.presence_penalty, -2, 2)
        _require_number("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _require_int("seed", self.seed, *_SEEDS)
        self._check_types()
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, 0)
            if self.logprobs > MAX_LOGPROBS:
                raise ConfigError(f"logprobs={self.logprobs} must be at most {MAX_LOGPROBS}")
        self._check_stops()
        transfer = (self.extra_args or {}).get("kv_transfer_params", {})
        if not isinstance(transfer, dict):
            raise ConfigError("extra_args['kv_transfer_params'] must be an object")
        if self.n > 1 and (transfer.get("do_remote_prefill") or transfer.get("do_remote_decode")):
            raise ConfigError(f"n={self.n}: one hand-over (kv_transfer_params) serves one completion; ask with n=1")

    def per_completion(self) -> list[SamplingParams]:
        """`n` settings of one completion each; a seed grows by one from each to the next."""
        seeds = [
            None if self.seed is None else min(self.seed, _LARGEST + 1 - self.n) + index for index in range(self.n)
        ]
        return [replace(self, n=1, seed=seed) for seed in seeds]

    def _check_types(self) -> None:
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={shown(getattr(self, name))} must be true or false")
        if self.extra_args is not None and not isinstance(self.extra_args, dict):
            raise ConfigError(f"extra_args={shown(self.extra_args)} must be an object")

    def _check_stops(self) -> None:
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop={self.stop!r} must be a non-empty string or several")
        for token_id in self.stop_token_ids:
            _require_int("stop_token_ids", token_id, 0)

    @property
    def is_greedy(self) -> bool:
        """True when the likeliest token is taken; a temperature near 0 counts, for its logits would overflow."""
        return self.temperature < _GREEDY_BELOW


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The settings of `LLM(...)`, checked as far as that is possible without the model."""

    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_bytes: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    dtype: str = "auto"
    device: str = "cpu"
    enable_prefix_caching: bool = True
    seed: int = 0
    use_v2_model_runner: bool | None = None
    v2_model_architectures: tuple[str, ...] | None = None
    disable_hybrid_kv_cache_manager: bool | None = None
    hidden_state_layers: tuple[int, ...] = ()
    kv_cache_layout: str = "auto"
    kernel_block_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_cache_layout", check_layout(self.kv_cache_layout))
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            _require_int(name, getattr(self, name), 1)
        for name in ("num_kv_blocks", "kv_cache_bytes", "max_model_len", "kernel_block_size"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), 1)
        if self.num_kv_blocks is not None and self.kv_cache_bytes is not None:
            raise ConfigError("num_kv_blocks and kv_cache_bytes are both set: give the size of the KV cache once")
        if self.dtype not in DTYPE_NAMES:
            raise ConfigError(f"dtype={shown(self.dtype)} is not one of {', '.join(DTYPE_NAMES)}")
        _require_device(self.device)
        _require_int("seed", self.seed, *_SEEDS)
        for name in ("enable_prefix_caching", "use_v2_model_runner", "disable_hybrid_kv_cache_manager"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (value is not None or name == "enable_prefix_caching"):
                raise ConfigError(f"{name}={shown(value)} must be True or False")
        names: Any = self.v2_model_architectures
        is_list = names is None or (isinstance(names, Iterable) and not isinstance(names, str | Mapping))
        if not is_list or not all(isinstance(name, str) and name for name in names or ()):
            raise ConfigError(
                f"v2_model_architectures={shown(names)} must be a list of names such as 'LlamaForCausalLM'"
            )
        object.__setattr__(self, "v2_model_architectures", None if names is None else tuple(names))
        layers: Any = self.hidden_state_layers
        if not isinstance(layers, Sequence) or isinstance(layers, str | bytes):
            raise ConfigError(f"hidden_state_layers={shown(layers)} must be a list of numbers of layers")
        object.__setattr__(self, "hidden_state_layers", tuple(layers))
        for index in self.hidden_state_layers:
            _require_int("hidden_state_layers", index, 0)
        if list(self.hidden_state_layers) != sorted(set(self.hidden_state_layers)):
            raise ConfigError(f"hidden_state_layers={list(self.hidden_state_layers)} must be in order, each once")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The KV cache."""

    block_size: int
    num_gpu_blocks: int
    enable_prefix_caching: bool
    cache_dtype: str = "auto"
    kv_cache_layout: str = "BLNHC"
    kernel_block_size: int | None = None
    """Tokens of the blocks attention works in and connectors see in tensors; None: whole blocks."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The model."""

    model: str
    """Folder of the model as an absolute path."""
    dtype: torch.dtype
    max_model_len: int
    seed: int
    hf_config: Any
    use_mla: bool = False
    is_converted_at_start: bool = False
    """True while `model` is a GGUF, which the engine's start converts into a folder (`kvferry doctor` starts none)."""
    weights_stamp: Any = None
    """Of the weights' files before they were read (`kvferry.kv.fingerprint.stamp_folder`); None without files."""


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """One process, one rank."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a step, and how long the engine waits for others before it goes on alone (seconds)."""

    max_num_seqs: int
    max_num_batched_tokens: int
    disable_hybrid_kv_cache_manager: bool = False
    lookup_timeout_s: float = 60.0
    """Longest time for which a connector may answer None to a lookup; then the lookup counts as a miss."""
    load_timeout_s: float = 300.0
    """Longest time for an asynchronous load; then the engine sets its blocks aside and computes the request."""
    stall_timeout_s: float = 300.0
    """Longest time without a request that can run (all blocks pinned); then the next waiting request ends with an
    error."""
    send_timeout_s: float = 600.0
    """Longest time for which a connector may keep a finished request's blocks; then the engine logs and counts the
    excess, and no longer steps because of these blocks. The blocks stay held, since the transfer may still read
    them."""
    connector_failure_limit: int = 5
    """Number of failures (exception, or breach of the contract) of one hook, in consecutive steps that call the hook,
    after which the engine switches the connector off."""


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """How weights came in."""

    load_format: str = "auto"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """First constructor argument of connectors (`vllm_config` there)."""

    reads_failed_blocks: ClassVar[bool] = True
    """Failed loads may be reported by request, group and position (`LoadFailure`), synchronous ones too."""
    takes_first_tokens: ClassVar[bool] = True
    """`remote_first_token_ids` of `kv_transfer_params` are the request's first tokens, once all its KV is loaded."""
    steps_for_held_blocks: ClassVar[bool] = True
    """`LLM.has_requests` is true while a connector holds blocks of a request that has ended."""
    keeps_nan_apart: ClassVar[bool] = True
    """A NaN or an infinity in the KV of one request reaches no other, also not by what is left of it in a block."""
    redraws_alike: ClassVar[bool] = True
    """A token that is drawn once more, after a failed load, comes out the same."""

    cache_config: CacheConfig
    model_config: ModelConfig
    scheduler_config: SchedulerConfig
    kv_transfer_config: KVTransferConfig | None
    instance_id: str
    use_v2_model_runner: bool = False
    """The timetable of hooks that workers keep; False is the first model runner's."""
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    load_config: LoadConfig = field(default_factory=LoadConfig)
    speculative_config: None = None
    lora_config: None = None
    kv_events_config: KVEventsConfig = field(default_factory=KVEventsConfig)
    hidden_state_layers: tuple[int, ...] = ()
    """Hidden states that the model hands on to connectors (`kvferry.engine.hidden_states`)."""


@dataclass(frozen=True, slots=True)
class KVBudget:
    """The resolved size of the KV cache and the longest request it can hold."""

    num_blocks: int
    max_model_len: int


def resolve_kv_budget(
    options: EngineOptions, block_bytes: int, model_limit_tokens: int, num_blocks_of: Callable[[int], int]
) -> KVBudget:
    """Size the cache: `block_bytes` is one block, `model_limit_tokens` what the model can attend to, and
    `num_blocks_of(tokens)` the most blocks that a request of so many tokens holds at one time.

    Block 0 is the null block, so one block more than requests can use is made. Raises ConfigError when one request of
    `max_model_len` would not fit; unless that was set, it becomes what fits.
    """
    longest = options.max_model_len or model_limit_tokens
    if longest > model_limit_tokens:
        raise ConfigError(f"max_model_len={longest} is above the model's own limit of {model_limit_tokens} tokens")
    num_blocks = options.num_kv_blocks
    if num_blocks is None:
        num_blocks = (options.kv_cache_bytes or DEFAULT_KV_CACHE_BYTES) // block_bytes
    if options.num_kv_blocks is None and options.kv_cache_bytes is None:
        num_blocks = min(num_blocks, 1 + options.max_num_seqs * num_blocks_of(longest))
    needed_blocks = 1 + num_blocks_of(options.max_model_len or 1)
    if num_blocks < max(2, needed_blocks):
        raise ConfigError(
            f"the KV cache is too small for one request of {options.max_model_len or 1} tokens: it has {num_blocks} "
            f"blocks of {options.block_size} tokens (one is reserved) and needs {needed_blocks}; "
            f"set num_kv_blocks={needed_blocks} or kv_cache_bytes={needed_blocks * block_bytes}, or lower max_model_len"
        )
    return KVBudget(num_blocks, bisect(range(1, longest + 1), num_blocks - 1, key=num_blocks_of))


def _require_device(device: object) -> None:
    try:
        kind = torch.device(device).type if isinstance(device, str) else "none"
    except RuntimeError as err:
        raise ConfigError(f"device={shown(device)} is not a device torch knows") from err
    has_cuda = torch.cuda.is_available()
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not has_cuda):
        raise ConfigError(
            f"device={shown(device)} is not available; this machine has cpu{' and cuda' if has_cuda else ''}"
        )


def _require_int(name: str, value: object, minimum: int, maximum: int = _LARGEST) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        what = f"of at least {minimum}" if maximum == _LARGEST else f"from {minimum} to {maximum}"
        if isinstance(value, int) and value > maximum:
            what = f"of at most {maximum}"
        raise ConfigError(f"{name}={shown(value)} must be a whole number {what}")


def _require_number(name: str, value: object, minimum: float, maximum: float = math.inf) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Whole numbers may be larger than any float.
    if not is_number or not minimum <= value <= min(maximum, sys.float_info.max):  # type: ignore[operator]
        what = f"of at least {minimum:g}" if maximum == math.inf else f"from {minimum:g} to {maximum:g}"
        raise ConfigError(f"{name}={shown(value)} must be a number {what}")
