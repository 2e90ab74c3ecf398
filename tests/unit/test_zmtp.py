"""The wire that KV events are published on: byte by byte, with other kinds of ZMQ sockets, and beside libzmq's PUB."""

from __future__ import annotations

import random
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq
from tests.kv_event_client import GREETING, Subscriber, connect, hears, stranger, until

from kvferry.errors import ConfigError
from kvferry.kv_events import BlockRemoved, EventPublisher, KVEventsConfig

NEWER = GREETING[:11] + b"\1" + GREETING[12:]  # ZMTP 3.1
TOPIC = b"kv-events"


@pytest.fixture
def published() -> Iterator[tuple[EventPublisher, Subscriber]]:
    publisher = make("tcp://127.0.0.1:0", replay_endpoint="tcp://127.0.0.1:*", topic=TOPIC.decode())
    subscriber = Subscriber(publisher.endpoint, publisher.replay_endpoint)
    yield publisher, subscriber
    subscriber.close()
    publisher.shutdown()


def make(endpoint: str, **settings: Any) -> EventPublisher:
    return EventPublisher(KVEventsConfig(enable_kv_cache_events=True, endpoint=endpoint, **settings))


def command(name: bytes, data: bytes = b"") -> bytes:
    content = bytes((len(name),)) + name + data
    return b"\4" + bytes((len(content),)) + content


class Raw:
    """A subscriber or client without libzmq: short frames, read one by one."""

    def __init__(self, endpoint: str, kind: bytes, greeting: bytes) -> None:
        self.connection = stranger(endpoint, kind, greeting)
        self.ready = self.frame()

    def frame(self) -> tuple[int, bytes]:
        flags, size = self._exactly(2)
        return flags, self._exactly(size)

    def message(self) -> list[bytes]:
        frames = []
        while True:
            flags, content = self.frame()
            frames.append(content)
            if not flags & 1:
                return frames

    def _exactly(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            got = self.connection.recv(size - len(found))
            assert got, "it has ended"
            found += got
        return found


def test_an_old_subscriber_gets_these_bytes(published) -> None:
    """ZMTP 3.0: a subscription is a message."""
    publisher, subscriber = published
    raw = Raw(publisher.endpoint, b"SUB", GREETING)
    with raw.connection:
        kind, value = b"\x0bSocket-Type", b"\0\0\0\3PUB"
        assert raw.ready[0] == 4
        assert raw.ready[1].startswith(b"\5READY")
        assert kind + value in raw.ready[1]
        raw.connection.sendall(b"\0\3\1kv")
        raw.connection.sendall(command(b"PING", b"\0\0mine"))
        assert raw.frame() == (4, b"\4PONGmine")
        publisher.publish([BlockRemoved([b"x" * 300], "GPU")])
        number = (publisher.num_messages - 1).to_bytes(8, "big")
        flags, topic = raw.frame()
        assert (flags, topic) == (1, TOPIC)
        assert raw.frame() == (1, number)
        flags, size = raw._exactly(2)  # 8 bytes of size
        size = int.from_bytes(bytes((size,)) + raw._exactly(7), "big")
        assert flags == 2
        assert b"x" * 300 in raw._exactly(size)
        raw.connection.sendall(b"\0\3\0kv")
        raw.connection.sendall(command(b"PING", b"\0\0"))
        assert raw.frame() == (4, b"\4PONG")
        hears(publisher, subscriber)
        raw.connection.sendall(command(b"PING", b"\0\0last"))
        assert raw.frame() == (4, b"\4PONGlast"), "and no message before it"


def test_the_first_answer_to_a_req_socket_is_the_first_message(published) -> None:
    publisher, subscriber = published
    hears(publisher, subscriber)
    with zmq.Context() as context, context.socket(zmq.REQ) as req:
        req.setsockopt(zmq.LINGER, 0)
        req.setsockopt(zmq.IDENTITY, b"\1me")
        req.connect(publisher.replay_endpoint)
        for wanted in (0, 0, 1 << 63):
            req.send(wanted.to_bytes(8, "big"))
            assert req.poll(20_000)
            topic, number, _ = req.recv_multipart()
            assert (topic, number) == ((TOPIC, bytes(8)) if wanted == 0 else (b"", b"\xff" * 8))


@pytest.mark.parametrize("kind", [b"PUSH", b"PUB", b""])
def test_other_kinds_of_sockets_are_not_served(published, kind: bytes) -> None:
    publisher, subscriber = published
    for endpoint in (publisher.endpoint, publisher.replay_endpoint):
        with stranger(endpoint, kind) as connection, suppress(ConnectionError):
            while connection.recv(4096):
                pass
    hears(publisher, subscriber)


def test_heartbeats_of_libzmq_are_answered(published) -> None:
    """Between a subscriber with heartbeats and the publisher stands one who counts the answers."""
    publisher, _ = published
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        sub = stack.enter_context(stack.enter_context(zmq.Context()).socket(zmq.SUB))
        for option, value in ((zmq.LINGER, 0), (zmq.HEARTBEAT_IVL, 10), (zmq.HEARTBEAT_TIMEOUT, 20_000)):
            sub.setsockopt(option, value)
        sub.connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        listener.settimeout(20)
        client = stack.enter_context(listener.accept()[0])
        server = stack.enter_context(connect(publisher.endpoint))
        threading.Thread(target=pass_on, args=(client, server), daemon=True).start()
        answered = b""
        while answered.count(b"\4PONG") < 3:
            got = server.recv(4096)
            assert got, "it has ended"
            answered += got
            client.sendall(got)


def pass_on(from_: socket.socket, to: socket.socket) -> None:
    with suppress(OSError):
        while got := from_.recv(4096):
            to.sendall(got)


def test_a_subscriber_gets_what_libzmq_would_send_it(published) -> None:
    """Random subscriptions, in both forms; the same bytes go to a PUB socket of libzmq."""
    publisher, subscriber = published
    hears(publisher, subscriber)
    rng = random.Random(7)
    prefixes = (b"", b"kv", TOPIC, b"kv-eventsx", b"kw")
    outcomes = set()
    with zmq.Context() as context, context.socket(zmq.PUB) as pub:
        pub.setsockopt(zmq.LINGER, 0)
        port = pub.bind_to_random_port("tcp://127.0.0.1")
        ours = Raw(publisher.endpoint, b"SUB", NEWER)
        theirs = Raw(f"tcp://127.0.0.1:{port}", b"SUB", NEWER)
        with ours.connection, theirs.connection:
            for turn in range(25):
                said = bytearray()
                for _ in range(rng.randrange(1, 4)):
                    prefix, is_wanted = rng.choice(prefixes), rng.random() < 0.3
                    if rng.random() < 0.5:
                        said += command(b"SUBSCRIBE" if is_wanted else b"CANCEL", prefix)
                    else:
                        said += bytes((0, 1 + len(prefix), is_wanted)) + prefix
                ours.connection.sendall(said)
                theirs.connection.sendall(said)
                expected = hears_of_libzmq(pub, theirs, b"\0turn %d" % turn)
                assert hears_of_ours(publisher, subscriber, ours) == expected, f"seed 7, turn {turn}"
                outcomes.add(expected)
    assert outcomes == {False, True}


def hears_of_libzmq(pub: zmq.Socket[bytes], raw: Raw, mark: bytes) -> bool:
    """A mark of its own shows that libzmq has taken in all subscriptions, and has sent all messages."""
    raw.connection.sendall(command(b"SUBSCRIBE", mark))
    pub.send_multipart((mark, b""))
    until(lambda: pub.send_multipart((mark, b"")) or select.select([raw.connection], [], [], 0.001)[0])
    pub.send_multipart((TOPIC, b"message"))
    pub.send_multipart((mark, b"last"))
    has_heard = False
    while (message := raw.message())[-1] != b"last":
        has_heard |= message[0] == TOPIC
    raw.connection.sendall(command(b"CANCEL", mark))
    return has_heard


def hears_of_ours(publisher: EventPublisher, subscriber: Subscriber, raw: Raw) -> bool:
    raw.connection.sendall(command(b"PING", b"\0\0before"))
    assert raw.frame() == (4, b"\4PONGbefore")
    publisher.publish([])
    number = publisher.num_messages - 1
    until(lambda: subscriber.replay(number))
    raw.connection.sendall(command(b"PING", b"\0\0after"))
    flags, content = raw.frame()
    if flags == 4:
        assert content == b"\4PONGafter"
        return False
    assert (flags, content) == (1, TOPIC)
    assert raw.message()[0] == number.to_bytes(8, "big")
    assert raw.frame() == (4, b"\4PONGafter")
    return True


def test_the_file_of_a_socket_is_replaced_when_nobody_listens_and_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    publisher = make(f"ipc://{path}")
    try:
        assert publisher.endpoint == f"ipc://{path}"
        with pytest.raises(ConfigError, match="Address already in use"):
            make(f"ipc://{path}")
        subscriber = Subscriber(publisher.endpoint)
        until(lambda: publisher.publish([]) or subscriber.receive(20))
        subscriber.close()
    finally:
        publisher.shutdown()
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(ConfigError, match="Address already in use"):
        make(f"ipc://{path}")
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("endpoint", "bound"),
    [
        ("tcp://localhost:0", "tcp://127.0.0.1:"),
        ("tcp://*:*", "tcp://0.0.0.0:"),
        ("tcp://lo:0", "tcp://127.0.0.1:"),
        ("tcp://[::1]:0", "tcp://[::1]:"),
        ("ipc://*", "ipc:///"),
        ("ipc://@kvferry-test", "ipc://@kvferry-test"),
    ],
)
def test_endpoints_are_those_of_libzmq(endpoint: str, bound: str) -> None:
    publisher = make(endpoint, allow_remote=True)
    try:
        assert publisher.endpoint.startswith(bound)
        with zmq.Context() as context, context.socket(zmq.SUB) as sub:
            sub.setsockopt(zmq.IPV6, "[" in endpoint)
            sub.setsockopt(zmq.SUBSCRIBE, b"")
            sub.connect(publisher.endpoint.replace("0.0.0.0", "127.0.0.1"))
            until(lambda: publisher.publish([]) or sub.poll(20))
    finally:
        publisher.shutdown()


@pytest.mark.parametrize("endpoint", ["tcp://nobody.invalid:0", "tcp://" + "x" * 70 + ":0", "ipc:///no/such/folder/x"])
def test_endpoints_that_cannot_be_bound(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="cannot be published on"):
        make(endpoint, allow_remote=True)
