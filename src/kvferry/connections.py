"""TCP connections of a ZMQ socket: which there are, how much waits in each, and the ones that are cut.

ZMQ bounds neither the connections that it accepts nor what it takes in through one, and its own high-water mark for the
latter stops the input, after which libzmq 4.3.5 aborts the process when the other side hangs up. So the owner of a
socket watches it: the socket's monitor tells of connections, the kernel (TCP_INFO) how many bytes went through each.

Works on a duplicate of a connection's descriptor, so that it can never hit another one that took its number. Not for
several threads.
"""

from __future__ import annotations

import resource
import socket
import struct
import time
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_TCP_BYTES_ACKED, _TCP_BYTES_RECEIVED, _TCP_BYTES_END = 120, 128, 136  # in struct tcp_info of Linux
_KERNEL_BUFFER_BYTES = 256 << 10  # per connection and direction
_NUM_PROBES = 3  # of an idle connection, without an answer
_KNOWN_SHARE = 0.75  # of the slots, for those that are known; the others are for those who come
_STRANGER_SHARE = 0.5


def descriptor_share(most: int, divisor: int) -> int:
    """At most this many: what a `divisor`th of the process's descriptors (RLIMIT_NOFILE) allows; 4 at least."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if limit == resource.RLIM_INFINITY else min(most, max(4, limit // divisor))


def watched_by_the_kernel(zmq: Any, silence_s: float) -> list[tuple[int, int]]:
    """Options of a ZMQ socket: a TCP connection of its breaks when the other machine acknowledges nothing for so long.

    Instead of ZMQ's own heartbeats, at which libzmq 4.3.5 aborts the process where a connection broke at a bad moment.
    """
    probe_s = max(1, min(10_000, round(silence_s / (_NUM_PROBES + 1))))  # the kernel takes 32767
    return [
        (zmq.TCP_KEEPALIVE, 1), (zmq.TCP_KEEPALIVE_IDLE, probe_s), (zmq.TCP_KEEPALIVE_INTVL, probe_s),
        (zmq.TCP_KEEPALIVE_CNT, _NUM_PROBES), (zmq.TCP_MAXRT, max(1000, round(silence_s * 1000))),
    ]  # fmt: skip


@dataclass(slots=True, eq=False)
class Connection:
    """One of them. Bytes are counted by the kernel on Linux; elsewhere nothing is known of them."""

    socket: socket.socket
    owner: str
    """The peer that was dialled; empty: it was accepted."""
    since_s: float
    name: bytes = b""
    route: bytes = b""
    """What the socket calls it."""
    is_known: bool = False
    """A peer whom the owner of the socket wants to keep."""
    delivered_bytes: int = 0
    """Received, and known to have been handed to the owner of the socket."""
    received_bytes: int = 0
    """Received when it last delivered a message."""
    handed_bytes: int = 0
    """Given to ZMQ for it, since all before was known to have arrived."""
    acked_bytes: int = 0
    """What had arrived then."""

    def counts(self) -> tuple[int, int]:
        """Bytes that the other side has acknowledged, and that were received; zeros where the kernel does not count."""
        with suppress(OSError):
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_BYTES_END)
            if len(info) >= _TCP_BYTES_END:
                return struct.unpack_from("<2Q", info, _TCP_BYTES_ACKED)
        return 0, 0

    def unread_bytes(self) -> int:
        """Received, and not yet handed over."""
        return self.counts()[1] - self.delivered_bytes

    def unsent_bytes(self) -> int:
        """Given to ZMQ, and not yet arrived."""
        acked = self.counts()[0]
        if acked - self.acked_bytes >= self.handed_bytes:
            self.handed_bytes, self.acked_bytes = 0, acked
            return 0
        return self.handed_bytes - max(0, acked - self.acked_bytes)

    def cut(self) -> None:
        """ZMQ sees that it has ended, and lets go of it and of all that waits in it."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class Connections:
    """Those of one socket, or of several that share the limits.

    Of `max_accepted` slots half at most are for strangers: one more, and the oldest of them goes. Known ones are kept,
    unless they fill three quarters. Where `keeps_oldest`, nobody is known: who comes when all slots are taken is cut.
    """

    def __init__(
        self,
        limit_bytes: int,
        total_limit_bytes: int,
        max_accepted: int,
        *,
        keeps_oldest: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keeps_oldest = keeps_oldest
        self._limit_bytes = limit_bytes
        self._total_limit_bytes = total_limit_bytes
        self.max_accepted = max_accepted
        self._clock = clock
        self._open: dict[int, Connection] = {}
        self._named: dict[bytes, Connection] = {}
        self._known: set[bytes] = set()
        self.num_cut = 0
        """Since the start."""

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, number: int, owner: str, port: int) -> None:
        """Descriptor `number` is a connection now, to `port` of `owner`, or accepted at `port`."""
        self.closed(number)
        try:
            found = socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM)
        except OSError:  # gone already
            return
        if not _is_connection(found, port, is_accepted=not owner):  # gone already, and its number is another's now
            found.close()
            return
        self._open[number] = Connection(found, owner, self._clock())
        if not owner:
            self._make_room()

    def closed(self, number: int) -> None:
        """Nothing comes from this descriptor any more."""
        if (old := self._open.pop(number, None)) is not None:
            old.socket.close()
            self._unname(old)

    def __contains__(self, number: int) -> bool:
        """Whether this descriptor is known to be a connection."""
        return number in self._open

    def delivered(self, number: int, num_bytes: int, name: bytes = b"", route: bytes = b"") -> None:
        """A whole message came through descriptor `number`, which the socket calls `route`, from `name`.

        Who came through another one before is reached through this one from now on.
        """
        if (connection := self._open.get(number)) is None:
            return
        # Not more than was received: ZMQ may have kept it from one that has gone, and had this number before.
        connection.received_bytes = connection.counts()[1]
        connection.delivered_bytes = min(connection.delivered_bytes + num_bytes, connection.received_bytes)
        if name and connection.name != name:
            self._unname(connection)
            connection.name, connection.route, connection.is_known = name, route, name in self._known
            self._named[name] = connection

    def drained(self, owner: str) -> None:
        """ZMQ holds no whole message of this owner's connections."""
        for connection in self._open.values():
            if connection.owner == owner:
                connection.delivered_bytes = connection.received_bytes

    def named(self, name: bytes) -> Connection | None:
        """The connection of who bears this name, if it has sent something."""
        return self._named.get(name)

    def keep_only(self, names: Set[bytes]) -> None:
        """These are known now, whether they are connected or not; all others are strangers."""
        if self._known != names:
            self._known = set(names)
            for name, connection in self._named.items():
                connection.is_known = name in self._known

    def cut_overdue(self) -> None:
        """Cut each connection above the limit, and the largest ones until the total is within its own; known ones last.

        Whole messages and parts of one count alike, and so does what waits to be sent.
        """
        waiting = [(each.unread_bytes() + each.unsent_bytes(), each) for each in self._open.values()]
        total = sum(size for size, _ in waiting)
        for size, connection in sorted(waiting, key=lambda each: (each[1].is_known, -each[0])):
            if size > self._limit_bytes or total > self._total_limit_bytes:
                self._cut(connection)
                total -= size

    def cut_greedy(self, spare_bytes: int, bytes_per_s: float) -> None:
        """Cut those that have sent more than whoever uses the socket as it is meant would have by now."""
        now = self._clock()
        for connection in self._open.values():
            if connection.counts()[1] > spare_bytes + bytes_per_s * (now - connection.since_s):
                self._cut(connection)

    def close(self) -> None:
        """Let go of all."""
        for number in list(self._open):
            self.closed(number)

    def _cut(self, connection: Connection) -> None:
        self.num_cut += 1
        connection.cut()

    def _unname(self, connection: Connection) -> None:
        if self._named.get(connection.name) is connection:
            del self._named[connection.name]

    def _make_room(self) -> None:
        if self._keeps_oldest:
            for number in list(self._open)[self.max_accepted :]:
                self._cut(self._open[number])
                self.closed(number)
            return
        accepted = {number: each for number, each in self._open.items() if not each.owner}
        known = [number for number, each in accepted.items() if each.is_known]
        kept = set(known[: int(_KNOWN_SHARE * self.max_accepted)])
        others = [number for number in accepted if number not in kept]
        room = min(self.max_accepted - len(kept), max(1, int(_STRANGER_SHARE * self.max_accepted)))
        for number in others[: max(0, len(others) - room)]:
            self._cut(self._open[number])
            self.closed(number)


def _is_connection(found: socket.socket, port: int, *, is_accepted: bool) -> bool:
    try:
        is_tcp = found.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) in (socket.AF_INET, socket.AF_INET6)
        return is_tcp and (found.getsockname() if is_accepted else found.getpeername())[1] == port
    except OSError:  # no socket at all, or closed by the other side
        return False


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
