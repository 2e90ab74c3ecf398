"""What the server counts and measures: one table, and the Prometheus registry made from it.

Names, labels and meanings are vLLM's where it has them, `kvferry:` else, so that dashboards fit both. Every series
stands from the start, at 0, so that a rate can be taken from its first change on.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Kind(enum.Enum):
    """How a metric moves."""

    COUNTER = Counter  # only up; exported as `<name>_total`
    GAUGE = Gauge
    HISTOGRAM = Histogram


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    kind: Kind
    help: str
    label: str | None = None
    label_values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _decades(*steps: float, low: int, high: int) -> tuple[float, ...]:
    return tuple(step * 10.0**power for power in range(low, high) for step in steps)


_TTFT_S = _decades(1, 2.5, 5, low=-3, high=3)
_BETWEEN_TOKENS_S = _decades(1, 2.5, 5, 7.5, low=-3, high=2)
_REQUEST_S = _decades(1, 2, 5, low=-2, high=4)
_TOKENS = _decades(1, 2, 5, low=0, high=6)
_FEW = (1.0, 2.0, 5.0, 10.0, 20.0)

_FINISH_REASONS = ("stop", "length", "abort", "error")
_TOKEN_SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
HIT_SOURCES = ("device", "host", "p2p", "disk", "external_unspecified")

METRICS = (
    # ---- now
    Metric("vllm:num_requests_running", Kind.GAUGE, "Requests in the running batch."),
    Metric("vllm:num_requests_waiting", Kind.GAUGE, "Requests that wait, for whatever reason."),
    Metric(
        "vllm:num_requests_waiting_by_reason", Kind.GAUGE,
        "Of those, for a place or blocks (capacity), or for KV that the connector loads (deferred).",
        "reason", ("capacity", "deferred"),
    ),
    Metric("vllm:kv_cache_usage_perc", Kind.GAUGE, "Part of the KV blocks in use; 1 means all."),
    # ---- tokens
    Metric("vllm:prompt_tokens", Kind.COUNTER, "Prompt tokens of requests that got their first token."),
    Metric(
        "vllm:prompt_tokens_by_source", Kind.COUNTER, "Prompt tokens by where their KV came from.",
        "source", _TOKEN_SOURCES,
    ),
    Metric("vllm:prompt_tokens_cached", Kind.COUNTER, "Prompt tokens whose KV was not computed."),
    Metric(
        "vllm:prompt_tokens_cached_by_source", Kind.COUNTER, "Of those, by the place the KV was found in.",
        "source", HIT_SOURCES,
    ),
    Metric("vllm:prefix_cache_queries", Kind.COUNTER, "Tokens looked up in the engine's own prefix cache."),
    Metric("vllm:prefix_cache_hits", Kind.COUNTER, "Of those, tokens found."),
    Metric("vllm:external_prefix_cache_queries", Kind.COUNTER, "Tokens the connector was asked for."),
    Metric("vllm:external_prefix_cache_hits", Kind.COUNTER, "Of those, tokens it loaded."),
    Metric("vllm:generation_tokens", Kind.COUNTER, "Generated tokens."),
    # ---- requests
    Metric("vllm:num_preemptions", Kind.COUNTER, "Requests that lost their blocks and were computed again."),
    Metric("vllm:request_success", Kind.COUNTER, "Requests that ended.", "finished_reason", _FINISH_REASONS),
    Metric(
        "vllm:admission_rejections", Kind.COUNTER, "Requests refused, for the server was full or stopping.",
        "reason", ("queue_full", "stopping"),
    ),
    Metric("vllm:request_prompt_tokens", Kind.HISTOGRAM, "Prompt tokens of a request.", buckets=_TOKENS),
    Metric("vllm:request_generation_tokens", Kind.HISTOGRAM, "Generated tokens of a request.", buckets=_TOKENS),
    Metric("vllm:request_params_max_tokens", Kind.HISTOGRAM, "max_tokens of a request.", buckets=_TOKENS),
    Metric("vllm:request_params_n", Kind.HISTOGRAM, "n of a request.", buckets=_FEW),
    # ---- times
    Metric("vllm:time_to_first_token_seconds", Kind.HISTOGRAM, "From arrival to the first token.", buckets=_TTFT_S),
    Metric(
        "vllm:inter_token_latency_seconds", Kind.HISTOGRAM, "Between a request's tokens.", buckets=_BETWEEN_TOKENS_S
    ),
    Metric(
        "vllm:request_time_per_output_token_seconds", Kind.HISTOGRAM, "Mean time per token after the first.",
        buckets=_BETWEEN_TOKENS_S,
    ),
    Metric("vllm:e2e_request_latency_seconds", Kind.HISTOGRAM, "From arrival to the end.", buckets=_REQUEST_S),
    Metric("vllm:request_queue_time_seconds", Kind.HISTOGRAM, "From arrival to the first blocks.", buckets=_REQUEST_S),
    Metric(
        "vllm:request_prefill_time_seconds", Kind.HISTOGRAM, "From the first blocks to the first token.",
        buckets=_REQUEST_S,
    ),
    Metric(
        "vllm:request_decode_time_seconds", Kind.HISTOGRAM, "From the first token to the end.", buckets=_REQUEST_S
    ),
    Metric(
        "vllm:request_inference_time_seconds", Kind.HISTOGRAM, "From the first blocks to the end.", buckets=_REQUEST_S
    ),
    # ---- kvferry's own
    Metric("kvferry:engine_up", Kind.GAUGE, "1 while the engine's thread runs."),
    Metric("kvferry:engine_steps", Kind.COUNTER, "Engine steps, empty ones included."),
    Metric("kvferry:client_disconnects", Kind.COUNTER, "Requests ended because their client went away."),
    Metric("kvferry:connector_hook_errors", Kind.COUNTER, "Connector hooks that raised."),
    Metric("kvferry:connector_contract_errors", Kind.COUNTER, "Connector answers that broke the contract."),
    Metric("kvferry:connector_load_failures", Kind.COUNTER, "KV loads that failed or ran out of time."),
    Metric("kvferry:connector_unknown_completions", Kind.COUNTER, "Completions nobody waited for."),
)  # fmt: skip


class Metrics:
    """The table's metrics for one served model. May be used by several threads.

    Unknown names and label values are KeyErrors: everything that is counted has its row.
    """

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._series: dict[tuple[str, str | None], Counter | Gauge | Histogram] = {}
        self._totals: dict[tuple[str, str | None], float] = {}
        for metric in METRICS:
            labels = ["model_name", "engine", *([metric.label] if metric.label else [])]
            if metric.kind is Kind.HISTOGRAM:
                family: Counter | Gauge | Histogram = Histogram(
                    metric.name, metric.help, labels, registry=self._registry, buckets=metric.buckets
                )
            else:
                family = metric.kind.value(metric.name, metric.help, labels, registry=self._registry)
            for value in metric.label_values or (None,):
                extra = () if value is None else (value,)
                self._series[metric.name, value] = family.labels(model_name, "0", *extra)

    def add(self, name: str, amount: float = 1, label: str | None = None) -> None:
        """Raise a counter."""
        series = self._series[name, label]
        assert isinstance(series, Counter), name
        series.inc(amount)

    def raise_to(self, name: str, total: float, label: str | None = None) -> None:
        """Raise a counter to a total that is kept elsewhere (and never falls). One thread per counter."""
        self.add(name, total - self._totals.get((name, label), 0), label)
        self._totals[name, label] = total

    def set(self, name: str, value: float, label: str | None = None) -> None:
        """Set a gauge."""
        series = self._series[name, label]
        assert isinstance(series, Gauge), name
        series.set(value)

    def observe(self, name: str, value: float) -> None:
        """Enter one value into a histogram."""
        series = self._series[name, None]
        assert isinstance(series, Histogram), name
        series.observe(value)

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)
