"""`LLM.explain`: what a request waits for in every state, and its prefix as it was when the decision fell."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from kvferry import LLM, SamplingParams
from kvferry.contract import PrefixRange
from kvferry.engine.explain import MAX_ENDED
from kvferry.testing.stub_model import StubModel

PROMPT = [(i * 31 + i * i) % 1000 for i in range(20)]


def waits(engine: Any, request_id: str) -> Any:
    found = engine.llm.explain(request_id)
    json.dumps(found)
    return found["waits_for"]


def explain_like(ranges: list[PrefixRange] | Exception | Any) -> Callable[..., Any]:
    def explain_prefix(request: Any, num_computed_tokens: int) -> Any:
        if isinstance(ranges, Exception):
            raise ranges
        return ranges

    return explain_prefix


def test_unknown_requests_and_live_ones(make_engine: Any) -> None:
    engine = make_engine(explain_requests=True)
    assert engine.llm.explain("nobody") is None
    first = engine.add(PROMPT, 2)
    engine.clock.advance(3)
    second = engine.add(PROMPT, 2)
    live = [(r["request_id"], r["state"], r["age_s"]) for r in engine.llm.live_requests()]
    assert live == [(first, "waiting", 3.0), (second, "waiting", 0.0)]
    assert waits(engine, first) == {"what": "the next step", "num_needed": 5, "num_free": 32}
    assert waits(engine, second) == {"what": "its turn", "num_ahead": 1}
    engine.finish()
    assert engine.llm.live_requests() == []
    assert engine.llm.explain(first)["finish_reason"] == "length"


def test_waiting_for_a_place_and_for_blocks(make_engine: Any) -> None:
    engine = make_engine(max_num_seqs=1, explain_requests=True)
    engine.add(PROMPT, 9)
    engine.step()
    second = engine.add(PROMPT, 2)
    engine.step()
    assert waits(engine, second) == {"what": "place", "num_running": 1}
    engine = make_engine(num_kv_blocks=8, explain_requests=True)
    running = engine.add(PROMPT, 4)
    for _ in range(3):
        engine.step()
    assert waits(engine, running) is None
    assert engine.llm.explain(running)["state"] == "running"
    second = engine.add([1, *PROMPT], 2)
    engine.step()
    assert waits(engine, second) == {"what": "blocks", "num_needed": 6, "num_free": 1}
    engine.finish()


def test_waiting_for_the_connector(make_engine: Any, script: Any) -> None:
    steps = script(is_async=True)
    engine = make_engine(steps, explain_requests=True)
    engine.run(PROMPT)
    engine.forget()
    steps.num_none_answers, steps.hold_loads, steps.delay_free = 2, True, True
    request_id = engine.add(PROMPT, 2)
    engine.step()
    engine.clock.advance(0.5)
    assert waits(engine, request_id) == {"what": "connector lookup", "since_s": 0.501}
    engine.step()
    engine.step()
    found = engine.llm.explain(request_id)
    assert found["state"] == "loading"
    assert found["waits_for"] == {"what": "load", "gives_up_in_s": 299.999}
    assert found["tokens"] == {
        "prompt": 20, "output": 0, "computed": 20, "from_device": 0,
        "from_connector": {"external_unspecified": 20}, "to_compute": 0,
    }  # fmt: skip
    steps.hold_loads = False
    engine.finish()
    assert waits(engine, request_id) == {"what": "release", "num_blocks": 6, "until": ["send"]}
    steps.release_sends = True
    engine.step()
    assert waits(engine, request_id) is None


def test_the_prefix_is_as_it_was_at_admission(make_engine: Any, script: Any) -> None:
    steps = script()
    engine = make_engine(steps, explain_requests=True)
    engine.run(PROMPT[:16])
    engine.forget()
    engine.run(PROMPT[:4], 1)  # the first block is in the engine again, the next three in the connector only
    seen = [PrefixRange(4, 18, "host", "in host memory"), PrefixRange(18, 21, "nowhere", "too short")]
    steps.scheduler.explain_prefix = explain_like(seen)
    request_id = engine.add([*PROMPT, 5], 3)
    engine.step()
    steps.scheduler.explain_prefix = explain_like([])
    for _ in range(2):
        found = engine.llm.explain(request_id)
        assert found["asked"] == "at admission"
        assert (found["tokens"]["from_device"], found["tokens"]["to_compute"]) == (4, 5)
        assert found["tokens"]["from_connector"] == {"external_unspecified": 12}
        assert found["ranges"] == [
            {"tokens": [0, 4], "place": "device", "reason": "in the engine's prefix cache", "loaded": False},
            {"tokens": [4, 16], "place": "host", "reason": "in host memory", "loaded": True},
            {"tokens": [16, 18], "place": "host", "reason": "in host memory", "loaded": False},
            {"tokens": [18, 21], "place": "nowhere", "reason": "too short", "loaded": False},
        ]
        engine.finish()


def test_a_load_that_failed_is_not_shown_as_loaded(make_engine: Any, script: Any) -> None:
    steps = script(bad_block_indexes={1})
    engine = make_engine(steps, explain_requests=True)
    engine.run(PROMPT)
    engine.forget()
    steps.scheduler.explain_prefix = explain_like([PrefixRange(0, 20, "host", "in host memory")])
    output = engine.run(PROMPT)
    assert output.num_external_tokens == 4
    assert [(r["tokens"], r["loaded"]) for r in engine.llm.explain(output.request_id)["ranges"]] == [
        ([0, 4], True),
        ([4, 20], False),
    ]


@pytest.mark.parametrize("answer", [RuntimeError("boom"), "host", ["host"]])
def test_a_connector_that_cannot_explain_harms_nobody(make_engine: Any, script: Any, answer: Any) -> None:
    steps = script()
    engine = make_engine(steps, explain_requests=True)
    steps.scheduler.explain_prefix = explain_like(answer)
    output = engine.run(PROMPT)
    assert engine.llm.explain(output.request_id)["ranges"] == []


def test_without_the_switch_only_live_requests_are_known(make_engine: Any) -> None:
    engine = make_engine()
    request_id = engine.add(PROMPT, 3)
    engine.step()
    assert engine.llm.explain(request_id)["asked"] == "now"
    engine.finish()
    assert engine.llm.explain(request_id) is None


def test_only_the_last_ends_are_remembered() -> None:
    with LLM(StubModel(), num_kv_blocks=50, explain_requests=True) as llm:
        ids = [llm.add_request([1, 2, i], SamplingParams(max_tokens=1, temperature=0)) for i in range(MAX_ENDED + 3)]
        while llm.has_unfinished_requests():
            llm.step()
        assert [llm.explain(request_id) is not None for request_id in ids] == [False] * 3 + [True] * MAX_ENDED
        assert llm._explainer._admissions == {}


def test_nothing_of_the_prompt_is_told(make_engine: Any) -> None:
    with LLM(StubModel(vocab_size=10**6), num_kv_blocks=50, explain_requests=True) as llm:
        request_id = llm.add_request([987654] * 20, SamplingParams(max_tokens=2, temperature=0))
        while llm.has_unfinished_requests():
            llm.step()
        assert "987654" not in json.dumps(llm.explain(request_id))


def test_request_that_needs_every_token_computed_is_told_that_nothing_is_loaded(make_engine: Any, script: Any) -> None:
    engine = make_engine(script(), explain_requests=True)
    engine.run(PROMPT)
    request_id = engine.add(PROMPT, 2)
    (request,) = engine.llm.scheduler.waiting
    request.skip_reading_prefix_cache = True
    for _ in range(2):  # before its admission and after its end
        (run,) = engine.llm.explain(request_id)["ranges"]
        assert (run["tokens"], run["place"], run["loaded"]) == ([0, len(PROMPT)], "nowhere", False)
        assert run["reason"].startswith("nothing is loaded: the request needs every token computed")
        engine.finish()
