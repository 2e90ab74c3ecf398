"""What listening sockets of ours have in common: a share of the process's descriptors, and a kernel that watches."""

from __future__ import annotations

import resource
import socket

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
