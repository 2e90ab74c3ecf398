"""`ConnectorStats` as rows of the metrics table (`kvferry.metrics`): what hosts export is this and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from kvferry.contract.stats import ConnectorStats, MediumStats
from kvferry.metrics import FAILURE_REASONS, FALLBACK_REASONS

_PREFIX = "kvferry:connector_"


class StatsRow(NamedTuple):
    """One figure: the metric's name, its labels in the order of the table, and a total (counters) or value (gauges)."""

    metric: str
    labels: tuple[str, ...]
    value: float


def connector_rows(name: str, stats: ConnectorStats) -> Iterator[StatsRow]:
    """All rows of one connector, and of its children as connectors named `name/label`."""
    for reason, count in by_known(stats.fallbacks, FALLBACK_REASONS).items():
        yield StatsRow(f"{_PREFIX}fallbacks", (name, reason), count)
    yield StatsRow(f"{_PREFIX}held_blocks", (name,), stats.held_blocks)
    yield StatsRow(f"{_PREFIX}oldest_held_seconds", (name,), stats.oldest_held_s)
    for medium, moved in stats.media.items():
        yield from _medium_rows(name, medium, moved)
    for medium, tokens in stats.hit_tokens.items():
        yield StatsRow(f"{_PREFIX}hit_tokens", (name, medium), tokens)
    for label, child in stats.children.items():
        yield from connector_rows(f"{name}/{label}", child)


def _medium_rows(name: str, medium: str, moved: MediumStats) -> Iterator[StatsRow]:
    figures = {
        "loads": moved.num_loads,
        "loaded_bytes": moved.loaded_bytes,
        "load_seconds": moved.load_s,
        "stores": moved.num_stores,
        "stored_bytes": moved.stored_bytes,
        "store_seconds": moved.store_s,
        "evictions": moved.num_evicted,
        "dropped_stores": moved.num_dropped,
        "used_bytes": moved.used_bytes,
        "capacity_bytes": float("inf") if moved.capacity_bytes is None else moved.capacity_bytes,
    }
    yield StatsRow("kvferry:tier_up", (name, medium), moved.is_up)
    for figure, value in figures.items():
        yield StatsRow(f"{_PREFIX}{figure}", (name, medium), value)
    for reason, count in by_known(moved.failures, FAILURE_REASONS).items():
        yield StatsRow(f"{_PREFIX}failures", (name, medium, reason), count)


def by_known(counts: Mapping[str, float], reasons: tuple[str, ...]) -> dict[str, float]:
    """The counts under known reasons; any other is counted as "other", after its first word where that is known."""
    found = dict.fromkeys(reasons, 0.0)
    for reason, count in counts.items():
        beginning = f"{reason.partition(' ')[0]} other"
        known = next((name for name in (reason, beginning) if name in found), "other")
        found[known] = found.get(known, 0) + count
    return found
