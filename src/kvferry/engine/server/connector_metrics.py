"""What connectors say of themselves, as metrics: one set of rows for all of them."""

from __future__ import annotations

from collections.abc import Mapping

from kvferry.contract import ConnectorStats, MediumStats
from kvferry.metrics import FAILURE_REASONS, FALLBACK_REASONS, Metrics


class ConnectorMetrics:
    """Enters a connector's totals into the rows `kvferry:connector_...`. One thread."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._metrics = metrics
        self._name = name
        self._known: set[tuple[str, ...]] = set()

    def enter(self, stats: ConnectorStats | None) -> None:
        """Take the totals of one connector in, and of its children under `parent/label`."""
        if stats is not None:
            self._enter(self._name, stats)

    def _enter(self, name: str, stats: ConnectorStats) -> None:
        self._begin(connector=name)
        for reason, count in by_known(stats.fallbacks, FALLBACK_REASONS).items():
            self._metrics.follow("kvferry:connector_fallbacks", count, name, reason)
        self._metrics.set("kvferry:connector_held_blocks", stats.held_blocks, name)
        self._metrics.set("kvferry:connector_oldest_held_seconds", stats.oldest_held_s, name)
        for medium, moved in stats.media.items():
            self._begin(connector=name, medium=medium)
            self._medium(name, medium, moved)
        for medium, tokens in stats.hit_tokens.items():
            self._begin(connector=name, medium=medium)
            self._metrics.follow("kvferry:connector_hit_tokens", tokens, name, medium)
        for label, child in stats.children.items():
            self._enter(f"{name}/{label}", child)

    def _medium(self, name: str, medium: str, moved: MediumStats) -> None:
        totals = {
            "loads": moved.num_loads,
            "loaded_bytes": moved.loaded_bytes,
            "load_seconds": moved.load_s,
            "stores": moved.num_stores,
            "stored_bytes": moved.stored_bytes,
            "store_seconds": moved.store_s,
            "evictions": moved.num_evicted,
            "dropped_stores": moved.num_dropped,
        }
        for row, total in totals.items():
            self._metrics.follow(f"kvferry:connector_{row}", total, name, medium)
        for reason, count in by_known(moved.failures, FAILURE_REASONS).items():
            self._metrics.follow("kvferry:connector_failures", count, name, medium, reason)
        capacity_bytes = float("inf") if moved.capacity_bytes is None else moved.capacity_bytes
        self._metrics.set("kvferry:connector_used_bytes", moved.used_bytes, name, medium)
        self._metrics.set("kvferry:connector_capacity_bytes", capacity_bytes, name, medium)

    def _begin(self, **values: str) -> None:
        key = tuple(values.values())
        if key not in self._known:
            self._known.add(key)
            self._metrics.begin(**values)


def by_known(counts: Mapping[str, float], reasons: tuple[str, ...]) -> dict[str, float]:
    """The counts under known reasons; any other is counted as "other", after its first word where that is known."""
    found = dict.fromkeys(reasons, 0.0)
    for reason, count in counts.items():
        beginning = f"{reason.partition(' ')[0]} other"
        known = next((name for name in (reason, beginning) if name in found), "other")
        found[known] = found.get(known, 0) + count
    return found
