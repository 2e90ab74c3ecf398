"""What the server counts and measures: one table, and the Prometheus registry made from it.

Names, labels and meanings are vLLM's where it has them, `kvferry:` else, so that dashboards fit both. Every series
stands from the start, at 0, so that a rate can be taken from its first change on.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from itertools import product

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
    labels: tuple[str, ...] = ()
    """Beside `model_name` and `engine`, which all have."""
    values: tuple[tuple[str, ...], ...] = ()
    """What each label may say; () where the engine knows it first, and tells `Metrics.begin`."""
    buckets: tuple[float, ...] = ()

    @property
    def open_labels(self) -> frozenset[str]:
        """Labels whose values are known only when the engine stands."""
        return frozenset(label for label, values in zip(self.labels, self.values, strict=True) if not values)


def _decades(*steps: float, low: int, high: int) -> tuple[float, ...]:
    return tuple(step * 10.0**power for power in range(low, high) for step in steps)


_TTFT_S = _decades(1, 2.5, 5, low=-3, high=3)
_BETWEEN_TOKENS_S = _decades(1, 2.5, 5, 7.5, low=-3, high=2)
_REQUEST_S = _decades(1, 2, 5, low=-2, high=4)
_TOKENS = _decades(1, 2, 5, low=0, high=6)
_FEW = (1.0, 2.0, 5.0, 10.0, 20.0)
_STEP_TOKENS = (1.0, *(2.0**power for power in range(3, 15)))

_FINISH_REASONS = ("stop", "length", "abort", "error")
_TOKEN_SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
HIT_SOURCES = ("device", "host", "p2p", "disk", "external_unspecified")
_FAILURES = ("TierBusy", "TierCorrupt", "TierUnavailable", "HostError", "TransferError", "TransferCorrupt", "other")
FAILURE_REASONS = (*(f"{what} {why}" for what in ("load", "store") for why in _FAILURES), "other")
FALLBACK_REASONS = (
    "stalled wait", "failed load", "failed store", "dropped store", "hook raised", "switched off", "other",
)  # fmt: skip
HELD_REASONS = ("loading", "sending", "late_load", "late_send", "quarantined", "other")

_MEDIUM = (("connector", "medium"), ((), ()))
_CONNECTOR = (("connector",), ((),))

METRICS = (
    # ---- now
    Metric("vllm:num_requests_running", Kind.GAUGE, "Requests in the running batch."),
    Metric("vllm:num_requests_waiting", Kind.GAUGE, "Requests that wait, for any reason."),
    Metric(
        "vllm:num_requests_waiting_by_reason", Kind.GAUGE,
        "Requests that wait for a place or for blocks (capacity), or for KV that the connector loads (deferred).",
        ("reason",), (("capacity", "deferred"),),
    ),
    Metric("vllm:kv_cache_usage_perc", Kind.GAUGE, "Share of the KV blocks in use, from 0 to 1."),
    # ---- tokens
    Metric("vllm:prompt_tokens", Kind.COUNTER, "Prompt tokens of requests that got their first token."),
    Metric(
        "vllm:prompt_tokens_by_source", Kind.COUNTER, "Prompt tokens, by the origin of their KV.",
        ("source",), (_TOKEN_SOURCES,),
    ),
    Metric("vllm:prompt_tokens_cached", Kind.COUNTER, "Prompt tokens whose KV was not computed."),
    Metric(
        "vllm:prompt_tokens_cached_by_source", Kind.COUNTER,
        "Prompt tokens whose KV was not computed, by the place of the KV.",
        ("source",), (HIT_SOURCES,),
    ),
    Metric("vllm:prefix_cache_queries", Kind.COUNTER, "Tokens looked up in the engine's own prefix cache."),
    Metric("vllm:prefix_cache_hits", Kind.COUNTER, "Tokens found in the engine's own prefix cache."),
    Metric("vllm:external_prefix_cache_queries", Kind.COUNTER, "Tokens looked up in the connector."),
    Metric("vllm:external_prefix_cache_hits", Kind.COUNTER, "Tokens loaded by the connector."),
    Metric("vllm:generation_tokens", Kind.COUNTER, "Generated tokens."),
    Metric(
        "vllm:iteration_tokens_total", Kind.HISTOGRAM,
        "Tokens of a step: generated tokens, and computed prompt tokens of requests that got their first token.",
        buckets=_STEP_TOKENS,
    ),
    # ---- requests
    Metric("vllm:num_preemptions", Kind.COUNTER, "Requests that lost their blocks and were computed again."),
    Metric("vllm:request_success", Kind.COUNTER, "Requests that ended.", ("finished_reason",), (_FINISH_REASONS,)),
    Metric(
        "vllm:admission_rejections", Kind.COUNTER, "Requests refused because the server was full or stopping.",
        ("reason",), (("queue_full", "stopping"),),
    ),
    Metric("vllm:request_prompt_tokens", Kind.HISTOGRAM, "Prompt tokens of a request.", buckets=_TOKENS),
    Metric("vllm:request_generation_tokens", Kind.HISTOGRAM, "Generated tokens of a request.", buckets=_TOKENS),
    Metric("vllm:request_params_max_tokens", Kind.HISTOGRAM, "Value of max_tokens of a request.", buckets=_TOKENS),
    Metric("vllm:request_params_n", Kind.HISTOGRAM, "Value of n of a request.", buckets=_FEW),
    # ---- times
    Metric(
        "vllm:time_to_first_token_seconds", Kind.HISTOGRAM, "Seconds from a request's arrival to its first token.",
        buckets=_TTFT_S,
    ),
    Metric(
        "vllm:inter_token_latency_seconds", Kind.HISTOGRAM,
        "Seconds between two tokens of a request.",
        buckets=_BETWEEN_TOKENS_S,
    ),
    Metric(
        "vllm:request_time_per_output_token_seconds", Kind.HISTOGRAM,
        "Mean seconds per token of a request, its first token left out.",
        buckets=_BETWEEN_TOKENS_S,
    ),
    Metric(
        "vllm:e2e_request_latency_seconds", Kind.HISTOGRAM, "Seconds from a request's arrival to its end.",
        buckets=_REQUEST_S,
    ),
    Metric(
        "vllm:request_queue_time_seconds", Kind.HISTOGRAM, "Seconds from a request's arrival to its first blocks.",
        buckets=_REQUEST_S,
    ),
    Metric(
        "vllm:request_prefill_time_seconds", Kind.HISTOGRAM,
        "Seconds from a request's first blocks to its first token.",
        buckets=_REQUEST_S,
    ),
    Metric(
        "vllm:request_decode_time_seconds", Kind.HISTOGRAM,
        "Seconds from a request's first token to its end.",
        buckets=_REQUEST_S,
    ),
    Metric(
        "vllm:request_inference_time_seconds", Kind.HISTOGRAM,
        "Seconds from a request's first blocks to its end.",
        buckets=_REQUEST_S,
    ),
    # ---- kvferry's own
    Metric("kvferry:engine_up", Kind.GAUGE, "1 while the engine's thread runs."),
    Metric("kvferry:engine_steps", Kind.COUNTER, "Engine steps, including empty steps."),
    Metric("kvferry:client_disconnects", Kind.COUNTER, "Requests that ended because their client disconnected."),
    Metric("kvferry:connector_hook_errors", Kind.COUNTER, "Calls of connector hooks that raised an exception."),
    Metric("kvferry:connector_contract_errors", Kind.COUNTER, "Connector answers that broke the contract."),
    Metric("kvferry:connector_load_failures", Kind.COUNTER, "KV loads that failed or timed out."),
    Metric(
        "kvferry:connector_unknown_completions", Kind.COUNTER,
        "Completions reported by the connector for transfers that no request waited for.",
    ),
    Metric("kvferry:kv_events_messages", Kind.COUNTER, "Messages with KV events, including dropped messages."),
    Metric(
        "kvferry:kv_events_dropped", Kind.COUNTER,
        "Messages with KV events dropped because the publisher's queue was full.",
    ),
    Metric(
        "kvferry:connector_switched_off", Kind.GAUGE,
        "1 when the connector is switched off because of its faults, else 0.",
    ),
    Metric(
        "kvferry:held_blocks", Kind.GAUGE, "KV blocks of ended requests, by what still uses the blocks.",
        ("reason",), (HELD_REASONS,),
    ),
    Metric(
        "kvferry:oldest_held_seconds", Kind.GAUGE,
        "Age of the longest hold on a block of an ended request, in seconds.",
    ),
    # ---- what each connector says of itself (`ConnectorStats`)
    Metric(
        "kvferry:connector_hit_tokens", Kind.COUNTER, "Tokens loaded for requests, by medium.", *_MEDIUM
    ),
    Metric("kvferry:connector_loads", Kind.COUNTER, "Chunks or blocks read from a medium.", *_MEDIUM),
    Metric("kvferry:connector_loaded_bytes", Kind.COUNTER, "Bytes read from a medium.", *_MEDIUM),
    Metric("kvferry:connector_load_seconds", Kind.COUNTER, "Seconds spent reading, summed over all readers.", *_MEDIUM),
    Metric("kvferry:connector_stores", Kind.COUNTER, "Chunks or blocks written to a medium.", *_MEDIUM),
    Metric("kvferry:connector_stored_bytes", Kind.COUNTER, "Bytes written to a medium.", *_MEDIUM),
    Metric(
        "kvferry:connector_store_seconds", Kind.COUNTER, "Seconds spent writing, summed over all writers.",
        *_MEDIUM,
    ),
    Metric(
        "kvferry:connector_failures", Kind.COUNTER, "Reads and writes that failed.",
        ("connector", "medium", "reason"), ((), (), FAILURE_REASONS),
    ),
    Metric("kvferry:connector_evictions", Kind.COUNTER, "Chunks evicted to make room for others.", *_MEDIUM),
    Metric("kvferry:connector_dropped_stores", Kind.COUNTER, "Writes dropped for lack of room or time.", *_MEDIUM),
    Metric("kvferry:connector_used_bytes", Kind.GAUGE, "Bytes in use in a medium.", *_MEDIUM),
    Metric(
        "kvferry:connector_capacity_bytes", Kind.GAUGE, "Capacity of a medium in bytes; +Inf without a known limit.",
        *_MEDIUM,
    ),
    Metric(
        "kvferry:tier_up", Kind.GAUGE,
        "1 while the tier accepts writes; 0 from a refused write until the tier is back.",
        *_MEDIUM,
    ),
    Metric(
        "kvferry:connector_fallbacks", Kind.COUNTER,
        "Times the connector went without a hit or a store, by reason.",
        ("connector", "reason"), ((), FALLBACK_REASONS),
    ),
    Metric("kvferry:connector_held_blocks", Kind.GAUGE, "KV blocks that the connector keeps from reuse.", *_CONNECTOR),
    Metric(
        "kvferry:connector_oldest_held_seconds", Kind.GAUGE,
        "Age of the connector's longest hold on a block, in seconds.",
        *_CONNECTOR,
    ),
)  # fmt: skip


class Metrics:
    """The table's metrics for one served model. May be used by several threads.

    Unknown names and label values are KeyErrors: everything that is counted has its row. Labels are given in the
    order of the row.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._families: dict[str, Counter | Gauge | Histogram] = {}
        self._series: dict[tuple[str, ...], Counter | Gauge | Histogram] = {}
        self._totals: dict[tuple[str, ...], float] = {}
        for metric in METRICS:
            labels = ["model_name", "engine", *metric.labels]
            if metric.kind is Kind.HISTOGRAM:
                family: Counter | Gauge | Histogram = Histogram(
                    metric.name, metric.help, labels, registry=self._registry, buckets=metric.buckets
                )
            else:
                family = metric.kind.value(metric.name, metric.help, labels, registry=self._registry)
            self._families[metric.name] = family
        self.begin()

    def begin(self, **values: str) -> None:
        """Let all series stand, at 0, whose open labels are exactly these; those that stand already stay."""
        for metric in METRICS:
            if metric.open_labels == values.keys():
                known = [fixed or (values[label],) for label, fixed in zip(metric.labels, metric.values, strict=True)]
                for labels in product(*known):
                    series = self._families[metric.name].labels(self._model_name, "0", *labels)
                    self._series[metric.name, *labels] = series

    def add(self, name: str, amount: float = 1, *labels: str) -> None:
        """Raise a counter."""
        series = self._series[name, *labels]
        assert isinstance(series, Counter), name
        series.inc(amount)

    def raise_to(self, name: str, total: float, *labels: str) -> None:
        """Raise a counter to a total that is kept elsewhere (and never falls). One thread per counter."""
        key = (name, *labels)
        self.add(name, total - self._totals.get(key, 0), *labels)
        self._totals[key] = total

    def follow(self, name: str, total: float, *labels: str) -> None:
        """As `raise_to` for totals of others' making: one that falls is not followed."""
        if total > self._totals.get((name, *labels), 0):
            self.raise_to(name, total, *labels)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        series = self._series[name, *labels]
        assert isinstance(series, Gauge), name
        series.set(value)

    def observe(self, name: str, value: float) -> None:
        """Enter one value into a histogram."""
        series = self._series[(name,)]
        assert isinstance(series, Histogram), name
        series.observe(value)

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)
