"""KV events: who outside wants to know which KV lies where (routers, indexers) subscribes to them. vLLM 0.32's format.

    message   [topic, sequence number (8 bytes, big endian), payload]
    payload   msgpack of [time (s since 1970), [event, ...], 0]
    event     map: "type" (the class below), and its fields; those that have a default only when they differ from it
    replay    to a ROUTER: ["", first wanted number]; it answers ["", topic, number, payload] for each it still has, and
              at last ["", "", -1 (signed), ""]

One message per engine step that changed anything. Numbers have no gaps, so a gap is a lost message. Hashes of the
engine's own blocks ("GPU", as vLLM says also on a CPU) are the engine's; those of connectors are chunk keys
(docs/keys.md). Events tell prompts only to those who have them already, unless `include_token_ids` is set.

Whoever connects can send little (a topic and a request for replay now and then) and is cut when it sends more. A replay
goes out as fast as it is read, with at most 1 MiB of it waiting. Over ipc:// only the size of messages is bounded.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import msgpack

from kvferry.config import parse_json_object, parse_settings
from kvferry.connections import Connection, Connections, descriptor_share, watched_by_the_kernel
from kvferry.errors import ConfigError, install_hint

if TYPE_CHECKING:
    import zmq

logger = logging.getLogger(__name__)

MEDIUM_GPU = "GPU"
MEDIUM_CPU = "CPU"
MEDIUM_STORAGE = "STORAGE"

_PUBLISHERS = ("zmq", "null")
_END = (-1).to_bytes(8, "big", signed=True)
_LINGER_MS = 500
_JOIN_S = 5.0
_REPLAYS_AT_ONCE = 256
_ENDLESS_BYTES = 1 << 62
_MAX_RECEIVED_BYTES = 4096  # of one message
_SPARE_BYTES, _BYTES_PER_S = 64 << 10, 1024.0  # a connection may send
_MAX_SUBSCRIBERS, _MAX_REPLAYING = 256, 64
_MAX_WAITING_REPLAYS = 4  # of one client
_REPLAY_AHEAD_BYTES = 1 << 20
_MESSAGE_BYTES = 64  # what one costs beside its content
_SILENCE_S, _HANDSHAKE_MS = 300.0, 5000
_WATCH_MS, _REPLAY_MS = 100, 5


@dataclass(frozen=True, slots=True)
class BlockStored:
    """These blocks can be found in a medium from now on. Several are consecutive, the first one's parent is given."""

    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    """Hash of the block before the first; None: it is the first of its prompt, or (connectors) not told."""
    token_ids: list[int]
    """Tokens of the blocks; empty unless asked for."""
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    group_idx: int | None = None
    """KV cache group."""
    ownership: str | None = None
    """Name of the tier, for media below host memory."""


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """These blocks can no longer be found there."""

    block_hashes: list[bytes]
    medium: str | None
    group_idx: int | None = None
    ownership: str | None = None


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Nothing can be found any more, in any medium."""


KVCacheEvent = BlockStored | BlockRemoved | AllBlocksCleared


def encode(events: Sequence[KVCacheEvent], time_s: float) -> bytes:
    """The payload of one message."""
    payload: bytes = msgpack.packb([time_s, [_as_map(event) for event in events], 0])
    return payload


def _as_map(event: KVCacheEvent) -> dict[str, Any]:
    values = {"type": type(event).__name__}
    for f in fields(event):
        value = getattr(event, f.name)
        if f.default is MISSING or value != f.default:
            values[f.name] = value
    return values


@dataclass(frozen=True, slots=True)
class KVEventsConfig:
    """vLLM's settings of that name, with safer defaults, and two of kvferry's own. ConfigError names the key."""

    enable_kv_cache_events: bool = False
    publisher: str | None = None
    """"zmq" or "null" (none); "zmq" unless given."""
    endpoint: str = "tcp://127.0.0.1:5557"
    """Where subscribers connect: it is always bound. Port 0 or *: any free one."""
    replay_endpoint: str | None = None
    buffer_steps: int = field(default=10_000, metadata={"minimum": 1})
    """Messages kept for replay."""
    hwm: int = field(default=100_000, metadata={"minimum": 1})
    """Messages kept for each subscriber that is slow; it misses further ones."""
    max_queue_size: int = field(default=100_000, metadata={"minimum": 1})
    """Messages that wait for the publisher's thread; further ones are dropped and counted."""
    topic: str = ""
    include_token_ids: bool = False
    """Tell the tokens of the engine's own blocks, that is: prompts, to every subscriber."""
    allow_remote: bool = False
    """Let other machines connect. There is no authentication."""

    def __post_init__(self) -> None:
        if self.publisher not in (None, *_PUBLISHERS):
            raise ConfigError(f"kv_events_config.publisher={self.publisher!r} is not one of {', '.join(_PUBLISHERS)}")
        for key in ("endpoint", "replay_endpoint"):
            endpoint = getattr(self, key)
            if endpoint is not None:
                _check_endpoint(endpoint, f"kv_events_config.{key}", self.allow_remote)

    @classmethod
    def parse(cls, value: KVEventsConfig | Mapping[str, Any] | str | None) -> KVEventsConfig:
        """Accept what users pass: a config, a mapping, JSON text, or None (no events)."""
        if value is None or isinstance(value, cls):
            return value or cls()
        if isinstance(value, str):
            value = parse_json_object(value, "kv_events_config")
        if not isinstance(value, Mapping):
            raise ConfigError(f"kv_events_config={value!r} must be an object, JSON text or a KVEventsConfig")
        given = {key: setting for key, setting in value.items() if (key, setting) != ("topic", "")}
        return parse_settings(cls, given, "kv_events_config")

    @property
    def is_published(self) -> bool:
        """True when events leave the process."""
        return self.enable_kv_cache_events and self.publisher != "null"


def _check_endpoint(endpoint: str, where: str, allow_remote: bool) -> None:
    scheme, _, address = endpoint.partition("://")
    if scheme == "ipc" and address:
        return
    host, _, port = address.rpartition(":")
    if scheme != "tcp" or not host or not (port == "*" or (port.isdecimal() and int(port) < 1 << 16)):
        raise ConfigError(f"{where}={endpoint!r} must be tcp://HOST:PORT or ipc://PATH")
    if not allow_remote and not _is_loopback(host):
        raise ConfigError(
            f"{where}={endpoint!r} can be reached from other machines, and whoever connects learns what is cached: "
            'use 127.0.0.1, or set "allow_remote": true on a network you trust'
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class EventPublisher:
    """Publishes events on a ZMQ socket from a thread of its own, and replays what was missed. `publish` never waits.

    Raises ConfigError when pyzmq is missing or an endpoint cannot be bound.
    """

    def __init__(self, config: KVEventsConfig) -> None:
        try:
            import zmq
            import zmq.utils.monitor
        except ModuleNotFoundError as err:
            raise ConfigError(f"pyzmq is not installed, which KV events need: {install_hint('events')}") from err
        self.num_dropped = 0
        """Messages given up since the queue was full, or what they held could not be sent. They leave gaps in the
        numbers."""
        self._zmq = zmq
        self._topic = config.topic.encode()
        self._queue: deque[tuple[int, float, Sequence[KVCacheEvent]]] = deque()
        self._max_queued = config.max_queue_size
        self._next_number = 0
        self._sent: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._is_closing = False
        self._watched: list[tuple[zmq.Socket[bytes], int, Connections]] = []
        self._replays: dict[bytes, deque[bytes]] = {}  # client -> for each of its requests the next number
        self._replay: zmq.Socket[bytes] | None = None
        self._has_warned = False
        self._context = zmq.Context()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        try:
            self._pub = self._bind(zmq.PUB, config.endpoint, config.hwm, _MAX_SUBSCRIBERS)
            if config.replay_endpoint is not None:
                hwm = _MAX_WAITING_REPLAYS * (config.buffer_steps + 1)
                self._replay = self._bind(zmq.ROUTER, config.replay_endpoint, hwm, _MAX_REPLAYING)
        except BaseException:
            self._close()
            raise
        self.endpoint = self._pub.getsockopt_string(zmq.LAST_ENDPOINT)
        """As bound, with its port."""
        self.replay_endpoint = None if self._replay is None else self._replay.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._main, name="kvferry-events", daemon=True)
        self._thread.start()

    @property
    def num_messages(self) -> int:
        """Messages so far, dropped ones included."""
        return self._next_number

    def publish(self, events: Sequence[KVCacheEvent]) -> None:
        """Send the events as one message soon. They must not change any more."""
        number, self._next_number = self._next_number, self._next_number + 1
        if len(self._queue) >= self._max_queued:
            self.num_dropped += 1
            return
        self._queue.append((number, time.time(), events))
        self._wake()

    def shutdown(self) -> None:
        """Send what waits (bounded), then close. Idempotent."""
        self._is_closing = True
        self._wake()
        self._thread.join(_JOIN_S)

    def _wake(self) -> None:
        with suppress(OSError):  # full: it will wake up anyway; closed: nobody is there
            self._wake_in.send(b"\0")

    def _bind(self, kind: int, endpoint: str, hwm: int, max_connections: int) -> zmq.Socket[bytes]:
        names = self._zmq
        bound: zmq.Socket[bytes] = self._context.socket(kind)
        for option, value in (
            (names.SNDHWM, hwm), (names.RCVHWM, 0),  # libzmq 4.3.5 aborts where input has stopped at a mark
            (names.MAXMSGSIZE, _MAX_RECEIVED_BYTES), (names.LINGER, _LINGER_MS), (names.IPV6, "[" in endpoint),
            (names.HANDSHAKE_IVL, _HANDSHAKE_MS), *watched_by_the_kernel(names, _SILENCE_S),
        ):  # fmt: skip
            bound.setsockopt(option, value)
        monitor = bound.get_monitor_socket(names.EVENT_ACCEPTED | names.EVENT_DISCONNECTED | names.EVENT_CLOSED)
        try:
            bound.bind(endpoint.replace("//localhost:", "//127.0.0.1:"))
        except names.ZMQError as err:
            bound.close(0)
            raise ConfigError(f"KV events cannot be published on {endpoint}: {err}") from err
        _, _, port = bound.getsockopt_string(names.LAST_ENDPOINT).rpartition(":")
        most = descriptor_share(max_connections, 16)
        connections = Connections(_ENDLESS_BYTES, _ENDLESS_BYTES, most, keeps_oldest=True)
        self._watched.append((monitor, int(port) if port.isdecimal() else 0, connections))
        return bound

    # ---- on the publisher's thread ----------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._serve()
        except Exception:  # thread main: the engine goes on without events
            logger.exception("KV events are published no more")
        finally:
            self._close()

    def _serve(self) -> None:
        poller = self._zmq.Poller()
        for each in (self._wake_out, self._replay, *(monitor for monitor, _, _ in self._watched)):
            if each is not None:
                poller.register(each, self._zmq.POLLIN)
        while not self._is_closing or self._queue:
            is_watching = any(len(connections) for *_, connections in self._watched)
            poller.poll(_REPLAY_MS if self._replays else _WATCH_MS if is_watching else None)
            with suppress(BlockingIOError):
                self._wake_out.recv(4096)
            for watched in self._watched:
                self._watch(*watched)
            while self._queue:
                self._send(*self._queue.popleft())
            if self._replay is not None:
                self._take_replays(self._replay)
                self._answer_replays(self._replay)

    def _watch(self, monitor: zmq.Socket[bytes], port: int, connections: Connections) -> None:
        with suppress(self._zmq.Again):
            while True:
                event = self._zmq.utils.monitor.recv_monitor_message(monitor, self._zmq.NOBLOCK)
                if event["event"] == self._zmq.EVENT_ACCEPTED:
                    connections.opened(event["value"], "", port)
                else:
                    connections.closed(event["value"])
        connections.cut_greedy(_SPARE_BYTES, _BYTES_PER_S)

    def _send(self, number: int, time_s: float, events: Sequence[KVCacheEvent]) -> None:
        try:
            message = number.to_bytes(8, "big"), encode(events, time_s)
        except (TypeError, ValueError, OverflowError) as err:  # a connector's event holds what msgpack does not know
            self.num_dropped += 1
            logger.warning("KV events of message %d cannot be sent and are left out: %s", number, err)
            return
        self._pub.send_multipart((self._topic, *message))
        self._sent.append(message)

    def _take_replays(self, replay: zmq.Socket[bytes]) -> None:
        with suppress(self._zmq.Again):
            for _ in range(_REPLAYS_AT_ONCE):
                frames = replay.recv_multipart(self._zmq.NOBLOCK, copy=False)
                client, *request = (frame.bytes for frame in frames)
                with suppress(self._zmq.ZMQError):  # ipc
                    self._watched[-1][-1].delivered(int(frames[-1].get(self._zmq.SRCFD)), 0, client)
                waiting = self._replays.get(client, deque())
                if len(request) != 2 or request[0] or len(request[1]) != 8 or len(waiting) >= _MAX_WAITING_REPLAYS:
                    logger.log(
                        logging.DEBUG if self._has_warned else logging.WARNING,
                        "a replay request has a bad form, or comes too often; such ones are left unanswered in silence",
                    )
                    self._has_warned = True
                    continue
                waiting.append(request[1])
                self._replays[client] = waiting

    def _answer_replays(self, replay: zmq.Socket[bytes]) -> None:
        """Go on with each, as far as its client has read."""
        for client, waiting in list(self._replays.items()):
            connection = self._watched[-1][-1].named(client)
            while waiting:
                spare_bytes = _ENDLESS_BYTES if connection is None else _REPLAY_AHEAD_BYTES - connection.unsent_bytes()
                for number, payload in self._sent:
                    if spare_bytes <= 0:
                        break
                    if number >= waiting[0]:
                        spare_bytes -= _MESSAGE_BYTES + len(payload)
                        self._hand(replay, connection, (client, b"", self._topic, number, payload))
                        waiting[0] = (int.from_bytes(number, "big") + 1).to_bytes(8, "big")
                if spare_bytes <= 0:
                    break
                self._hand(replay, connection, (client, b"", b"", _END, b""))
                waiting.popleft()
            if not waiting:
                del self._replays[client]

    def _hand(self, replay: zmq.Socket[bytes], connection: Connection | None, frames: tuple[bytes, ...]) -> None:
        """Messages to clients that have gone are dropped."""
        replay.send_multipart(frames, self._zmq.NOBLOCK)
        if connection is not None:
            connection.handed_bytes += sum(map(len, frames[1:]))

    def _close(self) -> None:
        for *_, connections in self._watched:
            connections.close()
        self._context.destroy(_LINGER_MS)
        self._wake_in.close()
        self._wake_out.close()
