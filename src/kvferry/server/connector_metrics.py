"""What connectors say of themselves, as metrics: one set of rows for all of them."""

from __future__ import annotations

from kvferry.contract import ConnectorStats
from kvferry.contract.stats_rows import StatsRow, connector_rows
from kvferry.metrics import METRICS, Kind, Metrics

_GAUGES = frozenset(metric.name for metric in METRICS if metric.kind is Kind.GAUGE)
_OPEN_LABELS = {
    metric.name: [(i, label) for i, label in enumerate(metric.labels) if label in metric.open_labels]
    for metric in METRICS
}


class ConnectorMetrics:
    """Enters a connector's totals into the rows `kvferry:connector_...`. One thread."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._metrics = metrics
        self._name = name
        self._known: set[tuple[tuple[str, str], ...]] = set()

    def enter(self, stats: ConnectorStats | None) -> None:
        """Take the totals of one connector in, and of its children under `parent/label`."""
        if stats is not None:
            for row in connector_rows(self._name, stats):
                self._enter(row)

    def _enter(self, row: StatsRow) -> None:
        self._begin({label: row.labels[i] for i, label in _OPEN_LABELS[row.metric]})
        if row.metric in _GAUGES:
            self._metrics.set(row.metric, row.value, *row.labels)
        else:
            self._metrics.follow(row.metric, row.value, *row.labels)

    def _begin(self, values: dict[str, str]) -> None:
        key = tuple(values.items())
        if key not in self._known:
            self._known.add(key)
            self._metrics.begin(**values)
