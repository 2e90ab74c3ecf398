"""Strangers at the sockets of KV events: what they may send, hold and take, beside a subscriber that behaves."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq
from tests.kv_event_client import Subscriber

from kvferry import kv_events
from kvferry.kv_events import BlockRemoved, EventPublisher, KVEventsConfig

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)


def ready(kind: bytes) -> bytes:
    content = b"\x05READY\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind
    return b"\x04" + bytes((len(content),)) + content


@pytest.fixture
def published() -> Iterator[tuple[EventPublisher, Subscriber]]:
    publisher = EventPublisher(
        KVEventsConfig(
            enable_kv_cache_events=True, endpoint="tcp://127.0.0.1:0", replay_endpoint="tcp://127.0.0.1:*",
            buffer_steps=1000,
        )
    )  # fmt: skip
    subscriber = Subscriber(publisher.endpoint, publisher.replay_endpoint)
    yield publisher, subscriber
    subscriber.close()
    publisher.shutdown()


def hears(publisher: EventPublisher, subscriber: Subscriber) -> None:
    """The subscriber gets what is published from now on."""
    deadline_s = time.monotonic() + 30
    while True:
        assert time.monotonic() < deadline_s, "nothing comes"
        publisher.publish([BlockRemoved([b"mark"], "GPU")])
        if subscriber.receive(200) is not None:
            break
    until(lambda: [number for number, _ in subscriber.replay(publisher.num_messages - 1)])


def stranger(endpoint: str, kind: bytes) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2])), timeout=20)
    made.sendall(GREETING)
    received = b""
    while len(received) < 64:
        received += made.recv(64 - len(received))
    made.sendall(ready(kind))
    return made


def is_cut(connection: socket.socket, timeout_s: float = 20) -> bool:
    connection.settimeout(timeout_s)
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


ENDPOINTS = pytest.mark.parametrize(("endpoint", "kind"), [("endpoint", b"SUB"), ("replay_endpoint", b"DEALER")])


@ENDPOINTS
def test_a_frame_that_is_announced_as_huge_is_not_waited_for(published, endpoint: str, kind: bytes) -> None:
    publisher, subscriber = published
    with stranger(getattr(publisher, endpoint), kind) as connection:
        connection.sendall(b"\x02" + (800 << 20).to_bytes(8, "big") + b"x" * 1000)
        assert is_cut(connection)
    hears(publisher, subscriber)


@ENDPOINTS
def test_a_flood_is_cut_and_nothing_of_it_is_kept(published, endpoint: str, kind: bytes) -> None:
    """On one socket topics to subscribe to, each another; on the other one requests for replay."""
    publisher, subscriber = published
    hears(publisher, subscriber)
    before = rss_bytes()
    with stranger(getattr(publisher, endpoint), kind) as connection:
        connection.settimeout(1)  # whose window closed before it was cut is not told when it sends, but when it reads
        with suppress(OSError):
            for number in range(6 * 20_000):  # 30 MB
                connection.sendall(b"\0\xfb\1" + number.to_bytes(4, "big") + bytes(246))
        assert is_cut(connection)
    assert rss_bytes() - before < 60 << 20
    hears(publisher, subscriber)


@ENDPOINTS
def test_connections_are_bounded_and_those_that_are_there_stay(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, kind: bytes
) -> None:
    monkeypatch.setattr(kv_events, "_MAX_SUBSCRIBERS", 8)
    monkeypatch.setattr(kv_events, "_MAX_REPLAYING", 8)
    settings: dict[str, Any] = {"endpoint": "tcp://127.0.0.1:0", "replay_endpoint": "tcp://127.0.0.1:*"}
    publisher = EventPublisher(KVEventsConfig(enable_kv_cache_events=True, **settings))
    subscriber = Subscriber(publisher.endpoint, publisher.replay_endpoint)
    with ExitStack() as stack:
        stack.callback(publisher.shutdown)
        stack.callback(subscriber.close)
        hears(publisher, subscriber)
        crowd = []
        for _ in range(30):
            address = "127.0.0.1", int(getattr(publisher, endpoint).rpartition(":")[2])
            crowd.append(stack.enter_context(socket.create_connection(address, timeout=20)))
            with suppress(ConnectionError):
                crowd[-1].sendall(GREETING + ready(kind))
        deadline_s = time.monotonic() + 30
        while sum(is_cut(each, 0.01) for each in crowd) < 30 - 8:
            assert time.monotonic() < deadline_s, "the crowd is let in"
        hears(publisher, subscriber)


def test_a_replay_nobody_reads_holds_little_and_delays_nobody(published) -> None:
    publisher, subscriber = published
    for number in range(1000):  # 40 MB
        publisher.publish([BlockRemoved([number.to_bytes(4, "big") * 10_000], "GPU")])
    until(lambda: len(subscriber.replay(999)) == 1)
    before = rss_bytes()
    with zmq.Context() as context, ExitStack() as stack:
        idle = []
        for _ in range(8):
            dealer = stack.enter_context(context.socket(zmq.DEALER))
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.RCVHWM, 1)
            dealer.connect(publisher.replay_endpoint)
            dealer.send_multipart((b"", bytes(8)))
            idle.append(dealer)
        assert all(dealer.poll(20_000) for dealer in idle), "its answer has begun"
        held = [number for number, _ in subscriber.replay(0)]
        assert held == list(range(1000))
        connections = publisher._watched[-1][-1]
        assert max(each.unsent_bytes() for each in connections._open.values()) < 2 << 20
        assert rss_bytes() - before < 150 << 20, "8 answers of 40 MB would be 320 MB"
        numbers = []  # who goes on reading gets all of it
        while (message := idle[0].recv_multipart())[2] != b"\xff" * 8:
            numbers.append(int.from_bytes(message[2], "big"))
        assert numbers == list(range(1000))


def until(holds: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
