"""Loads that fail: what follows the first bad block is computed again, shared blocks once, counts stay true."""

from __future__ import annotations

import pytest

from kvferry.contract import KVConnectorTransferResults, LoadFailure
from kvferry.engine.outputs import BlockState, SchedulerOutput, StepPlan

pytestmark = pytest.mark.usefixtures("runner")

BLOCK = 4


def warm(engine, prompt):
    engine.run(prompt)
    engine.forget()


def watch(engine):
    """A list that grows by {request id: tokens} with each step."""
    steps, schedule = [], engine.llm.scheduler.schedule

    def watched():
        plan = schedule()
        steps.append(dict(plan.num_scheduled_tokens))
        return plan

    engine.llm.scheduler.schedule = watched
    return steps


# ---- failures by position -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("bad", [{1}, {3, 2}])
def test_positions_cut_the_load_before_the_first(make_engine, script, tokens, is_async, bad):
    engine = make_engine(script(is_async=is_async, by_position=True))
    engine.poison()
    prompt = tokens(23)
    warm(engine, prompt)
    engine.script.bad_block_indexes = bad
    steps = watch(engine)
    output = engine.run(prompt, max_tokens=2)
    kept = min(bad) * BLOCK
    assert (output.num_cached_tokens, output.num_external_tokens) == (kept, kept)
    assert sum(output.external_hit_sources.values()) == kept
    discarded = 0 if is_async else 3  # the step of a synchronous load counts for nothing
    assert sum(sum(step.values()) for step in steps) == discarded + 23 - kept + 1
    assert engine.llm.counters.load_failures == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_positions_fail_the_request_when_the_policy_says_so(make_engine, script, tokens, is_async):
    engine = make_engine(script(is_async=is_async, by_position=True), policy="fail")
    prompt = tokens(23)
    warm(engine, prompt)
    engine.script.bad_block_indexes = {2}
    bad, good = engine.add(prompt), engine.add(tokens(7, seed=3))
    outputs = engine.finish()
    assert outputs[bad].outputs[0].finish_reason == "error"
    assert outputs[bad].outputs[0].token_ids == []
    engine.check(outputs[good])
    assert engine.num_free_blocks == 32


def test_persistent_failure_of_an_async_load_ends_in_recompute(make_engine, script, tokens):
    engine = make_engine(script(is_async=True, by_position=True))
    prompt = tokens(16)
    warm(engine, prompt)
    engine.script.bad_block_indexes, engine.script.num_failures_left = {0}, 10**9
    engine.script.asked.clear()
    assert engine.run(prompt).num_external_tokens == 0
    assert len(engine.script.asked) == 3
    assert engine.llm.counters.load_failures == 3


@pytest.mark.parametrize("is_async", [False, True])
def test_persistent_failure_with_preemptions_ends(make_engine, script, tokens, is_async):
    engine = make_engine(script(is_async=is_async), num_kv_blocks=16)
    engine.poison()
    prompts = [tokens(12 + 2 * i, seed=i % 2) for i in range(5)]
    for prompt in prompts:
        warm(engine, prompt)
    engine.script.bad_block_indexes, engine.script.num_failures_left = {1}, 10**9
    ids = [engine.add(prompt, max_tokens=14) for prompt in prompts]
    outputs = engine.finish()
    for request_id in ids:
        engine.check(outputs[request_id])
    assert engine.llm.scheduler.num_preemptions > 0
    assert engine.num_free_blocks == 15


def test_a_failure_told_before_the_end_of_its_load_is_not_forgotten(make_engine, script, tokens):
    engine = make_engine(script(is_async=True, load_steps=4))
    prompt = tokens(16)
    warm(engine, prompt)
    request_id = engine.add(prompt)
    engine.script.extra_failed = {request_id}
    engine.step()
    engine.script.extra_failed = set()
    engine.script.bad_block_indexes = {0, 1, 2, 3}  # what arrives is junk, and nobody says so again
    engine.step()
    assert engine.llm.scheduler.transfers.loads[request_id].num_good_tokens == 0
    engine.script.bad_block_indexes = set()
    engine.check(engine.finish()[request_id])
    assert engine.llm.counters.load_failures == 1


def test_failed_request_of_a_sync_load(make_engine, tokens):
    engine = make_engine()
    prompt = tokens(23)
    warm(engine, prompt)
    engine.run(prompt[:9])  # 8 tokens are local
    request_id = engine.add(prompt)
    engine.script.extra_failed = engine.script.extra_received = {request_id}
    engine.step()
    engine.script.extra_failed = engine.script.extra_received = set()
    output = engine.finish()[request_id]
    engine.check(output)
    assert (output.num_cached_tokens, output.num_external_tokens) == (8, 0)
    assert engine.llm.counters.late_completions == 0


@pytest.mark.parametrize("how", ["position", "request", "start_load_kv", "wait_for_save"])
def test_connectors_hear_of_every_block_that_a_sync_load_left_bad(make_engine, script, tokens, monkeypatch, how):
    """However the failure was reported: whoever stored what was computed over it must take that back."""
    engine = make_engine(script(by_position=how == "position"))
    prompt = tokens(23)
    warm(engine, prompt)
    engine.run(prompt[:9])  # 8 tokens, 2 blocks, are local
    heard = []
    listen = engine.script.scheduler.update_connector_output
    monkeypatch.setattr(
        engine.script.scheduler,
        "update_connector_output",
        lambda output: (heard.append(set(output.invalid_block_ids)), listen(output)),
    )
    request_id = engine.add(prompt)
    if how == "position":
        engine.script.bad_block_indexes = {3}
    elif how == "request":
        engine.script.extra_failed = engine.script.extra_received = {request_id}
    else:
        engine.script.raise_in[how] = 1
    engine.step()
    (table,) = engine.llm.scheduler.manager.get_block_ids(request_id)
    assert heard == [{table[3]} if how == "position" else set(table[2:])]
    engine.script.extra_failed = engine.script.extra_received = set()
    engine.check(engine.finish()[request_id])


# ---- shared blocks ------------------------------------------------------------------------------------------------


@pytest.fixture
def shared(make_engine, tokens):
    """Starts `num` requests with 24 shared tokens (6 local blocks), whose second block then turns out to be bad."""

    def make(num=2, **settings):
        engine = make_engine(num_kv_blocks=65, max_num_batched_tokens=16, **settings)
        engine.poison()
        prefix = tokens(24)
        engine.run([*prefix, 1])
        engine.script.match_override = lambda request, num_local: (0, False)
        ids = [engine.add([*prefix, 500 + i, 600 + i, 700 + i], max_tokens=3) for i in range(num)]
        pool = engine.llm.scheduler.manager.block_pool
        second = next(b for b in pool.blocks if b.block_hash == (0, engine.llm.scheduler.waiting[0].block_hashes[1]))
        for view in engine.llm.kv_caches.values():
            view[second.block_id] = 3.0
        engine.script.extra_bad_ids = {second.block_id}
        steps = watch(engine)
        outputs = engine.step()
        assert len(outputs) == (num if settings.get("policy") == "fail" else 0)
        engine.script.extra_bad_ids = set()
        assert steps.pop() == dict.fromkeys(ids, 3)
        return engine, ids, outputs or steps

    return make


def test_shared_bad_blocks_are_computed_again_once(shared):
    engine, (first, second), steps = shared()
    outputs = engine.finish()
    assert steps[:3] == [{first: 16}, {first: 7}, {first: 1, second: 3}]
    for request_id, cached in ((first, 4), (second, 24)):
        engine.check(outputs[request_id])
        assert (outputs[request_id].num_cached_tokens, outputs[request_id].num_external_tokens) == (cached, 0)
    assert engine.llm.counters.load_failures == 2
    assert engine.num_free_blocks == 64


def test_the_next_takes_over_when_the_first_ends(shared):
    engine, (first, second, third), steps = shared(3)
    engine.step()
    engine.llm.abort_request(first)
    outputs = engine.finish()
    # 16 of the first's 20 tokens were computed and are taken over; the second computes the last shared block.
    assert steps[:4] == [{first: 16}, {second: 7}, {second: 1, third: 3}, {second: 1, third: 1}]
    for request_id, cached in ((second, 20), (third, 24)):
        engine.check(outputs[request_id])
        assert outputs[request_id].num_cached_tokens == cached
    assert engine.num_free_blocks == 64


def test_the_next_takes_over_when_the_first_is_preempted(shared):
    engine, (first, second), steps = shared()
    scheduler = engine.llm.scheduler
    engine.step()
    scheduler._preempt(scheduler.running[0], StepPlan(0, SchedulerOutput(BlockState(scheduler.manager))))
    outputs = engine.finish()
    assert steps[1][second] == 7, "what the first has computed is taken over"
    for request_id in (first, second):
        engine.check(outputs[request_id])


def test_one_that_waits_may_be_aborted_or_preempted(shared):
    engine, (first, second, third), steps = shared(3)
    scheduler = engine.llm.scheduler
    engine.llm.abort_request(second)
    scheduler._preempt(scheduler.running[1], StepPlan(0, SchedulerOutput(BlockState(scheduler.manager))))
    scheduler.check_integrity()
    outputs = engine.finish()
    assert outputs[second].outputs[0].finish_reason == "abort"
    for request_id in (first, third):
        engine.check(outputs[request_id])
    assert steps[0] == {first: 16}


def test_both_fail_when_the_policy_says_so(shared):
    engine, ids, outputs = shared(policy="fail")
    assert [output.request_id for output in outputs] == ids
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "error"]
    assert engine.num_free_blocks == 64


def test_what_was_findable_is_forgotten_with_all_that_follows(shared, tokens):
    engine, _, _ = shared()
    assert engine.llm.scheduler.manager.block_pool._cached == {}
    engine.finish()
    output = engine.run([*tokens(24), 9, 9], max_tokens=2)
    assert output.num_cached_tokens == 24, "the blocks computed again can be found"


def test_tokens_made_from_a_bad_block_are_an_error_not_an_answer(make_engine, tokens):
    engine = make_engine()
    bad, good = engine.add(tokens(9), max_tokens=8), engine.add(tokens(7, 3), max_tokens=8)
    for _ in range(3):
        engine.step()
    engine.script.extra_bad_ids = {engine.llm.scheduler.manager.get_block_ids(bad)[0][1]}
    outputs = {output.request_id: output for output in engine.step()}
    engine.script.extra_bad_ids = set()
    outputs |= engine.finish()
    assert outputs[bad].outputs[0].finish_reason == "error"
    assert "after it had been used" in outputs[bad].error
    engine.check(outputs[good])


def test_loaded_requests_wait_for_a_repair_too(make_engine, script, tokens):
    engine = make_engine(script(is_async=True, load_steps=0), num_kv_blocks=65, max_num_batched_tokens=8)
    engine.poison()
    prefix = tokens(24)
    stored = [*prefix, *tokens(9, 5)]
    engine.run(stored)
    engine.forget()
    engine.run([*prefix, 1])  # the prefix is local again
    loading, long = engine.add(stored), engine.add([*prefix, *tokens(20, 9)])
    engine.step()
    scheduler = engine.llm.scheduler
    assert [r.request_id for r in (*scheduler.loaded, *scheduler.running)] == [loading, long]
    bad_id = scheduler.manager.get_block_ids(long)[0][2]
    assert scheduler.manager.get_block_ids(loading)[0][2] == bad_id
    engine.script.extra_bad_ids = {bad_id}
    steps = watch(engine)
    engine.step()
    engine.script.extra_bad_ids = set()
    outputs = engine.finish()
    engine.check(outputs[long])
    engine.check(outputs[loading])
    # 16 shared tokens are computed again by the one that runs; the other takes them over.
    assert steps[1:4] == [{long: 8}, {long: 8}, {long: 8}]
    assert sum(step.get(loading, 0) for step in steps) == 9 + 3


def test_a_load_behind_a_bad_local_block_starts_anew(make_engine, script, tokens):
    engine = make_engine(script(is_async=True, load_steps=4))
    engine.poison()
    prompt = tokens(23)
    warm(engine, prompt)
    engine.run(prompt[:9])  # 8 tokens are local
    request_id = engine.add(prompt)
    engine.step()
    bad_id = engine.llm.scheduler.manager.get_block_ids(request_id)[0][1]
    for view in engine.llm.kv_caches.values():
        view[bad_id] = 3.0
    engine.script.extra_bad_ids = {bad_id}
    engine.step()
    engine.script.extra_bad_ids = set()
    output = engine.finish()[request_id]
    engine.check(output)
    assert (output.num_cached_tokens, output.num_external_tokens) == (20, 20)
    assert engine.num_free_blocks == 32


# ---- reports that break the contract ------------------------------------------------------------------------------


GHOST = LoadFailure("ghost", 0, 0)


@pytest.mark.parametrize(
    ("field", "value", "hook", "text"),
    [
        ("extra_sent", {"ghost"}, "get_transfer_results", "named ['ghost']: there are no such requests"),
        ("extra_received", {"ghost"}, "get_transfer_results", "named ['ghost']: there are no such requests"),
        ("extra_failed", {"ghost"}, "get_transfer_results", "named ['ghost']: there are no such requests"),
        ("extra_failed_blocks", {GHOST}, "get_transfer_results", "named ['ghost']: there are no such requests"),
        ("extra_sent", {7}, "get_transfer_results", "must have a set of request ids named finished_sending"),
        ("extra_failed_blocks", {7}, "get_transfer_results", "failed_blocks must be a set of LoadFailure"),
        ("extra_bad_ids", {0}, "get_block_ids_with_load_errors", "named blocks [0]: ids are 1 to 32"),
        ("extra_bad_ids", {-1, 33}, "get_block_ids_with_load_errors", "named blocks [-1, 33]: ids are 1 to 32"),
        ("extra_bad_ids", {"4"}, "get_block_ids_with_load_errors", "must be a set of block ids"),
    ],
)
def test_wrong_reports_are_contract_errors(make_engine, tokens, field, value, hook, text, caplog):
    engine = make_engine()
    request_id = engine.add(tokens(9), max_tokens=4)
    setattr(engine.script, field, value)
    engine.step()
    setattr(engine.script, field, type(value)())
    engine.check(engine.finish()[request_id])
    assert engine.llm.counters.contract_errors == {hook: 1}
    assert engine.llm.counters.unknown_completions == ("ghost" in text)
    assert f"FakeConnector.{hook} " in caplog.text
    assert text in caplog.text


@pytest.mark.parametrize("is_async", [False, True])
def test_a_position_outside_the_table_spoils_the_whole_load(make_engine, script, tokens, is_async, caplog):
    engine = make_engine(script(is_async=is_async, load_steps=0))
    prompt = tokens(23)
    warm(engine, prompt)
    request_id = engine.add(prompt)
    engine.script.extra_failed_blocks = {LoadFailure(request_id, 0, 99)}
    engine.step()
    engine.script.extra_failed_blocks = set()
    output = engine.finish()[request_id]
    engine.check(output)
    assert output.num_external_tokens == (20 if is_async else 0), "an asynchronous load is tried again"
    assert engine.llm.counters.contract_errors == {"get_transfer_results": 1}
    assert "the request has no block there" in caplog.text
    assert engine.llm.counters.load_failures == 1


@pytest.mark.parametrize("field", ["extra_sent", "extra_received", "extra_failed"])
def test_late_reports_of_old_requests_are_counted_and_harmless(make_engine, tokens, field):
    engine = make_engine()
    old = engine.run(tokens(9)).request_id
    request_id = engine.add(tokens(9, 2), max_tokens=4)
    setattr(engine.script, field, {old})
    engine.script.extra_failed_blocks = {LoadFailure(old, 0, 1)} if field == "extra_failed" else set()
    engine.step()
    setattr(engine.script, field, set())
    engine.script.extra_failed_blocks = set()
    engine.check(engine.finish()[request_id])
    assert engine.llm.counters.late_completions == 1
    assert engine.llm.counters.contract_errors == {}


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("num_local", [0, 8])
@pytest.mark.parametrize("num_external", range(1, 16))
def test_claims_may_end_within_a_block(make_engine, script, tokens, is_async, num_local, num_external):
    """Only the claimed tokens of the last block are loaded; the engine computes the rest, as vLLM does."""
    engine = make_engine(script(is_async=is_async))
    prompt = tokens(num_local + 16)
    warm(engine, prompt)
    if num_local:
        engine.run(prompt[: num_local + 1], max_tokens=1)
    engine.script.match_override = lambda request, local: (num_external, is_async)
    steps = watch(engine)
    output = engine.run(prompt, max_tokens=3)
    assert (output.num_external_tokens, output.num_cached_tokens) == (num_external, num_local + num_external)
    assert next(num for step in steps for num in step.values()) == 16 - num_external
    engine.script.match_override = lambda request, local: (0, False)
    again = engine.run([*prompt, 1], max_tokens=3)  # reads the blocks that were loaded and those completed
    assert again.num_cached_tokens == num_local + 16
    assert engine.llm.counters.contract_errors == {}


@pytest.mark.parametrize(
    ("num_external", "is_async", "is_good"), [(11, True, True), (11, False, False), (12, True, False)]
)
def test_claims_end_with_the_prompt(make_engine, script, tokens, num_external, is_async, is_good):
    engine = make_engine(script(is_async=is_async))
    engine.script.match_override = lambda request, local: (num_external, is_async)
    request_id = engine.add(tokens(11))
    engine.step()
    assert (engine.llm.counters.contract_errors == {}) is is_good
    engine.llm.abort_request(request_id)
    engine.script.extra_received = {request_id}
    engine.step()
    engine.script.extra_received = set()


def test_metadata_must_be_an_object(make_engine, tokens, monkeypatch, caplog):
    engine = make_engine()
    prompt = tokens(23)
    warm(engine, prompt)
    monkeypatch.setattr(type(engine.script.scheduler), "build_connector_meta", lambda self, output: None)
    request_id = engine.add(prompt)
    engine.step()
    monkeypatch.undo()
    output = engine.finish()[request_id]
    engine.check(output)
    assert output.num_external_tokens == 0
    assert engine.llm.counters.contract_errors == {"build_connector_meta": 1}
    assert "FakeConnector.build_connector_meta answered None: must be an object" in caplog.text


@pytest.mark.parametrize("answer", [None, 0, (7,), ["0"], (True,)])
def test_group_ids_must_exist(make_engine, script, tokens, monkeypatch, answer):
    engine = make_engine(script(is_async=True))
    prompt = tokens(16)
    warm(engine, prompt)
    monkeypatch.setattr(type(engine.script.scheduler), "get_loaded_kv_cache_group_ids", lambda self, r: answer)
    assert engine.run(prompt).num_external_tokens == 16
    assert engine.llm.counters.contract_errors == {"get_loaded_kv_cache_group_ids": 1}


@pytest.mark.parametrize("answer", [None, {}, {"host": 3}, {"host": 21, "disk": -1}])
def test_hit_sources_must_add_up(make_engine, tokens, monkeypatch, answer):
    engine = make_engine()
    prompt = tokens(23)
    warm(engine, prompt)
    monkeypatch.setattr(type(engine.script.scheduler), "get_external_cache_hit_sources", lambda self, r, n: answer)
    assert engine.run(prompt).external_hit_sources == {"external_unspecified": 20}
    assert engine.llm.counters.contract_errors == {"get_external_cache_hit_sources": 1}


def test_a_connector_that_says_nothing_is_bound_proves_no_load(make_engine, tokens, monkeypatch):
    engine = make_engine()
    prompt = tokens(23)
    warm(engine, prompt)
    monkeypatch.setattr(type(engine.script.worker), "has_connector_metadata", lambda self: False)
    request_id = engine.add(prompt)
    engine.step()
    monkeypatch.undo()
    output = engine.finish()[request_id]
    engine.check(output)
    assert output.num_external_tokens == 0


def test_results_of_an_author_without_positions_are_taken(make_engine, tokens, monkeypatch):
    engine = make_engine()

    class Old:
        finished_sending = finished_recving = failed_recving = frozenset()

    monkeypatch.setattr(type(engine.script.worker), "get_transfer_results", lambda self, ids: Old())
    engine.run(tokens(9))
    assert engine.llm.counters.contract_errors == {}
    monkeypatch.setattr(
        type(engine.script.worker), "get_transfer_results", lambda self, ids: KVConnectorTransferResults({"a"}, [], {})
    )
    engine.run(tokens(9, 1), max_tokens=1)
    assert engine.llm.counters.contract_errors == {"get_transfer_results": 1}
