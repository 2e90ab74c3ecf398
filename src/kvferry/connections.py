"""What listening sockets of ours have in common: how they accept, their share of descriptors, a kernel that watches."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Callable

logger = logging.getLogger(__name__)

_BUSY_S = 0.2
_KERNEL_BUFFER_BYTES = 256 << 10  # per connection and direction
_NUM_PROBES = 3  # of an idle connection, without an answer


def descriptor_share(most: int, divisor: int) -> int:
    """At most this many: what a `divisor`th of the process's descriptors (RLIMIT_NOFILE) allows; 4 at least."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if limit == resource.RLIM_INFINITY else min(most, max(4, limit // divisor))


def watch(connection: socket.socket, silence_s: float) -> None:
    """The kernel ends it when the other machine acknowledges nothing for so long, also while there is nothing to say.

    Where the kernel cannot (not Linux), it goes by its own times. A listening socket hands this on to those it accepts.
    """
    for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        connection.setsockopt(socket.SOL_SOCKET, buffer, _KERNEL_BUFFER_BYTES)
    if connection.family == socket.AF_UNIX:
        return
    probe_s = max(1, min(10_000, round(silence_s / (_NUM_PROBES + 1))))  # the kernel takes 32767
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", probe_s), ("TCP_KEEPINTVL", probe_s), ("TCP_KEEPCNT", _NUM_PROBES),
        ("TCP_USER_TIMEOUT", max(1000, min(1 << 30, round(silence_s * 1000)))),
    ):  # fmt: skip
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class Acceptor:
    """Hands on what connects to a bound socket, non-blocking, one per turn of the running loop, until `close`.

    When nothing can be accepted (no descriptors are left), it tries again after 0.2 s; the first time is logged, with
    `name`.
    """

    def __init__(self, listener: socket.socket, name: str, on_accepted: Callable[[socket.socket], None]) -> None:
        self._listener = listener
        self._name = name
        self._on_accepted = on_accepted
        self._has_warned = False
        self._retry: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Let nobody in any more; the socket is closed. Idempotent."""
        if self._retry is not None:
            self._retry.cancel()
        if self._listener.fileno() >= 0 and not self._loop.is_closed():
            self._loop.remove_reader(self._listener)
        self._listener.close()

    def _listen(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except BlockingIOError:  # gone already
            return
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning("%s: a connection cannot be accepted: %s", self._name, error)
            self._loop.remove_reader(self._listener)
            self._retry = self._loop.call_later(_BUSY_S, self._listen)
            return
        accepted.setblocking(False)
        self._on_accepted(accepted)
