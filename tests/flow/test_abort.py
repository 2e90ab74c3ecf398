"""Aborts in every state, preemption beside slow stores, delayed frees: nothing leaks, nothing is written by two.

Freed blocks are poisoned at once, and the stub model turns any byte that is not the right one into another token.
"""

from __future__ import annotations

import pytest

from kvferry.errors import ConfigError

pytestmark = pytest.mark.usefixtures("runner")

FOREVER = 10**9


@pytest.fixture
def engine_of(make_engine, script, tokens):
    """An engine with poison whose connector has stored `tokens(16)`."""

    def make(is_async=False, **settings):
        engine = make_engine(script(is_async=is_async), **settings)
        engine.run(tokens(16))
        engine.forget()
        engine.poison()
        return engine

    return make


def waiting(engine, tokens):
    return engine.add(tokens(9, 8))


def looking(engine, tokens):
    engine.script.num_none_answers = FOREVER
    request_id = engine.add(tokens(16))
    engine.step()
    return request_id


def loading(engine, tokens):
    engine.script.hold_loads = True
    request_id = engine.add(tokens(16))
    engine.step()
    assert engine.llm.scheduler.transfers.is_loading(request_id)
    return request_id


def loaded(engine, tokens):
    engine.script.load_steps = 1
    blocker = None
    request_id = engine.add(tokens(16))
    engine.step()
    blocker = engine.add(tokens(40, 7))  # takes the whole budget while it is prefilled
    while engine.llm.scheduler.transfers.loads:
        engine.step()
    assert [r.request_id for r in engine.llm.scheduler.loaded] == [request_id]
    assert engine.llm.scheduler.running[0].request_id == blocker
    return request_id


def prefilling(engine, tokens):
    request_id = engine.add([*tokens(16), *tokens(30, 9)])
    while not engine.llm.scheduler.running:
        engine.step()
    request = engine.llm.scheduler.running[0]
    assert 0 < request.num_computed_tokens < request.num_tokens
    return request_id


def decoding(engine, tokens):
    request_id = engine.add(tokens(16), max_tokens=50)
    while not (engine.llm.scheduler.running and engine.llm.scheduler.running[0].num_output_tokens > 2):
        engine.step()
    return request_id


def preempted(engine, tokens):
    decoding(engine, tokens)
    request_id = engine.add(tokens(16), max_tokens=50)
    pool = engine.llm.scheduler.manager.block_pool
    while pool.get_num_free_blocks() > 8:
        pool.get_new_blocks(1)
    while not engine.llm.scheduler.num_preemptions:
        engine.step()
    pool.free_blocks(
        [b for b, n in zip(pool.blocks, engine.llm.scheduler.manager._expected_refs(()), strict=True) if b.ref_cnt > n]
    )
    assert [r.request_id for r in engine.llm.scheduler.waiting] == [request_id]
    return request_id


STATES = [waiting, looking, prefilling, decoding, preempted]


@pytest.mark.parametrize("delay_free", [False, True])
@pytest.mark.parametrize(
    ("is_async", "state"), [(False, s) for s in STATES] + [(True, s) for s in [*STATES, loading, loaded]]
)
def test_abort(engine_of, tokens, is_async, state, delay_free):
    engine = engine_of(is_async)
    other = engine.add(tokens(10, 3), max_tokens=25) if state in (waiting, looking, loading) else None
    request_id = state(engine, tokens)
    engine.script.delay_free = delay_free
    engine.llm.abort_request(request_id)
    engine.llm.abort_request(request_id)
    engine.llm.check_integrity()
    assert engine.script.finished[request_id][0] == "FINISHED_ABORTED"
    engine.script.num_none_answers = 0
    fresh = [engine.add(tokens(9 + i, seed=4 + i % 2), max_tokens=9) for i in range(4)]
    outputs = {}
    for _ in range(4):
        outputs.update((output.request_id, output) for output in engine.step())
    engine.script.hold_loads = engine.script.delay_free = False
    engine.script.release_sends = True
    outputs |= engine.finish()
    assert outputs.pop(request_id).outputs[0].finish_reason == "abort"
    assert {*fresh, *([other] if other else [])} <= outputs.keys()
    for output in outputs.values():
        engine.check(output)
    settle(engine)
    say_again(engine, request_id)
    engine.run(tokens(16))


def settle(engine):
    """All transfers end; all blocks are free."""
    for _ in range(8):
        engine.step()
    assert engine.num_free_blocks == len(engine.llm.scheduler.manager.block_pool.blocks) - 1
    assert engine.llm.scheduler.stats().num_held_blocks == {}
    assert not engine.llm.has_requests()


def say_again(engine, request_id):
    """Completions that come late and repeatedly change nothing."""
    late = engine.llm.counters.late_completions
    engine.script.extra_sent = engine.script.extra_received = {request_id}
    for _ in range(3):
        engine.step()
    engine.script.extra_sent = engine.script.extra_received = set()
    assert engine.llm.counters.late_completions == late + 6
    assert engine.llm.counters.contract_errors == {}
    settle(engine)


def test_abort_of_a_finished_request_whose_blocks_are_held(engine_of, tokens):
    engine = engine_of()
    engine.script.delay_free = True
    output = engine.run(tokens(9, 2))
    engine.llm.abort_request(output.request_id)
    assert engine.script.finished[output.request_id][0] == "FINISHED_LENGTH_CAPPED"
    assert engine.llm.scheduler.stats().num_held_blocks == {"sending": 3}
    engine.script.release_sends = True
    settle(engine)
    say_again(engine, output.request_id)


@pytest.mark.parametrize("is_async", [False, True])
def test_preemption_beside_slow_stores(make_engine, script, tokens, is_async):
    engine = make_engine(script(is_async=is_async, store_steps=4), num_kv_blocks=24)
    engine.poison()
    prompts = [tokens(8 + 3 * i, seed=i % 4) for i in range(7)]
    for _ in range(3):
        ids = [engine.add(prompt, max_tokens=16) for prompt in prompts]
        outputs = engine.finish()
        for request_id in ids:
            engine.check(outputs[request_id])
        settle(engine)
        engine.forget()
    assert engine.llm.scheduler.num_preemptions > 0
    assert any(output.num_external_tokens for output in outputs.values())


def test_a_send_that_never_ends_is_bounded_but_not_freed(make_engine, script, tokens, caplog):
    engine = make_engine(script(delay_free=True))
    engine.poison()
    request_id = engine.run(tokens(9)).request_id
    config = engine.llm.config.scheduler_config
    engine.clock.advance(config.send_timeout_s - 10)
    engine.step()
    stats = engine.llm.scheduler.stats()
    assert stats.num_held_blocks == {"sending": 3}
    assert stats.oldest_held_s == pytest.approx(config.send_timeout_s - 10, abs=0.1)
    assert engine.llm.has_requests()
    assert engine.llm.counters.late_transfers == 0
    engine.clock.advance(11)
    for _ in range(3):
        engine.step()
    assert engine.llm.scheduler.stats().num_held_blocks == {"late_send": 3}
    assert engine.llm.counters.late_transfers == 1
    assert f"{request_id}: still sending after" in caplog.text
    assert engine.num_free_blocks == 29, "a peer may still read them"
    assert not engine.llm.has_requests(), "nobody steps for ever for its sake"
    engine.script.release_sends, engine.script.delay_free = True, False
    settle(engine)
    say_again(engine, request_id)


def test_an_abandoned_load_has_a_deadline_too(engine_of, tokens):
    engine = engine_of(is_async=True)
    request_id = loading(engine, tokens)
    engine.llm.abort_request(request_id)
    engine.step()
    assert engine.llm.scheduler.stats().num_held_blocks == {"loading": 4}
    engine.clock.advance(engine.llm.config.scheduler_config.load_timeout_s + 1)
    engine.step()
    assert engine.llm.scheduler.stats().num_held_blocks == {"late_load": 4}
    assert engine.num_free_blocks == 28
    engine.script.hold_loads = False
    settle(engine)


def test_the_id_of_held_blocks_cannot_be_used_again(make_engine, script, tokens):
    engine = make_engine(script(delay_free=True))
    engine.llm.add_request(tokens(9), request_id="mine")
    engine.finish()
    with pytest.raises(ConfigError, match="request_id='mine' is the id of a request whose blocks are still held"):
        engine.llm.add_request(tokens(9), request_id="mine")
    engine.script.release_sends = True
    engine.step()
    engine.llm.add_request(tokens(9), request_id="mine")
    engine.finish()
    engine.step()


def test_only_the_last_ten_thousand_ids_are_remembered(make_engine):
    engine = make_engine()
    transfers = engine.llm.scheduler.transfers
    for i in range(10_002):
        transfers.remember(str(i))
    assert [transfers.is_old(name) for name in ("0", "1", "2", "10001")] == [False, False, True, True]
