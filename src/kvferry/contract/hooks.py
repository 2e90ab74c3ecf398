"""Every hook of the contract as one row of data: name, side, when it runs, how several connectors' answers merge.

The facades (`contract/facade.py`, `kvferry/vllm/`) and MultiConnector are written from this table, and a test fails
when `KVConnectorBase_V1` (or vLLM's class of that name) has a hook without a row. Source of names and times: the
measured contract of vLLM 0.32.
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


class Merge(Enum):
    """How the answers of several connectors become one (MultiConnector)."""

    FAN_OUT = "fan_out"  # everyone is told; no answer
    UNION = "union"  # sets or sequences joined
    PER_CHILD = "per_child"  # kept apart, one entry per child
    LOAD_OWNER = "load_owner"  # only the child that loads this request answers
    BEST_CLAIM = "best_claim"  # the load policy chooses among the claims
    COUNTED = "counted"  # done when every child that promised has reported
    ANY = "any"
    ALL = "all"
    AGREE = "agree"  # answers must be equal or None
    AT_MOST_ONE = "at_most_one"  # a second answer is an error


@dataclass(frozen=True)
class Hook:
    """One hook. `converts` turns the host's positional arguments into our types; `target` is the side's method."""

    name: str
    side: HookSide
    when: str
    merge: Merge
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
    Hook("get_required_kvcache_layout", _C, "before any instance exists", Merge.AGREE),
    Hook("requires_piecewise_for_cudagraph", _C, "when the configuration is made", Merge.ANY),
    Hook("get_mem_pool_context", _W, "once, before KV memory is allocated", Merge.AT_MOST_ONE),
    Hook("register_kv_caches", _W, "once, after KV memory is allocated", Merge.FAN_OUT),
    Hook("set_host_xfer_buffer_ops", _W, "once, after registration", Merge.FAN_OUT),
    Hook("bind_kv_cache_manager", _S, "once, when the manager exists", Merge.FAN_OUT, bound_by_facade=True),
    Hook("bind_gpu_block_pool", _S, "once, from bind_kv_cache_manager", Merge.FAN_OUT),
    Hook("get_finished_count", _S, "once at start", Merge.AGREE),
    Hook("get_handshake_metadata", _W, "once, after registration", Merge.PER_CHILD),
    Hook("set_xfer_handshake_metadata", _S, "once, with every tp rank's metadata", Merge.PER_CHILD),
    Hook("set_xfer_handshake_metadata_pp_aware", _S, "once, with every (pp, tp) rank's metadata", Merge.PER_CHILD),
    Hook("requires_kv_delivery", _S, "read once at start", Merge.ANY, is_property=True),
    Hook("supports_divergent_local_hybrid_hits", _S, "read at lookups", Merge.ALL, is_property=True),
    Hook("reset_capture_state", _W, "after graph capture (second runner)", Merge.FAN_OUT),
    # scheduler, each step
    Hook("on_new_request", _S, "when a request is added", Merge.FAN_OUT, (_req,)),
    Hook("get_num_new_matched_tokens", _S, "each scheduling attempt of a waiting request", Merge.BEST_CLAIM, (_req,)),
    Hook(
        "get_loaded_kv_cache_group_ids", _S, "before blocks of an async load are allocated", Merge.LOAD_OWNER, (_req,)
    ),
    Hook("update_state_after_alloc", _S, "after each admission", Merge.FAN_OUT, (_req, block_ids_of)),
    Hook("get_external_cache_hit_sources", _S, "after update_state_after_alloc", Merge.LOAD_OWNER, (_req,)),
    Hook("build_connector_meta", _S, "once per schedule, empty steps included", Merge.PER_CHILD, (step_view,)),
    Hook("has_pending_block_frees", _S, "when a running request finds no block", Merge.ANY),
    Hook("has_pending_push_work", _S, "when the engine asks whether to step", Merge.ANY),
    # worker, each step
    Hook("handle_preemptions", _W, "first in every step", Merge.FAN_OUT),
    Hook("bind_connector_metadata", _W, "every step, before any other work", Merge.PER_CHILD, bound_by_facade=True),
    Hook("has_connector_metadata", _W, "around each layer", Merge.ALL, bound_by_facade=True),
    Hook("start_load_kv", _W, "before the forward with sync loads, else after it", Merge.FAN_OUT, passes_metadata=True),
    Hook("wait_for_layer_load", _W, "before each layer's attention", Merge.FAN_OUT),
    Hook("save_kv_layer", _W, "after each layer's attention", Merge.FAN_OUT),
    Hook("finish_forward", _W, "after the forward (second runner)", Merge.FAN_OUT),
    Hook("wait_for_save", _W, "every step, after the forward", Merge.FAN_OUT, passes_metadata=True),
    Hook("get_finished", _W, "from get_transfer_results", Merge.COUNTED),
    Hook("get_transfer_results", _W, "every step, after wait_for_save", Merge.COUNTED),
    Hook("get_block_ids_with_load_errors", _W, "every step, after get_transfer_results", Merge.UNION),
    Hook("get_kv_connector_stats", _B, "every step, on both sides", Merge.PER_CHILD),
    Hook("get_kv_connector_kv_cache_events", _W, "every step", Merge.UNION),
    Hook("build_connector_worker_meta", _W, "every step, last report", Merge.PER_CHILD),
    Hook("clear_connector_metadata", _W, "at the end of every step", Merge.FAN_OUT, bound_by_facade=True),
    # scheduler, after the step
    Hook("update_connector_output", _S, "when workers reported anything", Merge.PER_CHILD),
    Hook("register_finished_partial_tail", _S, "before request_finished (recurrent producers)", Merge.COUNTED, (_req,)),
    Hook("request_finished", _S, "once per request, before its blocks are freed", Merge.COUNTED, (_req, as_groups)),
    Hook(
        "request_finished_all_groups",
        _S,
        "instead of request_finished for hybrid-capable connectors",
        Merge.COUNTED,
        (_req, as_groups),
        target="request_finished",
    ),
    Hook("take_events", _S, "every step, after the reports", Merge.UNION),
    Hook("reset_cache", _S, "when the user resets the prefix cache with its connector", Merge.PER_CHILD),
    Hook("explain_prefix", _S, "when a user asks why a prefix was no hit", Merge.PER_CHILD, (_req,), is_own=True),
    Hook("supports_hma_config", _C, "when the configuration is made", Merge.ALL, is_own=True),
    Hook("supports_v2_model_runner_config", _C, "when the model runner is chosen", Merge.ALL, is_own=True),
    Hook("build_kv_connector_stats", _C, "in the process that exports metrics", Merge.PER_CHILD),
    Hook("build_prom_metrics", _C, "in the process that exports metrics", Merge.PER_CHILD),
    Hook("shutdown", _B, "once, workers first; also when the engine dies", Merge.FAN_OUT),
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
