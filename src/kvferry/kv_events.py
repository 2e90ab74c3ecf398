"""KV events: who outside wants to know which KV lies where (routers, indexers) subscribes to them. vLLM 0.32's format.

Subscribers and those who ask for a replay use ZeroMQ; this side is `kvferry.zmtp`, which bounds what each may cost.

    message   [topic, sequence number (8 bytes, big endian), payload]
    payload   msgpack of [time (s since 1970), [event, ...], 0]
    event     map: "type" (the class below), and its fields; those that have a default only when they differ from it
    replay    to a ROUTER: ["", first wanted number]; it answers ["", topic, number, payload] for each it still has, and
              at last ["", "", -1 (signed), ""]

One message per engine step that changed anything. Numbers have no gaps, so a gap is a lost message. Hashes of the
engine's own blocks ("GPU", as vLLM says also on a CPU) are the engine's; those of connectors are chunk keys
(docs/keys.md). Events tell prompts only to those who have them already, unless `include_token_ids` is set.

Whoever connects can send little (a topic and a request for replay now and then) and is cut when it sends more. Messages
and replays go out as fast as they are read. They are kept once, for all who are behind.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from ipaddress import ip_address
from typing import Any

import msgpack

from kvferry.config import parse_json_object, parse_settings
from kvferry.connections import descriptor_share
from kvferry.errors import ConfigError
from kvferry.zmtp import Listener, ZMTPConnection, encode_message, encode_part

logger = logging.getLogger(__name__)

MEDIUM_GPU = "GPU"
MEDIUM_CPU = "CPU"
MEDIUM_STORAGE = "STORAGE"

_PUBLISHERS = ("zmq", "null")
_END = (-1).to_bytes(8, "big", signed=True)
_LINGER_S = 0.5
_JOIN_S = 5.0
_SENT_AT_ONCE = 256  # messages, before those who read them have their turn
_MAX_SUBSCRIBERS, _MAX_REPLAYING = 256, 64
_MAX_WAITING_REPLAYS = 4  # of one client
_MESSAGE_BYTES = 256  # what one costs beside its content
_BEHIND_BYTES = 64 << 20  # of messages that are kept for subscribers
_REPLAY_BYTES = 256 << 20  # of messages in all
_AMID_BYTES = 256 << 10  # of a message that is kept for one who is in the middle of it


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
    """Publisher: "zmq" (the default) or "null" (none)."""
    endpoint: str = "tcp://127.0.0.1:5557"
    """Address that kvferry binds and subscribers connect to. Port 0 or * selects a free port."""

    replay_endpoint: str | None = None
    buffer_steps: int = field(default=10_000, metadata={"minimum": 1})
    """Largest number of messages kept for replay; together at most 256 MiB."""
    hwm: int = field(default=100_000, metadata={"minimum": 1})
    """Largest number of messages kept for a slow subscriber; together at most 64 MiB. A subscriber that is further
    behind misses the oldest messages, sees the gap in the numbers, and asks for a replay."""
    max_queue_size: int = field(default=100_000, metadata={"minimum": 1})
    """Largest number of messages that wait for the publisher's thread; further messages are dropped and counted."""
    topic: str = ""
    include_token_ids: bool = False
    """Publish the tokens of the engine's own blocks, that is, prompts, to every subscriber."""
    allow_remote: bool = False
    """Permit an address that other machines reach. Subscribers are not authenticated."""

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
            f"{where}={endpoint!r} can be reached from other machines, and every subscriber learns what is cached: "
            'use 127.0.0.1, or set "allow_remote": true on a network you trust'
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class _Log:
    """Messages as they are sent, each at its position (without gaps): the last ones for replays, and further back those
    that a slow subscriber has not read yet, within the limits."""

    def __init__(self, num_replayed: int, max_behind: int) -> None:
        self._num_replayed = num_replayed
        self._max_behind = max_behind
        self._messages: dict[int, tuple[int, bytes]] = {}
        self._behind_bytes = 0
        self._num_bytes = 0
        self.end = 0
        """Position of the next message."""
        self.kept_from = 0
        """Position of the oldest message that a subscriber may still get."""
        self._first = 0

    def append(self, number: int, message: bytes) -> None:
        self._messages[self.end] = number, message
        self._behind_bytes += len(message) + _MESSAGE_BYTES
        self._num_bytes += len(message) + _MESSAGE_BYTES
        self.end += 1

    def __getitem__(self, position: int) -> bytes:
        return self._messages[position][1]

    def find(self, number: int) -> int:
        """Position of the first message there is with this number or a higher one."""
        return bisect_left(range(self.end), number, self.first_replayed, key=lambda at: self._messages[at][0])

    @property
    def first_replayed(self) -> int:
        return max(self._first, self.end - self._num_replayed)

    @property
    def _is_too_much(self) -> bool:
        """More than the newest message, which is kept whatever its size."""
        num_behind = self.end - self.kept_from
        return num_behind > 1 and (num_behind > self._max_behind or self._behind_bytes > _BEHIND_BYTES)

    def forget(self, slowest: int) -> list[bytes]:
        """What nobody needs, where the slowest subscriber is at this position, or is beyond the limits. Returns it."""
        while self.kept_from < self.end and (self.kept_from < slowest or self._is_too_much):
            self._behind_bytes -= len(self[self.kept_from]) + _MESSAGE_BYTES
            self.kept_from += 1
        gone = []
        while self._first < self.kept_from and (
            self._first < self.end - self._num_replayed or self._num_bytes > _REPLAY_BYTES
        ):
            gone.append(self._messages.pop(self._first)[1])
            self._num_bytes -= len(gone[-1]) + _MESSAGE_BYTES
            self._first += 1
        return gone


class _Subscriber(ZMTPConnection):
    """All messages have one topic, so of all that it subscribes to only the prefixes of that one count."""

    kind = b"PUB"
    peer_kinds = frozenset((b"SUB", b"XSUB"))

    def __init__(self, log: _Log, topic: bytes) -> None:
        super().__init__()
        self._log = log
        self._topic = topic
        self._subscribed: set[int] = set()  # lengths of the prefixes
        self.position = 0
        """In the log: what it gets next."""

    def take_frame(self, content: bytes, *, has_more: bool) -> None:
        """Before ZMTP 3.1, subscriptions are messages."""
        if content[:1] in (b"\0", b"\1"):
            self._subscribe(content[1:], is_wanted=content[0] == 1)

    def take_command(self, name: bytes, data: bytes) -> None:
        if name in (b"SUBSCRIBE", b"CANCEL"):
            self._subscribe(data, is_wanted=name == b"SUBSCRIBE")

    def next_message(self) -> bytes | None:
        if not self.is_behind:
            return None
        position = max(self.position, self._log.kept_from)
        self.position = position + 1
        return self._log[position]

    @property
    def is_behind(self) -> bool:
        return bool(self._subscribed) and self.position < self._log.end

    def _subscribe(self, prefix: bytes, *, is_wanted: bool) -> None:
        if not self._topic.startswith(prefix):
            return
        if not is_wanted:
            self._subscribed.discard(len(prefix))
            return
        if not self._subscribed:
            self.position = self._log.end
        self._subscribed.add(len(prefix))


class _Replayer(ZMTPConnection):
    """Gets what is still there from the number on that it asks for, and the end marker."""

    kind = b"ROUTER"
    peer_kinds = frozenset((b"DEALER", b"REQ", b"ROUTER"))
    prefix = encode_part(b"")

    def __init__(self, log: _Log, on_nonsense: Callable[[], None]) -> None:
        super().__init__()
        self._log = log
        self._on_nonsense = on_nonsense
        self._request: list[bytes] = []
        self._wanted: deque[int] = deque()  # first numbers
        self._position: int | None = None
        """In the log, once the first request is being answered."""

    def take_frame(self, content: bytes, *, has_more: bool) -> None:
        if len(self._request) < 3:
            self._request.append(content)
        if has_more:
            return
        request, self._request = self._request, []
        if len(request) != 2 or request[0] or len(request[1]) != 8 or len(self._wanted) >= _MAX_WAITING_REPLAYS:
            self._on_nonsense()
            return
        self._wanted.append(int.from_bytes(request[1], "big"))
        self.pump()

    def next_message(self) -> bytes | None:
        if not self._wanted:
            return None
        if self._position is None:
            self._position = self._log.find(self._wanted[0])
        position = max(self._position, self._log.first_replayed)
        if position == self._log.end:
            self._position = None
            self._wanted.popleft()
            return encode_message(b"", _END, b"")
        self._position = position + 1
        return self._log[position]


class EventPublisher:
    """Publishes events from a thread of its own, and replays what was missed. `publish` never waits.

    Raises ConfigError when an endpoint cannot be bound.
    """

    def __init__(self, config: KVEventsConfig) -> None:
        self.num_dropped = 0
        """Messages given up since the queue was full, or what they held could not be sent. They leave gaps in the
        numbers."""
        self._topic = config.topic.encode()
        self._queue: deque[tuple[int, float, Sequence[KVCacheEvent]]] = deque()
        self._max_queued = config.max_queue_size
        self._next_number = 0
        self._log = _Log(config.buffer_steps, config.hwm)
        self._is_woken = False
        self._has_warned = False
        self._is_closing = asyncio.Event()
        self._listeners: list[tuple[Listener, Callable[[], ZMTPConnection]]] = []
        try:
            self._bind(config.endpoint, _MAX_SUBSCRIBERS, lambda: _Subscriber(self._log, self._topic))
            if config.replay_endpoint is not None:
                self._bind(config.replay_endpoint, _MAX_REPLAYING, lambda: _Replayer(self._log, self._warn_once))
        except BaseException:
            self._close()
            raise
        self.endpoint = self._listeners[0][0].endpoint
        """As bound, with its port."""
        self.replay_endpoint = None if config.replay_endpoint is None else self._listeners[1][0].endpoint
        self._loop = asyncio.SelectorEventLoop()
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
        if not self._is_woken:
            self._is_woken = True
            self._call(self._send_queued)

    def shutdown(self) -> None:
        """Send what waits (bounded), then close. Idempotent."""
        self._call(self._is_closing.set)
        self._thread.join(_JOIN_S)

    def _call(self, what: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(what)

    def _bind(self, endpoint: str, max_connections: int, make: Callable[[], ZMTPConnection]) -> None:
        try:
            listener = Listener(endpoint, descriptor_share(max_connections, 16))
        except (OSError, ValueError) as err:
            reason = err.strerror if isinstance(err, OSError) and err.strerror else err
            raise ConfigError(f"KV events cannot be published on {endpoint}: {reason}") from err
        self._listeners.append((listener, make))

    # ---- on the publisher's thread ----------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except Exception:  # thread main: the engine goes on without events
            logger.exception("the publisher of KV events has ended")
        finally:
            self._close()

    async def _serve(self) -> None:
        for listener, make in self._listeners:
            listener.start(make)
        await self._is_closing.wait()
        self._close()
        while self._queue:
            self._send_queued()
        connections = self._connections()
        for connection in connections:
            connection.finish()
        if connections:
            _, slow = await asyncio.wait([each.ended for each in connections], timeout=_LINGER_S)
            for connection in connections:
                connection.cut()
            if slow:
                await asyncio.wait(slow)

    def _send_queued(self) -> None:
        self._is_woken = False
        for _ in range(min(_SENT_AT_ONCE, len(self._queue))):
            self._send(*self._queue.popleft())
        subscribers = [each for each in self._listeners[0][0].connections if isinstance(each, _Subscriber)]
        for subscriber in subscribers:
            subscriber.pump()
        slowest = min((each.position for each in subscribers if each.is_behind), default=self._log.end)
        for message in self._log.forget(slowest):
            if len(message) > _AMID_BYTES:
                for connection in self._connections():
                    if connection.is_amid(message):
                        connection.cut()
        if self._queue and not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self._send_queued)

    def _send(self, number: int, time_s: float, events: Sequence[KVCacheEvent]) -> None:
        try:
            payload = encode(events, time_s)
        except (TypeError, ValueError, OverflowError) as err:  # a connector's event holds what msgpack does not know
            self.num_dropped += 1
            logger.warning("KV events of message %d cannot be sent and are dropped: %s", number, err)
            return
        self._log.append(number, encode_message(self._topic, number.to_bytes(8, "big"), payload))

    def _warn_once(self) -> None:
        logger.log(
            logging.DEBUG if self._has_warned else logging.WARNING,
            "a replay request has a bad form, or comes too often; such ones are left unanswered in silence",
        )
        self._has_warned = True

    def _connections(self) -> list[ZMTPConnection]:
        return [each for listener, _ in self._listeners for each in listener.connections]

    def _close(self) -> None:
        for listener, _ in self._listeners:
            listener.close()
