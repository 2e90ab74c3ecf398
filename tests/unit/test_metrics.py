"""The table of metrics and the registry made from it."""

from __future__ import annotations

import pytest

from kvferry.metrics import METRICS, Kind, Metrics


def series(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.exposition().decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_names_are_unique_and_every_row_explains_itself() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith(("vllm:", "kvferry:"))
        assert not metric.name.endswith("_total"), "the exposition adds it"
        assert metric.help.endswith(".")
        assert (metric.label is None) == (not metric.label_values)
        assert (metric.kind is Kind.HISTOGRAM) == bool(metric.buckets)
        assert list(metric.buckets) == sorted(metric.buckets)


def test_counters_gauges_and_histograms() -> None:
    metrics = Metrics("m")
    metrics.add("vllm:generation_tokens", 3)
    metrics.add("vllm:request_success", label="stop")
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
    for name, label in (("vllm:nothing", None), ("vllm:request_success", "boredom"), ("vllm:request_success", None)):
        with pytest.raises(KeyError):
            metrics.add(name, label=label)
    with pytest.raises(ValueError, match="non-negative"):
        metrics.raise_to("vllm:num_preemptions", -1)
