"""The log's line of what the server did lately."""

from __future__ import annotations

import logging

import pytest

from kvferry.clock import FakeClock
from kvferry.contract import ConnectorStats
from kvferry.contract.stats import MediumStats
from kvferry.engine.outputs import RequestMetrics, RequestOutput, SchedulerStats
from kvferry.server.progress import ProgressLog

STATS = SchedulerStats(num_running=2, num_waiting=1, num_loading=3, num_preemptions=0, kv_cache_usage=0.25)
TIERS = ConnectorStats(
    media={
        "host": MediumStats(used_bytes=10**9, capacity_bytes=4 * 10**9),
        "fs": MediumStats(used_bytes=2 * 10**9, capacity_bytes=None),
        "p2p": MediumStats(),
    }
)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_line_says_rates_hits_and_how_full_all_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = FakeClock()
    progress = ProgressLog(10.0, clock)
    progress.prompt_done(RequestOutput("r", None, list(range(100)), [], 75, 50, RequestMetrics(0.1, None), False))
    progress.generated(40)
    clock.advance(9.0)
    progress.step_done(STATS, ConnectorStats(children={"one": TIERS}))
    assert lines(caplog) == []
    clock.advance(1.0)
    progress.step_done(STATS, ConnectorStats(children={"one": TIERS}))
    assert lines(caplog) == [
        (
            "last 10 s: 10.0 prompt tokens/s (hits: 25% in the KV cache, 50% by the connector); "
            "4.0 generated tokens/s; 2 running, 4 waiting; KV cache 25% in use; "
            "one/host 1.00 of 4.00 GB; one/fs 2.00 GB"
        )
    ]


@pytest.mark.parametrize(("interval_s", "num_tokens"), [(10.0, 0), (0.0, 5)], ids=["nothing happened", "switched off"])
def test_no_line(interval_s: float, num_tokens: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = FakeClock()
    progress = ProgressLog(interval_s, clock)
    progress.generated(num_tokens)
    clock.advance(20.0)
    progress.step_done(STATS, None)
    assert lines(caplog) == []
