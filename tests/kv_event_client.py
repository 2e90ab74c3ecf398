"""A subscriber to KV events as others would write it: real sockets, msgpack, and a fold over what it hears."""

from __future__ import annotations

from typing import Any

import msgpack
import zmq

TIMEOUT_MS = 20_000
END = b"\xff" * 8


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
