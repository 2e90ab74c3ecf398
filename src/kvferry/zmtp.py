"""The listening side of ZeroMQ's protocol, for sockets that mainly send: ZMTP 3.0 (RFC 23) and 3.1 (RFC 37), mechanism
NULL, over TCP and Unix sockets (https://rfc.zeromq.org/spec/23, https://rfc.zeromq.org/spec/37).

    greeting   64 bytes from either side: signature, version, mechanism
    frame      flags (1 byte: more, long, command) | size (1 byte; long: 8, big-endian) | content
    READY      a command from either side, with the kind of its socket; messages follow

All on one asyncio loop. libzmq would do, but sets no bound to what it takes in. Here a connection costs this process a
bounded number of bytes, whatever the other side does: it sends small frames and few bytes in its life, has little time
for its handshake, and gets as much as it reads. Nothing is kept of one that has ended.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import ClassVar

from kvferry.connections import Acceptor, watch

logger = logging.getLogger(__name__)

_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_NULL = b"NULL".ljust(20, b"\0")
_GREETING = _SIGNATURE + b"\3\1" + _NULL + bytes(32)
_OLDEST_MAJOR = 3
_MORE, _LONG, _COMMAND = 1, 2, 4
_SHORT_SIZE = 255
_MAX_CONTEXT_BYTES = 16  # of a PING

_HANDSHAKE_S = 5.0
_SILENCE_S = 300.0
_MAX_RECEIVED_BYTES = 4096  # in one frame
_SPARE_BYTES, _BYTES_PER_S = 64 << 10, 1024.0  # a connection may send
_UNSENT_BYTES = 64 << 10  # a connection may hold in its transport before it waits
_SLICE_BYTES = 32 << 10  # of a message, and of small ones together, at once
_TURN_BYTES = 1 << 20  # to one connection before the others have their turn
_MAX_PONG_BYTES = 1024  # that wait; who does not read them gets no more
_SIOCGIFADDR = 0x8915  # Linux: an interface's address


def encode_message(*frames: bytes) -> bytes:
    """Frames of one message as they are sent."""
    return b"".join(_encode_frame(frame, _MORE if i + 1 < len(frames) else 0) for i, frame in enumerate(frames))


def encode_part(frame: bytes) -> bytes:
    """The first frame of a message that goes on."""
    return _encode_frame(frame, _MORE)


def _encode_frame(content: bytes, flags: int) -> bytes:
    if len(content) <= _SHORT_SIZE:
        return bytes((flags, len(content))) + content
    return struct.pack(">BQ", flags | _LONG, len(content)) + content


def _encode_command(name: bytes, data: bytes) -> bytes:
    return _encode_frame(bytes((len(name),)) + name + data, _COMMAND)


def _properties(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Of READY: name (lower case) and value. ValueError: malformed."""
    at = 0
    while at < len(data):
        end = at + 1 + data[at]
        value_end = end + 4 + int.from_bytes(data[end : end + 4], "big")
        if value_end > len(data):
            raise ValueError("a property goes beyond its command")
        yield data[at + 1 : end].lower(), data[end + 4 : value_end]
        at = value_end


class ZMTPConnection(asyncio.Protocol):
    """One of a listener's. Subclasses say what comes (`take_frame`, `take_command`) and what goes (`next_message`)."""

    kind: ClassVar[bytes]
    """Of our socket, as READY says it."""
    peer_kinds: ClassVar[frozenset[bytes]]
    """Kinds of sockets that may talk to it."""
    prefix: ClassVar[bytes] = b""
    """`encode_part` of what each message begins with."""

    def __init__(self) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        """Done once nothing of it is left."""
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._since_s = 0.0
        self._num_received = 0
        self._unread = bytearray()
        self._has_greeted = False
        self._is_ready = False
        self._is_blocked = False
        self._is_finishing = False
        self._pongs = bytearray()
        self._rest = memoryview(b"")  # of a large message
        self._next_turn: asyncio.Handle | None = None

    # ---- for subclasses ---------------------------------------------------------------------------------------

    def take_frame(self, content: bytes, *, has_more: bool) -> None:
        """A frame of a message."""

    def take_command(self, name: bytes, data: bytes) -> None:
        """A command other than those of the protocol itself."""

    def next_message(self) -> bytes | None:
        """What is sent next, as `encode_message` makes it; None: nothing for now (`pump` asks again)."""
        raise NotImplementedError

    # ---- for the owner ----------------------------------------------------------------------------------------

    @property
    def unsent_bytes(self) -> int:
        """Held by this connection alone, or of a message that it is in the middle of."""
        waiting = 0 if self._transport is None else self._transport.get_write_buffer_size()
        return waiting + len(self._rest) + len(self._pongs)

    def is_amid(self, message: bytes) -> bool:
        """Whether only a part of this large message has been sent."""
        return bool(self._rest) and self._rest.obj is message

    def pump(self) -> None:
        """Send what there is, as far as the other side reads; the rest follows by itself."""
        transport = self._transport
        if transport is None or not self._is_ready or self._next_turn is not None:
            return
        num_sent = 0
        while not self._is_blocked and not transport.is_closing():
            if not (piece := self._next_piece()):
                if self._is_finishing:
                    transport.close()
                return
            transport.write(piece)
            num_sent += len(piece)
            if num_sent >= _TURN_BYTES:
                self._next_turn = asyncio.get_running_loop().call_soon(self._go_on)
                return

    def finish(self) -> None:
        """Send what there is, then end."""
        self._is_finishing = True
        if self._is_ready:
            self.pump()
        else:
            self.cut()

    def cut(self) -> None:
        """End it now. Idempotent."""
        self._let_go()
        if self._transport is not None:
            self._transport.abort()

    # ---- what asyncio calls -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Nothing has been read yet."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._is_finishing:
            transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._since_s = loop.time()
        self._deadline = loop.call_later(_HANDSHAKE_S, self.cut)
        transport.set_write_buffer_limits(high=_UNSENT_BYTES)
        transport.write(_GREETING)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended, by whichever side."""
        self._let_go()
        self._transport = None
        self.ended.set_result(None)

    def pause_writing(self) -> None:
        """The other side reads too slowly."""
        self._is_blocked = True

    def resume_writing(self) -> None:
        """It has read."""
        self._is_blocked = False
        self.pump()

    def data_received(self, data: bytes) -> None:
        """At most 256 KiB at once."""
        self._num_received += len(data)
        age_s = asyncio.get_running_loop().time() - self._since_s
        if self._num_received > _SPARE_BYTES + _BYTES_PER_S * age_s:
            self.cut()
            return
        self._unread += data
        try:
            self._take_in()
        except ValueError as error:
            logger.debug("a connection is cut: %s", error)
            self.cut()

    # ---- the protocol -----------------------------------------------------------------------------------------

    def _let_go(self) -> None:
        self._is_ready = False
        self._unread.clear()
        self._pongs.clear()
        self._rest = memoryview(b"")
        if self._deadline is not None:
            self._deadline.cancel()

    def _go_on(self) -> None:
        self._next_turn = None
        self.pump()

    def _next_piece(self) -> bytes | bytearray | memoryview:
        if self._rest:
            piece, self._rest = self._rest[:_SLICE_BYTES], self._rest[_SLICE_BYTES:]
            return piece
        pieces, self._pongs = self._pongs, bytearray()
        while len(pieces) < _SLICE_BYTES and (message := self.next_message()) is not None:
            pieces += self.prefix
            if len(message) > _SLICE_BYTES:  # by reference: it may wait in many connections
                self._rest = memoryview(message)
                return pieces or self._next_piece()
            pieces += message
        return pieces

    def _take_in(self) -> None:
        """ValueError: this is not the protocol."""
        if not self._has_greeted and not self._take_greeting():
            return
        unread, at = self._unread, 0
        while len(unread) >= at + 2:
            flags = unread[at]
            if flags & ~(_MORE | _LONG | _COMMAND) or flags & (_MORE | _COMMAND) == _MORE | _COMMAND:
                raise ValueError(f"flags {flags:#x} of a frame")
            start = at + (9 if flags & _LONG else 2)
            if len(unread) < start:
                break
            end = start + int.from_bytes(unread[at + 1 : start], "big")
            if end - start > _MAX_RECEIVED_BYTES:
                raise ValueError(f"a frame of {end - start} bytes, {_MAX_RECEIVED_BYTES} are allowed")
            if len(unread) < end:
                break
            self._take(flags, bytes(unread[start:end]))
            at = end
        del unread[:at]

    def _take_greeting(self) -> bool:
        said = self._unread[: len(_GREETING)]
        if said[:1] != _SIGNATURE[:1]:
            raise ValueError("not a greeting")
        if len(said) < len(_GREETING):
            return False
        if not said[9] & 1 or said[10] < _OLDEST_MAJOR or said[12:32] != _NULL:
            raise ValueError(f"a greeting of version {said[10]}, mechanism {bytes(said[12:32])!r}")
        del self._unread[: len(_GREETING)]
        self._has_greeted = True
        assert self._transport is not None
        self._transport.write(_encode_command(b"READY", _encode_property(b"Socket-Type", self.kind)))
        return True

    def _take(self, flags: int, content: bytes) -> None:
        if not flags & _COMMAND:
            if not self._is_ready:
                raise ValueError("a message before READY")
            self.take_frame(content, has_more=bool(flags & _MORE))
            return
        if not content or len(content) < 1 + content[0]:
            raise ValueError("a command without its name")
        name, data = content[1 : 1 + content[0]], content[1 + content[0] :]
        if not self._is_ready:
            kind = dict(_properties(data)).get(b"socket-type") if name == b"READY" else None
            if kind not in self.peer_kinds:
                raise ValueError(f"command {name!r}, socket of kind {kind!r}")
            assert self._deadline is not None
            self._deadline.cancel()
            self._is_ready = True
        elif name == b"PING":
            if len(self._pongs) < _MAX_PONG_BYTES:
                self._pongs += _encode_command(b"PONG", data[2 : 2 + _MAX_CONTEXT_BYTES])
            self.pump()
        elif name == b"ERROR":
            raise ValueError("the other side reports an error")
        else:
            self.take_command(name, data)


def _encode_property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value


class Listener:
    """A bound address, and the connections to it: at most so many; one more is cut. OSError: it cannot be bound."""

    def __init__(self, endpoint: str, max_connections: int) -> None:
        self.connections: set[ZMTPConnection] = set()
        self._max_connections = max_connections
        self._make: Callable[[], ZMTPConnection] = ZMTPConnection
        self._welcoming: set[asyncio.Task[None]] = set()
        self._path = self._folder = ""
        scheme, _, address = endpoint.partition("://")
        self._socket = self._bind_path(address) if scheme == "ipc" else _bind_port(address)
        self._acceptor: Acceptor | None = None
        watch(self._socket, _SILENCE_S)
        self.endpoint = f"ipc://{self._path or address}" if scheme == "ipc" else _tcp_endpoint(self._socket)
        """As bound, with its port."""

    def start(self, make: Callable[[], ZMTPConnection]) -> None:
        """Accept on the running loop, until `close`. A connection that has ended is in `connections` no more."""
        self._make = make
        self._acceptor = Acceptor(self._socket, self.endpoint, self._accept)

    def close(self) -> None:
        """Let nobody in any more; its connections stay. Idempotent."""
        if self._path:  # before the socket is closed: afterwards the file may be another's
            with suppress(FileNotFoundError):
                os.unlink(self._path)
            self._path = ""
        if self._folder:
            os.rmdir(self._folder)
            self._folder = ""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        self._socket.close()

    def _accept(self, accepted: socket.socket) -> None:
        if len(self.connections) >= self._max_connections:
            accepted.close()
            return
        connection = self._make()
        self.connections.add(connection)
        connection.ended.add_done_callback(lambda _: self.connections.discard(connection))
        task = asyncio.get_running_loop().create_task(self._welcome(connection, accepted))
        self._welcoming.add(task)
        task.add_done_callback(self._welcoming.discard)

    async def _welcome(self, connection: ZMTPConnection, accepted: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, accepted)
        except OSError as error:  # gone already
            logger.debug("%s: %s", self.endpoint, error)
            accepted.close()
            connection.ended.set_result(None)

    def _bind_path(self, path: str) -> socket.socket:
        """`*`: a new one; `@NAME`: without a file (Linux)."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if path == "*":
                self._folder = tempfile.mkdtemp()
                path = os.path.join(self._folder, "socket")
            if path.startswith("@"):
                made.bind("\0" + path[1:])
            else:
                _remove_stale(path)
                made.bind(path)
                self._path = path
            made.listen(128)
        except BaseException:
            made.close()
            raise
        return made


def _remove_stale(path: str) -> None:
    """The file of a socket at which nobody listens."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)


def _bind_port(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = {"localhost": "127.0.0.1", "*": ""}.get(host, host)
    if host in (name for _, name in socket.if_nameindex()):
        host = _interface_address(host)
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    host = host.strip("[]")
    is_dual = host == "::" and socket.has_dualstack_ipv6()
    bound = (host, 0 if port == "*" else int(port))
    return socket.create_server(bound, family=family, backlog=128, dualstack_ipv6=is_dual)


def _interface_address(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        found = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    return socket.inet_ntoa(found[20:24])


def _tcp_endpoint(bound: socket.socket) -> str:
    host, port, *_ = bound.getsockname()
    return f"tcp://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"tcp://{host}:{port}"
