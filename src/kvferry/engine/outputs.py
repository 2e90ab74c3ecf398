"""Records of a step, as scheduler, runner and connectors exchange them (vLLM's names), and what users get back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from kvferry.contract import KVConnectorMetadata, KVConnectorOutput
from kvferry.engine.config import RequestOutputKind, SamplingParams
from kvferry.engine.kv_manager import BlockIds, KVManager
from kvferry.engine.request import Logprob, Request, RequestStatus, Sampled


@dataclass(frozen=True, slots=True)
class NewRequestData:
    """A request that workers hear of for the first time."""

    req_id: str
    prompt_token_ids: list[int]
    block_ids: BlockIds
    num_computed_tokens: int
    sampling_params: SamplingParams
    prefill_token_ids: list[int]
    """All of its tokens so far: the prompt, and first tokens that a prefill engine chose."""
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
class StepPlan:
    """A step in the making."""

    budget_tokens: int
    output: SchedulerOutput
    sync_loads: dict[str, int] = field(default_factory=dict)
    """Request id -> tokens that did not come from the load."""
    waits_for_frees: bool = False
    lacks_blocks: bool = False
    """Something could run but for blocks."""

    def add(self, request: Request, num_tokens: int, new_block_ids: BlockIds, all_block_ids: BlockIds) -> None:
        """Schedule the request's next tokens."""
        output, request_id = self.output, request.request_id
        self.budget_tokens -= num_tokens
        output.batch.append(BatchItem(request, num_tokens, all_block_ids))
        output.num_scheduled_tokens[request_id] = num_tokens
        if request.status is RequestStatus.WAITING:
            output.scheduled_new_reqs.append(
                NewRequestData(
                    request_id,
                    request.prompt_token_ids,
                    all_block_ids,
                    request.num_computed_tokens,
                    request.sampling_params,
                    list(request.all_token_ids),
                )
            )
            return
        cached = output.scheduled_cached_reqs
        is_resumed = request.status is RequestStatus.PREEMPTED
        if is_resumed:
            cached.resumed_req_ids.add(request_id)
            cached.all_token_ids[request_id] = list(request.all_token_ids)
            new_block_ids = all_block_ids
        cached.req_ids.append(request_id)
        cached.new_block_ids.append(new_block_ids if any(new_block_ids) else None)
        cached.num_computed_tokens.append(request.num_computed_tokens)
        cached.num_output_tokens.append(request.num_output_tokens)


@dataclass(slots=True)
class ForwardContext:
    """What `start_load_kv` is given: metadata per layer (None in empty steps) and each layer's KV tensor."""

    attn_metadata: dict[str, Any] | None
    no_compile_layers: dict[str, Any]


@dataclass(slots=True)
class StepResult:
    """What the runner made of a plan."""

    sampled: dict[str, Sampled] = field(default_factory=dict)
    """Next token of each request whose last token was reached."""
    connector_output: KVConnectorOutput = field(default_factory=KVConnectorOutput)
    sync_loads_unproved: bool = False
    """A worker hook broke while loads were due before the forward: nothing read from them counts."""
    failures_lost: bool = False
    """A report broke that may have named bad blocks of loads still under way: nothing that they bring counts."""


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """How busy the scheduler is now, and preemptions since its start."""

    num_running: int
    num_waiting: int
    """For a place or for blocks."""
    num_loading: int
    """For KV that the connector loads."""
    num_preemptions: int
    kv_cache_usage: float
    """Part of the KV blocks in use, 0 to 1."""
    num_held_blocks: dict[str, int] = field(default_factory=dict)
    """Blocks of requests that are gone, by why they are held (`engine.transfers.HoldReason`)."""
    oldest_held_s: float = 0.0
    """For how long the oldest of them have been held, in seconds."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """The generated sequence, or what is new of it (`RequestOutputKind.DELTA`)."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    """stop, length, abort or error; None while unfinished."""
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it; None for the end-of-sequence token."""
    index: int = 0
    logprobs: list[dict[int, Logprob]] | None = None
    """One per token when asked for."""


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times of one request, in seconds since it was added."""

    ttft_s: float | None
    """To the first token; None when there was none (yet)."""
    e2e_s: float | None
    """To its end; None while unfinished."""
    queue_s: float | None = None
    """To its first blocks; None when it got none (yet)."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request, finished or as far as it has come."""

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
    error_param: str | None = None
    """The request's own parameter that is to blame for it; None: no fault of whoever sent the request is known."""
    finished: bool = True


def merged(family: list[RequestOutput], *, first_index: int = 0, request_id: str | None = None) -> RequestOutput:
    """One output of a prompt's completions, which were requests of their own; the first one's facts about the prompt.

    Times are those until the first token of any of them and until the end of all.
    """
    first = family[0]
    failed = next((output for output in family if output.error is not None), first)
    times = [output.metrics for output in family]
    return replace(
        first,
        request_id=first.request_id if request_id is None else request_id,
        outputs=[replace(output.outputs[0], index=first_index + index) for index, output in enumerate(family)],
        metrics=RequestMetrics(
            min((each.ttft_s for each in times if each.ttft_s is not None), default=None),
            max((each.e2e_s for each in times if each.e2e_s is not None), default=None),
            min((each.queue_s for each in times if each.queue_s is not None), default=None),
        ),
        error=failed.error,
        error_param=failed.error_param,
    )


def report(request: Request, tokenizer: Any) -> RequestOutput | None:
    """What the user is to be told of the request now, as its `output_kind` says; None: nothing yet.

    Call once per step in which it moved; for deltas the request remembers what was told.
    """
    kind, finished = request.sampling_params.output_kind, request.is_finished()
    if kind is RequestOutputKind.FINAL_ONLY and not finished:
        return None
    first = request.num_reported_tokens if kind is RequestOutputKind.DELTA else 0
    request.num_reported_tokens = request.num_output_tokens
    text = ""
    if request.detokenizer is not None:
        new = request.detokenizer.take_new(finished)
        text = new if kind is RequestOutputKind.DELTA else request.detokenizer.reported_text()
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=[
            CompletionOutput(
                text,
                request.all_token_ids[request.num_prompt_tokens + first :],
                request.status.finish_reason,
                request.stop_reason,
                logprobs=_with_text(request, first, tokenizer),
            )
        ],
        num_cached_tokens=request.num_local_tokens + request.num_external_tokens,
        num_external_tokens=request.num_external_tokens,
        metrics=_metrics(request),
        external_hit_sources=request.external_hit_sources,
        kv_transfer_params=request.output_kv_transfer_params,
        error=request.error,
        error_param=request.error_param,
        finished=finished,
    )


def _metrics(request: Request) -> RequestMetrics:
    times_s = (request.first_token_s, request.finished_s, request.admitted_s)
    return RequestMetrics(*(None if at_s is None else at_s - request.arrival_s for at_s in times_s))


def _with_text(request: Request, first: int, tokenizer: Any) -> list[dict[int, Logprob]] | None:
    if request.sampling_params.logprobs is None:
        return None
    if tokenizer is None:
        return request.logprobs[first:]
    return [
        {token: replace(logprob, decoded_token=tokenizer.decode([token])) for token, logprob in at_token.items()}
        for at_token in request.logprobs[first:]
    ]
