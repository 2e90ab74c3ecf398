"""Failures that were once lost at the border to the connector, and what came of that."""

from __future__ import annotations

from typing import Any

import pytest
from tests.flow.conftest import CURRENT, FakeConnector
from tests.multi_children import Pair

from kvferry.contract import LoadFailure
from kvferry.kv_events import BlockStored

pytestmark = pytest.mark.usefixtures("runner")


class LayerwiseConnector(FakeConnector):
    """Loads each layer when it is waited for, as the contract allows."""

    pending: Any = ()

    def load(self, req_id: str, items: Any) -> None:
        self.pending = items

    def wait_for_layer_load(self, layer_name: str) -> None:
        index = list(self.names).index(layer_name)
        for key, block_id in self.pending:
            self.kv_caches[index][block_id] = self.script.store[key][index]

    def register_kv_caches(self, kv_caches: Any) -> None:
        super().register_kv_caches(kv_caches)
        self.names = list(kv_caches)

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        self.pending = ()


def test_a_failed_save_of_a_child_does_not_end_the_waits_for_its_loads(make_engine, script, tokens):
    from kvferry import LLM, SamplingParams
    from kvferry.testing.stub_model import StubModel

    the_script = script()
    CURRENT.append(the_script)
    llm = LLM(
        StubModel(),
        kv_transfer_config={
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "connectors": [{"kv_connector": "LayerwiseConnector", "kv_connector_module_path": __name__}]
            },
        },
        num_kv_blocks=33,
        block_size=4,
        max_num_batched_tokens=64,
    )
    try:
        prompt, params = tokens(19), SamplingParams(max_tokens=4, temperature=0)
        expected = StubModel().expected_tokens(prompt, 4)
        assert llm.generate(prompt, params)[0].outputs[0].token_ids == expected
        assert llm.reset_prefix_cache()
        llm.runner._kv.storage.fill_(0x55)
        the_script.raise_in = {"save_kv_layer": 1}
        output = llm.generate(prompt, params)[0]
        assert output.outputs[0].token_ids == expected
    finally:
        llm.shutdown()


def test_bad_blocks_lost_by_a_raising_hook(make_engine, script, tokens, monkeypatch):
    """Bad ids told one step before the end of the load; that hook raises in that step: nobody knows which were bad."""
    engine = make_engine(script(is_async=True))
    engine.run(tokens(19))
    engine.forget()
    engine.script.hold_loads = True
    request_id = engine.add(tokens(19))
    engine.step()
    engine.step()
    worker = engine.script.worker
    _, items = worker.in_flight.pop(request_id)
    engine.script.bad_block_indexes = {1}
    worker.load(request_id, items)  # every byte has come, block 1 is bad; told now, the completion next
    worker.errors, engine.script.raise_in = set(worker.errors), {}
    original = type(worker).get_block_ids_with_load_errors

    def raises_once(self):
        original(self)
        monkeypatch.setattr(type(worker), "get_block_ids_with_load_errors", original)
        raise RuntimeError("boom")

    monkeypatch.setattr(type(worker), "get_block_ids_with_load_errors", raises_once)
    engine.step()
    engine.script.extra_received = {request_id}
    outputs = {o.request_id: o for o in engine.step()}
    engine.script.extra_received = set()
    engine.script.hold_loads, engine.script.bad_block_indexes = False, set()
    outputs |= engine.finish()
    engine.check(outputs[request_id])


def test_bad_blocks_of_one_child_survive_another_childs_exception():
    from tests.multi_children import blocks, request

    pair = Pair(2)
    pair.claims((8, True), (0, False))
    pair.match(request("x"))
    pair.scheduler.update_state_after_alloc(request("x"), blocks(1, 2), 8)
    pair.claims((0, False), (8, True))
    pair.match(request("y"))
    pair.scheduler.update_state_after_alloc(request("y"), blocks(5, 6), 8)
    pair.worker._begin(pair.scheduler.build_connector_meta(object()))
    pair.w[0].answers["get_block_ids_with_load_errors"] = RuntimeError("boom")
    pair.w[1].answers["get_block_ids_with_load_errors"] = {5}
    with pytest.raises(RuntimeError):
        pair.worker.get_block_ids_with_load_errors()
    pair.w[0].answers["get_block_ids_with_load_errors"] = pair.w[1].answers["get_block_ids_with_load_errors"] = set()
    assert 5 in pair.worker.get_block_ids_with_load_errors()


def test_bad_blocks_lost_with_the_exception_that_switches_a_child_off():
    """Its completion was handed on in this very step, so closing the child cannot fail the load any more."""
    from tests.multi_children import blocks, request, results

    pair = Pair(1)
    pair.claims((8, True))
    pair.match(request("x"))
    pair.scheduler.update_state_after_alloc(request("x"), blocks(1, 2), 8)
    pair.worker._begin(pair.scheduler.build_connector_meta(object()))
    pair.worker.children[0].num_errors = 4
    pair.w[0].answers["get_transfer_results"] = results(received={"x"})
    pair.w[0].answers["get_block_ids_with_load_errors"] = RuntimeError("boom")
    assert pair.worker.get_transfer_results(set()).finished_recving == {"x"}
    with pytest.raises(RuntimeError):
        pair.worker.get_block_ids_with_load_errors()


def test_take_events_as_a_generator_that_raises(make_engine, tokens, monkeypatch):
    engine = make_engine()

    def take_events(self):
        yield from ()
        raise RuntimeError("boom in a generator")

    monkeypatch.setattr(type(engine.script.scheduler), "take_events", take_events)
    engine.run(tokens(9))


def test_a_late_loads_failed_position_is_not_of_the_new_blocks(make_engine, script, tokens):
    engine = make_engine(script(is_async=True))
    engine.run(tokens(19))
    engine.forget()
    engine.script.hold_loads = True
    request_id = engine.add(tokens(19), max_tokens=8)
    engine.step()
    engine.clock.advance(engine.llm.config.scheduler_config.load_timeout_s + 1)
    for _ in range(5):
        engine.step()  # given up, computed anew, generating
    engine.script.extra_received = engine.script.extra_failed = {request_id}
    engine.script.extra_failed_blocks = {LoadFailure(request_id, 0, 1)}
    outputs = {o.request_id: o for o in engine.step()}
    engine.script.extra_received = engine.script.extra_failed = set()
    engine.script.extra_failed_blocks = set()
    outputs |= engine.finish()
    engine.check(outputs[request_id])


def test_loads_that_never_end_do_not_starve_the_engine(make_engine, script, tokens):
    engine = make_engine(script(is_async=True, hold_loads=True))
    engine.script.match_override = lambda request, num_local: (16 - num_local, True) if num_local < 16 else (0, False)
    config = engine.llm.config.scheduler_config
    errors = []
    for seed in range(20):
        request_id = engine.add(tokens(19, seed))
        done = {}
        for _ in range(100):
            done |= {o.request_id: o for o in engine.step()}
            engine.clock.advance(max(config.load_timeout_s, config.stall_timeout_s) / 4)
            if request_id in done:
                break
        errors.append(done[request_id].error)
    assert set(errors) == {None}
    assert "do not end" in engine.llm.counters.switched_off["FakeConnector"]
    engine.finish()
    assert engine.num_free_blocks == 32


def test_an_aborted_id_used_again(make_engine, tokens):
    from kvferry import SamplingParams
    from kvferry.errors import ConfigError

    engine = make_engine()
    params = SamplingParams(max_tokens=3, temperature=0)
    engine.llm.add_request(tokens(40), params, request_id="mine")
    engine.step()
    engine.llm.abort_request("mine")
    try:
        engine.llm.add_request(tokens(40), params, request_id="mine")
    except ConfigError:
        engine.finish()
        engine.llm.add_request(tokens(40), params, request_id="mine")
    engine.finish()


def test_events_of_a_multi_connectors_children_are_kept(make_engine):
    from kvferry.multi.messages import with_source

    engine = make_engine()
    event = BlockStored([b"x"], None, [], 16, None, "CPU", None)
    engine.llm._hosted.scheduler.events = []
    engine.script.scheduler.take_events = lambda: [with_source(event, "Child")]  # as MultiConnector does
    engine.step()
    assert event in engine.llm._hosted.scheduler.events


def test_explain_refuses_a_wrong_port_as_wrong_settings():
    from kvferry.cli.explain import ask
    from kvferry.errors import ConfigError

    with pytest.raises(ConfigError):
        ask("http://127.0.0.1:abc", "x")
