"""Connectors written for vLLM's base class, unchanged in the embedded engine; vLLM must be installed beside it.

    LLM("smollm2", kv_transfer_config={"kv_connector": "their_package.module:TheirConnector", "kv_role": "kv_both"})

`adapt` wraps such a class into one of ours. Each hook is passed on; what goes in is shown as vLLM would show it: its
roles, transfer, cache and parallel configurations, KV specs and request states are vLLM's own classes; requests, block
tables and step plans are the engine's, which bear vLLM's attribute names. What this engine lacks is an AttributeError
that names it, so a connector that asks with `getattr(..., default)` goes on. Statistics in vLLM's classes are
dropped; KV events are translated.

The contract's resolver imports this module when it meets a subclass of vLLM's base (`contract.resolver.HOST_ADAPTERS`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from vllm.config import CacheConfig, KVTransferConfig, ParallelConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import base as vllm_base
from vllm.v1 import kv_cache_interface as vllm_kv
from vllm.v1.outputs import KVConnectorOutput as VllmConnectorOutput
from vllm.v1.request import RequestStatus as VllmRequestStatus

from kvferry import kv_events
from kvferry.contract import KVCacheConfig, KVConnectorBase_V1, KVConnectorOutput, KVConnectorRole, SupportsHMA
from kvferry.contract.hooks import HOOKS, Hook, HookSide
from kvferry.contract.views import request_view

_OWN_TRANSFER_KEYS = {"on_shadow"}


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

    call.__name__ = hook.name
    return property(lambda self: getattr(self.foreign, hook.name)) if hook.is_property else call


class _ForeignConnector(KVConnectorBase_V1):
    """Holds an instance of the foreign class; `adapt` adds the hooks that are merely passed on."""

    foreign_class: ClassVar[type[Any]]

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._requests: WeakKeyDictionary[Any, _View] = WeakKeyDictionary()
        self.foreign = self.foreign_class(
            show_config(vllm_config, kv_cache_config),
            vllm_base.KVConnectorRole[role.name],
            kv_cache_config=show_kv_cache_config(kv_cache_config),
        )

    def show_request(self, request: Any) -> _View:
        """The engine's request with vLLM's states; one view for the request's whole life."""
        view = self._requests.get(request)
        if view is None:
            view = self._requests[request] = _RequestView(request, "request")
        return view

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
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        layout: str | None = cls.foreign_class.get_required_kvcache_layout(show_config(vllm_config, None))
        return layout

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return bool(cls.foreign_class.requires_piecewise_for_cudagraph(extra_config))


def _event(event: Any) -> kv_events.KVCacheEvent | None:
    own = getattr(kv_events, type(event).__name__, None)
    return None if own is None else own(**{f.name: getattr(event, f.name, None) for f in fields(own)})


# ---- the engine's objects as vLLM would show them -------------------------------------------------------------


class _View:
    """One of the engine's objects, `path` in messages, with a few attributes of its own. What is written stays here."""

    def __init__(self, shown: Any, path: str, **own: Any) -> None:
        vars(self).update(own, _shown=shown, _path=path)

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self._shown, name)
        except AttributeError:
            raise AttributeError(
                f"{self._path}.{name} is not offered by kvferry's embedded engine; run this connector in vLLM"
            ) from None


class _RequestView(_View):
    @property
    def status(self) -> Any:
        return VllmRequestStatus[self._shown.status.name]

    @property
    def _all_token_ids(self) -> list[int]:
        return self._shown.all_token_ids  # type: ignore[no-any-return]


def show_config(config: Any, kv_cache_config: KVCacheConfig | None) -> Any:
    """The engine's configuration as a VllmConfig to the extent connectors read it.

    Without `kv_cache_config` (asked of a class, before there is one) the model's shape is not offered.
    """
    transfer = config.kv_transfer_config
    cache = CacheConfig(
        block_size=config.cache_config.block_size,
        enable_prefix_caching=config.cache_config.enable_prefix_caching,
        cache_dtype=config.cache_config.cache_dtype,
    )
    cache.num_gpu_blocks = config.cache_config.num_gpu_blocks
    return _View(
        config,
        "vllm_config",
        kv_transfer_config=KVTransferConfig(
            **{f.name: getattr(transfer, f.name) for f in fields(transfer) if f.name not in _OWN_TRANSFER_KEYS}
        ),
        cache_config=cache,
        parallel_config=ParallelConfig(),
        model_config=_View(config.model_config, "vllm_config.model_config", **_shape(kv_cache_config)),
        scheduler_config=_View(config.scheduler_config, "vllm_config.scheduler_config"),
    )


def _shape(kv_cache_config: KVCacheConfig | None) -> dict[str, Callable[..., int]]:
    """What vLLM's ModelConfig answers about the model's shape, from the KV cache."""
    if kv_cache_config is None:
        return {}
    spec: Any = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    num_layers = sum(len(group.layer_names) for group in kv_cache_config.kv_cache_groups)
    return {
        "get_num_layers": lambda parallel_config: num_layers,
        "get_num_kv_heads": lambda parallel_config: int(spec.num_kv_heads),
        "get_total_num_kv_heads": lambda: int(spec.num_kv_heads),
        "get_head_size": lambda: int(spec.head_size),
    }


def show_kv_cache_config(config: KVCacheConfig) -> Any:
    """The engine's KVCacheConfig in vLLM's classes: groups, specs by class name, tensors."""
    tensors = [
        vllm_kv.KVCacheTensor(t.size, list(t.layers), t.layer_stride, t.block_stride, t.offset)
        for t in config.kv_cache_tensors
    ]
    groups = [
        vllm_kv.KVCacheGroupSpec(list(group.layer_names), _spec(group.kv_cache_spec))
        for group in config.kv_cache_groups
    ]
    shown = vllm_kv.KVCacheConfig(config.num_blocks, tensors, groups)
    for name in ("kv_cache_layout", "hash_block_size", "cache_hit_alignment_tokens"):
        setattr(shown, name, getattr(config, name))
    return shown


def _spec(spec: Any) -> Any:
    kind = getattr(vllm_kv, type(spec).__name__)
    return kind(**{f.name: getattr(spec, f.name) for f in fields(spec)})
