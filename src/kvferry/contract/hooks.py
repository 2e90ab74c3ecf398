"""Every hook of the contract as one row of data: name, side, when it runs, how its arguments become our types.

`contract/facade.py` is made from this table. MultiConnector has a method for each hook, `kvferry/vllm/guarded.py` one
for each hook of a step. Tests fail when MultiConnector, `KVConnectorBase_V1` or vLLM's class of that name has a hook
without a row. Source of names and times: the measured contract of vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kvferry.contract.views import as_groups, block_ids_of, request_view, step_view


class HookSide(Enum):
    """Which instance a hook is called on."""

    SCHEDULER = "scheduler"
    WORKER = "worker"
    BOTH = "both"
    CLASS = "class"  # asked of the class, before there is an instance


@dataclass(frozen=True)
class Hook:
    """One hook. `converts` turns the host's positional arguments into our types; `target` is the side's method."""

    name: str
    side: HookSide
    when: str
    converts: tuple[Callable[[Any], Any] | None, ...] = ()
    target: str = ""
    is_property: bool = False
    bound_by_facade: bool = False
    """True for hooks the base class itself implements over state of its own (metadata binding)."""
    passes_metadata: bool = False
    """True when the side gets this step's metadata in place of the host's arguments."""

    is_own: bool = False
    """True for what kvferry adds: vLLM knows no such hook and never calls it."""

    @property
    def method(self) -> str:
        """Name of the method on our side classes."""
        return self.target or self.name


_S, _W, _B, _C = HookSide.SCHEDULER, HookSide.WORKER, HookSide.BOTH, HookSide.CLASS
_req = request_view

HOOKS: tuple[Hook, ...] = (
    # engine start
    Hook("get_required_kvcache_layout", _C, "before any instance exists"),
    Hook("requires_piecewise_for_cudagraph", _C, "when the configuration is made"),
    Hook("get_mem_pool_context", _W, "once, before KV memory is allocated"),
    Hook("register_kv_caches", _W, "once, after KV memory is allocated"),
    Hook("set_host_xfer_buffer_ops", _W, "once, after registration"),
    Hook("bind_kv_cache_manager", _S, "once, when the manager exists", bound_by_facade=True),
    Hook("bind_gpu_block_pool", _S, "once, from bind_kv_cache_manager"),
    Hook("get_finished_count", _S, "once at start"),
    Hook("get_handshake_metadata", _W, "once, after registration"),
    Hook("set_xfer_handshake_metadata", _S, "once, with every tp rank's metadata"),
    Hook("set_xfer_handshake_metadata_pp_aware", _S, "once, with every (pp, tp) rank's metadata"),
    Hook("requires_kv_delivery", _S, "read once at start", is_property=True),
    Hook("supports_divergent_local_hybrid_hits", _S, "read at lookups", is_property=True),
    Hook("reset_capture_state", _W, "after graph capture (second runner)"),
    # scheduler, each step
    Hook("on_new_request", _S, "when a request is added", (_req,)),
    Hook("get_num_new_matched_tokens", _S, "each scheduling attempt of a waiting request", (_req,)),
    Hook("get_loaded_kv_cache_group_ids", _S, "before blocks of an async load are allocated", (_req,)),
    Hook("update_state_after_alloc", _S, "after each admission", (_req, block_ids_of)),
    Hook("get_external_cache_hit_sources", _S, "after update_state_after_alloc", (_req,)),
    Hook("build_connector_meta", _S, "once per schedule, empty steps included", (step_view,)),
    Hook("has_pending_block_frees", _S, "when a running request finds no block"),
    Hook("has_pending_push_work", _S, "when the engine asks whether to step"),
    # worker, each step
    Hook("handle_preemptions", _W, "first in every step"),
    Hook("bind_connector_metadata", _W, "every step, before any other work", bound_by_facade=True),
    Hook("has_connector_metadata", _W, "around each layer", bound_by_facade=True),
    Hook("start_load_kv", _W, "before the forward with sync loads, else after it", passes_metadata=True),
    Hook("wait_for_layer_load", _W, "before each layer's attention"),
    Hook("save_kv_layer", _W, "after each layer's attention"),
    Hook("finish_forward", _W, "after the forward (second runner)"),
    Hook("wait_for_save", _W, "every step, after the forward", passes_metadata=True),
    Hook("get_finished", _W, "from get_transfer_results"),
    Hook("get_transfer_results", _W, "every step, after wait_for_save"),
    Hook("get_block_ids_with_load_errors", _W, "every step, after get_transfer_results"),
    Hook("get_kv_connector_stats", _B, "every step, on both sides"),
    Hook("get_kv_connector_kv_cache_events", _W, "every step"),
    Hook("build_connector_worker_meta", _W, "every step, last report"),
    Hook("clear_connector_metadata", _W, "at the end of every step", bound_by_facade=True),
    # scheduler, after the step
    Hook("update_connector_output", _S, "when workers reported anything"),
    Hook("register_finished_partial_tail", _S, "before request_finished (recurrent producers)", (_req,)),
    Hook("request_finished", _S, "once per request, before its blocks are freed", (_req, as_groups)),
    Hook(
        "request_finished_all_groups",
        _S,
        "instead of request_finished for hybrid-capable connectors",
        (_req, as_groups),
        target="request_finished",
    ),
    Hook("take_events", _S, "every step, after the reports"),
    Hook("reset_cache", _S, "when the user resets the prefix cache with its connector"),
    Hook("explain_prefix", _S, "when a user asks why a prefix was no hit", (_req,), is_own=True),
    Hook("supports_hma_config", _C, "when the configuration is made", is_own=True),
    Hook("supports_v2_model_runner_config", _C, "when the model runner is chosen", is_own=True),
    Hook("build_kv_connector_stats", _C, "in the process that exports metrics"),
    Hook("build_prom_metrics", _C, "in the process that exports metrics"),
    Hook("shutdown", _B, "once, workers first; also when the engine dies"),
)

HOOKS_BY_NAME: dict[str, Hook] = {hook.name: hook for hook in HOOKS}


def named_after_hook(function: Any, owner: str, hook: str) -> Any:
    """The function under the name `owner.hook` everywhere: in its attributes, in stack traces and in profiles.

    Python takes the names in a stack trace from the function's code, and not from `__name__`.
    """
    function.__name__, function.__qualname__ = hook, f"{owner}.{hook}"
    function.__code__ = function.__code__.replace(co_name=hook, co_qualname=function.__qualname__)
    function.__doc__ = f"Hook, called {HOOKS_BY_NAME[hook].when}."
    return function
