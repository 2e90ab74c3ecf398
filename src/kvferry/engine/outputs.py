"""Records of a step, as scheduler, runner and connectors exchange them (vLLM's names), and what users get back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvferry.contract import KVConnectorMetadata, KVConnectorOutput
from kvferry.engine.config import SamplingParams
from kvferry.engine.kv_manager import BlockIds, KVManager
from kvferry.engine.request import Request


@dataclass(frozen=True, slots=True)
class NewRequestData:
    """A request that workers hear of for the first time."""

    req_id: str
    prompt_token_ids: list[int]
    block_ids: BlockIds
    num_computed_tokens: int
    sampling_params: SamplingParams
    mm_features: tuple[Any, ...] = ()
    lora_request: None = None


@dataclass(slots=True)
class CachedRequestData:
    """Requests that workers know already; parallel lists. For resumed ids `new_block_ids` is the whole table."""

    req_ids: list[str] = field(default_factory=list)
    new_block_ids: list[BlockIds | None] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    num_output_tokens: list[int] = field(default_factory=list)
    resumed_req_ids: set[str] = field(default_factory=set)
    all_token_ids: dict[str, list[int]] = field(default_factory=dict)
    """Resumed requests only."""


@dataclass(frozen=True, slots=True)
class BlockState:
    """Resolves current block tables of the requests scheduled in this step."""

    manager: KVManager

    def get_block_ids(self, req_id: str) -> BlockIds:
        """The request's whole current block table, per group."""
        return self.manager.get_block_ids(req_id)


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One request's share of a step: tokens [num_computed, num_computed + num_tokens)."""

    request: Request
    num_tokens: int
    block_ids: BlockIds

    @property
    def samples(self) -> bool:
        """True when this step reaches the request's last token, so that the next one is chosen."""
        return self.request.num_computed_tokens + self.num_tokens == self.request.num_tokens


@dataclass(slots=True)
class SchedulerOutput:
    """One step's plan. Connectors read it in `build_connector_meta` and must not change it."""

    kv_connector_block_state: BlockState
    batch: list[BatchItem] = field(default_factory=list)
    scheduled_new_reqs: list[NewRequestData] = field(default_factory=list)
    scheduled_cached_reqs: CachedRequestData = field(default_factory=CachedRequestData)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    finished_req_ids: set[str] = field(default_factory=set)
    """Requests that ended since the last step."""
    preempted_req_ids: set[str] = field(default_factory=set)
    has_sync_kv_loads: bool = False
    kv_connector_metadata: KVConnectorMetadata | None = None
    new_block_ids_to_zero: None = None
    kv_cache_block_copies: tuple[()] = ()

    @property
    def total_num_scheduled_tokens(self) -> int:
        """Tokens of all requests in this step; 0 makes it an empty step."""
        return sum(self.num_scheduled_tokens.values())


@dataclass(slots=True)
class ForwardContext:
    """What `start_load_kv` is given: metadata per layer (None in empty steps) and each layer's KV tensor."""

    attn_metadata: dict[str, Any] | None
    no_compile_layers: dict[str, Any]


@dataclass(slots=True)
class StepResult:
    """What the runner made of a plan."""

    sampled: dict[str, int] = field(default_factory=dict)
    """Next token of each request whose last token was reached."""
    connector_output: KVConnectorOutput = field(default_factory=KVConnectorOutput)
    sync_loads_unproved: bool = False
    """A worker hook broke while loads were due before the forward: nothing read from them counts."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """The generated sequence."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | None = None
    index: int = 0


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times of one request, in seconds since it was added."""

    ttft_s: float | None
    """To the first token; None when there was none."""
    e2e_s: float
    """To its end."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    """Prompt tokens whose KV was not computed: found in the engine's prefix cache or loaded by the connector."""
    num_external_tokens: int
    """Those of them that the connector loaded. Both corrected when a load failed."""
    metrics: RequestMetrics
    external_hit_sources: dict[str, int] = field(default_factory=dict)
    """Where the external tokens came from ("host", "disk", ...), as the connector says; sums to their number."""
    kv_transfer_params: dict[str, Any] | None = None
    error: str | None = None
    """Why `finish_reason` is "error"."""
    finished: bool = True
