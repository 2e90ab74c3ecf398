"""Strangers at the sockets of KV events: what they may send, hold and take, beside a subscriber that behaves."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq
from tests.kv_event_client import GREETING, Subscriber, connect, hears, ready, stranger, until

from kvferry import kv_events, zmtp
from kvferry.kv_events import BlockRemoved, EventPublisher, KVEventsConfig


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


def rss_bytes(process: int | str = "self") -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096


class ChildPublisher:
    """A publisher in a process of its own."""

    PROGRAM = """
import sys
from kvferry.kv_events import BlockRemoved, EventPublisher, KVEventsConfig
config = {"endpoint": sys.argv[1], "replay_endpoint": sys.argv[2]}
publisher = EventPublisher(KVEventsConfig(enable_kv_cache_events=True, **config))
print(publisher.endpoint, publisher.replay_endpoint, flush=True)
for _ in sys.stdin:
    publisher.publish([BlockRemoved([b"mark"], "GPU")])
"""

    def __init__(self, endpoint: str, replay_endpoint: str) -> None:
        command = [sys.executable, "-c", self.PROGRAM, endpoint, replay_endpoint]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self.process.stdout is not None
        self.endpoint, self.replay_endpoint = self.process.stdout.readline().decode().split()
        self.num_messages = 0

    def publish(self, _: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.num_messages += 1

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


ENDPOINTS = pytest.mark.parametrize(("endpoint", "kind"), [("endpoint", b"SUB"), ("replay_endpoint", b"DEALER")])


@ENDPOINTS
def test_a_frame_that_is_announced_as_huge_is_not_waited_for(published, endpoint: str, kind: bytes) -> None:
    publisher, subscriber = published
    with stranger(getattr(publisher, endpoint), kind) as connection:
        connection.sendall(b"\x02" + (800 << 20).to_bytes(8, "big") + b"x" * 1000)
        assert is_cut(connection)
    hears(publisher, subscriber)


@pytest.fixture(params=["tcp", "ipc"])
def apart(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[ChildPublisher, Subscriber]]:
    """A publisher in a process of its own, whose memory is its own too; and a subscriber that it has reached."""
    is_ipc = request.param == "ipc"
    endpoints = [f"ipc://{tmp_path}/{name}" if is_ipc else "tcp://127.0.0.1:0" for name in ("pub", "replay")]
    with ExitStack() as stack:
        publisher = ChildPublisher(*endpoints)
        stack.callback(publisher.close)
        subscriber = Subscriber(publisher.endpoint, publisher.replay_endpoint)
        stack.callback(subscriber.close)
        hears(publisher, subscriber)
        yield publisher, subscriber


@ENDPOINTS
def test_a_flood_is_cut_and_nothing_of_it_is_kept(apart, endpoint: str, kind: bytes) -> None:
    """On one socket topics to subscribe to, each another; on the other one requests for replay."""
    publisher, subscriber = apart
    before = rss_bytes(publisher.process.pid)
    with stranger(getattr(publisher, endpoint), kind) as connection:
        connection.settimeout(1)  # who is cut while its window is closed hears of it only when it reads
        with suppress(OSError):
            for number in range(6 * 20_000):  # 30 MB
                connection.sendall(b"\0\xfb\1" + number.to_bytes(4, "big") + bytes(246))
        assert is_cut(connection)
    assert rss_bytes(publisher.process.pid) - before < 20 << 20
    hears(publisher, subscriber)


@ENDPOINTS
@pytest.mark.parametrize("said", [b"", GREETING[:10], GREETING, GREETING + ready(b"SUB")[:9]])
def test_a_handshake_that_does_not_end_is_cut(
    published, monkeypatch: pytest.MonkeyPatch, endpoint: str, kind: bytes, said: bytes
) -> None:
    monkeypatch.setattr(zmtp, "_HANDSHAKE_S", 0.05)
    publisher, _ = published
    with connect(getattr(publisher, endpoint)) as connection:
        connection.sendall(said)
        assert is_cut(connection)


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
            crowd.append(stack.enter_context(connect(getattr(publisher, endpoint))))
            with suppress(ConnectionError):
                crowd[-1].sendall(GREETING + ready(kind))
        deadline_s = time.monotonic() + 30
        while sum(is_cut(each, 0.01) for each in crowd) < 30 - 8:
            assert time.monotonic() < deadline_s, "the crowd is let in"
        hears(publisher, subscriber)


def test_strangers_who_come_again_and_again_leave_nothing(apart) -> None:
    """Whole messages, few enough not to be cut, and gone; libzmq kept 80 KB of each of them for ever."""
    publisher, subscriber = apart
    for endpoint, kind in ((publisher.endpoint, b"SUB"), (publisher.replay_endpoint, b"DEALER")):
        before = rss_bytes(publisher.process.pid)
        for i in range(600):
            with suppress(OSError), stranger(endpoint, kind) as connection:
                content = b"\1" + i.to_bytes(8, "big") + bytes(231)
                connection.sendall((b"\0\xf0" + content) * 150)
            if i % 200 == 0:
                hears(publisher, subscriber)
        hears(publisher, subscriber)
        assert rss_bytes(publisher.process.pid) - before < 20 << 20


@ENDPOINTS
def test_random_bytes_hurt_nobody(published, endpoint: str, kind: bytes) -> None:
    publisher, subscriber = published
    rng = random.Random(20)
    for _ in range(60):
        said = bytearray(GREETING + ready(kind))
        for _ in range(rng.randrange(12)):
            content = rng.choice((b"", b"\1", b"\x04PING\0\0", b"\x09SUBSCRIBE", b"\x06CANCEL")) + rng.randbytes(9)
            said += bytes((rng.choice((0, 0, 1, 4, 4, rng.randrange(256))), len(content))) + content
        for _ in range(rng.randrange(4)):
            said[rng.randrange(len(said))] = rng.randrange(256)
        del said[rng.choice((len(said), rng.randrange(len(said)))) :]
        with connect(getattr(publisher, endpoint)) as connection, suppress(ConnectionError):
            for at in range(0, len(said), step := rng.choice((1, 7, 1000))):
                connection.sendall(said[at : at + step])
    hears(publisher, subscriber)


@pytest.mark.parametrize(("hwm", "behind_bytes", "num_kept"), [(10, 64 << 20, 10), (100_000, 1, 1)])
def test_who_is_slow_loses_only_the_oldest_and_delays_nobody(
    monkeypatch: pytest.MonkeyPatch, hwm: int, behind_bytes: int, num_kept: int
) -> None:
    """A subscriber that does not read; 10 MB pass it by, of which it gets the last messages."""
    monkeypatch.setattr(kv_events, "_BEHIND_BYTES", behind_bytes)
    settings = KVEventsConfig(enable_kv_cache_events=True, endpoint="tcp://127.0.0.1:0", hwm=hwm, buffer_steps=1)
    publisher = EventPublisher(settings)
    with ExitStack() as stack:
        stack.callback(publisher.shutdown)
        subscriber = Subscriber(publisher.endpoint)
        stack.callback(subscriber.close)
        slow = stack.enter_context(stranger(publisher.endpoint, b"SUB", receive_bytes=64 << 10))
        slow.sendall(b"\0\1\1")
        until(lambda: publisher.publish([]) or subscriber.receive(20))
        slow.recv(1)  # it is subscribed
        for number in range(320):
            publisher.publish([BlockRemoved([number.to_bytes(4, "big") * 8000], "GPU")])
            if number % 8 == 0:
                until(lambda: not publisher._queue)
        last = publisher.num_messages - 1
        heard = subscriber.receive()
        while heard is not None and heard[1] < last:
            heard = subscriber.receive()
        assert heard is not None
        until(lambda: len(publisher._log._messages) <= num_kept + 1)
        received = b""
        while last.to_bytes(8, "big") not in received[-33_000:]:
            received += slow.recv(1 << 16)
        numbers = [number for number in range(last + 1) if b"\1\x08" + number.to_bytes(8, "big") in received]
        assert num_kept <= len(numbers) < 200
        assert numbers[-num_kept:] == list(range(last + 1 - num_kept, last + 1))


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
        replaying = publisher._listeners[1][0].connections
        assert len(replaying) == 9
        assert max(each.unsent_bytes for each in replaying) < 256 << 10
        assert rss_bytes() - before < 150 << 20, "8 answers of 40 MB would be 320 MB"
        numbers = []  # who goes on reading gets all of it
        while (message := idle[0].recv_multipart())[2] != b"\xff" * 8:
            numbers.append(int.from_bytes(message[2], "big"))
        assert numbers == list(range(1000))
