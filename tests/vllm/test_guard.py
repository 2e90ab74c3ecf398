"""Hooks of built-in connectors that raise inside real vLLM: the engine lives, and answers as a cold one."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import StartEngine
from engine_process import EngineChild, assert_same_tokens, offloading, random_prompt

from kvferry.contract.hooks import HOOKS, HookSide
from kvferry.vllm.facade import built_in
from kvferry.vllm.guarded import GuardedHooks

START = {
    "get_mem_pool_context",
    "register_kv_caches",
    "set_host_xfer_buffer_ops",
    "bind_kv_cache_manager",
    "bind_gpu_block_pool",
    "get_finished_count",
    "get_handshake_metadata",
    "set_xfer_handshake_metadata",
    "set_xfer_handshake_metadata_pp_aware",
    "requires_kv_delivery",
    "supports_divergent_local_hybrid_hits",
    "reset_capture_state",
}
"""What these raise ends the start, or they are fixed values."""
NOT_CALLED = {"get_finished", "explain_prefix"}
"""vLLM asks `get_transfer_results` for the one, and does not know the other."""
STEP = [
    hook.name
    for hook in HOOKS
    if hook.side is not HookSide.CLASS and hook.name not in START | NOT_CALLED | {"shutdown"}
]
RAISING = [hook for hook in STEP if hook != "request_finished_all_groups"]
"""That one comes to the sides as `request_finished`."""
RARE = {
    "get_loaded_kv_cache_group_ids",  # of asynchronous loads
    "has_pending_block_frees",  # when a running request finds no block
    "finish_forward",  # in the second model runner
    "has_pending_push_work",  # when no request is left
    "register_finished_partial_tail",  # of recurrent producers
    "reset_cache",
}
PROMPT, OTHER = random_prompt(1, 300), random_prompt(2, 300)
NUM_HITS = 256


def test_every_hook_of_a_step_is_guarded() -> None:
    guarded = {hook for hook in STEP if hook in vars(GuardedHooks)}
    assert set(STEP) - guarded == {"get_kv_connector_stats"}, "that one is guarded where it is made vLLM's"
    assert issubclass(built_in("OffloadingConnector"), GuardedHooks)


def start(start_engine: StartEngine, model: str, *, load_async: bool) -> EngineChild:
    """Without a prefix cache of its own, so that each request is looked up in the connector."""
    return start_engine(
        model=model,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        num_gpu_blocks_override=256,
        max_model_len=1024,
        enable_prefix_caching=False,
        disable_log_stats=False,
        worker_extension_cls="engine_child.WorkerProbe",
        kv_transfer_config=offloading("recompute", {"load_async": load_async}),
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )


def ask(engine: EngineChild, prompt: list[int] = PROMPT) -> dict[str, Any]:
    return engine.ask(generate=prompt, max_tokens=8)


@pytest.mark.parametrize(("load_async", "always"), [(True, "start_load_kv"), (False, "build_connector_meta")])
def test_hooks_that_raise_cost_a_load_and_at_last_the_connector(
    start_engine: StartEngine, tiny_llama: str, load_async: bool, always: str
) -> None:
    engine = start(start_engine, tiny_llama, load_async=load_async)
    cold, other = ask(engine), ask(engine, OTHER)
    assert ask(engine)["external_hits"] == NUM_HITS
    num_raised = 0
    for hook in RAISING:
        engine.ask(raise_in=hook, times=1)
        assert_same_tokens(ask(engine), cold)
        left = engine.ask(left_to_raise=True)["left"]
        assert left == 0 or hook in RARE, f"{hook} was not called"
        num_raised += 1 - left
        assert_same_tokens(ask(engine, OTHER), other)  # in whatever blocks the failed load was to fill
        guards = engine.ask(guards=True)
        assert guards["num_errors"] == num_raised, hook
        assert not any(guards["is_off"])
    warm = ask(engine)
    assert warm["external_hits"] == NUM_HITS
    assert_same_tokens(warm, cold)
    assert engine.log.read_text().count("told to raise") >= num_raised

    engine.ask(raise_in=always, times=-1)
    for _ in range(3):
        assert_same_tokens(ask(engine), cold)
        assert_same_tokens(ask(engine, OTHER), other)
    guards = engine.ask(guards=True)
    assert guards["is_off"] == guards["is_shut_down"] == [True, True]
    assert guards["num_aside"] == 0
    assert guards["num_free_blocks"] == 255
    assert ask(engine)["external_hits"] == 0
    assert engine.log.read_text().count("OffloadingConnector is switched off") in (1, 2)  # each side says so
