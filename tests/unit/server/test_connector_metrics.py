"""Connectors' totals as metrics, and what the observer makes of a step."""

from __future__ import annotations

from kvferry import LLM, SamplingParams
from kvferry.contract import ConnectorStats, MediumStats
from kvferry.contract.stats_rows import by_known
from kvferry.engine import RequestOutputKind
from kvferry.metrics import FAILURE_REASONS, FALLBACK_REASONS, Metrics
from kvferry.server.connector_metrics import ConnectorMetrics
from kvferry.server.observe import EngineObserver
from kvferry.testing.stub_model import StubModel


def series(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.exposition().decode().splitlines() if not line.startswith("#")]
    found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
    return {name.replace('engine="0",', "").replace(',model_name="m"', ""): value for name, value in found.items()}


def test_unknown_reasons_are_counted_as_other() -> None:
    counts = {"load TierCorrupt": 2, "load KeyError": 3, "store ValueError": 1, "explosion": 4}
    found = by_known(counts, FAILURE_REASONS)
    assert {reason: count for reason, count in found.items() if count} == {
        "load TierCorrupt": 2,
        "load other": 3,
        "store other": 1,
        "other": 4,
    }
    assert by_known({"stalled wait": 1, "boredom": 1}, FALLBACK_REASONS)["other"] == 1


def test_every_figure_finds_its_row_and_children_their_own() -> None:
    metrics = Metrics("m")
    entering = ConnectorMetrics(metrics, "Multi")
    fs = MediumStats(1, 2, 3.0, 4, 5, 6.0, {"load TierBusy": 7}, 8, 9, 10, None)
    child = ConnectorStats({"fs": fs}, {"fs": 11}, {"failed load": 12}, 13, 14.0)
    entering.enter(ConnectorStats(children={"A": child}))
    found = series(metrics)
    row, medium = "kvferry:connector_", '{connector="Multi/A",medium="fs"}'
    assert {name: found[f"{row}{name}{medium}"] for name in ("used_bytes", "capacity_bytes")} == {
        "used_bytes": 10,
        "capacity_bytes": float("inf"),
    }
    for name, value in {
        "loads": 1, "loaded_bytes": 2, "load_seconds": 3, "stores": 4, "stored_bytes": 5, "store_seconds": 6,
        "evictions": 8, "dropped_stores": 9, "hit_tokens": 11,
    }.items():  # fmt: skip
        assert found[f"{row}{name}_total{medium}"] == value, name
    assert found[f'{row}failures_total{{connector="Multi/A",medium="fs",reason="load TierBusy"}}'] == 7
    assert found[f'{row}fallbacks_total{{connector="Multi/A",reason="failed load"}}'] == 12
    assert found[f'{row}held_blocks{{connector="Multi/A"}}'] == 13
    assert found[f'{row}oldest_held_seconds{{connector="Multi/A"}}'] == 14
    assert found[f'{row}held_blocks{{connector="Multi"}}'] == 0
    child.media["fs"] = MediumStats(num_loads=0)  # a plugin's totals may fall; ours do not
    entering.enter(ConnectorStats(children={"A": child}))
    assert series(metrics)[f"{row}loads_total{medium}"] == 1


def test_tokens_of_a_step_are_computed_prompt_and_generated_tokens() -> None:
    with LLM(StubModel(), num_kv_blocks=50) as llm:
        metrics = Metrics("m")
        observer = EngineObserver(llm, metrics)
        params = SamplingParams(max_tokens=3, temperature=0, output_kind=RequestOutputKind.DELTA)
        for prompt in (range(40), range(40)):  # the second finds 32 tokens in the prefix cache
            llm.add_request(list(prompt), params)
            while llm.has_unfinished_requests():
                observer.step_done(llm.step())
        found = series(metrics)
    assert found['vllm:iteration_tokens_total_count{model_name="m"}'] == 6
    assert found['vllm:iteration_tokens_total_sum{model_name="m"}'] == (40 + 3) + (8 + 3)


def test_messages_with_events_are_counted() -> None:
    events = {"enable_kv_cache_events": True, "endpoint": "tcp://127.0.0.1:0"}
    with LLM(StubModel(), num_kv_blocks=50, kv_events_config=events) as llm:
        metrics = Metrics("m")
        observer = EngineObserver(llm, metrics)
        llm.add_request(list(range(40)), SamplingParams(max_tokens=1, output_kind=RequestOutputKind.DELTA))
        while llm.has_unfinished_requests():
            observer.step_done(llm.step())
        assert series(metrics)['kvferry:kv_events_messages_total{model_name="m"}'] == 1
        assert series(metrics)['kvferry:kv_events_dropped_total{model_name="m"}'] == 0
