"""The agent's lock: whoever uses the core waits for one message at most, and never for a peer's geometry."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from kvferry.clock import SystemClock
from kvferry.errors import TransferError
from kvferry.p2p import messages as m
from kvferry.p2p.actions import GroupRule, LocalEngine
from kvferry.p2p.agent import HelloQueue, P2PAgent
from kvferry.p2p.control import Connected, ControlChannel, ControlSettings
from kvferry.p2p.core import P2PCore, random_id

DEADLINE_S = 30


def until(holds: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


class Agents:
    def __init__(self) -> None:
        self.made: list[Any] = []

    def agent(self, check: Callable[[bytes, bytes, bool], list[str]]) -> P2PAgent:
        def make_core(address: Any) -> P2PCore:
            me = "id", random_id(), address.host, address.port, 1, b"ours"
            local = LocalEngine(*me, transports={"fake": (b"",)}, groups=(GroupRule(4),))
            return P2PCore(local, check)

        self.made.append(P2PAgent(ControlSettings(), make_core, SystemClock()))
        return self.made[-1]

    def peer_of(self, agent: P2PAgent) -> tuple[ControlChannel[Any], str]:
        channel: ControlChannel[Any] = ControlChannel(ControlSettings(), m.CODEC)
        self.made.append(channel)
        name = str(agent.address)
        channel.connect(name)
        until(lambda: (name, Connected()) in channel.poll())
        return channel, name


@pytest.fixture
def agents() -> Iterator[Agents]:
    made = Agents()
    yield made
    for each in reversed(made.made):
        each.close()


def hello(geometry: bytes = b"theirs", **fields: Any) -> m.Hello:
    return m.Hello("e", m.PROTOCOL, geometry, {"fake": (b"",)}, 0, random_id(), False, generation=random_id(), **fields)


def test_a_peers_geometry_is_checked_while_others_use_the_core(agents: Agents) -> None:
    checking, go_on = threading.Event(), threading.Event()
    known: dict[bytes, list[str]] = {}

    def check(local: bytes, remote: bytes, is_from_remote: bool) -> list[str]:
        if remote not in known:
            checking.set()
            assert go_on.wait(DEADLINE_S), "the core could not be used meanwhile"
            known[remote] = ["no"]
        return known[remote]

    agent = agents.agent(check)
    peer, name = agents.peer_of(agent)
    peer.send(name, hello())
    assert checking.wait(DEADLINE_S)
    assert agent.use(lambda core, now: core.snapshot()["peers"]) == []
    go_on.set()
    until(lambda: any(isinstance(item, m.HelloRefused) for _, item in peer.poll()))


def test_whoever_waits_for_the_core_is_next(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = agents.agent(lambda *_: [])
    heard: list[str] = []
    heard_before_use: list[int] = []
    user = threading.Thread(target=lambda: agent.use(lambda core, now: heard_before_use.append(len(heard))))

    def message(peer: str, item: Any, now: float) -> None:
        heard.append(peer)
        if len(heard) == 10:
            user.start()
            until(agent._queue.locked)  # it waits for us

    to = {"generation": random_id(), "claim_id": random_id(), "to": random_id()}
    batches = [[(f"@{number}", m.Renew(**to)) for number in range(1000)]]
    monkeypatch.setattr(agent._core, "message", message)
    monkeypatch.setattr(agent._channel, "poll", lambda: batches.pop() if batches else [])
    agent._news.set()
    until(lambda: len(heard) == 1000)
    user.join(DEADLINE_S)
    assert heard_before_use == [10]


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_checks_of_hellos_take_a_part_of_the_time_and_dear_ones_wait_longest() -> None:
    clock = Clock()
    queue = HelloQueue(clock)
    for number in range(200):
        queue.put(f"stranger {number}", hello(bytes(1 << 20)))
    assert len(queue) < 9, "what waits is bounded"
    queue.put("honest", hello(bytes(5000)))
    taken, in_checks_s = [], 0.0
    while queue:
        while not queue.may_check():
            clock.now_s += max(1e-6, queue.wait_s())
        with queue.checking():
            taken.append(queue.take()[0])
            clock.now_s += 0.2
            in_checks_s += 0.2
    assert taken[0] == "honest"
    assert in_checks_s <= 0.2 * clock.now_s + 0.4


def test_an_engine_gets_through_a_flood_of_dear_hellos(agents: Agents) -> None:
    """Strangers ask without end for checks that take long; the time that goes into these is counted, not felt."""
    checked: list[bytes] = []

    def check(local: bytes, remote: bytes, is_from_remote: bool) -> list[str]:
        if remote not in checked:
            checked.append(remote)
            if len(remote) > 1000:
                time.sleep(0.05)  # not work: this machine's cores are busy enough
        return ["no"] if len(remote) > 1000 else []

    agent = agents.agent(check)
    strangers = [agents.peer_of(agent) for _ in range(4)]
    honest, name = agents.peer_of(agent)
    begun_s, num_sent, is_answered = time.monotonic(), 0, False
    while not is_answered:
        assert time.monotonic() < begun_s + DEADLINE_S, "the engine's Hello is not answered"
        for channel, its_name in strangers:
            with suppress(TransferError):
                channel.send(its_name, hello(num_sent.to_bytes(4, "big") + bytes(100_000)))
            num_sent += 1
        if num_sent % 40 == 0:
            honest.send(name, hello(b"ours"))
        is_answered = any(isinstance(item, m.Hello) and item.is_answer for _, item in honest.poll())
        time.sleep(0.002)
    num_dear = sum(len(remote) > 1000 for remote in checked)
    assert 0.05 * num_dear <= 0.25 * (time.monotonic() - begun_s) + 0.5
