"""The engine's dealings with its KV connector: every hook is called from here, guarded and checked.

`SchedulerConnector` and `WorkerConnector` stand between engine and connector, one per role. A hook that raises is
logged, counted and answered for; an answer that breaks the contract is a ContractError in the log, and the request
goes on without the connector. Neither ends the engine; repeated, they end the connector (guard.py). Without a
connector, and once it is switched off, both answer as if it had nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
from kvferry.contract.clauses import (
    Clause,
    broken_binding,
    broken_block_ids,
    broken_explanation,
    broken_finish,
    broken_groups,
    broken_match,
    broken_meta,
    broken_results,
    broken_sources,
)
from kvferry.contract.host import groups_of
from kvferry.engine.attention import PackedBatch
from kvferry.engine.config import EngineConfig
from kvferry.engine.guard import ConnectorBreaker, EngineGuard, HostCounters
from kvferry.engine.kv_groups import KVBuffer, copy_kv_blocks
from kvferry.engine.kv_manager import BlockIds, KVCacheBlocks, KVManager
from kvferry.engine.outputs import ForwardContext, SchedulerOutput
from kvferry.engine.request import Request
from kvferry.engine.timetable import V1_TIMETABLE, V2_TIMETABLE, Timetable
from kvferry.errors import ContractError
from kvferry.kv_events import KVCacheEvent
from kvferry.multi.messages import SourcedEvent

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExternalMatch:
    """What the connector can load for a request beyond the local hit."""

    num_tokens: int = 0
    is_async: bool = False


NO_MATCH = ExternalMatch()


class SchedulerConnector:
    """The scheduler's view of its connector."""

    def __init__(
        self,
        guard: EngineGuard | None,
        breaker: ConnectorBreaker,
        kv_cache_config: KVCacheConfig,
        clock: Clock,
        lookup_timeout_s: float,
    ) -> None:
        self.counters = breaker.counters
        self._guard = guard
        self._breaker = breaker
        self._is_hma = guard is not None and supports_hma(guard.connector)
        self._kv_cache_config = kv_cache_config
        self._clock = clock
        self._lookup_timeout_s = lookup_timeout_s
        self._first_asked_s: dict[str, float] = {}
        self._refused_ids: set[str] = set()
        self._stats: ConnectorStats | None = None
        self._has_asked_stats = False
        self.on_admission: Callable[[Request, int], None] | None = None
        """Called with (request, its local tokens) when it gets blocks, before the connector hears of it."""
        self.events: list[KVCacheEvent] | None = None
        """KV events of the connector, for whoever empties it; None: nobody does."""

    @property
    def connector(self) -> KVConnectorBase_V1 | None:
        """The connector's scheduler instance, or None when none is configured; also when it is switched off."""
        return None if self._guard is None else self._guard.connector

    @property
    def is_active(self) -> bool:
        """True while there is a connector that is not switched off."""
        return self._guard is not None and not self._guard.is_off

    def on_new_request(self, request: Request) -> None:
        """Announce a request before it is scheduled."""
        if self._guard is not None:
            self._guard.call("on_new_request", None, request)

    def match(self, request: Request, num_local_tokens: int) -> ExternalMatch | None:
        """What can be loaded beyond `num_local_tokens`; None: ask again in a later step.

        A lookup that fails is no match, and the request is not asked for again.
        """
        if self._guard is None or request.request_id in self._refused_ids:
            return NO_MATCH
        self._guard.failed_hooks.clear()
        num_tokens, is_async = self._guard.call(
            "get_num_new_matched_tokens",
            (0, False),
            request,
            num_local_tokens,
            check=lambda answer: broken_match(answer, num_local_tokens, request.num_tokens),
        )
        if self._guard.failed_hooks:
            self._refused_ids.add(request.request_id)
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
        logger.warning(
            "%s: the connector answered None for %.0f s; the engine computes it", request.request_id, waited_s
        )
        return True

    def allocating(self, request: Request, match: ExternalMatch) -> None:
        """Blocks of a match are about to be allocated."""
        if self._guard is not None and match.is_async:
            groups = self._kv_cache_config.transfer_group_ids
            check = partial(broken_groups, group_ids=groups)
            self._guard.call("get_loaded_kv_cache_group_ids", groups, request, check=check)

    def blocks_allocated(self, request: Request, blocks: KVCacheBlocks, num_local: int, match: ExternalMatch) -> bool:
        """Tell the connector where to load to. False when it failed, so that no load can be counted on."""
        if self.on_admission is not None:
            self.on_admission(request, num_local)
        if self._guard is None:
            return True
        self._guard.failed_hooks.clear()
        self._guard.call("update_state_after_alloc", None, request, blocks, match.num_tokens)
        if match.num_tokens and request.num_preemptions == 0:
            sources = self._guard.call(
                "get_external_cache_hit_sources",
                {CacheHitSource.EXTERNAL_UNSPECIFIED: match.num_tokens},
                request,
                match.num_tokens,
                check=partial(broken_sources, num_external=match.num_tokens),
            )
            request.external_hit_sources = {str(getattr(key, "value", key)): num for key, num in sources.items()}
        return "update_state_after_alloc" not in self._guard.failed_hooks

    def asked_since_s(self, request_id: str) -> float | None:
        """Since when the connector has been answering "ask again" for this request; None: it is not."""
        return self._first_asked_s.get(request_id)

    def explain(self, request: Request, num_local_tokens: int) -> list[PrefixRange]:
        """What the connector says of the tokens behind the local ones, where the request may load them."""
        if self._guard is None:
            return []
        if request.get_skip_reading_prefix_cache():
            reason = "nothing is loaded: the request needs every token computed (skip_reading_prefix_cache)"
            return [PrefixRange(num_local_tokens, request.num_tokens, "nowhere", reason)]
        answer: list[PrefixRange] = self._guard.call(
            "explain_prefix", [], request, num_local_tokens, check=broken_explanation
        )
        return answer

    def build_meta(self, output: SchedulerOutput) -> None:
        """Put the step's orders to the workers into `output`; None there when the connector failed."""
        if self._guard is not None:
            output.kv_connector_metadata = self._guard.call("build_connector_meta", None, output, check=broken_meta)

    def request_finished(self, request: Request, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        """(keep the blocks until the id is reported as sent, parameters for the response)."""
        self._first_asked_s.pop(request.request_id, None)
        self._refused_ids.discard(request.request_id)
        if self._guard is None:
            return False, None
        hook = "request_finished_all_groups" if self._is_hma else "request_finished"
        answer: tuple[bool, dict[str, Any] | None] = self._guard.call(
            hook, (False, None), request, block_ids if self._is_hma else block_ids[0], check=broken_finish
        )
        return answer

    def worker_reported(self, output: KVConnectorOutput, had_forward: bool) -> None:
        """Hand on what the worker reported; always after a forward, else only if there is something."""
        if self._guard is None:
            return
        if had_forward or not output.is_empty():
            self._guard.failed_hooks.clear()
            self._guard.call("update_connector_output", None, output)
            failures = output.invalid_block_ids or output.failed_recving or output.failed_blocks
            if self._guard.failed_hooks and failures:
                self._breaker.condemn("the connector did not learn of failed loads and might store their KV")

    def breach(self, hook: str, what: str) -> None:
        """Note that what a hook reported breaks the contract."""
        if self._guard is not None:
            self._guard.breach(hook, what)

    def end_step(self) -> bool:
        """Collect what is due once per step. True when the connector has failed too often: `switch_off` must follow."""
        if self._guard is not None:
            self._ask_stats()
            events = self._guard.call("take_events", ())
            try:
                self._keep_events(list(events))  # generators do their work only when read
            except TypeError:
                pass
            except Exception as err:  # a host hook: the connector's code runs here as well
                self._guard.breach("take_events", f"raised while it was read: {type(err).__name__}: {err}")
        return self._breaker.end_step()

    def switch_off(self, reason: str = "") -> bool:
        """End the connector; no hook is called from now on. False when a copy of its worker may still run.

        `reason`: when it is not that `end_step` answered True.
        """
        return self._breaker.switch_off(reason)

    @property
    def stats(self) -> ConnectorStats | None:
        """The connector's totals as of the last step (before the first: now); None from one that does not tell."""
        if not self._has_asked_stats:
            self._ask_stats()
        return self._stats

    def _keep_events(self, events: list[Any]) -> None:
        if self.events is not None:
            plain = [event.event if isinstance(event, SourcedEvent) else event for event in events]
            self.events += [event for event in plain if isinstance(event, KVCacheEvent)]

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
        """Make the connector forget; False only when it says so or fails."""
        if self._guard is None or self._guard.is_off:
            return True
        return self._guard.call("reset_cache", False) is not False

    def shutdown(self) -> None:
        """Shut the connector down."""
        if self._guard is not None:
            self._guard.shutdown()


_BOUND_HOOKS = frozenset(
    {"handle_preemptions", "bind_connector_metadata", "start_load_kv", "finish_forward", "wait_for_save"}
)
"""Not called in a step for which there is no metadata."""
_REPORT_HOOKS = frozenset({"get_transfer_results", "get_block_ids_with_load_errors"})
_LOAD_HOOKS = _BOUND_HOOKS | _REPORT_HOOKS | {"has_connector_metadata", "wait_for_layer_load"}
_CHECKS: dict[str, Clause] = {
    "get_transfer_results": broken_results,
    "get_block_ids_with_load_errors": broken_block_ids,
}
_DEFAULTS: dict[str, Callable[[], Any]] = {
    "get_transfer_results": KVConnectorTransferResults,
    "get_block_ids_with_load_errors": set,
}


class WorkerConnector:
    """The runner's view of its connector, whose timetable it keeps. Is the model's `LayerHooks`.

    A step is `begin_step`, with a batch the forward and `after_forward`, then `end_step`.
    """

    def __init__(self, guard: EngineGuard | None, kv: KVBuffer, timetable: Timetable) -> None:
        self.timetable = timetable
        self._guard = guard
        self._kv = kv
        self._is_bound = False
        self._is_in_layer = False
        self._arguments: dict[str, tuple[Any, ...]] = {}
        self._load_kwargs: dict[str, Any] = {}
        self._answers: dict[str, Any] = {}

    def begin_step(self, plan: SchedulerOutput, batch: PackedBatch | None, load_kwargs: dict[str, Any]) -> None:
        """Before the forward: preemptions, metadata, and synchronous loads if there are any; without a batch, all."""
        if self._guard is None:
            return
        self._guard.failed_hooks.clear()
        self._answers.clear()
        metadata = dict.fromkeys(self._kv.layers, batch) if batch is not None else None
        self._arguments = {
            "handle_preemptions": (plan.kv_connector_metadata,),
            "bind_connector_metadata": (plan.kv_connector_metadata,),
            "start_load_kv": (ForwardContext(metadata, dict(self._kv.layers)),),
            "get_transfer_results": (set(plan.finished_req_ids),),
        }
        self._load_kwargs = load_kwargs
        self._is_bound = plan.kv_connector_metadata is not None
        if batch is None:
            self._call(self.timetable.without_forward, is_load_time=True)
        else:
            self._call(self.timetable.before_forward, is_load_time=plan.has_sync_kv_loads)

    def before_layer(self, name: str) -> None:
        """Wait until this layer's loads are in the pool."""
        if self._guard is not None and self._is_bound:
            self._is_in_layer = self._guard.call("has_connector_metadata", False, check=broken_binding)
            if self._is_in_layer:
                self._guard.call("wait_for_layer_load", None, name)

    def after_layer(self, name: str, kv_layer: torch.Tensor, attn_metadata: Any) -> None:
        """Let the connector save this layer."""
        if self._guard is not None and self._is_in_layer:
            self._guard.call("save_kv_layer", None, name, kv_layer, attn_metadata)

    def after_forward(self, plan: SchedulerOutput) -> None:
        """Between the forward and the choice of tokens."""
        self._call(self.timetable.after_forward, is_load_time=not plan.has_sync_kv_loads)

    def end_step(self, plan: SchedulerOutput) -> tuple[KVConnectorOutput, bool, bool]:
        """After the tokens are chosen: what is left of the timetable, and the connector's report.

        With it, whether sync loads are unproved, and whether failures of loads under way may have gone lost.
        """
        if self._guard is None:
            return KVConnectorOutput(), False, False
        if plan.batch:
            self._call(self.timetable.after_sampling, is_load_time=not plan.has_sync_kv_loads)
        is_lost = bool(self._guard.failed_hooks & _REPORT_HOOKS)
        return self._report(), plan.has_sync_kv_loads and self._loads_unproved(plan), is_lost

    def _call(self, hooks: Sequence[str], is_load_time: bool) -> None:
        if self._guard is None:
            return
        for hook in hooks:
            if hook == "clear_connector_metadata":
                self.clear()
            elif (self._is_bound or hook not in _BOUND_HOOKS) and (is_load_time or hook != "start_load_kv"):
                default = _DEFAULTS[hook]() if hook in _DEFAULTS else None
                kwargs = self._load_kwargs if hook == "start_load_kv" else {}
                args = self._arguments.get(hook, ())
                self._answers[hook] = self._guard.call(hook, default, *args, check=_CHECKS.get(hook), **kwargs)

    def _report(self) -> KVConnectorOutput:
        assert self._guard is not None
        results = self._answers["get_transfer_results"]
        output = KVConnectorOutput(
            set(results.finished_sending), set(results.finished_recving), set(results.failed_recving)
        )
        output.failed_blocks = set(getattr(results, "failed_blocks", ()))
        output.invalid_block_ids = set(self._answers["get_block_ids_with_load_errors"])
        if "get_block_ids_with_load_errors" in self._guard.failed_hooks:
            output.failed_recving |= results.finished_recving  # their blocks may be among those not named
        output.kv_connector_stats = self._answers["get_kv_connector_stats"]
        output.kv_cache_events = self._answers["get_kv_connector_kv_cache_events"]
        output.kv_connector_worker_meta = self._answers["build_connector_worker_meta"]
        return output

    def _loads_unproved(self, plan: SchedulerOutput) -> bool:
        assert self._guard is not None
        return plan.kv_connector_metadata is None or bool(self._guard.failed_hooks & _LOAD_HOOKS)

    def clear(self) -> None:
        """Take this step's metadata away; harmless when there is none."""
        if self._guard is not None and self._is_bound:
            self._is_bound = self._is_in_layer = False
            self._guard.call("clear_connector_metadata", None)

    def shutdown(self) -> None:
        """Shut the connector down."""
        if self._guard is not None:
            self._guard.shutdown()


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
    """Allocate the KV memory and start worker, then scheduler instance. What a hook raises here, this raises."""
    breaker = ConnectorBreaker(config.scheduler_config.connector_failure_limit, HostCounters())
    kernel_block = config.cache_config.kernel_block_size
    if config.kv_transfer_config is None:
        return _hosted(config, KVBuffer(kv_cache_config, device, None, kernel_block), breaker, clock)
    try:
        worker = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, kv_cache_config)
        EngineGuard(worker, breaker)
        kv = KVBuffer(kv_cache_config, device, worker.get_mem_pool_context(), kernel_block)
        worker.register_kv_caches(kv.views())
        worker.set_host_xfer_buffer_ops(copy_kv_blocks)
        scheduler = KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER, kv_cache_config)
        EngineGuard(scheduler, breaker)
        hosted = _hosted(config, kv, breaker, clock)
        _introduce(scheduler, worker, hosted.manager)
    except BaseException:
        for guard in breaker.guards:
            guard.shutdown()
        raise
    return hosted


def _introduce(scheduler: KVConnectorBase_V1, worker: KVConnectorBase_V1, manager: KVManager) -> None:
    """Acquaint the scheduler instance with the pool and with its only worker."""
    if scheduler.requires_kv_delivery:
        # Asks to withhold tokens whose request lost its blocks while they were made. Here a request is preempted
        # before a step and never within one, so there is nothing to withhold.
        logger.debug("%s requires KV delivery", type(scheduler).__name__)
    scheduler.bind_kv_cache_manager(manager)
    num_reports = scheduler.get_finished_count()
    if num_reports not in (None, 0, 1):
        raise ContractError(
            f"{type(scheduler).__name__}.get_finished_count answered {num_reports!r}: "
            "this engine has one worker, so it must be None or 1"
        )
    handshake = worker.get_handshake_metadata()
    scheduler.set_xfer_handshake_metadata_pp_aware({} if handshake is None else {(0, 0): handshake})


def _hosted(config: EngineConfig, kv: KVBuffer, breaker: ConnectorBreaker, clock: Clock) -> HostedConnectors:
    cache = config.cache_config
    worker, scheduler = breaker.guards or (None, None)
    return HostedConnectors(
        kv,
        KVManager(
            cache.num_gpu_blocks,
            groups_of(kv.config),
            cache.enable_prefix_caching,
            config.scheduler_config.max_num_batched_tokens,
        ),
        SchedulerConnector(scheduler, breaker, kv.config, clock, config.scheduler_config.lookup_timeout_s),
        WorkerConnector(worker, kv, V2_TIMETABLE if config.use_v2_model_runner else V1_TIMETABLE),
    )
