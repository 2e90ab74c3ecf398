"""Continuous batching with the stub model, without a connector."""

from __future__ import annotations

import random

import pytest

pytestmark = pytest.mark.usefixtures("runner")


def test_completion_is_a_function_of_the_tokens_under_any_chunk_size(make_engine, tokens):
    prompt = tokens(23)
    for chunk in (1, 3, 4, 7, 16, 64):
        engine = make_engine(connector=False, max_num_batched_tokens=chunk)
        output = engine.run(prompt, max_tokens=6)
        assert output.outputs[0].finish_reason == "length"
        assert engine.llm.runner.num_forwards == -(-23 // chunk) + 5


def test_kv_in_the_pool_is_what_the_model_defines(make_engine, tokens):
    engine = make_engine(connector=False)
    prompt = tokens(12)
    request_id = engine.add(prompt, max_tokens=5)
    engine.step()
    table = engine.llm.scheduler.manager.get_block_ids(request_id)[0]
    for layer_index, view in enumerate(engine.llm.kv_caches.values()):
        blocks = [view[block_id].transpose(0, 1).contiguous().numpy().tobytes() for block_id in table]
        assert b"".join(blocks)[: 12 * engine.model.token_bytes] == engine.model.expected_kv(prompt, layer_index)
    engine.finish()


def test_poisoned_block_changes_the_output(make_engine, tokens):
    engine = make_engine(connector=False)
    prompt = tokens(12)
    request_id = engine.add(prompt, max_tokens=5)
    engine.step()
    block_id = engine.llm.scheduler.manager.get_block_ids(request_id)[0][1]
    next(iter(engine.llm.kv_caches.values()))[block_id, 0, 2, 1] = 0.0
    output = engine.finish()[request_id].outputs[0]
    right = engine.model.expected_tokens(prompt, 5)
    assert output.token_ids[0] == right[0]
    assert output.token_ids[1:] != right[1:]


def test_prefix_hit_leaves_one_token_and_saves_the_rest(make_engine, tokens):
    engine = make_engine(connector=False)
    prompt = tokens(16)
    assert engine.run(prompt).num_cached_tokens == 0
    assert engine.run(prompt).num_cached_tokens == 12  # 16 would leave nothing to compute
    assert engine.run([*prompt, 1, 2]).num_cached_tokens == 16
    assert engine.llm.reset_prefix_cache()
    assert engine.run(prompt).num_cached_tokens == 0


def test_salts_do_not_share_and_disabled_cache_never_hits(make_engine, tokens):
    engine = make_engine(connector=False)
    prompt = tokens(16)
    engine.run(prompt)
    request_id = engine.llm.add_request(prompt, cache_salt="tenant")
    assert engine.finish()[request_id].num_cached_tokens == 0
    off = make_engine(connector=False, enable_prefix_caching=False)
    assert [off.run(prompt).num_cached_tokens for _ in range(2)] == [0, 0]


def test_one_forward_carries_all_requests(make_engine, tokens):
    engine = make_engine(connector=False, max_num_batched_tokens=64)
    ids = [engine.add(tokens(5 + i, seed=i), max_tokens=4) for i in range(4)]
    outputs = engine.finish()
    assert engine.llm.runner.num_forwards == 4
    for request_id in ids:
        engine.check(outputs[request_id])


def test_preemption_recomputes_when_blocks_run_out(make_engine, tokens):
    engine = make_engine(connector=False, num_kv_blocks=13, max_num_batched_tokens=32, enable_prefix_caching=False)
    ids = [engine.add(tokens(8, seed=i), max_tokens=20) for i in range(3)]
    outputs = engine.finish()
    assert engine.llm.scheduler.num_preemptions > 0
    for request_id in ids:
        engine.check(outputs[request_id])
    assert engine.num_free_blocks == 12


def test_long_prompt_delays_nobodys_output(make_engine, script, tokens):
    engine = make_engine(script(num_none_answers=1))
    long = engine.add(tokens(80, 1), 2)
    engine.step()  # the long prompt came first, but its lookup takes a while
    short = engine.add(tokens(6, 2), 12)
    steps, done = [], {}
    while engine.llm.has_unfinished_requests():
        steps.append({output.request_id: output for output in engine.step()})
        done |= steps[-1]
    first = next(i for i, step in enumerate(steps) if short in step)
    last = next(i for i, step in enumerate(steps) if short in step and step[short].finished)
    assert any(long in step for step in steps[first:last])
    assert all(short in step for step in steps[first : last + 1]), "a token in every step"
    engine.check(done[long])
    engine.check(done[short])


def test_every_running_request_moves_in_every_step(make_engine, tokens):
    engine = make_engine(connector=False, num_kv_blocks=200, max_num_batched_tokens=5)
    ids = [engine.add(tokens(11, seed=i), max_tokens=6) for i in range(9)]
    before, done = {}, {}
    while engine.llm.has_unfinished_requests():
        done.update((output.request_id, output) for output in engine.step())
        running = {r.request_id: r.num_computed_tokens for r in engine.llm.scheduler.running}
        assert len(running) <= 5
        assert all(num > before.get(request_id, 0) for request_id, num in running.items())
        before = running
    for request_id in ids:
        engine.check(done[request_id])


def test_who_came_first_goes_first_for_ever(make_engine, tokens):
    engine = make_engine(connector=False, num_kv_blocks=13, max_num_batched_tokens=32, enable_prefix_caching=False)
    ids = [engine.add(tokens(8, seed=i), max_tokens=24) for i in range(4)]
    scheduler, late, order = engine.llm.scheduler, None, []
    while engine.llm.has_unfinished_requests():
        order += [output.request_id for output in engine.step() if output.finished]
        if scheduler.num_preemptions and late is None:
            late = engine.add(tokens(4, seed=9), max_tokens=2)  # would fit where the preempted do not
        if late in [request.request_id for request in scheduler.running]:
            assert not scheduler.waiting
    assert [request_id for request_id in order if request_id != late] == ids
    assert late in order


def test_request_larger_than_what_is_left_waits_and_runs(make_engine, tokens):
    engine = make_engine(connector=False, num_kv_blocks=12)
    first, second = engine.add(tokens(30, 1), 2), engine.add(tokens(30, 2), 2)
    outputs = engine.finish()
    engine.check(outputs[first])
    engine.check(outputs[second])
    assert engine.llm.scheduler.num_preemptions == 0


def test_stop_tokens_eos_and_length_limits(make_engine, tokens):
    engine = make_engine(connector=False)
    prompt = tokens(9)
    right = engine.model.expected_tokens(prompt, 6)
    by_stop = engine.llm.generate(prompt, _params(max_tokens=6, stop_token_ids=[right[2]]))[0].outputs[0]
    assert (by_stop.token_ids, by_stop.finish_reason, by_stop.stop_reason) == (right[:3], "stop", right[2])
    engine.llm.scheduler._eos_token_ids = frozenset({right[1]})
    by_eos = engine.llm.generate(prompt, _params(max_tokens=6))[0].outputs[0]
    assert (by_eos.token_ids, by_eos.finish_reason, by_eos.stop_reason) == (right[:2], "stop", None)
    ignoring = engine.llm.generate(prompt, _params(max_tokens=6, ignore_eos=True))[0].outputs[0]
    assert (ignoring.token_ids, ignoring.finish_reason) == (right, "length")
    short = make_engine(connector=False, max_model_len=12)
    assert len(short.llm.generate(prompt, _params(max_tokens=6))[0].outputs[0].token_ids) == 3


def test_abort_while_waiting_and_running(make_engine, tokens):
    engine = make_engine(connector=False, max_num_seqs=1)
    running, waiting = engine.add(tokens(9, 1), 50), engine.add(tokens(9, 2), 50)
    engine.step()
    engine.llm.abort_request(running)
    engine.llm.abort_request(waiting)
    engine.llm.abort_request("nobody")
    outputs = engine.finish()
    assert [outputs[r].outputs[0].finish_reason for r in (running, waiting)] == ["abort", "abort"]
    assert engine.num_free_blocks == 32


def test_idle_engine_checks_itself_now_and_then(make_engine, tokens):
    engine = make_engine(connector=False)
    engine.run(tokens(9))
    block = engine.llm.scheduler.manager.block_pool.blocks[5]
    block.ref_cnt += 1  # as a bug of ours would
    engine.llm.generate(tokens(5), _params(max_tokens=2))
    engine.clock.advance(11)
    with pytest.raises(AssertionError, match="block 5"):
        engine.llm.generate(tokens(5), _params(max_tokens=2))
    block.ref_cnt -= 1
    engine.llm.generate(tokens(5), _params(max_tokens=2))


def test_abort_while_preempted_and_loaded(make_engine, script, tokens):
    engine = make_engine(connector=False, num_kv_blocks=13, max_num_batched_tokens=32, enable_prefix_caching=False)
    ids = [engine.add(tokens(8, seed=i), max_tokens=20) for i in range(3)]
    while not engine.llm.scheduler.num_preemptions:
        engine.step()
    victim = engine.llm.scheduler.waiting[0].request_id
    engine.llm.abort_request(victim)
    outputs = engine.finish()
    assert {outputs[r].outputs[0].finish_reason for r in ids} == {"abort", "length"}
    assert 0 < len(outputs[victim].outputs[0].token_ids) < 20
    engine.check(outputs[victim])

    engine = make_engine(script(is_async=True), max_num_seqs=1)
    engine.run(tokens(16, 1))
    engine.forget()
    loaded, running = engine.add(tokens(16, 1)), engine.add(tokens(9, 2), max_tokens=30)
    while not engine.llm.scheduler.loaded:  # its load takes no place among the running; now it has to wait for one
        engine.step()
    engine.llm.abort_request(loaded)
    outputs = engine.finish()
    assert outputs[loaded].outputs[0].finish_reason == "abort"
    engine.check(outputs[running])
    assert engine.num_free_blocks == 32


def test_generate_takes_all_prompt_forms_and_leaves_nothing_on_error(make_engine, tokens):
    llm = make_engine(connector=False).llm
    params = _params(max_tokens=2)
    assert llm.generate([], params) == []
    assert len(llm.generate(tokens(5), params)) == 1
    assert len(llm.generate([tokens(5), tokens(6)], [params, params])) == 2
    for bad in (["text"], [[]], [[1, 2, 5000]], [[1.5]], [tokens(3), tokens(500)]):
        with pytest.raises(ValueError):
            llm.generate(bad, params)
        assert not llm.has_unfinished_requests()
    with pytest.raises(ValueError, match="sampling_params"):
        llm.generate([tokens(5)], [params, params])
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(ValueError, match="shut down"):
        llm.generate(tokens(5), params)


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic(make_engine, seed):
    print("seed", seed)
    rng = random.Random(seed)
    engine = make_engine(
        connector=False,
        num_kv_blocks=rng.randint(14, 40),
        max_num_batched_tokens=rng.choice([1, 5, 16, 50]),
        max_num_seqs=rng.randint(1, 6),
        enable_prefix_caching=rng.random() < 0.7,
    )
    base = [rng.randrange(1000) for _ in range(24)]
    pending, outputs = 25, {}
    while pending or engine.llm.has_unfinished_requests():
        if pending and rng.random() < 0.4:
            pending -= 1
            prompt = base[: rng.randint(1, 24)] + [rng.randrange(1000) for _ in range(rng.randint(0, 8))]
            request_id = engine.add(prompt, rng.randint(1, 12))
            if rng.random() < 0.15:
                outputs.update((o.request_id, o) for o in engine.step())
                engine.llm.abort_request(request_id)
        outputs.update((o.request_id, o) for o in engine.step())
    assert len(outputs) == 25
    for output in outputs.values():
        engine.check(output)
    assert engine.llm.reset_prefix_cache()


def _params(**kwargs):
    from kvferry import SamplingParams

    return SamplingParams(temperature=0, **kwargs)
