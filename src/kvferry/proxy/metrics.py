"""What the proxy counts. Every series whose labels are known stands from the start, at 0."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LEGS = ("prefill", "decode")
OUTCOMES = ("ok", "refused", "full", "failed", "cut", "client_gone")
RECOMPUTE_REASONS = ("no_params", "decode_engine", "not_split", "no_prefill_engine")
_BUCKETS_S = tuple(step * 10.0**power for power in range(-3, 3) for step in (1, 2.5, 5))


class ProxyMetrics:
    """The proxy's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "kvferry:proxy_requests",
            "Requests by how they ended: refused is an engine's or our 4xx, full that engines had no room, cut a "
            "stream that broke off.",
            ["outcome"], registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge("kvferry:proxy_in_flight", "Requests under way.", registry=registry)
        self.retries = Counter("kvferry:proxy_retries", "Legs tried again, by the leg.", ["leg"], registry=registry)
        self.leg_seconds = Histogram(
            "kvferry:proxy_leg_seconds",
            "From sending a leg to its reply; of a decode leg that is a stream, to its first token.",
            ["leg"], registry=registry, buckets=_BUCKETS_S,
        )  # fmt: skip
        self.recomputed = Counter(
            "kvferry:proxy_recomputed",
            "Requests whose prompt the decode engine computed: nothing was handed over, the transfer did not bring "
            "it, the request cannot be split, or no prefill engine worked.",
            ["reason"], registry=registry,
        )  # fmt: skip
        self.engine_up = Gauge(
            "kvferry:proxy_engine_up", "1 while an engine is in rotation.", ["role", "url"], registry=registry
        )
        self.engine_in_flight = Gauge(
            "kvferry:proxy_engine_in_flight", "Legs under way.", ["role", "url"], registry=registry
        )
        self.pair_transfers = Gauge(
            "kvferry:proxy_pair_transfers", "1 when the last transfer between two engines worked.",
            ["prefill", "decode"], registry=registry,
        )  # fmt: skip
        for family, values in (
            (self.requests, OUTCOMES), (self.retries, LEGS), (self.leg_seconds, LEGS),
            (self.recomputed, RECOMPUTE_REASONS),
        ):  # fmt: skip
            for value in values:
                family.labels(value)

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)
