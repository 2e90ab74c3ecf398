"""The embedded engine calls hooks as real vLLM 0.32 does: against a trace of it (tests/vllm/record_trace.py)."""

from __future__ import annotations

import pytest
from tests.embedded_trace import ALLOWED, CASES, TRACES, embedded_trace, expected
from tests.host_trace import NOT_HYBRID, SCENARIOS, Section

from kvferry.contract import base
from kvferry.testing.recorder import recorder_classes

Recorder, HmaRecorder = recorder_classes(base)


@pytest.fixture(scope="module")
def embedded() -> dict[str, dict[str, list[Section]]]:
    """Model -> scenario -> what the embedded engine called."""
    return {model: embedded_trace(model, f"{__name__}:HmaRecorder") for model in TRACES}


@pytest.mark.parametrize(("model", "scenario"), CASES)
def test_same_calls_in_the_same_order(embedded, model: str, scenario: str) -> None:
    assert embedded[model][scenario] == expected(model, scenario)


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
