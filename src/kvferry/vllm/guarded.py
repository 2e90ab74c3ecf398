"""Every hook of a connector inside vLLM, called through its guard (guard.py), which answers for what it raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base as vllm_base

from kvferry.contract.hooks import named_after_hook
from kvferry.contract.pins import ManagerView
from kvferry.vllm.guard import SchedulerGuard, WorkerGuard

_NEUTRAL: dict[str, Callable[..., Any]] = {
    "get_external_cache_hit_sources": lambda request, num: {vllm_base.CacheHitSource.EXTERNAL_UNSPECIFIED: num},
    "has_pending_block_frees": lambda: False,
    "get_kv_connector_kv_cache_events": lambda: None,
}
"""Hooks that promise nothing -> what is answered in place of them."""


class GuardedHooks:
    """Every hook that vLLM calls in a step, guarded. Stands first in a connector's bases.

    Hooks of the start are not guarded: what they raise ends the start.
    """

    has_guard = False
    """True for a MultiConnector's child: its parent deals with what its hooks raise."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)  # type: ignore[call-arg]  # what answers is next
        name, shut_down = type(self).__name__, super().shutdown  # type: ignore[misc]
        self._own_guard: Any = (
            SchedulerGuard(name, shut_down, kv_cache_config, vllm_config.parallel_config.world_size)
            if role is vllm_base.KVConnectorRole.SCHEDULER
            else WorkerGuard(name, shut_down, kv_cache_config)
        )

    @property
    def _guard(self) -> Any:
        """The guard of this side, or None where a parent guards it."""
        return None if self.has_guard else self._own_guard

    def shutdown(self) -> None:
        """Once; what it raises is logged."""
        if self._guard is None:
            super().shutdown()  # type: ignore[misc]
        else:
            self._guard.shut_down()

    # ---- scheduler --------------------------------------------------------------------------------------------

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """With a block pool that remembers the connector's pins."""
        if self._guard is not None:
            kv_cache_manager = ManagerView(kv_cache_manager, self._guard.pool_view(kv_cache_manager.block_pool))
        super().bind_kv_cache_manager(kv_cache_manager)  # type: ignore[misc]

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """The same, for hosts that call it without a manager."""
        pool = gpu_block_pool if self._guard is None else self._guard.pool_view(gpu_block_pool)
        super().bind_gpu_block_pool(pool)  # type: ignore[misc]

    def on_new_request(self, request: Any) -> None:
        """Hook."""
        ask = super().on_new_request  # type: ignore[misc]
        ask(request) if self._guard is None else self._guard.new_request(ask, request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        """Hook."""
        ask = super().get_num_new_matched_tokens  # type: ignore[misc]
        guard = self._guard
        return ask(request, num_computed_tokens) if guard is None else guard.match(ask, request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> Any:
        """Hook; all groups when it fails."""
        ask = super().get_loaded_kv_cache_group_ids  # type: ignore[misc]
        if self._guard is None:
            return ask(request)
        everything = vllm_base.KVConnectorBase_V1.get_loaded_kv_cache_group_ids(self, request)
        return self._guard.call("get_loaded_kv_cache_group_ids", everything, ask, request)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Hook."""
        ask, guard = super().update_state_after_alloc, self._guard  # type: ignore[misc]
        arguments = request, blocks, num_external_tokens
        ask(*arguments) if guard is None else guard.allocated(ask, *arguments)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """Hook; in an envelope."""
        ask, guard = super().build_connector_meta, self._guard  # type: ignore[misc]
        return ask(scheduler_output) if guard is None else guard.orders(ask, scheduler_output)

    def has_pending_push_work(self) -> bool:
        """Hook; True also until a connector that was switched off is shut down."""
        ask, guard = super().has_pending_push_work, self._guard  # type: ignore[misc]
        return bool(ask() if guard is None else guard.is_closing or guard.call("has_pending_push_work", False, ask))

    def update_connector_output(self, connector_output: Any) -> None:
        """Hook; out of the envelope."""
        ask, guard = super().update_connector_output, self._guard  # type: ignore[misc]
        ask(connector_output) if guard is None else guard.reported(ask, connector_output)

    def register_finished_partial_tail(self, request: Any, *args: Any) -> bool:
        """Hook."""
        ask, guard = super().register_finished_partial_tail, self._guard  # type: ignore[misc]
        return bool(ask(request, *args) if guard is None else guard.tail(ask, request, *args))

    def request_finished(self, request: Any, block_ids: Any) -> Any:
        """Hook."""
        ask, guard = super().request_finished, self._guard  # type: ignore[misc]
        return ask(request, block_ids) if guard is None else guard.finish("request_finished", ask, request, block_ids)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> Any:
        """Hook."""
        ask, guard = super().request_finished_all_groups, self._guard  # type: ignore[misc]
        if guard is None:
            return ask(request, block_ids)
        return guard.finish("request_finished_all_groups", ask, request, block_ids)

    def take_events(self) -> Any:
        """Hook, the last of a step."""
        ask, guard = super().take_events, self._guard  # type: ignore[misc]
        if guard is None:
            return ask()
        events = guard.call("take_events", [], ask)
        guard.end_step()
        return events

    def reset_cache(self) -> Any:
        """Hook; there is nothing to reset in a connector that is off."""
        ask, guard = super().reset_cache, self._guard  # type: ignore[misc]
        return ask() if guard is None else guard.call("reset_cache", None if guard.is_off else False, ask)

    # ---- worker -----------------------------------------------------------------------------------------------

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Hook; out of the envelope."""
        ask, guard, metadata = super().handle_preemptions, self._guard, kv_connector_metadata  # type: ignore[misc]
        ask(metadata) if guard is None else guard.prepare("handle_preemptions", ask, metadata)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Hook; out of the envelope."""
        ask, guard, metadata = super().bind_connector_metadata, self._guard, connector_metadata  # type: ignore[misc]
        ask(metadata) if guard is None else guard.prepare("bind_connector_metadata", ask, metadata)

    def has_connector_metadata(self) -> bool:
        """Hook; False in steps without orders."""
        ask = super().has_connector_metadata  # type: ignore[misc]
        return bool(self._act("has_connector_metadata", ask, default=False))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Hook."""
        self._act("start_load_kv", super().start_load_kv, forward_context, **kwargs)  # type: ignore[misc]

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Hook."""
        self._act("wait_for_layer_load", super().wait_for_layer_load, layer_name)  # type: ignore[misc]

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Hook."""
        ask = super().save_kv_layer  # type: ignore[misc]
        self._act("save_kv_layer", ask, layer_name, kv_layer, attn_metadata, **kwargs)

    def finish_forward(self) -> None:
        """Hook."""
        self._act("finish_forward", super().finish_forward)  # type: ignore[misc]

    def wait_for_save(self) -> None:
        """Hook."""
        self._act("wait_for_save", super().wait_for_save)  # type: ignore[misc]

    def clear_connector_metadata(self) -> None:
        """Hook; whatever it raises, nothing is bound then."""
        self._act("clear_connector_metadata", super().clear_connector_metadata)  # type: ignore[misc]
        if self._guard is not None:
            self._connector_metadata = None

    def _act(self, hook: str, ask: Callable[..., Any], *args: Any, default: Any = None, **kwargs: Any) -> Any:
        if self._guard is None:
            return ask(*args, **kwargs)
        return self._guard.act(hook, ask, *args, default=default, **kwargs)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Hook."""
        ask, guard = super().get_transfer_results, self._guard  # type: ignore[misc]
        if guard is None:
            return ask(finished_req_ids)
        return guard.results(ask, super().get_block_ids_with_load_errors, finished_req_ids)  # type: ignore[misc]

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Hook; the connector itself was asked with `get_transfer_results`."""
        ask, guard = super().get_block_ids_with_load_errors, self._guard  # type: ignore[misc]
        bad: set[int] = ask() if guard is None else guard.bad_blocks()
        return bad

    def build_connector_worker_meta(self) -> Any:
        """Hook, the last report of a step; in an envelope."""
        ask, guard = super().build_connector_worker_meta, self._guard  # type: ignore[misc]
        return ask() if guard is None else guard.report(ask)


def _neutral_hook(hook: str, neutral: Callable[..., Any]) -> Any:
    def call(self: Any, *args: Any) -> Any:
        ask, guard = getattr(super(GuardedHooks, self), hook), self._guard
        return ask(*args) if guard is None else guard.call(hook, neutral(*args), ask, *args)

    return named_after_hook(call, "GuardedHooks", hook)


for _hook, _neutral in _NEUTRAL.items():
    setattr(GuardedHooks, _hook, _neutral_hook(_hook, _neutral))
