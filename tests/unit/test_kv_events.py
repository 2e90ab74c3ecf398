"""KV events on the wire: format, numbers, replay, and an engine that never waits."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from tests.kv_event_client import Subscriber

from kvferry import kv_events
from kvferry.errors import ConfigError
from kvferry.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, EventPublisher, KVEventsConfig, encode

ANY_PORT = "tcp://127.0.0.1:0"


def removed(i: int) -> list[BlockRemoved]:
    return [BlockRemoved([bytes([i])], "GPU", 0)]


@pytest.fixture
def make() -> Iterator[Callable[..., tuple[EventPublisher, Subscriber]]]:
    made: list[Any] = []

    def make_pair(**settings: Any) -> tuple[EventPublisher, Subscriber]:
        settings = {"endpoint": ANY_PORT, "replay_endpoint": "tcp://127.0.0.1:*", **settings}
        publisher = EventPublisher(KVEventsConfig(enable_kv_cache_events=True, **settings))
        made.append(publisher.shutdown)
        subscriber = Subscriber(publisher.endpoint, publisher.replay_endpoint, settings.get("topic", "").encode())
        made.append(subscriber.close)
        return publisher, subscriber

    yield make_pair
    for close in reversed(made):
        close()


def test_events_are_maps_without_their_defaults() -> None:
    events = [
        BlockStored([b"\1" * 32], b"\0" * 32, [], 16, None, "CPU", None, 0),
        BlockStored([b"\2" * 32], None, [7, 8], 2, None, "STORAGE", None, 1, "fs"),
        BlockRemoved([b"\1" * 32], "GPU"),
        AllBlocksCleared(),
    ]
    stored = {"type": "BlockStored", "lora_id": None, "lora_name": None}
    assert msgpack.unpackb(encode(events, 1.5)) == [
        1.5,
        [
            stored | {"block_hashes": [b"\1" * 32], "parent_block_hash": b"\0" * 32, "token_ids": [], "block_size": 16}
            | {"medium": "CPU", "group_idx": 0},
            stored | {"block_hashes": [b"\2" * 32], "parent_block_hash": None, "token_ids": [7, 8], "block_size": 2}
            | {"medium": "STORAGE", "group_idx": 1, "ownership": "fs"},
            {"type": "BlockRemoved", "block_hashes": [b"\1" * 32], "medium": "GPU"},
            {"type": "AllBlocksCleared"},
        ],
        0,
    ]  # fmt: skip


def test_a_subscriber_that_joins_late_asks_for_the_beginning(make: Any) -> None:
    publisher, subscriber = make(topic="kv")
    assert publisher.endpoint.rpartition(":")[2].isdecimal()
    started_s, num, heard = time.time(), 0, None
    while heard is None:  # until the subscription has arrived
        publisher.publish(removed(num))
        num += 1
        heard = subscriber.receive(timeout_ms=20)
        assert time.time() < started_s + 60
    topic, number, (time_s, events, rank) = heard
    assert (topic, rank) == (b"kv", 0)
    assert started_s <= time_s <= time.time()
    assert events == [{"type": "BlockRemoved", "block_hashes": [bytes([number])], "medium": "GPU", "group_idx": 0}]
    deadline_s = time.monotonic() + 60
    while [number for number, _ in subscriber.replay(0)] != list(range(num)):  # the thread may still be sending
        assert time.monotonic() < deadline_s
    replayed = subscriber.replay(0)
    assert [payload[1][0]["block_hashes"] for _, payload in replayed] == [[bytes([i])] for i in range(num)]
    assert [number for number, _ in subscriber.replay(num - 1)] == [num - 1]
    assert subscriber.replay(num) == []


def test_replay_has_the_last_messages_and_ignores_nonsense(make: Any) -> None:
    publisher, subscriber = make(buffer_steps=3)
    for i in range(10):
        publisher.publish(removed(i))
    for frames in ([b""], [b"x", bytes(8)], [b"", b"short"], [b"", bytes(8), b"more"]):
        subscriber.ask_replay(*frames)
    deadline_s = time.monotonic() + 60
    while [number for number, _ in subscriber.replay(0)] != [7, 8, 9]:  # the thread may still be sending
        assert time.monotonic() < deadline_s


def test_replay_is_bounded_in_bytes_too(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "_REPLAY_BYTES", 100_000)
    publisher, subscriber = make()
    for i in range(40):
        publisher.publish([BlockRemoved([i.to_bytes(4, "big") * 2500], "GPU")])
    deadline_s = time.monotonic() + 60
    while [number for number, _ in subscriber.replay(0)] != list(range(31, 40)):  # of some 10,300 bytes each
        assert time.monotonic() < deadline_s


def test_a_full_queue_drops_and_leaves_a_gap(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, entered, plain = threading.Event(), threading.Event(), encode

    def slow(*arguments: Any) -> bytes:
        entered.set()
        assert gate.wait(20)
        return plain(*arguments)

    monkeypatch.setattr(kv_events, "encode", slow)
    publisher, subscriber = make(max_queue_size=2)
    publisher.publish(removed(0))
    assert entered.wait(20)
    for i in range(1, 6):  # nobody takes them, and nobody waits here
        publisher.publish(removed(i))
    assert (publisher.num_messages, publisher.num_dropped) == (6, 3)
    gate.set()
    assert [number for number, _ in subscriber.replay(0)] == [0, 1, 2]
    publisher.publish(removed(6))
    deadline_s = time.monotonic() + 60
    while [number for number, _ in subscriber.replay(0)] != [0, 1, 2, 6]:
        assert time.monotonic() < deadline_s


def test_an_event_that_cannot_be_sent_costs_only_its_message(make: Any) -> None:
    publisher, subscriber = make()
    publisher.publish([BlockRemoved([b"x"], medium=object())])  # type: ignore[arg-type]  # a connector's mistake
    publisher.publish([BlockRemoved([b"x"], "GPU", group_idx=1 << 64)])
    publisher.publish(removed(2))
    deadline_s = time.monotonic() + 20
    while not (sent := subscriber.replay(0)):
        assert time.monotonic() < deadline_s, "the publisher's thread has ended"
    assert [number for number, _ in sent] == [2]
    assert publisher.num_dropped == 2


def test_what_waits_at_the_end_is_sent(make: Any) -> None:
    publisher, subscriber = make()
    while True:
        publisher.publish(removed(0))
        if subscriber.receive(timeout_ms=20) is not None:
            break
    for i in range(50):
        publisher.publish(removed(i))
    last = publisher.num_messages - 1
    publisher.shutdown()
    publisher.shutdown()
    publisher.publish(removed(0))  # nobody hears it
    numbers = []
    while (heard := subscriber.receive(timeout_ms=500 if numbers and numbers[-1] == last else 20_000)) is not None:
        numbers.append(heard[1])
    assert numbers[-1] == last


def test_a_port_in_use_is_a_config_error(make: Any) -> None:
    publisher, _ = make()
    for taken in ({"endpoint": publisher.endpoint}, {"endpoint": ANY_PORT, "replay_endpoint": publisher.endpoint}):
        with pytest.raises(ConfigError, match=r"cannot be published on tcp://127\.0\.0\.1:\d+: Address already in use"):
            EventPublisher(KVEventsConfig(enable_kv_cache_events=True, **taken))


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({"endpoint": "tcp://*:5557"}, ["kv_events_config.endpoint='tcp://*:5557'", "other machines", "allow_remote"]),
        ({"replay_endpoint": "tcp://0.0.0.0:1"}, ["kv_events_config.replay_endpoint", "127.0.0.1"]),
        ({"endpoint": "tcp://[::]:1"}, ["allow_remote"]),
        ({"endpoint": "tcp://10.0.0.7:1"}, ["allow_remote"]),
        ({"endpoint": "tcp://eth0:1"}, ["allow_remote"]),
        ({"endpoint": "127.0.0.1:5557"}, ["must be tcp://HOST:PORT or ipc://PATH"]),
        ({"endpoint": "tcp://127.0.0.1"}, ["must be tcp://"]),
        ({"endpoint": "tcp://127.0.0.1:65536"}, ["must be tcp://"]),
        ({"endpoint": "inproc://x", "allow_remote": True}, ["must be tcp://"]),
        ({"publisher": "kafka"}, ["kv_events_config.publisher='kafka'", "zmq, null"]),
        ({"buffer_steps": 0}, ["kv_events_config.buffer_steps=0", "at least 1"]),
        ({"enable_kv_cache_event": True}, ["kv_events_config.enable_kv_cache_event", "'enable_kv_cache_events'"]),
        ({"enable_kv_cache_events": "yes"}, ["kv_events_config.enable_kv_cache_events", "bool"]),
        ("[]", ["kv_events_config", "object"]),
        (3, ["kv_events_config=3", "object"]),
    ],
)
def test_wrong_settings_are_named(settings: Any, texts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        KVEventsConfig.parse(settings)
    for text in texts:
        assert text in str(caught.value)


def test_settings_that_are_fine() -> None:
    assert not KVEventsConfig.parse(None).is_published
    assert KVEventsConfig.parse('{"enable_kv_cache_events": true, "topic": ""}').is_published
    assert not KVEventsConfig.parse({"enable_kv_cache_events": True, "publisher": "null"}).is_published
    for endpoint in ("tcp://127.0.0.1:*", "tcp://localhost:5557", "tcp://[::1]:5557", "ipc:///tmp/x"):
        assert KVEventsConfig.parse({"endpoint": endpoint}).endpoint == endpoint
    assert KVEventsConfig.parse({"endpoint": "tcp://*:5557", "allow_remote": True}).allow_remote


def test_the_settings_in_the_docs_are_settings() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guides" / "server.md").read_text()
    (text,) = re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    config = KVEventsConfig.parse(text)
    assert config.is_published
    assert config.replay_endpoint is not None
