"""Connectors written for vLLM's base class, unchanged in the embedded engine; vLLM must be installed beside it.

    LLM("smollm2", kv_transfer_config={"kv_connector": "their_package.module:TheirConnector", "kv_role": "kv_both"})

`adapt` wraps such a class into one of ours. Each hook is passed on; what goes in is shown as vLLM would show it
(`kvferry.vllm.shown`). vLLM's state of tensor and pipeline parallelism is set up for one rank, since connectors ask for
their rank. Statistics in vLLM's classes are dropped; KV events are translated.

The contract's resolver imports this module when it meets a subclass of vLLM's base (`contract.resolver.HOST_ADAPTERS`).
"""

from __future__ import annotations

import copy
import functools
from dataclasses import fields
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.distributed.kv_transfer.kv_connector.v1 import base as vllm_base
from vllm.v1.outputs import KVConnectorOutput as VllmConnectorOutput

from kvferry import kv_events
from kvferry.config import KVTransferConfig
from kvferry.contract import KVCacheConfig, KVConnectorBase_V1, KVConnectorOutput, KVConnectorRole, SupportsHMA
from kvferry.contract.hooks import HOOKS, Hook, HookSide, named_after_hook
from kvferry.contract.views import request_view
from kvferry.vllm.shown import (
    ShownRequest,
    show_config,
    show_kv_cache_config,
    show_scheduler_output,
    show_transfer_config,
)


@functools.cache
def adapt(foreign: type[Any]) -> type[KVConnectorBase_V1]:
    """Our class for a subclass of vLLM's KVConnectorBase_V1; the same one for the same class. Bears its name."""
    is_hma = vllm_base.supports_hma(foreign)
    body: dict[str, Any] = {
        "__module__": foreign.__module__,
        "__qualname__": foreign.__qualname__,
        "__doc__": foreign.__doc__,
        "foreign_class": foreign,
    }
    for hook in HOOKS:
        if hook.side is not HookSide.CLASS and not hook.is_own and hook.name not in vars(_ForeignConnector):
            body[hook.name] = _passing_on(hook)
    if not is_hma:
        del body["request_finished_all_groups"]
    return type(foreign.__name__, (_ForeignConnector, SupportsHMA) if is_hma else (_ForeignConnector,), body)


def _passing_on(hook: Hook) -> Any:
    shows_request = bool(hook.converts) and hook.converts[0] is request_view

    def call(self: _ForeignConnector, *args: Any, **kwargs: Any) -> Any:
        if shows_request:
            args = (self.show_request(args[0]), *args[1:])
        return getattr(self.foreign, hook.name)(*args, **kwargs)

    call = named_after_hook(call, "ForeignConnector", hook.name)
    return property(lambda self: getattr(self.foreign, hook.name)) if hook.is_property else call


class _ForeignConnector(KVConnectorBase_V1):
    """Holds an instance of the foreign class; `adapt` adds the hooks that are merely passed on."""

    foreign_class: ClassVar[type[Any]]

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._requests: WeakKeyDictionary[Any, ShownRequest] = WeakKeyDictionary()
        shown = show_config(vllm_config, kv_cache_config)
        _ensure_one_rank(shown)
        self.foreign = self.foreign_class(
            shown,
            vllm_base.KVConnectorRole[role.name],
            kv_cache_config=show_kv_cache_config(kv_cache_config),
        )

    def show_request(self, request: Any) -> ShownRequest:
        """The engine's request with vLLM's states; one view for the request's whole life."""
        view = self._requests.get(request)
        if view is None:
            view = self._requests[request] = ShownRequest(request, "request")
        return view

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        return self.foreign.build_connector_meta(show_scheduler_output(scheduler_output))

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        names = {f.name for f in fields(VllmConnectorOutput)} & {f.name for f in fields(connector_output)}
        reported = {name: getattr(connector_output, name) for name in names - {"kv_connector_stats"}}
        self.foreign.update_connector_output(VllmConnectorOutput(**reported))

    def get_kv_connector_stats(self) -> None:
        """Nothing, since the engine does not know vLLM's statistics; asked for all the same, so that none pile up."""
        self.foreign.get_kv_connector_stats()

    def take_events(self) -> list[kv_events.KVCacheEvent]:
        return [event for event in map(_event, self.foreign.take_events()) if event is not None]

    @classmethod
    def supports_hma_config(cls, kv_transfer_config: KVTransferConfig) -> bool:
        """vLLM's MultiConnector asks its children; for all others the class decides."""
        ask_children = getattr(cls.foreign_class, "all_children_support_hma", None)
        is_able = vllm_base.supports_hma(cls.foreign_class)
        return is_able and (ask_children is None or bool(ask_children(show_transfer_config(kv_transfer_config))))

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        layout: str | None = cls.foreign_class.get_required_kvcache_layout(show_config(vllm_config, None))
        return layout

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return bool(cls.foreign_class.requires_piecewise_for_cudagraph(extra_config))


def _event(event: Any) -> kv_events.KVCacheEvent | None:
    own = getattr(kv_events, type(event).__name__, None)
    return None if own is None else own(**{f.name: getattr(event, f.name, None) for f in fields(own)})


def _ensure_one_rank(vllm_config: Any) -> None:
    """vLLM's parallel state of one rank, unless this process has one. It stays: other connectors may be using it."""
    if not parallel_state.model_parallel_is_initialized():
        if not torch.distributed.is_initialized():
            store = HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        without_model = copy.copy(vllm_config)
        without_model.model_config = None
        with set_current_vllm_config(without_model):
            parallel_state.init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo")
            parallel_state.initialize_model_parallel(1, 1, backend="gloo")
