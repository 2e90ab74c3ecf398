"""The table of metrics and the registry made from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvferry.metrics import METRICS, Kind, Metrics


def series(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.exposition().decode().splitlines() if not re.match(r"#|\S*_created", line)]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_names_are_unique_and_every_row_explains_itself() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith(("vllm:", "kvferry:"))
        assert metric.kind is not Kind.COUNTER or not metric.name.endswith("_total"), "the exposition adds it"
        assert metric.help.endswith(".")
        assert len(metric.labels) == len(metric.values)
        assert metric.open_labels in ({}.keys(), {"connector"}, {"connector", "medium"}), "who would begin it?"
        assert (metric.kind is Kind.HISTOGRAM) == bool(metric.buckets)
        assert list(metric.buckets) == sorted(metric.buckets)


def test_counters_gauges_and_histograms() -> None:
    metrics = Metrics("m")
    metrics.add("vllm:generation_tokens", 3)
    metrics.add("vllm:request_success", 1, "stop")
    metrics.raise_to("vllm:num_preemptions", 4)
    metrics.raise_to("vllm:num_preemptions", 6)
    metrics.set("vllm:kv_cache_usage_perc", 0.25)
    metrics.observe("vllm:time_to_first_token_seconds", 0.3)
    found = series(metrics)
    labels = 'engine="0",model_name="m"'
    assert found[f"vllm:generation_tokens_total{{{labels}}}"] == 3
    assert found['vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"}'] == 1
    assert found['vllm:request_success_total{engine="0",finished_reason="abort",model_name="m"}'] == 0
    assert found[f"vllm:num_preemptions_total{{{labels}}}"] == 6
    assert found[f"vllm:kv_cache_usage_perc{{{labels}}}"] == 0.25
    assert found[f"vllm:time_to_first_token_seconds_sum{{{labels}}}"] == 0.3
    assert found['vllm:time_to_first_token_seconds_bucket{engine="0",le="0.25",model_name="m"}'] == 0
    assert found['vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5",model_name="m"}'] == 1


def test_what_has_no_row_cannot_be_counted() -> None:
    metrics = Metrics("m")
    for name, *labels in (("vllm:nothing",), ("vllm:request_success", "boredom"), ("vllm:request_success",)):
        with pytest.raises(KeyError):
            metrics.add(name, 1, *labels)
    with pytest.raises(KeyError):
        metrics.add("kvferry:connector_loads", 1, "C", "host")
    with pytest.raises(ValueError, match="non-negative"):
        metrics.raise_to("vllm:num_preemptions", -1)


def test_series_of_a_connector_stand_at_zero_once_it_is_known() -> None:
    metrics = Metrics("m")
    assert not any("connector=" in name for name in series(metrics))
    metrics.begin(connector="C")
    metrics.begin(connector="C", medium="fs")
    at_start = {
        name: value for name, value in series(metrics).items() if 'connector="C"' in name and "_created" not in name
    }
    reason = 'kvferry:connector_failures_total{connector="C",engine="0",medium="fs",model_name="m",reason="load other"}'
    assert at_start[reason] == 0
    assert set(at_start.values()) == {0}
    metrics.add("kvferry:connector_failures", 2, "C", "fs", "load other")
    metrics.begin(connector="C", medium="fs")
    assert series(metrics)[reason] == 2, "what stands stays"


def test_totals_of_others_are_followed_upwards_only() -> None:
    metrics = Metrics("m")
    metrics.begin(connector="C", medium="fs")
    name = 'kvferry:connector_loads_total{connector="C",engine="0",medium="fs",model_name="m"}'
    for total, shown in ((3, 3), (3, 3), (1, 3), (5, 5)):
        metrics.follow("kvferry:connector_loads", total, "C", "fs")
        assert series(metrics)[name] == shown


def test_the_table_in_the_docs_is_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guides" / "server.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `kvferry:")]
    assert rows == [
        f"| `{metric.name}` | {metric.help} | {', '.join(f'`{label}`' for label in metric.labels)} |"
        for metric in METRICS
        if metric.open_labels
    ]
