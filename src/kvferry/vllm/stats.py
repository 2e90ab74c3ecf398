"""Our statistics inside vLLM: totals become growth per step there, and rows of vLLM's /metrics in the frontend.

vLLM carries statistics as a dict from the engine to the frontend, where it asks the connector's class for what turns
the dict into metrics and a line of the log. Names and labels are those of kvferry's own server (`kvferry.metrics`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvferry.contract.stats import ConnectorStats
from kvferry.contract.stats_rows import connector_rows
from kvferry.metrics import METRICS, Kind

_ROWS = {metric.name: metric for metric in METRICS if metric.labels[:1] == ("connector",)}
_COUNTERS, _GAUGES, _OTHERS = "counters", "gauges", "others"
Row = tuple[str, ...]
"""A metric's name and its labels."""


class FerryStats(KVConnectorStats):
    """What changed in one step or more, as `data`:

    counters  row -> growth
    gauges    row -> value
    others    label of a MultiConnector's child that is no connector of ours -> its own statistics
    """

    data: dict[str, dict[Any, Any]]

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__({_COUNTERS: {}, _GAUGES: {}, _OTHERS: {}, **(data or {})})

    @classmethod
    def of_dict(cls, data: Mapping[str, Any]) -> FerryStats:
        """From what `to_dict` made, without the others: their classes are not known where it is read."""
        return cls({part: dict(data.get(part, {})) for part in (_COUNTERS, _GAUGES)})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as vLLM sends it."""
        return {**self.data, _OTHERS: {label: stats.to_dict() for label, stats in self.data[_OTHERS].items()}}

    def reset(self) -> None:
        """Forget everything."""
        self.data = {_COUNTERS: {}, _GAUGES: {}, _OTHERS: {}}

    def aggregate(self, other: FerryStats) -> FerryStats:
        """Take later or another rank's statistics in; returns self."""
        for row, growth in other.data[_COUNTERS].items():
            self.data[_COUNTERS][row] = self.data[_COUNTERS].get(row, 0) + growth
        self.data[_GAUGES].update(other.data[_GAUGES])
        others = self.data[_OTHERS]
        for label, stats in other.data[_OTHERS].items():
            others[label] = others[label].aggregate(stats) if label in others else stats
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log: what was counted since the last line, such as `loads.host`; connectors are added up."""
        found: dict[str, int | float] = {}
        for (metric, _, *labels), growth in self.data[_COUNTERS].items():
            if growth:
                name = ".".join([metric.removeprefix("kvferry:connector_"), *labels])
                found[name] = round(found.get(name, 0) + growth, 3)
        return found

    def is_empty(self) -> bool:
        """True when nothing has changed."""
        return not any(self.data.values())

    def add_child(self, parent: str, label: str, stats: Any) -> None:
        """Take the statistics of a MultiConnector's child in, whoever's kind they are."""
        if isinstance(stats, FerryStats):
            for part in (_COUNTERS, _GAUGES):
                self.data[part].update({_as_child(row, parent, label): v for row, v in stats.data[part].items()})
            for inner, others in stats.data[_OTHERS].items():
                self.data[_OTHERS][f"{label}/{inner}"] = others
        elif stats is not None and not stats.is_empty():
            self.data[_OTHERS][label] = stats


def _as_child(row: Row, parent: str, label: str) -> Row:
    """The row of a child that called itself by its own name: `parent/label`, and what stood behind its name."""
    metric, name, *labels = row
    _, slash, inner = name.partition("/")
    return (metric, f"{parent}/{label}{slash}{inner}", *labels)


class StatsTeller:
    """Makes growth out of one connector's totals. A total that falls is not followed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._last: ConnectorStats | None = None
        self._told: dict[Row, float] = {}

    def changes(self, stats: ConnectorStats | None) -> FerryStats | None:
        """What has changed since the last call; every row is told once, also at 0. None when nothing has."""
        if stats is None or stats == self._last:
            return None
        self._last = stats
        found = FerryStats()
        for metric, labels, value in connector_rows(self.name, stats):
            row = (metric, *labels)
            told = self._told.get(row)
            is_gauge = _ROWS[metric].kind is Kind.GAUGE
            if told is None or (value != told if is_gauge else value > told):
                self._told[row] = value
                found.data[_GAUGES if is_gauge else _COUNTERS][row] = value if is_gauge else value - (told or 0)
        return None if found.is_empty() else found


class MetricsOfAll(KVConnectorPromMetrics):
    """The rows of the metrics table that are about connectors, for one frontend. `others`: of a MultiConnector's
    children that are no connectors of ours, by label.
    """

    _families: dict[str, Any] = {}  # noqa: RUF012  # of the frontend before this one in the same process

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        others: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._others = others or {}
        for family in MetricsOfAll._families.values():
            with suppress(KeyError):  # vLLM takes only its own metrics back when another engine starts
                REGISTRY.unregister(family)
        MetricsOfAll._families = {name: self._family(name, metric_types) for name in _ROWS}
        self._mine = MetricsOfAll._families
        self._series: dict[tuple[int, Row], Any] = {}

    def _family(self, name: str, metric_types: Any) -> Any:
        metric = _ROWS[name]
        labels = [*self._labelnames, *metric.labels]
        if metric.kind is Kind.GAUGE:
            return metric_types[Gauge](name, metric.help, labels, multiprocess_mode="mostrecent")
        return metric_types[Counter](name, metric.help, labels)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Enter what `FerryStats.to_dict` made."""
        for row, growth in transfer_stats_data[_COUNTERS].items():
            self._of(row, engine_idx).inc(growth)
        for row, value in transfer_stats_data[_GAUGES].items():
            self._of(row, engine_idx).set(value)
        for label, data in transfer_stats_data[_OTHERS].items():
            if label in self._others:
                self._others[label].observe(data, engine_idx)

    def _of(self, row: Row, engine_idx: int) -> Any:
        if (engine_idx, row) not in self._series:
            name, *labels = row
            self._series[engine_idx, row] = self._mine[name].labels(*self.per_engine_labelvalues[engine_idx], *labels)
        return self._series[engine_idx, row]
