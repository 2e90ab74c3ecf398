"""Connections of an HTTP server: how many, for how long, and how many bytes of bodies that are not whole yet.

A connection waits from its start, or from the end of its last answer, until a request has come whole. One that waits
has deadlines, and gives way: when there are as many connections as there may be, or when unfinished bodies take too
much memory, the one that has waited longest is closed. So clients that send nothing, or half of something, keep nobody
out.

The parser is h11 everywhere, also where uvicorn would find another one: these rules need to see what it sees.
"""

from __future__ import annotations

import json
import logging
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvferry.clock import Clock, SystemClock
from kvferry.errors import ConfigError
from kvferry.http.requests import ApiError

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger(__name__)

_MAX_HEADER_BYTES = 16 << 10
_MAX_CONNECTIONS = 2048  # unless asked for more: half a request of each costs some 50 KiB
_MIN_CONNECTIONS = 16
_BODIES = 8  # unfinished bodies of the largest size, together
_FEW_PIECES = 1000  # of a body; more must have so many bytes each, for each costs as much as a kilobyte
_MIN_PIECE_BYTES = 256
_WRITE_TIMEOUT_S = 60.0
_CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What clients together, and each of them, may take."""

    max_connections: int | None = None
    """None: a part of the file descriptors that are free when the server starts, at most 2048."""
    descriptors_each: int = 2
    """That part is one in so many: the rest is for what else the process opens, also for a request's sake."""
    header_timeout_s: float = 10.0
    """From the connection's start, or the last answer, to the end of the next request's headers."""
    body_timeout_s: float = 60.0
    """From there to the end of its body."""
    max_body_bytes: int = 8 << 20
    """Of one body; those that are not whole yet may have eight times as many together."""

    def num_connections(self) -> int:
        """How many there may be. ConfigError when there are too few file descriptors for that."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        num_open = len(os.listdir("/proc/self/fd"))
        room = (limit - num_open) // self.descriptors_each
        most = min(room, _MAX_CONNECTIONS) if self.max_connections is None else self.max_connections
        if most > room or room < _MIN_CONNECTIONS:
            wanted = max(most, _MIN_CONNECTIONS)
            named = "" if self.max_connections is None else f"max_connections={most}: "
            raise ConfigError(
                f"{named}{wanted} connections need {wanted * self.descriptors_each + num_open} file descriptors, and "
                f"this process may have {limit}: raise that with `ulimit -n`, or lower max_connections"
            )
        return most


class Connections:
    """All connections of one server. For the event loop's thread."""

    def __init__(self, limits: ConnectionLimits, clock: Clock | None = None) -> None:
        self.limits = limits
        self.clock = clock or SystemClock()
        self._max_connections = limits.num_connections()
        self._max_unfinished_bytes = _BODIES * limits.max_body_bytes
        self._open: set[HTTPConnection] = set()
        self._waiting: dict[HTTPConnection, None] = {}  # the one that has waited longest first
        self._num_unfinished_bytes = 0

    def protocol(self, *arguments: Any, **settings: Any) -> HTTPConnection:
        """For uvicorn, in place of a class."""
        return HTTPConnection(self, *arguments, **settings)

    def enter(self, connection: HTTPConnection) -> None:
        """A connection has been made. It, or the one that has waited longest, is closed where there are too many."""
        if len(self._open) >= self._max_connections:
            victim = next(iter(self._waiting), connection)
            logger.warning(
                "the largest number of connections is reached (%d, --max-connections): %s", self._max_connections,
                "a new one is refused" if victim is connection else "the one that waited longest is closed",
            )  # fmt: skip
            victim.end(ApiError(503, "the server has reached its largest number of connections", code="overloaded"))
            if victim is connection:  # all others are being answered
                return
        self._open.add(connection)
        self.wait(connection)

    def wait(self, connection: HTTPConnection) -> None:
        """From now on it waits for a request."""
        self.served(connection)
        self._waiting[connection] = None

    def served(self, connection: HTTPConnection) -> None:
        """Its request has come whole."""
        self._waiting.pop(connection, None)
        self._num_unfinished_bytes -= connection.num_body_bytes
        connection.num_body_bytes = 0

    def received(self, connection: HTTPConnection, num_bytes: int) -> None:
        """A piece of its body, which is not whole yet."""
        connection.num_body_bytes += num_bytes
        self._num_unfinished_bytes += num_bytes
        while self._num_unfinished_bytes > self._max_unfinished_bytes:
            victim = next(one for one in self._waiting if one.num_body_bytes)
            logger.warning(
                "unfinished bodies have more than %d bytes: the server drops the oldest one",
                self._max_unfinished_bytes,
            )
            victim.end(ApiError(503, "the server has too many unfinished bodies; send it again", code="overloaded"))

    def leave(self, connection: HTTPConnection) -> None:
        """It is closed, or about to be."""
        self._open.discard(connection)
        self.served(connection)

    def sweep(self) -> None:
        """Close what is late. To be called about once a second."""
        now_s = self.clock.now()
        for connection in tuple(self._open):
            connection.check(now_s)


class _Parser(h11.Connection):
    """h11's, which also refuses what two servers could take for different requests; shows its owner each event."""

    def __init__(self, seen: Callable[[h11.Event], None]) -> None:
        super().__init__(h11.SERVER, _MAX_HEADER_BYTES)
        self._seen = seen

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1"):
                raise h11.RemoteProtocolError("Transfer-Encoding with Content-Length, or in HTTP/1.0")
        if isinstance(event, h11.Request | h11.Data | h11.EndOfMessage):
            self._seen(event)
        return event


class HTTPConnection(H11Protocol):
    """uvicorn's, with the limits of `Connections`."""

    def __init__(self, all_of_them: Connections, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.conn = _Parser(self._seen)
        self.num_body_bytes = 0
        """Of a body that is not whole yet."""
        self._all = all_of_them
        self._num_pieces = 0
        self._late_s: float | None = None  # when what it waits for is late; None: it waits for nothing
        self._write_late_s: float | None = None
        self._close_late_s: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """One more, if there may be."""
        super().connection_made(transport)
        self._wait_for(self._all.limits.header_timeout_s)
        self._all.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """One less."""
        self._all.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """In pieces while it may be headers: their limit is looked at after each."""
        while self.conn.their_state is h11.IDLE and len(data) > _MAX_HEADER_BYTES:
            super().data_received(data[:_MAX_HEADER_BYTES])
            data = data[_MAX_HEADER_BYTES:]
            if self.transport.is_closing():
                return
        super().data_received(data)

    def on_response_complete(self) -> None:
        """It waits again, unless the request's body has not come whole yet."""
        if self.conn.their_state in (h11.DONE, h11.MUST_CLOSE):
            self._wait_for(self._all.limits.header_timeout_s)
            self._all.wait(self)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is sent to."""
        self._write_late_s = self._all.clock.now() + _WRITE_TIMEOUT_S
        super().pause_writing()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._write_late_s = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """In OpenAI's form."""
        self.end(
            ApiError(
                400,
                f"{msg.rstrip('.')}: the request is not HTTP/1.1, has more than "
                f"{_MAX_HEADER_BYTES >> 10} KiB of headers, has both Content-Length and Transfer-Encoding, or sends "
                "its body in many pieces below "
                f"{_MIN_PIECE_BYTES} bytes",
            )
        )

    def end(self, why: ApiError) -> None:
        """Close it. The client hears why, unless an answer has begun or it keeps a connection it does not use now."""
        has_begun = self.cycle is not None and not self.cycle.response_complete and self.cycle.response_started
        is_idle = self.cycle is not None and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        if not (has_begun or is_idle or self.transport.get_write_buffer_size()):
            content = json.dumps(why.body()).encode()
            head = f"HTTP/1.1 {why.status} {HTTPStatus(why.status).phrase}\r\nContent-Type: application/json\r\n"
            head += f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
            self.transport.write(head.encode() + content)
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._all.leave(self)

    def check(self, now_s: float) -> None:
        """Close it where it is late."""
        if self.transport.is_closing():  # but it does not take what it has been sent
            if self._close_late_s is None:
                self._close_late_s = now_s + _CLOSE_TIMEOUT_S
            elif now_s > self._close_late_s:
                self.transport.abort()
        elif self._write_late_s is not None and now_s > self._write_late_s:
            self.transport.abort()
        elif self._late_s is not None and now_s > self._late_s:
            limits, is_body = self._all.limits, self.conn.their_state is h11.SEND_BODY
            name, late_s = ("body", limits.body_timeout_s) if is_body else ("headers", limits.header_timeout_s)
            option = "--body-timeout-s" if is_body else "--header-timeout-s"
            self.end(ApiError(408, f"the request's {name} did not arrive completely within {late_s:g} s ({option})"))

    def _wait_for(self, timeout_s: float) -> None:
        self._late_s = self._all.clock.now() + timeout_s

    def _seen(self, event: h11.Event) -> None:
        if self.transport.is_closing():
            return
        if isinstance(event, h11.Request):
            self._num_pieces = 0
            self._wait_for(self._all.limits.body_timeout_s)
        elif isinstance(event, h11.Data):
            self._num_pieces += 1
            self._all.received(self, len(event.data))
            if self._num_pieces > _FEW_PIECES + self.num_body_bytes // _MIN_PIECE_BYTES:
                raise h11.RemoteProtocolError("its body comes in pieces that are too small")
        elif self.cycle is None or not self.cycle.response_complete:
            self._late_s = None
            self._all.served(self)
        else:  # answered before its body was whole
            self._wait_for(self._all.limits.header_timeout_s)
            self._all.wait(self)
