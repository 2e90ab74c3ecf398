"""The control channel of one engine: small messages to and from other engines. Nothing here ever waits or raises late.

    listener   ROUTER, bound once; whoever dials us is known by a name of its own, @ and random hex, until it is gone
    dialled    one DEALER per peer, known by the host:port we dialled; connects, and connects again, by itself
    message    one frame; behind the name of whoever dialled, in its own. Empty: only the name is news
    thread     owns all sockets; the owner only fills the outbox and empties the inbox

Messages may be lost (not connected, queue full) but not altered; what comes from one peer comes in order. With a key
every connection is CURVE: both key pairs are derived from the shared key, the listener admits that client key alone,
and all is encrypted. Without one only loopback addresses are bound.

What peers can cost is bounded: frame size, time for a handshake, connections (by this process's descriptors), bytes of
messages that wait for `poll` (per peer and in all), bytes that wait to be sent, and bytes that ZMQ has received but not
yet handed to this thread (`kvferry.connections`). Strangers get half of the connections and of the inbox; of peers that
the owner wants to `keep` none is cut for a stranger's sake. Names are looked up by threads of their own: ZMQ would do
that on the one thread that serves all connections.

libzmq 4.3.5 aborts the process (`Assertion failed: !_io_error`) when it wants to send a heartbeat through a connection
that hung up while its input was stopped. So three of its features are off: heartbeats (the kernel watches idle
connections instead, and the owner those who owe answers), the bound on what it receives (RCVHWM), and that a new
connection takes over the name of an old one (ROUTER_HANDOVER), which both stop input. Each connection has a name of its
own there, and which of them belongs to a peer is written down here.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic

import zmq
import zmq.utils.monitor

from kvferry.connections import Connections, descriptor_share, watched_by_the_kernel
from kvferry.errors import ConfigError, TransferError
from kvferry.p2p.wire import LOOPBACK, Address, Codec, M, derive_key, is_allowed, is_ip

logger = logging.getLogger(__name__)

_RECONNECT_MS = 5000
_LONGEST_S = 1_000_000.0  # zmq counts milliseconds in an int
_NAME_BYTES = 16
_HIGH_WATER = 16  # messages per connection that wait to be sent
_MAX_RECEIVED = 256  # messages taken from a socket before the others have their turn
_KERNEL_BUFFER_BYTES = 256 << 10  # per connection and direction
_FRAME_HEADER_BYTES = 2  # of ZMTP, at least
_TICK_MS = 500
_JOIN_S = 5.0
_MAX_WARNED = 1000
_MESSAGE_BYTES = 256  # what one costs here beside its content, so that empty ones are bounded too
_ZAP = "inproc://zeromq.zap.01"
_MAX_LOOKUPS = 32  # of names, at once
_CONNECTED = zmq.EVENT_HANDSHAKE_SUCCEEDED


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """Where to listen, and all bounds. Port 0: any free one; peers learn it from requests (`kv_transfer_params`)."""

    host: str = "127.0.0.1"
    port: int = 0
    advertised_host: str | None = None
    """What peers dial; the bound host, or for a wildcard this machine's name, unless given."""
    key: str | None = None
    silence_s: float = 6.0
    """A peer whose machine acknowledges nothing for so long is lost, also when nobody has anything to say."""
    handshake_s: float = 5.0
    """A connection whose handshake takes longer is closed, by either side."""
    max_connections: int = 1024
    """And an eighth of this process's descriptors; each takes two."""
    max_dialled: int = 1024
    """And a sixteenth of this process's descriptors; each takes five."""
    max_backlog_bytes: int = 64 << 20
    """Held by ZMQ over all connections: received and not yet read by the channel's thread, or not yet sent."""
    max_stranger_unsent_bytes: int = 256 << 10
    """Waiting to be sent to one that is not kept, beside one message."""
    max_inbox_bytes: int = 32 << 20
    max_peer_inbox_bytes: int = 4 << 20
    max_outbox: int = 4096
    max_outbox_bytes: int = 32 << 20


@dataclass(frozen=True, slots=True)
class Connected:
    """A dialled peer can be talked to from now on."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A peer cannot be talked to now. One that was dialled may be `Connected` again later."""

    reason: str
    remedy: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}" if self.remedy else self.reason


_SAME_KEY = "kv_connector_extra_config.key_file must name the same key in all engines, or be set in none"
_LOST = {
    zmq.EVENT_DISCONNECTED: Lost("the connection broke"),
    zmq.EVENT_CONNECT_RETRIED: Lost(
        "it cannot be reached",
        "does that engine run, do its host, advertised_host and port (kv_connector_extra_config) name an address that "
        "this machine reaches, and does no firewall stand between?",
    ),
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: Lost("it refused our key", _SAME_KEY),
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: Lost(
        "one side has a key_file, the other has none, or it is no kvferry engine", _SAME_KEY
    ),
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: Lost(
        "it closed during the handshake, or has another key in its key_file", _SAME_KEY
    ),
}


_NO_NAME_REMEDY = (
    "give the engine another host or advertised_host (kv_connector_extra_config): an address, or a name that the "
    "machines of its peers resolve"
)
_REPORTED = (_CONNECTED, *_LOST)


@dataclass(slots=True)
class _Dialled:
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    is_connected: bool | None = None  # None: not known yet


def check_listening(settings: ControlSettings) -> None:
    """ConfigError when the address cannot be bound, or may not be without a key. It is free again afterwards."""
    _check_key(settings)
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    try:
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.IPV6, 1)
        _bind(router, settings)
    finally:
        router.close()
        context.term()


def _check_key(settings: ControlSettings) -> None:
    if settings.key is None and not is_allowed(settings.host, LOOPBACK):
        raise ConfigError(
            f"kv_connector_extra_config.host={settings.host!r} can be reached from other machines, which could "
            "then read and write KV memory: set key_file (the same key in all engines and the proxy), or bind "
            "127.0.0.1"
        )


def _bind(router: Any, settings: ControlSettings) -> None:
    host = {"localhost": "127.0.0.1", "0.0.0.0": "0.0.0.0", "": "*"}.get(settings.host, settings.host)
    try:
        router.bind(f"tcp://{f'[{host}]' if ':' in host else host}:{settings.port or '*'}")
    except zmq.ZMQError as error:
        raise ConfigError(
            f"kv_connector_extra_config.host={settings.host!r}, port={settings.port} cannot be bound: {error}; "
            "give an address of this machine, and a port that is free (0: any)"
        ) from error


class ControlChannel(Generic[M]):
    """`on_news` is called on the channel's thread whenever `poll` has something; it must not block.

    ConfigError when the address cannot be bound, or may not be without a key.
    """

    def __init__(self, settings: ControlSettings, codec: Codec[M], on_news: Callable[[], None] | None = None) -> None:
        _check_key(settings)
        self.num_dropped = 0
        """Messages given up: not connected, queue or inbox full, not understood."""
        self._settings = settings
        self._codec = codec
        self._on_news = on_news
        self._keys = None if settings.key is None else _CurveKeys(settings.key)
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._inbox: deque[tuple[str, bytes | Connected | Lost]] = deque()
        self._inbox_bytes: Counter[str] = Counter()
        self._has_news = False
        self._warned: set[str] = set()
        self._outbox: deque[tuple[str, bytes | None]] = deque()  # empty: dial; None: hang up
        self._outbox_bytes = 0
        self._dialled: dict[str, _Dialled] = {}
        self._names: set[str] = set()
        self._max_dialled = descriptor_share(settings.max_dialled, 16)
        self._kept: set[bytes] = set()
        self._has_told_of_cuts = False
        self._looking_up: set[str] = set()
        self._looked_up: deque[tuple[str, str | Lost]] = deque()
        self._is_closing = False
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._context = zmq.Context()
        try:
            self._listen(settings)
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._main, name="kvferry-p2p-control", daemon=True)
        self._thread.start()

    # ---- for the owner, any thread ----------------------------------------------------------------------------

    def connect(self, peer: str) -> None:
        """Dial `host:port`, unless connected; `Connected` or `Lost` follows. TransferError: malformed, or too many.

        A link that is lost is dialled again in silence, less and less often; another `connect` does it at once.
        """
        Address.parse(peer)
        with self._lock:
            if peer not in self._names and len(self._names) >= self._max_dialled:
                raise TransferError(f"{peer}: {len(self._names)} peers are connected already")
            self._names.add(peer)
        self._put(peer, b"")

    def send(self, peer: str, message: M) -> None:
        """To a peer that was dialled, or one that wrote to us. TransferError when the message is too large."""
        self._put(peer, self._codec.encode(message))

    def keep(self, peer: str) -> None:
        """This peer is no stranger: it has introduced itself. Until `disconnect`."""
        if peer.startswith("@"):
            self._kept.add(bytes.fromhex(peer[1:]))

    def disconnect(self, peer: str) -> None:
        """Hang up a dialled peer; one that wrote to us is a stranger again."""
        with self._lock:
            self._names.discard(peer)
        if peer.startswith("@"):
            self._kept.discard(bytes.fromhex(peer[1:]))
        else:
            self._put(peer, None)

    def poll(self) -> list[tuple[str, M | Connected | Lost]]:
        """What has come since the last call, as (peer, message or change), in order per peer."""
        with self._lock:
            inbox, self._inbox = self._inbox, deque()
            self._inbox_bytes.clear()
        out: list[tuple[str, M | Connected | Lost]] = []
        for peer, item in inbox:
            try:
                out.append((peer, self._codec.decode(item) if isinstance(item, bytes) else item))
            except TransferError as error:
                self.num_dropped += 1
                self._warn_once(peer, error)
        return out

    def _warn_once(self, peer: str, error: TransferError) -> None:
        is_news = peer not in self._warned and len(self._warned) < _MAX_WARNED
        if is_news:
            self._warned.add(peer)
        logger.log(
            logging.WARNING if is_news else logging.DEBUG,
            "%s sent %s: dropped, and more from there in silence; do all engines run the same version of kvferry?",
            peer, error,
        )  # fmt: skip

    def close(self) -> None:
        """Hang up everything and stop listening. Idempotent."""
        self._is_closing = True
        self._wake()
        self._thread.join(_JOIN_S)

    def _put(self, peer: str, frame: bytes | None) -> None:
        """Only messages may be lost: who dials waits for an answer."""
        size = len(frame or b"")
        with self._lock:
            is_full = (
                len(self._outbox) >= self._settings.max_outbox
                or self._outbox_bytes + size > self._settings.max_outbox_bytes
            )
            if frame and is_full:
                self.num_dropped += 1
                return
            self._outbox_bytes += size
            self._outbox.append((peer, frame))
        self._wake()

    def _wake(self) -> None:
        with suppress(OSError):  # full: it will wake up anyway; closed: nobody is there
            self._wake_in.send(b"\0")

    # ---- sockets ----------------------------------------------------------------------------------------------

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        made = self._context.socket(kind)
        for option, value in (
            (zmq.SNDHWM, _HIGH_WATER), (zmq.RCVHWM, 0), (zmq.LINGER, 0),
            (zmq.RCVBUF, _KERNEL_BUFFER_BYTES), (zmq.SNDBUF, _KERNEL_BUFFER_BYTES),
            (zmq.MAXMSGSIZE, self._codec.max_bytes), (zmq.IPV6, 1),
            (zmq.HANDSHAKE_IVL, round(min(max(0.001, self._settings.handshake_s), _LONGEST_S) * 1000)),
            *watched_by_the_kernel(zmq, min(self._settings.silence_s, _LONGEST_S)),
        ):  # fmt: skip
            made.setsockopt(option, value)
        return made

    def _listen(self, settings: ControlSettings) -> None:
        self._zap = self._context.socket(zmq.REP)
        self._zap.bind(_ZAP)
        self._router = self._socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if self._keys is not None:
            self._router.curve_server = True
            self._router.curve_secretkey = self._keys.server_secret
            self._router.setsockopt(zmq.ZAP_DOMAIN, b"kvferry")
        monitor = self._router.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        _bind(self._router, settings)
        port = int(self._router.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        bound = socket.gethostname() if settings.host in ("*", "", "0.0.0.0", "::") else settings.host
        self.address = Address(settings.advertised_host or bound, port)
        self._monitor, self._port = monitor, port
        most = descriptor_share(settings.max_connections, 8)
        self._connections = Connections(3 * self._codec.max_bytes, settings.max_backlog_bytes, most)

    def _dial(self, peer: str, address: Address) -> _Dialled:
        dealer = self._socket(zmq.DEALER)
        dealer.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a peer that is not there: it would come too late
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MS)
        if self._keys is not None:
            dealer.curve_serverkey = self._keys.server_public
            dealer.curve_publickey = self._keys.client_public
            dealer.curve_secretkey = self._keys.client_secret
        monitor = dealer.get_monitor_socket(_CONNECTED | sum(_LOST) | zmq.EVENT_CONNECTED | zmq.EVENT_CLOSED)
        dealer.connect(f"tcp://{address}")
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)
        return _Dialled(dealer, monitor)

    def _name_for(self, peer: str) -> bytes:
        """What we are called by whom we dial as `peer`: the same whenever that is dialled, so that the link before is
        let go. Under another name of the same engine another one: the links would take each other's place for ever."""
        return hmac.digest(self._secret, peer.encode(), "sha256")[:_NAME_BYTES]

    def _redial(self, peer: str) -> None:
        if peer in self._looking_up or ((known := self._dialled.get(peer)) and known.is_connected is not False):
            return
        self._hang_up(peer)
        address = Address.parse(peer)
        if is_ip(address.host):
            self._dialled[peer] = self._dial(peer, address)
        elif len(self._looking_up) >= _MAX_LOOKUPS:
            self._put_inbox(peer, Lost(f"{_MAX_LOOKUPS} other names are being looked up", _NO_NAME_REMEDY))
        else:
            self._looking_up.add(peer)
            threading.Thread(target=self._look_up, args=(peer, address), name="kvferry-p2p-name", daemon=True).start()

    def _look_up(self, peer: str, address: Address) -> None:
        """On a thread of its own: it may take half a minute."""
        found: str | Lost
        try:
            found = _first_address(*address)
        except (OSError, UnicodeError) as error:
            found = Lost(f"the name {address.host!r} cannot be resolved: {error}", _NO_NAME_REMEDY)
        self._looked_up.append((peer, found))
        self._wake()

    def _dial_found(self) -> None:
        """Peers whose names have been looked up, unless they were given up meanwhile."""
        while self._looked_up:
            peer, found = self._looked_up.popleft()
            self._looking_up.discard(peer)
            if isinstance(found, Lost):
                self._put_inbox(peer, found)
            elif peer in self._names and peer not in self._dialled:
                self._dialled[peer] = self._dial(peer, Address(found, Address.parse(peer).port))

    def _hang_up(self, peer: str) -> None:
        dialled = self._dialled.pop(peer, None)
        if dialled is not None:
            self._poller.unregister(dialled.socket)
            self._poller.unregister(dialled.monitor)
            dialled.socket.disable_monitor()
            dialled.monitor.close(0)
            dialled.socket.close(0)

    def _release(self) -> None:
        self._context.destroy(0)
        self._wake_in.close()
        self._wake_out.close()

    # ---- the thread -------------------------------------------------------------------------------------------

    def _main(self) -> None:
        self._poller = zmq.Poller()
        for each in (self._wake_out, self._zap, self._router, self._monitor):
            self._poller.register(each, zmq.POLLIN)
        while not self._is_closing:
            try:
                self._serve()
            except Exception:  # thread main: no input may end the listener
                logger.exception("p2p control channel")
                time.sleep(_TICK_MS / 1000)
        self._connections.close()
        self._release()

    def _serve(self) -> None:
        self._poller.poll(0 if self._outbox else _TICK_MS)
        with suppress(BlockingIOError):
            self._wake_out.recv(4096)
        self._authenticate()
        self._connections.keep_only(frozenset(self._kept))
        self._follow_accepted()
        self._connections.cut_overdue()
        self._dial_found()
        for _ in range(len(self._outbox)):
            with self._lock:
                peer, frame = self._outbox.popleft()
                self._outbox_bytes -= len(frame or b"")
            self._send(peer, frame)
        self._connections.cut_overdue()
        for name, frames in self._receive("", self._router):
            self._take(f"@{name.hex()}", frames, is_stranger=name not in self._kept)
        for peer, dialled in list(self._dialled.items()):
            self._follow(peer, dialled)
            for _, frames in self._receive(peer, dialled.socket):
                self._take(peer, frames)
        self._tell_of_cuts()
        if self._has_news and self._on_news is not None:
            self._has_news = False
            self._on_news()

    def _tell_of_cuts(self) -> None:
        if self._connections.num_cut and not self._has_told_of_cuts:
            self._has_told_of_cuts = True
            logger.warning(
                "p2p control channel: the first connection was cut, for it sends or leaves unread too much, or there "
                "are more than %d (an eighth of the process's descriptors: raise ulimit -n if your engines are more)",
                self._connections.max_accepted,
            )  # fmt: skip

    def _authenticate(self) -> None:
        """ZMQ's ZAP, RFC 27: admit the one client key. Asked only where CURVE is on."""
        with suppress(zmq.Again):
            while True:
                version, request, _domain, _address, _identity, mechanism, *credentials = self._zap.recv_multipart(
                    zmq.NOBLOCK
                )
                is_ours = self._keys is not None and credentials == [self._keys.client_public_raw]
                status = (
                    (b"200", b"OK") if mechanism == b"CURVE" and is_ours else (b"400", b"not the key of this engine")
                )
                self._zap.send_multipart((version, request, *status, b"", b""))

    def _send(self, peer: str, frame: bytes | None) -> None:
        if frame is None:
            self._hang_up(peer)
            return
        try:
            if peer.startswith("@"):
                self._reply(bytes.fromhex(peer[1:]), frame)
            elif frame == b"":
                self._redial(peer)
            elif frame and peer in self._dialled:
                self._dialled[peer].socket.send_multipart((self._name_for(peer), frame), zmq.NOBLOCK)
            elif frame:
                self.num_dropped += 1
        except zmq.Again:
            self.num_dropped += 1
        except (zmq.ZMQError, ValueError) as error:
            self.num_dropped += 1
            self._put_inbox(peer, Lost(str(error)))

    def _reply(self, name: bytes, frame: bytes) -> None:
        """zmq.Again where too much waits to be read by that peer already."""
        if (connection := self._connections.named(name)) is None:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        unsent = 0 if connection.is_known else connection.unsent_bytes()
        if unsent and unsent + len(frame) > self._settings.max_stranger_unsent_bytes:
            raise zmq.Again
        self._router.send_multipart((connection.route, frame), zmq.NOBLOCK)
        connection.handed_bytes += len(frame)

    def _follow(self, peer: str, dialled: _Dialled) -> None:
        """Report changes of a dialled connection, not every attempt."""
        for event in _events(dialled.monitor):
            self._follow_connection(peer, event)
            if event["event"] not in _REPORTED:
                continue
            is_connected = event["event"] == _CONNECTED
            if is_connected is not dialled.is_connected:
                dialled.is_connected = is_connected
                if is_connected:  # who was connected before goes on to be reached by its name
                    with suppress(zmq.Again):
                        dialled.socket.send_multipart((self._name_for(peer), b""), zmq.NOBLOCK)
                self._put_inbox(peer, Connected() if is_connected else _LOST[event["event"]])

    def _follow_connection(self, owner: str, event: Any) -> None:
        """Watch a connection from now on, or no longer. `owner`: the peer that was dialled; empty: it was accepted."""
        number = event["value"]
        if event["event"] == zmq.EVENT_CONNECTED:
            self._connections.opened(number, owner, Address.parse(owner).port)
        elif event["event"] == zmq.EVENT_ACCEPTED:
            self._connections.opened(number, "", self._port)
        elif event["event"] in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
            self._connections.closed(number)

    def _receive(self, owner: str, from_: zmq.Socket[bytes]) -> list[tuple[bytes, list[zmq.Frame]]]:
        """At most `_MAX_RECEIVED` messages, so that one peer cannot keep the thread; each with its sender's name."""
        messages: list[tuple[bytes, list[zmq.Frame]]] = []
        try:
            for _ in range(_MAX_RECEIVED):
                frames, route = from_.recv_multipart(zmq.NOBLOCK, copy=False), b""
                if not owner:
                    route, frames = frames[0].bytes, frames[1:]
                num_bytes, name = sum(len(frame) + _FRAME_HEADER_BYTES for frame in frames), route
                if not owner and len(frames) == 2 and len(frames[0]) == _NAME_BYTES:
                    name, frames = frames[0].bytes, frames[1:]
                with suppress(zmq.ZMQError):  # sent without a connection
                    number = int(frames[-1].get(zmq.SRCFD))
                    if number not in self._connections:
                        self._follow_accepted()
                    self._connections.delivered(number, num_bytes, name, route)
                if len(frames) != 1 or len(frames[0]) or name == route:
                    messages.append((name, frames))
        except zmq.Again:
            self._connections.drained(owner)
        return messages

    def _follow_accepted(self) -> None:
        for event in _events(self._monitor):
            self._follow_connection("", event)

    def _take(self, peer: str, frames: list[zmq.Frame], *, is_stranger: bool = False) -> None:
        """One message of exactly one frame, if there is room for it; for strangers half of it."""
        size = _MESSAGE_BYTES + sum(len(frame) for frame in frames)
        settings = self._settings
        with self._lock:
            is_full = self._inbox_bytes[
                peer
            ] + size > settings.max_peer_inbox_bytes or self._inbox_bytes.total() + size > settings.max_inbox_bytes // (
                1 + is_stranger
            )
            if len(frames) != 1 or is_full:
                self.num_dropped += 1
                return
            self._inbox_bytes[peer] += size
            self._inbox.append((peer, frames[0].bytes))
        self._has_news = True

    def _put_inbox(self, peer: str, change: Connected | Lost) -> None:
        with self._lock:
            self._inbox.append((peer, change))
        self._has_news = True


class _CurveKeys:
    """Both key pairs, from the shared key; Z85 as ZMQ takes them."""

    def __init__(self, key: str) -> None:
        from zmq.utils import z85

        self.server_secret = z85.encode(derive_key(key, "server"))
        self.client_secret = z85.encode(derive_key(key, "client"))
        self.server_public = zmq.curve_public(self.server_secret)
        self.client_public = zmq.curve_public(self.client_secret)
        self.client_public_raw = z85.decode(self.client_public)


def _first_address(host: str, port: int) -> str:
    """As ZMQ would look it up: IPv6, or IPv4 in its form. OSError or UnicodeError: there is none."""
    found = socket.getaddrinfo(host, port, socket.AF_INET6, socket.SOCK_STREAM, flags=socket.AI_V4MAPPED)
    return str(found[0][4][0])


def _events(monitor: zmq.Socket[bytes]) -> list[Any]:
    events = []
    with suppress(zmq.Again):
        while True:
            events.append(zmq.utils.monitor.recv_monitor_message(monitor, zmq.NOBLOCK))
    return events
