"""A server's process: its socket, its signals, its start and its end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from types import FrameType
from typing import Any

import uvicorn

from kvferry.clock import SystemClock
from kvferry.errors import ConfigError
from kvferry.http.access import AccessGuard, AccessRules
from kvferry.http.connections import ConnectionLimits, Connections

logger = logging.getLogger(__name__)

_LINGER_S = 2.0
_BACKLOG = 512
_ACCEPTED_AT_ONCE = 16  # more would stand beyond the limit for a moment, each with its descriptor
_NUM_LINES = 5
_LINES_S = 10.0
_LOGGERS_OF_STRANGERS = ("uvicorn.error", "asyncio", "kvferry.http.connections")  # who connects makes them write


def bind_socket(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: before a model is loaded it shows that the port is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as err:
        bound.close()
        raise ConfigError(f"cannot listen on host={host!r} port={port}: {err}") from err
    return bound


def url_of(bound: socket.socket) -> str:
    """What clients reach a bound socket by."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn's, which also stops taking requests as soon as a signal comes, not when the last one has ended."""

    def __init__(
        self,
        app: Any,
        drain_timeout_s: float,
        refuse_new: Callable[[str], None],
        on_listening: Callable[[], None],
        *,
        access_log: bool = False,
        limits: ConnectionLimits = ConnectionLimits(),  # noqa: B008 - frozen
        access: AccessRules = AccessRules(),  # noqa: B008 - frozen
    ) -> None:
        """`refuse_new` is called with the reason at the first signal, `on_listening` when requests can come."""
        self._connections = Connections(limits)
        self._guard = AccessGuard(app, access)
        config = uvicorn.Config(
            access.with_cors(self._guard),
            log_level="warning",
            access_log=access_log,
            lifespan="on",
            http=self._connections.protocol,  # type: ignore[arg-type]
            loop="asyncio",  # uvloop accepts connections in another way
            ws="none",  # has its own protocol, without limits
            backlog=_ACCEPTED_AT_ONCE,
            timeout_graceful_shutdown=max(1, round(drain_timeout_s)),
        )
        if access_log:
            logging.getLogger("uvicorn.access").setLevel(logging.INFO)  # the other levels of uvicorn stay as they are
        super().__init__(config)
        self._refuse_new = refuse_new
        self._on_listening = on_listening
        self.linger_s = _LINGER_S
        self.has_keys = bool(access.api_keys)
        self.failure: str | None = None
        """Why the server ended by itself; None when it was told to."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal drains, a second one does not wait."""
        self._refuse_new("the server is stopping")
        super().handle_exit(sig, frame)

    def fail(self, reason: str) -> None:
        """End `linger_s` from now, so that clients and probes hear why. For the event loop's thread only."""
        self.failure = reason
        asyncio.get_running_loop().call_later(self.linger_s, setattr, self, "should_exit", True)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve; what strangers make the log say is limited meanwhile."""
        with ExitStack() as stack:
            for name in _LOGGERS_OF_STRANGERS:
                stack.enter_context(_few_lines(logging.getLogger(name)))
            await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        self._guard.is_local = bool(sockets) and all(map(_is_loopback, sockets or ()))
        await super().startup(sockets)
        for bound in sockets or ():
            bound.listen(_BACKLOG)  # the kernel's queue; uvicorn's setting is also how many are accepted at once
        if self.started:
            self._on_listening()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if counter % 10 == 0:
            self._connections.sweep()
        return await super().on_tick(counter)


class _FewLines(logging.Filter):
    """Lets few lines of one kind pass in some seconds; the next one says how many were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = SystemClock()
        self._begun_s = self._clock.now()
        self._counts: dict[str, int] = {}
        self._left_out: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = str(record.msg)[:50]
        if self._clock.now() - self._begun_s > _LINES_S:
            self._begun_s = self._clock.now()
            self._left_out = {name: num - _NUM_LINES for name, num in self._counts.items() if num > _NUM_LINES}
            self._counts = {}
        num = self._counts[kind] = self._counts.get(kind, 0) + 1
        if (left_out := self._left_out.pop(kind, 0)) > 0:
            record.msg = f"{record.msg} (and {left_out} more lines like it, left out)"
        return num <= _NUM_LINES


@contextmanager
def _few_lines(of: logging.Logger) -> Iterator[None]:
    few = _FewLines()
    of.addFilter(few)
    try:
        yield
    finally:
        of.removeFilter(few)


def _is_loopback(bound: socket.socket) -> bool:
    return ip_address(bound.getsockname()[0]).is_loopback


def run_until_signal(server: Server, bound: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, drain, return. Blocks; main thread only."""
    if not (_is_loopback(bound) or server.has_keys):
        logger.warning(
            "host=%s: everyone who reaches this port can use the model: there is no authentication without --api-key",
            bound.getsockname()[0],
        )
    # uvicorn raises the signal again at its end, which is to be an ordinary end.
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[bound])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
