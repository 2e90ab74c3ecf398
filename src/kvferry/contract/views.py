"""Our small view of the host's objects. Built-in connectors see these and nothing of the host.

Both hosts name the fields alike (facts: vLLM 0.32), so one set of readers serves both. Views of requests are live:
they read the host's request when asked, and hold nothing but a reference to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvferry.types import MultimodalItem

_ONLY_OF_THE_ANSWER = frozenset((
    "max_tokens", "stop", "stop_token_ids", "ignore_eos", "n", "logprobs", "prompt_logprobs", "prompt_logprob_start",
    "prompt_logprob_token_ids", "logprob_token_ids", "flat_logprobs", "detokenize", "skip_special_tokens",
    "spaces_between_special_tokens", "include_stop_str_in_output", "output_kind", "stream_interval", "skip_clone",
    "output_text_buffer_length", "skip_reading_prefix_cache", "routed_experts_prompt_start",
))  # fmt: skip
"""Fields of sampling parameters that change what is told of the tokens, or when they end, and not which are chosen."""
_ONLY_OF_DRAWS = frozenset(("temperature", "seed", "top_p", "top_k", "min_p", "watermarking"))
_NOTHING = ("False", "0", "()", "[]", "{}", "''")
_NEUTRAL = {"temperature": ("1",), "top_p": ("1",), "top_k": ("0", "-1"), "repetition_penalty": ("1",)}
_GREEDY_BELOW = 1e-5
_TRANSFER = "kv_transfer_params"
_TASKS_OF_EACH_TOKEN = ("token_embed", "token_classify")

BlockIds = tuple[list[int], ...]
"""Block ids per group; position i of a group's list holds tokens [i * block_size, (i + 1) * block_size)."""


class RequestView:
    """A live view of a host's request."""

    __slots__ = ("_request",)

    def __init__(self, request: Any) -> None:
        self._request = request

    @property
    def request_id(self) -> str:
        """Unique within the engine's life."""
        return str(self._request.request_id)

    @property
    def token_ids(self) -> Sequence[int]:
        """Prompt and generated tokens so far."""
        tokens: Sequence[int] = self._request.all_token_ids
        return tokens

    @property
    def num_tokens(self) -> int:
        """Length of `token_ids`."""
        return int(self._request.num_tokens)

    @property
    def num_prompt_tokens(self) -> int:
        """How many of them are the prompt."""
        return int(self._request.num_prompt_tokens)

    @property
    def status_name(self) -> str:
        """The host's name of its state, e.g. FINISHED_STOPPED; both hosts' names are alike."""
        return str(self._request.status.name)

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV the host counts as computed."""
        return int(self._request.num_computed_tokens)

    @property
    def was_cut_short(self) -> bool:
        """True when it ended with an abort or an error."""
        name = getattr(getattr(self._request, "status", None), "name", "")
        return name in ("FINISHED_ABORTED", "FINISHED_ERROR", "FINISHED_IGNORED")

    @property
    def cache_salt(self) -> str | None:
        """The tenant's salt; requests of different salts never share KV."""
        return getattr(self._request, "cache_salt", None)

    @property
    def lora_path(self) -> str | None:
        """Folder of the LoRA adapter in use, or None."""
        lora = getattr(self._request, "lora_request", None)
        return None if lora is None else str(lora.lora_path)

    @property
    def lora_id(self) -> int | None:
        """The number under which the host looks for the adapter among those that it has loaded; None: there is none."""
        return getattr(getattr(self._request, "lora_request", None), "lora_int_id", None)

    @property
    def multimodal_items(self) -> tuple[MultimodalItem, ...]:
        """Media items in the prompt, by position."""
        features = getattr(self._request, "mm_features", None) or ()
        return tuple(MultimodalItem(f.identifier, f.mm_position.offset, f.mm_position.length) for f in features)

    @property
    def has_unhashable_input(self) -> bool:
        """True when the prompt is not (only) token ids, so that tokens do not identify the KV."""
        return getattr(self._request, "prompt_embeds", None) is not None

    @property
    def skip_reading_prefix_cache(self) -> bool:
        """True when this request wants everything computed, or an output of each token of its prompt: what is loaded
        has none. vLLM's own setting may say otherwise, and its engine then fails such a request."""
        getter = getattr(self._request, "get_skip_reading_prefix_cache", None)
        is_set = getter() if getter is not None else getattr(self._request, "skip_reading_prefix_cache", False)
        return bool(is_set) or self._tells_of_each_prompt_token

    @property
    def _tells_of_each_prompt_token(self) -> bool:
        sampling = getattr(self._request, "sampling_params", None)
        pooling = getattr(self._request, "pooling_params", None)
        asked = (getattr(sampling, name, None) for name in ("prompt_logprobs", "prompt_logprob_token_ids"))
        return getattr(pooling, "task", None) in _TASKS_OF_EACH_TOKEN or any(value is not None for value in asked)

    @property
    def kv_transfer_params(self) -> dict[str, Any] | None:
        """The user's parameters for this transfer; never mutate them."""
        params: dict[str, Any] | None = getattr(self._request, "kv_transfer_params", None)
        return params

    @property
    def draws_from_seed(self) -> bool:
        """True when its tokens are drawn at random, and alike each time that the request is asked."""
        params = getattr(self._request, "sampling_params", None)
        return getattr(params, "seed", None) is not None and not _is_greedy(params)

    @property
    def sampling_facts(self) -> str:
        """All that decides which tokens are chosen behind the prompt, as JSON; equal in both hosts for equal requests.

        But not with a seed: from the same one each host draws other tokens.
        A setting of a later vLLM that has a value counts: requests that differ in it are not taken for alike.
        """
        return _sampling_facts(getattr(self._request, "sampling_params", None))


def _is_greedy(params: Any) -> bool:
    return bool(getattr(params, "temperature", 1.0) < _GREEDY_BELOW)


def _sampling_facts(params: Any) -> str:
    names: Iterable[str] = getattr(params, "__struct_fields__", getattr(params, "__dataclass_fields__", ()))
    values = {name: getattr(params, name) for name in names if not name.startswith("_")}
    is_greedy = _is_greedy(params)
    if values.get("min_tokens"):  # so long no token that ends it is chosen; routers cut it down for the prefill leg
        ends = [*(values["stop_token_ids"] or ()), values["ignore_eos"]]
        values |= {"min_tokens": 1, "chosen only later": ends}
    extra = {name: value for name, value in (values.pop("extra_args", None) or {}).items() if name != _TRANSFER}
    facts = {"temperature": "0"} if is_greedy else {}
    for name, value in {**values, "extra_args": extra}.items():
        text = repr(int(value) if isinstance(value, float) and value.is_integer() else value)
        is_left_out = name in _ONLY_OF_THE_ANSWER or (is_greedy and name in _ONLY_OF_DRAWS)
        if not is_left_out and text != "None" and (name == "seed" or text not in _NEUTRAL.get(name, _NOTHING)):
            facts[name] = text
    if "seed" in facts:
        facts["drawn by"] = type(params).__module__.partition(".")[0]
    return json.dumps(facts, sort_keys=True)


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's share of a step."""

    request_id: str
    num_computed_tokens: int
    """Tokens whose KV exists when the step starts (loaded ones included)."""
    num_scheduled_tokens: int
    block_ids: BlockIds
    """The request's whole current block table."""


@dataclass(slots=True)
class StepView:
    """What the scheduler decided for one step."""

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    finished_req_ids: frozenset[str] = frozenset()
    preempted_req_ids: frozenset[str] = frozenset()


def request_view(request: Any) -> RequestView:
    """The view of a host's request."""
    return RequestView(request)


def block_ids_of(blocks: Any) -> BlockIds:
    """Block ids per group of a host's KVCacheBlocks (None stands for no blocks)."""
    return () if blocks is None else tuple(list(group) for group in blocks.get_block_ids())


def as_groups(block_ids: list[int] | BlockIds) -> BlockIds:
    """One list per group, also from hosts that pass a flat list for their only group."""
    if isinstance(block_ids, tuple):
        return block_ids
    return (list(block_ids),)


def step_view(output: Any) -> StepView:
    """The view of a host's SchedulerOutput; block tables come from the host, which alone knows them."""
    view = StepView(
        finished_req_ids=frozenset(output.finished_req_ids or ()),
        preempted_req_ids=frozenset(output.preempted_req_ids or ()),
    )
    resolve = output.kv_connector_block_state.get_block_ids if output.num_scheduled_tokens else None
    for request_id, num_computed in _scheduled(output):
        num_new = output.num_scheduled_tokens.get(request_id, 0)
        if num_new and resolve is not None:
            table = tuple(list(group) for group in resolve(request_id))
            view.scheduled.append(ScheduledRequest(request_id, num_computed, num_new, table))
    return view


def _scheduled(output: Any) -> Iterator[tuple[str, int]]:
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)
