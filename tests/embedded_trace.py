"""The embedded engine as a host of the recording connector, and what it should show: the trace of real vLLM 0.32."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tests.host_trace import (
    BLOCK_SIZE,
    BUDGET_TOKENS,
    MAX_MODEL_LEN,
    NUM_BLOCKS,
    SCENARIOS,
    Section,
    run_scenario,
)

from kvferry import LLM, SamplingParams
from kvferry.clock import FakeClock
from kvferry.testing.recorder import new_record
from kvferry.testing.stub_model import StubModel

TRACES: dict[str, dict[str, list[Section]]] = json.loads(
    (Path(__file__).parent / "data" / "vllm_0_32_trace.json").read_text()
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
    Difference("hybrid/preempt*", r" local=96$", " local=128", "vLLM finds less of what r2 had cached than is there"),
    Difference("hybrid/preempt*", r"resumed=r2:96\+33", "resumed=r2:128+1", "and so it has more to compute again"),
)
"""Everything else must be equal, call for call."""


def expected(model: str, scenario: str, differences: tuple[Difference, ...] = ALLOWED) -> list[Section]:
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

    def __init__(self, model: str, connector: str) -> None:
        transfer = {"kv_connector": connector, "kv_role": "kv_both"}
        self.llm = LLM(
            StubModel(windows=WINDOWS[model]),
            block_size=BLOCK_SIZE,
            num_kv_blocks=NUM_BLOCKS[model],
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
        self.llm.check_integrity()

    def has_requests(self) -> bool:
        return self.llm.has_requests()

    def reset_prefix_cache(self) -> bool:
        return self.llm.reset_prefix_cache()


def embedded_trace(model: str, connector: str) -> dict[str, list[Section]]:
    """Every scenario that was recorded of the model; `connector` is "module:Class"."""
    record = new_record()
    host = EmbeddedHost(model, connector)
    trace = {"startup": [{"do": "start", "calls": record.lines()}]}
    for name in SCENARIOS:
        if name in TRACES[model]:
            trace[name] = run_scenario(name, host, record)
    record.forget()
    host.llm.shutdown()
    assert host.llm.counters.hook_errors == host.llm.counters.contract_errors == {}
    trace["shutdown"] = [{"do": "shutdown", "calls": record.lines()}]
    return trace
