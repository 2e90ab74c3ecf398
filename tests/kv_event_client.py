"""A subscriber to KV events as others would write it: real sockets, msgpack, and a fold over what it hears."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import msgpack
import zmq

TIMEOUT_MS = 20_000
END = b"\xff" * 8

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)


def ready(kind: bytes) -> bytes:
    content = b"\x05READY\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind
    return b"\x04" + bytes((len(content),)) + content


class Subscriber:
    """A SUB socket, and a DEALER for replays."""

    def __init__(self, endpoint: str, replay_endpoint: str | None = None, topic: bytes = b"") -> None:
        self.context = zmq.Context()
        self.sub = self.context.socket(zmq.SUB)
        self.sub.connect(endpoint)
        self.sub.setsockopt(zmq.SUBSCRIBE, topic)
        self.dealer = self.context.socket(zmq.DEALER)
        if replay_endpoint is not None:
            self.dealer.connect(replay_endpoint)

    def receive(self, timeout_ms: int = TIMEOUT_MS) -> tuple[bytes, int, Any] | None:
        if not self.sub.poll(timeout_ms):
            return None
        topic, number, payload = self.sub.recv_multipart()
        return topic, int.from_bytes(number, "big"), msgpack.unpackb(payload)

    def ask_replay(self, *frames: bytes) -> None:
        self.dealer.send_multipart(frames)

    def replay(self, first: int) -> list[tuple[int, Any]]:
        """All that the publisher still has from number `first` on."""
        self.ask_replay(b"", first.to_bytes(8, "big"))
        found = []
        while True:
            assert self.dealer.poll(TIMEOUT_MS), "the replay never ended"
            empty, topic, number, payload = self.dealer.recv_multipart()
            assert empty == b""
            if number == END:
                assert (topic, payload) == (b"", b"")
                return found
            found.append((int.from_bytes(number, "big"), msgpack.unpackb(payload)))

    def close(self) -> None:
        self.context.destroy(0)


class Fold:
    """What a router believes after the events it heard: (medium, tier, group) -> hashes."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str | None, int], set[bytes]] = {}

    def take(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["type"] == "AllBlocksCleared":
                self.known.clear()
                continue
            place = self.known.setdefault((event["medium"], event.get("ownership"), event["group_idx"]), set())
            hashes = event["block_hashes"]
            assert hashes
            assert len(set(hashes)) == len(hashes)
            if event["type"] == "BlockStored":
                assert not place & set(hashes), "told twice"
                place |= set(hashes)
            else:
                assert event["type"] == "BlockRemoved"
                assert place >= set(hashes), "something went that never came"
                place -= set(hashes)

    def at(self, medium: str, tier: str | None = None, group: int = 0) -> set[bytes]:
        return self.known.get((medium, tier, group), set())


def hears(publisher: Any, subscriber: Subscriber) -> None:
    """The subscriber gets what is published from now on."""
    deadline_s = time.monotonic() + 30
    while True:
        assert time.monotonic() < deadline_s, "nothing comes"
        publisher.publish([])
        if subscriber.receive(200) is not None:
            break
    until(lambda: [number for number, _ in subscriber.replay(publisher.num_messages - 1)])


def connect(endpoint: str, receive_bytes: int = 0) -> socket.socket:
    scheme, _, address = endpoint.partition("://")
    made = socket.socket(socket.AF_INET if scheme == "tcp" else socket.AF_UNIX)
    made.settimeout(20)
    if receive_bytes:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    made.connect(("127.0.0.1", int(address.rpartition(":")[2])) if scheme == "tcp" else address)
    return made


def stranger(endpoint: str, kind: bytes, greeting: bytes = GREETING, receive_bytes: int = 0) -> socket.socket:
    """Has shaken hands; what the other side says next is its READY."""
    made = connect(endpoint, receive_bytes)
    made.sendall(greeting)
    received = b""
    while len(received) < 64:
        received += made.recv(64 - len(received))
    made.sendall(ready(kind))
    return made


def until(holds: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
