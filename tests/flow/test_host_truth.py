"""The embedded engine calls hooks as real vLLM 0.32 does: against a trace of it (tests/vllm/record_trace.py)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest
from tests.host_trace import (
    BLOCK_SIZE,
    BUDGET_TOKENS,
    MAX_MODEL_LEN,
    NOT_HYBRID,
    NUM_BLOCKS,
    SCENARIOS,
    Section,
    run_scenario,
)

from kvferry import LLM, SamplingParams
from kvferry.clock import FakeClock
from kvferry.contract import base
from kvferry.testing.recorder import new_record, recorder_classes
from kvferry.testing.stub_model import StubModel

Recorder, HmaRecorder = recorder_classes(base)
TRACES: dict[str, dict[str, list[Section]]] = json.loads(
    (Path(__file__).parents[1] / "data" / "vllm_0_32_trace.json").read_text()
)["traces"]
CASES = [(model, scenario) for model, trace in TRACES.items() for scenario in trace]
WINDOWS: dict[str, list[int | None]] = {"single": [None, None], "hybrid": [128, 128, None]}


@dataclass(frozen=True)
class Difference:
    """One way in which the embedded engine may differ: what turns vLLM's line into its own."""

    where: str
    """Pattern of "model/scenario"."""
    vllm: str
    """Regular expression."""
    ours: str
    """What stands there instead; a line that becomes empty is not called at all."""
    reason: str


ALLOWED = (
    Difference(
        "*",
        r"^scheduler\.supports_divergent_local_hybrid_hits$",
        "",
        "about recurrent state, of which this engine has none",
    ),
    Difference("*/startup", r"^class\.build_prom_metrics$", "", "the server asks for metrics, not the engine"),
    Difference("hybrid/*", r"blocks=(\d+),\1,\1", r"blocks=\1", "this release keeps all layers in one KV group"),
    Difference("hybrid/preempt*", r" local=96$", " local=128", "vLLM's three groups each take a cached block of r2's"),
    Difference("hybrid/preempt*", r"resumed=r2:96\+33", "resumed=r2:128+1", "and so it has more to compute again"),
)
"""Everything else must be equal, call for call."""


def expected(model: str, scenario: str, differences: tuple[Difference, ...]) -> list[Section]:
    """vLLM's trace as the embedded engine should show it."""
    rules = [item for item in differences if fnmatch(f"{model}/{scenario}", item.where)]
    sections = []
    for section in TRACES[model][scenario]:
        lines = section["calls"]
        for rule in rules:
            lines = [re.sub(rule.vllm, rule.ours, line) for line in lines]
        sections.append({"do": section["do"], "calls": [line for line in lines if line]})
    return sections


class EmbeddedHost:
    """The embedded engine as the scenarios drive it."""

    def __init__(self, model: str) -> None:
        transfer = {"kv_connector": "HmaRecorder", "kv_connector_module_path": __name__, "kv_role": "kv_both"}
        self.llm = LLM(
            StubModel(windows=WINDOWS[model]),
            block_size=BLOCK_SIZE,
            num_kv_blocks=NUM_BLOCKS["single"],
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=BUDGET_TOKENS,
            max_num_seqs=4,
            kv_transfer_config={**transfer, "kv_load_failure_policy": "recompute"},
            clock=FakeClock(),
        )

    def add(self, key: str, token_ids: list[int], max_tokens: int) -> None:
        self.llm.add_request(token_ids, SamplingParams(max_tokens=max_tokens, temperature=0), request_id=key)

    def abort(self, key: str) -> None:
        self.llm.abort_request(key)

    def step(self) -> None:
        self.llm.step()
        self.llm.scheduler.check_integrity()

    def has_requests(self) -> bool:
        return self.llm.has_requests()

    def reset_prefix_cache(self) -> bool:
        return self.llm.reset_prefix_cache()


def embedded_trace(model: str) -> dict[str, list[Section]]:
    record = new_record()
    host = EmbeddedHost(model)
    trace = {"startup": [{"do": "start", "calls": record.lines()}]}
    for name in SCENARIOS:
        if name in TRACES[model]:
            trace[name] = run_scenario(name, host, record)
    record.forget()
    host.llm.shutdown()
    assert host.llm.counters.hook_errors == host.llm.counters.contract_errors == {}
    trace["shutdown"] = [{"do": "shutdown", "calls": record.lines()}]
    return trace


@pytest.fixture(scope="module")
def embedded() -> dict[str, dict[str, list[Section]]]:
    """Model -> scenario -> what the embedded engine called."""
    return {model: embedded_trace(model) for model in TRACES}


@pytest.mark.parametrize(("model", "scenario"), CASES)
def test_same_calls_in_the_same_order(embedded, model: str, scenario: str) -> None:
    assert embedded[model][scenario] == expected(model, scenario, ALLOWED)


@pytest.mark.parametrize("index", range(len(ALLOWED)))
def test_every_allowed_difference_is_still_there(embedded, index: int) -> None:
    others = ALLOWED[:index] + ALLOWED[index + 1 :]
    assert any(embedded[model][scenario] != expected(model, scenario, others) for model, scenario in CASES)


def test_every_scenario_was_recorded_and_shows_what_it_is_for() -> None:
    assert set(TRACES["single"]) == {"startup", *SCENARIOS, "shutdown"}
    assert set(TRACES["hybrid"]) == set(TRACES["single"]) - NOT_HYBRID
    for model, scenario, words in (
        ("single", "warm_sync", "sync_loads"),
        ("single", "warm_behind_local_hit", "local=32"),
        ("single", "failed_sync_blocks", "bad_blocks=1"),
        ("hybrid", "failed_async_request", "failed=r1"),
        ("single", "preempt", "preempted=r2"),
        ("hybrid", "preempt", "resumed=r2"),
        ("single", "abort_loading", "received=r1"),
        ("single", "delayed_free", "sent=r1"),
    ):
        calls = [line for section in TRACES[model][scenario] for line in section["calls"]]
        assert any(words in line for line in calls), (model, scenario)
