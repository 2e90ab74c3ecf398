from __future__ import annotations

import threading

from kvferry.errors import TierUnavailable
from kvferry.offloading.tiers.io_threads import IoThreads, Urgency


def test_loads_before_stores_before_chores_and_failures_are_told() -> None:
    gate = threading.Event()
    entered = threading.Event()
    ran: list[str] = []

    def act(work: str) -> None:
        if work == "first":
            entered.set()
            gate.wait(20)
        ran.append(work)
        if work == "load 2":
            raise KeyError(work)

    threads: IoThreads[str] = IoThreads("test", 1, act)
    threads.submit(Urgency.STORE, "first")
    assert entered.wait(20)
    for urgency, work in ((Urgency.CHORE, "chore"), (Urgency.STORE, "store"), (Urgency.LOAD, "load 1")):
        threads.submit(urgency, work)
    threads.submit(Urgency.LOAD, "load 2")
    assert not threads.drain(0.01)
    assert threads.take_done() == []
    gate.set()
    assert threads.drain(20)
    done = threads.take_done()
    assert ran[0] == "first"
    assert ran.index("load 1") < ran.index("load 2") < ran.index("store") < ran.index("chore")
    assert [item.work for item in done] == ran
    assert [item.work for item in done if isinstance(item.error, KeyError)] == ["load 2"]
    assert threads.close(20)


def test_close_gives_up_what_waits_except_chores_and_says_when_stuck() -> None:
    gate = threading.Event()
    entered = threading.Event()

    def act(work: str) -> None:
        entered.set()
        gate.wait(20)

    threads: IoThreads[str] = IoThreads("test", 1, act)
    threads.submit(Urgency.STORE, "runs")
    entered.wait(20)
    threads.submit(Urgency.LOAD, "load")
    threads.submit(Urgency.CHORE, "chore")
    assert not threads.close(0.01)
    assert [(item.work, type(item.error)) for item in threads.take_done()] == [("load", TierUnavailable)]
    threads.submit(Urgency.CHORE, "late")
    gate.set()
    assert threads.close(20)
    assert {item.work for item in threads.take_done()} == {"late", "runs", "chore"}
