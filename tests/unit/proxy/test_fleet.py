"""Who takes the next leg, and what readiness means."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.clock import FakeClock
from kvferry.proxy.config import ProxyConfig
from kvferry.proxy.fleet import Engine, Fleet
from kvferry.proxy.metrics import ProxyMetrics

LONG = list(range(20))


def make(num_prefill: int = 2, num_decode: int = 2, **settings: Any) -> tuple[Fleet, FakeClock]:
    config = ProxyConfig.parse(
        {
            "prefill": [f"http://p:{i + 1}" for i in range(num_prefill)],
            "decode": [f"http://d:{i + 1}" for i in range(num_decode)],
            **settings,
        }
    )
    clock = FakeClock()
    return Fleet(config, clock, ProxyMetrics()), clock


def take_out(fleet: Fleet, engine: Engine, is_gone: bool = False) -> None:
    for _ in range(fleet.config.failure_threshold):
        fleet.failed(engine, "why not", is_gone=is_gone)


def test_prefill_goes_where_the_prefix_is() -> None:
    fleet, _ = make()
    first, second = fleet.prefill
    second.memory.remember(LONG[:10])
    assert fleet.pick_prefill(LONG) is second
    first.memory.remember(LONG[:15])
    assert fleet.pick_prefill(LONG) is first
    assert fleet.pick_prefill([77, *LONG]) is first, "no prefix in common: the first of equals"


def test_a_queue_can_outweigh_a_prefix() -> None:
    fleet, _ = make()
    first, second = fleet.prefill
    second.memory.remember(LONG)
    with fleet.using(second, 15):
        assert fleet.pick_prefill(LONG) is second, "15 to wait for and 1 to compute, against 21"
        with fleet.using(second, 10):
            assert fleet.pick_prefill(LONG) is first
    assert fleet.pick_prefill(LONG) is second


def test_short_prompts_take_turns() -> None:
    fleet, _ = make()
    picked = []
    for _ in range(4):
        engine = fleet.pick_prefill([])
        assert engine is not None
        with fleet.using(engine, 1):
            picked.append(engine.url)
    assert picked == ["http://p:1", "http://p:2"] * 2


def test_decode_goes_to_the_least_busy() -> None:
    fleet, _ = make()
    first, second = fleet.decode
    with fleet.using(first, 1):
        assert fleet.pick_decode(None) is second
        with fleet.using(second, 1), fleet.using(second, 1):
            assert fleet.pick_decode(None) is first


def test_tried_engines_come_last_but_come() -> None:
    fleet, _ = make()
    first, second = fleet.prefill
    second.memory.remember(LONG)
    assert fleet.pick_prefill(LONG, {second}) is first
    take_out(fleet, first)
    assert fleet.pick_prefill(LONG, {second}) is second


def test_out_of_rotation_and_back_with_one_trial_and_no_memory() -> None:
    fleet, clock = make(num_prefill=1)
    (engine,) = fleet.prefill
    engine.memory.remember(LONG)
    take_out(fleet, engine)
    assert fleet.pick_prefill(LONG) is None
    assert engine.memory.num_known(LONG) == len(LONG), "it answers errors, but it lives"
    take_out(fleet, engine, is_gone=True)
    assert engine.memory.num_known(LONG) == 0
    clock.advance(0.5)
    assert fleet.pick_prefill(LONG) is engine
    with fleet.using(engine, 1):
        assert fleet.pick_prefill(LONG) is None, "one trial at a time"
    assert fleet.pick_prefill(LONG) is engine, "the trial's client left: it said nothing"
    fleet.worked(engine)
    assert fleet.pick_prefill(LONG) is engine


def test_long_stream_that_was_a_trial_ends_during_another_trial() -> None:
    fleet, clock = make(num_decode=1)
    (engine,) = fleet.decode
    take_out(fleet, engine)
    clock.advance(0.5)
    with fleet.using(engine, 1):
        fleet.worked(engine)
        take_out(fleet, engine)
        clock.advance(0.5)
        later = fleet.using(engine, 1)
        later.__enter__()
    assert fleet.pick_decode(None) is None, "one trial at a time"
    fleet.failed(engine, "why not")
    later.__exit__(None, None, None)
    clock.advance(0.999)
    assert fleet.pick_decode(None) is None, "the backoff was doubled"
    clock.advance(0.001)
    assert fleet.pick_decode(None) is engine


def test_pair_that_does_not_transfer_is_not_used_but_its_engines_are() -> None:
    fleet, _ = make()
    (p1, p2), (d1, d2) = fleet.prefill, fleet.decode
    for _ in range(3):
        fleet.not_transferred(fleet.pairs[p1, d1], "no link")
    assert fleet.pick_decode(p1) is d2
    assert fleet.pick_decode(p2) is d1
    told = {(pair["prefill"], pair["decode"]): pair["last_failure"] for pair in fleet.describe()["pairs"]}
    assert told[p1.url, d1.url] == "no link"
    assert told[p1.url, d2.url] == "not tried yet"
    take_out(fleet, d2)
    assert fleet.pick_prefill([]) is p2, "the other one has nobody to hand over to"


def test_leaving_rotation_and_coming_back_is_logged_once_each_of_engines_and_pairs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fleet, clock = make(1, 1)
    ((prefill, _), pair) = next(iter(fleet.pairs.items()))
    with caplog.at_level("INFO"):
        for _ in range(4):
            fleet.not_transferred(pair, "no link")
            fleet.failed(prefill, "no answer")
        clock.advance(0.5)
        for _ in range(2):
            fleet.transferred(pair)
            fleet.worked(prefill)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "transfers from http://p:1 to http://d:1 are out of rotation: no link"),
        ("WARNING", "prefill engine http://p:1 is out of rotation: no answer"),
        ("INFO", "transfers from http://p:1 to http://d:1 are back in rotation"),
        ("INFO", "prefill engine http://p:1 is back in rotation"),
    ]


@pytest.mark.parametrize("strict", [True, False])
def test_ready_means_that_kv_was_seen_to_move(strict: bool) -> None:
    fleet, _ = make(1, 1, strict=strict)
    ((prefill, decode), pair) = next(iter(fleet.pairs.items()))
    assert not fleet.is_ready
    fleet.worked(prefill)
    fleet.worked(decode)
    assert fleet.is_ready == (not strict), "answers are there, transfers not"
    fleet.transferred(pair)
    assert fleet.is_ready
    take_out(fleet, decode)
    assert not fleet.is_ready
    fleet.worked(decode)
    pair.transfers = False
    assert fleet.is_ready == (not strict)


def test_ready_without_probes_is_until_something_fails() -> None:
    fleet, _ = make(1, 1, probe_interval_s=0)
    assert fleet.is_ready
    pair = next(iter(fleet.pairs.values()))
    fleet.not_transferred(pair, "lost")
    assert not fleet.is_ready


def test_last_failure_is_told_from_the_first_one_until_it_works() -> None:
    fleet, _ = make(1, 1)
    (engine,) = fleet.prefill

    def told() -> object:
        return fleet.describe()["engines"][0].get("last_failure")

    assert told() == "not tried yet"
    fleet.failed(engine, "status 501")
    assert (told(), fleet.problems()) == ("status 501", []), "it is in rotation still"
    fleet.worked(engine)
    assert told() is None
    take_out(fleet, engine)
    (problem,) = fleet.problems()
    assert problem.startswith(f"prefill engine {engine.url} is out of rotation: ")


def test_recompute_that_is_no_fault_is_told_but_takes_nobody_out() -> None:
    fleet, _ = make(1, 1, strict=False)
    ((prefill, decode), pair) = next(iter(fleet.pairs.items()))
    for _ in range(9):
        fleet.not_transferred(pair, "computed again", is_fault=False)
    assert fleet.pick_decode(prefill) is decode
    assert fleet.describe()["pairs"][0]["last_failure"] == "computed again"
    fleet.transferred(pair)
    assert "last_failure" not in fleet.describe()["pairs"][0]


def test_retry_after_is_the_shortest_wait() -> None:
    fleet, clock = make(1, 1, min_backoff_s=5, max_backoff_s=20)
    assert fleet.wait_s == 1
    take_out(fleet, fleet.prefill[0])
    clock.advance(1)
    take_out(fleet, fleet.decode[0])
    assert fleet.wait_s == 4


def test_full_engine_stays_in_rotation_and_comes_last_until_it_may_be_asked() -> None:
    fleet, clock = make(failure_threshold=1, probe_interval_s=0)
    first, second = fleet.decode
    fleet.full(first, 3.0)
    assert fleet.is_ready
    assert fleet.problems() == []
    with fleet.using(second, 5):
        assert fleet.pick_decode(None) is second, "busy, yet with room"
        assert fleet.until_room_s(first, fleet.prefill[0]) == 0.0
        fleet.full(second, 2.0)
        assert fleet.pick_decode(None) is first, "all are full: somebody is still asked"
        assert fleet.until_room_s(first, fleet.prefill[0]) == 2.0
        clock.advance(2.5)
        assert fleet.pick_decode(None) is second
        clock.advance(0.5)
        assert fleet.pick_decode(None) is first
