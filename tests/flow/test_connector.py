"""The connector contract as the engine keeps it: order of hooks, loads of both kinds, failures, aborts, bad answers."""

from __future__ import annotations

import pytest

from kvferry.errors import ConfigError

pytestmark = pytest.mark.usefixtures("runner")

WORKER_TAIL = [
    "wait_for_save",
    "get_transfer_results",
    "get_block_ids_with_load_errors",
    "build_connector_worker_meta",
    "clear_connector_metadata",
]
LAYERS = ["wait_for_layer_load", "save_kv_layer"] * 2


def hooks(script, role=None):
    return [hook for side, hook in script.log if role in (None, side)]


def warm(engine, prompt):
    """Have the connector store the prompt, then empty the engine's own cache."""
    output = engine.run(prompt)
    engine.forget()
    return output


# ---- order ------------------------------------------------------------------------------------------------------


def test_startup_and_shutdown_order(make_engine):
    engine = make_engine()
    assert engine.script.log == [
        ("worker", "__init__"),
        ("worker", "register_kv_caches"),
        ("scheduler", "__init__"),
        ("scheduler", "bind_kv_cache_manager"),
        ("scheduler", "get_finished_count"),
        ("worker", "get_handshake_metadata"),
        ("scheduler", "set_xfer_handshake_metadata"),
    ]
    engine.script.log.clear()
    engine.llm.shutdown()
    engine.llm.shutdown()
    assert engine.script.log == [("worker", "shutdown"), ("scheduler", "shutdown")]


def test_hook_order_of_a_step_with_forward(make_engine, tokens):
    engine = make_engine()
    engine.script.log.clear()
    engine.add(tokens(5), max_tokens=1)
    engine.step()
    head = ["handle_preemptions", "bind_connector_metadata", *LAYERS, "start_load_kv"]
    assert hooks(engine.script, "worker") == head + WORKER_TAIL
    assert hooks(engine.script, "scheduler") == [
        "on_new_request",
        "get_num_new_matched_tokens",
        "update_state_after_alloc",
        "build_connector_meta",
        "request_finished_all_groups",
        "update_connector_output",
    ]


def test_sync_load_starts_before_the_forward(make_engine, tokens):
    engine = make_engine()
    prompt = tokens(13)
    warm(engine, prompt)
    engine.script.log.clear()
    engine.add(prompt, max_tokens=1)
    engine.step()
    head = ["handle_preemptions", "bind_connector_metadata", "start_load_kv", *LAYERS]
    assert hooks(engine.script, "worker") == head + WORKER_TAIL


def test_empty_step_calls_worker_hooks_and_no_layers(make_engine):
    engine = make_engine()
    engine.script.log.clear()
    engine.step()
    head = ["handle_preemptions", "bind_connector_metadata", "start_load_kv"]
    assert hooks(engine.script, "worker") == head + WORKER_TAIL
    assert hooks(engine.script, "scheduler") == ["build_connector_meta"]


# ---- loads that work ----------------------------------------------------------------------------------------------


def test_sync_load_brings_the_prefix(make_engine, tokens):
    engine = make_engine()
    prompt = tokens(23)
    warm(engine, prompt)
    output = engine.run(prompt)
    assert (output.num_cached_tokens, output.num_external_tokens) == (20, 20)
    assert output.external_hit_sources == {"external_unspecified": 20}
    assert len(engine.script.block_ids_loaded) == 5


def test_local_hit_and_external_tokens_add_up(make_engine, tokens):
    engine = make_engine()
    prompt = tokens(23)
    warm(engine, prompt)
    engine.run(prompt[:9])  # 8 tokens are local again
    output = engine.run(prompt)
    assert (output.num_cached_tokens, output.num_external_tokens) == (20, 12)


def test_async_load_holds_the_request_and_promotes_it(make_engine, script, tokens):
    engine = make_engine(script(is_async=True))
    prompt = tokens(16)
    warm(engine, prompt)
    engine.script.allocs.clear()
    engine.script.asked.clear()
    num_forwards = engine.llm.runner.num_forwards
    output = engine.run(prompt, max_tokens=3)
    assert (output.num_cached_tokens, output.num_external_tokens) == (16, 16)
    assert engine.llm.runner.num_forwards == num_forwards + 3  # the last token is computed again
    assert len(engine.script.asked) == 1
    request_id = output.request_id
    assert engine.script.allocs == [(request_id, 16, 0, "WAITING"), (request_id, 0, 15, "WAITING")]


def test_others_run_while_a_request_loads(make_engine, script, tokens):
    engine = make_engine(script(is_async=True, load_steps=6))
    prompt = tokens(16)
    warm(engine, prompt)
    loading, other = engine.add(prompt), engine.add(tokens(6, seed=5), max_tokens=3)
    done = {}
    while other not in done:
        done.update((o.request_id, o) for o in engine.step())
    assert loading not in done
    done |= engine.finish()
    engine.check(done[loading])
    engine.check(done[other])


def test_none_is_asked_again_and_others_overtake(make_engine, script, tokens):
    engine = make_engine(script(num_none_answers=4))
    first = engine.add(tokens(6, 1), max_tokens=2)
    engine.step()
    assert engine.script.asked == [(first, 0)]
    outputs = engine.finish()
    assert len(engine.script.asked) == 5
    engine.check(outputs[first])


def test_endless_none_ends_in_recompute(make_engine, script, tokens):
    engine = make_engine(script(num_none_answers=10**9))
    request_id = engine.add(tokens(6))
    for _ in range(5):
        assert engine.step() == []
    engine.clock.advance(engine.llm.config.scheduler_config.lookup_timeout_s)
    engine.check(engine.finish()[request_id])


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("chunk", [3, 5, 64])
def test_loads_under_pressure_and_preemption(make_engine, script, tokens, is_async, chunk):
    engine = make_engine(script(is_async=is_async), num_kv_blocks=16, max_num_batched_tokens=chunk)
    prompts = [tokens(8 + 2 * i, seed=i % 3) for i in range(6)]
    for _ in range(2):
        ids = [engine.add(prompt, max_tokens=14) for prompt in prompts]
        outputs = engine.finish()
        for request_id in ids:
            engine.check(outputs[request_id])
        engine.forget()
    assert engine.llm.scheduler.num_preemptions > 0
    assert any(output.num_external_tokens for output in outputs.values())


# ---- loads that fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("bad", [0, 2])
def test_bad_block_is_recomputed(make_engine, script, tokens, is_async, bad):
    engine = make_engine(script(is_async=is_async))
    prompt = tokens(23)
    warm(engine, prompt)
    engine.script.bad_block_indexes = {bad}
    output = engine.run(prompt)
    # An asynchronous load that brought nothing is asked for again, and the second time it works.
    expected = 20 if is_async and bad == 0 else bad * 4
    assert (output.num_cached_tokens, output.num_external_tokens) == (expected, expected)
    assert sum(output.external_hit_sources.values()) == expected
    assert engine.llm.counters.load_failures == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_bad_block_fails_the_request_when_the_policy_says_so(make_engine, script, tokens, is_async):
    engine = make_engine(script(is_async=is_async), policy="fail")
    prompt = tokens(23)
    warm(engine, prompt)
    engine.script.bad_block_indexes = {1}
    bad, good = engine.add(prompt), engine.add(tokens(7, seed=3))
    outputs = engine.finish()
    assert outputs[bad].outputs[0].finish_reason == "error"
    assert outputs[bad].error is not None
    assert outputs[bad].outputs[0].token_ids == []
    engine.check(outputs[good])
    assert engine.script.finished[bad][0] == "FINISHED_ERROR"
    assert engine.num_free_blocks == 32
    engine.run(prompt)


def test_failed_recving_is_recomputed_and_cannot_loop(make_engine, script, tokens):
    engine = make_engine(script(is_async=True))
    prompt = tokens(16)
    warm(engine, prompt)
    engine.script.asked.clear()
    engine.script.fails_recving, engine.script.num_failures_left = True, 10**9
    output = engine.run(prompt)
    assert output.num_external_tokens == 0
    assert len(engine.script.asked) == 3
    assert engine.llm.counters.load_failures == 3


def test_late_load_is_set_aside_until_it_reports(make_engine, script, tokens):
    engine = make_engine(script(is_async=True))
    prompt = tokens(16)
    warm(engine, prompt)
    engine.script.hold_loads = True
    request_id = engine.add(prompt)
    engine.step()
    engine.clock.advance(engine.llm.config.scheduler_config.load_timeout_s + 1)
    engine.check(engine.finish()[request_id])
    assert engine.num_free_blocks == 32 - 4, "the load may still write to its blocks"
    assert not engine.llm.reset_prefix_cache()
    engine.script.hold_loads = False
    for _ in range(6):
        engine.step()
    assert engine.num_free_blocks == 32


@pytest.mark.parametrize(
    "hook",
    ["start_load_kv", "wait_for_layer_load", "get_transfer_results", "get_block_ids_with_load_errors",
     "bind_connector_metadata", "handle_preemptions", "build_connector_meta", "update_state_after_alloc"],
)  # fmt: skip
def test_broken_hook_during_a_sync_load_means_recompute(make_engine, tokens, hook):
    engine = make_engine()
    prompt = tokens(23)
    warm(engine, prompt)
    engine.script.raise_in = {hook: 1}
    output = engine.run(prompt)
    assert output.num_external_tokens == 0
    assert engine.llm.counters.hook_errors == {hook: 1}
    engine.forget()
    assert engine.run(prompt).num_external_tokens == 20, "the engine goes on with its connector"


def test_every_hook_may_break_at_any_time(make_engine, tokens):
    names = {hook for _, hook in make_engine().script.log}
    engine = make_engine()
    engine.run(tokens(9, seed=1))
    names = set(hooks(engine.script)) - names
    assert len(names) > 12
    for seed, hook in enumerate(sorted(names), start=2):
        engine.script.raise_in = {hook: 2}
        engine.run(tokens(9, seed=seed))


def test_broken_alloc_hook_of_an_async_load_sets_its_blocks_aside(make_engine, script, tokens):
    engine = make_engine(script(is_async=True))
    prompt = tokens(16)
    warm(engine, prompt)
    engine.script.raise_in = {"update_state_after_alloc": 1}
    assert engine.run(prompt).num_external_tokens == 0
    assert engine.num_free_blocks == 28


# ---- answers that break the contract ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [(-5, False), (-1, True), (0, True), (1000, False), (1000, True), (13, False), (4.0, False), (True, False),
     ("4", False), (4, None), (4, 1), 4, None, (4,), [4, False]],
    ids=repr,
)  # fmt: skip
def test_bad_match_answers_are_contract_errors(make_engine, script, tokens, answer, caplog):
    engine = make_engine(script(match_override=lambda request, num_local: answer))
    output = engine.run(tokens(13))
    assert output.num_external_tokens == 0
    assert engine.llm.counters.contract_errors == {"get_num_new_matched_tokens": 1}
    assert "FakeConnector.get_num_new_matched_tokens answered" in caplog.text


def test_whole_prompt_may_be_claimed_asynchronously_only(make_engine, script, tokens):
    engine = make_engine(script(is_async=True))
    prompt = tokens(16)
    warm(engine, prompt)
    assert engine.run(prompt).num_external_tokens == 16
    assert engine.llm.counters.contract_errors == {}


def test_wrong_answers_of_other_hooks(make_engine, script, tokens):
    engine = make_engine(script(finish_params="text"))
    assert engine.run(tokens(9)).kv_transfer_params is None
    assert engine.llm.counters.contract_errors == {"request_finished_all_groups": 1}


# ---- finishing, delayed frees, completions ------------------------------------------------------------------------


def test_finish_gets_the_blocks_and_its_params_reach_the_user(make_engine, script, tokens):
    engine = make_engine(script(finish_params={"remote": 1}))
    output = engine.run(tokens(9), max_tokens=4)
    status, block_ids = engine.script.finished[output.request_id]
    assert status == "FINISHED_LENGTH_CAPPED"
    assert len(block_ids) == 1
    assert len(block_ids[0]) == 3
    assert output.kv_transfer_params == {"remote": 1}


def test_delayed_free_keeps_blocks_until_sent(make_engine, script, tokens):
    engine = make_engine(script(delay_free=True))
    engine.run(tokens(9))
    for _ in range(3):
        engine.step()
    assert engine.num_free_blocks == 29
    assert engine.llm.has_requests()
    assert not engine.llm.has_unfinished_requests()
    engine.script.release_sends = True
    engine.step()
    assert engine.num_free_blocks == 32
    engine.step()
    assert not engine.llm.has_requests()


def test_unknown_and_duplicate_completions_are_harmless(make_engine, script, tokens):
    engine = make_engine(script(extra_sent={"ghost"}, extra_received={"phantom"}))
    engine.run(tokens(9), max_tokens=2)
    assert engine.llm.counters.unknown_completions == 2 * 2


def test_completions_of_running_requests_are_harmless(make_engine, tokens):
    engine = make_engine()
    request_id = engine.add(tokens(9))
    engine.script.extra_sent = engine.script.extra_received = {request_id}
    engine.check(engine.finish()[request_id])


def test_pending_push_work_keeps_generate_stepping(make_engine, tokens):
    engine = make_engine()
    engine.llm.generate(tokens(5))
    engine.script.log.clear()
    engine.script.pending_push_steps = 5
    engine.llm.generate([])
    assert hooks(engine.script).count("build_connector_meta") == 5


def test_pending_frees_avoid_preemption_for_a_while(make_engine, tokens):
    engine = make_engine(num_kv_blocks=9, enable_prefix_caching=False)
    engine.script.pending_frees = True
    ids = [engine.add(tokens(12, seed=i), max_tokens=10) for i in range(2)]
    for _ in range(10):
        engine.step()
    assert engine.llm.scheduler.num_preemptions == 0
    engine.clock.advance(engine.llm.config.scheduler_config.stall_timeout_s)
    outputs = engine.finish()
    assert engine.llm.scheduler.num_preemptions > 0
    for request_id in ids:
        engine.check(outputs[request_id])


# ---- aborts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay_free", [False, True])
def test_abort_during_async_load_keeps_blocks_until_it_ends(make_engine, script, tokens, delay_free):
    engine = make_engine(script(is_async=True))
    prompt = tokens(16)
    warm(engine, prompt)
    engine.script.delay_free, engine.script.hold_loads = delay_free, True
    request_id = engine.add(prompt)
    engine.step()
    engine.llm.abort_request(request_id)
    engine.llm.abort_request(request_id)
    assert engine.script.finished[request_id][0] == "FINISHED_ABORTED"
    assert len(engine.script.finished[request_id][1][0]) == 4
    assert engine.finish()[request_id].outputs[0].finish_reason == "abort"
    engine.script.release_sends = True  # a send that ends first must not free blocks under the load
    engine.step()
    assert engine.num_free_blocks == 28
    engine.script.hold_loads = False
    for _ in range(6):
        engine.step()
    assert engine.num_free_blocks == 32


def test_abort_while_the_connector_answers_none(make_engine, script, tokens):
    engine = make_engine(script(num_none_answers=10**9))
    request_id = engine.add(tokens(6))
    engine.step()
    engine.llm.abort_request(request_id)
    assert engine.finish()[request_id].outputs[0].finish_reason == "abort"
    assert engine.script.finished[request_id] == ("FINISHED_ABORTED", ([],))


def test_abort_of_a_loaded_request(make_engine, script, tokens):
    engine = make_engine(script(is_async=True, load_steps=1), max_num_seqs=1)
    prompt = tokens(16)
    warm(engine, prompt)
    loading = engine.add(prompt)
    engine.step()
    busy = engine.add(tokens(5, seed=4), max_tokens=30)
    for _ in range(5):
        engine.step()
    assert [r.request_id for r in engine.llm.scheduler.loaded] + [
        r.request_id for r in engine.llm.scheduler.running
    ] == [loading, busy]
    engine.llm.abort_request(loading)
    outputs = engine.finish()
    assert outputs[loading].outputs[0].finish_reason == "abort"
    engine.check(outputs[busy])


# ---- pins ---------------------------------------------------------------------------------------------------------


def test_pinned_blocks_are_never_handed_out(make_engine, tokens):
    engine = make_engine(num_kv_blocks=9)
    engine.run(tokens(12), max_tokens=1)
    pool = engine.llm.scheduler.manager.block_pool
    pinned = [block for block in pool.blocks if block.block_hash is not None]
    pool.touch(pinned)
    before = [view[[b.block_id for b in pinned]].clone() for view in engine.llm.kv_caches.values()]
    for seed in range(1, 6):
        engine.run(tokens(12, seed), max_tokens=2)
    for view, old in zip(engine.llm.kv_caches.values(), before, strict=True):
        assert view[[b.block_id for b in pinned]].equal(old)
    pool.free_blocks(pinned)
    assert engine.num_free_blocks == 8


def test_everything_pinned_for_too_long_is_an_error_not_a_hang(make_engine, tokens):
    engine = make_engine(num_kv_blocks=9)
    pool = engine.llm.scheduler.manager.block_pool
    pool.touch(pool.blocks[1:])
    request_id = engine.add(tokens(6))
    engine.step()
    engine.clock.advance(engine.llm.config.scheduler_config.stall_timeout_s + 1)
    output = engine.finish()[request_id]
    assert output.outputs[0].finish_reason == "error"
    assert "pinned" in output.error
    pool.free_blocks(pool.blocks[1:])
    engine.run(tokens(6))


# ---- configuration ------------------------------------------------------------------------------------------------


def test_kv_transfer_params_reach_the_request(make_engine, script, tokens):
    seen = []
    engine = make_engine(script(match_override=lambda r, n: (seen.append(r.kv_transfer_params) or 0, False)))
    engine.add(tokens(5), extra_args={"kv_transfer_params": {"do_remote_decode": True}})
    engine.finish()
    assert seen == [{"do_remote_decode": True}]


def test_connector_constructor_errors_shut_the_other_one_down(make_engine, script):
    failing = script(raise_in={"bind_kv_cache_manager": 1})
    with pytest.raises(RuntimeError, match="boom"):
        make_engine(failing)
    assert failing.log[-2:] == [("worker", "shutdown"), ("scheduler", "shutdown")]


def test_connector_is_offered_for_inspection(make_engine):
    engine = make_engine()
    assert engine.llm.connector is engine.script.scheduler
    assert make_engine(connector=False).llm.connector is None


def test_unknown_connector_and_keys_are_config_errors():
    from kvferry import LLM
    from kvferry.testing.stub_model import StubModel

    for config in (
        {"kv_connector": "OffloadingConector", "kv_role": "kv_both"},
        {"kv_connector": "X", "kv_role": "kv_both", "kv_connector_module_path": "no.such.module"},
        {"kv_conector": "X"},
        "{bad json",
    ):
        with pytest.raises(ConfigError):
            LLM(StubModel(), kv_transfer_config=config)
