"""The engine's dealings with its KV connector: every hook is called from here, guarded and checked.

`SchedulerConnector` and `WorkerConnector` stand between engine and connector, one per role. A hook that raises is
logged, counted and answered for; an answer that breaks the contract is a ContractError in the log, and the request
goes on without the connector. Neither ends the engine. Without a connector both answer as if it had nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvferry.clock import Clock
from kvferry.contract import (
    CacheHitSource,
    ConnectorStats,
    KVCacheConfig,
    KVConnectorBase_V1,
    KVConnectorFactory,
    KVConnectorOutput,
    KVConnectorRole,
    KVConnectorTransferResults,
    PrefixRange,
    supports_hma,
)
from kvferry.engine.attention import PackedBatch
from kvferry.engine.config import EngineConfig
from kvferry.engine.kv_groups import KVBuffer
from kvferry.engine.kv_manager import BlockIds, KVCacheBlocks, KVManager
from kvferry.engine.outputs import ForwardContext, SchedulerOutput
from kvferry.engine.request import Request
from kvferry.errors import ContractError
from kvferry.kv_events import KVCacheEvent

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class HostCounters:
    """What went wrong at the border to the connector."""

    hook_errors: dict[str, int] = field(default_factory=dict)
    """Exceptions per hook."""
    contract_errors: dict[str, int] = field(default_factory=dict)
    """Answers that broke the contract, per hook."""
    unknown_completions: int = 0
    """Completions of requests that were not waiting for one (late or duplicate)."""
    load_failures: int = 0
    """Loads that failed or ran out of time."""
    switched_off: dict[str, str] = field(default_factory=dict)
    """Connector -> why it was switched off. Empty while all is well."""


class _Guard:
    """Calls hooks of one connector instance; never raises."""

    def __init__(self, connector: KVConnectorBase_V1, counters: HostCounters) -> None:
        self.connector = connector
        self.counters = counters
        self.failed_hooks: set[str] = set()
        """Hooks that raised since the owner last cleared this."""

    def call(self, hook: str, default: Any, *args: Any, check: Callable[[Any], str | None] | None = None) -> Any:
        """The hook's answer, or `default` when it raises or `check` names a broken clause."""
        try:
            answer = getattr(self.connector, hook)(*args)
        except Exception:  # a host hook: a plugin's fault must not end the engine
            self._count(self.counters.hook_errors, hook)
            logger.exception("%s.%s failed; going on without it", type(self.connector).__name__, hook)
            return default
        broken = check(answer) if check is not None else None
        if broken is None:
            return answer
        self._count(self.counters.contract_errors, hook)
        error = ContractError(f"{type(self.connector).__name__}.{hook} answered {answer!r}: {broken}")
        logger.error("%s; going on without it", error)
        return default

    def _count(self, counts: dict[str, int], hook: str) -> None:
        counts[hook] = counts.get(hook, 0) + 1
        self.failed_hooks.add(hook)


@dataclass(frozen=True, slots=True)
class ExternalMatch:
    """What the connector can load for a request beyond the local hit."""

    num_tokens: int = 0
    is_async: bool = False


NO_MATCH = ExternalMatch()


class SchedulerConnector:
    """The scheduler's view of its connector."""

    def __init__(
        self, connector: KVConnectorBase_V1 | None, clock: Clock, lookup_timeout_s: float, counters: HostCounters
    ) -> None:
        self.counters = counters
        self._guard = None if connector is None else _Guard(connector, counters)
        self._is_hma = connector is not None and supports_hma(connector)
        self._clock = clock
        self._lookup_timeout_s = lookup_timeout_s
        self._first_asked_s: dict[str, float] = {}
        self._stats: ConnectorStats | None = None
        self._has_asked_stats = False
        self.on_admission: Callable[[Request, KVCacheBlocks], None] | None = None
        """Called when a request gets its blocks, before the connector hears of it."""
        self.events: list[KVCacheEvent] | None = None
        """KV events of the connector, for whoever empties it; None: nobody does."""

    @property
    def connector(self) -> KVConnectorBase_V1 | None:
        """The connector's scheduler instance, or None when none is configured."""
        return None if self._guard is None else self._guard.connector

    def on_new_request(self, request: Request) -> None:
        """Announce a request before it is scheduled."""
        if self._guard is not None:
            self._guard.call("on_new_request", None, request)

    def match(self, request: Request, num_local_tokens: int) -> ExternalMatch | None:
        """What can be loaded beyond `num_local_tokens`; None: ask again in a later step. A bad answer is no match."""
        if self._guard is None:
            return NO_MATCH
        answer = self._guard.call(
            "get_num_new_matched_tokens",
            (0, False),
            request,
            num_local_tokens,
            check=lambda answer: _broken_match(answer, num_local_tokens, request.num_tokens),
        )
        num_tokens, is_async = answer
        if request.get_skip_reading_prefix_cache():
            num_tokens, is_async = 0, False
        if num_tokens is None and not self._waited_too_long(request):
            return None
        self._first_asked_s.pop(request.request_id, None)
        return ExternalMatch(num_tokens, is_async) if num_tokens else NO_MATCH

    def _waited_too_long(self, request: Request) -> bool:
        now_s = self._clock.now()
        waited_s = now_s - self._first_asked_s.setdefault(request.request_id, now_s)
        if waited_s < self._lookup_timeout_s:
            return False
        logger.warning("%s: the connector answered None for %.0f s; computing it", request.request_id, waited_s)
        return True

    def blocks_allocated(self, request: Request, blocks: KVCacheBlocks, match: ExternalMatch) -> bool:
        """Tell the connector where to load to. False when it failed, so that no load can be counted on."""
        if self.on_admission is not None:
            self.on_admission(request, blocks)
        if self._guard is None:
            return True
        self._guard.failed_hooks.clear()
        if match.is_async:
            self._guard.call("get_loaded_kv_cache_group_ids", (), request)
        self._guard.call("update_state_after_alloc", None, request, blocks, match.num_tokens)
        if match.num_tokens and request.num_preemptions == 0:
            sources = self._guard.call(
                "get_external_cache_hit_sources",
                {CacheHitSource.EXTERNAL_UNSPECIFIED: match.num_tokens},
                request,
                match.num_tokens,
                check=lambda answer: _broken_sources(answer, match.num_tokens),
            )
            request.external_hit_sources = {str(getattr(key, "value", key)): num for key, num in sources.items()}
        return "update_state_after_alloc" not in self._guard.failed_hooks

    def asked_since_s(self, request_id: str) -> float | None:
        """Since when the connector has been answering "ask again" for this request; None: it is not."""
        return self._first_asked_s.get(request_id)

    def explain(self, request: Request, num_local_tokens: int) -> list[PrefixRange]:
        """What the connector says of the tokens behind the local ones."""
        if self._guard is None:
            return []
        answer: list[PrefixRange] = self._guard.call(
            "explain_prefix", [], request, num_local_tokens, check=_broken_explanation
        )
        return answer

    def build_meta(self, output: SchedulerOutput) -> None:
        """Put the step's orders to the workers into `output`; None there when the connector failed."""
        if self._guard is not None:
            output.kv_connector_metadata = self._guard.call(
                "build_connector_meta", None, output, check=lambda meta: "must be an object" if meta is None else None
            )

    def request_finished(self, request: Request, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        """(keep the blocks until the id is reported as sent, parameters for the response)."""
        self._first_asked_s.pop(request.request_id, None)
        if self._guard is None:
            return False, None
        hook = "request_finished_all_groups" if self._is_hma else "request_finished"
        answer: tuple[bool, dict[str, Any] | None] = self._guard.call(
            hook, (False, None), request, block_ids if self._is_hma else block_ids[0], check=_broken_finish
        )
        return answer

    def worker_reported(self, output: KVConnectorOutput, had_forward: bool) -> None:
        """Hand on what the worker reported; always after a forward, else only if there is something."""
        if self._guard is None:
            return
        if had_forward or not output.is_empty():
            self._guard.call("update_connector_output", None, output)

    def end_step(self) -> None:
        """Collect what is due once per step."""
        if self._guard is not None:
            self._ask_stats()
            events = self._guard.call("take_events", ())
            with suppress(TypeError):
                self._keep_events(list(events))  # generators do their work only when read

    @property
    def stats(self) -> ConnectorStats | None:
        """The connector's totals as of the last step (before the first: now); None from one that does not tell."""
        if not self._has_asked_stats:
            self._ask_stats()
        return self._stats

    def _keep_events(self, events: list[Any]) -> None:
        if self.events is not None:
            self.events += [event for event in events if isinstance(event, KVCacheEvent)]

    def _ask_stats(self) -> None:
        self._has_asked_stats = True
        if self._guard is not None:
            stats = self._guard.call("get_kv_connector_stats", None)
            self._stats = stats if isinstance(stats, ConnectorStats) else None

    def has_pending_block_frees(self) -> bool:
        """True when blocks will come free without a preemption."""
        return self._guard is not None and bool(self._guard.call("has_pending_block_frees", False))

    def has_pending_push_work(self) -> bool:
        """True while the engine should step although no request runs."""
        return self._guard is not None and bool(self._guard.call("has_pending_push_work", False))

    def reset_cache(self) -> bool:
        """Make the connector forget; False only when it says so."""
        return self._guard is None or self._guard.call("reset_cache", False) is not False

    def shutdown(self) -> None:
        """Shut the connector down."""
        if self._guard is not None:
            self._guard.call("shutdown", None)


def _broken_match(answer: Any, num_local: int, num_tokens: int) -> str | None:
    """The clause that an answer of `get_num_new_matched_tokens` breaks, or None."""
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], bool)):
        return "must be (number of tokens or None, bool)"
    num_external, is_async = answer
    if num_external is None:
        return None
    if isinstance(num_external, bool) or not isinstance(num_external, int):
        return "the number of tokens must be an int or None"
    if num_external < 0:
        return "the number of tokens must not be negative"
    if num_external == 0:
        return "nothing cannot be loaded asynchronously: answer (0, False)" if is_async else None
    left = num_tokens - num_local
    if num_external > left:
        return f"claims more than the {left} tokens that are left"
    if not is_async and num_external == left:
        return "a synchronous load must leave at least one token to compute"
    return None


def _broken_sources(answer: Any, num_external: int) -> str | None:
    counts = list(answer.values()) if isinstance(answer, dict) else [-1]
    if all(isinstance(num, int) and num >= 0 for num in counts) and sum(counts) == num_external:
        return None
    return f"must be a dict of token counts that sum to {num_external}"


def _broken_explanation(answer: Any) -> str | None:
    if isinstance(answer, list) and all(isinstance(item, PrefixRange) for item in answer):
        return None
    return "must be a list of PrefixRange"


def _broken_finish(answer: Any) -> str | None:
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], bool)):
        return "must be (bool, parameters or None)"
    return None if answer[1] is None or isinstance(answer[1], dict) else "the parameters must be a dict or None"


_LOAD_HOOKS = frozenset(
    {
        "handle_preemptions",
        "bind_connector_metadata",
        "start_load_kv",
        "wait_for_layer_load",
        "get_transfer_results",
        "get_block_ids_with_load_errors",
    }
)


class WorkerConnector:
    """The runner's view of its connector, in the order of vLLM's first model runner. Is the model's `LayerHooks`."""

    def __init__(self, connector: KVConnectorBase_V1 | None, kv: KVBuffer, counters: HostCounters) -> None:
        self._guard = None if connector is None else _Guard(connector, counters)
        self._kv = kv
        self._is_bound = False
        self._context = ForwardContext(None, dict(kv.layers))

    def begin_step(self, plan: SchedulerOutput, batch: PackedBatch | None) -> None:
        """Before the forward: preemptions, metadata, and synchronous loads if there are any."""
        if self._guard is None:
            return
        self._guard.failed_hooks.clear()
        metadata = dict.fromkeys(self._kv.layers, batch) if batch is not None else None
        self._context = ForwardContext(metadata, dict(self._kv.layers))
        self._is_bound = plan.kv_connector_metadata is not None
        if self._is_bound:
            self._guard.call("handle_preemptions", None, plan.kv_connector_metadata)
            self._guard.call("bind_connector_metadata", None, plan.kv_connector_metadata)
            if plan.has_sync_kv_loads:
                self._guard.call("start_load_kv", None, self._context)

    def before_layer(self, name: str) -> None:
        """Wait until this layer's loads are in the pool."""
        if self._guard is not None and self._is_bound:
            self._guard.call("wait_for_layer_load", None, name)

    def after_layer(self, name: str, kv_layer: torch.Tensor, attn_metadata: Any) -> None:
        """Let the connector save this layer."""
        if self._guard is not None and self._is_bound:
            self._guard.call("save_kv_layer", None, name, kv_layer, attn_metadata)

    def end_step(self, plan: SchedulerOutput) -> tuple[KVConnectorOutput, bool]:
        """After the forward: other loads, saves, the connector's report, and whether sync loads are unproved."""
        if self._guard is None:
            return KVConnectorOutput(), False
        call = self._guard.call
        if self._is_bound:
            if not plan.has_sync_kv_loads:
                call("start_load_kv", None, self._context)
            call("wait_for_save", None)
        results = call(
            "get_transfer_results", KVConnectorTransferResults(), set(plan.finished_req_ids), check=_broken_results
        )
        output = KVConnectorOutput(
            set(results.finished_sending), set(results.finished_recving), set(results.failed_recving)
        )
        output.invalid_block_ids = set(call("get_block_ids_with_load_errors", set(), check=_broken_block_ids))
        if "get_block_ids_with_load_errors" in self._guard.failed_hooks:
            output.failed_recving |= results.finished_recving  # their blocks may be among those not named
        output.kv_connector_stats = call("get_kv_connector_stats", None)
        output.kv_cache_events = call("get_kv_connector_kv_cache_events", None)
        output.kv_connector_worker_meta = call("build_connector_worker_meta", None)
        self.clear()
        return output, plan.has_sync_kv_loads and self._loads_unproved(plan)

    def _loads_unproved(self, plan: SchedulerOutput) -> bool:
        assert self._guard is not None
        return plan.kv_connector_metadata is None or bool(self._guard.failed_hooks & _LOAD_HOOKS)

    def clear(self) -> None:
        """Take this step's metadata away; harmless when there is none."""
        if self._guard is not None and self._is_bound:
            self._is_bound = False
            self._guard.call("clear_connector_metadata", None)

    def shutdown(self) -> None:
        """Shut the connector down."""
        if self._guard is not None:
            self._guard.call("shutdown", None)


def _broken_results(answer: Any) -> str | None:
    names = ("finished_sending", "finished_recving", "failed_recving")
    if all(isinstance(getattr(answer, name, None), set | frozenset) for name in names):
        return None
    return f"must have sets named {', '.join(names)}"


def _broken_block_ids(answer: Any) -> str | None:
    if isinstance(answer, set | frozenset | list | tuple) and all(isinstance(block_id, int) for block_id in answer):
        return None
    return "must be a set of block ids"


@dataclass(frozen=True, slots=True)
class HostedConnectors:
    """The KV memory, the manager of its blocks and both connector instances, started in the contract's order."""

    kv: KVBuffer
    manager: KVManager
    scheduler: SchedulerConnector
    worker: WorkerConnector


def start_connectors(
    config: EngineConfig, kv_cache_config: KVCacheConfig, device: str, clock: Clock
) -> HostedConnectors:
    """Allocate the KV memory and start worker, then scheduler instance. What a constructor raises, this raises."""
    counters = HostCounters()
    transfer = config.kv_transfer_config
    if transfer is None:
        kv = KVBuffer(kv_cache_config, device)
        return _hosted(config, kv, None, None, clock, counters)
    layout = KVConnectorFactory.get_connector_class(transfer).get_required_kvcache_layout(config)
    if layout not in (None, kv_cache_config.kv_cache_layout):
        logger.warning(
            "the connector asks for KV layout %s, this engine has %s", layout, kv_cache_config.kv_cache_layout
        )
    worker = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, kv_cache_config)
    started = [worker]
    try:
        kv = KVBuffer(kv_cache_config, device, worker.get_mem_pool_context())
        worker.register_kv_caches(kv.views())
        scheduler = KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER, kv_cache_config)
        started.append(scheduler)
        hosted = _hosted(config, kv, scheduler, worker, clock, counters)
        scheduler.bind_kv_cache_manager(hosted.manager)
        scheduler.get_finished_count()
        handshake = worker.get_handshake_metadata()
        scheduler.set_xfer_handshake_metadata({} if handshake is None else {0: handshake})
    except BaseException:
        for connector in started:
            _Guard(connector, counters).call("shutdown", None)
        raise
    return hosted


def _hosted(
    config: EngineConfig,
    kv: KVBuffer,
    scheduler: KVConnectorBase_V1 | None,
    worker: KVConnectorBase_V1 | None,
    clock: Clock,
    counters: HostCounters,
) -> HostedConnectors:
    cache = config.cache_config
    return HostedConnectors(
        kv,
        KVManager(cache.num_gpu_blocks, cache.block_size, len(kv.config.kv_cache_groups), cache.enable_prefix_caching),
        SchedulerConnector(scheduler, clock, config.scheduler_config.lookup_timeout_s, counters),
        WorkerConnector(worker, kv, counters),
    )
