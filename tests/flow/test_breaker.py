"""A connector that fails again and again is switched off, visibly, and serving goes on."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("runner")

LIMIT = 5
FOREVER = 10**9
STEP_HOOKS = [
    "build_connector_meta", "handle_preemptions", "bind_connector_metadata", "start_load_kv", "wait_for_layer_load",
    "save_kv_layer", "wait_for_save", "get_transfer_results", "get_block_ids_with_load_errors",
    "build_connector_worker_meta", "clear_connector_metadata", "update_connector_output",
]  # fmt: skip
REQUEST_HOOKS = [
    "on_new_request", "get_num_new_matched_tokens", "update_state_after_alloc", "request_finished_all_groups",
]  # fmt: skip
SHUTDOWN = [("worker", "shutdown"), ("scheduler", "shutdown")]


def break_for_good(engine, hook="build_connector_meta"):
    """Let a hook fail until the connector is off; returns what has finished by then."""
    engine.script.raise_in = {hook: FOREVER}
    outputs = {}
    for _ in range(LIMIT):
        outputs.update((output.request_id, output) for output in engine.step())
    assert engine.llm.counters.switched_off
    return outputs


@pytest.mark.parametrize("hook", STEP_HOOKS + REQUEST_HOOKS)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_hook_that_always_fails_ends_the_connector(make_engine, script, tokens, hook, is_async, caplog):
    engine = make_engine(script(is_async=is_async, raise_in={hook: FOREVER}))
    engine.poison()
    for seed in range(LIMIT + 1):
        engine.run(tokens(11, seed % 3), max_tokens=6)
    counters = engine.llm.counters
    assert list(counters.switched_off) == ["FakeConnector"]
    assert f"{hook} failed in {LIMIT} steps in a row" in counters.switched_off["FakeConnector"]
    assert f"boom in {hook}" in counters.switched_off["FakeConnector"]
    assert [r.levelname for r in caplog.records if "switched off" in r.getMessage()] == ["ERROR"]
    assert engine.script.log[-2:] == SHUTDOWN
    assert engine.num_free_blocks == 32
    engine.llm.shutdown()
    assert engine.script.log.count(("worker", "shutdown")) == engine.script.log.count(("scheduler", "shutdown")) == 1


def test_failures_with_a_success_between_them_do_not_end_it(make_engine):
    engine = make_engine()
    for _ in range(10):
        engine.script.raise_in = {"wait_for_save": LIMIT - 1}
        for _ in range(LIMIT):
            engine.step()
    assert engine.llm.counters.hook_errors == {"wait_for_save": 10 * (LIMIT - 1)}
    assert engine.llm.counters.switched_off == {}


def test_many_failures_in_one_step_count_once(make_engine, tokens):
    engine = make_engine()
    engine.script.raise_in = {"save_kv_layer": 2 * (LIMIT - 1)}  # two layers
    engine.run(tokens(5), max_tokens=8)
    assert engine.llm.counters.hook_errors == {"save_kv_layer": 2 * (LIMIT - 1)}
    assert engine.llm.counters.switched_off == {}


def test_one_that_could_not_be_told_of_a_failed_load_is_off_at_once(make_engine, tokens):
    """It might store what was computed over that load."""
    engine = make_engine()
    engine.run(tokens(11))
    engine.llm.reset_prefix_cache()
    engine.script.raise_in = {"update_connector_output": 1}
    engine.run(tokens(3, 5), max_tokens=1)
    assert engine.llm.counters.switched_off == {}, "there was nothing to be told"
    engine.script.raise_in = {"start_load_kv": 1, "update_connector_output": 1}
    engine.run(tokens(11))
    assert "failed loads" in engine.llm.counters.switched_off["FakeConnector"]


def test_bad_answers_end_it_too(make_engine, script, tokens):
    engine = make_engine(script(match_override=lambda request, num_local: (-1, False)))
    for seed in range(LIMIT):
        assert engine.llm.counters.switched_off == {}
        engine.run(tokens(9, seed))
    assert "must not be negative" in engine.llm.counters.switched_off["FakeConnector"]


def test_a_request_whose_lookup_fails_is_not_asked_for_again(make_engine, script, tokens):
    engine = make_engine(script(match_override=lambda request, num_local: (-1, False)), num_kv_blocks=9)
    pool = engine.llm.scheduler.manager.block_pool
    pinned = pool.get_new_blocks(8)
    request_id = engine.add(tokens(9))
    for _ in range(2 * LIMIT):
        engine.step()  # there is no room for it
    assert engine.script.asked == [(request_id, 0)]
    assert engine.llm.counters.switched_off == {}
    pool.free_blocks(pinned)
    engine.check(engine.finish()[request_id])


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_requests_that_wait_for_loads_go_on_without(make_engine, script, tokens, policy):
    engine = make_engine(script(is_async=True), policy=policy)
    engine.poison()
    prompt = tokens(16)
    engine.run(prompt)
    engine.forget()
    engine.script.hold_loads = True
    loading, other = engine.add(prompt), engine.add(tokens(9, 4), max_tokens=10)
    engine.step()
    assert engine.llm.scheduler.stats().num_loading == 1
    outputs = break_for_good(engine) | engine.finish()
    engine.check(outputs[other])
    if policy == "fail":
        assert outputs[loading].outputs[0].finish_reason == "error"
        assert "switched off" in outputs[loading].error
    else:
        engine.check(outputs[loading])
        assert outputs[loading].num_cached_tokens == 0
    assert engine.num_free_blocks == 32
    assert engine.script.log[-2:] == SHUTDOWN, "no hook runs after them"


def test_looking_and_loaded_requests_go_on(make_engine, script, tokens):
    engine = make_engine(script(is_async=True, load_steps=1), max_num_seqs=1)
    prompt = tokens(16)
    engine.run(prompt)
    engine.forget()
    loaded = engine.add(prompt)
    engine.step()
    busy = engine.add(tokens(5, seed=4), max_tokens=30)
    for _ in range(3):
        engine.step()
    assert len(engine.llm.scheduler.loaded) == 1
    engine.script.num_none_answers = FOREVER
    looking = engine.add(tokens(7, seed=5))
    outputs = break_for_good(engine) | engine.finish()
    for request_id in (loaded, busy, looking):
        engine.check(outputs[request_id])
    assert outputs[loaded].num_external_tokens == 16


def test_held_blocks_and_pins_come_free(make_engine, script, tokens):
    engine = make_engine(script(delay_free=True))
    engine.run(tokens(9))
    pool = engine.llm.scheduler.manager.block_pool
    pool.touch(pool.blocks[20:22])
    pool.touch(pool.blocks[20:21])
    assert engine.num_free_blocks == 32 - 3 - 2
    assert engine.llm.scheduler.stats().num_held_blocks == {"sending": 3}
    break_for_good(engine)
    assert engine.num_free_blocks == 32
    assert engine.llm.scheduler.stats().num_held_blocks == {}
    assert not engine.llm.has_requests()
    assert engine.llm.reset_prefix_cache(reset_connector=True)


def test_blocks_stay_quarantined_when_the_worker_does_not_stop(make_engine, script, tokens):
    engine = make_engine(script(is_async=True), num_kv_blocks=17)
    prompt = tokens(16)
    engine.run(prompt)
    engine.forget()
    engine.script.hold_loads = True
    request_id = engine.add(prompt)
    engine.step()
    block_ids = engine.llm.scheduler.manager.get_block_ids(request_id)[0]
    engine.script.raise_in["shutdown"] = 1  # the worker's
    engine.script.raise_in["build_connector_meta"] = FOREVER
    for _ in range(LIMIT):
        engine.step()
    for view in engine.llm.kv_caches.values():
        view[block_ids] = 3.0  # the load that nobody could stop
    engine.check(engine.finish()[request_id])
    assert engine.script.log[-2:] == SHUTDOWN
    assert engine.llm.counters.quarantined_blocks == 4
    assert engine.llm.scheduler.stats().num_held_blocks == {"quarantined": 4}
    assert engine.num_free_blocks == 12
    for seed in range(1, 9):
        engine.run(tokens(24, seed))  # all other blocks are used
    assert not set(block_ids) & {b.block_id for b in engine.llm.scheduler.manager.block_pool._cached.values()}
    engine.step()
    assert not engine.llm.has_requests(), "nothing is waited for"


def test_switching_off_frees_nothing_twice(make_engine, script, tokens):
    engine = make_engine(script(is_async=True, delay_free=True))
    prompt = tokens(16)
    engine.run(prompt)
    engine.script.release_sends = True
    engine.step()
    engine.forget()
    engine.script.release_sends, engine.script.hold_loads = False, True
    aborted, late = engine.add(prompt), engine.add(prompt)
    engine.step()
    engine.llm.abort_request(aborted)
    engine.clock.advance(engine.llm.config.scheduler_config.load_timeout_s + 1)
    engine.step()
    assert set(engine.llm.scheduler.transfers.held) == {aborted, late}
    engine.check((break_for_good(engine) | engine.finish())[late])
    assert engine.num_free_blocks == 32
