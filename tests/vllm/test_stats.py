"""Our statistics on vLLM's way: growth per step, over its wire, into its log and its /metrics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from kvferry.contract import ConnectorStats, MediumStats
from kvferry.vllm import OffloadingConnector
from kvferry.vllm.stats import FerryStats, MetricsOfAll, StatsTeller

LOADS, USED = "kvferry:connector_loads", "kvferry:connector_used_bytes"
CONFIG = SimpleNamespace(kv_transfer_config=None)
TYPES = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}


def told(loads: int, used: int = 5) -> ConnectorStats:
    return ConnectorStats({"host": MediumStats(num_loads=loads, used_bytes=used, failures={"load KeyError": loads})})


def sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"model_name": "m", "engine": "0", "connector": "C", **labels})


def over_the_wire(stats: FerryStats) -> dict[str, Any]:
    outputs = EngineCoreOutputs(scheduler_stats=SchedulerStats(kv_connector_stats=stats.to_dict()))
    received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(outputs))
    found: dict[str, Any] = received.scheduler_stats.kv_connector_stats
    return found


def test_totals_become_growth_and_nothing_is_told_twice() -> None:
    teller = StatsTeller("C")
    first = teller.changes(told(3))
    assert first is not None
    assert first.data["counters"][LOADS, "C", "host"] == 3
    assert first.data["counters"]["kvferry:connector_stores", "C", "host"] == 0, "series stand from the start"
    assert first.data["gauges"][USED, "C", "host"] == 5
    assert teller.changes(told(3)) is None
    assert teller.changes(None) is None
    second = teller.changes(told(7, used=4))
    assert second is not None
    assert second.data["counters"] == {
        (LOADS, "C", "host"): 4,
        ("kvferry:connector_failures", "C", "host", "load other"): 4,
    }
    assert second.data["gauges"] == {(USED, "C", "host"): 4}
    assert teller.changes(told(6, used=4)) is None, "a total that falls is not followed"


def test_growth_of_steps_and_ranks_adds_up_and_the_log_shows_it() -> None:
    teller = StatsTeller("C")
    first, second = teller.changes(told(3)), teller.changes(told(7, used=4))
    assert first is not None
    assert second is not None
    total = first.aggregate(second)
    assert total.reduce() == {"loads.host": 7, "failures.host.load other": 7}
    assert total.data["gauges"][USED, "C", "host"] == 4
    assert not total.is_empty()
    total.reset()
    assert total.is_empty()
    assert total.reduce() == {}


def test_metrics_of_what_came_over_vllms_wire() -> None:
    teller = StatsTeller("C")
    for _ in range(2):  # a second engine in one process must not clash with the first
        metrics = OffloadingConnector.build_prom_metrics(CONFIG, TYPES, ["model_name", "engine"], {0: ["m", "0"]})
    for totals in (told(3), told(7, used=4)):
        stats = teller.changes(totals)
        assert stats is not None
        data = over_the_wire(stats)
        metrics.observe(data, 0)
        rebuilt = OffloadingConnector.build_kv_connector_stats(data)
        assert rebuilt.reduce() == stats.reduce()
    assert sample(f"{LOADS}_total", medium="host") == 7
    assert sample("kvferry:connector_failures_total", medium="host", reason="load other") == 7
    assert sample(USED, medium="host") == 4
    assert sample("kvferry:connector_capacity_bytes", medium="host") == float("inf")


class Theirs(KVConnectorStats):  # type: ignore[misc]
    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        return Theirs({"n": self.data["n"] + other.data["n"]})

    def is_empty(self) -> bool:
        return not self.data["n"]


class TheirMetrics:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def observe(self, data: dict[str, Any], engine_idx: int) -> None:
        self.seen.append((data, engine_idx))


def test_children_of_a_multi_connector_are_named_and_others_keep_their_own_kind() -> None:
    def step(loads: int, n: int) -> FerryStats:
        inner, outer = FerryStats(), FerryStats()
        inner.add_child("Inner", "A", StatsTeller("A").changes(told(loads)))
        inner.add_child("Inner", "X", Theirs({"n": n}))
        outer.add_child("Multi", "Inner", inner)
        outer.add_child("Multi", "B", None)
        outer.add_child("Multi", "Y", Theirs({"n": 0}))
        return outer

    total = step(2, 10).aggregate(step(3, 20))
    assert total.data["counters"][LOADS, "Multi/Inner/A", "host"] == 5
    data = over_the_wire(total)
    assert data["others"] == {"Inner/X": {"n": 30}}
    theirs = TheirMetrics()
    metrics = MetricsOfAll(CONFIG, TYPES, ["model_name", "engine"], {1: ["m", "1"]}, others={"Inner/X": theirs})
    metrics.observe(data, 1)
    metrics.observe({**data, "others": {"unknown": {}}}, 1)
    assert theirs.seen == [({"n": 30}, 1)]
    assert OffloadingConnector.build_kv_connector_stats(data).data["others"] == {}


def test_a_row_that_the_table_lacks_is_an_error() -> None:
    metrics = MetricsOfAll(CONFIG, TYPES, ["model_name", "engine"], {0: ["m", "0"]})
    with pytest.raises(KeyError):
        metrics.observe({"counters": {("kvferry:unknown", "C"): 1}, "gauges": {}, "others": {}})
