"""vLLM's form of kvferry's connectors, made from their two sides and the hook table."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import fields
from inspect import getattr_static
from typing import Any

from vllm.distributed import kv_events as vllm_events
from vllm.distributed.kv_transfer.kv_connector.v1 import base as vllm_base
from vllm.model_executor.model_loader.utils import get_model_cls

from kvferry.contract import base as own
from kvferry.contract.facade import facade_mixin
from kvferry.contract.factory import KVConnectorFactory
from kvferry.errors import HostError
from kvferry.vllm.guarded import GuardedHooks
from kvferry.vllm.stats import FerryStats, MetricsOfAll, StatsTeller

vllm_base.KVConnectorMetadata.register(own.KVConnectorMetadata)
vllm_base.KVConnectorHandshakeMetadata.register(own.KVConnectorHandshakeMetadata)
vllm_base.KVConnectorWorkerMetadata.register(own.KVConnectorWorkerMetadata)
own.SupportsHMA.register(vllm_base.SupportsHMA)

_CLASS_HOOKS = ("get_required_kvcache_layout", "requires_piecewise_for_cudagraph")


_WEIGHT_CHANGES = ("reload_weights", "update_config", "start_weight_update", "start_draft_weight_update")
"""What vLLM's worker offers to put other weights into a running engine."""
_HOLDERS = "_kvferry_holders"
_READS_AGAIN: ContextVar[bool] = ContextVar("_READS_AGAIN", default=False)
"""True while the engine reads the files again that it has read at its start."""
_REFUSAL = (
    "{} is refused: KV that other weights compute would be stored, and handed over, under the name of "
    "those that this engine started with. Start an engine with the other weights; or set weights_version "
    "in kv_connector_extra_config, whereby you vouch for the weights, and reset the connector's cache at "
    "each change of them"
)


def _hold_weights(connector: Any, vllm_config: Any) -> None:
    """While the connector lives, this process's worker refuses other weights than those that name stored KV."""
    module = sys.modules.get("vllm.v1.worker.gpu_worker")  # also of CPU workers; others have no such calls
    if module is None:
        return
    worker = module.Worker
    if not hasattr(worker, _HOLDERS):
        setattr(worker, _HOLDERS, weakref.WeakSet())
        for name in _WEIGHT_CHANGES:
            if (change := getattr(worker, name, None)) is not None:
                setattr(worker, name, _unless_held(name, change))
    getattr(worker, _HOLDERS).add(connector)
    model_class: Any = get_model_cls(vllm_config.model_config)
    if "load_weights" in vars(model_class) and not hasattr(model_class.load_weights, _HOLDERS):
        model_class.load_weights = _unless_ours(model_class.load_weights, getattr(worker, _HOLDERS))


def _unless_ours(load: Callable[..., Any], holders: Iterable[Any]) -> Callable[..., Any]:
    """A model's `load_weights`, by which trainers give it other weights through a worker extension."""

    @functools.wraps(load)
    def load_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        modules = set(map(id, self.modules()))
        contexts = (holder._vllm_config.compilation_config.static_forward_context for holder in holders)
        if not _READS_AGAIN.get() and any(id(layer) in modules for layers in contexts for layer in layers.values()):
            raise HostError(_REFUSAL.format("load_weights"))
        return load(self, *args, **kwargs)

    setattr(load_weights, _HOLDERS, holders)
    return load_weights


def _unless_held(name: str, change: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(change)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_same = name == "reload_weights" and not any(value is not None for value in (*args, *kwargs.values()))
        if not is_same and getattr(self, _HOLDERS):
            raise HostError(_REFUSAL.format(name))
        token = _READS_AGAIN.set(is_same)
        try:
            return change(self, *args, **kwargs)
        finally:
            _READS_AGAIN.reset(token)

    return call


class VllmAnswers:
    """Turns our answers into vLLM's types. In a connector's bases it stands between GuardedHooks and what answers."""

    has_guard: bool
    _guard: Any

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)  # type: ignore[call-arg]  # what answers is next
        transfer = vllm_config.kv_transfer_config
        self._stats = StatsTeller(str(transfer.kv_connector))
        vouched = {
            "weights_version",
            "connectors",
        } & transfer.kv_connector_extra_config.keys()  # children hold themselves
        if role == vllm_base.KVConnectorRole.WORKER and not vouched:
            _hold_weights(self, vllm_config)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Of asynchronous loads, failed blocks are told as failed requests: vLLM cannot be told of positions.

        HostError for a MultiConnector's child whose synchronous load failed: it can be told of by block ids only.
        """
        results = super().get_transfer_results(finished_req_ids)  # type: ignore[misc]
        received = set(results.finished_recving)
        failed = set(results.failed_recving) | {failure.request_id for failure in results.failed_blocks}
        if self.has_guard and not failed <= received:
            raise HostError(
                f"the load of {', '.join(sorted(failed - received))} failed, and vLLM accepts reports of "
                "failed synchronous loads by block ids only: load asynchronously, or report block ids"
            )
        return vllm_base.KVConnectorTransferResults(set(results.finished_sending), received, failed)

    def get_kv_connector_stats(self) -> Any:
        """What has changed since the last call; None when nothing has."""
        ask = super().get_kv_connector_stats  # type: ignore[misc]
        stats = ask() if self._guard is None else self._guard.stats(ask)
        return self._stats.changes(stats)

    def take_events(self) -> Iterable[Any]:
        """As vLLM's classes of the same names."""
        return [
            getattr(vllm_events, type(event).__name__)(**{f.name: getattr(event, f.name) for f in fields(event)})
            for event in super().take_events()  # type: ignore[misc]
        ]

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        """In vLLM's enum."""
        sources = super().get_external_cache_hit_sources(request, num_external_tokens)  # type: ignore[misc]
        return {vllm_base.CacheHitSource[source.name]: tokens for source, tokens in sources.items()}

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> FerryStats:
        """The statistics that `to_dict` has made `data` of, for vLLM's log."""
        return FerryStats.of_dict(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> MetricsOfAll:
        """The rows `kvferry:connector_*` of the metrics table, on vLLM's /metrics."""
        return MetricsOfAll(vllm_config, metric_types, labelnames, per_engine_labelvalues)


@functools.cache  # a name means one class, through whichever door it is asked for
def built_in(name: str) -> type[Any]:
    """vLLM's form of the built-in connector of that name."""
    return vllm_form(KVConnectorFactory.get_connector_class_by_name(name))


def vllm_form(own_class: type[Any]) -> type[Any]:
    """A subclass of vLLM's connector base (and SupportsHMA, if `own_class` is) over the sides of our connector."""
    scheduler_side, worker_side = own_class.sides
    mixin = facade_mixin(scheduler_side, worker_side, vllm_base.KVConnectorRole.SCHEDULER)
    hma = (vllm_base.SupportsHMA,) if own.supports_hma(own_class) else ()
    namespace = {
        "__doc__": own_class.__doc__,
        "__module__": "kvferry.vllm",
        **{hook: getattr_static(own_class, hook) for hook in _CLASS_HOOKS},
    }
    bases = (GuardedHooks, VllmAnswers, mixin, vllm_base.KVConnectorBase_V1, *hma)
    return types.new_class(own_class.__name__, bases, exec_body=lambda body: body.update(namespace))
